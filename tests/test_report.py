"""Charts and pages: where a point is drawn, and what a page asks for."""

import math
import re

import pytest
import torch

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from gradnorm_kernels.training.report import _ticks, chart, charts, duration, gradient_grid, page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 0.1, [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
        (-0.3, 1, [-0.5, 0, 0.5, 1]),
        (3, 3, [3, 3.2, 3.4, 3.6, 3.8, 4]),
    ],
)
def test_ticks(low, high, ticks):
    assert _ticks(low, high) == pytest.approx(ticks)


def test_chart_draws_points_to_scale():
    points = [(0.0, 0.0), (1.0, 50.0), (2.0, 100.0), (1.5, math.nan)]
    drawn = chart({"a <b>": points}, xlabel="x", ylabel="y", top=100)
    where = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (left, lower), middle, (right, upper) = where
    assert middle == ((left + right) / 2, (lower + upper) / 2) and left < right and upper < lower
    assert "nan" not in drawn and "<b>:" not in drawn and "a &lt;b&gt;" in drawn


def test_empty_and_constant_series():
    for points in ([], [(1.0, 0.0)], [(1.0, 2.0), (1.0, 2.0)], [(0.0, -1.0)]):
        assert "nan" not in chart({"a": points}, xlabel="x", ylabel="y")


def test_dashed_and_named_lines():
    drawn = chart({"a": [(0, 0), (1, 1)], "b": [(0, 1), (1, 0)]}, xlabel="x", ylabel="y", dashed=["b"])
    assert drawn.count("stroke-dasharray") == 1 and drawn.count("&#9632;") == 2
    drawn = chart({"a": [(0, 0), (1, 1)]}, xlabel="x", ylabel="y", lines=False)
    assert 'fill="none"' not in drawn and drawn.count("<circle") == 2


def test_page_needs_nothing_else():
    grid = gradient_grid({"image": torch.rand(2, 3, 4, 4)}, {"a, b": torch.randn(2, 3, 4, 4)})
    figures = charts([chart({"a": [(0, 1), (1, 2)]}, xlabel="x", ylabel="y")]) + grid
    html = page("T & T", [("x", "<y>")], "notes", [("Heading", "text", figures)])
    assert html.count("data:image/png") == 4 and "T &amp; T" in html and "<td>&lt;y&gt;</td>" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "http" not in html and "<script" not in html


def test_duration():
    seconds = (0.4, 59, 61, 3600, 90061)
    assert [*map(duration, seconds)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]
