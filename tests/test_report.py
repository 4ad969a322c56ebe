"""Charts and pages: where a point is drawn, and what a page asks for."""

import base64
import io
import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="training needs: pip install 'gradnorm_kernels[train]'")

from PIL import Image

from gradnorm_kernels.training.report import (
    _ticks,
    chart,
    charts,
    duration,
    gradient_grid,
    page,
    surface_grid,
)


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


def test_more_names_than_colours():
    drawn = chart({f"{i}": [(0, i), (1, i)] for i in range(11)}, xlabel="x", ylabel="y")
    assert drawn.count("stroke-dasharray") == 1 and drawn.count('fill="white"') == 2
    assert (drawn.count("&#9632;"), drawn.count("&#9633;")) == (10, 1)


def test_surfaces_are_blue_where_the_class_is_right():
    """The second dimension points upwards; the frame holds the middle half, whose largest loss is given."""
    losses, right = torch.full((1, 9, 9), 1.0), torch.ones(1, 9, 9, dtype=torch.bool)
    losses[0, 8, 0], right[0, 8, 0], losses[0, 4, 4] = 9.0, False, 0.0
    losses[0, 2, 2] = 4.0
    drawn = surface_grid(torch.rand(1, 1, 8, 8), {"a": (losses, right)})
    content = re.findall(r'base64,([^"]*)"', drawn)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
    assert shown[0, 0].tolist() == [255, 26, 26] and shown[8, 8].tolist() == [128, 128, 255]
    assert shown[4, 4].tolist() == [255, 255, 255] and "4 nats" in drawn
    framed = (shown == 89).all(2)
    assert framed.sum() == 16 and framed[2, 2:7].all() and framed[2:7, 6].all()


def test_page_needs_nothing_else():
    grid = gradient_grid({"image": torch.rand(2, 3, 4, 4)}, {"a, b": torch.randn(2, 3, 4, 4)})
    figures = charts([chart({"a": [(0, 1), (1, 2)]}, xlabel="x", ylabel="y")]) + grid
    html = page("T & T", [("x", "<y>")], "notes", [("Heading", "text", figures)])
    assert html.count("data:image/png") == 4 and "T &amp; T" in html and "<td>&lt;y&gt;</td>" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "http" not in html and "<script" not in html


def test_duration():
    seconds = (0.4, 59, 61, 3600, 90061)
    assert [*map(duration, seconds)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]
