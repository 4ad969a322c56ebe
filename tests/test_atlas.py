"""benchmarks/atlas.py: that it tells right from wrong, and ops that have to stay right under the switch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.autograd.function import once_differentiable

# What torch.testing._internal imports, and torch does not require.
pytest.importorskip("numpy")
pytest.importorskip("expecttest")
pytest.importorskip("timm", reason="timm is not installed")
ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))
from benchmarks import atlas  # noqa: E402
from benchmarks.opinfo import OPS  # noqa: E402


class Cube(torch.autograd.Function):
    """x³, with a first derivative that is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3


class WrongSecond(Cube):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 3 * grad_output * x * x.detach()


class SlightlyWrongSecond(Cube):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 3 * grad_output * x * (0.999 * x + 0.001 * x.detach())


class WrongSecondByGradOutput(Cube):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 1.5 * (grad_output + grad_output.detach()) * x**2


class NoGraph(Cube):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 3 * grad_output * x.detach() ** 2


class OnceDifferentiable(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 3 * grad_output * x**2


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError("no derivative\nof this")


class RaisesSecond(Cube):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return Refuses.apply(3 * grad_output * x**2)


class NotFiniteSecond(Cube):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        # The derivative of the root of 0 is infinite.
        return 3 * grad_output * x**2 + (x - x.detach()).square().sqrt()


class WrongThird(torch.autograd.Function):
    """x⁴."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**4

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 4 * grad_output * WrongSecond.apply(x)


class WrongFirst(Cube):
    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 2 * grad_output * x**2


# Of each function the verdicts on three orders.
JUDGED = [
    ("right right right", torch.sin),
    ("right right right", torch.relu),
    # Nothing is left to differentiate.
    ("right right right", torch.neg),
    # Draws numbers.
    ("right right right", torch.nn.functional.dropout),
    ("wrong wrong wrong", WrongFirst.apply),
    ("right wrong wrong", WrongSecond.apply),
    ("right wrong wrong", SlightlyWrongSecond.apply),
    ("right wrong wrong", WrongSecondByGradOutput.apply),
    ("right wrong wrong", NotFiniteSecond.apply),
    ("right right wrong", WrongThird.apply),
    ("right cut cut", NoGraph.apply),
    ("right cut cut", OnceDifferentiable.apply),
    ("cut cut cut", torch.detach),
    ("right raises raises", RaisesSecond.apply),
]


@pytest.mark.parametrize(("verdicts", "function"), JUDGED)
def test_verdicts(verdicts, function):
    x = torch.randn(3, 4, dtype=torch.float64)
    assert " ".join(verdict.kind for verdict in atlas.judge(function, [x])) == verdicts


def test_reasons():
    x = torch.randn(3, 4, dtype=torch.float64)

    def reason(function):
        return atlas.judge(lambda a, b: (a.sin(), function(b)), [x, x + 1])[1].reason

    assert reason(RaisesSecond.apply) == "no derivative"
    assert reason(WrongSecond.apply) == "gradient of input 2 50% off"
    assert reason(WrongSecondByGradOutput.apply) == "gradient of grad_output 50% off"
    assert reason(OnceDifferentiable.apply) == "gradient of input 2 missing"
    assert reason(NotFiniteSecond.apply) == "gradient of input 2 not finite"


def test_kinks_are_unclear():
    x = torch.zeros(4, dtype=torch.float64)
    verdict, *_ = atlas.judge(torch.relu, [x])
    assert verdict == atlas.Verdict("unclear", "not smooth in input")
    # The first derivative has a kink.
    verdicts = atlas.judge(lambda x: x + x.relu().square(), [x])
    assert [verdict.kind for verdict in verdicts] == ["right", "unclear", "unclear"]


def test_jumps_are_unclear():
    """Also where both sides of the jump are as steep: the gradient of the norm at 0."""
    x = torch.zeros(4, dtype=torch.float64)
    verdicts = atlas.judge(lambda x: x.norm(), [x])
    assert {verdict.kind for verdict in verdicts} <= {"right", "unclear"}


def test_rounding_is_not_taken_for_a_wrong_derivative():
    """The output is 0, and so are all derivatives, but for what rounding makes of them."""
    x = torch.randn(3, 1, dtype=torch.float64)
    kinds = {v.kind for v in atlas.judge(lambda x: 1e6 * ((x * 3) / 3 - x) + 1e3 * x, [x])}
    assert kinds <= {"right", "unclear"}


def _outcome(name):
    if name == "dies":
        os._exit(1)
    if name == "hangs":
        time.sleep(600)
    return {"op": name}


def test_processes_that_die_or_hang_leave_the_others_alone():
    start = time.monotonic()
    results = dict(atlas.in_processes(_outcome, ["dies", "a", "hangs", "b", "c"], jobs=2, limit=3))
    assert time.monotonic() - start < 60
    assert results.pop("dies") == "the process died"
    assert results.pop("hangs") == "not done in 3 s"
    assert results == {name: {"op": name} for name in "abc"}


def test_what_is_left_out_says_why():
    assert atlas.survey(OPS["item"]) == {"op": "item", "left_out": "not differentiable, by OpInfo"}
    assert atlas.survey(OPS["bitwise_not"])["left_out"] == "no float64 on the CPU"
    # By definition it has none.
    assert atlas.survey(OPS["normal"])["left_out"].startswith("first derivative other than the differences")


# The most that a double backward moves under the switch, over the least.
COVERED = {
    "nn.functional.batch_norm": 1.7,
    "nn.functional.conv_transpose2d": None,
    "nn.functional.elu": 1,
    "nn.functional.gelu": 1,
    "nn.functional.group_norm": 1.7,
    "nn.functional.hardsigmoid": 1.7,
    "nn.functional.hardswish": 1,
    "nn.functional.layer_norm": 1.1,
    "nn.functional.mish": 1,
    "nn.functional.rms_norm": 1.1,
    "nn.functional.scaled_dot_product_attention": None,
    "nn.functional.silu": 1,
    "nn.functional.softplus": 1,
    # As functions of the output, which then has a gradient of its own.
    "sigmoid": 1.7,
    "softmax": 1.7,
    "tanh": 1.7,
}


@pytest.mark.parametrize("name", COVERED)
@pytest.mark.filterwarnings("ignore")
def test_covered_ops_are_right_and_lean_under_the_switch(name):
    row = atlas.survey(OPS[name])
    assert [row["switch second"]["kind"], row["switch third"]["kind"]] == ["right", "right"]
    if COVERED[name]:
        moved = row["switch traffic"]
        assert 0 < moved["bytes"] <= COVERED[name] * moved["floor"]


@pytest.mark.slow
def test_page_is_printed_for_some_ops(tmp_path):
    path = tmp_path / "atlas.json"
    command = ["-m", "benchmarks.atlas", "--ops", "nn.functional.gelu", "item", "--json", str(path)]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "2 entries of OpInfo: 1 judged, 1 left out, 0 without a result." in run.stdout
    assert "| right | 1 | 1 | 1 | 1 |" in run.stdout
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["item", "nn.functional.gelu"]


def _row(name, kinds, **facts):
    keys = ["stock second", "switch second", "stock third", "switch third"]
    verdicts = [{"kind": kind, "reason": "a|b", "samples": 1} for kind in kinds]
    row = {"op": name, "samples": 2, "remedies": [], "stock traffic": None, "switch traffic": None}
    return row | dict(zip(keys, verdicts, strict=True)) | facts


def test_page():
    stock, switch = ({"launches": n, "bytes": 100 * n, "floor": 100} for n in (3, 1))
    rows = [
        _row("fine", ["right"] * 4, **{"stock traffic": stock, "switch traffic": switch}),
        _row("covered", ["raises", "right", "raises", "right"]),
        _row("bad", ["wrong", "wrong", "wrong", "wrong"], remedies=["another op"]),
        _row("worse", ["right", "cut", "right", "cut"]),
        {"op": "int", "left_out": "no float64"},
        {"op": "loop", "no_result": "not done in 9 s"},
    ]
    text = atlas.page({"torch": "2", "commit": "c", "python": "3", "date": "d"}, rows)
    assert "6 entries of OpInfo: 4 judged, 1 left out, 1 without a result." in text
    assert "| right | 2 | 2 | 2 | 2 |\n| wrong | 1 | 1 | 1 | 1 |\n| cut | 0 | 1 | 0 | 1 |" in text
    assert "Right in stock and not under the switch: worse." in text
    assert "| `covered` | raises 1/2 | right | raises 1/2 | right | a\\|b | the switch |" in text
    assert "| `bad` | wrong 1/2 | wrong 1/2 | wrong 1/2 | wrong 1/2 | a\\|b | another op |" in text
    assert "| `fine` | 3.0 | 3 | 1.0 | 1 |" in text
    assert "No result, not done in 9 s: 1. loop." in text and "No float64: 1. int." in text


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--ops", "sine"], "no sine"), (["--jobs", "0"], "--jobs")]
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        atlas.main(arguments)
    assert message in capsys.readouterr().err
