"""Checkpoints as people have them: each dialect loads to the same logits, and nothing else loads at all."""

import argparse
import json
import re

import pytest
import torch

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from timm.models.swin_transformer import SwinTransformer

from gradnorm_kernels import cli
from gradnorm_kernels.training import models
from gradnorm_kernels.training.config import TrainConfig
from gradnorm_kernels.training.data import load_data
from gradnorm_kernels.training.models import InputSpec, Normalize, load_weights
from gradnorm_kernels.training.options import TrainingError

SPEC = InputSpec(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1.0, "bicubic")


def swin(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 1, 1)}
    model = SwinTransformer(**sizes | {"num_heads": (1, 2, 2), "num_classes": 10} | options)
    return Normalize(model.eval(), SPEC.mean, SPEC.std)


def in_timm_0_6(state):
    """Swin's names in timm 0.6.7: buffers, downsampling at the end of a stage, ``head.weight``."""
    old = {}
    for key, value in state.items():
        key = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        old[key.replace("head.fc.", "head.")] = value
        if key.endswith("qkv.weight"):
            old[key.replace("qkv.weight", "relative_position_index")] = torch.zeros(16, 16, dtype=torch.long)
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    assert "layers.0.downsample.reduction.weight" in old and "head.weight" in old
    return old


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def robustbench(state):
    """``normalize_model`` of RobustBench, here with other numbers than timm's."""
    return {
        "normalize.mean": torch.full((1, 3, 1, 1), 0.4),
        "normalize.std": torch.full((1, 3, 1, 1), 0.2),
        **prefixed("model.", state),
    }


DIALECTS = {
    "timm": (lambda s: s, ""),
    "timm 0.6.7": (in_timm_0_6, ""),
    "authors' EMA": (
        lambda s: {
            "epoch": 99,
            "args": argparse.Namespace(lr=1e-3),
            "state_dict": prefixed("module.", {k: v + 1 for k, v in in_timm_0_6(s).items()}),
            "state_dict_ema": prefixed("module.", in_timm_0_6(s)),
        },
        "state_dict_ema",
    ),
    "model_ema": (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s}, "model_ema"),
    "tables in tables": (
        lambda s: {"model": {"state_dict": prefixed("module._orig_mod.", s)}},
        "model.state_dict",
    ),
    "RobustBench": (robustbench, ""),
    "RobustBench, DataParallel, old": (lambda s: prefixed("module.", robustbench(in_timm_0_6(s))), ""),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("safetensors", [False, True], ids=["torch", "safetensors"])
def test_dialect(dialect, safetensors, tmp_path):
    saved, (write, table) = swin(), DIALECTS[dialect]
    content, path = write(saved.model.state_dict()), tmp_path / "weights.bin"
    if safetensors:
        if table:
            pytest.skip("a safetensors file is one table")
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    if "RobustBench" in dialect:
        saved.mean.fill_(0.4), saved.std.fill_(0.2)
    model, images = swin(seed=1), torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(images), saved(images))
    loaded = load_weights(model, path)
    assert (loaded.table, loaded.left_out) == (table, "")
    assert torch.equal(model(images), saved(images))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda s: {**s, "extra.weight": torch.ones(1)}, "1 unknown: extra.weight$"),
        (lambda s: {k: v for k, v in s.items() if "norm1" not in k}, "8 missing: layers.0.*and 4 more$"),
        (
            lambda s: {**s, "head.fc.bias": torch.ones(7)},
            r"1 of another shape: head.fc.bias \(7,\) for \(10,\)$",
        ),
        (lambda s: {"fc.weight": torch.ones(2)}, "1 unknown: fc.weight; 66 missing: head.fc.bias"),
        (lambda s: {**s, **prefixed("module.", s)}, "twice, once as module.patch_embed"),
        (lambda s: {"optimizer": {"step": 3}, "epoch": 5}, r"it has: optimizer \(dict\), epoch \(int\)"),
        (lambda s: [torch.ones(1)], "it is of type list"),
    ],
)
def test_what_does_not_fit_is_listed_and_refused(write, message, tmp_path):
    model, path = swin(), tmp_path / "weights.pth"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(write(swin(seed=1).model.state_dict()), path)
    with pytest.raises(TrainingError, match=message) as error:
        load_weights(model, path)
    assert str(error.value).startswith(f"weights: {path}")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_partial(tmp_path):
    model, path, other = swin(), tmp_path / "weights.pth", swin(seed=1, num_classes=7)
    torch.save({**other.model.state_dict(), "extra": torch.ones(1)}, path)
    head = model.model.head.fc.weight.clone()
    left_out = load_weights(model, path, partial=True).left_out
    assert "1 unknown: extra" in left_out and "2 of another shape: head.fc.weight" in left_out
    assert torch.equal(model.model.head.fc.weight, head)
    assert torch.equal(model.model.norm.weight, other.model.norm.weight)
    assert torch.equal(model.model.patch_embed.proj.weight, other.model.patch_embed.proj.weight)
    torch.save({"other": torch.ones(1)}, path)
    with pytest.raises(TrainingError, match="nothing that fits"):
        load_weights(model, path, partial=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "it begins b'version https://git-lfs"),
        (b"", "it begins b''"),
        (b"\x40\0\0\0\0\0\0\0{broken", "as safetensors"),
        (b"\x80\x02}q\x00", "as plain data"),
    ],
)
def test_files_of_another_kind(content, message, tmp_path):
    (path := tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        load_weights(swin(), path)


class _Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_does_not_run(tmp_path):
    path, ran = tmp_path / "weights.pth", tmp_path / "ran"
    torch.save({"state_dict": swin().model.state_dict(), "args": _Planted(ran)}, path)
    with pytest.raises(TrainingError, match=r"as plain data: .*open"):
        load_weights(swin(), path)
    assert not ran.exists()


def test_evaluates_weights(tmp_path, capsys):
    """On digits, with the file's normalisation, to the accuracy of the model itself."""
    spec = models.input_spec("gelu_mixer", 1, 8)
    model = models.create_model("gelu_mixer", spec, 10)
    # It begins with zeros there.
    torch.nn.init.normal_(model.model.head.weight)
    torch.save({"state_dict_ema": prefixed("module.", model.model.state_dict())}, tmp_path / "weights.pth")
    file = str(tmp_path / "weights.pth")
    command = ["evaluate", "--weights", file, "--model", "gelu_mixer", "--attack", "fgsm", "--n", "30"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "30"
    report = json.loads((tmp_path / "evaluation-fgsm.json").read_text())
    assert report["weights"] == "weights.pth" and report["table"] == "state_dict_ema"
    images, labels = load_data(TrainConfig()).evaluation_sample(30)
    assert report["results"][0]["clean_accuracy"] == pytest.approx(
        (model.eval()(images).argmax(1) == labels).float().mean().item()
    )
    torch.save(swin().model.state_dict(), tmp_path / "weights.pth")
    for arguments, message in [
        (command, "unknown: head.fc.bias, head.fc.weight, layers.0"),
        (["evaluate"], "expected a run's CHECKPOINT, or --weights"),
        (["evaluate", "--weights", file], "--model: --weights needs the model's name"),
        (["evaluate", file, "--partial"], "go with --weights"),
    ]:
        assert cli.main(arguments) == 1
        assert message in capsys.readouterr().err
