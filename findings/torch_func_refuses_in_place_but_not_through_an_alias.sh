#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# torch.func refuses to change a tensor in place that the transformed function captured, and batch normalisation in
# training does nothing else with its running statistics: the refusal looks at the tensor that the op is called with,
# and an alias made inside is another one, of the same memory. So running statistics of one's own, kept with lerp_,
# raise under torch.func.grad, and kept by an alias they are updated, as those of torch.nn.functional.batch_norm are.
#
# Seen:
#   in place: During a grad (vjp, jvp, grad, etc) transform, the function provided attempted to call in-place operation
#   by an alias: updated
#   batch_norm: updated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

x = torch.randn(5, 3) + 2


def in_place(x, running):
    running.lerp_(x.detach().mean(0), 0.1)


def by_an_alias(x, running):
    torch.ops.aten.alias(running).lerp_(x.detach().mean(0), 0.1)


def by_batch_norm(x, running):
    torch.nn.functional.batch_norm(x, running, torch.ones(3), training=True)


def outcome(update):
    running = torch.zeros(3)
    try:
        torch.func.grad(lambda x: (x * 0).sum() if update(x, running) else x.sum())(x)
    except RuntimeError as error:
        return str(error).split(" (aten")[0]
    assert running.all()
    return "updated"


refused, alias, batch_norm = map(outcome, (in_place, by_an_alias, by_batch_norm))
print(f"in place: {refused}\nby an alias: {alias}\nbatch_norm: {batch_norm}")
assert refused.endswith("attempted to call in-place operation")
assert alias == batch_norm == "updated"
PYTHON
