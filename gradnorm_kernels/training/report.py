"""What the reports of demo and studies share: text tables, HTML pages with plots inside, the conditions."""

import base64
import html
import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import __version__
from .._machine import processor_name

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows) -> str:
    """Rows of cells, heading first, as aligned text, all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def page(title: str, rows: Rows, notes: str, sections: Iterable[tuple[str, str, Figure]]) -> str:
    """A page of HTML that needs no other file: table, notes, and sections of heading, text and plot."""
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    plots = "".join(
        f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>{_image(figure)}"
        for heading, text, figure in sections
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ccc; }}
td:first-child {{ text-align: left; }}
tr:first-child {{ font-weight: bold; }}
img {{ max-width: 100%; }}
</style>
<h1>{html.escape(title)}</h1>
<table>{body}</table>
<p>{html.escape(notes)}</p>
{plots}
</html>
"""


def conditions() -> str:
    """Hardware and versions, as a sentence."""
    import pyautoattack

    device = f"{processor_name()} ({os.cpu_count()} CPUs), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    return (
        f"{device}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__},"
        f" pyautoattack {pyautoattack.__version__}, gradnorm_kernels {__version__}."
    )


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    styles: Mapping[str, str] | None = None,
    panel: tuple[Figure, int, int] | None = None,
    **axis: object,
) -> Figure:
    """Points by name as lines; ``axis`` as ``Axes.set`` takes it.

    Args:
        styles: matplotlib's format strings, by name.
        panel: figure to draw into, number of panels in it, and which of them this is (from 0).
    """
    figure, panels, which = panel or (Figure(figsize=(7, 4), layout="constrained"), 1, 0)
    axes = figure.add_subplot(1, panels, which + 1)
    for name, points in series.items():
        if points:
            axes.plot(*zip(*points, strict=True), (styles or {}).get(name, "-"), marker=".", label=name)
    axes.set(**axis)
    if which == 0:
        axes.legend(fontsize="small")
    return figure


def history_figure(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    panels: Mapping[str, str],
    styles: Mapping[str, str] | None = None,
) -> Figure:
    """What the histories' lines hold by epoch: a panel for each key of ``panels``, under its label."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for which, (key, label) in enumerate(panels.items()):
        scale = 100 if label.endswith("%") else 1
        points = {
            name: [(line["epoch"], scale * line[key]) for line in history if key in line]
            for name, history in histories.items()
        }
        panel = (figure, len(panels), which)
        curves(points, styles=styles, panel=panel, title=label, xlabel="epoch", ylim=(0, None))
    return figure


def gradient_figure(images: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Figure:
    """Images, and below them gradients, in rows by name; all (N, C, H, W).

    A row of images is drawn as it is, from 0 to 1, or up to its largest value; a gradient's channels are
    summed, each in a colour scale of its own, under its L1 norm.
    """
    rows = {**images, **gradients}
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.5 * columns, 1.6 * len(rows)), layout="constrained")
    grid: np.ndarray = figure.subplots(len(rows), columns, squeeze=False)
    for cells, (name, tensors) in zip(grid, rows.items(), strict=True):
        for axes, tensor in zip(cells, tensors.detach().float().cpu(), strict=True):
            if name in images:
                shown = tensor / max(1.0, tensor.max().item())
                axes.imshow(shown.movedim(0, 2).squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
            else:
                total = tensor.sum(0).numpy()
                largest = np.abs(total).max() or 1.0
                axes.imshow(total, cmap="RdBu", vmin=-largest, vmax=largest)
                axes.set_title(f"L1 {tensor.abs().sum():.2g}", fontsize="small")
            axes.set(xticks=[], yticks=[])
        cells[0].set_ylabel(name.replace(", ", ",\n"), fontsize="small")
    return figure


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
