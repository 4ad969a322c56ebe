#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# torch.compile(backend="eager") is what one takes to see whether a result is the compiler's fault: it traces, and runs
# the traced ops as they are. With a custom torch.autograd.Function inside, its second derivative is wrong all the
# same, without a word. The value and the first derivative are right. Of the second derivative the part is missing
# that passes through the Function's own backward, as if once_differentiable were set, but without its error. A
# gradient penalty then trains on a wrong gradient. Backends that use AOTAutograd raise instead.
#
# Seen, of x sin(x)^2, whose square is a custom Function:
#   eager:    first [1.617, -0.687], second [0.986, -4.128]
#   compiled: first [1.617, -0.687], second [-0.507, -4.064]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def function(x):
    return x * Square.apply(x.sin())


def derivatives(function):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return [[round(value, 3) for value in derivative.tolist()] for derivative in (first, second)]


eager, compiled = derivatives(function), derivatives(torch.compile(function, backend="eager"))
print(f"eager:    first {eager[0]}, second {eager[1]}")
print(f"compiled: first {compiled[0]}, second {compiled[1]}")
plain = derivatives(lambda x: x * x.sin() ** 2)
assert eager == plain and compiled[0] == plain[0] and compiled[1] != plain[1]
PYTHON
