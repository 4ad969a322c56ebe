"""benchmarks/families.py: whose the bytes of the last backward are; and that little is left of some."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")
ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))
from benchmarks import families  # noqa: E402
from benchmarks.traffic import PHASES  # noqa: E402


class Cubes(nn.Module):
    def forward(self, x):
        return x**3


def test_bytes_are_the_modules_whose_derivative_they_are():
    model = nn.Sequential(nn.Linear(4, 4), Cubes(), nn.Linear(4, 1)).to("meta")
    x = torch.empty(8, 4, device="meta", requires_grad=True)
    traffic = families.Attributed({module: type(module).__name__ for module in model.modules()})
    with traffic:
        output = model(x)
        traffic.begin(families.ELSEWHERE)
        traffic.follow([output])
        traffic.phase = PHASES[1]
        (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        traffic.begin(families.ELSEWHERE)
        traffic.phase = PHASES[2]
        gradient.exp().sum().backward()
    assert traffic.shares.total() == sum(
        size for (phase, _), size in traffic.bytes.items() if phase == PHASES[2]
    )
    assert traffic.shares["products"] > 0 and traffic.shares["ours"] == 0
    assert sum(traffic.rest.values()) == traffic.shares["rest"]
    by_module = {module for module, op in traffic.rest if op == "pow"}
    assert by_module == {"Cubes"}
    assert ("elsewhere", "mul") in traffic.rest  # of exp


# The most that the last backward moves, over stock.
CEILINGS = {"convnext_atto": 0.45, "eva02_tiny_patch14_224": 0.36, "vit_tiny_patch16_224": 0.37}


@pytest.mark.parametrize("name", CEILINGS)
def test_last_backwards_of_families_stay_below_their_ceilings(name):
    row = families.survey(name)
    assert row["fuse"] <= CEILINGS[name] * families.count(name, fused=False).shares.total()
    assert sum(left["bytes"] for left in row["rest"]) == row["shares"]["rest"]
    assert sum(row["shares"].values()) == row["fuse"]


def test_every_family_has_a_model():
    import timm

    names = families.all_models()
    of = {families._family(timm.model_entrypoint(name)) for name in names}
    assert of == set(timm.list_modules())
    assert set(families.MODELS) <= set(names)


def test_page():
    machine = {"timm": "1", "torch": "2", "commit": "c", "python": "3", "date": "d"}
    rest = [{"module": "GELU", "op": "add", "bytes": 3}, {"module": "resnet.Block", "op": "mul", "bytes": 1}]
    shares = {"ours": 4, "products": 2, "rest": 4}
    rows = [
        {"model": "a", "family": "f", "fuse": 10, "shares": shares, "rest": rest},
        {"model": "b", "family": "f", "fuse": 10, "shares": shares, "rest": rest[:1]},
        {"model": "c", "family": "g", "raises": "no derivative"},
        {"model": "d", "no_result": "not done in 9 s"},
    ]
    text = families.page(machine, rows)
    assert "timm 1, torch 2, commit c, python 3, d." in text and "4 models of 2 families." in text
    assert "| GELU, `add` | 30.00% | 2 |\n| resnet.Block, `mul` | 5.00% | 1 |" in text
    assert "| f | a | 0.00 | 40% | 20% | 40% | GELU `add` 30%, resnet.Block `mul` 10% |" in text
    assert "| c | no derivative |\n| d | not done in 9 s |" in text


def test_bad_options_are_named(capsys):
    with pytest.raises(SystemExit):
        families.main(["--models", "resnet7"])
    assert "there is no resnet7" in capsys.readouterr().err
