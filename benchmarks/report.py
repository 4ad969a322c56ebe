"""Writes docs/results.md from the JSON files in benchmarks/results: its numbers were measured or counted.

    python -m benchmarks.report [--check] [--summary]

The page is a function of those files alone, and so is what README.md shows of it, between ``<!-- result -->``
and ``<!-- /result -->``. ``--check`` writes nothing and fails where either on disk differs.
"""

import argparse
import json
import math
import statistics
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
# What README shows: the first model of each family that was timed, and the one that was counted.
FAMILIES = ("resnet50", "swin", "vit")

Row = Mapping[str, Any]
Rows = Sequence[Row]
# A table by its headings: what a cell says of the line's subject.
Columns = Mapping[str, Callable[[Any], str]]
# The rows of a model and precision by variant, and of an op in one precision by pass and variant.
Steps = tuple[tuple[str, str], dict[str, Row]]
Passes = tuple[tuple[str, str, str], dict[tuple[str, str], Row]]


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
    yield from _by_device(results, "steps", _steps)


def rivals(results: Path) -> Iterable[str]:
    yield (
        "Likewise, of the whole step compiled by `torch.compile`: `compiled` with `.backward()` in the graph,"
        " `compiled_func` by `torch.func.grad`, `fuse_compiled` the fused model; of `fuse_compiled_regions`"
        " the blocks are compiled, by `compile_modules`; `forward_over_reverse` and `finite_difference`, the"
        " latter not exact, are other engines of the objective. A cell that says why has no time."
    )
    yield from _by_device(results, "rivals", _steps)


def _steps(device: str, measured: Row) -> Iterable[str]:
    if limits := measured.get("limits"):
        rates = ", ".join(
            f"{rate / 1e12:.3g} TFLOP/s in {kind}" for kind, rate in limits["flops_per_second"].items()
        )
        yield f"Ceilings: a copy {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, a matrix product {rates}."
    rows = measured["rows"]
    yield _table(
        {
            "model": _field("model"),
            "batch": _images,
            "dtype": _field("dtype"),
            "variant": _field("variant"),
            "ms": _milliseconds,
            "range": _range,
            "/ stock": _field("time_over_stock", ".3f"),
            "gradient off stock's": _field("gradient_difference", ".1e"),
            "of the floor": _field("fraction_of_floor", ".2f"),
            "TFLOP/s": _field("teraflops_per_second", ".3g"),
            "images/s": _field("images_per_second", ".3g"),
            "first step, s": _field("first_step_seconds", ".1f"),
            "peak, GiB": _field("peak_memory_bytes", ".2f", 2**-30),
        },
        rows,
    )
    yield comparison(rows)
    others = [row for row in rows if row["variant"] != "stock"]
    yield _bars("step time, stock = 1", others, "time_over_stock", 1)
    yield _bars("peak memory, GiB", rows, "peak_memory_bytes", 2**-30)
    if profiled := [row for row in rows if "profile" in row and row["variant"] in ("stock", "fuse")]:
        yield "Where the time of one step goes, as PyTorch's profiler has it:"
        yield _table(
            {
                **{name: _field(name) for name in ("model", "dtype", "variant")},
                "op": _code,
                "calls": _field("calls", ","),
                "ms": _field("milliseconds", ".1f"),
            },
            [{**row, **op} for row in profiled for op in row["profile"][:8]],
        )


def _cases(rows: Rows) -> Iterable[Steps]:
    cases: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cases[row["model"], row["dtype"]][row["variant"]] = row
    return cases.items()


def _ratio(a: str, b: str, case: Mapping[str, Row], of: str = "") -> float:
    # Round by round, unless stock did not run.
    of = of or ("milliseconds" if "error" in case.get("stock", {}) else "time_over_stock")
    found = [case.get(variant, {}).get(of) for variant in (a, b)]
    return found[0] / found[1] if None not in found else math.nan


def comparison(rows: Rows) -> str:
    """What the variants of each model and precision say of each other."""

    def ratio(a: str, b: str, of: str = "") -> Callable[[Steps], str]:
        return lambda item: _number(_ratio(a, b, item[1], of), ".2f", NOT_MEASURED)

    def best_compiled(item: Steps) -> str:
        times = {name: item[1].get(name, {}).get("milliseconds", math.inf) for name in _COMPILED}
        return ratio(min(times, key=lambda name: times[name]), "fuse")(item)

    return _table(
        {
            "model": lambda item: item[0][0],
            "dtype": lambda item: item[0][1],
            "stock / fused": ratio("stock", "fuse"),
            "best compiled stock / fused": best_compiled,
            "peak memory, fused / stock": ratio("fuse", "stock", "peak_memory_bytes"),
            "stock / PGD-3": ratio("stock", "pgd3"),
            "fused / PGD-3": ratio("fuse", "pgd3"),
            "stock / natural": ratio("stock", "natural"),
            "fused / natural": ratio("fuse", "natural"),
        },
        _cases(rows),
    )


_COMPILED = ("compiled", "compiled_func")


def kernels(results: Path) -> Iterable[str]:
    return _by_device(results, "kernels", _kernels)


def _kernels(device: str, measured: Row) -> Iterable[str]:
    cases: dict[tuple[str, str, str], dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in measured["rows"]:
        key = (row["dtype"], f"{row['op']} {row['setting']}".strip(), "x".join(map(str, row["shape"])))
        cases[key][row["pass"], row["variant"]] = row
    title = "double backward, fused, float32: GB/s over those of a copy"
    bars = [
        {**passes["double_backward", "fused"], "op": name, "input": shape}
        for (dtype, name, shape), passes in cases.items()
        if dtype == "float32"
    ]
    yield _bars(title, bars, "fraction_of_copy", 1, ("op", "input"))
    for dtype in dict.fromkeys(key[0] for key in cases):
        yield f"### {dtype}, {device}"
        chosen = [item for item in cases.items() if item[0][0] == dtype]
        yield _table(
            {
                "op": lambda item: item[0][1],
                "input": lambda item: item[0][2],
                "forward, fused / stock": _of_pass("forward", "fused", "time_over_stock", ".2f"),
                "backward": _of_pass("backward", "fused", "time_over_stock", ".2f"),
                "double backward": _of_pass("double_backward", "fused", "time_over_stock", ".2f"),
                "stock, ms": _of_pass("double_backward", "stock", "milliseconds", ".1f"),
                "fused, ms": _of_pass("double_backward", "fused", "milliseconds", ".1f"),
                "fused, GB/s": _of_pass("double_backward", "fused", "gigabytes_per_second", ".1f"),
                "of a copy's": _of_pass("double_backward", "fused", "fraction_of_copy", ".2f"),
            },
            chosen,
        )
        slower = [
            f"{name}, {which.replace('_', ' ')} {row['time_over_stock']:.2f}"
            for (_, name, _), passes in chosen
            for (which, variant), row in passes.items()
            if variant == "fused" and row["time_over_stock"] > 1.05
        ]
        yield f"Slower than stock by more than a twentieth: {'; '.join(slower) or 'none'}."


def _of_pass(which: str, variant: str, key: str, form: str) -> Callable[[Passes], str]:
    return lambda item: _field(key, form)(item[1][which, variant])


def traffic(results: Path) -> Iterable[str]:
    yield (
        "Counted on meta tensors, not measured: every op that is not a view reads its inputs and writes its"
        " outputs; kernels of several passes are charged for each. One step, fused by `fuse(model)`."
        " `compiled` is stock's whole step in Inductor's own count of what its kernels read and write, fused"
        " as for a CPU: a lower bound, since it charges every kernel once for a tensor."
    )
    counts = _counts(results, "traffic")
    columns: dict[str, Callable[[Any], str]] = {"model": _model, "batch": _field("batch")}
    for what, unit, scale, form in (("bytes", "GB", 1e-9, ".0f"), ("launches", "launches", 1, ",.0f")):
        for variant, name in _TRAFFIC.items():
            columns[f"{name}, {unit}"] = _total(variant, what, form, scale)
        for variant, name in list(_TRAFFIC.items())[1:]:
            columns[f"{what}, {name} / stock"] = _share(variant, what)
    yield _table(columns, counts)
    bars = [
        {"model": _model(count), "variant": name, "moved": _moved(count, variant, "bytes")}
        for count in counts
        for variant, name in _TRAFFIC.items()
    ]
    yield _bars("memory traffic of one step, GB", bars, "moved", 1e-9, ("model", "variant"))
    for count in counts:
        yield f"### {_model(count)}, by op"
        moved: dict[str, Counter[str]] = defaultdict(Counter)
        for row in count["rows"]:
            moved[row["op"]][row["variant"]] += row["bytes"]
        largest = sorted(moved.items(), key=lambda item: (-max(item[1].values()), item[0]))[:12]
        counted = {row["variant"] for row in count["rows"]}
        gigabytes = {
            f"{name}, GB": _field(variant, ".1f", 1e-9, "0.0")
            for variant, name in _TRAFFIC.items()
            if variant in counted
        }
        yield _table({"op": _code, **gigabytes}, [{"op": op, **of} for op, of in largest])


# Variants, and what they are called.
_TRAFFIC = {"stock": "stock", "fuse": "fused", "compiled": "compiled"}


def _counts(results: Path, name: str) -> list[Row]:
    return [json.loads(path.read_text()) for path in sorted(results.glob(f"{name}-*.json"))]


def _moved(count: Row, variant: str, what: str) -> float:
    """Bytes or launches of a variant; no number where it was not counted."""
    return sum(row[what] for row in count["rows"] if row["variant"] == variant) or math.nan


def _total(variant: str, what: str, form: str, scale: float) -> Callable[[Row], str]:
    return lambda count: _number(_moved(count, variant, what) * scale, form, NOT_COUNTED)


def _share(variant: str, what: str) -> Callable[[Row], str]:
    return lambda c: _number(_moved(c, variant, what) / _moved(c, "stock", what), ".3f", NOT_COUNTED)


def memory(results: Path) -> Iterable[str]:
    yield (
        "Counted on meta tensors, not measured, of one step (`natural`: of CE; `checkpoint`: of the"
        " fused model with `checkpoint_modules`): every storage from its"
        " creation to its release. Of the peak, `held` are parameters, their gradients and images, and the"
        " others what each phase made. What an op needs only while it runs is not in it."
    )
    counts = _counts(results, "memory")
    columns: dict[str, Callable[[Any], str]] = {
        "model": lambda item: _model(item[0]),
        "batch": lambda item: _field("batch")(item[0]),
        "variant": lambda item: _field("variant")(item[1]),
        "peak, GiB": lambda item: _number(_peak(item[1]) * 2**-30, ".2f"),
        "peak / stock": lambda item: _peak_share(item[0], item[1]["variant"]),
    }
    for kind in ("held", "forward", "input gradient", "backward"):
        columns[kind] = _alive("bytes_at_peak", kind)
    for phase in ("forward", "input gradient"):
        columns[f"after {phase}"] = _alive("bytes_after", phase)
    yield _table(columns, [(count, row) for count in counts for row in count["rows"]])
    bars = [
        {"model": _model(count), "variant": row["variant"], "peak": _peak(row)}
        for count in counts
        for row in count["rows"]
    ]
    yield _bars("peak memory of one step, GiB", bars, "peak", 2**-30, ("model", "variant"))


def _alive(when: str, of: str) -> Callable[[tuple[Row, Row]], str]:
    return lambda item: _field(of, ".2f", 2**-30)(item[1][when])


def _peak(row: Row) -> float:
    return sum(row["bytes_at_peak"].values())


def _peak_share(count: Row, variant: str) -> str:
    peaks = {row["variant"]: _peak(row) for row in count["rows"]}
    return _number(peaks.get(variant, math.nan) / peaks.get("stock", math.nan), ".3f", NOT_COUNTED)


def penalties(results: Path) -> Iterable[str]:
    yield (
        "Code that knows nothing of this library ([examples](../examples)), stock and under"
        " `set_fused_double_backward(True)`."
    )
    columns = {
        "code": _field("code"),
        "variant": _field("variant"),
        "ms": _milliseconds,
        "range": _range,
        "/ stock": _field("time_over_stock", ".3f"),
        "gradient off stock's": _field("gradient_difference", ".1e"),
    }
    yield from _by_device(results, "penalties", lambda _, measured: [_table(columns, measured["rows"])])


PUBLISHED_WEIGHT = 1.2
# What studies were trained on, by the name of the folder.
DATA = {
    None: "digits",
    "cifar10": "CIFAR-10 (JPEG copy)",
    "cifar10_5000": "5,000 images of CIFAR-10 (JPEG copy)",
}


def studies(results: Path) -> Iterable[str]:
    yield (
        "Means over the seeds, and their range. Products: matrix products and convolutions of a step,"
        " counted; step times of the rows taking turns in one process."
    )
    for path in sorted(results.glob("study-*.json")):
        measured = json.loads(path.read_text())
        config, attack, rows = (measured[key] for key in ("config", "attack", "rows"))
        seeds = len(next(iter(rows.values()))["clean"])
        data = DATA.get(config["data"], config["data"])
        weight = config.get("gn_weight", PUBLISHED_WEIGHT)
        strength = "" if weight == PUBLISHED_WEIGHT else f", gn_weight {weight:g}"
        yield f"### {measured['study']}, on {data}{strength}"
        yield (
            f"{config['model']}, {config['epochs']} epochs in {config.get('precision', 'float32')};"
            f" {attack} at ε = {config['epsilon']:.4g} on {measured['attacked']} held-out images;"
            f" {seeds} seed{'s' if seeds > 1 else ''} a row. {measured['conditions']}"
        )
        reference = rows.get(measured["reference"], {})
        keys = {key for row in rows.values() for key in row}
        columns = {
            "training": _field("name"),
            "clean": lambda row: _spread(row["clean"]),
            attack: lambda row: _spread(row["robust"]),
        }
        if "step_flops" in keys:
            scale = 1 / reference.get("step_flops", math.nan)
            columns[f"products / {measured['reference']}"] = _field("step_flops", ".2f", scale, NOT_MEASURED)
        if "step_seconds" in keys:
            scale = 1 / reference.get("step_seconds", math.nan)
            columns["step, ms"] = _field("step_seconds", ".1f", 1e3)
            columns[f"step / {measured['reference']}"] = _field("step_seconds", ".2f", scale, NOT_MEASURED)
        if measured.get("against_clock"):
            columns["training, s"] = lambda row: f"{statistics.mean(row['training_seconds']):.0f}"
        if any(map(any, (row.get("gradient_masking", []) for row in rows.values()))):
            columns["zero gradient"] = lambda row: _spread(row["gradient_masking"])
        if any("eval_apgd_accuracy" in line for row in rows.values() for line in row["histories"][0]):
            columns["collapsed in epoch"] = lambda row: ", ".join(str(at or "no") for at in row["collapsed"])
        yield _table(columns, [{"name": name, **row} for name, row in rows.items()])


SECTIONS: dict[str, Callable[[Path], Iterable[str]]] = {
    "Whole gradient-norm steps": steps,
    "Rivals": rivals,
    "Memory traffic of a step": traffic,
    "Peak memory of a step": memory,
    "Kernels": kernels,
    "Gradient penalties beyond vision": penalties,
    "Training studies": studies,
}


def result(results: Path = RESULTS) -> Iterable[str]:
    """What README shows: a line for each family, of its time, its bytes and its peak memory."""

    counts = {name: _counts(results, name) for name in ("traffic", "memory")}

    def counted(name: str, say: Callable[[Row], str]) -> Callable[[Steps], str]:
        def cell(item: Steps) -> str:
            stock = item[1]["stock"]
            for count in counts[name]:
                if _family(count["model"]) == _family(item[0][0]) and count["bn"] == stock["batch_norm"]:
                    return say(count)
            return NOT_COUNTED

        return cell

    def moved(count: Row) -> str:
        return f"{_share('fuse', 'bytes')(count)} ({_model(count)}, batch {count['batch']})"

    columns = {
        "gradient-norm step of": lambda item: f"{item[0][0]}, {_images(item[1]['stock'])}, {item[0][1]}",
        "stock, ms": lambda item: _milliseconds(item[1]["stock"]),
        "fused, ms": lambda item: _milliseconds(item[1].get("fuse", {})),
        "time, fused / stock": lambda item: _number(_ratio("fuse", "stock", item[1]), ".2f", NOT_MEASURED),
        "bytes, fused / stock, counted": counted("traffic", moved),
        "peak memory, likewise": counted("memory", lambda count: _peak_share(count, "fuse")),
    }

    def families(_: str, measured: Row) -> Iterable[str]:
        first: dict[str, Steps] = {}
        for item in _cases(measured["rows"]):
            first.setdefault(_family(item[0][0]), item)
        yield _table(columns, [first[family] for family in FAMILIES if family in first])

    return _by_device(results, "steps", families)


def _family(model: str) -> str:
    return next((family for family in FAMILIES if model.startswith(family)), "")


def readme(text: str, results: Path = RESULTS) -> str:
    """``text`` with its block written anew."""
    begin, end = "<!-- result -->", "<!-- /result -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"text: expected a block from {begin} to {end}")
    return before + "\n\n".join([begin, *result(results), end]) + after


def _runs(results: Path, name: str) -> Iterable[tuple[str, Row | None]]:
    """A device's runs, of which the file says after its name what each is of; or that there are none."""
    for device in DEVICES:
        for path in sorted(results.glob(f"{name}-{device}*.json")) or [None]:
            yield device, path and json.loads(path.read_text())


def _by_device(results: Path, name: str, show: Callable[[str, Row], Iterable[str]]) -> Iterable[str]:
    for device, measured in _runs(results, name):
        if measured is None:
            yield f"{device}: {NOT_MEASURED}."
        else:
            yield _conditions(measured)
            yield from show(device, measured)


def _conditions(measured: Row) -> str:
    machine = measured["machine"]
    facts = [
        machine["hardware"],
        *([f"{machine['threads']} threads"] if "threads" in machine else []),
        *(f"{name} {machine[name]}" for name in ("python", "torch", "triton") if machine[name]),
        f"commit {machine['commit']}",
        machine["date"],
        f"{measured['rounds']} rounds",
        *(["heap kept"] if machine.get("heap_kept") else []),
    ]
    return ", ".join(facts) + "."


def _model(count: Row) -> str:
    details = [count["act"]] if count["act"] else []
    if count["model"].startswith("resnet"):
        details.append(f"BatchNorm in {count['bn']} mode")
    return ", ".join([count["model"], *details])


def _images(row: Row) -> str:
    return f"{row['shape'][0]} at {row['shape'][-1]}²"


def _milliseconds(row: Row) -> str:
    """The median, or why there is none."""
    return row.get("error") or _field("milliseconds", ".1f", absent=NOT_MEASURED)(row)


def _range(row: Row) -> str:
    times = [row.get(f"milliseconds_{end}") for end in ("min", "max")]
    return " to ".join(f"{time:.1f}" for time in times if time is not None)


def _code(row: Row) -> str:
    return f"`{row['op']}`"


def _spread(shares: Sequence[float]) -> str:
    mean = f"{sum(shares) / len(shares):.1%}"
    return mean if len(shares) == 1 else f"{mean} ({min(shares):.1%} to {max(shares):.1%})"


def _field(key: str, form: str = "", scale: float = 1, absent: str = "") -> Callable[[Row], str]:
    """A cell of a row's text, or of its number in units of 1 / ``scale``."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return value if isinstance(value, str) else _number(value and value * scale, form, absent)

    return cell


def _number(value: float | None, form: str, absent: str = "") -> str:
    return absent if value is None or math.isnan(value) else format(value, form)


def _table(columns: Columns, subjects: Iterable[Any]) -> str:
    lines = [
        [*columns],
        ["---"] * len(columns),
        *([cell(subject) for cell in columns.values()] for subject in subjects),
    ]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _bars(
    title: str, rows: Rows, key: str, scale: float, names: Sequence[str] = ("model", "dtype", "variant")
) -> str:
    """A plot in text, which is the same wherever it is drawn."""
    bars = [(" ".join(row[name] for name in names), (row.get(key) or math.nan) * scale) for row in rows]
    bars = [(label, value) for label, value in bars if not math.isnan(value)]
    if not bars:
        return f"{title}: {NOT_MEASURED}."
    longest = max(len(label) for label, _ in bars)
    largest = max(value for _, value in bars)
    lines = [f"{label:{longest}}  {'█' * round(40 * value / largest)} {value:.3g}" for label, value in bars]
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
            for device, measured in _runs(RESULTS, name):
                rows = "\n" + comparison(measured["rows"]) if measured else NOT_MEASURED
                print(f"\n{name}, {device}:", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
