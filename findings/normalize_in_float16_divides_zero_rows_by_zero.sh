#!/usr/bin/env bash
# torch 2.13.0; torch 2.14.1 is no different.
#
# F.normalize and F.cosine_similarity are given an eps against division by zero. In float16 it is rounded to the
# tensor's type before it is used: their defaults, 1e-12 and 1e-8, become 0, and a row of zeros gives NaN. The norms
# with a variance (layer_norm and rms_norm, with an eps of 1e-12 too) compute in float32 and give 0, and so
# does F.normalize in bfloat16, whose smallest numbers are those of float32. 6e-8 is the smallest eps that counts.
#
# Seen, of rows of zeros:
#   normalize: float16 nan, bfloat16 0.0, float32 0.0; float16 with eps=6e-8: 0.0
#   cosine_similarity: float16 nan, bfloat16 0.0, float32 0.0; float16 with eps=6e-8: 0.0
#   layer_norm: float16 0.0, bfloat16 0.0, float32 0.0
#   rms_norm: float16 0.0, bfloat16 0.0, float32 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

norms = {
    "normalize": lambda x, **eps: F.normalize(x, **eps),
    "cosine_similarity": lambda x, **eps: F.cosine_similarity(x, torch.ones_like(x), **eps),
    "layer_norm": lambda x: F.layer_norm(x, (8,), eps=1e-12),
    "rms_norm": lambda x: F.rms_norm(x, (8,), eps=1e-12),
}
for name, norm in norms.items():
    told = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        value = norm(torch.zeros(2, 8, dtype=dtype)).flatten()[0].item()
        told.append(f"{str(dtype)[6:]} {value}")
        is_hurt = dtype == torch.float16 and name in ("normalize", "cosine_similarity")
        assert (value != value) == is_hurt, told
    line = f"{name}: " + ", ".join(told)
    if name in ("normalize", "cosine_similarity"):
        value = norm(torch.zeros(2, 8, dtype=torch.float16), eps=6e-8).flatten()[0].item()
        assert value == 0, value
        line += f"; float16 with eps=6e-8: {value}"
    print(line)
PYTHON
