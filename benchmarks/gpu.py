"""What the first minutes on a GPU are for: rows, most important first, each a process with a time limit.

    python -m benchmarks.gpu check [--time-limit 240] [--json FILE]
    python -m benchmarks.gpu bench [--time-limit 480]

``check`` runs tests, several rows at a time: the whole steps of tests/test_gpu.py, each family's kernels in
one shape, and the smallest model under NVIDIA's compute-sanitizer. A row that fails, hangs or takes the GPU
down leaves the others alone, and the process fails in the end. The file is written after every row. A row
that did not run says why, and is not among those that passed.

``bench`` runs the other benchmarks, one at a time, within one budget of time: the ceilings of copies and of
matrix products, steps with their peak memory, kernels, and compiled steps. Each writes its own file in
benchmarks/results after every case, so that a run that is cut off keeps what it has.

``--device cpu`` runs both on a CPU, the kernels in Triton's interpreter and models too small to time; what
they write goes to build/stand-in.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradnorm_kernels.kernels import FAMILIES

from .measure import Budget, heading, line, option_parser, parse, start, write_json
from .report import RESULTS, ROOT

# Of `make check-gpu` and `make bench-gpu`.
SECONDS = {"check": 240.0, "bench": 480.0}
SANITIZER = "compute-sanitizer"
# No exit status of pytest's.
SANITIZER_FAILED = 86
MODELS = (
    *("swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "resnet50", "convnext_atto"),
    "efficientnet_b0",
)
LARGE = ("swin_base_patch4_window7_224", "resnet50", "vit_base_patch16_224", "convnext_base")
# The same, the largest graphs last.
COMPILED = ("resnet50", "vit_base_patch16_224", "swin_base_patch4_window7_224", "convnext_base")
OPS = (
    *("scaled_dot_product_attention", "layer_norm", "batch_norm", "gelu", "softmax", "layer_norm_2d"),
    *("batch_norm_act", "conv2d", "group_norm", "silu", "swiglu", "rms_norm"),
)
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass(frozen=True)
class Row:
    """One process: tests, which say themselves what passed, or a benchmark, which prints for itself.

    Attributes:
        name: what it is of.
        seconds: after which it is ended, and has failed.
        arguments: of pytest, or of ``python -m``.
        is_benchmark: which of the two.
        environment: variables, besides this process's.
        tool: a program that runs it, with that program's options.
        many: its tests may run in several processes.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...]
    is_benchmark: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    tool: tuple[str, ...] = ()
    many: bool = False


def check_rows(device: str) -> list[Row]:
    def whole(test: str, *models: str, seconds: float = 60.0) -> list[Row]:
        rows = [(" ".join([test, model]), f"{model}-{device}") for model in models] or [(test, device)]
        file = "tests/test_gpu.py"
        return [Row(name, seconds, (f"{file}::test_{test}[{which}]", "--run-slow")) for name, which in rows]

    def kernels(family: str) -> Row:
        one_shape = (f"tests/kernels/test_{family}_kernels.py", "--one-shape", "--run-slow")
        if device == "cpu":
            interpreter = (("TRITON_INTERPRET", "1"),)
            return Row(f"kernels of {family}", 150.0, (*one_shape, "-k", "interpreter"), False, interpreter)
        return Row(f"kernels of {family}", 150.0, (*one_shape, "-m", "gpu"), many=True)

    smallest = MODELS[1]
    sanitized = Row(
        f"{SANITIZER}, {smallest}",
        150.0,
        (f"tests/test_gpu.py::test_gradients[{smallest}-{device}]", "--run-slow"),
        # What PyTorch keeps for later would hide that an access was beyond a tensor's end.
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        tool=(SANITIZER, "--tool", "memcheck", "--error-exitcode", str(SANITIZER_FAILED)),
    )
    return [
        *whole("the_package_runs_there"),
        *whole("gradients", *MODELS, seconds=120.0),
        *whole("captured_steps", *MODELS[:3]),
        sanitized,
        *whole("empty_batch", *MODELS[1:4]),
        *whole("two_streams"),
        *whole("two_threads"),
        *map(kernels, FAMILIES),
    ]


def bench_rows(device: str, rounds: int) -> list[Row]:
    def row(name: str, seconds: float, program: str, file: str, *options: str) -> Row:
        json = str(folder(device) / file)
        arguments = (f"benchmarks.{program}", "--device", device, "--json", json, *options)
        return Row(name, seconds, arguments, is_benchmark=True)

    def steps(name: str, seconds: float, file: str, models: tuple[str, ...], *options: str) -> Row:
        size = ("--batch", "64", "--model", *models)
        if device == "cpu":
            size = ("--batch", "4", "--img-size", "64", "--model", "test_vit")
        return row(name, seconds, "steps", file, *size, "--rounds", str(rounds), *options)

    ours = ("--variants", "stock", "fuse", "pgd3", "natural")
    full, shape, ops = ("float32", "tf32"), (), OPS
    if device == "cpu":
        full, shape, ops = ("float32",), ("--shape", "2", "32", "4", "4"), ("gelu",)
    kernels = ("--rounds", str(2 * rounds), "--op", *ops, *shape)
    # Compilers take minutes a model: what is left of the time is theirs.
    compiled = ("--dtype", "bfloat16", "--first-step-limit", "100", "--variants", "stock", "fuse", "compiled")
    return [
        steps("steps, bfloat16", 150.0, f"steps-{device}.json", LARGE, "--dtype", "bfloat16", *ours),
        row("kernels", 75.0, "kernels", f"kernels-{device}.json", *kernels),
        steps("steps, float32", 120.0, f"steps-{device}-float32.json", LARGE, "--dtype", *full, *ours),
        steps("compiled steps, bfloat16", math.inf, f"rivals-{device}.json", COMPILED, *compiled),
    ]


def folder(device: str) -> Path:
    """Where results go. Those of a CPU are a stand-in's, and say nothing."""
    return RESULTS if device == "cuda" else ROOT / "build" / "stand-in"


class Runner:
    """Runs rows within a budget, and says of each what came out."""

    def __init__(self, seconds: float, workers: int) -> None:
        self.budget, self.workers = Budget(seconds), workers
        self.stopped = False
        self.running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, row: Row) -> dict[str, Any]:
        """The row's name, outcome, details and seconds; of a failure, also the end of what it printed."""
        begun = time.monotonic()
        found = self._run(row)
        return {"row": row.name, **found, "seconds": round(time.monotonic() - begun, 1)}

    def stop(self) -> None:
        """Ends what runs, and begins nothing more."""
        self.stopped = True
        for process in list(self.running):
            end(process)

    def _run(self, row: Row) -> dict[str, Any]:
        if row.tool and not shutil.which(row.tool[0]):
            return {"outcome": NOT_RUN, "details": f"there is no {row.tool[0]} on PATH"}
        seconds = min(row.seconds, self.budget.left())
        if seconds <= 0 or self.stopped:
            return {"outcome": NOT_RUN, "details": f"not begun within {self.budget.seconds:g} s"}
        with tempfile.TemporaryDirectory() as folder:
            results, printed = Path(folder) / "junit.xml", Path(folder) / "printed"
            status = self._wait(row, self._command(row, seconds, results), seconds, printed)
            text = printed.read_text(errors="replace") if printed.exists() else ""
            found = outcome(row, status, results, text)
            if status is None and row.is_benchmark:
                found = {"outcome": NOT_RUN, "details": f"cut off after {seconds:.0f} s; what it had is kept"}
            elif status is None and seconds < row.seconds:
                found = {"outcome": NOT_RUN, "details": f"not done within {self.budget.seconds:g} s of all"}
        if found["outcome"] == FAILED and text:
            found["printed"] = text.splitlines()[-40:]
        return found

    def _command(self, row: Row, seconds: float, results: Path) -> list[str]:
        if row.is_benchmark:
            # The rest is for importing and for what takes longer than expected.
            limit = ["--time-limit", f"{max(seconds - 15, 0):.0f}"]
            return [sys.executable, "-m", *row.arguments, *limit]
        # Of which later families know no properties of a test.
        report = ["-o", "junit_family=xunit1", f"--junitxml={results}"]
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *report, *row.arguments]
        if row.many and self.workers > 1 and find_spec("xdist"):
            tests += ["--numprocesses", str(self.workers)]
        return [*row.tool, sys.executable, *tests]

    def _wait(self, row: Row, command: list[str], seconds: float, printed: Path) -> int | None:
        """The exit status, or None of a process that was ended for its time."""
        with printed.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | dict(row.environment),
                stdin=subprocess.DEVNULL,
                stdout=None if row.is_benchmark else file,
                stderr=None if row.is_benchmark else subprocess.STDOUT,
                # With what it started it is ended.
                start_new_session=True,
            )
            self.running.add(process)
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end(process)
                self.running.discard(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it started, at once: one that waits for a GPU hears nothing else."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def outcome(row: Row, status: int | None, results: Path, printed: str) -> dict[str, Any]:
    """What a process that ended says of its row."""
    if status is None:
        return {"outcome": FAILED, "details": f"not done in {row.seconds:g} s"}
    if row.is_benchmark:
        return {"outcome": PASSED if status == 0 else FAILED, "details": f"exit status {status}"}
    if row.tool:
        # Where the machine does not let it see the GPU, which is no fault of what it runs.
        if refused := re.search(r"Device not supported.*", printed):
            return {"outcome": NOT_RUN, "details": refused[0]}
        errors = re.findall(r"ERROR SUMMARY: (\d+) errors?", printed)
        if status == SANITIZER_FAILED or not errors or any(map(int, errors)):
            said = f"{sum(map(int, errors))} errors" if errors else "no summary of errors"
            return {"outcome": FAILED, "details": f"{row.tool[0]}: {said}, exit status {status}"}
    if not results.exists():
        said = f"signal {-status}" if status < 0 else f"exit status {status}"
        return {"outcome": FAILED, "details": f"no results, {said}"}
    cases = ElementTree.parse(results).getroot().findall(".//testcase")
    for case in cases:
        for fault in (*case.findall("failure"), *case.findall("error")):
            said = (fault.get("message") or "").partition("\n")[0]
            return {"outcome": FAILED, "details": f"{case.get('name')}: {said}"}
    skipped = [reason for case in cases for reason in case.findall("skipped")]
    if len(skipped) == len(cases):
        why = skipped[0].get("message") if skipped else "there is no such test"
        # A test that is not there is no reason to be content.
        return {"outcome": NOT_RUN if skipped else FAILED, "details": why}
    if status != 0:
        return {"outcome": FAILED, "details": f"exit status {status}"}
    facts = [f"{p.get('name')}: {p.get('value')}" for case in cases for p in case.iter("property")]
    count = f"{len(cases) - len(skipped)} passed" + f", {len(skipped)} skipped" * bool(skipped)
    return {"outcome": PASSED, "details": "; ".join(facts) or count}


COLUMNS = {"row": ("row", "44"), "outcome": ("outcome", "8"), "s": ("seconds", "6.1f"), "": ("details", "")}


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, rounds=5)
    option = parser.add_argument
    option("which", choices=list(SECONDS))
    option("--time-limit", type=float, metavar="SECONDS", help="of all rows; default: check 240, bench 480")
    option(
        "--only", metavar="PATTERN", default="", help="only rows whose names match this regular expression"
    )
    option(
        "--jobs", type=int, help="rows of check at a time; default: a quarter of the processors, at most 4"
    )
    args = parse(parser, arguments)
    processors = os.cpu_count() or 1
    jobs = args.jobs or (max(1, min(4, processors // 4)) if args.which == "check" else 1)
    seconds = SECONDS[args.which] if args.time_limit is None else args.time_limit
    runner = Runner(seconds, workers=max(1, processors // jobs))
    rows = check_rows(args.device) if args.which == "check" else bench_rows(args.device, args.rounds)
    # A CPU may take its time.
    patience = 1 if args.device == "cuda" else 20
    rows = [replace(row, seconds=patience * row.seconds) for row in rows if re.search(args.only, row.name)]
    if not rows:
        parser.error(f"--only: no row matches {args.only}")
    file = args.json or folder(args.device) / f"check-{args.device}.json"
    machine = start(args)
    found: dict[str, dict[str, Any]] = {}

    def in_order() -> list[dict[str, Any]]:
        return [found[row.name] for row in rows if row.name in found]

    # What the rows started is in sessions of its own, which would run on.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(runner, row) for row in rows]):
                result = future.result()
                found[result["row"]] = result
                print(line(COLUMNS, result), flush=True)
                if args.which == "check":
                    write_json(file, quiet=True, machine=machine, seconds=seconds, rows=in_order())
        finally:
            runner.stop()
            signal.signal(signal.SIGTERM, before)
    print(f"\n{heading(COLUMNS)}")
    for result in in_order():
        print(line(COLUMNS, result))
    counts = {kind: sum(r["outcome"] == kind for r in found.values()) for kind in (PASSED, FAILED, NOT_RUN)}
    print("\n" + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if args.which == "check":
        print(f"wrote {file}")
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
