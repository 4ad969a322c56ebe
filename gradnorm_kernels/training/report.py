"""What the reports of runs, studies and the demo share: text tables, HTML pages with figures, the conditions.

A page is one file: its charts are SVG inside it, its images PNG inside it, and it asks for nothing else.
"""

import base64
import html
import io
import math
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor

from .. import __version__
from .._machine import processor_name
from .config import TrainConfig

Rows = Sequence[Sequence[str]]
Points = Sequence[tuple[float, float]]

_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)


def text_table(rows: Rows) -> str:
    """Rows of cells, heading first, as aligned text, all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def page(title: str, rows: Rows, notes: str, sections: Iterable[tuple[str, str, str]]) -> str:
    """A page of HTML that needs no other file.

    Args:
        rows: the table's cells, heading first.
        sections: of each the heading, a text, and HTML: the figures.
    """
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    figures = "".join(
        f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{figure}"
        for heading, text, figure in sections
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }}
td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ccc; overflow-wrap: normal; }}
td:first-child {{ text-align: left; }}
.results tr:first-child {{ font-weight: bold; }}
.wide {{ overflow-x: auto; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem; }}
figure {{ margin: 0; min-width: 0; }}
svg {{ display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }}
figcaption span {{ white-space: nowrap; margin-right: .8rem; }}
.images td {{ border: 0; padding: .15rem; text-align: center; font-size: .75rem; }}
.images td:first-child {{ text-align: left; }}
.images img {{ display: block; width: 5rem; max-width: 10vw; margin: auto; image-rendering: pixelated; }}
</style>
<h1>{html.escape(title)}</h1>
<div class="wide"><table class="results">{body}</table></div>
<p>{html.escape(notes)}</p>
{figures}
</html>
"""


def duration(seconds: float) -> str:
    """In two units: 5 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    count = round(seconds)
    for larger, smaller, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if count >= size:
            return f"{count // size} {larger} {count % size // part} {smaller}"
    return f"{count} s"


def conditions() -> str:
    """Hardware and versions, as a sentence."""
    try:
        attacks = f" pyautoattack {version('pyautoattack')},"
    except PackageNotFoundError:  # trainings do without it
        attacks = ""
    device = f"{processor_name()} ({os.cpu_count()} CPUs), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    return (
        f"{device}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__},"
        f"{attacks} gradnorm_kernels {__version__}."
    )


def charts(figures: Iterable[str]) -> str:
    """Charts side by side, as many as the page is wide for."""
    return f'<div class="charts">{"".join(figures)}</div>'


def chart(
    series: Mapping[str, Points],
    *,
    xlabel: str,
    ylabel: str,
    top: float | None = None,
    bottom: float | None = 0.0,
    lines: bool = True,
    dashed: Collection[str] = (),
    left: float | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Points by name, joined by ``lines``, with a legend below; colours follow the names' order.

    After ten names colours return, with dashed lines and hollow points.

    Points that are not finite are left out.

    Args:
        top: where the vertical axis ends; without it, at the largest value.
        bottom: where the vertical axis begins, unless there are values below; with None, at the least value.
        dashed: names whose lines are dashed, so that what they cover shows.
        left: where the horizontal axis begins; without it, at the least value.
        labels: by name, what is written beside the points that are drawn.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    xs = [x for points in kept.values() for x, _ in points] or [0.0]
    ys = [y for points in kept.values() for _, y in points] or [0.0]
    x_ticks = _ticks(min(xs) if left is None else min(left, *xs), max(xs))
    y_ticks = _ticks(min(ys) if bottom is None else min(bottom, *ys), top or max(ys))
    begin, end, upper, lower = 46, 380, 30, 220

    def across(x: float) -> float:
        return begin + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (end - begin)

    def up(y: float) -> float:
        return lower - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (lower - upper)

    parts = []
    for y in y_ticks:
        parts.append(f'<path d="M{begin} {up(y):.1f}H{end}" stroke="#ddd"/>')
        parts.append(f'<text x="{begin - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in x_ticks:
        parts.append(f'<path d="M{across(x):.1f} {lower}v4" stroke="#888"/>')
        parts.append(f'<text x="{across(x):.1f}" y="{lower + 18}" text-anchor="middle">{x:.4g}</text>')
    legend = []
    for i, (name, points) in enumerate(kept.items()):
        colour, again = _COLOURS[i % len(_COLOURS)], i >= len(_COLOURS)
        where = [f"{across(x):.1f} {up(y):.1f}" for x, y in points]
        if lines and len(points) > 1:
            dashes = ' stroke-dasharray="6 4"' if again or name in dashed else ""
            path = f"M{'L'.join(where)}"
            parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
        if not lines or len(points) <= 30:
            size = 4 if lines else 6
            paint = f'fill="{"white" if again else colour}" stroke="{colour}" stroke-width="1.5"'
            for at, (x, y) in zip(where, points, strict=True):
                cx, cy = at.split()
                tip = f"<title>{html.escape(name)}: {x:.4g}, {y:.4g}</title>"
                parts.append(f'<circle cx="{cx}" cy="{cy}" r="{size}" {paint}>{tip}</circle>')
        mark = "&#9633;" if again else "&#9632;"
        for at, text in zip(where, (labels or {}).get(name, ()), strict=False):
            x_label, y_label = map(float, at.split())
            place = f'x="{x_label - 6:.1f}" y="{y_label + 14:.1f}" text-anchor="end"'
            parts.append(f'<text {place} fill="{colour}" font-size="10">{html.escape(text)}</text>')
        legend.append(f'<span><b style="color:{colour}">{mark}</b> {html.escape(name)}</span> ')
    # One line needs no name.
    caption = "".join(legend) if len(legend) > 1 else ""
    label = html.escape(f"{ylabel} against {xlabel}")
    return (
        f'<figure><svg viewBox="0 0 400 264" role="img" aria-label="{label}">{"".join(parts)}'
        f'<text x="{(begin + end) / 2}" y="{lower + 38}" text-anchor="middle">{html.escape(xlabel)}</text>'
        f'<text x="2" y="14">{html.escape(ylabel)}</text></svg><figcaption>{caption}</figcaption></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers, of which the first and last hold ``low`` and ``high`` between them."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def history_charts(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    panels: Mapping[str, str],
    dashed: Collection[str] = (),
) -> str:
    """What the histories' lines hold by epoch: a chart for each key of ``panels``, under its label."""
    return charts(
        chart(history_points(histories, key, label), xlabel="epoch", ylabel=label, dashed=dashed)
        for key, label in panels.items()
    )


def history_points(
    histories: Mapping[str, Sequence[Mapping[str, float]]], key: str, label: str
) -> dict[str, Points]:
    """(epoch, value) of the lines that have ``key``; in percent where the label says so."""
    scale = 100 if label.endswith("%") else 1
    return {
        name: [(line["epoch"], scale * line[key]) for line in history if key in line]
        for name, history in histories.items()
    }


def gradient_grid(images: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> str:
    """Images, and below them gradients, in rows by name; all (N, C, H, W).

    A row of images is drawn as it is, from 0 to 1, or up to its largest value; a gradient's channels are
    summed, each in a colour scale of its own from red (below 0) through white to blue, over its L1 norm.
    """
    rows: dict[str, list[tuple[Tensor, str]]] = {}
    for name, tensors in {**images, **gradients}.items():
        tensors = tensors.detach().float().cpu()
        if name in images:
            rows[name] = [((image / image.max().clamp_min(1)).expand(3, -1, -1), "") for image in tensors]
        else:
            rows[name] = [(_diverging(t.sum(0)), f"L1 {t.abs().sum():.2g}") for t in tensors]
    return _image_grid(rows)


def surface_grid(images: Tensor, surfaces: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Images (N, C, H, W), and below them rows by name of what :func:`~.attacks.loss_surface` found.

    White at a loss of 0, half in colour at one nat: blue where the class is right, else red. The frame is at
    half the radius; below each the largest loss within it.
    """
    rows = {"image": [(image.float().cpu().expand(3, -1, -1), "") for image in images]}
    for name, (losses, right) in surfaces.items():
        points = losses.shape[-1]
        begin, end = points // 4, points - points // 4
        rows[name] = []
        for loss, correct in zip(losses.float().cpu(), right.cpu(), strict=True):
            depth = loss / (1 + loss)
            colours = _diverging_share(torch.where(correct, depth, -depth))
            frame = torch.zeros_like(correct)
            frame[begin:end, begin:end] = True
            frame[begin + 1 : end - 1, begin + 1 : end - 1] = False
            colours = torch.where(frame, torch.full_like(colours, 0.35), colours)
            most = loss[begin:end, begin:end].max()
            rows[name].append((colours.flip(1), f"{most:.2g} nats"))
    return _image_grid(rows)


def _image_grid(rows: Mapping[str, Sequence[tuple[Tensor, str]]]) -> str:
    """By name, colours (3, H, W) with a text below."""
    lines = (
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_image(colours, name)}{html.escape(below)}</td>" for colours, below in cells)
        + "</tr>"
        for name, cells in rows.items()
    )
    return f'<div class="wide"><table class="images">{"".join(lines)}</table></div>'


def _diverging(values: Tensor) -> Tensor:
    """(H, W) as colours (3, H, W): white at 0, the largest magnitude in full red or blue."""
    return _diverging_share(values / values.abs().max().clamp_min(torch.finfo(values.dtype).tiny))


def _diverging_share(share: Tensor) -> Tensor:
    """(H, W) from -1 to 1 as colours (3, H, W): red, white, blue."""
    red, green, blue = 1 - share.clamp_min(0), 1 - share.abs(), 1 + share.clamp_max(0)
    return torch.stack([red, green, blue])


def _image(colours: Tensor, name: str) -> str:
    """(3, H, W) in [0, 1], to be scaled up without blurring."""
    pixels = (colours.clamp(0, 1) * 255).round().byte().movedim(0, 2).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{content}">'


# What a run's history may hold, in the order of its report, under the chart's label.
_RUN_PANELS = {
    "loss": "loss in training",
    "cross_entropy": "cross-entropy in training, nats",
    "gradient_norm": "epsilon x gradient norm in training, nats",
    "edge": "edge loss in training",
    "train_accuracy": "accuracy in training, %",
    "eval_accuracy": "accuracy held out, %",
    "eval_cross_entropy": "cross-entropy held out, nats",
    "eval_apgd_accuracy": "accuracy under APGD-CE, %",
    "eval_gradient_norm": "epsilon x gradient norm held out, nats",
    "parameter_gradient_norm": "norm of the parameters' gradient before clipping",
    "lr": "learning rate",
}


def run_report(config: TrainConfig, history: Sequence[Mapping[str, Any]]) -> str:
    """The page of one run: its last epoch, its numbers by epoch, the options that are not defaults."""
    last = history[-1]
    panels = {key: label for key, label in _RUN_PANELS.items() if any(key in line for line in history)}
    rows = [("last epoch", str(last["epoch"]))]
    rows += [(label, f"{(100 if label.endswith('%') else 1) * last[key]:.4g}")
             for key, label in panels.items() if key in last]  # fmt: skip
    rows.append(("training without evaluation", duration(sum(line["seconds"] for line in history))))
    changed = [
        f"{item.name}={getattr(config, item.name)}"
        for item in fields(config)
        if getattr(config, item.name) != item.default
    ]
    notes = f"Options: {', '.join(changed) or 'the defaults'}. {conditions()}"
    title = f"{config.model}, {config.objective.replace('_', ' ')}"
    by_epoch = "Means over an epoch's images in training; held out, of the averaged weights at its end."
    sections = [("By epoch", by_epoch, history_charts({"run": history}, panels))]
    return page(title, rows, notes, sections)
