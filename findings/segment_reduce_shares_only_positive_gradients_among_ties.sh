#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# Where several elements of a segment are its maximum, torch.segment_reduce shares the gradient among them, as amax does, but
# only a positive one: a negative gradient goes to each of them in full. So the gradient of -f is not minus the gradient of f,
# and a loss that rises with the maximum moves tied elements half as far as one that falls with it.
#
# Seen, of a segment of two equal elements, for gradients of 1 and -1:
#   segment_reduce: [0.5, 0.5] [-1.0, -1.0]
#   amax: [0.5, 0.5] [-0.5, -0.5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def gradients(reduce):
    found = []
    for sign in (1.0, -1.0):
        x = torch.ones(2, requires_grad=True)
        (sign * reduce(x)).sum().backward()
        found.append(x.grad.tolist())
    return found


for kind in ("max", "min"):
    ours = gradients(lambda x: torch.segment_reduce(x, kind, lengths=torch.tensor([2])))
    other = gradients(lambda x: getattr(x, f"a{kind}")())
    if kind == "max":
        print("segment_reduce:", *ours)
        print("amax:", *other)
    assert ours == [[0.5, 0.5], [-1, -1]]
    assert other == [[0.5, 0.5], [-0.5, -0.5]]
PYTHON
