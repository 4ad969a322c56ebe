"""The benchmarks, on tensors and models too small to time: what they write, and what stops them."""

import contextlib
import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import usual

import gradnorm_kernels as gk
from gradnorm_kernels._json import by_line
from gradnorm_kernels.training import GradientNormLoss

ROOT = Path(__file__).parents[1]
# `pytest` alone, unlike `python -m pytest`, does not look here. Last, so that an installed package wins.
sys.path.append(str(ROOT))
pytest.importorskip("timm", reason="benchmarks.steps needs: pip install 'gradnorm_kernels[train]'")

from benchmarks import gpu, kernels, limits, measure, penalties, report, steps  # noqa: E402

QUICK = ["--device=cpu", "--rounds=2"]
SMALL_KERNEL = [*QUICK, "--shape", "4", "9", "32"]
SMALL_STEP = [*QUICK, "--batch=4", "--img-size=64"]
# Of six blocks, 64 wide.
TRANSFORMER = "test_vit"
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "kernels-cpu.json").read_text())


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(limits, "SIZES", {"cpu": (2**20, 64)})
    # The other tests need the memory.
    monkeypatch.setattr(measure, "keep_heap", lambda: True)


@pytest.fixture
def run(tmp_path):
    """What a benchmark writes."""

    def run(program, *arguments):
        file = tmp_path / "new" / "out.json"
        try:
            program.main([*arguments, "--json", str(file)])
        finally:
            run.rows = json.loads(file.read_text())["rows"] if file.exists() else None
        return json.loads(file.read_text()) if file.exists() else None

    return run


def by_variant(written):
    return {row["variant"]: row for row in written["rows"]}


def label(case):
    return " ".join((case.op, case.setting)).strip()


def tiny_shape(case):
    # Channels that 32 groups divide, and no dimension that is 1 or like another.
    dims = len(case.cpu[0])
    return (3, 32, 5, 7, 4)[:dims] if dims == 4 or case.op == "grid_sample" else (5, 7, 6)[:dims]


def forgetful_gelu(input, approximate="none"):
    """Right, but for a second derivative of zero."""
    point = input.detach().requires_grad_()
    value = F.gelu(point, approximate=approximate)
    (slope,) = torch.autograd.grad(value.sum(), point)
    return value.detach() + (input - point.detach()) * slope


@pytest.mark.parametrize("case", kernels.CASES, ids=label)
def test_every_case(case):
    """The three passes of what the package has by now, and of stock where it has none."""
    functional = gk.functional if hasattr(gk.functional, case.op) else kernels.STOCK
    torch.manual_seed(0)
    problem = kernels.Problem.draw(case, tiny_shape(case), torch.float32, "cpu")
    exact = {which: run() for which, run in problem.double().passes(kernels.EXACT).items()}
    for which, run in problem.passes(functional).items():
        largest = max(1, *(t.abs().max().item() for t in exact[which] if t is not None))
        assert max(kernels.errors(run, exact[which])) < 1e-3 * largest
        assert case.bytes(which, problem.leaves, problem.grad_output)


@pytest.mark.parametrize("case", kernels.CASES, ids=label)
def test_default_shapes(case):
    """They suit the case."""
    for shape in case.cpu + case.cuda:
        leaves = case.make_leaves(shape, torch.float32, "meta")
        assert case.call(kernels.STOCK, leaves).numel()


@pytest.mark.parametrize(
    ("name", "forward", "backward", "double_backward"),
    [
        ("gelu none", (2, 0), (3, 0), (5, 0)),
        ("relu", (2, 0), (3, 0), (3, 0)),
        ("softmax", (2, 0), (3, 0), (5, 0)),
        ("layer_norm", (2, 2), (3, 1), (5, 2)),
        ("batch_norm train", (3, 2), (5, 1), (8, 2)),
        ("batch_norm eval", (2, 4), (2, 2), (3, 3)),
        ("scaled_dot_product_attention vit", (4, 0), (7, 0), (11, 0)),
    ],
)
def test_bytes_to_move(name, forward, backward, double_backward):
    """Those of so many inputs and vectors of the channels."""
    case = next(c for c in kernels.CASES if label(c) == name)
    leaves = case.make_leaves(case.cpu[0], torch.float32, "meta")
    first = leaves[case.inputs[0]]
    vector = leaves.get("weight", torch.empty(0))
    passes = {"forward": forward, "backward": backward, "double_backward": double_backward}
    for which, (inputs, vectors) in passes.items():
        assert case.bytes(which, leaves, first) == inputs * first.nbytes + vectors * vector.nbytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap")
def test_memory_is_kept():
    """In a process of its own, because it stays so: a copy makes no pages, as one did before."""
    script = """
import torch
from benchmarks.measure import keep_heap, page_faults
tensor = torch.ones(2**24)
print(min(page_faults(tensor.clone) for _ in range(5)), keep_heap())
print(min(page_faults(tensor.clone) for _ in range(5)))
"""
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    before, kept, after = out.stdout.split()
    assert int(after) < 16 < int(before) and kept == "True"


@pytest.mark.parametrize(
    ("slow", "shape", "refused"),
    [(0.49, (1024, 1024), True), (0.51, (1024, 1024), False), (0.49, (1023, 256), False)],
)
def test_copies_of_one_size_that_differ_are_refused(monkeypatch, run, capsys, slow, shape, refused):
    """By more than twice, three times; a small copy's time is the call's, and each dtype has its rate."""
    calls = Counter()

    def measured(case, shape, dtype, *_):
        calls[case.setting, dtype] += 1
        rate = (40 if dtype == "float32" else 10) * (slow if case.setting == "tanh" else 1)
        row = {"op": case.op, "setting": case.setting, "pass": "forward", "dtype": dtype, "shape": [*shape]}
        return [row | {"variant": "stock", "gigabytes_per_second": rate / 2, "fraction_of_copy": 0.5}]

    monkeypatch.setattr(kernels, "measure", measured)
    arguments = [*QUICK, "--op", "gelu", "--shape", *map(str, shape)]
    if not refused:
        assert run(kernels, *arguments)
        return
    with pytest.raises(SystemExit):
        run(kernels, *arguments)
    assert run.rows and not any(row["setting"] == "tanh" and row["dtype"] == "float32" for row in run.rows)
    wrong = "float32 ran at 19.6 GB/s beside gelu tanh forward [1024, 1024], at 29.8 GB/s beside most"
    assert capsys.readouterr().out.count(wrong) == 3
    assert calls["tanh", "float32"] == 3 and calls["none", "float32"] == 1


def test_kernels_json(run, capsys):
    written = run(kernels, *SMALL_KERNEL, "--op", "gelu")
    assert written.keys() == COMMITTED.keys() and written["machine"].keys() >= COMMITTED["machine"].keys()
    assert written["machine"]["heap_kept"]
    assert written["rounds"] == 2
    # Two settings, three passes, two dtypes, two variants.
    assert len(written["rows"]) == 24
    assert all(row.keys() == COMMITTED["rows"][0].keys() for row in written["rows"])
    assert all(row["time_over_stock"] == 1 for row in written["rows"] if row["variant"] == "stock")
    assert all(
        row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"] for row in written["rows"]
    )
    out = capsys.readouterr().out
    assert "gelu tanh (4, 9, 32)" in out and "wrote " in out


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda input, approximate: F.gelu(input, approximate=approximate) * 1.001, "forward"),
        (lambda input, approximate: F.gelu(input, approximate=approximate) * float("nan"), "forward"),
        (forgetful_gelu, "double_backward"),
    ],
)
def test_wrong_fused_op_fails_the_run(monkeypatch, run, wrong, where):
    """After the others were measured."""
    monkeypatch.setattr(gk.functional, "gelu", wrong)
    with pytest.raises(SystemExit, match=rf"^gelu none float32 \(4, 9, 32\): {where}: fused is off by "):
        run(kernels, *SMALL_KERNEL, "--op", "gelu", "relu", "--dtype", "float32")
    assert {row["op"] for row in run.rows} == {"relu"}


@pytest.mark.slow
def test_compiled_variant(run):
    arguments = ["--op", "relu", "layer_norm", "--dtype", "float32", "--variants", "stock", "compiled"]
    rows = run(kernels, *SMALL_KERNEL, *arguments)["rows"]
    assert len(rows) == 12
    assert max(row["max_error"] for row in rows) < 1e-4


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (kernels, ["--op", "no_such_op"], "--op"),
        (kernels, ["--op", "mish"], "--op: gradnorm_kernels.functional has no mish"),
        (kernels, ["--variants", "fused"], "--variants: stock is what"),
        (kernels, ["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (steps, ["--device", "cuda"], "--device cuda: torch.cuda.is_available() is False"),
        (penalties, ["other"], "CODE: expected some of wgan_gp, r1,"),
        (steps, ["--batch", "0"], "--batch: expected at least 1, got 0"),
        (steps, ["--first-step-limit", "0"], "--first-step-limit: expected more than 0, got 0"),
        (steps, ["--dtype", "tf32"], "--dtype tf32: needs a GPU"),
        (steps, ["--act", "nothing"], "--act: timm knows none called nothing"),
        (steps, ["--variants", "other"], "--variants"),
    ],
)
def test_unsuitable_arguments(monkeypatch, program, arguments, message, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(gk.functional, "mish")
    with pytest.raises(SystemExit) as exit:
        program.main([*QUICK, *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_shape_that_does_not_suit():
    with pytest.raises(SystemExit, match=r"conv2d depthwise 7x7 float32: --shape \(4,\)"):
        kernels.main([*QUICK, "--op", "conv2d", "--variants", "stock", "--shape", "4"])


def test_variants_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = measure.alternate(runs, lambda run: run() or len(order), rounds=2, warm_up=1)
    assert order == list("ababab")
    assert seconds == {"a": [3, 5], "b": [4, 6]}


def test_steps_json(run, capsys):
    written = run(steps, *SMALL_STEP, "--model", "resnet18", TRANSFORMER)
    assert written.keys() == COMMITTED.keys() | {"limits"}
    assert written["machine"].keys() >= COMMITTED["machine"].keys()
    assert [row["variant"] for row in written["rows"]] == ["stock", "fuse", "switch"] * 2
    shared = {
        "model", "relu_replaced_by", "batch_norm", "unfused_attentions", "dtype", "shape", "variant",
        "milliseconds", "milliseconds_min", "milliseconds_max", "time_over_stock", "first_step_seconds",
        "images_per_second", "teraflops_per_second", "floor_milliseconds", "fraction_of_floor",
    }  # fmt: skip
    for row in written["rows"]:
        assert row["fraction_of_floor"] == pytest.approx(row["floor_milliseconds"] / row["milliseconds"])
        assert row.keys() - {"gradient_difference"} == shared
        assert row["shape"] == [4, 3, 64, 64]
        assert row["variant"] == "stock" or row["gradient_difference"] < 1e-4
    resnet, vit = written["rows"][0], written["rows"][3]
    assert (resnet["relu_replaced_by"], resnet["unfused_attentions"]) == ("gelu", 0)
    assert (vit["relu_replaced_by"], vit["unfused_attentions"]) == (None, 6)
    assert "resnet18" in capsys.readouterr().out
    assert not gk.is_fused_double_backward_enabled()


@pytest.mark.slow
def test_resident_peak():
    """Of a process's own, whatever this one has had: what a run holds at once, but not what it found."""
    args = steps.options().parse_args(["--device=cpu", "--batch=16"])
    held = torch.ones(2**28)
    peaks = [
        steps.in_new_process(steps.resident_peak, TRANSFORMER, variant, "float32", args)
        for variant in ("natural", "stock")
    ]
    assert 2**24 < peaks[0] < peaks[1] < held.nbytes / 2


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True])
def test_memory_of_a_step(monkeypatch, run, memory):
    """Measured where it is asked for, and not of compilers."""
    monkeypatch.setattr(steps, "in_new_process", lambda function, *arguments: 1234)
    monkeypatch.setitem(steps.VARIANTS, "compiled", steps.VARIANTS["stock"])
    options = ["--model", "resnet18", "--variants", "fuse", "compiled", *["--memory"] * memory]
    rows = by_variant(run(steps, *SMALL_STEP, *options))
    found = {variant: row.get("peak_memory_bytes") for variant, row in rows.items()}
    measured = 1234 if memory else None
    assert found == {"stock": measured, "fuse": measured, "compiled": None}


@pytest.mark.slow
def test_profile(run, capsys):
    rows = run(steps, *SMALL_STEP, "--model", "resnet18", "--variants", "fuse", "--profile")["rows"]
    assert " x gradnorm_kernels::" in capsys.readouterr().out
    for row in rows:
        times = [op["milliseconds"] for op in row["profile"]]
        assert times == sorted(times, reverse=True) and times[0] > 0
        fused = any(op["op"].startswith("gradnorm_kernels::") for op in row["profile"])
        assert fused == (row["variant"] == "fuse")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_mode(mode):
    model, facts = steps.make_model("resnet18", steps.options().parse_args(["--bn", mode, "--device", "cpu"]))
    assert facts["batch_norm"] == mode
    for module in model.modules():
        assert module.training == (mode == "train" and isinstance(module, torch.nn.BatchNorm2d))
        assert not isinstance(module, torch.nn.ReLU)


def test_disagreeing_variant_fails_the_run(monkeypatch, run):
    monkeypatch.setattr(gk.functional, "gelu", forgetful_gelu)
    with pytest.raises(SystemExit, match=rf"{TRANSFORMER} fuse float32: gradients are .* off stock's"):
        run(steps, *SMALL_STEP, "--model", TRANSFORMER, "--variants", "fuse")
    stock, fuse = run.rows
    assert stock["milliseconds"] > 0 and "milliseconds" not in fuse


@pytest.mark.parametrize("failing", ["stock", "fuse"])
def test_out_of_memory_is_a_row(monkeypatch, run, capsys, failing):
    def exhausted(model, images, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    variant = steps.Variant(lambda *_: exhausted, steps.PENALTY)
    monkeypatch.setitem(steps.VARIANTS, failing, variant)
    rows = by_variant(run(steps, *SMALL_STEP, "--model", TRANSFORMER))
    assert rows.keys() == {"stock", "fuse", "switch"}
    assert rows[failing]["error"] == "out of memory" and "milliseconds" not in rows[failing]
    assert rows["switch"]["milliseconds"] > 0
    assert (rows["switch"]["time_over_stock"] is None) == (failing == "stock")
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.slow
def test_out_of_memory_beside_the_others(monkeypatch, run):
    """The variant that fails in a round of the timing is a row that says so; the others are timed."""
    alternate, rounds = steps.alternate, []

    def exhausted_once(runs, clock, *args, **kwargs):
        rounds.append(list(runs))
        if len(rounds) == 1:
            clock(runs["fuse"])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return alternate(runs, clock, *args, **kwargs)

    monkeypatch.setattr(steps, "alternate", exhausted_once)
    rows = by_variant(run(steps, *SMALL_STEP, "--model", "resnet18"))
    assert rounds == [["stock", "fuse", "switch"], ["stock", "switch"]]
    assert rows["fuse"]["error"] == "out of memory" and rows["switch"]["time_over_stock"] > 0


def test_what_of_ours_does_not_run_fails_the_run(monkeypatch, run):
    """After the others were measured."""

    def fail(model):
        raise RuntimeError("a defect")

    monkeypatch.setitem(steps.VARIANTS, "fuse", steps.Variant(steps.backward_step, steps.PENALTY, fail))
    with pytest.raises(SystemExit, match="resnet18 fuse float32: a defect"):
        run(steps, *SMALL_STEP, "--model", "resnet18", "--variants", "fuse")
    stock, fuse = run.rows
    assert fuse["error"] == "refused: a defect" and stock["milliseconds"] > 0


def test_functional_step_of_batch_norm(monkeypatch):
    """Its statistics are not the transform's to change."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.GELU())
    model = torch.nn.Sequential(model, torch.nn.Flatten(), torch.nn.LazyLinear(5))
    images, targets = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    model(images)
    steps.backward_step(steps.PENALTY, False)(model, images, targets)
    expected = steps.gradients(model)
    steps.functional_step(steps.PENALTY, False)(model, images, targets)
    assert steps.relative_difference(steps.gradients(model), expected) < 1e-3


def test_floor():
    """Of each op the slower of its two bounds."""
    found = limits.Limits(100.0, {"float32": 1000.0, "bfloat16": 4000.0})
    ops = [(200, 0), (100, 5000)]
    assert found.floor(ops, "float32") == 2 + 5
    assert found.floor(ops, "bfloat16") == 2 + 1.25


def test_limits(run, capsys):
    [row] = run(limits, *QUICK)["rows"]
    assert row["copy_bytes_per_second"] > 0 and row["flops_per_second"].keys() == {"float32", "bfloat16"}
    assert "GB/s" in capsys.readouterr().out


def test_time_limit(run, capsys):
    """What does not fit is not begun; the ceilings are in the file all the same."""
    options = ["--model", TRANSFORMER, "--variants", "stock", "--time-limit", "0"]
    written = run(steps, *SMALL_STEP, *options)
    assert written["rows"] == [] and written["limits"]["copy_bytes_per_second"] > 0
    assert f"{TRANSFORMER} float32: not measured within 0 s" in capsys.readouterr().out
    run(kernels, *SMALL_KERNEL, "--op", "gelu", "--time-limit", "0")
    assert capsys.readouterr().out.count("not measured within 0 s") == 4


def test_budget(monkeypatch):
    """What comes next is expected to take as long as the last."""
    now = 10.0
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now))
    budget = measure.Budget(10)
    allowed = []
    for now in (10.0, 13.0, 16.5, 17.0):  # noqa: B007 (monotonic reads it)
        allowed.append((budget.allows_another(), budget.left()))
    assert allowed == [(True, 10), (True, 7), (True, 3.5), (True, 3)]
    now = 19.0
    assert not budget.allows_another()


def test_every_row_is_written_when_it_is_measured(monkeypatch, tmp_path):
    """A run that is cut off keeps what it has, and no file in pieces."""
    file = tmp_path / "out.json"
    measured = kernels.measure

    def cut_off(case, *arguments):
        if case.op == "relu":
            raise KeyboardInterrupt
        return measured(case, *arguments)

    monkeypatch.setattr(kernels, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        options = ["--op", "silu", "relu", "--dtype", "float32"]
        kernels.main([*SMALL_KERNEL, *options, "--json", str(file)])
    assert {row["op"] for row in json.loads(file.read_text())["rows"]} == {"silu"}
    assert list(tmp_path.iterdir()) == [file]


def test_first_step_limit(monkeypatch, run):
    """A compiler that does not end is left, though it takes every exception for its own."""

    def endless(model, images, targets):
        while True:
            with contextlib.suppress(Exception):
                time.sleep(60)

    monkeypatch.setitem(steps.VARIANTS, "compiled", steps.Variant(lambda *_: endless, steps.PENALTY))
    options = ["--model", TRANSFORMER, "--variants", "compiled", "fuse", "--first-step-limit", "3"]
    before = signal.getsignal(signal.SIGALRM)
    stock, compiled, fuse = run(steps, *SMALL_STEP, *options)["rows"]
    assert compiled["error"] == "first step not done in 3 s" and "milliseconds" not in compiled
    assert stock["milliseconds"] > 0 and fuse["milliseconds"] > 0
    assert signal.getsignal(signal.SIGALRM) == before


def test_relative_difference():
    stock = [torch.tensor([1.0, -2.0]), torch.tensor([1e-9])]
    assert steps.relative_difference(stock, stock) == 0
    assert steps.relative_difference([stock[0] + 1, stock[1]], stock) == 0.5
    # Zero but for rounding.
    assert steps.relative_difference([stock[0], -stock[1]], stock) == pytest.approx(1e-6)
    assert steps.relative_difference([stock[0], stock[1] * float("nan")], stock) == float("inf")
    assert steps.relative_difference(stock[:1], stock) == float("inf")


def test_unknown_model():
    with pytest.raises(SystemExit, match="timm knows no model called nothing"):
        steps.main([*QUICK, "--model", "nothing"])


@pytest.mark.slow
def test_rivals(run, monkeypatch, capsys):
    """Compiled steps have stock's gradients; whole ones run by ATen, as generating code takes minutes."""
    compile = torch.compile
    by_aten = {"backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **by_aten | options))
    exact = ["compiled", "compiled_func", "fuse_compiled", "fuse_compiled_regions"]
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        exact = ["compiled_func", "fuse_compiled_regions"]
    others = ["forward_over_reverse", "finite_difference", "finite_difference_compiled", "natural", "pgd3"]
    rows = by_variant(run(steps, *SMALL_STEP, "--model", TRANSFORMER, "--variants", *exact, *others))
    assert list(rows) == ["stock", *exact, *others]
    assert not any("error" in row for row in rows.values())
    assert all(rows[name]["gradient_difference"] < 1e-4 for name in exact)
    assert "gradient_difference" not in rows["pgd3"] and "pgd3" in capsys.readouterr().out


def test_what_does_not_run_is_a_row(monkeypatch, run):
    """An approximation that is off, and a compiler that gives up."""

    def refuse(model, images, targets):
        raise RuntimeError("not today\nbecause")

    coarse = GradientNormLoss(ramp_epochs=0, engine="finite_difference", difference_step=0.5)
    monkeypatch.setattr(steps, "DIFFERENCE", coarse)
    monkeypatch.setitem(steps.VARIANTS, "finite_difference", steps.Variant(steps.backward_step, coarse))
    monkeypatch.setitem(steps.VARIANTS, "compiled", steps.Variant(lambda *_: refuse, steps.PENALTY))
    variants = ["finite_difference", "compiled"]
    rows = by_variant(run(steps, *SMALL_STEP, "--model", TRANSFORMER, "--variants", *variants))
    assert "off stock's" in rows["finite_difference"]["error"]
    assert rows["compiled"]["error"] == "refused: not today"
    assert not any("milliseconds" in rows[name] for name in variants)


@pytest.mark.parametrize("code", usual(penalties.CODES, "egnn"))
def test_penalties(run, code, capsys):
    stock, switched = run(penalties, *QUICK, code)["rows"]
    assert [stock["code"], stock["variant"], switched["code"]] == [code, "stock", code]
    assert switched["variant"] == "switch" and switched["gradient_difference"] < 1e-3
    assert code in capsys.readouterr().out and not gk.is_fused_double_backward_enabled()


@pytest.mark.parametrize(
    ("example", "options", "said"),
    [
        ("egnn", QUICK, "egnn           switch"),
        pytest.param(
            "captured_force_field",
            ["--backend=aot_eager"],
            "2 gradnorm_kernels.qkv_attention.default",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_example_runs_as_a_script(example, options, said, tmp_path):
    """From any folder; the gradients are compared in it."""
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(Path(gk.__file__).parents[1])}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said in out.stdout, out.stderr


def test_examples_do_not_know_this_library():
    """But for the one that swaps modules; the codes that are measured are those that they run."""
    texts = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert [stem for stem, text in texts.items() if "gradnorm" in text] == ["captured_force_field"]
    calls = re.findall(r"^    compare\((.+)\)$", "\n".join(texts.values()), re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(calls))) == sorted(penalties.CODES)


def test_a_penalty_that_disagrees_stops_the_run(monkeypatch):
    def wrong_under_the_switch(device):
        model = torch.nn.Linear(2, 1)

        def step():
            model.zero_grad()
            (model(torch.ones(1, 2)).sum() * (2 if gk.is_fused_double_backward_enabled() else 1)).backward()

        return model, step

    monkeypatch.setattr(penalties, "CODES", {"pinn": wrong_under_the_switch})
    with pytest.raises(SystemExit, match="pinn: under the switch, gradients are"):
        penalties.main(QUICK)


MOVED = [
    {"variant": variant, "phase": "forward", "op": "aten::mm", "bytes": moved, "launches": launches}
    for variant, moved, launches in (("stock", 8e9, 20), ("fuse", 2e9, 5), ("compiled", 4e9, 10))
]
ALIVE = [
    {
        "variant": variant,
        "bytes_after": {"forward": 2**30, "input gradient": 2**31},
        "bytes_at_peak": {"held": 2**29, "forward": 2**30, "input gradient": 0, "backward": backward},
    }
    for variant, backward in (("natural", 0), ("stock", 5 * 2**29), ("fuse", 2**29))
]
MACHINE = COMMITTED["machine"] | {"hardware": "a machine", "commit": "1234567"}
TIMED = {
    "model": "vit", "batch_norm": "train", "shape": [8, 3, 32, 32], "dtype": "float32", "variant": "stock",
    "milliseconds": 12.34, "milliseconds_min": 11.0, "milliseconds_max": 13.0, "time_over_stock": 1.0,
}  # fmt: skip


def timed(variant, over_stock, **more):
    return TIMED | {"variant": variant, "milliseconds": 12 * over_stock, "time_over_stock": over_stock} | more


class TestReport:
    @pytest.fixture(autouse=True)
    def copies(self, monkeypatch, tmp_path, request):
        """Of what is written; the committed ones are only checked."""
        if "committed" not in request.node.name:
            for name in ("README", "PAGE"):
                copy = tmp_path / f"{name}.md"
                copy.write_text(getattr(report, name).read_text())
                monkeypatch.setattr(report, name, copy)

    @pytest.fixture
    def page(self, tmp_path):
        """The page of one file of results."""

        def page(name, **contents):
            (tmp_path / f"{name}.json").write_text(by_line(contents))
            return report.page(tmp_path)

        return page

    def test_the_page_is_that_of_the_committed_results(self):
        """Else: python -m benchmarks.report"""
        assert report.main(["--check"]) == 0

    def test_committed_results_have_a_row_a_line(self):
        for path in report.RESULTS.iterdir():
            text = path.read_text()
            assert by_line(json.loads(text)) == text

    def test_a_page_that_differs(self, capsys):
        assert report.main(["--check"]) == 0
        for path in (report.PAGE, report.README):
            path.write_text(path.read_text().replace("| --- |", "| -- |", 1))
            assert report.main(["--check"]) == 1
            assert f"{path} differs: run python -m benchmarks.report" in capsys.readouterr().err
            report.main([])
        report.PAGE.unlink()
        assert report.main(["--check"]) == 1 and report.main(["--summary"]) == 0
        assert "steps, cpu:" in capsys.readouterr().out and report.main(["--check"]) == 0

    def test_readme(self, page, tmp_path):
        """A line a family: its first model that was timed, and one in the same mode that was counted."""
        counted = {"batch": 3, "act": "gelu", "rows": MOVED}
        page("traffic-a", model="resnet50", bn="eval", **counted)
        page("traffic-b", model="resnet50", bn="train", **counted | {"rows": MOVED[:1]})
        page("memory-a", model="resnet50", bn="eval", **counted | {"rows": ALIVE})
        steps = [
            timed("stock", 1),
            timed("fuse", 0.5),
            timed("stock", 1, dtype="bfloat16"),
            timed("fuse", 0.1),
        ]
        rows = [steps[0] | {"model": "convnext"}, *({**row, "model": "vit_b"} for row in steps[:3])]
        rows += [row | {"model": "resnet50d", "batch_norm": "eval"} for row in steps[:2]]
        page("steps-cuda", machine=MACHINE, rounds=3, rows=rows)
        text = "a\n<!-- result -->\nold\n<!-- /result -->\nz"
        written = report.readme(text, tmp_path)
        assert written.startswith("a\n<!-- result -->\n\ncpu: not measured.\n\na machine, ")
        assert [line for line in written.splitlines() if line.startswith("|")][2:] == [
            "| resnet50d, 8 at 32², float32 | 12.0 | 6.0 | 0.50"
            " | 0.250 (resnet50, gelu, BatchNorm in eval mode, batch 3) | 0.500 |",
            "| vit_b, 8 at 32², float32 | 12.0 | 6.0 | 0.50 | not counted | not counted |",
        ]
        assert report.readme(written, tmp_path) == written and "old" not in written
        with pytest.raises(ValueError, match="expected a block from <!-- result --> to <!-- /result -->"):
            report.readme(text.replace("<!-- result -->", ""))

    def test_what_is_not_there_is_not_measured(self, tmp_path):
        page = report.page(tmp_path)
        assert page.count("cpu: not measured.") == page.count("cuda: not measured.") == 4

    @pytest.mark.parametrize("write", [by_line, functools.partial(json.dumps, indent=1)])
    def test_every_row_is_shown(self, tmp_path, write):
        """Of files as they were written before, too."""
        failed = {key: TIMED[key] for key in ("model", "shape", "dtype")}
        failed |= {"variant": "fuse", "error": "out of memory"}
        profiled = TIMED | {"profile": [{"op": "aten::mm", "calls": 1234, "milliseconds": 5.678}]}
        steps = {"machine": MACHINE, "rounds": 3, "rows": [profiled, failed]}
        (tmp_path / "steps-cuda.json").write_text(write(steps))
        page = report.page(tmp_path)
        assert "a machine" in page and "commit 1234567" in page
        assert "| vit | 8 at 32² | float32 | stock | 12.3 | 11.0 to 13.0 | 1.000 |  |" in page
        assert "| vit | 8 at 32² | float32 | fuse | out of memory |  |" in page
        assert "| vit | float32 | stock | `aten::mm` | 1,234 | 5.7 |" in page

    def test_what_is_slower_than_stock(self, page):
        row = {"op": "gelu", "setting": "", "dtype": "float32", "shape": [2, 3], "milliseconds": 1.0}
        row |= {"gigabytes_per_second": 2.0, "fraction_of_copy": 0.5}
        rows = [
            row | {"pass": which, "variant": variant, "time_over_stock": ratio if variant == "fused" else 1.0}
            for which, ratio in (("forward", 1.04), ("backward", 1.06), ("double_backward", 0.2))
            for variant in ("stock", "fused")
        ]
        text = page("kernels-cpu", machine=MACHINE, rounds=3, rows=rows)
        assert "| gelu | 2x3 | 1.04 | 1.06 | 0.20 | 1.0 | 1.0 | 2.0 | 0.50 |" in text
        assert "than a twentieth: gelu, backward 1.06." in text

    @pytest.mark.parametrize("compiled", [True, False])
    def test_traffic(self, page, compiled):
        count = {"model": "resnet50", "batch": 3, "bn": "eval", "act": None}
        text = page("traffic-resnet50", **count, rows=MOVED if compiled else MOVED[:2])
        if compiled:
            assert "| 3 | 8 | 2 | 4 | 0.250 | 0.500 | 20 | 5 | 10 | 0.250 | 0.500 |" in text
            assert "| `aten::mm` | 8.0 | 2.0 | 4.0 |" in text
        else:
            assert text.count("not counted") == 4 and "| `aten::mm` | 8.0 | 2.0 |" in text

    def test_memory(self, page):
        count = {"model": "resnet50", "batch": 3, "bn": "eval", "act": None}
        text = page("memory-resnet50", **count, rows=ALIVE)
        model = "| resnet50, BatchNorm in eval mode | 3 |"
        assert f"{model} stock | 4.00 | 1.000 | 0.50 | 1.00 | 0.00 | 2.50 | 1.00 | 2.00 |" in text
        assert f"{model} fuse | 2.00 | 0.500 | 0.50 | 1.00 | 0.00 | 0.50 | 1.00 | 2.00 |" in text
        assert f"{model} natural | 1.50 | 0.375 |" in text
        assert f"{model} fuse | 2.00 | not counted |" in page("memory-resnet50", **count, rows=ALIVE[2:])

    def test_studies(self, page):
        watched = [{"eval_apgd_accuracy": 0.5}]
        row = {"clean": [0.9, 0.8], "robust": [0.5, 0.3], "histories": [watched, watched]}
        rows = {
            "natural": row | {"step_seconds": 0.01, "collapsed": [None, None]},
            "FGSM": row | {"step_seconds": 0.02, "collapsed": [3, None]},
        }
        study = {
            "study": "Long runs",
            "reference": "natural",
            "attack": "fgsm",
            "attacked": 7,
            "config": {"model": "m", "data": None, "epochs": 2, "epsilon": 0.1},
            "conditions": "A machine.",
        }
        text = page("study-stability", **study, rows=rows)
        assert "fgsm at ε = 0.1 on 7 held-out images; 2 seeds a row. A machine." in text
        shares = "85.0% (80.0% to 90.0%) | 40.0% (30.0% to 50.0%)"
        assert f"| FGSM | {shares} | 20.0 | 2.00 | 3, no |" in text
        del rows["natural"]
        assert "| 20.0 | not measured |" in page("study-stability", **study, rows=rows)
        # Where nothing was timed, what was counted.
        counted = {"clean": [0.9], "robust": [0.5], "histories": [[{}]]}
        rows = {"natural": counted | {"step_flops": 3}, "PGD-3": counted | {"step_flops": 9}}
        text = page("study-objectives", **study, rows=rows)
        assert "| PGD-3 | 90.0% | 50.0% | 3.00 |" in text and "1 seed a row" in text
        assert "step, ms" not in text.partition("### Long runs, on digits")[2].partition("###")[0]
        config = study["config"] | {"data": "cifar10", "precision": "bfloat16", "gn_weight": 2.4}
        timed = counted | {"step_seconds": 0.01, "training_seconds": [59.6], "gradient_masking": [0.5]}
        study |= {"study": "Clock", "config": config, "against_clock": True}
        text = page("study-speed", **study, rows={"natural": timed})
        assert (
            "### Clock, on CIFAR-10 (JPEG copy), gn_weight 2.4" in text
            and "m, 2 epochs in bfloat16; fgsm" in text
        )
        assert "| natural | 90.0% | 50.0% | 10.0 | 1.00 | 60 | 50.0% |" in text

    def test_comparison(self):
        """Ratios of the rounds; of milliseconds where stock did not run."""
        refused = {key: TIMED[key] for key in ("model", "dtype")} | {"error": "refused"}
        rows = [
            timed("stock", 1, peak_memory_bytes=200),
            timed("fuse", 0.5, peak_memory_bytes=100),
            timed("compiled", 0.75),
            refused | {"variant": "compiled_func"},
            timed("pgd3", 2.0, milliseconds=9.0),
            timed("natural", 0.25),
        ]
        line = report.comparison(rows).splitlines()[-1]
        assert line == "| vit | float32 | 2.00 | 1.50 | 0.50 | 0.50 | 0.25 | 4.00 | 2.00 |"
        missing = report.NOT_MEASURED
        alone = [timed("fuse", 0.25, time_over_stock=None), timed("pgd3", 1, time_over_stock=None)]
        line = report.comparison([refused | {"variant": "stock"}, *alone]).splitlines()[-1]
        assert f"| {missing} | 0.25 | {missing} | {missing} |" in line


class TestGpu:
    """`benchmarks.gpu`, on a CPU."""

    @pytest.fixture
    def a_row(self, tmp_path):
        """Makes a row of tests, of which the text is given."""

        def a_row(text, name="a row", seconds=60.0, **facts):
            file = tmp_path / f"test_{len(list(tmp_path.iterdir()))}.py"
            file.write_text(
                f"import os, pytest, signal, time\n\n\ndef test_it(record_property):\n    {text}\n"
            )
            # Without plugins, to start sooner.
            alone = (("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"),)
            return gpu.Row(name, seconds, (str(file),), environment=alone, **facts)

        return a_row

    def with_a_child(self, file):
        """A test that waits for a process, whose number it writes."""
        move = f"os.rename('{file}.new', '{file}')"
        write = f"open('{file}.new', 'w').write(str(child.pid)); {move}"
        return f"import subprocess; child = subprocess.Popen(['sleep', '60']); {write}; child.wait()"

    def ends(self, file):
        """Whether that process does, soon."""
        stat = Path(f"/proc/{file.read_text()}/stat")
        for _ in range(100):
            # Z: it ended, and nobody asked how.
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            time.sleep(0.1)
        return False

    @pytest.mark.parametrize(
        ("text", "outcome", "details"),
        [
            ("record_property('float32', 'fused 1e-6')", "passed", "float32: fused 1e-6"),
            ("pass", "passed", "1 passed"),
            ("assert 1 == 2", "failed", "test_it: assert 1 == 2"),
            ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "no results, signal 11"),
            ("pytest.skip('needs a GPU')", "not run", "needs a GPU"),
            ("pass\n\n\ntest_it.__test__ = False", "failed", "there is no such test"),
        ],
    )
    def test_outcomes(self, a_row, text, outcome, details):
        found = gpu.Runner(60, 1)(a_row(text))
        assert (found["row"], found["outcome"], found["details"]) == ("a row", outcome, details)
        assert found["seconds"] > 0 and ("printed" in found) == (outcome == "failed")

    def test_time_limits(self, tmp_path, a_row):
        """A row that hangs is ended with what it started; one that the time of all cut off has not failed."""
        child = tmp_path / "child"
        found = gpu.Runner(60, 1)(a_row(self.with_a_child(child), seconds=4.0))
        assert (found["outcome"], found["details"]) == ("failed", "not done in 4 s")
        assert not child.exists() or self.ends(child)
        runner = gpu.Runner(1.5, 1)
        found = [runner(a_row("time.sleep(60)")) for _ in range(2)]
        assert [row["outcome"] for row in found] == ["not run"] * 2
        assert [row["details"] for row in found] == ["not done within 1.5 s of all", "not begun within 1.5 s"]

    @pytest.mark.parametrize(
        ("printed", "status", "outcome", "details"),
        [
            ("ERROR SUMMARY: 0 errors", None, "passed", "1 passed"),
            ("ERROR SUMMARY: 3 errors", 86, "failed", "sanitizer: 3 errors, exit status 86"),
            ("", None, "failed", "sanitizer: no summary of errors, exit status 0"),
            ("Error: Device not supported.", 1, "not run", "Device not supported."),
            (None, None, "not run", "there is no sanitizer on PATH"),
        ],
    )
    def test_sanitizer(self, monkeypatch, tmp_path, a_row, printed, status, outcome, details):
        """What it says of the test that it runs; it is no pass where it is not there."""
        if printed is not None:
            tool = tmp_path / "bin" / "sanitizer"
            tool.parent.mkdir()
            tool.write_text(
                f'#!/bin/sh\nshift\n"$@"\nstatus=$?\necho "{printed}"\nexit {status or "$status"}\n'
            )
            tool.chmod(0o755)
            monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
        found = gpu.Runner(60, 1)(a_row("pass", tool=("sanitizer", "--option")))
        assert (found["outcome"], found["details"]) == (outcome, details)

    def test_rows_and_their_file(self, monkeypatch, tmp_path, a_row, capsys):
        """The file holds each row as soon as it is done, in the order of importance."""
        rows = [
            a_row("time.sleep(2)", "slow"),
            a_row("assert False", "broken"),
            a_row("pytest.skip('no GPU')", "skipped"),
        ]
        monkeypatch.setattr(gpu, "check_rows", lambda device: rows)
        file, written = tmp_path / "out" / "check.json", []

        def write(path, **contents):
            measure.write_json(path, **contents)
            written.append([row["row"] for row in json.loads(path.read_text())["rows"]])

        monkeypatch.setattr(gpu, "write_json", write)
        options = ["check", "--device", "cpu", "--json", str(file), "--jobs", "2"]
        assert gpu.main(options) == 1
        assert [len(names) for names in written] == [1, 2, 3] and written[-1] == ["slow", "broken", "skipped"]
        contents = json.loads(file.read_text())
        assert contents["machine"].keys() >= COMMITTED["machine"].keys() and contents["seconds"] == 240
        assert [row["outcome"] for row in contents["rows"]] == ["passed", "failed", "not run"]
        assert "1 passed, 1 failed, 1 not run" in capsys.readouterr().out
        assert gpu.main([*options, "--only", "s[lk]"]) == 0
        with pytest.raises(SystemExit) as exit:
            gpu.main([*options, "--only", "nothing"])
        assert exit.value.code == 2

    def test_a_run_that_is_ended_ends_its_rows(self, monkeypatch, tmp_path, a_row):
        """And keeps those that were done."""
        child = tmp_path / "child"
        rows = [a_row("pass", "done"), a_row(self.with_a_child(child), "endless")]
        monkeypatch.setattr(gpu, "check_rows", lambda device: rows)
        file = tmp_path / "check.json"

        def end_it():
            while not child.exists():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_it, daemon=True).start()
        with pytest.raises(SystemExit) as exit:
            gpu.main(["check", "--device", "cpu", "--json", str(file), "--jobs", "1"])
        assert exit.value.code == 128 + signal.SIGTERM
        assert [row["row"] for row in json.loads(file.read_text())["rows"]] == ["done"]
        assert self.ends(child)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_rows_are_there(self, device):
        """Every test that a row names, and every option of a benchmark."""
        rows = gpu.check_rows(device)
        assert len({row.name for row in rows}) == len(rows)
        named = {row.arguments[0].removeprefix("tests/") for row in rows if "::" in row.arguments[0]}
        collected = []
        plugin = SimpleNamespace(pytest_collection_finish=lambda session: collected.extend(session.items))
        options = ["--collect-only", "--run-slow", "-q", "-p", "no:cacheprovider"]
        assert pytest.main([*options, str(ROOT / "tests" / "test_gpu.py")], plugins=[plugin]) == 0
        assert named == {f"test_gpu.py::{item.name}" for item in collected if device in item.name}
        for row in rows:
            assert (ROOT / row.arguments[0].partition("::")[0]).exists()
        programs = {"benchmarks.steps": steps.options, "benchmarks.kernels": kernels.options}
        for row in gpu.bench_rows(device, 3):
            program, *options = row.arguments
            args = programs[program]().parse_args([*options, "--time-limit", "7"])
            assert args.time_limit == 7 and device in args.json.stem
            # Those of a stand-in are no results.
            assert (args.json.parent == report.RESULTS) == (device == "cuda")

    @pytest.mark.slow
    def test_what_bench_runs(self, monkeypatch, tmp_path):
        """Each of its rows measures something; compiled steps run by ATen: to generate code takes minutes."""
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options))
        monkeypatch.setattr(gpu, "folder", lambda device: tmp_path)
        for row in gpu.bench_rows("cpu", 1):
            program = {"benchmarks.steps": steps, "benchmarks.kernels": kernels}[row.arguments[0]]
            program.main([*row.arguments[1:], "--time-limit", "600"])
        written = {file.stem: json.loads(file.read_text())["rows"] for file in tmp_path.iterdir()}
        assert written.keys() == {"steps-cpu", "kernels-cpu", "steps-cpu-float32", "rivals-cpu"}
        variants = {name: {row["variant"] for row in rows} for name, rows in written.items()}
        assert variants["steps-cpu"] == {"stock", "fuse", "pgd3", "natural"} == variants["steps-cpu-float32"]
        assert variants["kernels-cpu"] == {"stock", "fused"}
        assert variants["rivals-cpu"] == {"stock", "fuse", "compiled"}
        done = [row for rows in written.values() for row in rows if row["variant"] != "compiled"]
        assert all(row["milliseconds"] > 0 for row in done)
