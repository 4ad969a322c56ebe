"""Times each op's forward, backward and double backward: stock PyTorch, fused, and torch.compile'd stock.

    python -m benchmarks.kernels --op gelu layer_norm [--variants stock fused compiled] [--json FILE]

The variants alternate in one process, through autograd, as in gradient-norm training: the backward takes the
gradients of the activations only, the double backward differentiates them with respect to everything that
trains. Graphs are recorded once and not timed, except that *compiled* computes the double backward in one
compiled function of the leaves and the incoming gradients, which recomputes what it needs of the forward.

Before anything is timed, every variant is compared with stock in float64; a fused result whose error exceeds
twice stock's stops the run. GB/s is the bytes that the pass must move over the median time, whatever a
variant really moves; "of copy" relates it to a plain copy of the input, timed in the same run.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gradnorm_kernels as gk

from .measure import (
    alternate,
    describe_machine,
    gpu_time,
    option_parser,
    parse,
    summary,
    wall_time,
    write_json,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
VARIANTS = ("stock", "fused", "compiled")
Shape = tuple[int, ...]
Leaves = dict[str, Tensor]


def _layer_norm_2d(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As timm's LayerNorm2d has it."""
    return F.layer_norm(input.permute(0, 2, 3, 1), weight.shape, weight, bias, eps).permute(0, 3, 1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float) -> Tensor:
    """As timm writes it where ``fused_attn`` is off: the fused kernels of PyTorch have no double backward."""
    scores = query * scale @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _hardsigmoid(input: Tensor) -> Tensor:
    return F.relu6(input + 3) / 6


# torch.nn.functional, with what it lacks, or cannot differentiate twice.
STOCK = SimpleNamespace(
    **vars(F)
    | {
        "hardsigmoid": _hardsigmoid,
        "layer_norm_2d": _layer_norm_2d,
        "scaled_dot_product_attention": _attention,
    }
)


@dataclass(frozen=True)
class Traffic:
    """The tensors that each pass must read and write, as ``"input weight -> output"``.

    ``grad_<leaf>`` has the leaf's size, and so has ``grad_grad_<leaf>``. ``2*`` marks a tensor read twice:
    for a reduction over more of it than a processor can hold, and again for what needs the result.
    Statistics per row or channel are left out.
    """

    forward: str
    backward: str
    double_backward: str

    def bytes(self, which: str, leaves: Leaves, output: Tensor) -> int:
        moved = 0
        for term in getattr(self, which).replace("->", " ").split():
            count, _, name = term.rpartition("*")
            while name not in leaves and name != "output":
                name = name.removeprefix("grad_")
            moved += int(count or 1) * (leaves | {"output": output})[name].nbytes
        return moved


@dataclass(frozen=True)
class Case:
    """An op at one setting.

    Attributes:
        op: its name in ``gradnorm_kernels.functional`` and :data:`STOCK`.
        setting: what sets it apart from the op's other cases.
        call: ``call(functional, **leaves)`` calls the op as found in either of the two.
        traffic: the bytes.
        cpu, cuda: shapes of the input, taken from the models named there.
        leaves: shape of the input to the shapes of all leaves, by name.
        inputs: leaves whose gradients the first backward takes.
        constants: leaves without gradients.
        channels_last: the layout of the leaves with four dimensions.
    """

    op: str
    setting: str
    call: Callable[..., Tensor]
    traffic: Traffic
    cpu: tuple[Shape, ...]
    cuda: tuple[Shape, ...]
    leaves: Callable[[Shape], dict[str, Shape]] = lambda shape: {"input": shape}
    inputs: tuple[str, ...] = ("input",)
    constants: tuple[str, ...] = ()
    channels_last: bool = False

    def make_leaves(self, shape: Shape, dtype: torch.dtype, device: str) -> Leaves:
        made = {name: torch.randn(size, device=device) for name, size in self.leaves(shape).items()}
        if "running_var" in made:
            made["running_var"].abs_().add_(0.5)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return {
            name: leaf.to(dtype, memory_format=layout if leaf.ndim == 4 else torch.contiguous_format)
            for name, leaf in made.items()
        }


def _vectors(dim: int, *names: str) -> Callable[[Shape], dict[str, Shape]]:
    """The input, and vectors as long as its dimension ``dim``."""
    return lambda shape: {"input": shape, **dict.fromkeys(names, (shape[dim],))}


def _elementwise() -> Iterator[Case]:
    curved = Traffic(
        "input -> output",
        "grad_output input -> grad_input",
        "grad_grad_input grad_output input -> grad_grad_output grad_input",
    )
    # The second derivative is zero: nothing flows back to the input.
    straight = Traffic(curved.forward, curved.backward, "grad_grad_input input -> grad_grad_output")
    for op, setting, options, traffic in (
        ("gelu", "none", {"approximate": "none"}, curved),
        ("gelu", "tanh", {"approximate": "tanh"}, curved),
        ("silu", "", {}, curved),
        ("mish", "", {}, curved),
        ("softplus", "", {}, curved),
        ("elu", "", {}, curved),
        ("hardswish", "", {}, curved),
        ("tanh", "", {}, curved),
        ("sigmoid", "", {}, curved),
        ("leaky_relu", "", {}, straight),
        ("relu", "", {}, straight),
        ("relu6", "", {}, straight),
        ("hardsigmoid", "", {}, straight),
    ):
        yield Case(
            op,
            setting,
            lambda f, input, op=op, options=options: getattr(f, op)(input, **options),
            traffic,
            cpu=((64, 197, 768),),
            cuda=((64, 3136, 512),),
        )


def _rows() -> Iterator[Case]:
    """Ops whose reductions run over one row or group each, which a processor can hold."""
    yield Case(
        "softmax",
        "",
        lambda f, input: f.softmax(input, dim=-1),
        Traffic(
            "input -> output",
            "grad_output output -> grad_input",
            "grad_grad_input grad_output output -> grad_grad_output grad_input",
        ),
        cpu=((512, 3, 49, 49), (8, 12, 197, 197)),  # Swin-T, ViT-B
        cuda=((4096, 4, 49, 49), (64, 12, 197, 197)),  # Swin-B, ViT-B
    )
    norm = Traffic(
        "input weight bias -> output",
        "grad_output input weight -> grad_input",
        "grad_grad_input grad_output input weight -> grad_grad_output grad_input grad_weight",
    )
    yield Case(
        "layer_norm",
        "",
        lambda f, input, weight, bias: f.layer_norm(input, weight.shape, weight, bias, 1e-6),
        norm,
        cpu=((16, 56, 56, 96), (32, 197, 768)),  # Swin-T, ViT-B
        cuda=((64, 56, 56, 128), (64, 197, 768)),  # Swin-B, ViT-B
        leaves=_vectors(-1, "weight", "bias"),
    )
    yield Case(
        "layer_norm_2d",
        "",
        lambda f, input, weight, bias: f.layer_norm_2d(input, weight, bias, 1e-6),
        norm,
        cpu=((16, 128, 56, 56),),  # ConvNeXt-B
        cuda=((64, 128, 56, 56),),
        leaves=_vectors(1, "weight", "bias"),
    )
    yield Case(
        "group_norm",
        "32 groups",
        lambda f, input, weight, bias: f.group_norm(input, 32, weight, bias, 1e-5),
        norm,
        cpu=((8, 256, 56, 56),),  # ResNet-50
        cuda=((64, 256, 56, 56),),
        leaves=_vectors(1, "weight", "bias"),
    )


def _batch_norm() -> Iterator[Case]:
    train = Traffic(
        "2*input weight bias -> output",
        "2*grad_output 2*input weight -> grad_input",
        "2*grad_grad_input 2*grad_output 2*input weight -> grad_grad_output grad_input grad_weight",
    )
    evaluate = Traffic(
        "input weight bias running_mean running_var -> output",
        "grad_output weight running_var -> grad_input",
        "grad_grad_input grad_output weight running_var -> grad_grad_output grad_weight",
    )
    shapes = {"cpu": ((8, 256, 56, 56),), "cuda": ((64, 256, 56, 56),)}  # ResNet-50
    for layout in ("", " channels_last"):
        yield Case(
            "batch_norm",
            "train" + layout,
            lambda f, input, weight, bias: f.batch_norm(input, None, None, weight, bias, training=True),
            train,
            **shapes,
            leaves=_vectors(1, "weight", "bias"),
            channels_last=bool(layout),
        )
        yield Case(
            "batch_norm",
            "eval" + layout,
            lambda f, input, weight, bias, running_mean, running_var: f.batch_norm(
                input, running_mean, running_var, weight, bias
            ),
            evaluate,
            **shapes,
            leaves=_vectors(1, "weight", "bias", "running_mean", "running_var"),
            constants=("running_mean", "running_var"),
            channels_last=bool(layout),
        )


def _attentions() -> Iterator[Case]:
    for setting, mask, cpu, cuda in (
        ("window", " attn_mask", (512, 3, 49, 32), (4096, 4, 49, 32)),  # Swin-T, Swin-B
        ("vit", "", (4, 12, 197, 64), (64, 12, 197, 64)),  # ViT-B
    ):
        yield Case(
            "scaled_dot_product_attention",
            setting,
            lambda f, query, key, value, attn_mask=None: f.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, scale=query.shape[-1] ** -0.5
            ),
            Traffic(
                f"query key value{mask} -> output",
                f"grad_output query key value{mask} -> grad_query grad_key grad_value",
                f"grad_grad_query grad_grad_key grad_grad_value grad_output query key value{mask}"
                f" -> grad_grad_output grad_query grad_key grad_value{mask.replace(' ', ' grad_')}",
            ),
            cpu=(cpu,),
            cuda=(cuda,),
            leaves=lambda shape, mask=mask: {
                **dict.fromkeys(("query", "key", "value"), shape),
                # Swin's relative position bias, which trains.
                **({"attn_mask": (1, shape[1], shape[2], shape[2])} if mask else {}),
            },
            inputs=("query", "key", "value"),
        )


def _convolutions() -> Iterator[Case]:
    def depthwise(shape: Shape) -> dict[str, Shape]:
        return {"input": shape, "weight": (shape[1], 1, 7, 7), "bias": (shape[1],)}

    def dense(size: int) -> Callable[[Shape], dict[str, Shape]]:
        return lambda shape: {"input": shape, "weight": (64, shape[1], size, size), "bias": (64,)}

    for setting, leaves, channels in (
        ("depthwise 7x7", depthwise, 128),  # ConvNeXt-B
        ("3x3", dense(3), 64),  # ResNet-50
        ("1x1", dense(1), 256),  # ResNet-50
    ):
        for layout in ("", " channels_last"):
            yield Case(
                "conv2d",
                setting + layout,
                lambda f, input, weight, bias: f.conv2d(
                    input,
                    weight,
                    bias,
                    padding=weight.shape[-1] // 2,
                    groups=input.shape[1] // weight.shape[1],
                ),
                Traffic(
                    "input weight bias -> output",
                    "grad_output weight -> grad_input",
                    "grad_grad_input grad_output weight -> grad_grad_output grad_weight",
                ),
                cpu=((8, channels, 56, 56),),
                cuda=((64, channels, 56, 56),),
                leaves=leaves,
                channels_last=bool(layout),
            )


CASES = [*_elementwise(), *_rows(), *_batch_norm(), *_attentions(), *_convolutions()]
Passes = dict[str, Callable[[], tuple[Tensor | None, ...]]]


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
            grad_output = torch.randn_like(case.call(STOCK, **leaves))
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
        output = self.case.call(functional, **leaves)
        # In the layout of the output, as the next layer's gradient is.
        grad_output = torch.empty_like(output).copy_(self.grad_output).requires_grad_()
        grad_inputs = torch.autograd.grad(output, inputs, grad_output, create_graph=True)
        return {
            "forward": lambda: (self.case.call(functional, **leaves),),
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
        call = torch.compile(lambda **leaves: self.case.call(STOCK, **leaves), fullgraph=True)
        leaves, inputs, _ = self._recorded_leaves()
        # Backwards that run more than once must not reuse the memory of what they read.
        with torch._functorch.config.patch(donated_buffer=False):
            output = call(**leaves)
            torch.autograd.grad(output, inputs, self.grad_output, retain_graph=True)
        constants = {name: self.leaves[name] for name in self.case.constants}
        trained = {name: leaf for name, leaf in self.leaves.items() if name not in constants}

        def backward(grad_output: Tensor, trained: Leaves) -> tuple[Tensor, ...]:
            def forward(*inputs: Tensor) -> Tensor:
                given = trained | constants | dict(zip(self.case.inputs, inputs, strict=True))
                return self.case.call(STOCK, **given)

            return torch.func.vjp(forward, *(trained[name] for name in self.case.inputs))[1](grad_output)

        @torch.compile(fullgraph=True)
        def double_backward(v: tuple[Tensor, ...], g: Tensor, trained: Leaves) -> tuple[Tensor, Leaves]:
            return torch.func.vjp(backward, g, trained)[1](v)

        def run_double_backward() -> tuple[Tensor, ...]:
            grad_grad_output, gradients = double_backward(self.grad_grad_inputs, self.grad_output, trained)
            return (grad_grad_output, *gradients.values())

        return {
            "forward": lambda: (call(**leaves),),
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


def errors(
    run: Callable[[], tuple[Tensor | None, ...]], exact: tuple[Tensor | None, ...]
) -> tuple[float, ...]:
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
    try:
        problem = Problem.draw(case, shape, DTYPES[dtype], device)
    except (IndexError, RuntimeError) as error:
        raise SystemExit(f"{label}: --shape {shape}: {error}") from error
    make = {
        "stock": lambda: problem.passes(STOCK),
        "fused": lambda: problem.passes(gk.functional),
        "compiled": problem.compiled_passes,
    }
    by_variant = {name: make[name]() for name in variants}
    by_pass = {
        which: {name: passes[which] for name, passes in by_variant.items()} for which in vars(case.traffic)
    }
    exact = {which: run() for which, run in problem.double().passes(STOCK).items()}
    error = {
        which: {name: errors(run, exact[which]) for name, run in runs.items()}
        for which, runs in by_pass.items()
    }
    del exact
    for which, found in error.items():
        for ours, stocks in zip(found.get("fused", found["stock"]), found["stock"], strict=True):
            if ours > 2 * stocks + torch.finfo(DTYPES[dtype]).tiny:
                raise SystemExit(f"{label} {which}: fused is off by {ours}, stock by {stocks}")

    rows = []
    first = problem.leaves[case.inputs[0]]
    for which, runs in by_pass.items():
        moved = case.traffic.bytes(which, problem.leaves, problem.grad_output)
        seconds = alternate(
            {**runs, "copy": first.clone}, gpu_time if device == "cuda" else wall_time, rounds
        )
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


HEADER = (
    f"{'pass':15} {'dtype':8} {'variant':8} {'ms':>9} {'GB/s':>8} {'of copy':>8} {'/ stock':>8} {'error':>9}"
)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['pass']:15} {row['dtype']:8} {row['variant']:8} "
        f"{row['milliseconds']:9.3f} {row['gigabytes_per_second']:8.1f} {row['fraction_of_copy']:8.2f} "
        f"{row['time_over_stock']:8.3f} {row['max_error']:9.1e}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = option_parser(__doc__, rounds=20)
    ops = list(dict.fromkeys(case.op for case in CASES))
    parser.add_argument(
        "--op",
        choices=[*ops, "all"],
        nargs="+",
        default=["gelu"],
        metavar="OP",
        help=", ".join(ops) + ", or all; default: gelu",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["float32", "bfloat16"],
        help="default: float32 bfloat16",
    )
    parser.add_argument(
        "--shape", type=int, nargs="+", help="of the input, or of the query; default: a backbone's"
    )
    parser.add_argument(
        "--variants",
        choices=VARIANTS,
        nargs="+",
        default=["stock", "fused"],
        help="default: stock fused; compiling is slow",
    )
    args = parse(parser, arguments)
    if "stock" not in args.variants:
        parser.error("--variants: stock is what the others are compared with")
    cases = [case for case in CASES if case.op in args.op or "all" in args.op]
    if "fused" in args.variants:
        missing = sorted({case.op for case in cases if not hasattr(gk.functional, case.op)})
        if missing and "all" not in args.op:
            parser.error(f"--op: gradnorm_kernels.functional has no {', '.join(missing)}")
        cases = [case for case in cases if case.op not in missing]

    machine = describe_machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{args.rounds} rounds\n\n{HEADER}")
    rows = []
    for case in cases:
        for shape in [tuple(args.shape)] if args.shape else getattr(case, args.device):
            print(f"\n{case.op} {case.setting} {shape}")
            for dtype in args.dtype:
                for row in measure(case, shape, dtype, args.device, args.variants, args.rounds):
                    rows.append(row)
                    print(line(row), flush=True)
    if args.json:
        write_json(args.json, machine, args.rounds, rows)


if __name__ == "__main__":
    main()
