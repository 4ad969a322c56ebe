"""Times one op's forward, backward and double backward: stock PyTorch, fused, and torch.compile'd stock.

    python -m benchmarks.kernels --op gelu [--device cpu|cuda] [--json FILE]

The three alternate in one process. Before anything is timed, each one's results are compared with a float64
reference; a fused result whose error exceeds twice stock's stops the run. GB/s is the bytes that the kernel
must move (each input read once, each output written once) over the median time, whatever a variant really
moves; "of copy" relates it to a plain copy of the same tensor, timed in the same run.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gradnorm_kernels as gk

from .measure import alternate, describe_machine, median_ratio

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
PASSES = ("forward", "backward", "double_backward")
# Tensors of the input's size that each pass must read and write.
TENSORS_MOVED = {"forward": 2, "backward": 3, "double_backward": 5}


@dataclass(frozen=True)
class Op:
    """An elementwise op at one setting of its parameters."""

    name: str
    setting: str
    params: dict[str, Any]
    stock: Callable[..., Tensor]
    stock_backward: Callable[..., Tensor]

    def fused(self, suffix: str = "") -> Callable[..., Any]:
        return getattr(torch.ops.gradnorm_kernels, self.name + suffix).default

    def reference(self, suffix: str = "") -> Callable[..., Any]:
        return getattr(gk.reference, self.name + suffix)


OPS = [
    Op("gelu", approximate, {"approximate": approximate}, F.gelu, torch.ops.aten.gelu_backward)
    for approximate in ("none", "tanh")
]


def variants(op: Op, v: Tensor, g: Tensor, x: Tensor) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each pass, what to run for each variant."""

    def stock_double_backward(v: Tensor, g: Tensor, x: Tensor) -> Any:
        return torch.func.vjp(lambda g, x: op.stock_backward(g, x, **op.params), g, x)[1](v)

    # Recorded once, so that only the double backward is timed, through autograd as in training.
    g_leaf, x_leaf = g.clone().requires_grad_(), x.clone().requires_grad_()
    stock_graph = op.stock_backward(g_leaf, x_leaf, **op.params)
    fused_graph = op.fused("_backward")(g_leaf, x_leaf, **op.params)

    def double_backward(graph: Tensor) -> Any:
        return torch.autograd.grad(graph, (g_leaf, x_leaf), v, retain_graph=True)

    torch._dynamo.reset()
    compiled_forward = torch.compile(lambda x: op.stock(x, **op.params), fullgraph=True)
    compiled_backward = torch.compile(lambda g, x: op.stock_backward(g, x, **op.params), fullgraph=True)
    compiled_double_backward = torch.compile(stock_double_backward, fullgraph=True)
    return {
        "forward": {
            "stock": lambda: op.stock(x, **op.params),
            "fused": lambda: op.fused()(x, **op.params),
            "compiled": lambda: compiled_forward(x),
        },
        "backward": {
            "stock": lambda: op.stock_backward(g, x, **op.params),
            "fused": lambda: op.fused("_backward")(g, x, **op.params),
            "compiled": lambda: compiled_backward(g, x),
        },
        "double_backward": {
            "stock": lambda: double_backward(stock_graph),
            "fused": lambda: double_backward(fused_graph),
            "compiled": lambda: compiled_double_backward(v, g, x),
        },
    }


def errors(
    op: Op, runs: dict[str, Callable[[], Any]], which: str, v: Tensor, g: Tensor, x: Tensor
) -> dict[str, float]:
    """Largest absolute difference of each variant's results from the float64 reference."""
    suffix = "" if which == "forward" else f"_{which}"
    operands = {"forward": (x,), "backward": (g, x), "double_backward": (v, g, x)}[which]
    found = dict.fromkeys(runs, 0.0)
    results = {name: _as_tuple(run()) for name, run in runs.items()}
    # A slice at a time: the float64 reference of a GPU-sized tensor would not fit beside it.
    for start in range(0, x.shape[0], rows := max(1, 2**24 // x[0].numel())):
        part = slice(start, start + rows)
        exact = _as_tuple(op.reference(suffix)(*(t[part].double() for t in operands), **op.params))
        for name, result in results.items():
            for ours, wanted in zip(result, exact, strict=True):
                error = (ours[part].double() - wanted).abs().max().item()
                found[name] = max(found[name], error if math.isfinite(error) else math.inf)
    return found


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def measure(op: Op, shape: tuple[int, ...], dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    v, g, x = (torch.randn(shape, device=device).to(DTYPES[dtype]) for _ in range(3))
    rows = []
    for which, runs in variants(op, v, g, x).items():
        error = errors(op, runs, which, v, g, x)
        if error["fused"] > 2 * error["stock"] + torch.finfo(DTYPES[dtype]).tiny:
            raise SystemExit(f"{op.name} {op.setting} {which} {dtype}: fused is off by {error}")
        moved = TENSORS_MOVED[which] * x.numel() * x.element_size()
        seconds = alternate({**runs, "copy": x.clone}, device, rounds)
        copy_rate = 2 * x.numel() * x.element_size() / statistics.median(seconds.pop("copy"))
        for name, taken in seconds.items():
            rate = moved / statistics.median(taken)
            rows.append(
                {
                    "op": op.name,
                    "setting": op.setting,
                    "pass": which,
                    "dtype": dtype,
                    "shape": list(shape),
                    "variant": name,
                    "milliseconds": statistics.median(taken) * 1e3,
                    "milliseconds_min": min(taken) * 1e3,
                    "milliseconds_max": max(taken) * 1e3,
                    "bytes_to_move": moved,
                    "gigabytes_per_second": rate / 1e9,
                    "fraction_of_copy": rate / copy_rate,
                    "time_over_stock": median_ratio(taken, seconds["stock"]),
                    "max_error": error[name],
                }
            )
    return rows


HEADER = (
    f"{'op':10} {'pass':15} {'dtype':8} {'variant':8} "
    f"{'ms':>9} {'GB/s':>8} {'of copy':>8} {'/ stock':>8} {'error':>9}"
)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['op'] + ' ' + row['setting']:10} {row['pass']:15} {row['dtype']:8} {row['variant']:8} "
        f"{row['milliseconds']:9.3f} {row['gigabytes_per_second']:8.1f} {row['fraction_of_copy']:8.2f} "
        f"{row['time_over_stock']:8.3f} {row['max_error']:9.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=sorted({op.name for op in OPS}), default="gelu")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="default: float32 bfloat16")
    parser.add_argument("--shape", type=int, nargs="+", help="default: 64 197 768; on cuda 64 3136 512")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each variant")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine there")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = tuple(args.shape or ((64, 3136, 512) if device == "cuda" else (64, 197, 768)))
    dtypes = args.dtype or ["float32", "bfloat16"]

    machine = describe_machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"shape {shape}, {args.rounds} rounds\n\n{HEADER}")
    rows = []
    for op in (op for op in OPS if op.name == args.op):
        for dtype in dtypes:
            for row in measure(op, shape, dtype, device, args.rounds):
                rows.append(row)
                print(line(row), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"machine": machine, "rounds": args.rounds, "rows": rows}, indent=1) + "\n"
        )
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    main()
