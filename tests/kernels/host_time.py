"""Host time of ops' launches, by Python and repeated by C++, with a stand-in for CUDA's driver.

    python tests/kernels/host_time.py

Needs no GPU, and computes nothing. Both times are of a call from Python; the least of several means.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import stand_in  # noqa: E402
import torch  # noqa: E402


def calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    x, g, v = (torch.randn(8, 64, 32) for _ in range(3))
    rows, statistics = [torch.randn(64, 256) for _ in range(3)], [torch.randn(64, 1) for _ in range(2)]
    heads = [torch.randn(2, 1, 4, 49, 32) for _ in range(11)]
    mask, sums = torch.randn(1, 1, 4, 49, 49).expand(2, 1, 4, 49, 49), torch.empty(1, 4, 49, 64)
    images, c = [torch.randn(8, 64, 7, 7) for _ in range(3)], torch.randn(64)
    norm = (rows[0], None, None, *rows[1:], *statistics, torch.randn(256), [True] * 3)
    attention = (*heads[:3], None, *heads[3:7], mask, 0.2, *heads[7:], sums)
    return {
        "GELU": ("gelu", (x,)),
        "GELU, double backward": ("gelu_double_backward", (v, g, x)),
        "LayerNorm, double backward": ("layer_norm_double_backward", norm),
        "attention": ("_attention_fwd", (*heads[:3], mask, 0.2, heads[3])),
        "attention, double backward": ("_attention_bwd_bwd", attention),
        "BatchNorm in training, double backward": (
            "batch_norm_double_backward",
            (images[0], None, None, *images[1:], *[c] * 5, True, 1e-5),
        ),
    }


def microseconds(call: Callable[[], Any], repeats: int = 40, rounds: int = 15) -> float:
    means = []
    for _ in range(rounds + 1):  # the first, in which Triton compiles, is not the least
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        means.append((time.perf_counter() - begin) / repeats * 1e6)
    return min(means)


def main() -> None:
    if stand_in.LIBRARY not in os.environ:
        folder = Path(tempfile.mkdtemp())
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | stand_in.environment(folder))
    stand_in.install(Path(tempfile.mkdtemp()))
    print("us a call: by Python, by C++ (launches)")
    for name, (op, args) in calls().items():
        overload = getattr(torch.ops.gradnorm_kernels, op).default
        keys = [
            torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in ("PrivateUse2", "CUDA")
        ]
        times = [microseconds(lambda: overload.redispatch(key, *args)) for key in keys]  # noqa: B023
        stand_in.take_launches()
        overload.redispatch(keys[1], *args)
        print(f"{name}: {times[0]:.1f}, {times[1]:.1f} ({len(stand_in.take_launches())})")


if __name__ == "__main__":
    main()
