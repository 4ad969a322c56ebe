"""The studies, on digits with the least of everything."""

import json

import pytest

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from gradnorm_kernels.training import study as study_module
from gradnorm_kernels.training.study import STUDIES, study

QUICK = {"epochs": 2, "batch_size": 359, "ramp_epochs": 0.0}


@pytest.mark.parametrize("name", STUDIES)
def test_study(name, tmp_path):
    """Every row trains, is attacked, and reaches table, JSON and report."""
    outcome = study(name, tmp_path, changes=QUICK, attack="fgsm", n=40, timed_steps=1)
    rows = STUDIES[name].rows
    assert list(outcome.rows) == list(rows)
    for row in outcome.rows.values():
        assert len(row.clean) == 1 and 0 <= row.robust[0] <= row.clean[0] <= 1 and row.step_seconds > 0
        watched = "eval_apgd_accuracy" in row.histories[0][-1]
        assert watched == (name == "stability")
    heading, _, *lines = outcome.table().splitlines()
    assert "fgsm, eps 0.1" in heading and len(lines) == len(rows)
    assert ("collapsed" in heading) == (name == "stability")
    saved = json.loads((tmp_path / "study.json").read_text())
    assert saved["rows"].keys() == rows.keys() and "torch" in saved["conditions"]
    report = (tmp_path / "report.html").read_text()
    assert all(f"<td>{row}</td>" in report for row in rows) and "http" not in report
    assert report.count("data:image/png;base64,") == (3 if name == "stability" else 2)


def test_seeds_and_what_is_done_already(tmp_path, monkeypatch):
    options = {"changes": QUICK, "attack": "fgsm", "n": 40, "timed_steps": 1, "only": ["natural", "FGSM"]}
    one = study("objectives", tmp_path, **options)
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["adversarial-0-plain1", "natural-0"]
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


@pytest.mark.parametrize(
    ("accuracies", "epoch"),
    [([0.1, 0.4, 0.6], None), ([0.1, 0.4, 0.19], 3), ([0.5, 0.3, 0.26], None), ([None, 0.5, None, 0.0], 4)],
)
def test_collapse(accuracies, epoch):
    history = [
        {"epoch": i} | ({} if a is None else {"eval_apgd_accuracy": a}) for i, a in enumerate(accuracies, 1)
    ]
    assert study_module._collapse(history) == epoch
