#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# A query with an infinite element scores plus infinity against some keys and minus infinity against others: the softmax of
# that row is NaN. In float32 F.scaled_dot_product_attention gives NaN on the CPU. In bfloat16 and float16 its fused kernel,
# which is the default, gives a row of zeros, and the overflow that made the infinity leaves no trace in the loss. The
# unfused path (SDPBackend.MATH) gives NaN in all of them.
#
# Seen, of that row, fused and unfused:
#   float32: nan nan
#   bfloat16: 0.0 nan
#   float16: 0.0 nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 1, 32, 16).unbind()
query[0, 0, 0, 0] = math.inf
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    operands = [t.to(dtype) for t in (query, key, value)]
    rows = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            rows.append(F.scaled_dot_product_attention(*operands)[0, 0, 0])
    torch.testing.assert_close(F.scaled_dot_product_attention(*operands)[0, 0, 0], rows[0], equal_nan=True)
    print(f"{dtype}:".removeprefix("torch."), *(row[0].item() for row in rows))
    assert rows[1].isnan().all()
    assert rows[0].isnan().all() if dtype == torch.float32 else (rows[0] == 0).all()
PYTHON
