#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# torch.autograd.grad says that a tensor "appears to not have been used in the graph" also where it was used, and its
# backward ran: where that returned None, which autograd takes for zero everywhere else. backward() of the same loss
# says nothing and leaves grad at None. allow_unused=True or materialize_grads=True is the remedy, though nothing is
# unused.
#
# Seen:
#   the backward ran: True
#   The differentiated Tensor at index 0 appears to not have been used in the graph
#   backward(): grad is None
#   materialize_grads=True: [0.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

ran = []


class FirstTimesSign(torch.autograd.Function):
    """x sign(y), of whose gradient by y nothing is left but zeros."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x * y.sign()

    @staticmethod
    def backward(ctx, grad):
        ran.append(True)
        return grad * ctx.saved_tensors[0].sign(), None


x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
try:
    torch.autograd.grad(FirstTimesSign.apply(x, y).sum(), y)
    message = "no error"
except RuntimeError as error:
    message = str(error).split(".")[0]
print(f"the backward ran: {bool(ran)}\n{message}")
FirstTimesSign.apply(x, y).sum().backward()
print(f"backward(): grad is {y.grad}")
(zeros,) = torch.autograd.grad(FirstTimesSign.apply(x, y).sum(), y, materialize_grads=True)
print(f"materialize_grads=True: {zeros.tolist()}")
assert ran and message == "The differentiated Tensor at index 0 appears to not have been used in the graph"
assert y.grad is None and not zeros.any()
PYTHON
