#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# torch.autograd.gradcheck in its fast mode compares the wrong outputs with each other where a function has an output
# that requires no gradient: it numbers the numerical derivatives by all outputs, and the analytical ones by those
# that require a gradient. gradgradcheck meets this with every op whose gradient by one input is a constant, such as
# the zeros that ReLU's backward gives: the fast mode calls PyTorch's own threshold_backward wrong, the slow one right.
#
# Seen:
#   slow mode: right
#   fast mode: Jacobian mismatch for output 0 with respect to input 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
gradient, x = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))


def backward(x, gradient):
    return torch.ops.aten.threshold_backward(gradient, x, 0)


def outcome(fast):
    try:
        torch.autograd.gradgradcheck(backward, (x, gradient), fast_mode=fast)
    except RuntimeError as error:
        return str(error).splitlines()[0].rstrip(",")
    return "right"


slow, fast = outcome(False), outcome(True)
print(f"slow mode: {slow}\nfast mode: {fast}")
assert slow == "right"
assert fast == "Jacobian mismatch for output 0 with respect to input 2"
PYTHON
