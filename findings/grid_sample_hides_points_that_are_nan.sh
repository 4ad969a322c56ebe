#!/usr/bin/env bash
# torch 2.13.0, CPU; torch 2.14.1 does the same.
#
# A point whose coordinate is NaN is sampled without a trace: F.grid_sample gives 0, or a pixel at the border, and the loss of
# a diverged warp stays finite. Only bilinear sampling of images with zeros as padding gives NaN; the same of volumes gives 0.
# That a NaN would show in the output holds in one of twelve cases.
#
# Seen, of an image and a volume of ones, for zeros, border and reflection:
#   2D bilinear: nan 1.0 1.0
#   2D nearest: 0.0 1.0 1.0
#   3D bilinear: 0.0 1.0 1.0
#   3D nearest: 0.0 1.0 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
import torch.nn.functional as F

for dims in (2, 3):
    ones = torch.ones(1, 1, *[4] * dims)
    grid = torch.zeros(1, *[1] * dims, dims)
    grid[..., 0] = math.nan
    for mode in ("bilinear", "nearest"):
        samples = [
            F.grid_sample(ones, grid, mode=mode, padding_mode=padding, align_corners=False).item()
            for padding in ("zeros", "border", "reflection")
        ]
        print(f"{dims}D {mode}:", *samples)
        assert samples[1:] == [1, 1]
        assert math.isnan(samples[0]) if (dims, mode) == (2, "bilinear") else samples[0] == 0
PYTHON
