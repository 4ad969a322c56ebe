"""What a second and a third differentiation come to, for every differentiable op of PyTorch: docs/atlas.md.

    python -m benchmarks.atlas [--ops NAME ...] [--jobs N] [--limit SECONDS] [--json FILE]

Takes OpInfo's samples in float64 on the CPU, with PyTorch as it is and under the switch. Each derivative is a
vector-Jacobian product with random cotangents, by the inputs and by all incoming gradients. It is compared
with finite differences of the one below it, in a random direction of each of these tensors. An op runs in a
process of its own, since some crash or never end.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import gradnorm_kernels as gk

from .measure import describe_machine, write_json
from .opinfo import OPS, ReductionOpInfo, samples_of
from .traffic import Traffic

PAGE = Path(__file__).parents[1] / "docs" / "atlas.md"
MODES = {"stock": False, "switch": True}
ORDERS = ("first", "second", "third")

# Of an op's samples so many are judged, each from its own part of the list; so many of a part are tried.
SAMPLES = 3
TRIES = 8
MAX_ELEMENTS = 25_000
MOST_WASTEFUL = 40

# Steps of the differences, each tried with a tenth of it, too; how far a derivative may be from them,
# relatively; and what rounding may add, in units of what the differences are taken of.
STEPS = (1e-5, 1e-4, 1e-6)
TOLERANCE = 1e-4
ROUNDING = 1e-14

RIGHT, WRONG, CUT, RAISES, UNCLEAR = "right", "wrong", "cut", "raises", "unclear"

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """On one order of derivative.

    Attributes:
        kind: ``"right"``; ``"wrong"``, silently; ``"cut"``: missing, silently, where the differences are not
            zero; ``"raises"``; or ``"unclear"``: nothing to compare with, as at a kink.
        reason: what was seen.
    """

    kind: str
    reason: str = ""


def judge(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Verdict]:
    """On the first, second and third derivatives of ``function`` at ``inputs``.

    What is built on a derivative that is not right is not right either, for the same reason.

    Args:
        function: of ``inputs``, to a tensor or anything nested that holds tensors.
        inputs: float64, of any shapes.
    """
    _GENERATOR.manual_seed(0)
    verdicts: list[Verdict] = []
    level = Level.of(function, inputs)
    while len(verdicts) < len(ORDERS) and (not verdicts or verdicts[-1].kind == RIGHT):
        try:
            verdict, level = level.differentiate()
        except Exception as error:
            verdict = Verdict(RAISES, first_line(error))
        verdicts.append(verdict)
    return verdicts + verdicts[-1:] * (len(ORDERS) - len(verdicts))


@dataclass(frozen=True)
class Level:
    """A function, or a derivative of one, which is a function of its cotangents as well; and where.

    Attributes:
        call: of the tensors, and whether the results have to be differentiable.
        point: the tensors.
        names: theirs.
    """

    call: Callable[[list[Tensor], bool], list[Tensor]]
    point: list[Tensor]
    names: list[str]

    @classmethod
    def of(cls, function: Callable[..., Any], inputs: Sequence[Tensor]) -> "Level":
        def call(variables: list[Tensor], create_graph: bool) -> list[Tensor]:
            # A random op draws the same numbers in every call.
            torch.default_generator.manual_seed(0)
            leaves = [leaf for leaf in tree_leaves(function(*variables)) if isinstance(leaf, Tensor)]
            return [
                torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
                for t in leaves
                if t.requires_grad
            ]

        names = ["input"] if len(inputs) == 1 else [f"input {i}" for i in range(1, len(inputs) + 1)]
        return cls(call, [tensor.detach() for tensor in inputs], names)

    def derivative(self) -> "Level":
        outputs = self.call(_variables(self.point), False)
        n = len(self.point)

        def call(variables: list[Tensor], create_graph: bool) -> list[Tensor]:
            arguments, cotangents = variables[:n], variables[n:]
            outputs = self.call(arguments, True)
            products = vector_jacobian_product(outputs, arguments, cotangents, create_graph)
            return [
                torch.zeros_like(argument) if product is None else product
                for argument, product in zip(arguments, products, strict=True)
            ]

        incoming = "grad_output" if "grad_output" not in self.names else "grad_grad"
        names = [*self.names, *[incoming] * len(outputs)]
        return Level(call, [*self.point, *map(_random_like, outputs)], names)

    def differentiate(self) -> tuple[Verdict, "Level"]:
        """Whether the derivative is right, and it."""
        derivative = self.derivative()
        cotangents = derivative.point[len(self.point) :]
        variables = _variables(self.point)
        outputs = self.call(variables, True)
        if not outputs:
            return Verdict(CUT, "no output has a gradient"), derivative
        products = vector_jacobian_product(outputs, variables, cotangents, create_graph=False)
        differences = Differences(self, cotangents, [output.requires_grad for output in outputs])
        verdicts = [differences.judge(i, product) for i, product in enumerate(products)]
        return _first_of((WRONG, CUT, UNCLEAR, RIGHT), verdicts), derivative


class Differences:
    """Of a level's results, each multiplied with its cotangent, around the level's point.

    Args:
        has_graph: of each result, whether it can be differentiated.
    """

    def __init__(self, level: Level, cotangents: list[Tensor], has_graph: list[bool]) -> None:
        self.level, self.cotangents = level, cotangents
        self.has_no_graph = ~torch.tensor(has_graph)
        products = self._products(level.point)
        self.here = _sums(products)
        self.rounding = ROUNDING * _sums([product.abs() for product in products])

    def judge(self, index: int, gradient: Tensor | None) -> Verdict:
        """On the gradient by one of the level's tensors, along a new direction for each step."""
        verdicts: list[Verdict] = []
        for step in STEPS:
            verdicts.append(self._judge(index, gradient, step))
            if verdicts[-1].kind == RIGHT:
                break
        return _first_of((RIGHT, UNCLEAR, CUT, WRONG), verdicts)

    def _judge(self, index: int, gradient: Tensor | None, step: float) -> Verdict:
        name = self.level.names[index]
        direction = _random_like(self.level.point[index])
        exact = 0.0 if gradient is None else (gradient * direction).sum().item()
        estimates: list[float] = []
        for size in (step, step / 10):
            ahead, behind = (self._slopes(index, direction, s) for s in (size, -size))
            central, rounding = (ahead + behind) / 2, self.rounding / size
            estimate = central.sum().item()
            scale = max(abs(estimate), abs(exact))
            if abs(estimate - exact) <= TOLERANCE * scale + rounding.sum():
                return Verdict(RIGHT)
            # At a kink, a jump or a pole the two sides differ.
            if not (ahead - behind).abs().sum() <= 0.01 * central.abs().sum() + rounding.sum():
                return Verdict(UNCLEAR, f"not smooth in {name}")
            estimates.append(estimate)
        coarse, fine = estimates
        error = abs(fine - exact) if math.isfinite(exact) else abs(fine)
        # Differences over a jump, or that are mostly rounding, do not agree with each other.
        if abs(coarse - fine) > 0.1 * error:
            return Verdict(UNCLEAR, f"not smooth in {name}")
        if not math.isfinite(exact):
            return Verdict(WRONG, f"gradient of {name} not finite")
        if gradient is None or (central.abs() > rounding)[self.has_no_graph].any():
            return Verdict(CUT, f"gradient of {name} missing")
        return Verdict(WRONG, f"gradient of {name} {error / scale:.0%} off")

    def _slopes(self, index: int, direction: Tensor, step: float) -> Tensor:
        point = list(self.level.point)
        point[index] = point[index] + step * direction
        return (_sums(self._products(point)) - self.here) / step

    def _products(self, point: list[Tensor]) -> list[Tensor]:
        results = self.level.call(_variables(point), False)
        return [
            result.detach() * cotangent for result, cotangent in zip(results, self.cotangents, strict=True)
        ]


def _sums(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors])


def vector_jacobian_product(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool
) -> Sequence[Tensor | None]:
    """As ``torch.autograd.grad``, of those outputs that have a graph; none need have one."""
    with_graph = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not with_graph:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [outputs[i] for i in with_graph],
        inputs,
        [cotangents[i] for i in with_graph],
        create_graph=create_graph,
        allow_unused=True,
    )


# Not the one that random ops draw from.
_GENERATOR = torch.Generator()


def _random_like(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=_GENERATOR, dtype=tensor.dtype)


def _variables(point: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in point]


def _first_of(kinds: Sequence[str], verdicts: Sequence[Verdict]) -> Verdict:
    return min(verdicts, key=lambda verdict: kinds.index(verdict.kind))


def first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 110 else text[:107] + "..."


def survey(op: Any) -> Row:
    """Of an OpInfo: the verdicts on second and third order in both modes, and what the double backward moves;
    or why it is left out."""
    row: Row = {"op": op.full_name}
    if not op.supports_dtype(torch.float64, "cpu"):
        return row | {"left_out": "no float64 on the CPU"}
    if not op.supports_autograd:
        return row | {"left_out": "not differentiable, by OpInfo"}
    torch.manual_seed(0)
    samples = [sample for sample in samples_of(op) if _is_eligible(*sample)]
    if not samples:
        return row | {"left_out": f"no sample of 1 to {MAX_ELEMENTS:,} real, dense numbers"}
    cases: list[Row] = []
    refused: list[Verdict] = []
    remedies: set[str] = set()
    for part in _parts(samples):
        for function, inputs in part[:TRIES]:
            stock = judge(function, inputs)
            if stock[0].kind == RIGHT:
                with gk.set_fused_double_backward(True):
                    cases.append({"stock": stock, "switch": judge(function, inputs)})
                if stock[1].kind not in (RIGHT, UNCLEAR):
                    remedies.update(_remedies(function, inputs))
                break
            refused.append(stock[0])
    if not cases:
        first = _first_of((RAISES, WRONG, CUT, UNCLEAR), refused)
        return row | {"left_out": f"first derivative {_NOT_RIGHT[first.kind]}", "reason": first.reason}
    row |= {"samples": len(cases), "remedies": sorted(remedies)}
    for mode, order in itertools.product(MODES, (1, 2)):
        verdicts = [case[mode][order] for case in cases]
        worst = _first_of((WRONG, CUT, RAISES, RIGHT, UNCLEAR), verdicts)
        row[f"{mode} {ORDERS[order]}"] = asdict(worst) | {
            "samples": sum(v.kind == worst.kind for v in verdicts)
        }
    largest = max(samples, key=lambda sample: sum(tensor.numel() for tensor in sample[1]))
    for mode, is_on in MODES.items():
        with gk.set_fused_double_backward(is_on):
            row[f"{mode} traffic"] = traffic(op, *largest)
    return row


_NOT_RIGHT = {
    WRONG: "other than the differences: rounded outputs, overlapping inputs, or so defined",
    CUT: "missing",
    RAISES: "raises",
    UNCLEAR: "without differences to compare with",
}


def _is_eligible(function: Callable[..., Any], inputs: Sequence[Tensor]) -> bool:
    are_real = all(tensor.dtype == torch.float64 and tensor.layout == torch.strided for tensor in inputs)
    return are_real and all(x.numel() for x in inputs) and sum(x.numel() for x in inputs) <= MAX_ELEMENTS


def _parts(samples: list[Any]) -> list[list[Any]]:
    bounds = [round(i * len(samples) / SAMPLES) for i in range(SAMPLES + 1)]
    return [samples[start:end] for start, end in itertools.pairwise(bounds)]


def _remedies(function: Callable[..., Any], inputs: Sequence[Tensor]) -> set[str]:
    """Of what `gk.diagnose` finds in the graph."""
    try:
        found = gk.diagnose(function(*inputs), inputs)
    except RuntimeError:
        # Some raise in the first backward already, where it has to be differentiable.
        return set()
    return {finding.remedy for finding in found.harmful} - {""}


def traffic(op: Any, function: Callable[..., Any], inputs: Sequence[Tensor]) -> dict[str, int] | None:
    """Launches and bytes of the double backward, and the bytes that it must move at least.

    These are the incoming gradients and the inputs, read, and the gradients that are not zero, written.
    ``None`` for matrix products and factorizations, for outputs of another size than the inputs that are no
    reductions, and for what cannot be differentiated twice.
    """
    try:
        forward = Level.of(function, inputs)
        backward = forward.derivative()
        variables = _variables(backward.point)
        outputs = backward.call(variables, True)
        cotangents = [_random_like(output) for output in outputs]
        with Traffic() as counted:
            products = vector_jacobian_product(outputs, variables, cotangents, create_graph=False)
    except Exception:
        return None
    grad_outputs = variables[len(inputs) :]
    elements = max(tensor.numel() for tensor in inputs)
    is_as_large = all(tensor.numel() == elements for tensor in grad_outputs)
    is_reduction = isinstance(op, ReductionOpInfo) or all(tensor.dim() == 0 for tensor in grad_outputs)
    has_products = any(flops for _, flops in counted.ops)
    factors = any("linalg" in name and "norm" not in name for _, name in counted.bytes)
    if not (is_as_large or is_reduction) or has_products or factors or not counted.bytes:
        return None
    written = [product is not None and bool(product.count_nonzero()) for product in products]
    moved = [c for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    moved += itertools.compress(variables, written)
    # A function of linear pieces has the same double backward for every grad_output.
    moved += variables if any(written[: len(inputs)]) else variables[: len(inputs)]
    return {
        "launches": counted.launches.total(),
        "bytes": counted.bytes.total(),
        "floor": sum(tensor.nbytes for tensor in moved),
    }


def _survey_quietly(name: str) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return survey(OPS[name])


def in_processes(
    function: Callable[[str], Row], names: Iterable[str], jobs: int, limit: float
) -> Iterator[tuple[str, Row | str]]:
    """``function`` of each name, each in a forked process, as they end; or why there is no result.

    Args:
        jobs: processes at a time.
        limit: seconds that each may take.
    """
    waiting = list(reversed(list(names)))
    running: dict[Any, tuple[str, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receiver, process = _start(function, name)
            running[receiver] = name, process, time.monotonic() + limit
        soonest = min(deadline for _, _, deadline in running.values())
        ended = wait(list(running), timeout=max(0.0, soonest - time.monotonic()))
        late = [receiver for receiver, (_, _, deadline) in running.items() if deadline <= time.monotonic()]
        for receiver in {*ended, *late}:
            name, process, _ = running.pop(receiver)
            result: Row | str = "the process died"
            if receiver in ended:
                with contextlib.suppress(EOFError):
                    result = receiver.recv()
            else:
                result = f"not done in {limit:g} s"
                process.kill()
            process.join()
            receiver.close()
            yield name, result


def _start(function: Callable[[str], Row], name: str) -> tuple[Connection, BaseProcess]:
    # A fork has imported everything already.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(name)))
    process.start()
    # The child's is the only one left: where it ends, so does the pipe.
    sender.close()
    return receiver, process


def page(machine: Row, rows: Sequence[Row]) -> str:
    """The text of docs/atlas.md."""
    judged = [row for row in rows if "samples" in row]
    parts = [
        "# Atlas of double backward",
        f"Written by `python -m benchmarks.atlas`: torch {machine['torch']}, commit {machine['commit']},"
        f" python {machine['python']}, {machine['date']}.",
        "Every differentiable op of OpInfo, PyTorch's own list of its ops with samples for its tests, in"
        f" float64 on the CPU, at up to {SAMPLES} samples each. A derivative is a vector-Jacobian product by"
        " the inputs and all incoming gradients. It is compared with finite differences of the one below it,"
        f" along a random direction of each of these tensors, to {TOLERANCE:g}. `stock` is PyTorch as it is,"
        " `switch` is under `gk.set_fused_double_backward(True)`. Wrong is a wrong number without an error,"
        " cut a gradient that is missing without an error, unclear that there were no differences to compare"
        " with. What is built on a derivative that is not right is not right either. What OpInfo does not"
        " have is not here, such as weight normalisation, cuDNN's recurrent layers, and anything on a GPU.",
        f"{len(rows)} entries of OpInfo: {len(judged)} judged,"
        f" {sum('left_out' in row for row in rows)} left out,"
        f" {sum('no_result' in row for row in rows)} without a result.",
        *_summary(judged),
        "## What is not right",
        *_not_right(judged),
        "## What wastes most",
        *_wasteful(judged),
        "## Left out",
        *_left_out(rows),
    ]
    return "\n\n".join(parts) + "\n"


# Of the page's tables: order and mode of each column of verdicts.
_COLUMNS = [(f"{mode} {order}", f"{order}, {mode}") for order in ORDERS[1:] for mode in MODES]


def _summary(judged: Sequence[Row]) -> Iterator[str]:
    lines = [
        [kind, *(str(sum(row[key]["kind"] == kind for row in judged)) for key, _ in _COLUMNS)]
        for kind in (RIGHT, WRONG, CUT, RAISES, UNCLEAR)
    ]
    yield table(["ops", *(heading for _, heading in _COLUMNS)], lines)
    worse = [
        row["op"]
        for row in judged
        for order in ORDERS[1:]
        if row[f"stock {order}"]["kind"] == RIGHT != row[f"switch {order}"]["kind"]
    ]
    yield "Right in stock and not under the switch: " + (", ".join(sorted({*worse})) or "none") + "."


def _not_right(judged: Sequence[Row]) -> Iterator[str]:
    yield (
        "Beside a word, of how many samples it is true, where not of all. What is seen is stock's, at the"
        " first order that is not right."
    )
    lines = []
    for row in judged:
        verdicts = [row[key] for key, _ in _COLUMNS]
        failed = [verdict for verdict in verdicts if verdict["kind"] not in (RIGHT, UNCLEAR)]
        if failed:
            cells = [_cell(verdict, row["samples"]) for verdict in verdicts]
            lines.append([f"`{row['op']}`", *cells, failed[0]["reason"].replace("|", "\\|"), _cover(row)])
    headings = ["op", *(heading for _, heading in _COLUMNS), "what is seen", "what covers it"]
    yield table(headings, lines)
    unclear = [row["op"] for row in judged if UNCLEAR in {row[key]["kind"] for key, _ in _COLUMNS}]
    if unclear:
        yield _names("No sample with differences to compare with, at the second or third order:", unclear)


def _cell(verdict: Row, samples: int) -> str:
    part = (
        ""
        if verdict["samples"] == samples or verdict["kind"] == RIGHT
        else f" {verdict['samples']}/{samples}"
    )
    return verdict["kind"] + part


def _cover(row: Row) -> str:
    covered = [
        order
        for order in ORDERS[1:]
        if row[f"switch {order}"]["kind"] == RIGHT != row[f"stock {order}"]["kind"]
    ]
    if covered:
        return (
            "the switch"
            if row[f"switch {ORDERS[-1]}"]["kind"] == RIGHT
            else f"the switch, {covered[0]} order"
        )
    return "; ".join(row["remedies"] or ["nothing"])


def _wasteful(judged: Sequence[Row]) -> Iterator[str]:
    counted = [row for row in judged if row["stock traffic"] and row["switch traffic"]]
    counted.sort(key=lambda row: -_waste(row, "stock"))
    medians = [statistics.median(_waste(row, mode) for row in counted) for mode in MODES] if counted else []
    yield (
        "Bytes of the double backward over the least that it must move: the incoming gradients and inputs,"
        " read once, and the gradients that are not zero, written once. Counted as `benchmarks.traffic` does,"
        " at the largest sample, which is small: of large tensors it is less where an op moves numbers that"
        " do not grow with them. Inputs that are not needed are in the least, too, so that a linear op may be"
        f" below 1. {len(counted)} ops were counted: those whose output is as large as an input or a"
        " reduction, without matrix products and factorizations"
        + (
            f"; the median is {medians[0]:.1f} in stock, {medians[1]:.1f} under the switch."
            if counted
            else "."
        )
    )
    lines = []
    for row in counted[:MOST_WASTEFUL]:
        cells = [f"`{row['op']}`"]
        for mode in MODES:
            cells += [f"{_waste(row, mode):.1f}", str(row[f"{mode} traffic"]["launches"])]
        lines.append(cells)
    headings = [f"{what}, {mode}" for mode in MODES for what in ("bytes / floor", "launches")]
    yield table(["op", *headings], lines)


def _waste(row: Row, mode: str) -> float:
    return row[f"{mode} traffic"]["bytes"] / row[f"{mode} traffic"]["floor"]


def _left_out(rows: Sequence[Row]) -> Iterator[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if "left_out" in row:
            reason = row.get("reason", "")
            reasons[row["left_out"]].append(f"{row['op']} ({reason})" if reason else row["op"])
        elif "no_result" in row:
            reasons[f"no result, {row['no_result']}"].append(row["op"])
    for reason, ops in reasons.items():
        yield _names(f"{reason[0].upper()}{reason[1:]}: {len(ops)}.", ops)


def _names(text: str, ops: Iterable[str]) -> str:
    return textwrap.fill(f"{text} {', '.join(ops)}.", 140, break_long_words=False, break_on_hyphens=False)


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, ["---"] * len(headings), *lines])


def main(arguments: list[str] | None = None) -> None:
    survey_all(arguments, __doc__, "op", OPS, OPS, _survey_quietly, page, PAGE)


def survey_all(
    arguments: list[str] | None,
    doc: str | None,
    subject: str,
    usual: Iterable[str],
    known: Container[str],
    survey: Callable[[str], Row],
    page: Callable[[Row, Sequence[Row]], str],
    path: Path,
) -> None:
    """The command that writes a page: a survey of each subject in a process of its own.

    Args:
        usual: the subjects that the page is written of; of others it is printed.
        known: all that can be asked for.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    help = "these alone; prints the page instead of writing it"
    option(f"--{subject}s", nargs="+", metavar="NAME", dest="names", help=help)
    option("--jobs", type=int, default=os.cpu_count(), help="processes at a time; default: one a core")
    option("--limit", type=float, default=300, metavar="SECONDS", help=f"for each {subject}; default: 300")
    option("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names or () if name not in known]:
        parser.error(f"--{subject}s: there is no {', '.join(unknown)}")
    for name in ("jobs", "limit"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(args, name)}")
    machine = describe_machine("cpu")
    rows: list[Row] = []
    names = list(dict.fromkeys(args.names or usual))
    for name, result in in_processes(survey, names, args.jobs, args.limit):
        rows.append({subject: name, "no_result": result} if isinstance(result, str) else result)
        print(f"{len(rows)}/{len(names)} {name}", file=sys.stderr)
    rows.sort(key=lambda row: row[subject])
    if args.json:
        write_json(args.json, machine=machine, rows=rows)
    text = page(machine, rows)
    if args.names:
        print(text)
    else:
        path.write_text(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
