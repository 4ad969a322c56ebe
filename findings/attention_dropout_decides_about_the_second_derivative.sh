#!/usr/bin/env bash
# torch 2.13.0, CPU.
#
# Whether attention can be differentiated twice hangs on its dropout. scaled_dot_product_attention takes its plain
# formula while there is dropout, and a fused kernel, whose backward has no derivative, where there is none. So a
# torch.nn.TransformerEncoderLayer trains with a gradient penalty as long as its dropout is above 0, and the same
# layer raises in eval mode, or with dropout=0.
#
# Seen:
#   train, dropout 0.1: differentiated twice
#   eval, dropout 0.1: derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented
#   train, dropout 0: derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def outcome(dropout, training):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True).train(training)
    x = torch.randn(2, 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    try:
        gradient.square().sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "differentiated twice"


missing = "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented"
for dropout, training, expected in ((0.1, True, "differentiated twice"), (0.1, False, missing), (0.0, True, missing)):
    seen = outcome(dropout, training)
    print(f"{'train' if training else 'eval'}, dropout {dropout:g}: {seen}")
    assert seen == expected
PYTHON
