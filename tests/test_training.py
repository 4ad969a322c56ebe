"""The objective against a transcription, runs that resume to the bit, data that name their faults."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import usual
from torch import nn

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from PIL import Image

from gradnorm_kernels import FusedGeLU
from gradnorm_kernels.training import models
from gradnorm_kernels.training import trainer as trainer_module
from gradnorm_kernels.training.config import MAY_CHANGE, Interrupted, TrainConfig, load_recipe
from gradnorm_kernels.training.data import Data, load_data, seed_everything
from gradnorm_kernels.training.files import CHECKPOINT, load_checkpoint, resumed_config, write_file
from gradnorm_kernels.training.graph import GraphedBackward
from gradnorm_kernels.training.models import Normalize, create_model, input_spec, load_model
from gradnorm_kernels.training.options import TrainingError
from gradnorm_kernels.training.trainer import Trainer, train

# Four steps an epoch, the least in which the middle of an epoch differs from its ends.
QUICK = TrainConfig(epochs=3, batch_size=359, lr=4e-3, warmup_epochs=1.0, epsilon=0.1)
# The published augmentation.
RECIPE = {
    name: value
    for name, value in load_recipe("swin_b").items()
    if name in ("auto_augment", "color_jitter", "crop_min", "cutmix", "hflip", "mixup", "remode", "reprob")
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine OpenMP's threads wait for each other, and such small steps take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quick_trainer(**changes):
    config = replace(QUICK, **changes)
    return Trainer(config, load_data(config))


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
        model = create_model(name, spec, num_classes=7, act="silu").eval()
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
            ("model", {"model": "no_such_model"}),
            ("act", {"act": "no_such_activation"}),
            ("act", {"act": "gelu:3"}),
            ("act", {"act": "softplus:much"}),
            ("pretrained", {"pretrained": True}),
            ("init", {"init": "no_such_file"}),
            ("init", {"init": "file", "pretrained": True}),
            ("image_size", {"image_size": 9}),
            ("device", {"device": "no_such_device"}),
            ("batch_size", {"batch_size": 2000}),
            ("batch_size", {"batch_size": 128, "accumulate": 3}),
            ("mixup", {"mixup": 0.8}),
            ("objective", {"objective": "other"}),
            ("epochs", {"epochs": 0}),
            ("lr", {"lr": 0.0}),
            ("epsilon", {"epsilon": -1.0}),
            ("epsilon", {"epsilon": float("nan")}),
            ("ema_decay", {"ema_decay": 1.0}),
            ("label_smoothing", {"label_smoothing": 1.0}),
            ("crop_min", {"crop_min": 1.5, "data": "images"}),
            ("opt", {"opt": "no_such_optimizer"}),
            ("compile", {"compile": True, "engine": "finite_difference"}),
            ("engine", {"precision": "bfloat16", "engine": "finite_difference"}),
            ("cuda_graph", {"cuda_graph": True, "device": "cpu"}),
            ("cuda_graph", {"cuda_graph": True, "compile": True}),
            ("cuda_graph", {"cuda_graph": True, "checkpoint": True}),
            ("cuda_graph", {"cuda_graph": True, "objective": "adversarial"}),
            ("cuda_graph", {"cuda_graph": True, "engine": "forward_over_reverse"}),
        ],
    )
    def test_bad_options_are_named(self, name, change, tmp_path):
        with pytest.raises(TrainingError, match=f"^{name}:"):
            train(replace(QUICK, **change), tmp_path)
        assert not list(tmp_path.iterdir())


def differences(directory, reference):
    """What differs between two runs, to the bit, but for the timings and what may change."""
    states = []
    for path in (directory, reference):
        state = load_checkpoint(path)
        lines = (path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == state["history"]
        assert [line["epoch"] for line in state["history"]] == list(range(1, len(lines) + 1))
        for item in [*state["history"], state["sums"]]:
            item.pop("seconds", None)
            item.pop("images_per_second", None)
        for name in MAY_CHANGE:
            state["config"].pop(name)
        states.append(state)
    return different_leaves(*states)


def different_leaves(a, b):
    """Where two trees of containers and tensors differ.

    Not ``a == b``: of a failed comparison pytest shows every difference where ``CI`` is set, and the weights'
    take it hours.
    """
    a, b = leaves(a), leaves(b)
    return [path for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)]


def leaves(value, path="state"):
    """A tree's leaves by their paths, tensors as what is comparable by ``==``."""
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, value.shape, value.numpy().tobytes())}
    if not isinstance(value, dict | list):
        return {path: (type(value), value)}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {path: (type(value), len(value))}
    for key, item in items:
        found |= leaves(item, f"{path}[{key!r}]")
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    train(QUICK, directory)
    return directory


def train_and_interrupt(config, directory, call, owner=Trainer, method="step"):
    """Trains until SIGINT arrives in the call-th call (from 1) of the owner's method."""
    original, calls = getattr(owner, method), itertools.count(1)

    def interrupting(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, interrupting)
        with pytest.raises(Interrupted, match=str(directory / CHECKPOINT)):
            train(config, directory)


class TestRun:
    def test_learns_and_records(self, uninterrupted):
        lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert lines[2]["loss"] < lines[0]["loss"]
        # The ramp's value in the last step of each epoch, and the cosine's end after the last.
        assert [line["alpha"] for line in lines] == pytest.approx([0.75 / 5, 1.75 / 5, 2.75 / 5])
        assert lines[0]["lr"] == pytest.approx(QUICK.lr, rel=0.3)
        assert lines[2]["lr"] == pytest.approx(QUICK.min_lr)
        assert all(line["seconds"] > 0 and line["gradient_norm"] > 0 for line in lines)
        assert json.loads((uninterrupted / "config.json").read_text()) == asdict(QUICK)

    def test_averaged_weights_are_evaluated_and_loaded(self, uninterrupted):
        state = load_checkpoint(uninterrupted)
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
        assert not differences(tmp_path / "same", uninterrupted)
        train(replace(QUICK, seed=1), tmp_path / "other")
        assert "state['model']['model.head.weight']" in differences(tmp_path / "other", uninterrupted)

    # Of four steps an epoch: the first one of all, one in the middle, an epoch's last, and the run's last.
    @pytest.mark.parametrize("step", usual([1, 6, 8, 12], "6", "8"))
    def test_resumes_after_an_interrupt(self, step, uninterrupted, tmp_path):
        train_and_interrupt(QUICK, tmp_path, step)
        assert load_checkpoint(tmp_path)["step_in_epoch"] == (step - 1) % 4 + 1
        train(resumed_config(tmp_path, {}), tmp_path, resume=True)
        assert not differences(tmp_path, uninterrupted)

    def test_resumes_after_an_interrupt_while_evaluating(self, uninterrupted, tmp_path):
        train_and_interrupt(QUICK, tmp_path, 2, Data, "evaluation_batches")
        saved = load_checkpoint(tmp_path)
        assert (saved["epoch"], saved["step_in_epoch"]) == (1, 4)
        train(QUICK, tmp_path, resume=True)
        assert not differences(tmp_path, uninterrupted)

    def test_resumes_after_a_crash(self, uninterrupted, tmp_path, monkeypatch):
        """The steps after the last checkpoint are done again."""
        original = Trainer._record

        def crash(self, *args):
            if (self.epoch, self.step_in_epoch) == (1, 2):
                raise OSError("power cut")
            original(self, *args)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
            patch.setattr(Trainer, "_record", crash)
            train(QUICK, tmp_path)
        train(QUICK, tmp_path, resume=True)
        assert not differences(tmp_path, uninterrupted)
        train(QUICK, tmp_path, resume=True)  # a finished run has nothing left to do
        assert not differences(tmp_path, uninterrupted)

    def test_resumes_where_everything_is_random(self, image_folder, tmp_path, monkeypatch):
        """Dropout, mixup and augmentation draw from three generators in two processes."""

        def with_dropout(*args, **kwargs):
            model = create_model(*args, **kwargs)
            model.model.head_drop = nn.Dropout(0.5)
            return model

        monkeypatch.setattr(models, "create_model", with_dropout)
        options = {"workers": 1, "mode": "train", "epochs": 2, "lr": 4e-3, "warmup_epochs": 0.5, **RECIPE}
        config = on_folder(image_folder, **options, ramp_epochs=1.0)
        train(config, tmp_path / "reference")
        train_and_interrupt(config, tmp_path / "resumed", 6)
        torch.manual_seed(12345)
        np.random.seed(12345)
        train(replace(config, workers=0), tmp_path / "resumed", resume=True)
        assert not differences(tmp_path / "resumed", tmp_path / "reference")

    def test_second_interrupt_aborts(self, tmp_path, monkeypatch):
        before = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(Trainer, "step", lambda *_: [signal.raise_signal(signal.SIGINT) for _ in "12"])
        with pytest.raises(KeyboardInterrupt):
            train(QUICK, tmp_path)
        assert not (tmp_path / CHECKPOINT).exists()
        assert signal.getsignal(signal.SIGINT) is before

    def test_conflicting_option_is_named(self, uninterrupted, tmp_path):
        with pytest.raises(TrainingError, match=r"weight_decay: 0\.1 conflicts with .* 0\.05"):
            train(replace(QUICK, weight_decay=0.1), uninterrupted, resume=True)
        assert resumed_config(uninterrupted, {"workers": 1}) == replace(QUICK, workers=1)
        # Of a copy, since it writes the options that it goes on with.
        copy = shutil.copytree(uninterrupted, tmp_path / "copy")
        train(replace(QUICK, workers=1, device="cpu"), copy, resume=True)

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

    def test_not_finite_gradient_stops(self, tmp_path, monkeypatch):
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("inf")))
        with pytest.raises(TrainingError, match="gradient's norm inf, not finite, in epoch 1, step 1"):
            train(QUICK, tmp_path)
        assert not (tmp_path / CHECKPOINT).exists()

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("loss", r"loss nan .* not finite, in epoch 2, step 1.*lower lr"),
            # What an epoch's last update broke, no loss of that epoch shows.
            ("weights", r"weights not finite before the update, in epoch 3, step 1"),
        ],
    )
    def test_what_is_not_finite_is_not_kept(self, what, message, tmp_path, monkeypatch):
        original = Trainer.step

        def explode(self, *batch):
            loss, norm = original(self, *batch)
            if what == "loss" and self.epoch == 1:
                loss = loss._replace(total=loss.total * float("nan"))
            if what == "weights" and (self.epoch, self.step_in_epoch) == (1, 3):
                next(self.model.parameters()).data.fill_(float("nan"))
            return loss, norm

        monkeypatch.setattr(Trainer, "step", explode)
        with pytest.raises(TrainingError, match=message):
            train(QUICK, tmp_path)
        kept = load_checkpoint(tmp_path)
        assert kept["epoch"] == 1 and all(value.isfinite().all() for value in kept["model"].values())

    def test_not_finite_logits_of_the_edge_objective(self, tmp_path, monkeypatch):
        """Whose class is drawn from them."""
        trainer = quick_trainer(objective="edge", mode="train")
        for parameter in trainer.model.parameters():
            parameter.data.fill_(float("nan"))
        with pytest.raises(TrainingError, match="loss nan"):
            trainer.run_epoch()

    def test_resumes_without_the_initial_weights(self, uninterrupted, tmp_path):
        """They are in the checkpoint; their file may be gone."""
        weights = tmp_path / "weights.pt"
        torch.save(load_model(uninterrupted).state_dict(), weights)
        config = replace(QUICK, epochs=1, init=str(weights))
        train(config, tmp_path / "run")
        weights.unlink()
        train(config, tmp_path / "run", resume=True)

    def test_checkpoint_is_written_whole_or_not_at_all(self, uninterrupted, tmp_path, monkeypatch):
        def fail_half_way(state, file):
            file.write(b"half")
            raise OSError("disk full")

        config = replace(QUICK, epochs=1)
        train(config, tmp_path)
        before = (tmp_path / CHECKPOINT).read_bytes()
        monkeypatch.setattr(torch, "save", fail_half_way)
        with pytest.raises(OSError, match="disk full"):
            write_file(tmp_path / CHECKPOINT, lambda file: torch.save({}, file))
        # Not compared in the assertion: see different_leaves.
        unchanged = (tmp_path / CHECKPOINT).read_bytes() == before
        assert unchanged

    @pytest.mark.parametrize("fused", ["auto", "on", "off"])
    def test_fused_flag(self, fused):
        trainer = quick_trainer(fused=fused)
        for model in (trainer.model, trainer.ema.module):
            kinds = [type(module) for module in model.modules()]
            assert kinds.count(FusedGeLU) == (0 if fused == "off" else 6)

    def test_nothing_to_fuse_is_reported(self, monkeypatch):
        monkeypatch.setattr(models, "fuse", lambda model: model)
        with pytest.raises(TrainingError, match="fused: there is nothing to fuse"):
            quick_trainer(fused="on")

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_mode(self, mode):
        trainer = quick_trainer(mode=mode)
        assert trainer.model.training == (mode == "train") and not trainer.ema.module.training

    @pytest.mark.parametrize("kill", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
    def test_a_signal_in_the_middle_of_an_epoch(self, kill, uninterrupted, tmp_path):
        """Ctrl-C loses nothing, kill -9 the current epoch; both resume to the uninterrupted run."""
        options = ["epochs=3", "batch_size=359", "lr=4e-3", "warmup_epochs=1", "epsilon=0.1"]
        arguments = ["train", "--output", str(tmp_path), "--set", *options]
        # Slows the steps, so that the signal falls between them.
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
        command = [sys.executable, "-c", script]
        options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True, "env": environment}
        with subprocess.Popen(command, **options) as process:
            steps = (line for line in process.stderr if line.startswith("step"))
            next(itertools.islice(steps, 5, None))  # the sixth
            process.send_signal(kill)
            _, message = process.communicate(timeout=60)
        saved = load_checkpoint(tmp_path)
        if kill == signal.SIGINT:
            assert process.returncode == 130
            assert "stopped in epoch 2 after step 2" in message
            assert f"resume with: gradnorm train --resume --output {tmp_path}" in message
            assert (saved["epoch"], saved["step_in_epoch"]) == (1, 2)
        else:
            assert process.returncode == -signal.SIGKILL
            assert (saved["epoch"], saved["step_in_epoch"]) == (1, 0)
        train(resumed_config(tmp_path, {}), tmp_path, resume=True)
        assert not differences(tmp_path, uninterrupted)

    def test_kill_while_a_checkpoint_is_written(self, tmp_path):
        """Whatever moment the process dies at, the checkpoint there is whole."""
        config = replace(QUICK, epochs=1)
        train(config, tmp_path)
        before = load_checkpoint(tmp_path)
        script = f"""
import os, pathlib, torch
from gradnorm_kernels.training.files import write_file
path = pathlib.Path({str(tmp_path / CHECKPOINT)!r})
def write(file):
    file.write(b"half a checkpoint")
    file.flush()
    os.kill(os.getpid(), 9)
write_file(path, write)
"""
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path)
        assert done.returncode == -signal.SIGKILL
        assert not different_leaves(load_checkpoint(tmp_path), before)


class TestOptions:
    def test_accumulated_parts_give_the_whole_batchs_gradient(self):
        gradients = []
        for parts in (1, 7):
            trainer = quick_trainer(batch_size=350, accumulate=parts, ramp_epochs=0.0, clip_norm=None)
            # The head starts at 0, where the norm has no gradient.
            nn.init.normal_(trainer.model.model.head.weight)
            loss, norm = trainer.step(*trainer.data.first_batch())
            found = loss.total, norm, loss.parts["gradient_norm"]
            gradients.append([*found, *(p.grad for p in trainer.model.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    def test_bfloat16_keeps_the_penalty_finite_and_close(self):
        losses = []
        for precision in ("float32", "bfloat16"):
            trainer = quick_trainer(precision=precision, ramp_epochs=0.0)
            nn.init.normal_(trainer.model.model.head.weight)
            losses.append(trainer.loss(*trainer.data.first_batch()))
            parameters = list(trainer.model.parameters())
            assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters)
        whole, half = losses
        assert half.parts["gradient_norm"].dtype == torch.float32
        for name, part in whole.parts.items():
            torch.testing.assert_close(half.parts[name], part, rtol=0.05, atol=0)
            assert not torch.equal(half.parts[name], part)

    @pytest.mark.parametrize("precision", ["tf32", "float32"])
    def test_tf32_lasts_for_a_step(self, precision):
        def switches():
            return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

        trainer, before, seen = quick_trainer(precision=precision), switches(), set()
        trainer.model.register_forward_pre_hook(lambda *_: seen.add(switches()))
        trainer.step(*trainer.data.first_batch())
        assert seen == {(True, True) if precision == "tf32" else before} and switches() == before

    def test_channels_last(self):
        trainer = quick_trainer(channels_last=True, model="preact_resnet10", batch_size=16, epochs=1)
        layouts = []
        trainer.model.model.blocks[0].conv1.register_forward_pre_hook(
            lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        trainer.loss(torch.rand(16, 1, 8, 8), torch.randint(10, (16,)))
        assert layouts == [True]

    @pytest.mark.slow
    @pytest.mark.skipif(
        not hasattr(torch._dynamo.config, "trace_autograd_ops"),
        reason="this torch cannot trace autograd.grad",
    )
    def test_compiled_step_equals_the_eager_one(self, monkeypatch):
        """One graph for all epochs of the ramp; run by ATen, because generating code takes half a minute."""
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options))
        steps = []
        for compiled in (False, True):
            trainer = quick_trainer(compile=compiled)
            batch = trainer.data.first_batch()
            for trainer.epoch in range(5):
                loss, _ = trainer.step(*batch)
            steps.append([loss.total, *trainer.model.state_dict().values()])
        torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)

    def test_captured_steps_equal_the_others(self, monkeypatch):
        """While the norm's weight rises and after, of batches in parts, with a stand-in for CUDA graphs."""
        test_gpu = pytest.importorskip("test_gpu")
        captures = []

        def capture(run):
            captures.append(run)
            return test_gpu.call_again(run)

        monkeypatch.setattr(trainer_module, "graphed", lambda run, _: GraphedBackward(run, capture))
        ended = []
        for cuda_graph in (False, True):
            trainer = quick_trainer(cuda_graph=cuda_graph, batch_size=100, accumulate=2, ramp_epochs=2.0)
            images, targets = trainer.data.first_batch()
            for trainer.epoch in range(5):
                loss, norm = trainer.step(images.roll(trainer.epoch, 0), targets.roll(trainer.epoch, 0))
            ended.append([loss.total, loss.logits, norm, *trainer.model.state_dict().values()])
        assert len(captures) == 1
        torch.testing.assert_close(*ended, rtol=1e-6, atol=1e-7)

    def test_a_step_that_cannot_be_captured_is_reported(self, monkeypatch):
        def refuse(run):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(trainer_module, "graphed", lambda run, _: GraphedBackward(run, refuse))
        trainer = quick_trainer(cuda_graph=True)
        batch = trainer.data.first_batch()
        for _ in range(2):
            trainer.loss(*batch)
        with pytest.raises(TrainingError, match="cuda_graph: this step cannot be captured: operation not"):
            trainer.loss(*batch)

    def test_a_step_that_does_not_compile_is_reported(self):
        trainer = quick_trainer(compile=True)
        trainer.model.register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())
        with pytest.raises(TrainingError, match="compile: "):
            trainer.loss(*trainer.data.first_batch())

    def test_watched_robustness(self, tmp_path):
        lines = train(replace(QUICK, epochs=2, robust_every=2, robust_images=20), tmp_path)
        assert "eval_apgd_accuracy" not in lines[0]
        assert 0 <= lines[1]["eval_apgd_accuracy"] <= 1 and lines[1]["eval_gradient_norm"] > 0

    def test_init(self, uninterrupted, tmp_path):
        """From a run's averaged weights, from a state_dict, and with another number of classes."""
        averaged = load_model(uninterrupted).model.state_dict()
        spec, saved = input_spec("gelu_mixer", 1, 8), tmp_path / "weights.pth"

        def started(path, classes=10):
            return create_model("gelu_mixer", spec, classes, init=str(path)).model.state_dict()

        wrapped = {f"module._orig_mod.{key}": value for key, value in averaged.items()}
        assert not different_leaves(started(uninterrupted / CHECKPOINT), averaged)
        for weights in (averaged, wrapped, {"epoch": 3, "state_dict": averaged}):
            torch.save(weights, saved)
            assert not different_leaves(started(saved), averaged)
        for path in (uninterrupted / CHECKPOINT, saved):
            other = started(path, classes=3)
            assert other["head.weight"].shape[0] == 3
            key = "blocks.0.mlp_channels.fc1.weight"
            assert torch.equal(other[key], averaged[key])
        with pytest.raises(TrainingError, match="does not fit the model"):
            create_model("preact_resnet10", spec, 10, init=str(saved))
        saved.write_bytes(b"no weights")
        with pytest.raises(TrainingError, match="init: cannot read"):
            started(saved)

    def test_weights_are_loaded_without_running_code(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "ran"),))

        path = tmp_path / CHECKPOINT
        torch.save({"ema": Payload()}, path)
        with pytest.raises(TrainingError, match="cannot read"):
            load_checkpoint(path)
        with pytest.raises(TrainingError, match="cannot read"):
            create_model("gelu_mixer", input_spec("gelu_mixer", 1, 8), 10, init=str(path))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("act", "kind", "attributes"),
        [
            ("relu", nn.ReLU, {}),
            ("leaky_relu:0.3", nn.LeakyReLU, {"negative_slope": 0.3}),
            ("elu", nn.ELU, {"alpha": 1.0}),
            ("softplus:10", nn.Softplus, {"beta": 10.0}),
            ("mish", nn.Mish, {}),
            ("silu", nn.SiLU, {}),
        ],
    )
    @pytest.mark.parametrize(
        "name", ["preact_resnet10", "resnet10t", "efficientnet_b0", "vit_tiny_patch16_224"]
    )
    def test_activations(self, name, act, kind, attributes):
        """Every ReLU-like module gives way, the gates of squeeze-and-excitation stay."""
        before = create_model(name, input_spec(name, 3, 32), 4)
        after = create_model(name, input_spec(name, 3, 32), 4, act=act)
        pairs = zip(before.modules(), after.modules(), strict=True)
        swapped = [b for a, b in pairs if isinstance(a, nn.ReLU | nn.SiLU | nn.GELU)]
        assert swapped
        for module in swapped:
            assert type(module) is kind
            assert all(getattr(module, key) == value for key, value in attributes.items())
        gates = [sum(isinstance(m, nn.Sigmoid) for m in model.modules()) for model in (before, after)]
        assert gates[0] == gates[1]
        assert after(torch.rand(2, 3, 32, 32)).shape == (2, 4)

    def test_preact_resnet18(self):
        model = create_model("preact_resnet18", input_spec("preact_resnet18", 3), 10).model
        # As in Rice et al.'s "Overfitting in adversarially robust deep learning" (arXiv 2002.11569).
        assert sum(p.numel() for p in model.parameters()) == 11_172_170
        assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 20

    def test_tensorboard(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(TrainingError, match="run: pip install tensorboard"):
            train(replace(QUICK, tensorboard=True), tmp_path)


def on_folder(folder, **options):
    return TrainConfig(**{"data": str(folder), "image_size": 16, "batch_size": 4, "workers": 0, **options})


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

    @pytest.mark.parametrize("augmentation", [RECIPE, {"crop_min": 0.5, "hflip": 0.5}, {}])
    def test_batches_depend_on_seed_epoch_and_index_alone(self, augmentation, image_folder):
        config = on_folder(image_folder, **augmentation)
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
        data = load_data(on_folder(image_folder, batch_size=2, workers=1))
        batches = data.training_batches(epoch=0, start=0)
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        # More than a worker prepares in advance.
        assert len(list(batches)) == 7

    def test_evaluation_pixels(self, image_folder):
        """Not normalised, and at their own size untouched."""
        (image_folder / "val" / "dark" / "0.jpg").unlink()
        Image.new("RGB", (16, 16), (51, 102, 255)).save(image_folder / "val" / "dark" / "0.png")
        data = load_data(on_folder(image_folder))
        image, target = data.evaluation[0]
        assert target == 0
        torch.testing.assert_close(image[:, 3, 5], torch.tensor([0.2, 0.4, 1.0]))

    def test_soft_targets(self, image_folder):
        images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 1, 1])
        config = on_folder(image_folder)
        same, targets = load_data(config).soften(images.clone(), labels)
        assert torch.equal(same, images)
        torch.testing.assert_close(targets[0], torch.tensor([0.95, 0.05]))
        seed_everything(0)
        mixed, targets = load_data(replace(config, **RECIPE)).soften(images.clone(), labels)
        assert not torch.equal(mixed, images)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert 0.05 < targets[0, 0] < 0.95

    def test_trains_on_an_image_folder(self, image_folder, tmp_path):
        config = on_folder(
            image_folder, model="resnet10t", act="gelu", image_size=32, hflip=0.5, batch_size=8, epochs=2,
            workers=1, mode="train", warmup_epochs=0.0, ramp_epochs=0.0,
        )  # fmt: skip
        lines = train(config, tmp_path / "run")
        assert len(lines) == 2 and lines[1]["gradient_norm"] > 0
        assert load_model(tmp_path / "run")(torch.rand(1, 3, 32, 32)).shape == (1, 2)

    @pytest.mark.parametrize(
        "damage",
        # The first truncates the file.
        [lambda data: data[: len(data) // 2], lambda data: b"no image", lambda data: b""],
    )
    @pytest.mark.parametrize("workers", [0, 1])
    def test_corrupt_image_is_named(self, damage, workers, image_folder, tmp_path):
        path = image_folder / "train" / "dark" / "3.jpg"
        path.write_bytes(damage(path.read_bytes()))
        config = on_folder(image_folder, batch_size=8, workers=workers)
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
                lambda root: (root / "val/dark").rename(root / "val/other"),
                r"{root}/train lacks .* \['other'\]",
            ),
            (
                lambda root: Image.new("RGB", (9, 9)).save(root / "train/a.png"),
                "{root}/train holds images outside",
            ),
        ],
    )
    def test_unusable_folder_is_named(self, change, message, image_folder):
        change(image_folder)
        with pytest.raises(TrainingError, match="data: .*" + message.format(root=image_folder)):
            load_data(on_folder(image_folder))

    def test_classes_of_the_held_out_folder_are_those_of_training(self, image_folder):
        """A held-out folder without the first class must not shift the others' indices."""
        for path in (image_folder / "val" / "dark").iterdir():
            path.unlink()
        data = load_data(on_folder(image_folder))
        assert {target for _, target in data.evaluation} == {1}

    def test_evaluation_sample_is_of_every_class(self, image_folder):
        """A folder is sorted by class, and its first images would be of the first class."""
        data = load_data(on_folder(image_folder))
        images, labels = data.evaluation_sample(3)
        again, _ = data.evaluation_sample(3)
        assert len(images) == 3 and set(labels.tolist()) == {0, 1} and torch.equal(images, again)
        assert data.evaluation_sample(99)[1].tolist() == [0, 0, 0, 1, 1, 1]

    def test_unusable_augmentation_is_named(self, image_folder):
        with pytest.raises(TrainingError, match=r"^auto_augment: timm cannot use rand-x9"):
            load_data(on_folder(image_folder, auto_augment="rand-x9"))

    def test_recipe_needs_an_even_batch(self, image_folder):
        with pytest.raises(TrainingError, match=r"batch_size: mixup and cutmix need an even one .*, got 5"):
            load_data(on_folder(image_folder, batch_size=5, **RECIPE))


@pytest.mark.slow  # `make demo` is that
def test_demo(tmp_path):
    pytest.importorskip("pyautoattack", reason="the demo needs: pip install 'gradnorm_kernels[train]'")
    from gradnorm_kernels.training.demo import FUSED, NATURAL, STOCK, demo

    outcome = demo(tmp_path, epochs=2, attack_steps=3, curve=(0.3,), timed_steps=2)
    assert list(outcome.results) == [NATURAL, STOCK, FUSED]
    assert 0 < outcome.gradient_difference < 1e-3
    for result in outcome.results.values():
        assert result.step_seconds > 0
        assert result.accuracy[0.0] >= result.accuracy[0.1] >= result.accuracy[0.3]
    assert "gradient_norm" not in outcome.results[NATURAL].history[0]
    table = outcome.table()
    assert f"{outcome.results[STOCK].step_seconds * 1e3:.1f}" in table and "1.00" in table
    report = (tmp_path / "report.html").read_text()
    # Three losses and the curve; six digits and their gradients by three models.
    assert report.count("<svg ") == 4 and report.count("data:image/png;base64,") == 24
    assert torch.__version__ in report
    assert "http" not in report
    assert all(f"<td>{cell}</td>" in report for row in outcome.rows() for cell in row)
