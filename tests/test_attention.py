"""Attention on the CPU: its tables, and what is its own: parts, layouts of results, heads, masks, dropout."""

import itertools
import math
import time
from dataclasses import dataclass, replace

import pytest
import reference
import torch
import torch.nn.functional as F
from contract import (
    DTYPES,
    OPS,
    Call,
    Calls,
    Case,
    OpContract,
    Operands,
    assert_close,
    by_function,
    by_switch,
    each_dtype,
    flat,
    subsets,
)
from hypothesis import strategies as st
from torch.autograd import forward_ad

import gradnorm_kernels as gk

attention = gk.functional.scaled_dot_product_attention
qkv_attention = gk.functional.qkv_attention


@dataclass(frozen=True)
class Attention(Case):
    name: str
    batch: tuple
    queries: int
    keys: int
    columns: int
    value_columns: int
    mask: tuple | None = None
    scale: float | None = None
    names = ("query", "key", "value", "attn_mask")
    op = "scaled_dot_product_attention"

    @property
    def wrong_in_pytorch(self):
        # With a mask its softmax modifies what it saved, without one its attention has no double backward.
        return ("tensor subclasses",) if self.mask is None else ("reverse over dual numbers",)

    def shapes(self):
        return (
            (*self.batch, self.queries, self.columns),
            (*self.batch, self.keys, self.columns),
            (*self.batch, self.keys, self.value_columns),
            self.mask,
        )

    def fused(self, query, key, value, mask=None):
        return attention(query, key, value, mask, scale=self.scale)

    def stock(self, query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=self.scale)

    def reference(self, query, key, value, mask=None):
        return reference.scaled_dot_product_attention(query, key, value, mask, self.scale)

    def calls(self, operands):
        forward, mask = (*operands.inputs, self.scale), [t is not None for t in operands.inputs]
        backward = (operands.grad_output, *forward)
        yield Call(self.op, forward)
        yield Call(f"{self.op}_backward", (*backward, mask))
        yield Call(f"{self.op}_double_backward", (*operands.grad_grads, *backward, [True, *mask]))
        yield Call(f"{self.op}_jvp", (*operands.grad_grads, *forward))

    def roundings(self, dtype):
        return 1  # sums are rounded in another order than stock's

    def is_parts(self):
        """Other than on the CPU, where no kernel computes the gradient of such a mask."""
        return max(self.queries, self.keys) > 64

    def passes(self, switch):
        if switch or self.is_parts():
            return None
        double = f"{self.op}_double_backward"
        return [([op], None) for op in (self.op, f"{self.op}_backward", double, double)]


@dataclass(frozen=True)
class PackedAttention(Attention):
    """Of query, key and value in one tensor: of as many queries as keys, and as many columns."""

    names = ("qkv", "attn_mask")
    op = "qkv_attention"

    def shapes(self):
        *batch, heads = self.batch
        return (*batch, self.keys, 3, heads, self.columns), self.mask

    def fused(self, qkv, mask=None):
        return qkv_attention(qkv, mask, self.scale)

    def stock(self, qkv, mask=None):
        query, key, value = qkv.transpose(-4, -2).unbind(-3)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=self.scale).transpose(-3, -2)

    def reference(self, qkv, mask=None):
        return reference.qkv_attention(qkv, mask, self.scale)


CASES = [
    Attention("shifted windows", (2, 2, 2), 49, 49, 32, 32, (2, 2, 49, 49)),
    Attention("windows with a bias", (3, 2), 49, 49, 32, 32, (2, 49, 49)),
    # Some heads of whole vectors, some not.
    Attention("plain", (2, 2), 33, 33, 16, 16, scale=0.3),
    # More rows of scores than one tile holds, and columns that leave part of a vector.
    Attention("long", (1, 1), 130, 520, 17, 40, (130, 1)),
    Attention("mask of keys", (2, 3), 5, 7, 8, 9, (2, 1, 1, 7)),
    Attention("mask of heads alone", (2, 3), 5, 7, 8, 9, (3, 1, 1)),
    Attention("mask of one row", (2,), 5, 7, 8, 9, (7,)),
    Attention("one matrix", (), 5, 7, 3, 4, (5, 7)),
    Attention("four batch dimensions", (2, 2, 2, 2), 6, 6, 4, 4, (2, 2, 1, 1, 6, 6)),
    Attention("four batch dimensions, the first summed", (2, 2, 2, 2), 6, 6, 4, 4, (2, 2, 6, 6)),
    Attention("small", (2,), 3, 4, 2, 2, (3, 4)),
    Attention("small, without mask", (1, 2), 3, 4, 2, 2),
]
PACKED = [
    PackedAttention("packed", (2, 2), 9, 9, 4, 4),
    PackedAttention("packed windows", (2, 3, 2), 9, 9, 4, 4, (3, 2, 9, 9)),
    PackedAttention("packed, whole vectors", (2, 2), 49, 49, 32, 32, (2, 49, 49)),
    PackedAttention("packed, small", (1, 2), 3, 3, 2, 2, (2, 1, 3)),
]


@st.composite
def random_cases(draw):
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    sizes = [draw(st.integers(0, 20)) for _ in range(4)]
    full = (*batch, *sizes[:2])
    mask = tuple(1 if draw(st.booleans()) else n for n in full)[draw(st.integers(0, len(full))) :]
    return Attention("", batch, *sizes, mask, scale=0.5)


class TestAttention(OpContract):
    cases = (*CASES, *PACKED)
    traced = ("small, without mask", "packed, small")
    # A mask is of any floating dtype.
    accepted = (
        *(("", name, "dtype") for name in ("attn_mask", "grad_grad_attn_mask", "tangent_attn_mask")),
        ("qkv_attention", "qkv", "dtype"),
    )
    random_cases = random_cases()
    schemas = """
        scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *,
            float? scale=None) -> Tensor;
        scaled_dot_product_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,
            Tensor? attn_mask=None, *, float? scale=None, bool[4] output_mask)
            -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask);
        scaled_dot_product_attention_double_backward(Tensor? grad_grad_query, Tensor? grad_grad_key,
            Tensor? grad_grad_value, Tensor? grad_grad_attn_mask, Tensor grad_output, Tensor query,
            Tensor key, Tensor value, Tensor? attn_mask=None, *, float? scale=None, bool[5] output_mask)
            -> (Tensor grad_grad_output, Tensor grad_query, Tensor grad_key, Tensor grad_value,
            Tensor grad_attn_mask);
        scaled_dot_product_attention_jvp(Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value,
            Tensor? tangent_attn_mask, Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *,
            float? scale=None) -> Tensor;
        qkv_attention(Tensor qkv, Tensor? attn_mask=None, *, float? scale=None) -> Tensor;
        qkv_attention_backward(Tensor grad_output, Tensor qkv, Tensor? attn_mask=None, *,
            float? scale=None, bool[2] output_mask) -> (Tensor grad_qkv, Tensor grad_attn_mask);
        qkv_attention_double_backward(Tensor? grad_grad_qkv, Tensor? grad_grad_attn_mask, Tensor grad_output,
            Tensor qkv, Tensor? attn_mask=None, *, float? scale=None, bool[3] output_mask)
            -> (Tensor grad_grad_output, Tensor grad_qkv, Tensor grad_attn_mask);
        qkv_attention_jvp(Tensor? tangent_qkv, Tensor? tangent_attn_mask, Tensor qkv, Tensor? attn_mask=None,
            *, float? scale=None) -> Tensor
    """

    def bad(self):
        query, key, value, mask = BY_NAME["mask of keys"].draw().inputs
        backward = OPS.scaled_dot_product_attention_backward
        double = OPS.scaled_dot_product_attention_double_backward
        g, wanted = query @ key.mT @ value, [True] * 4 + [False]
        tensors = g, query, key, value
        for call, name in (
            (lambda: attention(query, key[..., :1], value), "key"),
            (lambda: attention(query, key, value[..., :-1, :]), "value"),
            (lambda: attention(query, key, value, mask[..., :-1]), "attn_mask"),
            (lambda: attention(query[0, 0, 0], key[0, 0, 0], value[0, 0, 0]), "query"),
            (lambda: attention(query, key, value, mask, is_causal=True), "is_causal"),
            (lambda: attention(query, key, value, dropout_p=2), "dropout_p"),
            (lambda: qkv_attention(torch.randn(2, 5, 2, 2, 4)), "qkv"),
            (lambda: qkv_attention(torch.randn(2, 5, 3, 2, 4), torch.randn(3, 1, 1)), "attn_mask"),
            (lambda: backward(value, query, key, value, output_mask=wanted[1:]), "grad_output"),
            (lambda: backward(g, query, key, value, output_mask=[True] * 4), "attn_mask"),
            (lambda: double(None, query, None, None, *tensors, output_mask=wanted), "grad_grad_key"),
            (lambda: double(None, None, None, mask, *tensors, output_mask=wanted), "grad_grad_attn_mask"),
        ):
            yield call, ValueError, name

    def check_strides(self, case, operands, results):
        """With heads before the tokens, the usual reshape afterwards is a view; so it is of gradients."""
        for t in flat(results):
            if isinstance(case, PackedAttention):
                assert t.is_contiguous()
            elif t.ndim >= 4 and t.shape[:-2] == case.batch:
                assert t.transpose(-3, -2).is_contiguous()

    def check_accuracy(self, case, operands, ours, roundings=0, choices=None):
        # Under the switch the first gradients are PyTorch's own, which has larger errors than the reference.
        super().check_accuracy(case, operands, ours, 4 if ours is by_switch else roundings, choices)

    def check_kernels(self):
        for case, dtype in itertools.product(CASES[:4], DTYPES):
            self.check_accuracy(case, case.draw(dtype), by_function, choices=1)
        plain = BY_NAME["plain"]
        super().test_nan_and_inf_reach_what_they_reach_in_the_reference(plain, torch.float32, by_function)

    def test_bfloat16_without_the_processors_tiles(self):
        """By the products of other processors: tiles are oneDNN's."""
        with torch.backends.mkldnn.flags(enabled=False):
            for case in CASES[:4]:
                self.check_accuracy(case, case.draw(torch.bfloat16), by_function, choices=1)

    @pytest.mark.parametrize("columns", [16, 17])
    def test_bfloat16_of_odd_strides(self, columns):
        """Which cannot be read in pairs where they are."""
        case = replace(BY_NAME["windows with a bias"], columns=columns, value_columns=columns)
        spread = case.draw(torch.bfloat16).map(lambda t: F.pad(t, (1, 2 - t.shape[-1] % 2))[..., 1:-1])
        self.check_accuracy(case, spread, by_function, choices=1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_nan_and_inf_reach_what_they_reach_in_the_reference(self, case, dtype, ours):
        if case.is_small():
            pytest.skip("few keys, which an infinite query may exclude all, and PyTorch's own drops NaN of")
        if ours is by_switch and dtype == torch.bfloat16:
            pytest.skip("the forward is PyTorch's own, which gives zeros for NaN in half types")
        super().test_nan_and_inf_reach_what_they_reach_in_the_reference(case, dtype, ours)

    def test_fuzzed_shapes_and_strides(self):
        """PyTorch's own has no graph where there is no element."""
        super().test_fuzzed_shapes_and_strides(by_function)

    def test_inference_mode_and_meta_tensors(self, case, ours):
        if case.is_parts():
            pytest.skip("of several ops on meta tensors, whose layout is theirs")
        super().test_inference_mode_and_meta_tensors(case, ours)


BY_NAME = {case.name: case for case in TestAttention.cases}


def test_leading_dimensions_broadcast():
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(3, 7, 4)[None], torch.randn(1, 1, 7, 6)
    ours = attention(query, key, value)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_heads_of_key_and_value_are_repeated(options):
    query, key, value = (torch.randn(2, heads, 5, 4, requires_grad=True) for heads in (6, 2, 3))
    expected = F.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(2, 1), **options
    )
    ours = attention(query, key, value, **options, enable_gqa=True)
    torch.testing.assert_close(ours, expected)
    first, wanted = (
        torch.autograd.grad(output.square().sum(), (query, key, value), create_graph=output is ours)
        for output in (ours, expected)
    )
    torch.testing.assert_close(first, wanted)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), (query, key, value))
    assert [s.shape for s in second] == [query.shape, key.shape, value.shape]
    for bad in ((query[:, :5], key, value), (query[0, 0], key[0, 0], value[0, 0])):
        with pytest.raises(ValueError, match="key to have a divisor of query's heads"):
            attention(*bad, enable_gqa=True)


@each_dtype
def test_masks_of_other_dtypes(dtype):
    query, key, value = (torch.randn(2, 3, 9, 4).to(dtype) for _ in range(3))
    allowed = torch.rand(9, 9) > 0.3
    allowed[:, 0] = True
    result = attention(query, key, value, allowed)
    expected = F.scaled_dot_product_attention(query, key, value, allowed)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    for mask_dtype in DTYPES:
        mask = torch.randn(3, 9, 9, dtype=mask_dtype, requires_grad=True)
        output = attention(query, key, value, mask)
        wanted = reference.scaled_dot_product_attention(*(t.double() for t in (query, key, value, mask)))
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), wanted, rtol=2e-2, atol=2e-2)
        assert torch.autograd.grad(output.sum(), mask)[0].dtype == mask_dtype


def test_causal_and_dropout():
    query, key, value = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    ours = attention(query, key, value, None, 0.0, True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    ones = torch.ones(2, 3, 6, 4)
    dropped = attention(query, key, ones, dropout_p=0.5)
    assert (dropped != 1).any()
    assert not attention(query, key, ones, dropout_p=1.0).any()
    (grad,) = torch.autograd.grad(dropped.square().sum(), query, create_graph=True)
    torch.autograd.grad(grad.square().sum(), (query, key))


@each_dtype
def test_queries_without_keys_get_zeros(dtype):
    query, key, value = (torch.randn(2, 3, 20, 4).to(dtype) for _ in range(3))
    mask = torch.zeros(20, 20, dtype=dtype)
    mask[4] = -math.inf
    mask[5, :17] = -math.inf
    grad_output = torch.randn(2, 3, 20, 4).to(dtype)
    inputs = [query, key, value, mask]
    results = flat(Operands(inputs, grad_output, list(map(torch.randn_like, inputs))).orders(attention))
    assert all(result.isfinite().all() for result in results)
    for result in (results[0], results[1], results[5], results[6]):
        assert not result[..., 4, :].any()
        assert result[..., 5, :].any()
    assert not results[4][4].any() and not results[4][5, :17].any()


def passes(function, operands, inputs):
    """The ops of each pass, in which the gradients of inputs alone are asked for."""
    counters = [Calls() for _ in range(3)]
    with counters[0]:
        output = function(*operands)
    grad_output = torch.empty_like(output).requires_grad_()
    with counters[1]:
        grads = torch.autograd.grad(output, inputs, grad_output, create_graph=True)
    grad_grads = [torch.empty_like(g) for g in grads]
    with counters[2]:
        torch.autograd.grad(grads, [grad_output, *operands], grad_grads, materialize_grads=True)
    return [counter.names for counter in counters]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_pass_is_one_op(device):
    def one(op):
        return [[op], [f"{op}_backward"], [f"{op}_double_backward"]]

    operands = [t.to(device).requires_grad_() for t in CASES[0].draw(torch.float32).inputs]
    for inputs in (operands, operands[:3], operands[:1]):
        assert passes(attention, operands, inputs) == one(Attention.op)
    for tokens in (49, 197):
        qkv = torch.empty(1, tokens, 3, 2, 64, device=device, requires_grad=True)
        assert passes(qkv_attention, [qkv], [qkv]) == one(PackedAttention.op)
    wide = torch.empty(1, 197, 3, 2, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert passes(qkv_attention, [wide], [wide]) == one(PackedAttention.op)


@pytest.mark.parametrize("mode", ["torch.func", "dual numbers", "the switch"])
@pytest.mark.parametrize("case", [CASES[1], *CASES[-2:], PACKED[1], PACKED[-1]], ids=str)
def test_jvp_and_its_derivative_are_fused(case, mode):
    """The tangent is one op, which is differentiated by the backward and the double backward."""
    operands = case.draw(torch.float64)
    inputs, tangents = ([t for t in of if t is not None] for of in (operands.inputs, operands.grad_grads))
    if mode == "the switch" and (isinstance(case, PackedAttention) or case.mask):
        pytest.skip("PyTorch's own has no kernel of packed operands or of masks with a gradient")

    def dual(function, inputs, tangents):
        if mode != "dual numbers":
            return torch.func.jvp(function, inputs, tangents)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents)))

    def derivatives(function):
        variables = [t.detach().requires_grad_() for t in (*inputs, *tangents)]
        half = len(inputs)
        output, tangent = dual(function, tuple(variables[:half]), tuple(variables[half:]))
        total = output.sin().sum() + tangent.cos().sum()
        gradients = torch.autograd.grad(total, variables, create_graph=True)
        seconds = torch.autograd.grad(sum(g.sin().sum() for g in gradients), variables)
        return output, tangent, *gradients, *seconds

    # Of the reference in the same mode, whose softmax is of ops that all have every derivative.
    expected = derivatives(case.reference)
    with Calls() as counted, gk.set_fused_double_backward(mode == "the switch"):
        function = case.stock if mode == "the switch" else case.fused
        ours = derivatives(function)
    assert_close(ours, expected)
    names = [name for name in counted.names if name.startswith(case.op)]
    assert names.count(f"{case.op}_jvp") == 1 and "_softmax" not in counted.names[:20]
    assert f"{case.op}_double_backward" in names and f"{case.op}_backward" in names


def test_jvp_of_one_operand():
    """Of the others there is no tangent."""
    query, key, value, mask = BY_NAME["small"].draw().inputs
    tangent = query.cos()

    def of_query(function):
        return torch.func.jvp(lambda query: function(query, key, value, mask), (query,), (tangent,))

    with Calls() as counted:
        ours = of_query(attention)
    assert "scaled_dot_product_attention_jvp" in counted.names and "bmm" not in counted.names
    assert_close(ours, of_query(reference.scaled_dot_product_attention))


@pytest.mark.parametrize("way", ["fuse", "switch"])
def test_loss_of_a_jvp_trains_a_transformer(way):
    """As mean-flow and consistency models do: PyTorch's own attention has no forward mode on the CPU."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    net = torch.nn.TransformerEncoderLayer(8, 2, 16, **options).double()
    z, v = (torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(2))

    def loss(net):
        velocity, change = torch.func.jvp(net, (z,), (v,))
        return (velocity - v + 0.3 * change).square().mean()

    with pytest.raises(NotImplementedError, match="forward AD"):
        loss(net)
    if way == "fuse":
        gk.fuse(net)
    with gk.set_fused_double_backward(way == "switch"):
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(loss(net), parameters)
        with torch.no_grad():
            changes = [torch.randn_like(p) for p in parameters]
            values = []
            for step in (1e-5, -2e-5, 1e-5):
                for p, change in zip(parameters, changes, strict=True):
                    p += step * change
                values.append(loss(net).item())
    slope = sum((g * change).sum().item() for g, change in zip(gradients, changes, strict=True))
    assert math.isclose(slope, (values[0] - values[1]) / 2e-5, rel_tol=1e-6)


@pytest.mark.parametrize("reason", ["dtype", "columns", "mask"])
def test_what_no_kernel_covers_is_visible_parts_on_other_devices(reason):
    dtype = torch.float64 if reason == "dtype" else torch.float32
    tokens, columns = (49, 65) if reason == "columns" else (197, 64)
    shapes = [(2, 3, tokens, columns)] * 3 + [(tokens, tokens)] * (reason == "mask")
    operands = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
    calls = passes(attention, operands, operands)
    rows = [[c for c in ops if c.startswith("_attention")] for ops in calls]
    # A forward reads its mask, whatever its gradient takes.
    whole = reason == "mask"
    assert rows == [
        [] if whole else ["_attention_softmax"],
        ["_attention_softmax_backward"],
        ["_attention_softmax_double_backward"],
    ]
    products = [ops.count("bmm") + ops.count("baddbmm") for ops in calls]
    assert products == [0 if whole else 2, 5, 12]
    cpu = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    assert passes(attention, cpu, cpu)[2] == ["scaled_dot_product_attention_double_backward"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_have_the_values_of_the_whole(case):
    """The path of devices without a kernel of ours, and of what kernels do not cover."""

    def by_parts(call, **changes):
        kernel = torch._C.DispatchKey.CompositeExplicitAutograd
        return call(lambda op, *args, **kwargs: op._op_dk(kernel, *args, **kwargs), **changes)

    *calls, double = case.calls(case.draw())
    with torch.no_grad():
        for call in (*calls, double):
            assert_close(by_parts(call), call())
        incoming = double.arguments[: 3 + (case.mask is not None)]
        for given in subsets(incoming):
            undefined = dict.fromkeys(set(incoming) - set(given))
            assert_close(by_parts(double, **undefined), double(**undefined))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
def test_switch_makes_pytorchs_attention_differentiable_twice(kind, dtype):
    query, key, value, g, *grad_grads = torch.randn(7, 2, 3, 70, 16, dtype=torch.float64).to(dtype)
    mask = torch.randn(70, 70).to(dtype) if kind == "mask" else None
    added = torch.full((70, 70), -math.inf).triu(1) if kind == "causal" else mask
    operands = Operands([query, key, value], g, grad_grads)

    def stock(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal", scale=0.3)

    def plain(*inputs):
        mask = None if added is None else added.double()
        return reference.scaled_dot_product_attention(*inputs, mask, 0.3)

    with pytest.raises(RuntimeError, match="not implemented"):
        operands.orders(stock)
    with gk.set_fused_double_backward(True):
        ours = operands.orders(stock)
    leaves = [t.detach().requires_grad_() for t in operands.inputs]
    output = stock(*leaves)
    assert torch.equal(ours[0][0], output)
    assert all(map(torch.equal, ours[1], torch.autograd.grad(output, leaves, g)))
    exact = operands.map(torch.Tensor.double).orders(plain)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert_close([t.double() for t in ours[2]], exact[2], rtol=tolerance, atol=tolerance)


def test_switch_leaves_the_rest_to_pytorch():
    query, key, value = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    with gk.set_fused_double_backward(True):
        F.scaled_dot_product_attention(query, key, value).sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(query, key, value)
        # The values of a dropout mask are PyTorch's secret; its math path keeps one.
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
        (grad,) = torch.autograd.grad(output.sum(), query, create_graph=True)
        grad.sum().backward()


def test_exported_graph_is_plain():
    class Attends(torch.nn.Module):
        def forward(self, qkv, mask):
            return qkv_attention(qkv, mask)

    exported = torch.export.export(Attends(), (torch.randn(4, 5, 3, 2, 3), torch.randn(2, 5, 5)))
    assert "gradnorm_kernels" not in str(exported.graph)


def test_weights_that_a_mask_leaves_tiny():
    """exp(-100) is no normal number: it costs no time, and the process's arithmetic stays as it was."""
    torch.manual_seed(0)
    qkv = torch.randn(64, 49, 3, 4, 16)
    upstream = torch.randn(64, 49, 4, 16)
    excluded = torch.rand(49, 49) < 0.5

    def seconds(lowest):
        mask = torch.zeros(49, 49).masked_fill_(excluded, lowest)
        taken = []
        for _ in range(10):
            start = time.perf_counter()
            OPS.qkv_attention(qkv, mask)
            OPS.qkv_attention_backward(upstream, qkv, mask, output_mask=[True, False])
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert seconds(-100.0) < 3 * seconds(-1000.0)
    tiny = torch.tensor(1e-40)
    assert (tiny * 1).item() > 0
