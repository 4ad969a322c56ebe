"""The ``gradnorm`` command: its options, its exit status, its messages."""

import json
import shlex
import subprocess
import sys

import pytest

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from gradnorm_kernels import cli
from gradnorm_kernels.training import trainer
from gradnorm_kernels.training.config import TrainConfig

QUICK = ["train", "--epochs=1", "--batch-size=1437", "--objective=natural"]


@pytest.fixture
def trained_with(monkeypatch):
    """Records the arguments of train() instead of training."""
    calls = []
    monkeypatch.setattr(trainer, "train", lambda *args, **kwargs: calls.append((*args, kwargs)))
    return calls


def test_defaults(trained_with):
    assert cli.main(["train"]) == 0
    [(config, output, options)] = trained_with
    assert config == TrainConfig() and str(output) == "run" and options == {"resume": False}


def test_options_reach_the_config(trained_with):
    arguments = shlex.split("""--data images --model resnet50 --activation gelu --pretrained --image-size 160
        --augment light --objective natural --epsilon 8/255 --ce-weight 0.5 --gn-weight 2 --ramp-epochs 1/2
        --mode train --no-fused --epochs 7 --batch-size 6 --lr 1e-4 --warmup-epochs 2.5 --warmup-lr 0
        --min-lr 1e-7 --weight-decay 0.1 --clip-norm 2 --ema-decay 0.9 --label-smoothing 0 --seed 3
        --device cpu --workers 2""")
    assert cli.main(["train", *arguments]) == 0
    changed = {
        "data": "images", "model": "resnet50", "activation": "gelu", "pretrained": True, "image_size": 160,
        "augment": "light", "objective": "natural", "epsilon": 8 / 255, "ce_weight": 0.5, "gn_weight": 2.0,
        "ramp_epochs": 0.5, "mode": "train", "fused": False, "epochs": 7, "batch_size": 6, "lr": 1e-4,
        "warmup_epochs": 2.5, "warmup_lr": 0.0, "min_lr": 1e-7, "weight_decay": 0.1, "clip_norm": 2.0,
        "ema_decay": 0.9, "label_smoothing": 0.0, "seed": 3, "device": "cpu", "workers": 2,
    }  # fmt: skip
    assert vars(trained_with[0][0]) == changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "4/0"], "a number or a fraction"),
        (["--epsilon", "nan"], "a number or a fraction"),
        (["--epochs", "1.5"], "--epochs"),
        (["--objective", "other"], "--objective"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_unsuitable_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_gives_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "in pixel units (pixels lie in [0, 1]) (default: 4/255)" in text
    assert "directory for the checkpoint, metrics.jsonl and config.json (default: run)" in text


def test_arguments_are_parsed_before_the_optional_packages_load(tmp_path):
    code = "import sys; from gradnorm_kernels import cli; cli._parser().format_help(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # torch itself imports two of them.
    assert not set(done.stdout.split()) & (cli.OPTIONAL_PACKAGES - {"numpy", "tqdm"})


def test_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "gradnorm_kernels", "train", "--epochs", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("gradnorm: error: --epochs: expected at least 1, got 0\n")


def test_trains_and_resumes(tmp_path, capsys):
    output = ["--output", str(tmp_path / "run")]
    assert cli.main([*QUICK, *output]) == 0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["gradient_norm"] is None
    assert cli.main([*QUICK, *output]) == 1
    assert "already holds a run; --resume" in capsys.readouterr().err
    # What is not given again is the run's, not the default.
    assert cli.main(["train", "--resume", *output]) == 0
    assert cli.main(["train", "--resume", "--batch-size=128", *output]) == 1
    assert "--batch-size: 128 conflicts with the checkpoint's 1437" in capsys.readouterr().err


def test_resume_without_a_checkpoint(tmp_path, capsys):
    assert cli.main(["train", "--resume", "--output", str(tmp_path)]) == 1
    assert f"--resume: there is no checkpoint {tmp_path}" in capsys.readouterr().err


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main([*QUICK, "--output", str(tmp_path / "file" / "run")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "demo"])
def test_missing_package(command, monkeypatch, capsys, tmp_path):
    for name in ("data", "demo", "models", "trainer"):
        monkeypatch.delitem(sys.modules, f"gradnorm_kernels.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main([command, "--output", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == "gradnorm: error: the package timm is missing; run: pip install 'gradnorm_kernels[train]'\n"
    )


def test_abort(monkeypatch, capsys):
    def abort(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", abort)
    assert cli.main(["train"]) == 130
    assert "aborted" in capsys.readouterr().err


def test_demo_prints_the_table_and_the_report(monkeypatch, capsys, tmp_path):
    demo = pytest.importorskip(
        "gradnorm_kernels.training.demo", reason="the demo needs: pip install 'gradnorm_kernels[train]'"
    )

    class Outcome:
        def table(self):
            return "the table"

    monkeypatch.setattr(demo, "demo", lambda output: Outcome())
    assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"the table\n\nplots and details: {tmp_path / 'report.html'}\n"
