"""The objective against a transcription, runs that resume to the bit, data that name their faults."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_kernels.training import GradientNormLoss, NaturalLoss

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from PIL import Image

from gradnorm_kernels import FusedGeLU
from gradnorm_kernels.training import trainer as trainer_module
from gradnorm_kernels.training.config import MAY_CHANGE, TrainConfig, TrainingError
from gradnorm_kernels.training.data import Data, load_data, seed_everything
from gradnorm_kernels.training.models import Normalize, create_model, input_spec
from gradnorm_kernels.training.trainer import (
    CHECKPOINT,
    Interrupted,
    Trainer,
    load_checkpoint,
    load_model,
    resumed_config,
    train,
)

# Four steps an epoch, the least in which the middle of an epoch differs from its ends.
QUICK = TrainConfig(epochs=3, batch_size=359, lr=4e-3, warmup_epochs=1.0, epsilon=0.1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine OpenMP's threads wait for each other, and such small steps take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(dtype=torch.float64):
    """Normalises with channels' different stds, which the published form handles by a scalar."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 4))
    return Normalize(layers, mean=(0.4, 0.5, 0.6), std=(0.225, 0.225, 0.225)).to(dtype)


def sample_batch(dtype=torch.float64):
    return torch.rand(5, 3, 2, 2, dtype=dtype), torch.tensor([0, 3, 1, 1, 2])


class TestObjective:
    def test_equals_the_published_form(self):
        """Gradient of the batch mean with respect to the normalised input, times B, times epsilon / std."""
        model, (images, targets) = small_model(), sample_batch()
        loss = GradientNormLoss(0.8, 1.2, 4 / 255, ramp_epochs=5)(model, images, targets, epoch=2)

        normalised = ((images - model.mean) / model.std).requires_grad_()
        mean = -model.model(normalised).log_softmax(1)[range(5), targets].sum() / 5
        (gradient,) = torch.autograd.grad(mean, normalised, create_graph=True)
        norms = [sample.abs().sum() for sample in gradient * 5 * (4 / 255) / model.std]
        expected = 0.8 * mean + 1.2 * (2 / 5) * sum(norms) / 5

        torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.cross_entropy, mean.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.gradient_norm, sum(norms).detach() / 5, rtol=1e-12, atol=0)
        assert loss.alpha == 2 / 5
        parameters = list(model.parameters())
        for actual, wanted in zip(
            torch.autograd.grad(loss.total, parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-14)

    def test_norm_predicts_the_loss_under_attack(self):
        """Moving every pixel by epsilon along its gradient's sign raises the loss by the norm."""
        model, (images, targets) = small_model(), sample_batch()
        epsilon = 1e-6
        norm = GradientNormLoss(epsilon=epsilon)(model, images, targets, epoch=9).gradient_norm
        pixels = images.requires_grad_()
        before = F.cross_entropy(model(pixels), targets)
        (gradient,) = torch.autograd.grad(before, pixels)
        after = F.cross_entropy(model(images + epsilon * gradient.sign()), targets)
        torch.testing.assert_close((after - before).detach(), norm, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("objective", [GradientNormLoss(), NaturalLoss()])
    def test_soft_targets_extend_hard_ones(self, objective):
        model, (images, targets) = small_model(), sample_batch()
        hard = objective(model, images, targets, epoch=5)
        one_hot = F.one_hot(targets, 4).double()
        soft = objective(model, images, one_hot, epoch=5)
        torch.testing.assert_close(soft.total, hard.total)
        mixed = objective(model, images, 0.7 * one_hot + 0.3 / 4, epoch=5)
        assert not torch.isclose(mixed.total, hard.total)

    @pytest.mark.parametrize(
        ("ramp_epochs", "epoch", "alpha"),
        [(5, 0, 0.0), (5, 2.5, 0.5), (5, 5, 1.0), (5, 80, 1.0), (0, 0, 1.0)],
    )
    def test_ramp(self, ramp_epochs, epoch, alpha):
        objective = GradientNormLoss(ramp_epochs=ramp_epochs)
        model, batch = small_model(), sample_batch()
        loss = objective(model, *batch, epoch=epoch)
        assert loss.alpha == alpha
        penalty = alpha * 1.2 * (loss.gradient_norm or 0)
        torch.testing.assert_close(loss.total.detach(), 0.8 * loss.cross_entropy + penalty)

    @pytest.mark.parametrize("objective", [GradientNormLoss(), GradientNormLoss(gn_weight=0), NaturalLoss()])
    def test_no_input_gradient_where_it_has_no_weight(self, objective, monkeypatch):
        model, batch = small_model(), sample_batch()
        epoch = 0 if objective == GradientNormLoss() else 10

        def refuse(*args, **kwargs):
            raise AssertionError("took a gradient")

        monkeypatch.setattr(torch.autograd, "grad", refuse)
        assert objective(model, *batch, epoch=epoch).gradient_norm is None
        with pytest.raises(AssertionError, match="took a gradient"):
            GradientNormLoss()(model, *batch, epoch=1)

    def test_leaves_the_images_alone(self):
        model, (images, targets) = small_model(), sample_batch()
        before = images.clone()
        GradientNormLoss()(model, images, targets, epoch=9).total.backward()
        assert not images.requires_grad and images.grad is None and torch.equal(images, before)

    def test_half_precision_norm_does_not_overflow(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2, bias=False)).half()
        nn.init.constant_(model[1].weight[0], 1.0)
        nn.init.constant_(model[1].weight[1], -1.0)
        images = torch.zeros(1, 3, 224, 224, dtype=torch.float16)
        loss = GradientNormLoss(epsilon=1.0)(model, images, torch.tensor([1]), epoch=9)
        # The logits are equal, so d CE / d pixel is (1 - -1) / 2; a float16 ends at 65,504.
        assert loss.gradient_norm.item() == 3 * 224 * 224

    @pytest.mark.parametrize(
        ("error", "name", "change"),
        [
            (TypeError, "images", {"images": torch.zeros(5, 3, 2, 2, dtype=torch.uint8)}),
            (TypeError, "images", {"images": [0.5]}),
            (ValueError, "images", {"images": torch.zeros(0, 3, 2, 2)}),
            (TypeError, "targets", {"targets": torch.zeros(5, dtype=torch.int32)}),
            (TypeError, "targets", {"targets": [0, 1, 2, 3, 0]}),
            (ValueError, "targets", {"targets": torch.zeros(4, dtype=torch.int64)}),
            (ValueError, "targets", {"targets": torch.full((5, 3), 1 / 3)}),
            (ValueError, "targets", {"targets": torch.tensor([0, 1, 2, 3, 4])}),
            # cross_entropy's ignore_index
            (ValueError, "targets", {"targets": torch.tensor([0, 1, 2, 3, -100])}),
            (ValueError, "targets", {"targets": torch.zeros(5, dtype=torch.int64, device="meta")}),
            (ValueError, "model", {"model": lambda images: images}),
        ],
    )
    @pytest.mark.parametrize("objective", [GradientNormLoss(), NaturalLoss()])
    def test_bad_input_is_named(self, objective, error, name, change):
        images, targets = sample_batch(torch.float32)
        arguments = {"model": small_model(torch.float32), "images": images, "targets": targets} | change
        with pytest.raises(error, match=name):
            objective(**arguments, epoch=3)

    @pytest.mark.parametrize("name", ["ce_weight", "gn_weight", "epsilon", "ramp_epochs"])
    @pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
    def test_bad_settings_are_named(self, name, value):
        with pytest.raises(ValueError, match=name):
            GradientNormLoss(**{name: value})

    def test_bad_epoch_is_named(self):
        with pytest.raises(ValueError, match="epoch"):
            GradientNormLoss()(small_model(), *sample_batch(), epoch=-1)

    def test_disabled_gradients_are_reported(self):
        with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are disabled"):
            GradientNormLoss()(small_model(), *sample_batch(), epoch=9)


class TestModels:
    def test_normalize(self):
        pixels = torch.rand(2, 3, 4, 4)
        normalised = Normalize(nn.Identity(), (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(pixels)
        torch.testing.assert_close(normalised[:, 2], (pixels[:, 2] - 0.3) / 2.0)
        with pytest.raises(ValueError, match="std"):
            Normalize(nn.Identity(), (0.1, 0.2), (0.5, 0.0))

    # A model whose timm definition fixes the input size, and one that takes any.
    @pytest.mark.parametrize(
        ("name", "size"), [("gelu_mixer", 8), ("vit_tiny_patch16_224", 32), ("resnet10t", 32)]
    )
    def test_create_model(self, name, size):
        spec = input_spec(name, 3, size)
        model = create_model(name, spec, num_classes=7, activation="silu").eval()
        assert model(torch.rand(2, 3, size, size)).shape == (2, 7)
        kinds = {type(module).__name__ for module in model.modules()}
        assert "SiLU" in kinds and not kinds & {"GELU", "ReLU"}

    def test_own_numbers_of_a_timm_model(self):
        spec = input_spec("resnet10t", 3)
        assert spec.size == 176 and spec.mean == (0.485, 0.456, 0.406) and spec.crop_pct < 1
        assert input_spec("resnet10t", 3, 32).crop_pct == 1.0
        assert input_spec("resnet10t", 1).mean == (0.5,)

    def test_small_model_is_the_same_in_both_modes(self):
        model = create_model("gelu_mixer", input_spec("gelu_mixer", 1, 8), 10)
        nn.init.normal_(model.model.head.weight)
        images = torch.rand(3, 1, 8, 8)
        assert torch.equal(model.train()(images), model.eval()(images))
        assert model(images).std() > 0

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("--model", {"model": "no_such_model"}),
            ("--activation", {"activation": "no_such_activation"}),
            ("--pretrained", {"pretrained": True}),
            ("--image-size", {"image_size": 9}),
            ("--device", {"device": "no_such_device"}),
            ("--batch-size", {"batch_size": 2000}),
            ("--augment", {"augment": "light"}),
            ("--augment", {"augment": "heavy"}),
            ("--epochs", {"epochs": 0}),
            ("--lr", {"lr": 0.0}),
            ("--epsilon", {"epsilon": -1.0}),
            ("--epsilon", {"epsilon": float("nan")}),
            ("--ema-decay", {"ema_decay": 1.0}),
            ("--label-smoothing", {"label_smoothing": 1.0}),
        ],
    )
    def test_bad_options_are_named(self, name, change, tmp_path):
        with pytest.raises(TrainingError, match=f"^{name}:"):
            train(replace(QUICK, **change), tmp_path)
        assert not list(tmp_path.iterdir())


def assert_same_run(directory, reference):
    """All but the timings and what may change is equal, to the bit."""
    states = [load_checkpoint(path / CHECKPOINT) for path in (directory, reference)]
    metrics = [(path / "metrics.jsonl").read_text().splitlines() for path in (directory, reference)]
    cleaned = []
    for state, lines in zip(states, metrics, strict=True):
        state["config"] = {k: v for k, v in state["config"].items() if k not in MAY_CHANGE}
        assert [json.loads(line) for line in lines] == state["history"]
        assert [line["epoch"] for line in state["history"]] == list(range(1, len(lines) + 1))
        for item in [*state["history"], state["sums"]]:
            item.pop("seconds")
            item.pop("images_per_second", None)
        cleaned.append(to_bytes(state))
    assert cleaned[0] == cleaned[1]


def to_bytes(value):
    """A tree whose tensors are comparable by ``==``."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: to_bytes(item) for key, item in value.items()}
    return [to_bytes(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    train(QUICK, directory)
    return directory


def interrupt_at(monkeypatch, call, owner=Trainer, method="step"):
    """Sends SIGINT to this process in the call-th call (from 1) of the owner's method."""
    original, calls = getattr(owner, method), 0

    def interrupting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, interrupting)


class TestRun:
    def test_learns_and_records(self, uninterrupted):
        lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert lines[2]["loss"] < lines[0]["loss"]
        # The ramp's value in the last step of each epoch, and the cosine's end after the last.
        assert [line["alpha"] for line in lines] == pytest.approx([0.75 / 5, 1.75 / 5, 2.75 / 5])
        assert lines[0]["lr"] == pytest.approx(QUICK.lr, rel=0.3) and lines[2]["lr"] == pytest.approx(
            QUICK.min_lr
        )
        assert all(line["seconds"] > 0 and line["gradient_norm"] > 0 for line in lines)
        assert json.loads((uninterrupted / "config.json").read_text()) == asdict(QUICK)

    def test_averaged_weights_are_evaluated_and_loaded(self, uninterrupted):
        state = load_checkpoint(uninterrupted / CHECKPOINT)
        key = "model.head.weight"
        assert not torch.equal(state["ema"][key], state["model"][key])
        model = load_model(uninterrupted)
        assert torch.equal(model.state_dict()[key], state["ema"][key])
        images, targets = load_data(QUICK).evaluation.tensors
        with torch.no_grad():
            accuracy = (model(images).argmax(1) == targets).double().mean().item()
        assert accuracy == pytest.approx(state["history"][-1]["eval_accuracy"])

    def test_the_seed_decides(self, uninterrupted, tmp_path):
        train(replace(QUICK, epochs=3), tmp_path / "same")
        assert_same_run(tmp_path / "same", uninterrupted)
        train(replace(QUICK, seed=1), tmp_path / "other")
        with pytest.raises(AssertionError):
            assert_same_run(tmp_path / "other", uninterrupted)

    # Of four steps an epoch: the first one of all, one in the middle, an epoch's last, and the run's last.
    @pytest.mark.parametrize("step", [1, 6, 8, 12])
    def test_resumes_after_an_interrupt(self, step, uninterrupted, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted, match=str(tmp_path / CHECKPOINT)):
                train(QUICK, tmp_path)
        assert load_checkpoint(tmp_path / CHECKPOINT)["step_in_epoch"] == (step - 1) % 4 + 1
        train(resumed_config(tmp_path, {}), tmp_path, resume=True)
        assert_same_run(tmp_path, uninterrupted)

    def test_resumes_after_an_interrupt_while_evaluating(self, uninterrupted, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 2, Data, "evaluation_batches")
            with pytest.raises(Interrupted):
                train(QUICK, tmp_path)
        saved = load_checkpoint(tmp_path / CHECKPOINT)
        assert (saved["epoch"], saved["step_in_epoch"]) == (1, 4)
        train(QUICK, tmp_path, resume=True)
        assert_same_run(tmp_path, uninterrupted)

    def test_resumes_after_a_crash(self, uninterrupted, tmp_path, monkeypatch):
        """The steps after the last checkpoint are done again."""
        with monkeypatch.context() as patch:
            original = Trainer._record

            def crash(self, *args):
                if (self.epoch, self.step_in_epoch) == (1, 2):
                    raise OSError("power cut")
                original(self, *args)

            patch.setattr(Trainer, "_record", crash)
            with pytest.raises(OSError, match="power cut"):
                train(QUICK, tmp_path)
        train(QUICK, tmp_path, resume=True)
        assert_same_run(tmp_path, uninterrupted)
        train(QUICK, tmp_path, resume=True)  # a finished run has nothing left to do
        assert_same_run(tmp_path, uninterrupted)

    def test_resumes_where_everything_is_random(self, image_folder, tmp_path, monkeypatch):
        """Dropout, mixup and augmentation draw from three generators in two processes."""

        def with_dropout(*args, **kwargs):
            model = create_model(*args, **kwargs)
            model.model.head_drop = nn.Dropout(0.5)
            return model

        monkeypatch.setattr(trainer_module, "create_model", with_dropout)
        config = TrainConfig(
            data=str(image_folder), image_size=16, batch_size=4, augment="recipe", workers=1, mode="train",
            epochs=2, lr=4e-3, warmup_epochs=0.5, ramp_epochs=1.0,
        )  # fmt: skip
        train(config, tmp_path / "reference")
        with monkeypatch.context() as patch:
            interrupt_at(patch, 6)
            with pytest.raises(Interrupted):
                train(config, tmp_path / "resumed")
        torch.manual_seed(12345)
        np.random.seed(12345)
        train(replace(config, workers=0), tmp_path / "resumed", resume=True)
        assert_same_run(tmp_path / "resumed", tmp_path / "reference")

    def test_second_interrupt_aborts(self, tmp_path, monkeypatch):
        before = signal.getsignal(signal.SIGINT)
        original = Trainer.step

        def twice(*args):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return original(*args)

        monkeypatch.setattr(Trainer, "step", twice)
        with pytest.raises(KeyboardInterrupt):
            train(QUICK, tmp_path)
        assert not (tmp_path / CHECKPOINT).exists()
        assert signal.getsignal(signal.SIGINT) is before

    def test_conflicting_option_is_named(self, uninterrupted):
        with pytest.raises(TrainingError, match=r"--weight-decay: 0\.1 conflicts with .* 0\.05"):
            train(replace(QUICK, weight_decay=0.1), uninterrupted, resume=True)
        assert resumed_config(uninterrupted, {"workers": 1}) == replace(QUICK, workers=1)
        train(replace(QUICK, workers=1, device="cpu"), uninterrupted, resume=True)

    def test_a_run_is_not_overwritten(self, uninterrupted):
        with pytest.raises(TrainingError, match=r"--output: .*already holds a run"):
            train(QUICK, uninterrupted)

    def test_unusable_checkpoint_is_named(self, tmp_path):
        path = tmp_path / CHECKPOINT
        with pytest.raises(TrainingError, match=f"no checkpoint {path}"):
            train(QUICK, tmp_path, resume=True)
        path.write_bytes(b"not a checkpoint")
        with pytest.raises(TrainingError, match=f"cannot read the checkpoint {path}"):
            train(QUICK, tmp_path, resume=True)

    def test_not_finite_loss_stops(self, tmp_path, monkeypatch):
        original = Trainer.step

        def explode(self, images, targets):
            loss, norm = original(self, images, targets)
            if self.epoch == 1:
                loss = loss._replace(total=loss.total * float("nan"))
            return loss, norm

        monkeypatch.setattr(Trainer, "step", explode)
        with pytest.raises(TrainingError, match=r"not finite in epoch 2, step 1.*--lr"):
            train(QUICK, tmp_path)
        kept = load_checkpoint(tmp_path / CHECKPOINT)
        assert kept["epoch"] == 1 and all(torch.isfinite(v).all() for v in kept["model"].values())

    def test_not_finite_gradient_stops(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            trainer_module.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("inf"))
        )
        with pytest.raises(TrainingError, match="not finite in epoch 1, step 1"):
            train(QUICK, tmp_path)
        assert not (tmp_path / CHECKPOINT).exists()

    def test_checkpoint_is_written_whole_or_not_at_all(self, uninterrupted, tmp_path, monkeypatch):
        def fail_half_way(state, file):
            file.write(b"half")
            raise OSError("disk full")

        config = replace(QUICK, epochs=1)
        train(config, tmp_path)
        before = (tmp_path / CHECKPOINT).read_bytes()
        monkeypatch.setattr(trainer_module.torch, "save", fail_half_way)
        with pytest.raises(OSError, match="disk full"):
            trainer_module._write(tmp_path / CHECKPOINT, lambda file: torch.save({}, file))
        assert (tmp_path / CHECKPOINT).read_bytes() == before

    @pytest.mark.parametrize("fused", [True, False])
    def test_fused_flag(self, fused):
        trainer = Trainer(replace(QUICK, fused=fused), load_data(QUICK))
        kinds = [type(module) for module in trainer.model.modules()]
        assert (kinds.count(FusedGeLU) == 6) == fused
        kinds = [type(module) for module in trainer.ema.module.modules()]
        assert (kinds.count(FusedGeLU) == 6) == fused

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_mode(self, mode):
        trainer = Trainer(replace(QUICK, mode=mode), load_data(QUICK))
        assert trainer.model.training == (mode == "train") and not trainer.ema.module.training

    def test_sigint_of_a_process(self, uninterrupted, tmp_path):
        """What Ctrl-C does to the command, which must then resume to the uninterrupted run."""
        options = {"epochs": 3, "batch-size": 359, "lr": 4e-3, "warmup-epochs": 1, "epsilon": 0.1}
        arguments = ["train", "--output", str(tmp_path)]
        arguments += [f"--{name}={value}" for name, value in options.items()]
        # Slows the steps, so that the signal falls into the first epoch.
        script = f"""
import sys, time
from gradnorm_kernels.cli import main
from gradnorm_kernels.training.trainer import Trainer
step = Trainer.step
def slow_step(*args):
    print("step", file=sys.stderr, flush=True)
    time.sleep(0.5)
    return step(*args)
Trainer.step = slow_step
sys.exit(main({arguments!r}))
"""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            for line in process.stderr:
                if line.startswith("step"):
                    process.send_signal(signal.SIGINT)
                    break
            _, message = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "stopped in epoch 1 after step 1" in message
        assert f"resume with: gradnorm train --resume --output {tmp_path}" in message
        train(resumed_config(tmp_path, {}), tmp_path, resume=True)
        assert_same_run(tmp_path, uninterrupted)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes, dark and bright, of 24x20 JPEG files."""
    root = tmp_path / "images"
    for split, count in (("train", 8), ("val", 3)):
        for shade, name in ((40, "dark"), (200, "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 40, (20, 24, 3), dtype=torch.uint8)
                Image.fromarray((noise + shade).numpy()).save(folder / f"{i}.jpg")
    return root


class TestData:
    def test_digits(self):
        data = load_data(QUICK)
        images, targets = data.train.tensors
        assert images.shape == (1437, 1, 8, 8) and images.min() == 0 and images.max() == 1
        assert len(data.evaluation) == 360 and targets.unique().tolist() == list(range(10))

    @pytest.mark.parametrize("augment", ["recipe", "light", "none"])
    def test_batches_depend_on_seed_epoch_and_index_alone(self, augment, image_folder):
        config = TrainConfig(data=str(image_folder), batch_size=4, image_size=16, augment=augment, workers=0)
        reference = [image for image, _ in load_data(config).training_batches(epoch=1, start=0)]
        assert len(reference) == 4
        for workers in (0, 2):
            torch.manual_seed(workers)
            data = load_data(replace(config, workers=workers))
            next(data.training_batches(epoch=0, start=0))
            resumed = [image for image, _ in data.training_batches(epoch=1, start=2)]
            assert len(resumed) == 2
            assert all(map(torch.equal, resumed, reference[2:]))
        other = next(load_data(replace(config, seed=1)).training_batches(epoch=1, start=0))[0]
        assert not torch.equal(other, reference[0])
        assert all(image.min() >= 0 and image.max() <= 1 for image in reference)

    def test_workers_survive_an_interrupt(self, image_folder):
        """Ctrl-C reaches them too, while the training process waits for the batch of its last step."""
        config = TrainConfig(data=str(image_folder), batch_size=2, image_size=16, workers=1)
        batches = load_data(config).training_batches(epoch=0, start=0)
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        # More than a worker prepares in advance.
        assert len(list(batches)) == 7

    def test_evaluation_pixels(self, image_folder):
        """Not normalised, and at their own size untouched."""
        (image_folder / "val" / "dark" / "0.jpg").unlink()
        Image.new("RGB", (16, 16), (51, 102, 255)).save(image_folder / "val" / "dark" / "0.png")
        data = load_data(TrainConfig(data=str(image_folder), batch_size=4, image_size=16, workers=0))
        image, target = data.evaluation[0]
        assert target == 0
        torch.testing.assert_close(image[:, 3, 5], torch.tensor([0.2, 0.4, 1.0]))

    def test_soft_targets(self, image_folder):
        images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 1, 1])
        config = TrainConfig(data=str(image_folder), batch_size=4, image_size=16, augment="light")
        same, targets = load_data(config).soften(images.clone(), labels)
        assert torch.equal(same, images)
        torch.testing.assert_close(targets[0], torch.tensor([0.95, 0.05]))
        seed_everything(0)
        mixed, targets = load_data(replace(config, augment="recipe")).soften(images.clone(), labels)
        assert not torch.equal(mixed, images)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert 0.05 < targets[0, 0] < 0.95

    def test_trains_on_an_image_folder(self, image_folder, tmp_path):
        config = TrainConfig(
            data=str(image_folder), model="resnet10t", activation="gelu", image_size=32, augment="light",
            batch_size=8, epochs=2, workers=1, mode="train", warmup_epochs=0.0, ramp_epochs=0.0,
        )  # fmt: skip
        lines = train(config, tmp_path / "run")
        assert len(lines) == 2 and lines[1]["gradient_norm"] > 0
        assert load_model(tmp_path / "run")(torch.rand(1, 3, 32, 32)).shape == (1, 2)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[: len(data) // 2],  # a truncated file
            lambda data: b"no image",
            lambda data: b"",
        ],
    )
    @pytest.mark.parametrize("workers", [0, 1])
    def test_corrupt_image_is_named(self, damage, workers, image_folder, tmp_path):
        path = image_folder / "train" / "dark" / "3.jpg"
        path.write_bytes(damage(path.read_bytes()))
        config = TrainConfig(data=str(image_folder), batch_size=8, image_size=16, workers=workers)
        with pytest.raises(TrainingError, match=f"cannot read the image {path}"):
            train(config, tmp_path / "run")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda root: root.rename(root.with_name("moved")), "{root} is no folder"),
            (lambda root: (root / "train").rename(root / "training"), "{root}/train is no folder"),
            (lambda root: (root / "val").rename(root / "held_out"), "{root} has none of the folders"),
            (lambda root: [p.unlink() for p in (root / "train").glob("*/*")], "0 images .*{root}/train"),
            (lambda root: [p.unlink() for p in (root / "val").glob("*/*")], "0 images .*{root}/val"),
            (
                lambda root: (root / "val" / "dark").rename(root / "val" / "other"),
                r"{root}/train lacks the classes \['other'\]",
            ),
            (
                lambda root: Image.new("RGB", (9, 9)).save(root / "train" / "stray.png"),
                "{root}/train holds images outside",
            ),
        ],
    )
    def test_unusable_folder_is_named(self, change, message, image_folder):
        change(image_folder)
        with pytest.raises(TrainingError, match="--data: .*" + message.format(root=image_folder)):
            load_data(TrainConfig(data=str(image_folder), image_size=16, batch_size=4))

    def test_classes_of_the_held_out_folder_are_those_of_training(self, image_folder):
        """A held-out folder without the first class must not shift the others' indices."""
        for path in (image_folder / "val" / "dark").iterdir():
            path.unlink()
        data = load_data(TrainConfig(data=str(image_folder), image_size=16, batch_size=4, workers=0))
        assert {target for _, target in data.evaluation} == {1}

    def test_recipe_needs_an_even_batch(self, image_folder):
        with pytest.raises(TrainingError, match="--batch-size: mixup needs an even one, got 5"):
            load_data(TrainConfig(data=str(image_folder), batch_size=5, image_size=16))


def test_demo(tmp_path):
    pytest.importorskip("pyautoattack", reason="the demo needs: pip install 'gradnorm_kernels[train]'")
    from gradnorm_kernels.training.demo import FUSED, NATURAL, STOCK, demo

    outcome = demo(tmp_path, epochs=2, attack_steps=3, curve=(0.3,), timed_steps=2)
    assert list(outcome.results) == [NATURAL, STOCK, FUSED]
    assert 0 < outcome.gradient_difference < 1e-3
    for result in outcome.results.values():
        assert result.step_seconds > 0
        assert result.accuracy[0.0] >= result.accuracy[0.1] >= result.accuracy[0.3]
    assert outcome.results[NATURAL].history[0]["gradient_norm"] is None
    table = outcome.table()
    assert f"{outcome.results[STOCK].step_seconds * 1e3:.1f}" in table and "1.00" in table
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3 and torch.__version__ in report
    assert "http" not in report
    assert all(f"<td>{cell}</td>" in report for row in outcome.rows() for cell in row)
