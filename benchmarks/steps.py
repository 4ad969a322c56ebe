"""Times one whole training step: gradient-norm training, its rivals, and what it is compared with.

    python -m benchmarks.steps --model swin_tiny_patch4_window7_224 resnet50 --batch 8 [--json FILE]

The objective is 0.8 CE + 1.2 * epsilon * ||dCE/dx||_1: forward, gradient with respect to the pixels, and the
backward into every parameter's ``.grad``. The variants are copies of one timm model and alternate in one
process. Before they are timed, their gradients are compared with stock's, or where stock has no memory with
the first variant's that has: one that disagrees, or raises though no compiler is in it, is not timed, and the
run fails once all else is measured. Time on a GPU is wall time, launches included; the time of the first step
is reported apart, because compilers work in it, from empty caches where a variant is compiled.

    stock                       PyTorch
    fuse, switch                fuse(model); set_fused_double_backward(True)
    compiled, compiled_func     the whole step compiled: with .backward() inside, and by torch.func.grad
    fuse_compiled               fuse(model), compiled as a whole
    fuse_compiled_regions       compile_modules(fuse(model)): the repeated blocks compiled
    forward_over_reverse        one backward through the forward-mode derivative of the input gradient
    finite_difference           PyTorch without second derivatives
    finite_difference_compiled  likewise, of the compiled model

``natural`` (cross-entropy) and ``pgd3`` (adversarial training by PGD-3) are steps of stock PyTorch.

The floor is what `benchmarks.limits` makes of the ops of the fused step, counted as `benchmarks.traffic`
does once all steps are timed, all in the step's dtype, though autocast keeps some of them in float32: "of
floor" is its share of the time. TFLOP/s are of the matrix products and convolutions of stock's step, of the
same objective.

GiB are the most that a step needs beyond what is there before: on a GPU as its allocator has it; on a CPU,
with ``--memory``, the resident memory of a process that runs one step of that variant and nothing else. Of
variants that compile it would be the compiler's, and is left out.

ReLU gives way to a smooth activation. Everything but BatchNorm is in eval mode: dropout would give each
variant another gradient. Attention is timm's unfused one (``fused_attn`` off) before a variant changes the
model: PyTorch's fused kernels have no double backward. bfloat16 is autocast.
"""

import argparse
import copy
import functools
import itertools
import math
import multiprocessing
import re
import signal
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels._tf32 import allow_tf32
from gradnorm_kernels.training.config import TrainingError
from gradnorm_kernels.training.models import create_model, input_spec
from gradnorm_kernels.training.objectives import AdversarialLoss, GradientNormLoss, NaturalLoss, Objective
from gradnorm_kernels.training.objectives.gradient_norm import NORMS

from .limits import DTYPES, Limits
from .limits import measure as measure_limits
from .measure import (
    Budget,
    alternate,
    gradients,
    heading,
    line,
    option_parser,
    parse,
    relative_difference,
    start,
    summary,
    time_limit_option,
    wall_time,
    write_json,
)
from .report import comparison
from .traffic import PENALTY, Traffic, prepare

MODELS = ["swin_tiny_patch4_window7_224", "resnet50", "convnext_atto", "vit_tiny_patch16_224"]
# Relative difference from stock's gradients that rounding may cause. What bfloat16 hides, float32 shows. The
# L1 norm's gradient jumps where rounding changes the sign of a pixel's: of a ResNet-50's gradients, stock's
# own were up to 4e-3 off float64.
TOLERANCE = {"float32": 1e-2, "tf32": 5e-2, "bfloat16": 3e-1}
Step = Callable[[nn.Module, Tensor, Tensor], None]
Tensors = dict[str, Tensor]


def backward_step(objective: Objective, autocast: bool) -> Step:
    """Adds the objective's gradient to every parameter's ``grad``."""

    def step(model: nn.Module, images: Tensor, targets: Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = objective(model, images, targets, epoch=0).total
        loss.backward()

    return step


def functional_step(objective: GradientNormLoss, autocast: bool) -> Step:
    """The same through ``torch.func``; sets ``grad``."""

    # A transform may write only into its own arguments: a BatchNorm's statistics are among them, as copies.
    def cross_entropy(
        pixels: Tensor, model: nn.Module, parameters: Tensors, buffers: Tensors, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=autocast):
            logits = torch.func.functional_call(model, (parameters, buffers), (pixels,))
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return losses.sum(), losses

    def total(
        parameters: Tensors, buffers: Tensors, model: nn.Module, images: Tensor, targets: Tensor
    ) -> Tensor:
        slope = torch.func.grad(cross_entropy, has_aux=True)
        gradient, losses = slope(images, model, parameters, buffers, targets)
        return objective.total(losses, NORMS[objective.norm](gradient), epoch=0)

    def gradients(model: nn.Module, images: Tensor, targets: Tensor) -> Tensors:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.grad(total)(dict(model.named_parameters()), buffers, model, images, targets)

    compiled = torch.compile(gradients, fullgraph=True)

    def step(model: nn.Module, images: Tensor, targets: Tensor) -> None:
        found = compiled(model, images, targets)
        for name, parameter in model.named_parameters():
            parameter.grad = found[name]

    return step


def compiled_step(objective: Objective, autocast: bool) -> Step:
    """``backward_step`` compiled as one graph."""
    compiled = torch.compile(backward_step(objective, autocast), fullgraph=True)

    def step(model: nn.Module, images: Tensor, targets: Tensor) -> None:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            compiled(model, images, targets)

    return step


def switched_step(objective: Objective, autocast: bool) -> Step:
    return gk.set_fused_double_backward(True)(backward_step(objective, autocast))


@dataclass(frozen=True)
class Variant:
    """How a step is made, of what objective, and what is done to the model before."""

    step: Callable[[Any, bool], Step]
    objective: Objective
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model


FORWARD = GradientNormLoss(ramp_epochs=0, engine="forward_over_reverse")
DIFFERENCE = GradientNormLoss(ramp_epochs=0, engine="finite_difference")
VARIANTS = {
    "stock": Variant(backward_step, PENALTY),
    "fuse": Variant(backward_step, PENALTY, gk.fuse),
    "checkpoint": Variant(backward_step, PENALTY, lambda model: gk.checkpoint_modules(gk.fuse(model))),
    "switch": Variant(switched_step, PENALTY),
    "compiled": Variant(compiled_step, PENALTY),
    "compiled_func": Variant(functional_step, PENALTY),
    "fuse_compiled": Variant(compiled_step, PENALTY, gk.fuse),
    "fuse_compiled_regions": Variant(
        backward_step, PENALTY, lambda model: gk.compile_modules(gk.fuse(model))
    ),
    "forward_over_reverse": Variant(backward_step, FORWARD),
    "finite_difference": Variant(backward_step, DIFFERENCE),
    # Of first derivatives alone the compiled model is capable.
    "finite_difference_compiled": Variant(backward_step, DIFFERENCE, lambda model: torch.compile(model)),
    "natural": Variant(backward_step, NaturalLoss()),
    "pgd3": Variant(backward_step, AdversarialLoss(steps=3)),
}
DEFAULT_VARIANTS = ("stock", "fuse", "switch")
# Where these do not run, the package is at fault.
OURS = {"stock", "fuse", "checkpoint", "switch", "natural", "pgd3"}


def make_model(name: str, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the variants copy, and what a row says of it."""
    spec = input_spec(name, 3, args.img_size)
    model = create_model(name, spec, 1000)
    relus = [
        path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.ReLU)
    ]
    for path in relus:
        model.set_submodule(path, get_act_layer(args.act)())
    attentions = prepare(model.eval(), args.bn)
    # timm begins with 0 or 1e-6 where a branch ends, which would hide that branch from the comparison.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.to(args.device), {
        "model": name,
        "relu_replaced_by": args.act if relus else None,
        "batch_norm": args.bn,
        "unfused_attentions": attentions,
        "shape": [args.batch, 3, spec.size, spec.size],
    }


def draw(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, dict[str, Any]]:
    """A model, images and targets, the same in every process, and what a row says of the model."""
    torch.manual_seed(0)
    model, facts = make_model(name, args)
    images = torch.rand(facts["shape"], device=args.device)
    targets = torch.randint(0, 1000, (args.batch,), device=args.device)
    return model, images, targets, facts


def runner(
    variant: Variant, model: nn.Module, images: Tensor, targets: Tensor, dtype: str
) -> Callable[[], None]:
    """A run of the variant's step, for which ``model`` is changed."""
    step = variant.step(variant.objective, dtype == "bfloat16")
    return functools.partial(zeroed, step, variant.prepare(model), images, targets)


def peak_memory(run: Callable[[], None]) -> int:
    """Bytes that a run needs on the GPU beyond what is there before: activations, gradients, temporaries."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(name: str, variant: str, dtype: str, args: argparse.Namespace) -> int:
    """The same of the CPU's memory, as the kernel counts this process's, which has run nothing larger."""

    def resident(which: str) -> int:
        """``VmRSS``, now, or ``VmHWM``, the most so far: getrusage's begins at the parent process's."""
        (kibibytes,) = re.findall(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(kibibytes) * 1024

    model, images, targets, _ = draw(name, args)
    run = runner(VARIANTS[variant], model, images, targets, dtype)
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def in_new_process(function: Callable[..., int], *arguments: Any) -> int:
    """What ``function`` returns in a process that starts afresh."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


class _TooLong(BaseException):
    """No Exception, which a compiler would take for one of its own."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the block by an exception after so many seconds, if they are finite."""
    if math.isinf(seconds):
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def profile(run: Callable[[], None], device: str, most: int = 12) -> list[dict[str, Any]]:
    """The ops that take most of a run's time, without those that they call."""
    with torch.profiler.profile() as profiler:
        run()
    of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, of))
    return [
        {"op": event.key, "calls": event.count, "milliseconds": getattr(event, of) / 1e3}
        for event in events[:most]
    ]


def work(model: nn.Module, objective: Objective, shape: list[int], dtype: torch.dtype) -> Traffic:
    """The ops of a step, counted on meta tensors."""
    model = copy.deepcopy(model).to("meta", dtype)
    images = torch.empty(shape, device="meta", dtype=dtype)
    targets = torch.empty(shape[0], device="meta", dtype=torch.int64)
    with Traffic() as traffic:
        objective(model, images, targets, epoch=0).total.backward()
    return traffic


def measure(name: str, dtype: str, args: argparse.Namespace, defects: list[str]) -> list[dict[str, Any]]:
    """The rows of a model; what disagrees is added to ``defects``."""
    # What one model taught a compiler must not bear on the next.
    torch._dynamo.reset()
    model, images, targets, facts = draw(name, args)
    facts["dtype"] = dtype
    rows = {variant: {**facts, "variant": variant} for variant in args.variants}
    runs: dict[str, Callable[[], None]] = {}
    expected = None
    for name_of_variant, row in rows.items():
        variant = VARIANTS[name_of_variant]
        try:
            changed = copy.deepcopy(model)
            run = runner(variant, changed, images, targets, dtype)
            with within(args.first_step_limit):
                row["first_step_seconds"] = wall_time(run)
            if isinstance(variant.objective, GradientNormLoss):
                found = gradients(changed)
                if expected is not None:
                    row["gradient_difference"] = relative_difference(found, expected)
                expected = expected or found
            changed.zero_grad()
            if args.device == "cuda":
                row["peak_memory_bytes"] = peak_memory(run)
                changed.zero_grad()
            elif args.memory and "compiled" not in name_of_variant:
                row["peak_memory_bytes"] = in_new_process(resident_peak, name, name_of_variant, dtype, args)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        except _TooLong:
            row["error"] = f"first step not done in {args.first_step_limit:g} s"
            # What a compiler did not finish is of no use to the next one.
            torch._dynamo.reset()
        except Exception as error:  # whatever it is, the others are measured
            # A compiler that gives up, or an engine that refuses the precision, is a result too.
            row["error"] = f"refused: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            if name_of_variant in OURS:
                defects.append(f"{name} {name_of_variant} {dtype}: {error or type(error).__name__}")
        if "error" not in row and row.get("gradient_difference", 0.0) > TOLERANCE[dtype]:
            row["error"] = f"gradients are {row['gradient_difference']:.1e} off stock's"
            # The one variant that is not exact is reported; another is a defect.
            if variant.objective is not DIFFERENCE:
                defects.append(f"{name} {name_of_variant} {dtype}: {row['error']}")
        if "error" not in row:
            runs[name_of_variant] = run
    seconds = _timed(runs, rows, args.rounds)
    for variant, taken in seconds.items():
        rows[variant] |= summary(taken, seconds.get("stock"))
        rows[variant]["images_per_second"] = args.batch / statistics.median(taken)
        if args.profile:
            rows[variant]["profile"] = profile(runs[variant], args.device)
    return list(rows.values())


def add_floors(rows: list[dict[str, Any]], limits: Limits, args: argparse.Namespace) -> None:
    """Adds to the rows of one model and dtype what their ops could take: seconds of work, without a GPU."""
    name, dtype = rows[0]["model"], rows[0]["dtype"]
    model, *_ = draw(name, argparse.Namespace(**vars(args) | {"device": "meta"}))
    bounds: dict[Objective, tuple[int, float]] = {}
    for row in rows:
        if "milliseconds" not in row:
            continue
        objective = VARIANTS[row["variant"]].objective
        if objective not in bounds:
            stock = work(model, objective, row["shape"], DTYPES[dtype])
            fused = work(gk.fuse(copy.deepcopy(model)), objective, row["shape"], DTYPES[dtype])
            bounds[objective] = sum(flops for _, flops in stock.ops), limits.floor(fused.ops, dtype)
        flops, floor = bounds[objective]
        seconds = row["milliseconds"] / 1e3
        row["teraflops_per_second"] = flops / seconds / 1e12
        row["floor_milliseconds"] = floor * 1e3
        row["fraction_of_floor"] = floor / seconds


def _timed(
    runs: dict[str, Callable[[], None]], rows: dict[str, dict[str, Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds by variant; one that has no memory beside the others' models is a row that says so."""
    running = ""

    def clock(run: Callable[[], None]) -> float:
        nonlocal running
        running = next(name for name, candidate in runs.items() if candidate is run)
        return wall_time(run)

    while True:
        try:
            return alternate(runs, clock, rounds, warm_up=1)
        except torch.OutOfMemoryError:
            rows[running]["error"] = "out of memory"
            del runs[running]


def zeroed(step: Step, model: nn.Module, images: Tensor, targets: Tensor) -> None:
    model.zero_grad()
    step(model, images, targets)


COLUMNS = {
    "model": ("model", "28"),
    "dtype": ("dtype", "8"),
    "variant": ("variant", "26"),
    "ms": ("milliseconds", "9.1f"),
    "min": ("milliseconds_min", "9.1f"),
    "max": ("milliseconds_max", "9.1f"),
    "/ stock": ("time_over_stock", "8.3f"),
    "difference": ("gradient_difference", "10.1e"),
    "GiB": ("peak_memory_bytes", "6.2f", 2**-30),
}
FLOORS = {
    **{name: COLUMNS[name] for name in ("model", "dtype", "variant", "ms")},
    "of floor": ("fraction_of_floor", "8.2f"),
    "TFLOP/s": ("teraflops_per_second", "8.3f"),
}


def options() -> argparse.ArgumentParser:
    parser = option_parser(__doc__, rounds=5)
    option = parser.add_argument
    option("--model", nargs="+", default=MODELS, metavar="NAME", help="timm's; default: " + " ".join(MODELS))
    option("--batch", type=int, default=8, help="images a step; default: 8")
    option("--img-size", type=int, help="height and width in pixels; default: the model's own")
    option("--act", default="gelu", help="timm's name of what replaces ReLU; default: gelu")
    option("--bn", choices=["train", "eval"], default="train", help="default: train")
    option("--dtype", choices=TOLERANCE, nargs="+", default=["float32"], help="default: float32")
    time_limit_option(parser)
    limit = "leave a variant whose first step, of compilers, takes longer"
    option("--first-step-limit", type=float, default=math.inf, metavar="SECONDS", help=limit)
    option("--memory", action="store_true", help="on a CPU, also measure the peak of each variant's memory")
    option("--profile", action="store_true", help="also list the ops that take most of a step's time")
    default = " ".join(DEFAULT_VARIANTS)
    option("--variants", choices=VARIANTS, nargs="+", default=DEFAULT_VARIANTS, help=f"default: {default}")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = options()
    args = parse(parser, arguments)
    if args.batch < 1:
        parser.error(f"--batch: expected at least 1, got {args.batch}")
    if not args.first_step_limit > 0:
        parser.error(f"--first-step-limit: expected more than 0, got {args.first_step_limit:g}")
    try:
        get_act_layer(args.act)
    except (AssertionError, KeyError):
        parser.error(f"--act: timm knows none called {args.act}")
    if "tf32" in args.dtype and args.device == "cpu":
        parser.error("--dtype tf32: needs a GPU")
    # First, because the others are compared with it.
    args.variants = list(dict.fromkeys(["stock", *args.variants]))

    budget = Budget(args.time_limit)
    machine = start(args)
    limits = measure_limits(args.device, args.dtype)
    print(f"batch {args.batch}, {args.rounds} rounds, {limits}\n\n{heading(COLUMNS)}", flush=True)
    by_model: dict[tuple[str, str], list[dict[str, Any]]] = {}
    defects: list[str] = []

    def write() -> None:
        if args.json:
            rows = [row for measured in by_model.values() for row in measured]
            write_json(args.json, machine=machine, rounds=args.rounds, limits=asdict(limits), rows=rows)

    write()
    for dtype, name in itertools.product(args.dtype, args.model):
        if not budget.allows_another():
            print(f"{name} {dtype}: not measured within {args.time_limit:g} s")
            continue
        try:
            # Compiled graphs of an earlier run would make a first step of this one look fast. Where no
            # variant is compiled, kernels that are kept leave more of a time limit to the steps.
            compiles = any("compiled" in variant for variant in args.variants)
            cache = torch._inductor.utils.fresh_cache() if compiles else nullcontext()
            with allow_tf32(dtype == "tf32"), cache:
                measured = by_model[name, dtype] = measure(name, dtype, args, defects)
        except TrainingError as error:
            raise SystemExit(str(error)) from None
        print("\n".join(line(COLUMNS, row) for row in measured), flush=True)
        for row in measured:
            for op in row.get("profile", ()):
                print(f"    {row['variant']:26} {op['milliseconds']:9.1f} ms {op['calls']:6,} x {op['op']}")
        write()
    print(f"\n{heading(FLOORS)}")
    budget = Budget(budget.left())
    for measured in by_model.values():
        if budget.allows_another():
            add_floors(measured, limits, args)
            print("\n".join(line(FLOORS, row) for row in measured), flush=True)
            write()
    rows = [row for measured in by_model.values() for row in measured]
    print("\n" + comparison(rows))
    if defects:
        raise SystemExit("\n".join(defects))


if __name__ == "__main__":
    main()
