"""Writes docs/results.md from the JSON files in benchmarks/results: its numbers were measured or counted.

    python -m benchmarks.report [--check] [--summary]

The page is a function of those files alone, and so are the tables of README.md between ``<!-- NAME -->`` and
``<!-- /NAME -->``. ``--check`` writes nothing and fails where either on disk differs.
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
DEVICES = ("cpu", "cuda")
NOT_MEASURED = "not measured"
NOT_COUNTED = "not counted"

Rows = Sequence[Mapping[str, Any]]


def page(results: Path = RESULTS) -> str:
    """The page's text."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks.report` from the JSON files in `benchmarks/results/`, which hold"
        " the commands, spreads and commits as well. Times are medians of rounds in which the variants take"
        " turns in one process; ratios to stock are medians of the rounds' ratios, and other ratios quotients"
        " of these.",
    ]
    for title, section in SECTIONS.items():
        parts += [f"## {title}", *section(results)]
    return "\n\n".join(parts) + "\n"


def steps(results: Path) -> Iterable[str]:
    yield (
        "Forward, input gradient and backward of 0.8 CE + 1.2 ε ‖∂CE/∂x‖₁ (`natural`: of CE; `pgd3`: of CE"
        " after PGD-3); the gradient is compared with stock's before it is timed. The first step is where a"
        " compiler works. The floor is what the ops of the fused step would take at the ceilings of the"
        " machine, measured in the same run; TFLOP/s are those of stock's matrix products and convolutions."
    )
    yield from _steps(results, "steps")


def rivals(results: Path) -> Iterable[str]:
    yield (
        "Likewise, of the whole step compiled by `torch.compile`: `compiled` with `.backward()` in the graph,"
        " `compiled_func` by `torch.func.grad`, `fuse_compiled` the fused model; `forward_over_reverse` and"
        " `finite_difference`, the latter not exact, are other engines of the objective. A cell that says why"
        " has no time."
    )
    yield from _steps(results, "rivals")


def _steps(results: Path, name: str) -> Iterable[str]:
    for device, measured in _by_device(results, name):
        if measured is None:
            yield f"{device}: {NOT_MEASURED}."
            continue
        yield _conditions(measured)
        if limits := measured.get("limits"):
            rates = ", ".join(
                f"{rate / 1e12:.3g} TFLOP/s in {kind}" for kind, rate in limits["flops_per_second"].items()
            )
            yield (
                f"Ceilings: a copy {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s,"
                f" a matrix product {rates}."
            )
        rows = measured["rows"]
        yield _table(
            [
                "model",
                "batch",
                "dtype",
                "variant",
                "ms",
                "range",
                "/ stock",
                "gradient off stock's",
                "of the floor",
                "TFLOP/s",
                "images/s",
                "first step, s",
                "peak, GiB",
            ],
            [
                [
                    row["model"],
                    _images(row),
                    row["dtype"],
                    row["variant"],
                    *_time(row),
                    _number(row.get("time_over_stock"), ".3f"),
                    _number(row.get("gradient_difference"), ".1e"),
                    _number(row.get("fraction_of_floor"), ".2f"),
                    _number(row.get("teraflops_per_second"), ".3g"),
                    _number(row.get("images_per_second"), ".3g"),
                    _number(row.get("first_step_seconds"), ".1f"),
                    _number(row.get("peak_memory_bytes", math.nan) / 2**30, ".2f"),
                ]
                for row in rows
            ],
        )
        yield comparison(rows)
        bars = [
            (f"{row['model']} {row['dtype']} {row['variant']}", row.get("time_over_stock") or math.nan)
            for row in rows
        ]
        yield _bars("step time, stock = 1", [bar for bar in bars if not bar[0].endswith("stock")], "")
        bars = [
            (label, row.get("peak_memory_bytes", math.nan) / 2**30)
            for (label, _), row in zip(bars, rows, strict=True)
        ]
        yield _bars("peak memory, GiB", bars, " GiB")
        yield from _relative_costs(rows)
        yield from _profiles(rows)


def _cases(rows: Rows) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """The rows by model and precision, and by variant."""
    cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        cases[row["model"], row["dtype"]][row["variant"]] = row
    return cases


def _ratio(case: Mapping[str, Mapping[str, Any]], a: str, b: str, of: str = "") -> float:
    # Round by round, unless stock did not run.
    of = of or ("milliseconds" if "error" in case.get("stock", {}) else "time_over_stock")
    found = [case.get(variant, {}).get(of) for variant in (a, b)]
    return found[0] / found[1] if None not in found else math.nan


def _profiles(rows: Rows) -> Iterable[str]:
    profiled = [row for row in rows if "profile" in row and row["variant"] in ("stock", "fuse")]
    if profiled:
        yield "Where the time of one step goes, as PyTorch's profiler has it:"
        yield _table(
            ["model", "dtype", "variant", "op", "calls", "ms"],
            [
                [
                    *(row[key] for key in ("model", "dtype", "variant")),
                    f"`{op['op']}`",
                    f"{op['calls']:,}",
                    f"{op['milliseconds']:.1f}",
                ]
                for row in profiled
                for op in row["profile"][:8]
            ],
        )


def _relative_costs(rows: Rows) -> Iterable[str]:
    for rival, name in (("pgd3", "PGD-3 adversarial training"), ("natural", "natural training")):
        bars = [
            (f"{' '.join(names)} {variant}", _ratio(case, variant, rival))
            for names, case in _cases(rows).items()
            for variant in ("stock", "fuse")
        ]
        yield _bars(f"gradient norm's step time, that of {name} = 1", bars, "")


def comparison(rows: Rows) -> str:
    """What the variants of each model and precision say of each other."""

    def ratio(case: Mapping[str, Mapping[str, Any]], a: str, b: str, of: str = "") -> str:
        return _number(_ratio(case, a, b, of), ".2f", NOT_MEASURED)

    def best_compiled(case: Mapping[str, Mapping[str, Any]]) -> str:
        times = {name: case.get(name, {}).get("milliseconds", math.inf) for name in _COMPILED}
        return min(times, key=lambda name: times[name])

    return _table(
        [
            "model",
            "dtype",
            "stock / fused",
            "best compiled stock / fused",
            "peak memory, fused / stock",
            "stock / PGD-3",
            "fused / PGD-3",
            "stock / natural",
            "fused / natural",
        ],
        [
            [
                *names,
                ratio(case, "stock", "fuse"),
                ratio(case, best_compiled(case), "fuse"),
                ratio(case, "fuse", "stock", "peak_memory_bytes"),
                *(ratio(case, a, b) for b in ("pgd3", "natural") for a in ("stock", "fuse")),
            ]
            for names, case in _cases(rows).items()
        ],
    )


_COMPILED = ("compiled", "compiled_func")


def kernels(results: Path) -> Iterable[str]:
    for device, measured in _by_device(results, "kernels"):
        if measured is None:
            yield f"{device}: {NOT_MEASURED}."
            continue
        yield _conditions(measured)
        cases = _passes(measured["rows"])
        bars = [
            (f"{name} {shape}", passes["double_backward", "fused"]["fraction_of_copy"])
            for (dtype, name, shape), passes in cases.items()
            if dtype == "float32"
        ]
        yield _bars("double backward, fused, float32: GB/s over those of a copy", bars, "")
        for dtype in dict.fromkeys(key[0] for key in cases):
            yield f"### {dtype}, {device}"
            yield _table(
                [
                    "op",
                    "input",
                    "forward, fused / stock",
                    "backward",
                    "double backward",
                    "stock, ms",
                    "fused, ms",
                    "fused, GB/s",
                    "of a copy's",
                ],
                [
                    [name, shape, *_case(passes)]
                    for (kind, name, shape), passes in cases.items()
                    if kind == dtype
                ],
            )


def _passes(rows: Rows) -> dict[tuple[str, str, str], dict[tuple[str, str], Mapping[str, Any]]]:
    """The rows by dtype, op and shape, and by pass and variant."""
    cases: dict[tuple[str, str, str], dict[tuple[str, str], Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        name = f"{row['op']} {row['setting']}".strip()
        key = (row["dtype"], name, "x".join(map(str, row["shape"])))
        cases[key][row["pass"], row["variant"]] = row
    return cases


def _case(passes: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    stock, fused = (passes["double_backward", variant] for variant in ("stock", "fused"))
    return [
        *(
            _number(passes[which, "fused"]["time_over_stock"], ".2f")
            for which in ("forward", "backward", "double_backward")
        ),
        _number(stock["milliseconds"], ".1f"),
        _number(fused["milliseconds"], ".1f"),
        _number(fused["gigabytes_per_second"], ".1f"),
        _number(fused["fraction_of_copy"], ".2f"),
    ]


def traffic(results: Path) -> Iterable[str]:
    yield (
        "Counted on meta tensors, not measured: every op that is not a view reads its inputs and writes its"
        " outputs; kernels of several passes are charged for each. One step, fused by `fuse(model)`."
        " `compiled` is stock's whole step in Inductor's own count of what its kernels read and write, fused"
        " as for a CPU: a lower bound, since it charges every kernel once for a tensor."
    )
    counted = [json.loads(path.read_text()) for path in sorted(results.glob("traffic-*.json"))]
    summary, bars = [], []
    for count in counted:
        cells = [_model(count), f"{count['batch']}"]
        totals = {variant: _totals(count, variant) for variant in _TRAFFIC}
        for what, scale, form in (("bytes", 1e9, ".0f"), ("launches", 1, ",.0f")):
            stock, fused, compiled = (total.get(what, math.nan) for total in totals.values())
            cells += [
                *(_number(n / scale, form, NOT_COUNTED) for n in (stock, fused, compiled)),
                *(_number(n / stock, ".3f", NOT_COUNTED) for n in (fused, compiled)),
            ]
        summary.append(cells)
        bars += [
            (f"{cells[0]} {name}", totals[variant].get("bytes", math.nan) / 1e9)
            for variant, name in _TRAFFIC.items()
        ]
    yield _table(
        [
            "model", "batch", "stock, GB", "fused, GB", "compiled, GB", "fused / stock", "compiled / stock",
            "stock, launches", "fused", "compiled", "fused / stock", "compiled / stock",
        ],
        summary,
    )  # fmt: skip
    yield _bars("memory traffic of one step, GB", bars, " GB")
    for count in counted:
        yield f"### {_model(count)}, by op"
        variants = [variant for variant in _TRAFFIC if _totals(count, variant)]
        moved: dict[str, Counter[str]] = defaultdict(Counter)
        for row in count["rows"]:
            moved[row["op"]][row["variant"]] += row["bytes"]
        largest = sorted(moved.items(), key=lambda item: (-max(item[1].values()), item[0]))[:12]
        yield _table(
            ["op", *(f"{name}, GB" for variant, name in _TRAFFIC.items() if variant in variants)],
            [[f"`{op}`", *(f"{of[variant] / 1e9:.1f}" for variant in variants)] for op, of in largest],
        )


# Variants, and what they are called.
_TRAFFIC = {"stock": "stock", "fuse": "fused", "compiled": "compiled"}


def _totals(count: Mapping[str, Any], variant: str) -> dict[str, int]:
    """Bytes and launches of a variant; nothing where it was not counted."""
    rows = [row for row in count["rows"] if row["variant"] == variant]
    return {what: sum(row[what] for row in rows) for what in ("bytes", "launches") if rows}


def penalties(results: Path) -> Iterable[str]:
    yield "Code that knows nothing of this library, stock and under `set_fused_double_backward(True)`."
    for device, measured in _by_device(results, "penalties"):
        if measured is None:
            yield f"{device}: {NOT_MEASURED}."
            continue
        yield _conditions(measured)
        yield _table(
            ["code", "variant", "ms", "range", "/ stock", "gradient off stock's"],
            [
                [
                    row["code"],
                    row["variant"],
                    *_time(row),
                    _number(row["time_over_stock"], ".3f"),
                    _number(row.get("gradient_difference"), ".1e"),
                ]
                for row in measured["rows"]
            ],
        )


def studies(results: Path) -> Iterable[str]:
    yield "Means over the seeds, and their range; step times of the rows taking turns in one process."
    for path in sorted(results.glob("study-*.json")):
        measured = json.loads(path.read_text())
        config = measured["config"]
        yield f"### {measured['study']}"
        yield (
            f"{config['model']} on {config['data'] or 'scikit-learn digits'}, {config['epochs']} epochs;"
            f" {measured['attack']} at ε = {config['epsilon']:.4g} on {measured['attacked']} held-out images;"
            f" {len(next(iter(measured['rows'].values()))['clean'])} seeds a row."
            f" {measured['conditions']}"
        )
        rows, reference = measured["rows"], measured["reference"]
        seconds = rows[reference]["step_seconds"] if reference in rows else math.nan
        watched = any("eval_apgd_accuracy" in line for row in rows.values() for line in row["histories"][0])
        heading = ["training", "clean", measured["attack"], "step, ms", f"step / {reference}"]
        yield _table(
            heading + ["collapsed in epoch"] * watched,
            [
                [
                    name,
                    _spread(row["clean"]),
                    _spread(row["robust"]),
                    f"{row['step_seconds'] * 1e3:.1f}",
                    _number(row["step_seconds"] / seconds, ".2f", NOT_MEASURED),
                    *[", ".join(str(epoch or "no") for epoch in row["collapsed"])] * watched,
                ]
                for name, row in rows.items()
            ],
        )


SECTIONS: dict[str, Callable[[Path], Iterable[str]]] = {
    "Whole gradient-norm steps": steps,
    "Rivals": rivals,
    "Memory traffic of a step": traffic,
    "Kernels": kernels,
    "Gradient penalties beyond vision": penalties,
    "Training studies": studies,
}


def short_steps(results: Path) -> Iterable[str]:
    for measured in _measured(results, "steps"):
        yield _conditions(measured)
        yield _table(
            [
                "model",
                "batch",
                "dtype",
                "stock, ms",
                "`fuse(model)`, ms",
                "stock / this",
                "switch, ms",
                "stock / this",
            ],
            [
                [
                    model,
                    _images(next(iter(case.values()))),
                    dtype,
                    *(_cell(case, variant, _time(case.get(variant, {}))[0]) for variant in ("stock", "fuse")),
                    _number(_ratio(case, "stock", "fuse"), ".2f"),
                    _cell(case, "switch", _time(case.get("switch", {}))[0]),
                    _number(_ratio(case, "stock", "switch"), ".2f"),
                ]
                for (model, dtype), case in _cases(measured["rows"]).items()
            ],
        )


def short_rivals(results: Path) -> Iterable[str]:
    for measured in _measured(results, "rivals"):
        yield _conditions(measured)
        variants = list(dict.fromkeys(row["variant"] for row in measured["rows"]))
        yield _table(
            ["time / stock's", *variants],
            [
                [
                    " ".join(names),
                    *(
                        _cell(case, variant, _number(case.get(variant, {}).get("time_over_stock"), ".2f"))
                        for variant in variants
                    ),
                ]
                for names, case in _cases(measured["rows"]).items()
            ],
        )


def short_costs(results: Path) -> Iterable[str]:
    for measured in _measured(results, "steps"):
        yield _conditions(measured)
        yield _table(
            ["", "stock / PGD-3", "fused / PGD-3", "stock / natural", "fused / natural"],
            [
                [
                    " ".join(names),
                    *(
                        _number(_ratio(case, ours, rival), ".2f", NOT_MEASURED)
                        for rival in ("pgd3", "natural")
                        for ours in ("stock", "fuse")
                    ),
                ]
                for names, case in _cases(measured["rows"]).items()
            ],
        )


def short_kernels(results: Path) -> Iterable[str]:
    for measured in _measured(results, "kernels"):
        yield _conditions(measured)
        yield _table(
            [
                "op",
                "input",
                "forward, fused / stock",
                "backward, fused / stock",
                "double backward: stock, ms",
                "fused, ms",
                "stock / fused",
            ],
            [
                [
                    *(name, shape, forward, backward, stock, fused),
                    f"{1 / passes['double_backward', 'fused']['time_over_stock']:.1f}",
                ]
                for (dtype, name, shape), passes in _passes(measured["rows"]).items()
                if dtype == "float32"
                for forward, backward, _, stock, fused, *_ in [_case(passes)]
            ],
        )


def slower_kernels(results: Path) -> Iterable[str]:
    """What takes more than 1.05 of stock's time."""
    for measured in _measured(results, "kernels"):
        found = defaultdict(list)
        for (dtype, name, _), passes in _passes(measured["rows"]).items():
            for (which, variant), row in passes.items():
                if variant == "fused" and row["time_over_stock"] > 1.05:
                    found[dtype].append(f"{name}, {which.replace('_', ' ')}: {row['time_over_stock']:.2f}")
        yield "\n".join(f"- {dtype}: {'; '.join(cells)}." for dtype, cells in found.items()) or "None."


def short_traffic(results: Path) -> Iterable[str]:
    yield next(table for table in traffic(results) if table.startswith("| model"))


# What README.md shows of the page.
BLOCKS: dict[str, Callable[[Path], Iterable[str]]] = {
    "studies": lambda results: list(studies(results))[1:],
    "traffic": short_traffic,
    "steps": short_steps,
    "rivals": short_rivals,
    "costs": short_costs,
    "kernels": short_kernels,
    "slower": slower_kernels,
    "penalties": lambda results: list(penalties(results))[1:],
}


def readme(text: str, results: Path = RESULTS) -> str:
    """``text`` with its blocks written anew."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"text: expected a block from {begin} to {end}")
        text = before + "\n\n".join([begin, *(list(block(results)) or [NOT_MEASURED]), end]) + after
    return text


def _measured(results: Path, name: str) -> Iterable[dict[str, Any]]:
    return [measured for _, measured in _by_device(results, name) if measured is not None]


def _cell(case: Mapping[str, Mapping[str, Any]], variant: str, text: str) -> str:
    """``text``, or why there is none."""
    return case[variant].get("error", text) if variant in case else NOT_MEASURED


def _by_device(results: Path, name: str) -> Iterable[tuple[str, dict[str, Any] | None]]:
    """A device's runs, of which the file says after its name what each is of; or that there are none."""
    for device in DEVICES:
        for path in sorted(results.glob(f"{name}-{device}*.json")) or [None]:
            yield device, path and json.loads(path.read_text())


def _conditions(measured: Mapping[str, Any]) -> str:
    machine = measured["machine"]
    facts = [
        machine["hardware"],
        *([f"{machine['threads']} threads"] if "threads" in machine else []),
        *(f"{name} {machine[name]}" for name in ("python", "torch", "triton") if machine[name]),
        f"commit {machine['commit']}",
        machine["date"],
        f"{measured['rounds']} rounds",
    ]
    return ", ".join(facts) + "."


def _model(count: Mapping[str, Any]) -> str:
    details = [count["act"]] if count["act"] else []
    if count["model"].startswith("resnet"):
        details.append(f"BatchNorm in {count['bn']} mode")
    return ", ".join([count["model"], *details])


def _images(row: Mapping[str, Any]) -> str:
    return f"{row['shape'][0]} at {row['shape'][-1]}²"


def _time(row: Mapping[str, Any]) -> list[str]:
    if "milliseconds" not in row:
        return [row.get("error", NOT_MEASURED), ""]
    least, most = row["milliseconds_min"], row["milliseconds_max"]
    return [f"{row['milliseconds']:.1f}", f"{least:.1f} to {most:.1f}"]


def _number(value: float | None, form: str, absent: str = "") -> str:
    return absent if value is None or math.isnan(value) else format(value, form)


def _spread(shares: Sequence[float]) -> str:
    mean = f"{sum(shares) / len(shares):.1%}"
    return mean if len(shares) == 1 else f"{mean} ({min(shares):.1%} to {max(shares):.1%})"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _bars(title: str, bars: Sequence[tuple[str, float]], unit: str) -> str:
    """A plot in text, which is the same wherever it is drawn."""
    bars = [(label, value) for label, value in bars if not math.isnan(value)]
    if not bars:
        return f"{title}: {NOT_MEASURED}."
    longest = max(len(label) for label, _ in bars)
    largest = max(value for _, value in bars)
    lines = [
        f"{label:{longest}}  {'█' * round(40 * value / largest)} {value:.3g}{unit}" for label, value in bars
    ]
    return "\n".join(["```text", title, *lines, "```"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs")
    parser.add_argument("--summary", action="store_true", help="also print the steps' comparison")
    args = parser.parse_args(arguments)
    written = {PAGE: page(), README: readme(README.read_text())}
    if args.check:
        differing = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
        for path in differing:
            print(f"{path} differs: run python -m benchmarks.report", file=sys.stderr)
        return 1 if differing else 0
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"wrote {path}")
    if args.summary:
        for name in ("steps", "rivals"):
            for device, measured in _by_device(RESULTS, name):
                rows = "\n" + comparison(measured["rows"]) if measured else NOT_MEASURED
                print(f"\n{name}, {device}:", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
