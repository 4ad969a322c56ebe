"""The studies, on digits with the least of everything."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from gradnorm_kernels.training import study as study_module
from gradnorm_kernels.training.options import TrainingError
from gradnorm_kernels.training.study import STUDIES, study

QUICK = {"epochs": 2, "batch_size": 359, "ramp_epochs": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_study(name, tmp_path):
    """Every row trains, is attacked, and reaches table, JSON and report."""
    outcome = study(name, tmp_path, changes=QUICK, attack="fgsm", n=40, timed_steps=1)
    rows = STUDIES[name].rows
    assert list(outcome.rows) == list(rows)
    for row in outcome.rows.values():
        assert len(row.clean) == 1 and 0 <= row.robust[0] <= row.clean[0] <= 1 and row.step_seconds > 0
        watched = "eval_apgd_accuracy" in row.histories[0][-1]
        assert watched == STUDIES[name].per_epoch
    heading, _, *lines = outcome.table().splitlines()
    assert "fgsm, eps 0.1" in heading and len(lines) == len(rows)
    assert ("collapsed" in heading) == STUDIES[name].per_epoch
    saved = json.loads((tmp_path / "study.json").read_text())
    assert saved["rows"].keys() == rows.keys() and "torch" in saved["conditions"]
    report = (tmp_path / "report.html").read_text()
    assert all(f"<td>{row}</td>" in report for row in rows) and "http" not in report
    assert report.count("<svg ") == 2 + 2 * STUDIES[name].per_epoch + STUDIES[name].against_clock
    # Six images, their edges, and their gradients by each row's model.
    assert report.count("data:image/png;base64,") == 6 * (2 + len(rows))


def test_seeds_and_what_is_done_already(tmp_path, monkeypatch):
    options = {"changes": QUICK, "attack": "fgsm", "n": 40, "timed_steps": 1, "only": ["natural", "FGSM"]}
    one = study("objectives", tmp_path, **options)
    runs = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs").iterdir())
    assert runs == ["adversarial-seed0", "natural-seed0"]
    trained = []
    original = study_module.Trainer.step
    monkeypatch.setattr(study_module, "step_seconds", lambda trainers, *_: dict.fromkeys(trainers, 1.0))
    monkeypatch.setattr(
        study_module.Trainer,
        "step",
        lambda self, *batch: trained.append(self.config.seed) or original(self, *batch),
    )
    two = study("objectives", tmp_path, seeds=2, **options)
    assert set(trained) == {1}
    for name, row in two.rows.items():
        assert len(row.clean) == 2 and row.clean[0] == one.rows[name].clean[0]
    assert "(" in two.table() and "(" not in one.table()


def test_trainings_against_the_clock(tmp_path):
    """Two runs that differ in what computes them alone are two."""
    rows = ["gradient norm, PyTorch's ops", "gradient norm, fused"]
    changes = {**QUICK, "epochs": 1}
    options = {"changes": changes, "attack": "fgsm", "n": 40, "timed_steps": 1, "only": rows}
    outcome = study("speed", tmp_path, **options)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    for row in outcome.rows.values():
        assert row.training_seconds == [row.histories[0][0]["seconds"]]
        assert "eval_apgd_accuracy" in row.histories[0][0]
    first, second = (row.histories[0][0] for row in outcome.rows.values())
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    # Of its reference there is no row.
    assert "training, s" in outcome.table() and "/ PGD-3" not in outcome.table()
    assert "Robust accuracy against time" in (tmp_path / "report.html").read_text()


def test_other_options_make_other_runs(tmp_path):
    options = {"attack": "fgsm", "n": 40, "timed_steps": 1, "only": ["natural"]}
    for lr in (1e-3, 2e-3):
        outcome = study("objectives", tmp_path, changes={**QUICK, "lr": lr}, **options)
        assert outcome.rows["natural"].histories[0][0]["lr"] <= lr
    assert len(list((tmp_path / "runs").iterdir())) == 2
    with pytest.raises(TrainingError, match="mode: the rows of objectives set it themselves"):
        study("objectives", tmp_path, changes={"mode": "eval"}, **options)


def test_too_few_classes_fail_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "load_data", lambda config: SimpleNamespace(num_classes=3))
    with pytest.raises(TrainingError, match="attack: autoattack needs at least 4 classes, got 3"):
        study("objectives", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("accuracies", "epoch"),
    [
        ([0.3, 0.4, 0.6], None),
        ([0.3, 0.4, 0.19], 3),
        ([0.5, 0.3, 0.26], None),
        ([None, 0.5, None, 0.0, None, 0.1], 4),
        ([0.5, 0.1, 0.4], None),  # recovers
        ([0.15, 0.0, 0.0], None),  # was at chance before
        ([0.1, 0.0, 0.5], None),
    ],
)
def test_collapse(accuracies, epoch):
    history = [
        {"epoch": i} | ({} if a is None else {"eval_apgd_accuracy": a}) for i, a in enumerate(accuracies, 1)
    ]
    assert study_module._collapse(history, num_classes=10) == epoch
