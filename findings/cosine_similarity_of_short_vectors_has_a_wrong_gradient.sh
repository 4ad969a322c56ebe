#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# F.cosine_similarity divides by norms that are at least eps. Its value says so, but its first derivative does not: where
# a norm is positive and below eps, the gradient is that of a norm which is not held, and so differs from the value's slope
# (here by a factor of two). Not at exactly 0, and not above eps. In float32 a row of 1e-9 in a padded batch is enough, and
# gradcheck of ordinary inputs never gets there. F.normalize, which clamps likewise, is right.
#
# Seen, gradient along the vector's first element, by autograd and by central differences:
#   norm 2e-09: cosine_similarity 9.129e+06 and 1.826e+07, normalize 1.826e+07 and 1.826e+07
#   norm 2e-07: cosine_similarity -1.369e+06 and -1.369e+06, normalize -1.369e+06 and -1.369e+06
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

direction = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
unit = direction / direction.norm()
functions = {
    "cosine_similarity": lambda x: F.cosine_similarity(x, direction, dim=0, eps=1e-8),
    "normalize": lambda x: F.normalize(x, dim=0, eps=1e-8) @ unit,
}
for size, is_wrong in ((1e-9, True), (1e-7, False)):
    x = torch.full((4,), size, dtype=torch.float64, requires_grad=True)
    step = torch.tensor([size * 1e-4, 0, 0, 0], dtype=torch.float64)
    told = []
    for name, function in functions.items():
        (gradient,) = torch.autograd.grad(function(x), x)
        with torch.no_grad():
            slope = (function(x + step) - function(x - step)) / (2 * step[0])
        told.append(f"{name} {gradient[0]:.3e} and {slope:.3e}")
        ratio = (gradient[0] / slope).item()
        assert abs(ratio - (0.5 if is_wrong and name == "cosine_similarity" else 1)) < 1e-3, ratio
    print(f"norm {x.norm():.0e}: " + ", ".join(told))
PYTHON
