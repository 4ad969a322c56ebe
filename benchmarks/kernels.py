"""Times each op's forward, backward and double backward: stock PyTorch, fused, and torch.compile'd stock.

    python -m benchmarks.kernels --op gelu layer_norm [--variants stock fused compiled] [--json FILE]

The variants alternate in one process, through autograd, as in gradient-norm training: the backward takes the
gradients of the activations only, the double backward differentiates them with respect to everything that
trains. Graphs are recorded once and not timed, except that *compiled* computes the double backward in one
compiled function of the leaves and the incoming gradients, which recomputes what it needs of the forward.

Before anything is timed, every variant is compared with stock in float64 (or plain ops, where stock is
wrong); a fused result whose error exceeds twice stock's, or an op that raises, is not timed, and the run
fails once all else is measured. GB/s is the bytes that the pass must move over the median time, whatever a
variant really moves; "of copy" relates it to a plain copy of the input, timed in the same run.
"""

import argparse
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gradnorm_kernels as gk

from .measure import (
    Budget,
    alternate,
    gpu_time,
    heading,
    line,
    option_parser,
    parse,
    start,
    summary,
    time_limit_option,
    wall_time,
    write_json,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")
VARIANTS = ("stock", "fused", "compiled")
# Copies of fewer bytes time the call.
LEAST_COPIED = 2**20
Shape = tuple[int, ...]
Leaves = dict[str, Tensor]


def _layer_norm_2d(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As timm's LayerNorm2d has it."""
    return F.layer_norm(input.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """As timm writes it where ``fused_attn`` is off: the fused kernels of PyTorch have no double backward."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _hardsigmoid(input: Tensor) -> Tensor:
    return F.relu6(input + 3) / 6


def _quick_gelu(input: Tensor) -> Tensor:
    return input * torch.sigmoid(1.702 * input)


def _squared_relu(input: Tensor) -> Tensor:
    return F.relu(input).square()


def _sin(input: Tensor, frequency: float) -> Tensor:
    return torch.sin(frequency * input)


def _swiglu(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """By plain ops, whose second derivative is right."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _batch_norm_act(*args: Any, activation: str, **options: Any) -> Tensor:
    return getattr(F, activation)(F.batch_norm(*args, **options))  # type: ignore[no-any-return]


# torch.nn.functional, with what it lacks, or cannot differentiate twice.
STOCK = SimpleNamespace(**vars(F))
STOCK.hardsigmoid, STOCK.layer_norm_2d, STOCK.swiglu = _hardsigmoid, _layer_norm_2d, _swiglu
STOCK.quick_gelu, STOCK.squared_relu, STOCK.sin = _quick_gelu, _squared_relu, _sin
STOCK.cos, STOCK.vector_norm, STOCK.weight_norm = torch.cos, torch.linalg.vector_norm, torch._weight_norm
STOCK.scaled_dot_product_attention, STOCK.batch_norm_act = _attention, _batch_norm_act
STOCK.cdist = torch.cdist
# What results are compared with.
EXACT = SimpleNamespace(**vars(STOCK))
EXACT.weight_norm = _weight_norm


@dataclass(frozen=True)
class Case:
    """An op at one setting.

    Attributes:
        op: its name in ``gradnorm_kernels.functional`` and :data:`STOCK`.
        setting: what sets it apart from the op's other cases.
        cpu, cuda: shapes of the input.
        options: arguments that are no tensors; or what makes them of the leaves.
        leaves: shape of the input to the shapes of all leaves, by name.
        inputs: leaves whose gradients the first backward takes.
        constants: leaves without gradients.
        saved: what the backward passes read of leaves and output.
        passes: how often they and the forward read an input, which is twice for a reduction over more of it
            than a processor can hold: again for what needs the result.
        straight: the second derivative is zero, and nothing flows back to the input.
        channels_last: the layout of the leaves with four dimensions.
        not_in_stock: dtypes that PyTorch has no kernel for.
    """

    op: str
    setting: str
    cpu: tuple[Shape, ...]
    cuda: tuple[Shape, ...]
    options: dict[str, Any] | Callable[[Leaves], dict[str, Any]] = field(default_factory=dict)
    leaves: Callable[[Shape], dict[str, Shape]] = lambda shape: {"input": shape}
    inputs: tuple[str, ...] = ("input",)
    constants: tuple[str, ...] = ()
    saved: tuple[str, ...] = ("input",)
    passes: int = 1
    straight: bool = False
    channels_last: bool = False
    not_in_stock: tuple[str, ...] = ()

    def call(self, functional: Any, leaves: Leaves) -> Tensor:
        """The op as found in either of the two."""
        options = self.options(leaves) if callable(self.options) else self.options
        return getattr(functional, self.op)(**leaves, **options)

    def bytes(self, which: str, leaves: Leaves, output: Tensor) -> int:
        """What a pass must read and write, without statistics per row or channel."""

        def size(*names: str, times: int = 1) -> int:
            sizes = {name: t.nbytes for name, t in (leaves | {"output": output}).items()}
            return sum(sizes[n] * (times if n in (*self.inputs, "output") else 1) for n in names)

        if which == "forward":
            return size(*leaves, times=self.passes) + size("output")
        if which == "backward":
            return size("output", *self.saved, times=self.passes) + size(*self.inputs)
        if self.straight:
            return size(*self.inputs, *self.saved, "output")
        differentiated = [name for name in self.saved if name not in self.constants]
        read = size(*self.inputs, "output", *self.saved, times=self.passes)
        return read + size("output", *differentiated)

    def make_leaves(self, shape: Shape, dtype: torch.dtype, device: str) -> Leaves:
        made = {name: torch.randn(size, device=device) for name, size in self.leaves(shape).items()}
        if "running_var" in made:
            made["running_var"].abs_().add_(0.5)
        if "grid" in made:  # of an image that is deformed a little
            pixels = F.affine_grid(torch.eye(len(shape) - 2, len(shape) - 1)[None], [1, *shape[1:]], False)
            made["grid"].mul_(0.02).add_(pixels.to(device))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return {
            name: leaf.to(dtype, memory_format=layout if leaf.ndim == 4 else torch.contiguous_format)
            for name, leaf in made.items()
        }


def _vectors(dim: int, *names: str) -> dict[str, Any]:
    """A case's leaves: the input, and vectors as long as its dimension ``dim``; the weight is saved."""
    return {
        "leaves": lambda shape: {"input": shape, **dict.fromkeys(names, (shape[dim],))},
        "saved": ("input", "weight"),
    }


def _filters(size: int, outputs: int | None = None) -> dict[str, Any]:
    """A case's leaves: the input, and square filters, depthwise without a number of ``outputs``."""

    def leaves(shape: Shape) -> dict[str, Shape]:
        filters = (outputs, shape[1]) if outputs else (shape[1], 1)
        return {"input": shape, "weight": (*filters, size, size), "bias": filters[:1]}

    return {
        "leaves": leaves,
        "options": lambda leaves: {
            "padding": size // 2,
            "groups": leaves["input"].shape[1] // leaves["weight"].shape[1],
        },
        "saved": ("weight",),
    }


def _heads(mask: bool) -> dict[str, Any]:
    """A case's leaves: query, key, value, and Swin's relative position bias, which trains."""
    tensors = ("query", "key", "value")
    return {
        "leaves": lambda shape: {
            **dict.fromkeys(tensors, shape),
            **({"attn_mask": (1, shape[1], shape[2], shape[2])} if mask else {}),
        },
        "inputs": tensors,
        "saved": (*tensors, "attn_mask") if mask else tensors,
    }


_ACTIVATIONS = {"cpu": ((64, 197, 768),), "cuda": ((64, 3136, 512),)}
_MAPS = {"cpu": ((8, 256, 56, 56),), "cuda": ((64, 256, 56, 56),)}  # ResNet-50
_WIDE = {"cpu": ((16, 128, 56, 56),), "cuda": ((64, 128, 56, 56),)}  # ConvNeXt-B
_TOKENS = {  # Swin-T and ViT-B; Swin-B and ViT-B
    "cpu": ((16, 56, 56, 96), (32, 197, 768)),
    "cuda": ((64, 56, 56, 128), (64, 197, 768)),
}
_SCORES = {  # likewise
    "cpu": ((512, 3, 49, 49), (8, 12, 197, 197)),
    "cuda": ((4096, 4, 49, 49), (64, 12, 197, 197)),
}
_LOGITS = {
    "cpu": ((1024, 1000), (128, 32000)),
    "cuda": ((8192, 1000), (8192, 32000)),
}  # ImageNet, a language model
_EMBEDDINGS = {"cpu": ((8192, 768),), "cuda": ((65536, 768),)}
_WINDOWS = {"cpu": ((512, 3, 49, 32),), "cuda": ((4096, 4, 49, 32),)}  # Swin-T, Swin-B
_SEQUENCES = {"cpu": ((4, 12, 197, 64),), "cuda": ((64, 12, 197, 64),)}  # ViT-B
_GRID: dict[str, Any] = {
    "leaves": lambda shape: {"input": shape, "grid": (shape[0], *shape[2:], len(shape) - 2)},
    "inputs": ("input", "grid"),
    "saved": ("input", "grid"),
    "options": {"align_corners": False},
}
_BATCH = {"running_mean": None, "running_var": None, "training": True}
_RUNNING = ("running_mean", "running_var")


@functools.cache
def _classes(rows: int, classes: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device) % classes


def _both_layouts(op: str, setting: str, **facts: Any) -> list[Case]:
    contiguous = Case(op, setting, **facts)
    return [contiguous, replace(contiguous, setting=f"{setting} channels_last", channels_last=True)]


CASES = [
    Case("gelu", "none", **_ACTIVATIONS, options={"approximate": "none"}),
    Case("gelu", "tanh", **_ACTIVATIONS, options={"approximate": "tanh"}),
    *(
        Case(op, "", **_ACTIVATIONS)
        for op in (
            *("silu", "mish", "softplus", "elu", "hardswish", "tanh", "sigmoid"),
            *("softsign", "logsigmoid", "quick_gelu", "squared_relu", "selu", "celu", "cos"),
        )
    ),
    Case("sin", "30 x", **_ACTIVATIONS, options={"frequency": 30.0}),
    *(Case(op, "", **_ACTIVATIONS, straight=True) for op in ("leaky_relu", "relu", "relu6", "hardsigmoid")),
    Case(
        "swiglu",
        "",
        **_ACTIVATIONS,
        leaves=lambda shape: {"gate": shape, "value": shape},
        inputs=("gate", "value"),
        saved=("gate", "value"),
    ),
    Case("softmax", "", **_SCORES, options={"dim": -1}, saved=("output",)),
    Case("log_softmax", "", **_LOGITS, options={"dim": -1}, saved=("output",)),
    Case(
        "cross_entropy",
        "classes",
        **_LOGITS,
        options=lambda leaves: (
            {"target": _classes(*leaves["input"].shape, leaves["input"].device), "reduction": "none"}
        ),
    ),
    Case("normalize", "", **_EMBEDDINGS, options={"dim": -1}),
    Case("vector_norm", "", **_EMBEDDINGS, options={"dim": -1}),
    *(
        Case(
            "cdist",
            setting,
            cpu=(cpu,),
            cuda=(cuda,),
            leaves=lambda shape: {"x1": shape, "x2": shape},
            inputs=("x1", "x2"),
            saved=("x1", "x2"),
            options={"p": p},
            not_in_stock=("float16", "bfloat16") if p == 1 else (),
        )
        for setting, p, cpu, cuda in (
            ("points", 2.0, (8, 512, 3), (64, 1024, 3)),
            ("features", 2.0, (1024, 64), (4096, 64)),
            ("absolute", 1.0, (512, 64), (4096, 64)),
        )
    ),
    Case(
        "weight_norm",
        "",
        cpu=((1024, 512, 3),),
        cuda=((4096, 4096, 3),),
        leaves=lambda shape: {"v": shape, "g": (shape[0], 1, 1)},
        inputs=("v", "g"),
        saved=("v", "g"),
        options={"dim": 0},
    ),
    Case(
        "layer_norm",
        "",
        **_TOKENS,
        **_vectors(-1, "weight", "bias"),
        options=lambda leaves: {"normalized_shape": leaves["weight"].shape, "eps": 1e-6},
    ),
    Case(
        "rms_norm",
        "",
        **_TOKENS | {"cpu": ((4096, 768),)},
        **_vectors(-1, "weight"),
        options=lambda leaves: {"normalized_shape": leaves["weight"].shape, "eps": 1e-6},
    ),
    Case("layer_norm_2d", "", **_WIDE, **_vectors(1, "weight", "bias"), options={"eps": 1e-6}),
    Case("group_norm", "32 groups", **_MAPS, **_vectors(1, "weight", "bias"), options={"num_groups": 32}),
    *_both_layouts("batch_norm", "train", **_MAPS, **_vectors(1, "weight", "bias"), options=_BATCH, passes=2),
    *_both_layouts(
        "batch_norm",
        "eval",
        **_MAPS,
        **_vectors(1, "weight", "bias", *_RUNNING) | {"saved": ("weight", "running_var")},
        constants=_RUNNING,
    ),
    *_both_layouts(
        "batch_norm_act",
        "silu train",
        **_MAPS,
        **_vectors(1, "weight", "bias") | {"saved": ("input", "weight", "bias")},
        options=_BATCH | {"activation": "silu"},
        passes=2,
    ),
    Case(
        "batch_norm_act",
        "silu eval",
        **_MAPS,
        **_vectors(1, "weight", "bias", *_RUNNING) | {"saved": ("weight", "bias", "input", *_RUNNING)},
        constants=_RUNNING,
        options={"activation": "silu"},
    ),
    Case("grid_sample", "2D", cpu=((8, 64, 56, 56),), cuda=((64, 64, 56, 56),), **_GRID),
    Case("grid_sample", "3D", cpu=((2, 16, 24, 24, 24),), cuda=((8, 32, 48, 48, 48),), **_GRID),
    Case("scaled_dot_product_attention", "window", **_WINDOWS, **_heads(mask=True)),
    Case("scaled_dot_product_attention", "vit", **_SEQUENCES, **_heads(mask=False)),
    *_both_layouts("conv2d", "depthwise 7x7", cpu=((8, 128, 56, 56),), cuda=_WIDE["cuda"], **_filters(7)),
    *_both_layouts("conv2d", "3x3", cpu=((8, 64, 56, 56),), cuda=((64, 64, 56, 56),), **_filters(3, 64)),
    *_both_layouts("conv2d", "1x1", **_MAPS, **_filters(1, 64)),
]
Pass = Callable[[], tuple[Tensor | None, ...]]
Passes = dict[str, Pass]


@dataclass(frozen=True)
class Problem:
    """A case with its operands."""

    case: Case
    leaves: Leaves
    grad_output: Tensor
    grad_grad_inputs: tuple[Tensor, ...]

    @staticmethod
    def draw(case: Case, shape: Shape, dtype: torch.dtype, device: str) -> "Problem":
        leaves = case.make_leaves(shape, dtype, device)
        with torch.no_grad():
            grad_output = torch.randn_like(case.call(STOCK, leaves))
        return Problem(case, leaves, grad_output, tuple(torch.randn_like(leaves[i]) for i in case.inputs))

    def double(self) -> "Problem":
        return Problem(
            self.case,
            {name: leaf.double() for name, leaf in self.leaves.items()},
            self.grad_output.double(),
            tuple(v.double() for v in self.grad_grad_inputs),
        )

    def passes(self, functional: Any) -> Passes:
        """What to run for each pass; the graphs are recorded here."""
        leaves, inputs, trained = self._recorded_leaves()
        output = self.case.call(functional, leaves)
        # In the layout of the output, as the next layer's gradient is.
        grad_output = torch.empty_like(output).copy_(self.grad_output).requires_grad_()
        grad_inputs = torch.autograd.grad(output, inputs, grad_output, create_graph=True)
        return {
            "forward": lambda: (self.case.call(functional, leaves),),
            "backward": lambda: torch.autograd.grad(output, inputs, grad_output.detach(), retain_graph=True),
            "double_backward": lambda: torch.autograd.grad(
                grad_inputs,
                (grad_output, *trained),
                self.grad_grad_inputs,
                retain_graph=True,
                allow_unused=True,
            ),
        }

    def compiled_passes(self) -> Passes:
        torch._dynamo.reset()
        call = torch.compile(lambda leaves: self.case.call(STOCK, leaves), fullgraph=True)
        leaves, inputs, _ = self._recorded_leaves()
        # Backwards that run more than once must not reuse the memory of what they read.
        with torch._functorch.config.patch(donated_buffer=False):
            output = call(leaves)
            torch.autograd.grad(output, inputs, self.grad_output, retain_graph=True)
        constants = {name: self.leaves[name] for name in self.case.constants}
        trained = {name: leaf for name, leaf in self.leaves.items() if name not in constants}

        def backward(grad_output: Tensor, trained: Leaves) -> tuple[Tensor, ...]:
            def forward(*inputs: Tensor) -> Tensor:
                given = trained | constants | dict(zip(self.case.inputs, inputs, strict=True))
                return self.case.call(STOCK, given)

            return torch.func.vjp(forward, *(trained[name] for name in self.case.inputs))[1](grad_output)

        @torch.compile(fullgraph=True)
        def double_backward(v: tuple[Tensor, ...], g: Tensor, trained: Leaves) -> tuple[Tensor, Leaves]:
            return torch.func.vjp(backward, g, trained)[1](v)

        def run_double_backward() -> tuple[Tensor, ...]:
            grad_grad_output, gradients = double_backward(self.grad_grad_inputs, self.grad_output, trained)
            return (grad_grad_output, *gradients.values())

        return {
            "forward": lambda: (call(leaves),),
            "backward": lambda: torch.autograd.grad(output, inputs, self.grad_output, retain_graph=True),
            "double_backward": run_double_backward,
        }

    def _recorded_leaves(self) -> tuple[Leaves, list[Tensor], list[Tensor]]:
        """Leaves of a new graph, and which of them the first and the second backward differentiate."""
        leaves = {
            name: leaf.detach().requires_grad_(name not in self.case.constants)
            for name, leaf in self.leaves.items()
        }
        trained = [leaf for name, leaf in leaves.items() if name not in self.case.constants]
        return leaves, [leaves[name] for name in self.case.inputs], trained


def allowed(stock: float, exact: Tensor | None, dtype: torch.dtype) -> float:
    """Twice stock's error, and a unit in the last place: without instructions for bfloat16, PyTorch's
    gradient of a convolution's weight, which our double backward takes, adds samples in bfloat16."""
    largest = 0.0 if exact is None or not exact.numel() else exact.abs().max().item()
    return 2 * stock + torch.finfo(dtype).eps * largest


def errors(run: Pass, exact: tuple[Tensor | None, ...]) -> tuple[float, ...]:
    """Largest absolute error of each result. No gradient counts as zero."""
    found = []
    for result, wanted in zip(run(), exact, strict=True):
        some = next((t for t in (result, wanted) if t is not None), torch.zeros(()))
        result, wanted = (torch.zeros_like(some) if t is None else t for t in (result, wanted))
        error = (result.detach().double() - wanted).abs().max().item()
        found.append(error if math.isfinite(error) else math.inf)
    return tuple(found)


def measure(
    case: Case, shape: Shape, dtype: str, device: str, variants: list[str], rounds: int
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    label = " ".join(filter(None, (case.op, case.setting, dtype)))
    kind = getattr(torch, dtype)
    try:
        problem = Problem.draw(case, shape, kind, device)
    except (IndexError, RuntimeError) as error:
        raise SystemExit(f"{label}: --shape {shape}: {error}") from error
    make = {
        "stock": lambda: problem.passes(STOCK),
        "fused": lambda: problem.passes(gk.functional),
        "compiled": problem.compiled_passes,
    }
    by_variant = {name: make[name]() for name in variants}
    exact = {which: run() for which, run in problem.double().passes(EXACT).items()}
    error = {
        which: {name: errors(passes[which], wanted) for name, passes in by_variant.items()}
        for which, wanted in exact.items()
    }
    for which, found in error.items():
        ours_and_stocks = zip(found.get("fused", found["stock"]), found["stock"], exact[which], strict=True)
        for ours, stocks, wanted in ours_and_stocks:
            if ours > allowed(stocks, wanted, kind):
                raise ArithmeticError(f"{which}: fused is off by {ours}, stock by {stocks}")

    del exact
    rows = []
    first = problem.leaves[case.inputs[0]]
    for which in by_variant["stock"]:
        moved = case.bytes(which, problem.leaves, problem.grad_output)
        runs = {name: passes[which] for name, passes in by_variant.items()} | {"copy": first.clone}
        seconds = alternate(runs, gpu_time if device == "cuda" else wall_time, rounds)
        copy_rate = 2 * first.nbytes / statistics.median(seconds.pop("copy"))
        for name, taken in seconds.items():
            rate = moved / statistics.median(taken)
            rows.append(
                {
                    "op": case.op,
                    "setting": case.setting,
                    "pass": which,
                    "dtype": dtype,
                    "shape": list(shape),
                    "variant": name,
                    "bytes_to_move": moved,
                    "gigabytes_per_second": rate / 1e9,
                    "fraction_of_copy": rate / copy_rate,
                    **summary(taken, seconds["stock"]),
                    "max_error": max(error[which][name]),
                }
            )
    return rows


def disturbed(measured: Mapping[int, Sequence[dict[str, Any]]]) -> dict[int, str]:
    """Where the slowest of some copies of the same bytes took more than twice as long as the fastest: the
    cases whose rows have one far from most, and what to say of each."""
    by_size: dict[tuple[str, int], list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for k, rows in measured.items():
        for row in rows:
            copied = math.prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize
            if copied >= LEAST_COPIED:
                by_size[row["dtype"], copied].append((k, row))
    found = {}
    for (dtype, copied), some in by_size.items():
        rates = [row["gigabytes_per_second"] / row["fraction_of_copy"] for _, row in some]
        usual = statistics.median(rates)
        if max(rates) <= 2 * min(rates):
            continue
        for rate, (k, row) in zip(rates, some, strict=True):
            if max(rate, usual) > math.sqrt(2) * min(rate, usual):
                name = " ".join(filter(None, (row["op"], row["setting"], row["pass"], str(row["shape"]))))
                copy = f"a copy of {copied:,} bytes of {dtype}"
                found[k] = f"{copy} ran at {rate:.1f} GB/s beside {name}, at {usual:.1f} GB/s beside most"
    return found


COLUMNS = {
    "pass": ("pass", "15"),
    "dtype": ("dtype", "8"),
    "variant": ("variant", "8"),
    "ms": ("milliseconds", "9.3f"),
    "GB/s": ("gigabytes_per_second", "8.1f"),
    "of copy": ("fraction_of_copy", "8.2f"),
    "/ stock": ("time_over_stock", "8.3f"),
    "error": ("max_error", "9.1e"),
}


def options() -> argparse.ArgumentParser:
    parser = option_parser(__doc__, rounds=20)
    ops = list(dict.fromkeys(case.op for case in CASES))
    several = functools.partial(parser.add_argument, nargs="+")
    several("--op", choices=[*ops, "all"], default=["gelu"], metavar="OP", help=", ".join(ops) + ", or all")
    several("--dtype", choices=DTYPES, default=["float32", "bfloat16"], help="default: float32 bfloat16")
    several("--shape", type=int, help="of the input, or of the query; default: a backbone's")
    several("--variants", choices=VARIANTS, default=["stock", "fused"], help="default: stock fused")
    time_limit_option(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = options()
    args = parse(parser, arguments)
    if "stock" not in args.variants:
        parser.error("--variants: stock is what the others are compared with")
    wanted = [case.op for case in CASES] if "all" in args.op else args.op
    # In the order of the options, of which a time limit leaves out the last.
    cases = [case for op in dict.fromkeys(wanted) for case in CASES if case.op == op]
    if "fused" in args.variants:
        missing = sorted({case.op for case in cases if not hasattr(gk.functional, case.op)})
        if missing and "all" not in args.op:
            parser.error(f"--op: gradnorm_kernels.functional has no {', '.join(missing)}")
        cases = [case for case in cases if case.op not in missing]

    budget = Budget(args.time_limit)
    machine = start(args)
    print(f"{args.rounds} rounds\n\n{heading(COLUMNS)}")
    todo = [
        (case, shape, dtype)
        for case in cases
        for shape in ([tuple(args.shape)] if args.shape else getattr(case, args.device))
        for dtype in args.dtype
        if dtype not in case.not_in_stock
    ]
    measured: dict[int, list[dict[str, Any]]] = {}
    defects: list[str] = []
    again = list(range(len(todo)))
    for attempt in range(3):
        for k in again:
            case, shape, dtype = todo[k]
            print(f"\n{case.op} {case.setting} {shape}")
            if not budget.allows_another():
                print(f"{dtype}: not measured within {args.time_limit:g} s", flush=True)
                continue
            try:
                measured[k] = measure(case, shape, dtype, args.device, args.variants, args.rounds)
            except Exception as error:  # whatever it is, the others are measured
                defects.append(f"{case.op} {case.setting} {dtype} {shape}: {error or type(error).__name__}")
                print(defects[-1], flush=True)
                continue
            print("\n".join(line(COLUMNS, row) for row in measured[k]), flush=True)
            if args.json:
                left_out = disturbed(measured)
                kept = [row for j, rows in measured.items() if j not in left_out for row in rows]
                write_json(args.json, machine=machine, rounds=args.rounds, rows=kept)
        disturbances = disturbed(measured) if args.json else {}
        for text in disturbances.values():
            print("not written:" if attempt == 2 else "measured again:", text)
        again = sorted(disturbances)
    if again or defects:
        raise SystemExit("\n".join(defects) or 1)


if __name__ == "__main__":
    main()
