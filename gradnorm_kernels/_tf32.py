"""PyTorch's switches of TF32, which it has two of: ``allow_tf32``, and since 2.9 ``fp32_precision``.

The former cannot be read once the latter was set; setting it sets both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MATMUL: Any = torch.backends.cuda.matmul
_CUDNN: Any = torch.backends.cudnn


def has_tf32_products() -> bool:
    """Whether PyTorch multiplies matrices of float32 in TF32 on CUDA."""
    return _MATMUL.fp32_precision == "tf32"


def has_tf32_convolutions() -> bool:
    return _CUDNN.conv.fp32_precision == "tf32"


@contextmanager
def allow_tf32(allowed: bool | None) -> Iterator[None]:
    """Sets PyTorch's switches of TF32 for as long as the block lasts; None leaves them as they are."""
    if allowed is None:
        yield
        return
    switches = _MATMUL, _CUDNN.conv, _CUDNN.rnn
    before = [switch.fp32_precision for switch in switches]
    _MATMUL.allow_tf32 = _CUDNN.allow_tf32 = allowed
    for switch in switches:
        # Not only by the flags: that of cuDNN, where it is off, leaves the choice to torch.backends.
        switch.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        _MATMUL.allow_tf32, _CUDNN.allow_tf32 = before[0] == "tf32", "tf32" in before[1:]
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
