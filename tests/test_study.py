"""The studies, on digits with the least of everything."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from gradnorm_kernels.training import evaluation
from gradnorm_kernels.training import study as study_module
from gradnorm_kernels.training.config import TrainConfig
from gradnorm_kernels.training.options import TrainingError
from gradnorm_kernels.training.study import STUDIES, Outcome, Row, study

QUICK = {"epochs": 2, "batch_size": 359, "ramp_epochs": 0.0}


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    monkeypatch.setitem(evaluation._STEPS, "apgd-ce", 2)


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
    assert report.count("<svg ") == 5 + 2 * STUDIES[name].per_epoch + STUDIES[name].against_clock
    # Six images, their edges, and their gradients by each row's model; again, and the surfaces.
    assert report.count("data:image/png;base64,") == 6 * (2 + len(rows) + 1 + len(rows))


def test_seeds_and_what_is_done_already(tmp_path, monkeypatch):
    options = {"changes": QUICK, "attack": "fgsm", "n": 40, "timed_steps": 1, "only": ["natural", "FGSM"]}
    one = study("objectives", tmp_path, **options)
    runs = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs").iterdir())
    assert runs == ["adversarial-seed0", "natural-seed0"]
    trained = []
    original = study_module.Trainer.step
    monkeypatch.setattr(study_module, "step_seconds", lambda trainers, *_: dict.fromkeys(trainers, 1.0))
    monkeypatch.setattr(study_module, "step_flops", lambda config: 1)
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


def test_a_row_starts_from_another_row(tmp_path):
    """Which is trained for it; times are left out, and what both computed is counted."""
    options = {"changes": {**QUICK, "epochs": 1}, "attack": "fgsm", "n": 40, "timed_steps": 0}
    started = "natural, then gradient norm"
    outcome = study("fine_tuning", tmp_path, only=[started], **options)
    (row,) = outcome.rows.values()
    paths = {path.name.split("-")[0]: path for path in (tmp_path / "runs").iterdir()}
    assert paths.keys() == {"natural", "gradient_norm"}
    config = json.loads((paths["gradient_norm"] / "config.json").read_text())
    assert config["init"] == str(paths["natural"] / "checkpoint.pt")
    # Products of a natural step: 3 of a forward pass; with the norm 6, but none by the pixels in the first.
    natural, steps = row.training_flops - 4 * row.step_flops, 4
    assert 1.9 < row.step_flops / (natural / steps) < 2.1
    saved = (tmp_path / "study.json").read_text()
    assert "seconds" not in saved and '"images_per_second"' not in saved and "step, ms" not in outcome.table()
    assert json.loads(saved)["rows"][started]["options"]["init"] == "natural"


def test_epsilon_is_a_multiple_in_training_alone(tmp_path):
    options = {"changes": {**QUICK, "epochs": 1}, "attack": "fgsm", "n": 40, "timed_steps": 0}
    outcome = study("pareto", tmp_path, only=["PGD-3: epsilon x 0.5"], **options)
    (path,) = (tmp_path / "runs").iterdir()
    assert json.loads((path / "config.json").read_text())["epsilon"] == 0.05
    (row,) = outcome.rows.values()
    assert [eps for eps, _ in row.curve] == pytest.approx([0, 0.05, 0.1, 0.2])
    accuracies = [accuracy for _, accuracy in row.curve]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] == row.clean[0]
    attacked = json.loads((path / "evaluation-fgsm.json").read_text())["results"]
    assert [result["eps"] for result in attacked] == [0.1]


def test_a_front_leaves_out_what_has_not_learnt():
    """The cost of it is shown, and the page says which."""
    shares = {
        "gradient norm: 1.2": (0.9, 0.7),
        "gradient norm: 4.8": (0.2, 0.1),
        "PGD-3: epsilon x 1": (0.8, 0.6),
    }
    rows = {
        name: Row([clean], [robust], [0.0], [], 1, 1, 0.0, [], [[]], [None])
        for name, (clean, robust) in shares.items()
    }
    outcome = Outcome(STUDIES["pareto"], TrainConfig(), "fgsm", 40, rows)
    unlearnt = study_module._unlearnt(outcome)
    assert unlearnt == ["gradient norm: 4.8"]
    costs, front = study_module._costs(outcome, unlearnt).split("</figure>")[:2]
    assert costs.count("<circle") == 3 and front.count("<circle") == 2 and ">4.8<" not in front
    assert ">0<" in costs and ">0<" not in front
    outcome = replace(outcome, study=STUDIES["objectives"])
    assert study_module._unlearnt(outcome) == []


@pytest.mark.slow
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
