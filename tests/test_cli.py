"""The ``gradnorm`` command: its options, its exit status, its messages."""

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from gradnorm_kernels import cli
from gradnorm_kernels.training import trainer
from gradnorm_kernels.training.config import TrainConfig, load_recipe

QUICK = ["train", "--set", "epochs=1", "batch_size=1437", "objective=natural"]


@pytest.fixture
def trained_with(monkeypatch):
    """Notes the calls of train() instead of training."""
    monkeypatch.setattr(trainer, "train", noted := Mock())
    return noted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step."""
    path = tmp_path_factory.mktemp("run")
    assert cli.main([*QUICK, "--output", str(path)]) == 0
    return path


def test_defaults(trained_with):
    assert cli.main(["train"]) == 0
    trained_with.assert_called_once_with(TrainConfig(), Path("run"), resume=False)


def test_options_reach_the_config(trained_with):
    arguments = shlex.split("""digits --data images --act silu --fused off --init weights.pth --compile
        --device cpu --set epsilon=8/255 epochs=7 lr=1e-4 --set mode=train clip_norm=none epochs=8""")
    assert cli.main(["train", *arguments]) == 0
    changed = {
        "data": "images", "act": "silu", "fused": "off", "init": "weights.pth", "compile": True,
        "device": "cpu", "epsilon": 8 / 255, "epochs": 8, "lr": 1e-4, "mode": "train", "clip_norm": None,
    }  # fmt: skip
    assert trained_with.call_args.args[0] == TrainConfig(**{**load_recipe("digits"), **changed})


def test_a_recipe_file(trained_with, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: digits\nepochs: 2\n")
    assert cli.main(["train", str(tmp_path / "mine.yaml")]) == 0
    assert trained_with.call_args.args[0] == TrainConfig(**{**load_recipe("digits"), "epochs": 2})


@pytest.mark.parametrize(
    ("status", "command", "message"),
    [
        (2, "train --fused maybe", "--fused"),
        (2, "train --no-such-option", "--no-such-option"),
        (2, "evaluate run --eps 4/0", "a number or a fraction"),
        (2, "evaluate run --eps nan", "a number or a fraction"),
        (2, "evaluate run --n 0", "at least 1"),
        (2, "evaluate run --attack magic", "--attack"),
        (2, "study weather", "weather"),
        (1, "train --set epoch=1", "there is no option epoch; did you mean epochs?"),
        (1, "train --set epochs", "--set: expected key=value"),
        (1, "train digit", "recipe: there is none called digit; did you mean digits?"),
        (1, "study objectives --only natural magic", "only: objectives has no row 'magic'"),
        (1, "study objectives --set mode=eval", "mode: the rows of objectives set it themselves"),
        (1, "evaluate no_such_run", "there is no checkpoint no_such_run"),
        (1, "recipes digit", "did you mean digits?"),
        (1, "evaluate RUN --attack fgsm --n 9 --eps -0.1", "eps"),
        (1, "evaluate RUN --attack fgsm --n 9 --device no_such_device", "device: "),
        (1, "evaluate RUN --attack fgsm --n 9 --data no_such_folder", "data: no_such_folder is no folder"),
    ],
)
def test_errors(status, command, message, run, capsys):
    """Unsuitable arguments exit with 2, what cannot be done with 1."""
    capsys.readouterr()
    arguments = [str(run) if word == "RUN" else word for word in command.split()]
    with pytest.raises(SystemExit) if status == 2 else contextlib.nullcontext() as exit:
        assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert message in error
    assert exit.value.code == 2 if exit else error.startswith("gradnorm: error: ")


def test_dry_run(tmp_path, capsys, monkeypatch):
    """Says what a run would be; checkpointed blocks take less memory; nothing is written."""
    monkeypatch.chdir(tmp_path)
    peaks = []
    for more in ([], ["--set", "checkpoint=true"], ["--set", "accumulate=4"]):
        assert cli.main(["train", "digits", "--dry-run", "--epochs", "5", *more]) == 0
        output, error = capsys.readouterr()
        assert "model: gelu_mixer, 0.0319 million parameters, images of 1x8x8, 10 classes" in output
        assert "5 epochs of 11 steps of 128 of 1437 images; 360 held out" in output
        assert "6 torch.nn.GELU -> FusedGeLU" in output and "one step of" in output
        assert "epochs: 5 end within the 5 of warmup_epochs; the learning rate never reaches 0.004" in error
        assert "the gradient norm never has its full weight" in error
        peaks.append(float(re.search(r"memory: (\S+) GiB", output)[1]))
    assert max(peaks[1:]) < 0.7 * peaks[0]
    assert not list(tmp_path.iterdir())
    assert cli.main(["train", "digits_natural", "--dry-run", "--set", "fused=off"]) == 0
    output, error = capsys.readouterr()
    assert "nothing is swapped" in output and "epochs" not in error


def test_diagnose(capsys):
    assert cli.main(["diagnose", "mobilenetv3_small_100", "--size", "32"]) == 0
    output = capsys.readouterr().out
    assert "raises    9 x HardsigmoidBackward0 in model.blocks" in output and "slow" in output
    assert cli.main(["diagnose", "mobilenetv3_small_100", "--size", "32", "--fused"]) == 0
    assert capsys.readouterr().out.startswith("nothing found")
    assert cli.main(["diagnose", "no_such_model"]) == 1
    assert "timm knows no model called no_such_model" in capsys.readouterr().err


def test_recipes(capsys):
    assert cli.main(["recipes"]) == 0
    assert {"digits", "swin_b", "resnet50"} <= set(capsys.readouterr().out.split())
    assert cli.main(["recipes", "digits_relu"]) == 0
    assert "act: relu" in capsys.readouterr().out.splitlines()


def test_help_gives_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "epsilon (4/255): perturbation that" in text and "in pixel units (pixels lie in [0, 1])" in text
    assert "metrics.jsonl, config.json and report.html (default: run)" in text


def test_arguments_are_parsed_before_the_optional_packages_load(tmp_path):
    code = "import sys; from gradnorm_kernels import cli; cli._parser().format_help(); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    # torch itself imports two of them.
    assert not set(done.stdout.split()) & (cli.OPTIONAL_PACKAGES - {"numpy", "tqdm"})


def test_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "gradnorm_kernels", "train", "--set", "epochs=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("gradnorm: error: epochs: expected at least 1, got 0\n")


def test_trains_and_resumes(tmp_path, capsys):
    output = ["--output", str(tmp_path / "run")]
    assert cli.main([*QUICK, *output]) == 0
    assert "gradient_norm" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<td>accuracy held out, %</td>" in report and "batch_size=1437" in report and "http" not in report
    assert cli.main([*QUICK, *output]) == 1
    assert "already holds a run; --resume" in capsys.readouterr().err
    # What is not given again is the run's, not the default.
    assert cli.main(["train", "--resume", *output]) == 0
    assert cli.main(["train", "--resume", "--set", "batch_size=128", *output]) == 1
    assert "batch_size: 128 conflicts with the checkpoint's 1437" in capsys.readouterr().err


def test_evaluates(run, tmp_path, capsys):
    arguments = ["evaluate", str(run), "--attack", "fgsm", "--eps", "0", "1/10", "--n", "30"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    heading, _, clean, attacked = capsys.readouterr().out.splitlines()[-4:]
    assert heading.split() == ["epsilon", "clean", "fgsm", "images"]
    assert clean.split()[0] == "0" and attacked.split()[0] == "0.1" and attacked.split()[-1] == "30"
    report = json.loads((tmp_path / "out" / "evaluation-fgsm.json").read_text())
    assert [result["eps"] for result in report["results"]] == [0, 0.1] and report["epoch"] == 1
    # The run's own epsilon, beside the checkpoint.
    assert cli.main(["evaluate", str(run / "checkpoint.pt"), "--attack", "fgsm", "--n", "30"]) == 0
    assert json.loads((run / "evaluation-fgsm.json").read_text())["results"][0]["eps"] == 4 / 255


def test_resume_without_a_checkpoint(tmp_path, capsys):
    assert cli.main(["train", "--resume", "--output", str(tmp_path)]) == 1
    assert f"there is no checkpoint {tmp_path}" in capsys.readouterr().err


def test_unwritable_output(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main([*QUICK, "--output", str(tmp_path / "file" / "run")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train"], ["demo"], ["study", "objectives"]])
def test_missing_package(command, monkeypatch, capsys, tmp_path):
    for name in ("data", "demo", "models", "report", "runs", "study", "trainer"):
        monkeypatch.delitem(sys.modules, f"gradnorm_kernels.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main([*command, "--output", str(tmp_path)]) == 1
    message = "gradnorm: error: the package timm is missing; run: pip install 'gradnorm_kernels[train]'\n"
    assert capsys.readouterr().err == message


def test_abort(monkeypatch, capsys):
    monkeypatch.setattr(trainer, "train", Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["train"]) == 130
    assert "aborted" in capsys.readouterr().err


def test_an_interrupted_study_goes_on(monkeypatch, capsys, tmp_path):
    original, stopped = trainer.Trainer.step, []

    def interrupting(self, *batch):
        if self.config.seed == 1 and not stopped:
            stopped.append(self)
            signal.raise_signal(signal.SIGINT)
        return original(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "step", interrupting)
    settings = ["--set", "epochs=1", "batch_size=718", "--attack", "fgsm", "--n", "20", "--seeds", "2"]
    command = ["study", "objectives", "--only", "natural", *settings, "--output", str(tmp_path)]
    assert cli.main(command) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "natural" in capsys.readouterr().out


def test_evaluation_on_other_classes(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                image.new("L", (8, 8), 20 * i).save(tmp_path / split / name / f"{i}.png")
    # In batches of which that folder has enough images.
    assert cli.main(["train", "--set", "epochs=1", "batch_size=8", "--output", str(tmp_path / "run")]) == 0
    command = ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path), "--attack", "fgsm"]
    assert cli.main(command) == 1
    assert "the classes of" in capsys.readouterr().err


def test_demo_prints_the_table_and_the_report(monkeypatch, capsys, tmp_path):
    demo = pytest.importorskip("gradnorm_kernels.training.demo")
    outcome = SimpleNamespace(table=lambda: "the table")
    monkeypatch.setattr(demo, "demo", lambda output: outcome)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"the table\n\nplots and details: {tmp_path / 'report.html'}\n"
