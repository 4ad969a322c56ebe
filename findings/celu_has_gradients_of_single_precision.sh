#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# F.celu in float64 has a forward to the last bit, but first and second derivatives with the errors of float32: its
# backward takes 1 / alpha from an alpha that was rounded to float32. gradcheck with its usual tolerances does not notice,
# and for an alpha that float32 holds exactly (1, 0.5) nothing is wrong. F.elu, which has no such division, is exact.
#
# Seen, largest relative errors of forward, first and second derivative:
#   alpha 0.5: 0e+00, 2e-16, 2e-16
#   alpha 0.7: 0e+00, 1e-08, 3e-08
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

for alpha, least, most in ((0.5, 0, 1e-15), (0.7, 1e-9, 1e-6)):
    x = torch.tensor([-1.0, -0.3], dtype=torch.float64, requires_grad=True)
    value = F.celu(x, alpha)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    exact = alpha * torch.expm1(x / alpha), torch.exp(x / alpha), torch.exp(x / alpha) / alpha
    errors = [(a / e - 1).abs().max().item() for a, e in zip((value, first, second), exact, strict=True)]
    print(f"alpha {alpha}: " + ", ".join(f"{error:.0e}" for error in errors))
    assert errors[0] < 1e-15 and all(least <= error <= most for error in errors[1:])
    assert torch.autograd.gradcheck(lambda x: F.celu(x, alpha), x)
PYTHON
