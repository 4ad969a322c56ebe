#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# The derivative of a forward-mode derivative through softmax, log_softmax, logsumexp and cross_entropy depends on who
# takes it. torch.func.grad of torch.func.jvp gives the Hessian-vector product. torch.autograd.grad of the tangent that
# torch.autograd.forward_ad gives, of the same function at the same point, raises: the forward-mode formula has changed
# in place what its own derivative needs. One would expect the two to be one mechanism.
#
# Seen, for each of the four:
#   torch.func: the Hessian-vector product
#   forward_ad: one of the variables needed for gradient computation has been modified by an inplace operation
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

x, v = torch.linspace(-1, 1, 4), torch.tensor([1.0, -2.0, 0.5, 3.0])
for name, function in {
    "softmax": lambda x: F.softmax(x, 0).square().sum(),
    "log_softmax": lambda x: F.log_softmax(x, 0).square().sum(),
    "logsumexp": lambda x: torch.logsumexp(x, 0),
    "cross_entropy": lambda x: F.cross_entropy(x[None], torch.tensor([1])),
}.items():
    product = torch.func.grad(lambda x: torch.func.jvp(function, (x,), (v,))[1])(x)
    assert torch.allclose(product, torch.func.hessian(function)(x) @ v, atol=1e-5)
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(leaf, v))).tangent
        try:
            torch.autograd.grad(tangent, leaf)
        except RuntimeError as error:
            seen = str(error).partition(":")[0]
        else:
            seen = "differentiated"
    print(f"{name}: torch.func: the Hessian-vector product; forward_ad: {seen}")
    assert seen == "one of the variables needed for gradient computation has been modified by an inplace operation"
PYTHON
