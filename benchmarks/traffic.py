"""Memory traffic, kernel launches and peak memory of one gradient-norm step, counted on meta tensors.

No GPU, no data.

    python -m benchmarks.traffic --model swin_base_patch4_window7_224 --batch 64

A step is the forward pass, the input gradient with ``create_graph=True``, and the backward pass of
0.8 CE + 1.2 eps ||dCE/dx||_1. Every op that is not a view counts the tensors it reads and writes, in full,
and one launch. Ops of this package count in the same way, and those that make several passes over a tensor,
or several launches, count each (`SEVERAL_PASSES`), but not the few numbers a row or channel between them.

The peak is the most bytes that are alive at once: parameters, gradients, images, and what the ops return,
each storage from its creation to its release. What an op needs only while it runs is not seen.

The variant ``natural`` is stock's step of the cross-entropy alone, and ``checkpoint`` the fused model's with
`checkpoint_modules`. The variant ``compiled`` is stock's whole step as `torch.compile` would fuse it:
Inductor lowers the graph, plans its kernels as for a CPU, and counts each one's reads and writes itself;
nothing is generated or run. The graph has no phases and no peak. It takes minutes for a large model.
"""

import argparse
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import gradnorm_kernels as gk
from gradnorm_kernels.training.memory import HELD, PHASES, Memory
from gradnorm_kernels.training.objectives import GradientNormLoss, NaturalLoss

from .measure import Columns, describe_machine, heading, line, write_json

VARIANTS = ("natural", "stock", "fuse", "checkpoint", "switch", "compiled")
# Of a graph in which the phases are one.
WHOLE = "whole step"
# The objective of whole steps here and in `benchmarks.steps`, its norm at full weight from the start.
PENALTY = GradientNormLoss(ramp_epochs=0)

# Ops that only reserve memory, a view that is not declared as one, and a question about dtypes.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
_FREE |= {"promote_types"}

_TWICE = {"grad_grad_input": 2, "grad_output": 2, "input": 2}


def _attention_backward(arguments: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """One launch over windows; over longer sequences one of queries, one of keys, which each read all."""
    if "qkv" in arguments:
        tokens = arguments["qkv"].shape[-4]
    else:
        tokens = max(arguments["query"].shape[-2], arguments["key"].shape[-2])
    return (1, {}) if tokens <= 64 else (2, dict.fromkeys(arguments, 2))


# Ops of this package that make several launches on CUDA, or read an argument several times: of their
# arguments, the number of launches, and how often each argument is read where that is not once.
SEVERAL_PASSES: dict[str, Callable[[dict[str, Any]], tuple[int, dict[str, int]]]] = {
    # Sums of each channel, then the elements; in evaluation mode the elements and a sum of partial sums.
    **dict.fromkeys(
        (
            "gradnorm_kernels::batch_norm_act_backward",
            "gradnorm_kernels::batch_norm_act_double_backward",
            "gradnorm_kernels::batch_norm_double_backward",
        ),
        lambda a: (3, _TWICE) if a["training"] else (2, {}),
    ),
    # Rows, then a sum of partial sums for the weight.
    "gradnorm_kernels::layer_norm_double_backward": lambda a: (2, {}),
    "gradnorm_kernels::layer_norm_2d_backward": lambda a: (2, {}),
    # The points of one set, then of the other.
    "gradnorm_kernels::cdist_backward": lambda a: (2, {"grad_output": 2}),
    "gradnorm_kernels::cdist_double_backward": lambda a: (2, {"grad_output": 2}) if a["p"] == 2 else (1, {}),
    # Points, then channels of the input.
    "gradnorm_kernels::grid_sample_double_backward": lambda a: (
        2,
        {"grad_output": 2, "grid": 2, "grad_grad_grid": 2},
    ),
    # Groups that no block holds are read twice.
    "gradnorm_kernels::group_norm_double_backward": lambda a: (3, _TWICE),
    **{
        f"gradnorm_kernels::{attention}_{backward}": _attention_backward
        for attention in ("qkv_attention", "scaled_dot_product_attention")
        for backward in ("backward", "double_backward")
    },
}

# Matrix products of an attention's pass, each of the size of the first one, queries by keys. Scores are not
# kept, so the backward passes compute them again.
_MATRIX_PRODUCTS = {"attention": 2, "attention_backward": 5, "attention_double_backward": 12}


class Traffic(TorchDispatchMode):
    """Counts what runs inside it.

    Attributes:
        bytes, launches: per (phase, op).
        memory: what the ops returned.
        ops: of each op in turn, its bytes, and the floating-point operations of its matrix products and
            convolutions; a multiply-add counts 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[int, int]] = []
        self.memory = Memory()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()

    @property
    def phase(self) -> str:
        return self.memory.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self.memory.phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.memory.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        name = func._schema.name
        if func.is_view or name.removeprefix("aten::") in _FREE:
            return result
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        launches, reads = SEVERAL_PASSES[name](arguments) if name in SEVERAL_PASSES else (1, {})
        moved = sum(map(_size, tree_leaves(result)))
        for argument, value in arguments.items():
            moved += reads.get(argument, 1) * sum(map(_size, tree_leaves(value)))
        self.bytes[self.phase, name] += moved
        self.launches[self.phase, name] += launches
        self.ops.append((moved, _flops(func, arguments, args, kwargs, result)))
        return result


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _flops(func: Any, arguments: dict[str, Any], args: Any, kwargs: dict[str, Any], result: Any) -> int:
    namespace, _, op = func._schema.name.partition("::")
    if namespace == "gradnorm_kernels" and "attention" in op:
        # A softmax of scores has none.
        products = _MATRIX_PRODUCTS.get(op[op.index("attention") :], 0)
        if not products:
            return 0
        if "qkv" in arguments:
            qkv = arguments["qkv"]
            return 2 * products * qkv.numel() // 3 * qkv.shape[-4]
        return 2 * products * arguments["query"].numel() * arguments["key"].shape[-2]
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


class _Counted(Exception):  # noqa: N818  # it ends a compilation that has done its work
    pass


def compiled_traffic(step: Callable[..., object], *arguments: Any) -> Traffic:
    """What Inductor plans for ``step``, which it does not run: the bytes that each kernel would move.

    Raises:
        torch._dynamo.exc.TorchDynamoException: if ``step`` is not one graph.
    """
    traffic = Traffic()

    def count(graph: GraphLowering) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if moved := node.get_read_write_buffers_sizes():
                # What is not generated is one of PyTorch's own kernels.
                op = getattr(node.node, "op_overload", None)
                name = op._schema.name if isinstance(op, torch._ops.OpOverload) else "inductor::generated"
                traffic.bytes[WHOLE, name] += moved
                traffic.launches[WHOLE, name] += 1
        raise _Counted

    torch._dynamo.reset()
    with (
        mock.patch.object(GraphLowering, "compile_to_module", count),
        torch._dynamo.config.patch(trace_autograd_ops=True),
        # A graph in these caches would not be lowered again.
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        try:
            torch.compile(step, fullgraph=True)(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Counted):
                raise
    return traffic


Begin = Callable[[str], None]


def natural_step(
    model: nn.Module, images: Tensor, targets: Tensor, begin: Begin = lambda phase: None
) -> None:
    """Adds the cross-entropy's gradient to the parameters' ``grad``; ``begin`` hears of each phase."""
    forward, _, backward = PHASES
    begin(forward)
    loss = NaturalLoss()(model, images, targets).total
    begin(backward)
    loss.backward()


def gradient_norm_step(
    model: nn.Module, images: Tensor, targets: Tensor, begin: Begin = lambda phase: None
) -> None:
    """Adds the objective's gradient to the parameters' ``grad``; ``begin`` hears of each phase."""
    forward, input_gradient, backward = PHASES
    begin(forward)
    batch = PENALTY.run(model, images, targets, epoch=0)
    begin(input_gradient)
    norms = PENALTY.norms(batch)
    begin(backward)
    PENALTY.total(batch.cross_entropy, norms, epoch=0).backward()


def prepare(model: nn.Module, bn: str) -> int:
    """Puts BatchNorm in the mode ``bn``, and counts attentions, which are unfused from now on.

    PyTorch's fused ones have no double backward.
    """
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in attentions:
        module.fused_attn = False
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(bn == "train")
    return len(attentions)


def count(
    name: str,
    batch: int,
    variant: str = "stock",
    bn: str = "train",
    act: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Traffic:
    """Traffic and memory of one step of the timm model ``name``.

    Args:
        batch: images.
        variant: one of `VARIANTS`.
        bn: ``"train"`` or ``"eval"``, the mode of BatchNorm.
        act: timm's name of an activation to build the model with.
    """
    # A compiler asks for tensors of a device that it compiles for.
    device = "cpu" if variant == "compiled" else "meta"
    with torch.device(device):
        model = timm.create_model(name, **({"act_layer": act} if act else {})).to(dtype)
    prepare(model, bn)
    if variant in ("fuse", "checkpoint"):
        gk.fuse(model)
    if variant == "checkpoint":
        gk.checkpoint_modules(model)
    size = model.pretrained_cfg["input_size"]
    images = torch.empty(batch, *size, device=device, dtype=dtype)
    targets = torch.empty(batch, device=device, dtype=torch.long)
    if variant == "compiled":
        return compiled_traffic(gradient_norm_step, model, images, targets)
    step = natural_step if variant == "natural" else gradient_norm_step
    with gk.set_fused_double_backward(variant == "switch"), Traffic() as traffic:
        traffic.memory.hold([*model.parameters(), *model.buffers(), images, targets])
        step(model, images, targets, functools.partial(setattr, traffic, "phase"))
        traffic.memory.hold(p.grad for p in model.parameters() if p.grad is not None)
    return traffic


def table(counts: dict[str, Traffic], top: int) -> str:
    """Per phase and in all, then the ops that move most, by variant."""

    def row(label: str, belongs: Callable[[tuple[str, str]], bool]) -> str:
        cells = {"": label}
        for name, traffic in counts.items():
            for what in ("bytes", "launches"):
                number = sum(n for key, n in getattr(traffic, what).items() if belongs(key))
                cells[f"{name} {what}"] = number or None
        return line(columns, cells)

    columns: Columns = {"": ("", "44")}
    for name in counts:
        columns[f"{name}, GB"] = (f"{name} bytes", "12.1f", 1e-9)
        columns[f"{name}, launches"] = (f"{name} launches", "18,")
    phases = [row(phase, lambda key, phase=phase: key[0] == phase) for phase in PHASES]
    by_op: Counter[str] = Counter()
    for traffic in counts.values():
        for (_, op), moved in traffic.bytes.items():
            by_op[op] += moved
    ops = [row(op, lambda key, op=op: key[1] == op) for op, _ in by_op.most_common(top)]
    return "\n".join([heading(columns), *phases, row("step", lambda key: True), "", *ops])


def memory_table(counts: dict[str, Traffic]) -> str:
    """Bytes alive after each phase but the last, the most at once, and of what kind these are, by variant."""
    columns: Columns = {"alive, GiB": ("", "44")} | {name: (name, "12.2f", 2**-30) for name in counts}
    peaks = {name: traffic.memory.peak() for name, traffic in counts.items()}
    lines = [heading(columns)]
    for phase in PHASES[:-1]:
        alive = {name: traffic.memory.after(phase) for name, traffic in counts.items()}
        lines.append(line(columns, {"": f"after {phase}"} | alive))
    lines.append(line(columns, {"": "peak"} | {name: peak.total() for name, peak in peaks.items()}))
    for kind in (HELD, *PHASES):
        lines.append(line(columns, {"": f"    {kind}"} | {name: peak[kind] for name, peak in peaks.items()}))
    return "\n".join(lines)


def ratios(stock: Traffic, fused: Traffic) -> tuple[float, float, float]:
    """Fused over stock: bytes, launches, peak memory."""
    return (
        fused.bytes.total() / stock.bytes.total(),
        fused.launches.total() / stock.launches.total(),
        fused.memory.peak().total() / stock.memory.peak().total(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", required=True, help="a timm model")
    option("--batch", type=int, default=64, help="images a step; default: 64")
    option("--bn", choices=["train", "eval"], default="train", help="mode of BatchNorm")
    option("--act", help="timm's name of an activation to build the model with, such as gelu")
    option("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    option("--variants", choices=VARIANTS, nargs="+", default=["stock", "fuse"])
    option("--top", type=int, default=25, help="ops listed; default: 25")
    option("--json", type=Path, metavar="FILE", help="also write the bytes and launches there")
    option("--memory-json", type=Path, metavar="FILE", help="also write the memory there")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch: expected at least 1, got {args.batch}")
    options = {"bn": args.bn, "act": args.act, "dtype": getattr(torch, args.dtype)}
    counts = {v: count(args.model, args.batch, variant=v, **options) for v in args.variants}
    print(f"{args.model}, batch {args.batch}, {args.dtype}, BatchNorm in {args.bn} mode\n")
    print(table(counts, args.top))
    run = {variant: traffic for variant, traffic in counts.items() if variant != "compiled"}
    print("\n" + memory_table(run))
    if "stock" in counts:
        for variant in [variant for variant in counts if variant != "stock"]:
            moved, launches, peak = ratios(counts["stock"], counts[variant])
            alive = f", peak memory {peak:.3f}" * (variant in run)
            print(f"\n{variant} / stock: bytes {moved:.3f}, launches {launches:.3f}{alive}")
    rows = [
        {"variant": variant, "phase": key[0], "op": key[1], "bytes": n, "launches": traffic.launches[key]}
        for variant, traffic in counts.items()
        for key, n in traffic.bytes.items()
    ]
    alive_rows = [
        {
            "variant": variant,
            "bytes_after": {phase: traffic.memory.after(phase) for phase in PHASES[:-1]},
            "bytes_at_peak": {kind: peak[kind] for kind in (HELD, *PHASES)},
        }
        for variant, traffic in run.items()
        for peak in [traffic.memory.peak()]
    ]
    setting = {key: getattr(args, key) for key in ("model", "batch", "bn", "act", "dtype")}
    for path, found in ((args.json, rows), (args.memory_json, alive_rows)):
        if path:
            write_json(path, machine=describe_machine("cpu"), **setting, rows=found)


if __name__ == "__main__":
    main()
