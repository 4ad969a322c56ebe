#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# Far from 0, GELU is a straight line, and its derivatives are 1 or 0. Of the tanh approximation the first and second
# derivatives are, but the third is NaN from |x| = 14 on in float32, where a large activation may well be; from 6 on in
# float16 and from 27 on in float64. The erf form's third derivative is right everywhere. So a physics-informed network
# or a Hessian penalty with gelu(approximate="tanh") turns NaN once a unit saturates, though a gradient penalty does not.
#
# Seen, of 14 and -14 in float32:
#   tanh: first [1.0, 0.0], second [0.0, 0.0], third [nan, nan]
#   none: first [1.0, 0.0], second [0.0, 0.0], third [0.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
import torch.nn.functional as F


def derivatives(approximate, at, dtype):
    x = torch.tensor([at, -at], dtype=dtype, requires_grad=True)
    result, found = F.gelu(x, approximate=approximate), []
    for _ in range(3):
        (result,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        found.append([round(value, 6) + 0.0 if math.isfinite(value) else value for value in result.tolist()])
    return found


for approximate in ("tanh", "none"):
    first, second, third = derivatives(approximate, 14.0, torch.float32)
    print(f"{approximate}: first {first}, second {second}, third {third}")
    assert first == [1, 0] and second == [0, 0]
    assert third == [0, 0] if approximate == "none" else all(map(math.isnan, third))
for dtype, at in ((torch.float16, 6.0), (torch.float32, 14.0), (torch.float64, 27.0)):
    inside, outside = (derivatives("tanh", value, dtype)[2] for value in (at - 1, at))
    assert all(map(math.isfinite, inside)) and all(map(math.isnan, outside))
PYTHON
