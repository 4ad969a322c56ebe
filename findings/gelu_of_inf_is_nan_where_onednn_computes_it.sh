#!/usr/bin/env bash
# torch 2.14.1, CPU with AVX-512.
#
# F.gelu of a contiguous tensor in float32 or bfloat16 is oneDNN's on such a processor. It multiplies before it halves:
# gelu(inf) is NaN, and from 1.71e38 on, half of what either type can hold, gelu(x) is inf, not x. Of a tensor in another
# layout both are right: the value depends on the strides. Other processors are passed over.
#
# Seen, gelu of inf and 3e38:
#   torch.float32: contiguous nan, inf; strided inf, 3e+38
#   torch.bfloat16: contiguous nan, inf; strided inf, 3e+38
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    raise SystemExit
for dtype in (torch.float32, torch.bfloat16):
    whole = torch.tensor([torch.inf, 3e38] * 32, dtype=dtype)
    strided = torch.stack([whole, whole], 1)[:, 0]
    told = []
    for name, x in (("contiguous", whole), ("strided", strided)):
        inf, large = F.gelu(x)[:2].tolist()
        told.append(f"{name} {inf}, {large:.0e}")
        assert (inf != inf and large == torch.inf) == (name == "contiguous"), told
    print(f"{dtype}: " + "; ".join(told))
PYTHON
