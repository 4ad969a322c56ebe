#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# What a compiler plans for the backward of log_softmax is not what runs: of permuted operands the fake kernel says that
# the gradient keeps their strides, the real one returns a contiguous tensor. softmax's two kernels agree. Whoever
# wraps the op in one of his own, which torch.library.opcheck then tests, is told of a stride mismatch in his op.
#
# Seen, strides of the gradient, real and fake:
#   _softmax_backward_data: (4, 2, 1) and (4, 2, 1)
#   _log_softmax_backward_data: (4, 2, 1) and (1, 3, 6)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

gradient, output = (torch.randn(2, 2, 3).transpose(0, 2) for _ in range(2))
for name, expected in {
    "_softmax_backward_data": ((4, 2, 1), (4, 2, 1)),
    "_log_softmax_backward_data": ((4, 2, 1), (1, 3, 6)),
}.items():
    op = getattr(torch.ops.aten, name)
    real = op(gradient, output, 1, torch.float32).stride()
    with FakeTensorMode() as mode:
        fake = op(mode.from_tensor(gradient), mode.from_tensor(output), 1, torch.float32).stride()
    print(f"{name}: {real} and {fake}")
    assert (real, fake) == expected
PYTHON
