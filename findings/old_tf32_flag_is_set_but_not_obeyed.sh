#!/usr/bin/env bash
# torch 2.13.0, CPU build: the flags are set and read there too.
#
# torch.backends.fp32_precision = "tf32" sets all of the new flags at once. A library that then asks for full precision
# the old way, torch.backends.cudnn.allow_tf32 = False, hears nothing: the assignment is accepted, and the convolutions'
# flag still says "tf32". Only who reads an old flag gets an error, even one that was not touched: the matrix product's.
# With the new flags at their defaults the same assignment does turn TF32 off. So a test or a finite difference that
# relies on the old flag runs in TF32 once something else in the process set the new one.
#
# Seen:
#   defaults, then allow_tf32 = False: conv none, old flag reads False
#   fp32_precision = "tf32", then allow_tf32 = False: conv tf32, old flag raises RuntimeError
#   the matrix product's old flag, never set: raises RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
for precision in none tf32; do
	"$folder/venv/bin/python" - "$precision" <<'PYTHON'
import sys

import torch

precision = sys.argv[1]
backends = torch.backends


def read(flag):
    try:
        return f"reads {flag()}"
    except RuntimeError:
        return "raises RuntimeError"


if precision == "tf32":
    backends.fp32_precision = "tf32"
backends.cudnn.allow_tf32 = False
conv = backends.cudnn.conv.fp32_precision
old = read(lambda: backends.cudnn.allow_tf32)
before = "defaults" if precision == "none" else 'fp32_precision = "tf32"'
print(f"{before}, then allow_tf32 = False: conv {conv}, old flag {old}")
assert (conv, old) == (("none", "reads False") if precision == "none" else ("tf32", "raises RuntimeError"))
if precision == "tf32":
    old = read(lambda: backends.cuda.matmul.allow_tf32)
    print(f"the matrix product's old flag, never set: {old}")
    assert old == "raises RuntimeError"
PYTHON
done
