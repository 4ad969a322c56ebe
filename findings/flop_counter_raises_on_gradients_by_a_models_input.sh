#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# FlopCounterMode counts a model's forward and backward(), but torch.autograd.grad by the very tensor that the model is
# given raises inside it, though the same line works without the counter: the counter follows modules by hooks on their
# inputs' gradients, and these ask the engine about the node of a leaf, which it refuses while grad() runs. So neither a
# gradient penalty nor a force field's step can be counted as it is written. Where what the module is given is no leaf
# (x * 1), or where no module is called, it counts.
#
# Seen:
#   without the counter: fine
#   backward: 240
#   grad by the model's input: A leaf node was passed to _will_engine_execute_node but we are currently running
#   autograd.grad(). This is currently not supported.
#   grad by the input of its input: 160
#   grad without a module: 128
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
x = torch.randn(2, 4, requires_grad=True)


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def gradient(function):
    return torch.autograd.grad(function(x).sum(), x, create_graph=True)


gradient(model)
print("without the counter: fine")
backward = counted(lambda: model(x).sum().backward())
print("backward:", backward)
assert backward == 240
try:
    counted(lambda: gradient(model))
    raise SystemExit("grad by the model's input: counted")
except RuntimeError as error:
    print("grad by the model's input:", error)
    assert "leaf node" in str(error)
no_leaf = counted(lambda: gradient(lambda x: model(x * 1)))
print("grad by the input of its input:", no_leaf)
assert no_leaf == 160
no_module = counted(lambda: gradient(lambda x: nn.functional.linear(x, model[0].weight).tanh()))
print("grad without a module:", no_module)
assert no_module == 128
PYTHON
