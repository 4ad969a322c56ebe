#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# While Dynamo captures a function it marks the code of every fx.GraphModule that is made as code to skip, so that it does not
# compile its own output. That holds for good, and for graphs that a custom backend makes for itself: torch.compile of such a
# graph returns as usual, and then runs the graph op by op, without a warning and without counting a graph break. Generating
# the code again afterwards, by recompile(), takes the mark away.
#
# Seen: how often the inner compiler was called
#   graph made in a backend: 0
#   the same, after recompile(): 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import fx

made, compiled = [], []


def outer(graph, inputs):
    made.append(fx.GraphModule(graph, graph.graph))
    return graph


def inner(graph, inputs):
    compiled.append(graph)
    return graph


x = torch.ones(3)
torch.compile(lambda x: x.sin().cos(), backend=outer)(x)
module = made[0]
torch.compile(module.forward, backend=inner)(x)
print("graph made in a backend:", len(compiled))
assert not compiled
module.recompile()
torch.compile(module.forward, backend=inner)(x)
print("the same, after recompile():", len(compiled))
assert len(compiled) == 1
PYTHON
