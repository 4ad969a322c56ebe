"""Every recipe that ships, and how options are read."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import usual
from torch.utils.data import TensorDataset

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

import yaml

import gradnorm_kernels as gk
from gradnorm_kernels.training import AdversarialLoss, EdgeLoss, GradientNormLoss
from gradnorm_kernels.training.config import TrainConfig, load_recipe, parse_settings, recipe_names
from gradnorm_kernels.training.data import Data
from gradnorm_kernels.training.files import load_checkpoint, resumed_config
from gradnorm_kernels.training.models import input_spec
from gradnorm_kernels.training.objectives import make_objective
from gradnorm_kernels.training.options import TrainingError
from gradnorm_kernels.training.trainer import Trainer

# The sides of the smallest images that the models take.
SIZES = {"swin_base_patch4_window7_224": 56, "swin_large_patch4_window7_224": 56, "resnet50": 32}
SIZES["gelu_mixer"] = 8
# One of each model and kind of objective.
USUAL = ("resnet50", "digits", "digits_edge", "digits_pgd3", "cifar10_small")


@pytest.mark.parametrize("name", usual(recipe_names(), *USUAL))
def test_two_steps(name):
    """The model, optimiser and loss of every recipe, on small synthetic images."""
    options = {"data": None if name.startswith("digits") else "images"} | load_recipe(name)
    config = TrainConfig(**{**options, "pretrained": False})
    size = SIZES.get(config.model, 16)
    channels = 1 if config.data is None else 3
    # An edge needs a neighbourhood, a mixup pair a partner.
    config = replace(config, image_size=size, batch_size=2, ramp_epochs=0.0, epochs=1, warmup_epochs=0.0)
    images = TensorDataset(torch.rand(4, channels, size, size), torch.tensor([0, 1, 2, 3]))
    data = Data(config, images, images, list("abcd"), input_spec(config.model, channels, size))
    trainer = Trainer(config, data)
    before = [p.clone() for p in trainer.model.parameters()]
    for _ in range(2):
        loss, norm = trainer.step(torch.rand(2, channels, size, size), torch.tensor([1, 3]))
        assert loss.total.isfinite() and norm.isfinite() and norm > 0
    changed = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("swin_b", """model=swin_base_patch4_window7_224 pretrained=true objective=gradient_norm ce_weight=0.8
            gn_weight=1.2 epsilon=4/255 ramp_epochs=5 mode=eval epochs=100 warmup_epochs=5 batch_size=532
            lr=0.625e-3 lr_batch=512 warmup_lr=1e-5 min_lr=1e-5"""),
        ("swin_l", """model=swin_large_patch4_window7_224 pretrained=true objective=gradient_norm epochs=100
            batch_size=532 lr=0.625e-3 epsilon=4/255"""),
        ("resnet50", """model=resnet50 act=gelu pretrained=false epochs=83 warmup_epochs=5 batch_size=256
            lr=1.25e-3 lr_batch=512 warmup_lr=1e-6 min_lr=1e-5 mode=eval"""),
        ("resnet50_start", "epochs=4 objective=natural pretrained=true act=gelu"),
        ("resnet50_silu", "act=silu epochs=83"),
        ("resnet50_relu", "act=relu epochs=83 pretrained=true"),
        ("swin_b_edge", """objective=edge mode=train edge_start=1 edge_rate=0.09 edge_max=19
            edge_temperature=0.5"""),
        ("swin_b_pgd3", "objective=adversarial attack_steps=3 mode=train"),
        ("swin_b_natural", "objective=natural"),
        ("cifar10", "model=preact_resnet18 act=gelu batch_size=128 epochs=300 image_size=32"),
    ],
)  # fmt: skip
def test_published_numbers(name, published):
    """The table of the published recipe, and what all its runs have in common."""
    common = """opt=adamw weight_decay=0.05 clip_norm=1.0 ema_decay=0.9998 label_smoothing=0.1
        auto_augment=rand-m9-mstd0.5-inc1 color_jitter=0.4 reprob=0.25 remode=pixel interpolation=bicubic
        mixup=0.8 cutmix=1.0 precision=float32"""
    expected = parse_settings(f"{common} {published}".split())
    config = asdict(TrainConfig(data="images", **load_recipe(name)))
    assert {key: config[key] for key in expected} == expected


def test_peak_learning_rate():
    assert TrainConfig(data="images", **load_recipe("swin_b")).peak_lr == pytest.approx(0.625e-3 * 532 / 512)
    assert TrainConfig(lr=2e-3).peak_lr == 2e-3


@pytest.mark.parametrize("objective", ["gradient_norm", "silu", "relu", "natural", "edge", "pgd3"])
@pytest.mark.parametrize("small", ["digits", "cifar10_fast"])
def test_laptop_versions(small, objective):
    name = small if objective == "gradient_norm" else f"{small}_{objective}"
    options = load_recipe(name)
    expected = {"silu": "gradient_norm", "relu": "gradient_norm", "pgd3": "adversarial"}.get(
        objective, objective
    )
    assert options.get("objective", "gradient_norm") == expected
    if objective in ("silu", "relu"):
        assert options["act"] == objective


class TestFiles:
    def test_base(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("base: digits\nepochs: 3\nfused: off\nact: softplus:10\nclip_norm: none\n")
        digits = load_recipe("digits")
        assert load_recipe(str(path)) == {
            **digits, "epochs": 3, "fused": "off", "act": "softplus:10", "clip_norm": None,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epoch: 3", "there is no option epoch; did you mean epochs?"),
            ("epochs: 1.5", "epochs: expected a whole number, got 1.5"),
            ("epochs: many", "epochs: expected a whole number, got 'many'"),
            ("epsilon: 4/0", "epsilon: expected a number or a fraction"),
            ("compile: 1", "compile: expected true or false"),
            ("model: 18", "model: expected a text"),
            ("- epochs", "is no table of options"),
            ("a: [", "is no YAML"),
            ("base: mine", "recipe: there is none called mine"),
            ("base: digit", "did you mean digits?"),
        ],
    )
    def test_unsuitable(self, text, message, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(TrainingError) as error:
            load_recipe(str(path))
        assert message in str(error.value)

    def test_a_base_that_leads_back(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.yaml").write_text("base: b.yaml")
        (tmp_path / "b.yaml").write_text("base: a.yaml")
        with pytest.raises(TrainingError, match="leads back"):
            load_recipe("a.yaml")

    def test_absent(self, tmp_path):
        with pytest.raises(TrainingError, match="there is no file"):
            load_recipe(str(tmp_path / "mine.yaml"))


def test_settings():
    texts = ["epsilon=8/255", "epochs=7", "act=none", "compile=true", "lr=1e-4", "model=x=y"]
    assert parse_settings(texts) == {
        "epsilon": 8 / 255, "epochs": 7, "act": None, "compile": True, "lr": 1e-4, "model": "x=y",
    }  # fmt: skip
    with pytest.raises(TrainingError, match="--set: expected key=value, got 'epochs'"):
        parse_settings(["epochs"])
    with pytest.raises(TrainingError, match="no option epsilom; did you mean epsilon"):
        parse_settings(["epsilom=1"])


# A run's options before objectives declared their own, in the order of config.json.
OLD_CONFIG = dict(
    data=None, model="gelu_mixer", act=None, pretrained=False, init=None, image_size=None, crop_min=1.0,
    hflip=0.0, interpolation=None, color_jitter=0.0, auto_augment=None, reprob=0.0, remode="pixel", mixup=0.0,
    cutmix=0.0, label_smoothing=0.1, objective="edge_gradient_norm", epsilon=0.1, ce_weight=0.7,
    gn_weight=1.3, ramp_epochs=2.0, norm="l2", engine="double_backprop", edge_start=2.0, edge_rate=0.5,
    edge_max=9.0, edge_temperature=0.25, edge_variant="magnitude", attack_steps=5, attack_step_size=0.01,
    attack_random_start=False, mode="eval", fused="auto", precision="float32", channels_last=False,
    compile=False, epochs=30, batch_size=128, accumulate=1, lr=1e-3, lr_batch=None, warmup_epochs=5.0,
    warmup_lr=1e-6, min_lr=1e-5, opt="adamw", weight_decay=0.05, clip_norm=1.0, ema_decay=0.9998,
    robust_every=0, robust_images=256, seed=0, device=None, workers=4, tensorboard=False,
)  # fmt: skip


class TestObjectives:
    def test_an_old_config_reads_as_it_did(self, tmp_path):
        """In its order too, by which a study finds its runs; an option that it lacks has the default."""
        saved = dict(OLD_CONFIG)
        torch.save({"config": saved, "classes": [], "model": {}, "ema": {}}, tmp_path / "checkpoint.pt")
        config = resumed_config(tmp_path, {})
        assert not config.checkpoint and not config.cuda_graph
        newer = ("checkpoint", "cuda_graph")
        assert [item for item in asdict(config).items() if item[0] not in newer] == list(saved.items())
        (tmp_path / "old.yaml").write_text(yaml.safe_dump(saved))
        assert TrainConfig(**load_recipe(str(tmp_path / "old.yaml"))) == config
        assert (
            TrainConfig(**parse_settings(f"{key}={value}".lower() for key, value in saved.items())) == config
        )
        norm = GradientNormLoss(0.7, 1.3, 0.1, 2.0, "l2")
        assert make_objective(config) == EdgeLoss(2.0, 0.5, 9.0, 0.25, "magnitude", norm)
        hybrid = AdversarialLoss(0.1, 5, 0.01, False, norm)
        assert make_objective(replace(config, objective="hybrid")) == hybrid
        del saved["edge_rate"]
        replace(config, edge_rate=0.09).check_same_run(saved)
        with pytest.raises(TrainingError, match=r"edge_rate: 0\.5 conflicts with the checkpoint's 0\.09"):
            config.check_same_run(saved)

    def test_a_new_one_is_one_file(self, tmp_path):
        """In a copy of the package: described, set, checked, trained and recorded by its file alone."""
        package = shutil.copytree(
            Path(gk.__file__).parent, tmp_path / "gradnorm_kernels", copy_function=os.symlink
        )
        (package / "training" / "objectives" / "scaled.py").write_text(NEW_OBJECTIVE)
        done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
        assert "hybrid: gradient_norm of such images; scaled: cross-entropy, times a number\n" in done.stdout
        assert "\nscale (2.0): the number\n" in done.stdout
        assert "scale: expected more than 0, got 0.0" in done.stderr
        saved = load_checkpoint(tmp_path / "run")
        [line] = saved["history"]
        assert saved["config"]["scale"] == 3 and line["loss"] == pytest.approx(3 * line["cross_entropy"])
        assert done.stderr.endswith(
            "ValueError: lr: two options of this name differ in default, limits or help\n"
        )


NEW_OBJECTIVE = """
from dataclasses import dataclass

from ..options import option
from .natural import NaturalLoss
from .registry import register


@dataclass(frozen=True)
class ScaledLoss(NaturalLoss):
    scale: float = option(2.0, "the number", above=0)

    def __call__(self, *batch, epoch):
        loss = super().__call__(*batch)
        return loss._replace(total=self.scale * loss.total)


register("scaled", ScaledLoss, "cross-entropy, times a number")
"""

# In the end an objective whose option is called as one of the run's.
USE = """
import dataclasses, importlib
from gradnorm_kernels import cli
from gradnorm_kernels.training import config
from gradnorm_kernels.training.objectives.registry import register
from gradnorm_kernels.training.options import option

print(config.describe_options())
assert cli.main(["train", "--set", "scale=0"]) == 1
assert cli.main("train --output run --set epochs=1 batch_size=1437 objective=scaled scale=3".split()) == 0
clash = dataclasses.make_dataclass("Clash", [("lr", float, option(1.0, "a rate"))])
register("clash", clash, "cross-entropy")
importlib.reload(config)
"""
