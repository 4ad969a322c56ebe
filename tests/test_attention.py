"""Attention on the CPU: values, derivatives of every order, the switch, transforms, compilers, bad input."""

import math
import time
from dataclasses import dataclass

import formulas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import each_instruction_set, run_under
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """One row for each shape; every test of values runs on every row."""

    name: str
    batch: tuple
    queries: int
    keys: int
    columns: int
    value_columns: int
    mask: tuple | None = None
    scale: float | None = None

    def __str__(self) -> str:
        return self.name

    def operands(self, dtype=torch.float64, seed=0):
        """query, key, value and, if there is one, attn_mask."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [
            (*self.batch, self.queries, self.columns),
            (*self.batch, self.keys, self.columns),
            (*self.batch, self.keys, self.value_columns),
        ]
        shapes += [self.mask] if self.mask is not None else []
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]

    def gradients(self, dtype=torch.float64):
        """grad_output, and one of each operand's gradient."""
        grad_output = torch.randn(*self.batch, self.queries, self.value_columns, dtype=torch.float64)
        return grad_output.to(dtype), [torch.randn_like(t) for t in self.operands(dtype)]

    def fused(self, *operands):
        return gk.functional.scaled_dot_product_attention(*operands, scale=self.scale)

    def reference(self, *operands):
        return formulas.scaled_dot_product_attention(*operands, scale=self.scale)


CASES = [
    Case("shifted windows", (2, 3, 2), 49, 49, 32, 32, (3, 2, 49, 49)),
    Case("windows with a bias", (4, 3), 49, 49, 32, 32, (3, 49, 49)),
    # Some heads of whole vectors, some not.
    Case("plain", (2, 2), 33, 33, 16, 16, scale=0.3),
    # More rows of scores than one tile holds, and columns that leave part of a vector.
    Case("long", (1, 2), 300, 520, 17, 40, (300, 1)),
    Case("mask of keys", (2, 3), 5, 7, 8, 9, (2, 1, 1, 7)),
    Case("mask of heads alone", (2, 3), 5, 7, 8, 9, (3, 1, 1)),
    Case("mask of one row", (2,), 5, 7, 8, 9, (7,)),
    Case("one matrix", (), 5, 7, 3, 4, (5, 7)),
    Case("four batch dimensions", (2, 2, 2, 2), 6, 6, 4, 4, (2, 2, 1, 1, 6, 6)),
    Case("four batch dimensions, the first summed", (2, 2, 2, 2), 6, 6, 4, 4, (2, 2, 6, 6)),
]
SMALL = [case for case in CASES if case.queries < 10]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", SMALL, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def all_orders(function, operands, grad_output, grad_grads):
    """The output, the first gradients, and the double backward's results."""
    operands = [t.detach().requires_grad_() for t in operands]
    grad_output = grad_output.detach().requires_grad_()
    output = function(*operands)
    grads = torch.autograd.grad(output, operands, grad_output, create_graph=True)
    second = torch.autograd.grad(grads, [grad_output, *operands], grad_grads)
    return [output, *grads, *second]


def names(operands):
    inputs = ["query", "key", "value", "attn_mask"][: len(operands)]
    return ["output", *(f"grad of {i}" for i in inputs), "grad_grad_output", *(f"second {i}" for i in inputs)]


@each_case
@each_dtype
def test_error_is_at_most_twice_stocks(case, dtype):
    operands = case.operands(dtype)
    grad_output, grad_grads = case.gradients(dtype)
    fused = all_orders(case.fused, operands, grad_output, grad_grads)
    stock = all_orders(case.reference, operands, grad_output, grad_grads)
    exact = all_orders(
        case.reference, [t.double() for t in operands], grad_output.double(), [t.double() for t in grad_grads]
    )
    for name, ours, theirs, wanted in zip(names(operands), fused, stock, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == wanted.shape
        # The least of few elements' errors is a matter of luck.
        floor = 2e-14 if dtype == torch.float64 else torch.finfo(dtype).eps * wanted.abs().max().item()
        error = (ours.double() - wanted).abs().max().item()
        stock_error = (theirs.double() - wanted).abs().max().item()
        assert error <= 2 * stock_error + floor, f"{name}: {error:.3e}, stock {stock_error:.3e}"


@each_case
def test_reference_backwards_are_autograds(case):
    operands = case.operands()
    grad_output, grad_grads = case.gradients()
    mask = operands[3] if case.mask is not None else None
    scores = (*case.batch, case.queries, case.keys)
    shapes = [t.shape for t in operands]

    def summed(grads):
        return [g.sum_to_size(shape) for g, shape in zip(grads, shapes, strict=False)]

    expected = all_orders(case.reference, operands, grad_output, grad_grads)
    first = formulas.scaled_dot_product_attention_backward(grad_output, *operands[:3], mask, case.scale)
    dd_scores = grad_grads[3].expand(scores) if mask is not None else torch.zeros(scores).double()
    second = formulas.scaled_dot_product_attention_double_backward(
        (*grad_grads[:3], dd_scores), grad_output, *operands[:3], mask, case.scale
    )
    n = len(operands)
    torch.testing.assert_close(expected[1 : n + 1], summed(first))
    torch.testing.assert_close(expected[n + 1], second[0])
    torch.testing.assert_close(expected[n + 2 :], summed(second[1:]))


@each_small_case
def test_gradcheck_up_to_third_order(case):
    operands = [t.requires_grad_() for t in case.operands()]
    grad_output, grad_grads = case.gradients()
    assert torch.autograd.gradcheck(case.fused, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.fused, operands, fast_mode=True)

    def double_backward(*tensors):
        mask = tensors[7] if case.mask is not None else None
        return OPS.scaled_dot_product_attention_double_backward(
            *tensors[:3],
            None,
            *tensors[3:7],
            mask,
            scale=case.scale,
            output_mask=[True] * 4 + [mask is not None],
        )[: 4 + (mask is not None)]

    tensors = [t.requires_grad_() for t in [*grad_grads[:3], grad_output]] + operands
    assert torch.autograd.gradcheck(double_backward, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(double_backward, tensors, fast_mode=True)


def test_third_order_equals_plain_attention():
    case = CASES[0]

    def third(function):
        operands = [t.requires_grad_() for t in case.operands()]
        result = function(*operands)
        for _ in range(3):
            result = sum(
                g.sin().sum() for g in torch.autograd.grad(result.sum(), operands, create_graph=True)
            )
        return torch.autograd.grad(result, operands)

    torch.testing.assert_close(third(case.fused), third(case.reference), rtol=1e-9, atol=1e-11)


def qkv_of(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def by_unbinding(qkv, attn_mask=None, scale=None):
    query, key, value = qkv.transpose(-4, -2).unbind(-3)
    return formulas.scaled_dot_product_attention(query, key, value, attn_mask, scale).transpose(-3, -2)


QKV = [((2, 9, 3, 2, 4), None), ((2, 3, 9, 3, 2, 4), (3, 2, 9, 9)), ((2, 49, 3, 2, 32), (2, 49, 49))]


@pytest.mark.parametrize(("shape", "mask"), QKV, ids=str)
def test_qkv_attention(shape, mask):
    operands = [qkv_of(*shape)] + ([torch.randn(mask).double()] if mask else [])
    grad_output = qkv_of(*shape[:-3], *shape[-2:])
    grad_grads = [torch.randn_like(t) for t in operands]
    fused = all_orders(gk.functional.qkv_attention, operands, grad_output, grad_grads)
    expected = all_orders(by_unbinding, operands, grad_output, grad_grads)
    torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-12)
    assert all(t.is_contiguous() for t in fused)


def test_qkv_attention_in_higher_orders():
    qkv, mask = qkv_of(2, 5, 3, 2, 4).requires_grad_(), torch.randn(2, 5, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(gk.functional.qkv_attention, (qkv, mask))
    assert torch.autograd.gradgradcheck(gk.functional.qkv_attention, (qkv, mask))

    def scalar(function):
        return lambda qkv: function(qkv, mask.detach()).pow(2).sum()

    for transform in (
        lambda f: torch.func.hessian(f)(qkv.detach()[:1]),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(qkv.detach()),
    ):
        ours, theirs = transform(scalar(gk.functional.qkv_attention)), transform(scalar(by_unbinding))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


LAYOUTS = {
    "split from one tensor": lambda t: torch.stack([t, t, t]).movedim(-2, 1).contiguous().movedim(1, -2)[1],
    "columns apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "every other row": lambda t: torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :],
    "expanded": lambda t: t[..., :1, :].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits(layout, dtype):
    case = CASES[0]
    operands = [LAYOUTS[layout](t) for t in case.operands(dtype)]
    grad_output, grad_grads = case.gradients(dtype)
    grad_output, grad_grads = LAYOUTS[layout](grad_output), [LAYOUTS[layout](t) for t in grad_grads]
    results = all_orders(case.fused, operands, grad_output, grad_grads)
    expected = all_orders(
        case.fused,
        [t.contiguous() for t in operands],
        grad_output.contiguous(),
        [t.contiguous() for t in grad_grads],
    )
    for name, result, wanted in zip(names(operands), results, expected, strict=True):
        assert torch.equal(result, wanted), name


def test_usual_reshape_after_attention_is_a_view():
    operands = [torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3)]
    output = gk.functional.scaled_dot_product_attention(*operands)
    grads = torch.autograd.grad(output, operands, torch.randn_like(output), create_graph=True)
    for tensor in (output, *grads):
        assert tensor.transpose(1, 2).view(2, 5, 12).is_contiguous()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_fuzzed_shapes(data, dtype):
    size = st.integers(0, 20)
    batch = tuple(data.draw(st.lists(st.integers(0, 3), max_size=4)))
    queries, keys, columns, value_columns = (data.draw(size) for _ in range(4))
    full = (*batch, queries, keys)
    mask = tuple(1 if data.draw(st.booleans()) else n for n in full)[data.draw(st.integers(0, len(full))) :]
    case = Case("", batch, queries, keys, columns, value_columns, mask, scale=0.5)
    operands = case.operands(dtype)
    grad_output, grad_grads = case.gradients(dtype)
    ours = all_orders(case.fused, operands, grad_output, grad_grads)
    doubles = [[t.double() for t in ts] for ts in (operands, [grad_output], grad_grads)]
    wanted = all_orders(case.reference, doubles[0], doubles[1][0], doubles[2])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.5}[dtype]
    for name, result, exact in zip(names(operands), ours, wanted, strict=True):
        torch.testing.assert_close(
            result.double(), exact, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_leading_dimensions_broadcast():
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(3, 7, 4)[None], torch.randn(1, 1, 7, 6)
    ours = gk.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_heads_of_key_and_value_are_repeated(options):
    query, key, value = (torch.randn(2, heads, 5, 4, requires_grad=True) for heads in (6, 2, 3))
    expected = F.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(2, 1), **options
    )
    ours = gk.functional.scaled_dot_product_attention(query, key, value, **options, enable_gqa=True)
    torch.testing.assert_close(ours, expected)
    first, wanted = (
        torch.autograd.grad(output.square().sum(), (query, key, value), create_graph=output is ours)
        for output in (ours, expected)
    )
    torch.testing.assert_close(first, wanted)
    second = torch.autograd.grad(sum(f.square().sum() for f in first), (query, key, value))
    assert [s.shape for s in second] == [query.shape, key.shape, value.shape]
    with pytest.raises(ValueError, match="key to have a divisor of query's heads"):
        gk.functional.scaled_dot_product_attention(query[:, :5], key, value, enable_gqa=True)
    with pytest.raises(ValueError, match="key to have a divisor of query's heads"):
        gk.functional.scaled_dot_product_attention(query[0, 0], key[0, 0], value[0, 0], enable_gqa=True)


@each_dtype
def test_masks_of_other_dtypes(dtype):
    query, key, value = (torch.randn(2, 3, 9, 4).to(dtype) for _ in range(3))
    allowed = torch.rand(9, 9) > 0.3
    allowed[:, 0] = True
    result = gk.functional.scaled_dot_product_attention(query, key, value, allowed)
    expected = F.scaled_dot_product_attention(query, key, value, allowed)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    for mask_dtype in DTYPES:
        mask = torch.randn(3, 9, 9, dtype=mask_dtype, requires_grad=True)
        output = gk.functional.scaled_dot_product_attention(query, key, value, mask)
        wanted = formulas.scaled_dot_product_attention(*(t.double() for t in (query, key, value, mask)))
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), wanted, rtol=2e-2, atol=2e-2)
        assert torch.autograd.grad(output.sum(), mask)[0].dtype == mask_dtype


def test_causal_and_dropout():
    query, key, value = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    ours = gk.functional.scaled_dot_product_attention(query, key, value, None, 0.0, True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    ones = torch.ones(2, 3, 6, 4)
    dropped = gk.functional.scaled_dot_product_attention(query, key, ones, dropout_p=0.5)
    assert (dropped != 1).any()
    torch.testing.assert_close(
        gk.functional.scaled_dot_product_attention(query, key, ones, dropout_p=1.0), torch.zeros_like(ones)
    )
    (grad,) = torch.autograd.grad(dropped.square().sum(), query, create_graph=True)
    torch.autograd.grad(grad.square().sum(), (query, key))


@each_dtype
def test_queries_without_keys_get_zeros(dtype):
    query, key, value = (torch.randn(2, 3, 20, 4).to(dtype) for _ in range(3))
    mask = torch.zeros(20, 20, dtype=dtype)
    mask[4] = -math.inf
    mask[5, :17] = -math.inf
    grad_output = torch.randn(2, 3, 20, 4).to(dtype)
    results = all_orders(
        gk.functional.scaled_dot_product_attention,
        (query, key, value, mask),
        grad_output,
        [torch.randn_like(t) for t in (query, key, value, mask)],
    )
    assert all(result.isfinite().all() for result in results)
    for result in (results[0], results[1], results[5], results[6]):
        assert not result[..., 4, :].any()
        assert result[..., 5, :].any()
    assert not results[4][4].any() and not results[4][5, :17].any()


@each_dtype
def test_nan_propagates_within_its_problem(dtype):
    query, key, value = (torch.randn(2, 2, 37, 20).to(dtype) for _ in range(3))
    key[0, 1, 3, 2] = math.nan
    ones = torch.ones(2, 2, 37, 20, dtype=dtype)
    results = all_orders(gk.functional.scaled_dot_product_attention, (query, key, value), ones, [ones] * 3)
    for result in results:
        assert result[0, 1].isnan().all()
        result[0, 1] = 0
        assert result.isfinite().all()


@each_instruction_set
def test_every_instruction_set(capability):
    checks = """
for case in t.CASES[:4]:
    for dtype in t.DTYPES[:3]:
        t.test_error_is_at_most_twice_stocks(case, dtype)
t.test_nan_propagates_within_its_problem(torch.float32)
"""
    run_under(capability, __name__, checks)


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls.append(func.name().removeprefix("gradnorm_kernels::"))
        return func(*args, **(kwargs or {}))


def passes(function, operands, inputs):
    """The ops of each pass, in which the gradients of inputs alone are asked for."""
    counters = [CallCounter() for _ in range(3)]
    with counters[0]:
        output = function(*operands)
    grad_output = torch.empty_like(output).requires_grad_()
    with counters[1]:
        grads = torch.autograd.grad(output, inputs, grad_output, create_graph=True)
    grad_grads = [torch.empty_like(g) for g in grads]
    with counters[2]:
        torch.autograd.grad(grads, [grad_output, *operands], grad_grads, materialize_grads=True)
    return [counter.calls for counter in counters]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_pass_is_one_op(device):
    operands = [t.to(device).requires_grad_() for t in CASES[0].operands(torch.float32)]
    op = "scaled_dot_product_attention"
    for inputs in (operands, operands[:3], operands[:1]):
        calls = passes(gk.functional.scaled_dot_product_attention, operands, inputs)
        assert calls == [[op], [f"{op}_backward"], [f"{op}_double_backward"]]
    for tokens in (49, 197):
        qkv = torch.empty(1, tokens, 3, 2, 64, device=device, requires_grad=True)
        assert passes(gk.functional.qkv_attention, [qkv], [qkv]) == [
            ["qkv_attention"],
            ["qkv_attention_backward"],
            ["qkv_attention_double_backward"],
        ]


@pytest.mark.parametrize("reason", ["dtype", "columns", "mask"])
def test_what_no_kernel_covers_is_visible_parts_on_other_devices(reason):
    dtype = torch.float64 if reason == "dtype" else torch.float32
    tokens, columns = (49, 65) if reason == "columns" else (197, 64)
    shapes = [(2, 3, tokens, columns)] * 3 + [(tokens, tokens)] * (reason == "mask")
    operands = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
    calls = passes(gk.functional.scaled_dot_product_attention, operands, operands)
    rows = [[c for c in ops if c.startswith("_attention")] for ops in calls]
    # A forward reads its mask, whatever its gradient takes.
    whole = reason == "mask"
    assert rows == [
        [] if whole else ["_attention_softmax"],
        ["_attention_softmax_backward"],
        ["_attention_softmax_double_backward"],
    ]
    products = [ops.count("aten::bmm") + ops.count("aten::baddbmm") for ops in calls]
    assert products == [0 if whole else 2, 5, 12]
    cpu = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    assert passes(gk.functional.scaled_dot_product_attention, cpu, cpu)[2] == [
        "scaled_dot_product_attention_double_backward"
    ]


@each_case
def test_parts_have_the_values_of_the_whole(case):
    """The path of devices without a kernel of ours, and of what kernels do not cover."""

    def by_parts(op, *args, **kwargs):
        return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)

    query, key, value, *mask = case.operands()
    mask = mask[0] if mask else None
    grad_output, grad_grads = case.gradients()
    dd_mask = grad_grads[3] if mask is not None else None
    wanted = [True] * 3 + [mask is not None]
    op = OPS.scaled_dot_product_attention
    backward, double_backward = (
        OPS.scaled_dot_product_attention_backward,
        OPS.scaled_dot_product_attention_double_backward,
    )
    calls = [
        (op.default, (query, key, value, mask), {}),
        (backward.default, (grad_output, query, key, value, mask), {"output_mask": wanted}),
    ]
    for grads in (grad_grads[:3], [grad_grads[0], None, None], [None, None, grad_grads[2]]):
        tensors = (*grads, dd_mask, grad_output, query, key, value, mask)
        calls.append((double_backward.default, tensors, {"output_mask": [True, *wanted]}))
    with torch.no_grad():
        for function, args, kwargs in calls:
            kwargs["scale"] = case.scale
            parts, whole = by_parts(function, *args, **kwargs), function(*args, **kwargs)
            torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("count", range(1, 16))
def test_every_combination_of_gradients(count):
    """Bit i of count: whether gradient i of query, key, value and attn_mask comes in, and is asked for."""
    case = CASES[4]
    chosen = [bool(count >> i & 1) for i in range(4)]
    grad_output, grad_grads = case.gradients()

    def run(function, first):
        operands = [t.requires_grad_() for t in case.operands()]
        taken = [t for t, use in zip(operands, chosen, strict=True) if use]
        output = function(*operands)
        grads = torch.autograd.grad(output, taken if first else operands, grad_output, create_graph=True)
        incoming = [g for g, use in zip(grad_grads, chosen, strict=True) if use]
        grads = [g for g, use in zip(grads, chosen, strict=True) if use] if not first else grads
        wanted = operands if first else taken
        return torch.autograd.grad(grads, wanted, incoming, allow_unused=True, materialize_grads=True)

    for first in (True, False):
        torch.testing.assert_close(run(case.fused, first), run(case.reference, first))


def test_undefined_gradients_stay_undefined():
    undefined = torch._C._functions.UndefinedGrad()
    operands = [t.requires_grad_() for t in CASES[0].operands()]
    undefined(CASES[0].fused(*operands)).sum().backward()
    output = CASES[0].fused(*operands)
    grads = torch.autograd.grad(output, operands, torch.ones_like(output), create_graph=True)
    sum(undefined(g).sum() for g in grads).backward()
    assert all(t.grad is None for t in operands)


def test_saved_tensors_are_not_modified_and_runs_repeat_exactly():
    case = CASES[0]
    operands = case.operands(torch.float32)
    grad_output, grad_grads = case.gradients(torch.float32)
    tensors = [*operands, grad_output, *grad_grads]
    originals = [t.clone() for t in tensors]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(all_orders(case.fused, operands, grad_output, grad_grads))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, tensors, originals))
    for results in zip(*runs, strict=True):
        assert all(torch.equal(results[0], result) for result in results[1:])
    changed = operands[0].clone().requires_grad_() * 1
    output = case.fused(changed, *operands[1:])
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def second_gradients(function, operands, grad_output, grad_grads):
    return all_orders(function, operands, grad_output, grad_grads)[len(operands) + 1 :]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
def test_switch_makes_pytorchs_attention_differentiable_twice(kind, dtype):
    query, key, value = (torch.randn(2, 3, 70, 16, dtype=torch.float64).to(dtype) for _ in range(3))
    mask = torch.randn(70, 70).to(dtype) if kind == "mask" else None
    grad_output = torch.randn(2, 3, 70, 16).to(dtype)
    grad_grads = [torch.randn_like(query) for _ in range(3)]

    def stock(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal", scale=0.3)

    first = all_first = None
    with pytest.raises(RuntimeError, match="not implemented"):
        second_gradients(stock, (query, key, value), grad_output, grad_grads)
    with gk.set_fused_double_backward(True):
        ours = all_orders(stock, (query, key, value), grad_output, grad_grads)
    operands = [t.detach().requires_grad_() for t in (query, key, value)]
    all_first = stock(*operands)
    first = torch.autograd.grad(all_first, operands, grad_output)
    assert torch.equal(ours[0], all_first) and all(map(torch.equal, ours[1:4], first))

    causal = torch.full((70, 70), -math.inf).triu(1) if kind == "causal" else None
    added = causal if kind == "causal" else None if mask is None else mask.double()

    def plain(query, key, value):
        return formulas.scaled_dot_product_attention(query, key, value, added, 0.3)

    exact = second_gradients(
        plain,
        [t.double() for t in (query, key, value)],
        grad_output.double(),
        [g.double() for g in grad_grads],
    )
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for result, wanted in zip(ours[4:], exact, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=tolerance, atol=tolerance)


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
        stock = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, key, value).square().sum())(query)
    ours = torch.func.grad(lambda q: gk.functional.scaled_dot_product_attention(q, key, value).square().sum())
    torch.testing.assert_close(stock, ours(query))


def test_third_order_under_the_switch():
    operands = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with gk.set_fused_double_backward(True):

        def backward(grad_output, *operands):
            output = F.scaled_dot_product_attention(*operands)
            return torch.autograd.grad(output, operands, grad_output, create_graph=True)

        grad_output = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(backward, (grad_output, *operands), fast_mode=True)
        assert torch.autograd.gradgradcheck(backward, (grad_output, *operands), fast_mode=True)


def test_timms_vision_transformer_under_the_switch():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_classes=5
    ).double()
    attentions = [m for m in model.modules() if hasattr(m, "fused_attn")]
    assert attentions
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def gradients(fused):
        for attention in attentions:
            attention.fused_attn = fused
        x = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.abs().sum(), list(model.parameters()), allow_unused=True)

    with gk.set_fused_double_backward(True):
        ours = gradients(True)
    for result, wanted in zip(ours, gradients(False), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_the_forward_mode_derivative(masked):
    query, key, value, mask = Case("", (2,), 3, 4, 2, 2, (3, 4)).operands()
    leaf, v = query.detach().clone().requires_grad_(), query.cos()

    def loss(query):
        output = gk.functional.scaled_dot_product_attention(query, key, value, mask if masked else None)
        return output.square().sum()

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaf, v)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
        (ours,) = torch.autograd.grad(tangent, leaf)
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad((grad * v).sum(), leaf)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_torch_func():
    case = Case("", (2,), 3, 4, 2, 2, (3, 4))
    query, key, value, mask = case.operands()

    def transforms(function):
        def f(query, mask):
            return function(query, key, value, mask).pow(2).sum()

        def squared_gradient(query):
            return torch.func.grad(f)(query, mask).square().sum()

        yield torch.func.grad(f, argnums=(0, 1))(query, mask)
        yield torch.func.grad(squared_gradient)(query)
        yield torch.func.grad(lambda q: torch.func.grad(squared_gradient)(q).square().sum())(query)
        yield torch.func.hessian(f, argnums=(0, 1))(query, mask)
        yield torch.func.jacrev(torch.func.jacrev(f))(query, mask)
        yield torch.func.vmap(function, in_dims=(0, 0, 0, None))(query, key, value, mask)
        yield torch.func.jvp(lambda q, m: function(q, key, value, m), (query, mask), (query.cos(), mask))
        yield torch.func.grad(lambda q: torch.func.jvp(f, (q, mask), (q.cos(), mask))[1])(query)
        leaf = query.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf, mask), leaf, create_graph=True)
        basis = torch.eye(leaf.numel(), dtype=torch.float64).view(-1, *leaf.shape)
        yield torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(query, query.cos())
            tangent = torch.autograd.forward_ad.unpack_dual(function(dual, key, value, mask)).tangent
        yield tangent

    for ours, wanted in zip(transforms(case.fused), transforms(case.reference), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


class AtenOnly(torch.Tensor):
    """A tensor subclass that knows ATen's ops alone, as DTensor does."""

    @staticmethod
    def __new__(cls, wrapped):
        return torch.Tensor._make_wrapper_subclass(cls, wrapped.shape, dtype=wrapped.dtype)

    def __init__(self, wrapped):
        self.wrapped = wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            return NotImplemented
        unwrapped = tree_map_only(cls, lambda t: t.wrapped, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, func(*unwrapped[0], **unwrapped[1]))


def test_tensor_subclasses():
    case = CASES[4]
    operands = case.operands()

    def second(operands):
        operands = [t.requires_grad_() for t in operands]
        (grad,) = torch.autograd.grad(case.fused(*operands).square().sum(), operands[:1], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), operands)

    expected = second([t.clone() for t in operands])
    for ours, wanted in zip(second([AtenOnly(t) for t in operands]), expected, strict=True):
        torch.testing.assert_close(ours.wrapped, wanted)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors():
    parts = [torch.randn(2, n, 4) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts)
    result = gk.functional.scaled_dot_product_attention(nested, nested, nested)
    for part, wanted in zip(result.unbind(), parts, strict=True):
        torch.testing.assert_close(part, gk.functional.scaled_dot_product_attention(wanted, wanted, wanted))


def test_autocast_matches_stock():
    query, key, value = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(3, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gk.functional.scaled_dot_product_attention(query, key.bfloat16(), value, mask)
        packed = gk.functional.qkv_attention(torch.stack([query, key, value], -3).transpose(1, 3), mask)
        stock = F.scaled_dot_product_attention(query, key, value, mask)
    assert ours.dtype == packed.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(ours.float().square().sum(), (query, mask), create_graph=True)
    assert [g.dtype for g in grads] == [torch.float32] * 2
    sum(g.square().sum() for g in grads).backward()
    assert all(t.grad.isfinite().all() for t in (query, key, value, mask))


def test_inference_mode():
    operands = CASES[0].operands()
    with torch.inference_mode():
        assert torch.equal(CASES[0].fused(*operands), CASES[0].fused(*[t.clone() for t in operands]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_opcheck():
    for case, dtype in ((CASES[4], torch.float32), (Case("", (2, 3), 5, 7, 8, 9), torch.bfloat16)):
        for requires_grad in (dtype == torch.float32,):
            operands = [t.requires_grad_(requires_grad) for t in case.operands(dtype)]
            mask = operands[3] if case.mask is not None else None
            grad_output, grad_grads = case.gradients(dtype)
            dd_mask = grad_grads[3] if case.mask is not None else None
            wanted = [True, False, True, mask is not None]
            torch.library.opcheck(OPS.scaled_dot_product_attention.default, (*operands[:3], mask))
            torch.library.opcheck(
                OPS.scaled_dot_product_attention_backward.default,
                (grad_output, *operands[:3], mask),
                {"output_mask": wanted},
            )
            torch.library.opcheck(
                OPS.scaled_dot_product_attention_double_backward.default,
                (grad_grads[0], None, grad_grads[2], dd_mask, grad_output, *operands[:3], mask),
                {"output_mask": [True, *wanted]},
            )
    for requires_grad in (False, True):
        qkv = torch.randn(2, 5, 3, 2, 4, requires_grad=requires_grad)
        mask, grad_output = torch.randn(5, 5), torch.randn(2, 5, 2, 4)
        torch.library.opcheck(OPS.qkv_attention.default, (qkv, mask))
        torch.library.opcheck(
            OPS.qkv_attention_backward.default, (grad_output, qkv, mask), {"output_mask": [True, False]}
        )
        torch.library.opcheck(
            OPS.qkv_attention_double_backward.default,
            (torch.randn_like(qkv), None, grad_output, qkv, mask),
            {"output_mask": [True, True, True]},
        )


class Attention(torch.nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(6, 18), torch.nn.Linear(6, 2)
        self.bias = torch.nn.Parameter(torch.randn(2, 5, 5))
        self.packed = packed

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, 2, 3))
        if self.packed:
            x = gk.functional.qkv_attention(qkv, self.bias)
        else:
            query, key, value = qkv.transpose(1, 3).unbind(2)
            x = gk.functional.scaled_dot_product_attention(query, key, value, self.bias).transpose(1, 2)
        return self.proj(x.flatten(-2))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_step_gives_eagers_gradients(packed):
    torch._dynamo.reset()
    model, x = Attention(packed), torch.randn(4, 5, 6)

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    def penalised(params):
        return loss(params, x) + torch.func.grad(loss, argnums=1)(params, x).abs().sum()

    params = dict(model.named_parameters())
    compiled = torch.compile(torch.func.grad(penalised), backend="aot_eager", fullgraph=True)(params)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    (model(x).square().sum() + gradient.abs().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(compiled[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_exported_graph_is_plain():
    exported = torch.export.export(Attention(True), (torch.randn(4, 5, 6),))
    assert "gradnorm_kernels" not in str(exported.graph)


BAD = {
    "query": (lambda t: t.int(), TypeError),
    "key": (lambda t: t[..., :1], ValueError),
    "value": (lambda t: t[..., :-1, :], ValueError),
    "attn_mask": (lambda t: t[..., :-1], ValueError),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, error = BAD[name]
    arguments = dict(zip(BAD, CASES[4].operands(), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=name):
        gk.functional.scaled_dot_product_attention(**arguments)


def test_other_bad_input_is_named():
    query, key, value, mask = CASES[4].operands()
    attention = gk.functional.scaled_dot_product_attention
    with pytest.raises(TypeError, match="key"):
        attention(query, key.float(), value)
    with pytest.raises(RuntimeError, match=r"value .* got meta"):
        attention(query, key, value.to("meta"))
    with pytest.raises(ValueError, match="query"):
        attention(query[0, 0, 0], key[0, 0, 0], value[0, 0, 0])
    with pytest.raises(ValueError, match="is_causal"):
        attention(query, key, value, mask, is_causal=True)
    with pytest.raises(ValueError, match="dropout_p"):
        attention(query, key, value, dropout_p=2)
    with pytest.raises(ValueError, match="qkv"):
        gk.functional.qkv_attention(torch.randn(2, 5, 2, 2, 4))
    with pytest.raises(ValueError, match="attn_mask"):
        gk.functional.qkv_attention(torch.randn(2, 5, 3, 2, 4), torch.randn(3, 5, 5))
    backward = OPS.scaled_dot_product_attention_backward
    with pytest.raises(ValueError, match="grad_output"):
        backward(value, query, key, value, output_mask=[True] * 3 + [False])
    with pytest.raises(ValueError, match="grad_grad_key"):
        OPS.scaled_dot_product_attention_double_backward(
            None,
            query,
            None,
            None,
            query @ key.mT @ value,
            query,
            key,
            value,
            output_mask=[True] * 4 + [False],
        )


def test_tables_cover_every_op():
    assert {"scaled_dot_product_attention", "qkv_attention"} <= set(gk.functional.__all__)
    assert all(isinstance(t, torch.Tensor) for t in tree_leaves([case.operands() for case in CASES]))


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
