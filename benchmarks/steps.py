"""Times one whole step of gradient-norm training: stock PyTorch, a fused model, and the switch.

    python -m benchmarks.steps --model swin_tiny_patch4_window7_224 resnet50 --batch 8 [--json FILE]

A step is the forward, the gradient of the cross-entropy with respect to the pixels, and the backward into
every parameter's ``.grad``; the objective is 0.8 CE + 1.2 * epsilon * ||dCE/dx||_1. The variants are copies
of one timm model and alternate in one process. Before they are timed, their gradients are compared with
stock's: a variant that disagrees stops the run. Time on a GPU is wall time, launches included.

ReLU gives way to a smooth activation. Everything but BatchNorm is in eval mode: dropout would give each
variant another gradient. Attention is timm's unfused one (``fused_attn`` off) before a variant changes the
model: PyTorch's fused kernels have no double backward. bfloat16 is autocast.
"""

import argparse
import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import get_act_layer
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels.training.config import TrainingError
from gradnorm_kernels.training.models import create_model, input_spec
from gradnorm_kernels.training.objectives import GradientNormLoss, Objective

from .measure import alternate, describe_machine, option_parser, parse, summary, wall_time, write_json

MODELS = ["swin_tiny_patch4_window7_224", "resnet50", "convnext_atto", "vit_tiny_patch16_224"]
# Relative difference from stock's gradients that rounding may cause. What bfloat16 hides, float32 shows. The
# L1 norm's gradient jumps where rounding changes the sign of a pixel's: of a ResNet-50's gradients, stock's
# own were up to 4e-3 off float64.
TOLERANCE = {"float32": 1e-2, "tf32": 5e-2, "bfloat16": 3e-1}
Step = Callable[[nn.Module, Tensor, Tensor], None]


def gradient_step(objective: Objective, autocast: bool) -> Step:
    def step(model: nn.Module, images: Tensor, targets: Tensor) -> None:
        model.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = objective(model, images, targets, epoch=0).total
        loss.backward()

    return step


def stock(model: nn.Module, step: Step) -> tuple[nn.Module, Step]:
    return model, step


def fuse(model: nn.Module, step: Step) -> tuple[nn.Module, Step]:
    return gk.fuse(model), step


def switch(model: nn.Module, step: Step) -> tuple[nn.Module, Step]:
    return model, gk.set_fused_double_backward(True)(step)


# What each does to its own copy of the model, and to the step.
VARIANTS = {"stock": stock, "fuse": fuse, "switch": switch}


def make_model(name: str, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the variants copy, and what a row says of it."""
    spec = input_spec(name, 3, args.img_size)
    model = create_model(name, spec, 1000)
    relus = attentions = 0
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, child_name, get_act_layer(args.act)())
                relus += 1
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            attentions += 1
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(args.bn == "train")
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
        "dtype": args.dtype,
        "shape": [args.batch, 3, spec.size, spec.size],
    }


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def relative_difference(ours: list[Tensor], stocks: list[Tensor]) -> float:
    """The largest difference in any parameter's gradient, in units of that gradient's largest element.

    The unit is at least a thousandth of the largest gradient of all: some are zero but for rounding, such as
    that of a bias before a BatchNorm.
    """
    if len(ours) != len(stocks):
        return math.inf
    smallest_unit = max(g.abs().max().item() for g in stocks) / 1000
    found = [
        (a - b).abs().max().item() / max(b.abs().max().item(), smallest_unit)
        for a, b in zip(ours, stocks, strict=True)
    ]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def peak_memory(run: Callable[[], None]) -> int:
    """Bytes that a run needs on the GPU beyond what is there before: activations, gradients, temporaries."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, facts = make_model(name, args)
    images = torch.rand(facts["shape"], device=args.device)
    targets = torch.randint(0, 1000, (args.batch,), device=args.device)
    step = gradient_step(GradientNormLoss(ramp_epochs=0), autocast=args.dtype == "bfloat16")

    rows = {variant: {**facts, "variant": variant} for variant in args.variants}
    runs: dict[str, Callable[[], None]] = {}
    expected = None
    for variant, row in rows.items():
        changed, changed_step = VARIANTS[variant](copy.deepcopy(model), step)
        run = functools.partial(changed_step, changed, images, targets)
        try:
            run()
            if variant == "stock":
                expected = gradients(changed)
            elif expected:
                row["gradient_difference"] = difference = relative_difference(gradients(changed), expected)
                if difference > TOLERANCE[args.dtype]:
                    raise SystemExit(f"{name} {variant}: gradients are {difference:.1e} off stock's")
            changed.zero_grad()
            if args.device == "cuda":
                row["peak_memory_bytes"] = peak_memory(run)
            runs[variant] = run
        except torch.OutOfMemoryError:
            changed.zero_grad()
            row["error"] = "out of memory"
    seconds = alternate(runs, wall_time, args.rounds, warm_up=1)
    for variant, taken in seconds.items():
        rows[variant] |= summary(taken, seconds.get("stock"))
    return list(rows.values())


HEADER = (
    f"{'model':32} {'variant':8} {'ms':>9} {'min':>9} {'max':>9} {'/ stock':>8} {'difference':>10} {'GiB':>6}"
)


def line(row: dict[str, Any]) -> str:
    start = f"{row['model']:32} {row['variant']:8} "
    if "error" in row:
        return start + row["error"]
    ratio, difference, memory = (
        row.get(key) for key in ("time_over_stock", "gradient_difference", "peak_memory_bytes")
    )
    return (
        start
        + f"{row['milliseconds']:9.1f} {row['milliseconds_min']:9.1f} {row['milliseconds_max']:9.1f} "
        + (f"{ratio:8.3f} " if ratio else f"{'-':>8} ")
        + (f"{difference:10.1e} " if difference is not None else f"{'-':>10} ")
        + (f"{memory / 2**30:6.2f}" if memory else f"{'-':>6}")
    )


def options() -> argparse.ArgumentParser:
    parser = option_parser(__doc__, rounds=5)
    parser.add_argument(
        "--model", nargs="+", default=MODELS, metavar="NAME", help="timm's; default: " + " ".join(MODELS)
    )
    parser.add_argument("--batch", type=int, default=8, help="images a step; default: 8")
    parser.add_argument("--img-size", type=int, help="height and width in pixels; default: the model's own")
    parser.add_argument("--act", default="gelu", help="timm's name of what replaces ReLU; default: gelu")
    parser.add_argument("--bn", choices=["train", "eval"], default="train", help="default: train")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="default: float32")
    parser.add_argument(
        "--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), help="default: all; stock always"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = options()
    args = parse(parser, arguments)
    if args.batch < 1:
        parser.error(f"--batch: expected at least 1, got {args.batch}")
    try:
        get_act_layer(args.act)
    except (AssertionError, KeyError):
        parser.error(f"--act: timm knows none called {args.act}")
    if args.dtype == "tf32" and args.device == "cpu":
        parser.error("--dtype tf32: needs a GPU")
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype == "tf32"
    # First, because the others are compared with it.
    args.variants = list(dict.fromkeys(["stock", *args.variants]))

    machine = describe_machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"batch {args.batch}, {args.dtype}, {args.rounds} rounds\n\n{HEADER}")
    rows = []
    for name in args.model:
        try:
            rows += (measured := measure(name, args))
        except TrainingError as error:
            raise SystemExit(str(error)) from None
        print("\n".join(map(line, measured)), flush=True)
    if args.json:
        write_json(args.json, machine, args.rounds, rows)


if __name__ == "__main__":
    main()
