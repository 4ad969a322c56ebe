#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# Batch normalisation is not the same op everywhere. Eagerly, and in a graph of make_fx, it is
# aten::native_batch_norm; torch.compile has aten::_native_batch_norm_legit instead, because its Python dispatcher
# takes the one to the other before any kernel is looked up. A kernel that is registered for native_batch_norm, or a
# dispatch mode that counts or refuses it, sees nothing of it in a compiled region.
#
# Seen:
#   eager: aten::native_batch_norm
#   make_fx: aten.native_batch_norm.default
#   torch.compile: aten._native_batch_norm_legit_functional.default
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

arguments = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
seen = {"eager": [], "make_fx": [], "torch.compile": []}


def normalise(x, mean, var):
    return torch.nn.functional.batch_norm(x, mean, var, training=True)


class Names(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen["eager"].append(func.name())
        return func(*args, **(kwargs or {}))


def note(how):
    def compiler(graph, inputs=None):
        seen[how] += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph

    return compiler


def backend(graph, inputs):
    return aot_module_simplified(graph, inputs, fw_compiler=note("torch.compile"))


with Names():
    normalise(*arguments)
note("make_fx")(make_fx(normalise)(*arguments))
torch.compile(normalise, backend=backend)(*arguments)
names = {how: [name for name in found if "batch_norm" in name] for how, found in seen.items()}
for how, found in names.items():
    print(f"{how}: {', '.join(found)}")
assert list(names.values()) == [
    ["aten::native_batch_norm"],
    ["aten.native_batch_norm.default"],
    ["aten._native_batch_norm_legit_functional.default"],
]
PYTHON
