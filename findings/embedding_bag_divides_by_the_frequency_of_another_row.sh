#!/usr/bin/env bash
# torch 2.13.0, CPU. torch 2.14.1 is right.
#
# F.embedding_bag with scale_grad_by_freq=True divides each row's gradient by how often its index occurs. In this release some rows
# are divided by how often another row occurs, silently: the first gradient is wrong wherever frequencies differ.
# F.embedding with the same option is right.
#
# Seen, the gradient of the sum, of rows 0, 2, 4 and 5, that occur 1, 2, 3 and 1 times; each should be 1:
#   embedding_bag: 1.0 1.0 1.5 0.333
#   embedding: 1.0 1.0 1.0 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

index = torch.tensor([0, 2, 2, 4, 4, 4, 5])


def gradient(output, weight):
    return torch.autograd.grad(output.sum(), weight)[0][[0, 2, 4, 5], 0].tolist()


weight = torch.ones(6, 1, requires_grad=True)
bags = F.embedding_bag(index, weight, torch.tensor([0, 3]), mode="sum", scale_grad_by_freq=True)
wrong = gradient(bags, weight)
right = gradient(F.embedding(index, weight, scale_grad_by_freq=True), weight)
print("embedding_bag:", *(round(g, 3) for g in wrong))
print("embedding:", *right)
assert right == [1, 1, 1, 1]
assert wrong[:2] == [1, 1] and wrong[2] == 1.5 and abs(wrong[3] - 1 / 3) < 1e-6
PYTHON
