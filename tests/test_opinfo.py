"""PyTorch's own samples of every op that the switch may cover, through gradcheck and gradgradcheck."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import usual

import gradnorm_kernels as gk
from gradnorm_kernels.diagnose import graph_nodes

# What torch.testing._internal imports, and torch does not require.
pytest.importorskip("numpy")
pytest.importorskip("expecttest")
ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))
from benchmarks.opinfo import OPS, samples_of  # noqa: E402

# OpInfo's names. Each op is in one table, and no table lets an op pass that belongs in another.

# Differentiated twice by our formulas, without the zeros that PyTorch's write, or right where its are wrong
# or missing.
FUSED = [
    "_native_batch_norm_legit",
    "_segment_reduce.lengths",
    "_segment_reduce.offsets",
    "_softmax_backward_data",
    "cos",
    "log_softmax",
    "log_softmax.with_dtype",
    "masked.log_softmax",
    "masked.softmax",
    "native_batch_norm",
    "native_group_norm",
    "native_layer_norm",
    "nn.functional.batch_norm",
    "nn.functional.batch_norm.without_cudnn",
    "nn.functional.celu",
    "nn.functional.conv1d",
    "nn.functional.conv2d",
    "nn.functional.conv3d",
    "nn.functional.conv_transpose1d",
    "nn.functional.conv_transpose2d",
    "nn.functional.conv_transpose3d",
    "nn.functional.cosine_similarity",
    "nn.functional.elu",
    "nn.functional.embedding_bag",
    "nn.functional.gelu",
    "nn.functional.group_norm",
    "nn.functional.hardshrink",
    "nn.functional.hardsigmoid",
    "nn.functional.hardswish",
    "nn.functional.hardtanh",
    "nn.functional.instance_norm",
    "nn.functional.layer_norm",
    "nn.functional.leaky_relu",
    "nn.functional.logsigmoid",
    "nn.functional.mish",
    "nn.functional.multi_margin_loss",
    "nn.functional.multilabel_margin_loss",
    "nn.functional.relu",
    "nn.functional.relu6",
    "nn.functional.rms_norm",
    "nn.functional.scaled_dot_product_attention",
    "nn.functional.selu",
    "nn.functional.silu",
    "nn.functional.softmin",
    "nn.functional.softmin.with_dtype",
    "nn.functional.softplus",
    "nn.functional.softshrink",
    "nn.functional.tanhshrink",
    "nn.functional.threshold",
    "sigmoid",
    "sin",
    "softmax",
    "softmax.with_dtype",
    "tanh",
]
# By PyTorch's own: not covered, or at the floor already.
STOCK = [
    "_batch_norm_with_update",
    "nn.functional.softsign",
]

# PyTorch releases before these drop gradients, first ones already: those of the mean and rstd here.
WRONG_BEFORE = {"native_group_norm": "2.15"}

# Other names of ops that are in the tables, or of what their families' tests take through gradcheck.
LEFT_TO_TEST_ALL = {
    "_segment_reduce.offsets",
    "log_softmax.with_dtype",
    "masked.log_softmax",
    "nn.functional.batch_norm.without_cudnn",
    "nn.functional.conv1d",
    "nn.functional.conv_transpose1d",
    "nn.functional.relu6",
    "nn.functional.selu",
    "nn.functional.softmin",
    "nn.functional.softmin.with_dtype",
    "softmax.with_dtype",
    "tanh",
}

# Their full Jacobians take too long: products with random vectors are checked instead.
FAST = {
    "_batch_norm_with_update",
    "_native_batch_norm_legit",
    "_segment_reduce.lengths",
    "_segment_reduce.offsets",
    "masked.log_softmax",
    "masked.softmax",
    "native_batch_norm",
    "native_group_norm",
    "nn.functional.batch_norm.without_cudnn",
    "nn.functional.conv2d",
    "nn.functional.conv3d",
    "nn.functional.conv_transpose1d",
    "nn.functional.conv_transpose2d",
    "nn.functional.conv_transpose3d",
    "nn.functional.group_norm",
    "nn.functional.instance_norm",
    "nn.functional.scaled_dot_product_attention",
}


def is_ours(function, inputs):
    """Whether a node of ours is in the graph of the first gradients."""
    outputs = function(*inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    # A linear op's are functions of the incoming gradient alone.
    for requires_grad in (False, True):
        ones = [torch.ones_like(o, requires_grad=requires_grad) for o in outputs]
        gradients = torch.autograd.grad(outputs, inputs, ones, create_graph=True, allow_unused=True)
        nodes = graph_nodes([g for g in gradients if g is not None])
        if nodes:
            break
    return any("gradnorm_kernels" in node.name() for node in nodes)


def check_gradients(op):
    """Raises unless first and second gradients are right; says for each sample whether ours ran, but for
    empty ones: BatchNorm leaves those to PyTorch."""
    options = {
        "check_grad_dtypes": True,
        "nondet_tol": op.gradcheck_nondet_tol,
        "fast_mode": op.full_name in FAST,
    }
    ours = []
    for function, inputs in samples_of(op):
        batched = op.check_batched_grad
        assert torch.autograd.gradcheck(function, inputs, check_batched_grad=batched, **options)
        batched = op.check_batched_gradgrad
        for non_contiguous in (False, True):
            assert torch.autograd.gradgradcheck(
                function,
                inputs,
                gen_non_contig_grad_outputs=non_contiguous,
                check_batched_grad=batched,
                **options,
            )
        if all(variable.numel() for variable in inputs):
            ours.append(is_ours(function, inputs))
    return ours


@pytest.mark.parametrize("name", usual([*FUSED, *STOCK], *{*FUSED, *STOCK} - LEFT_TO_TEST_ALL))
@pytest.mark.filterwarnings("ignore")
def test_first_and_second_gradients(name):
    if name not in OPS:
        pytest.skip(f"this torch has no OpInfo of {name}")
    if torch.__version__ < WRONG_BEFORE.get(name, "0"):
        pytest.skip(f"this torch's own first gradients of {name} are wrong")
    with gk.set_fused_double_backward(True):
        # Neither may an op of ours pass by PyTorch's formula, nor the other way round.
        assert set(check_gradients(OPS[name])) == {name in FUSED}


def test_tables_are_disjoint():
    names = [*FUSED, *STOCK]
    assert len(names) == len(set(names)) and set(names) >= FAST | LEFT_TO_TEST_ALL
