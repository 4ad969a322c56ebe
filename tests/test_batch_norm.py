"""Batch normalisation on the CPU: values, derivatives of every order, transforms, compilers, bad input."""

import itertools
from dataclasses import dataclass

import formulas
import pytest
import torch
import torch.nn.functional as F
from instruction_sets import each_instruction_set, run_under
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """One row for each way to normalise; every test below runs on every row that it names."""

    shape: tuple[int, ...]
    training: bool
    affine: bool = True
    channels_last: bool = False

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), "train" if self.training else "eval"]
        return "-".join(words + ["plain"] * (not self.affine) + ["channels_last"] * self.channels_last)

    @property
    def channels(self):
        return self.shape[1]

    def draw(self, dtype=torch.float64):
        x = torch.randn(self.shape, dtype=torch.float64).to(dtype)
        if self.channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            x = x.contiguous(memory_format=formats[x.ndim])
        return x

    def tensors(self, dtype=torch.float64, parameter_dtype=None):
        """x, weight, bias, grad_output; then v, u, t, the gradients of the first backward's results."""
        parameter_dtype = parameter_dtype or dtype
        x, g, v = (self.draw(dtype) for _ in range(3))
        w, b, u, t = (torch.randn(self.channels).to(parameter_dtype) for _ in range(4))
        return (x, w, b, g), (v, u, t)

    def running(self, dtype=torch.float64):
        return torch.randn(self.channels).to(dtype), torch.rand(self.channels).add(0.5).to(dtype)

    def bind(self, function, running):
        """function of (x, w, b) alone; each call starts from the same running statistics."""
        mean, var = running

        def call(x, w, b):
            w, b = (w, b) if self.affine else (None, None)
            if self.training:
                return function(x, None, None, w, b, True, 0.1, EPS)
            return function(x, mean, var, w, b, False, 0.1, EPS)

        return call


CASES = [
    # Channels that do not fill a vector; rows of less than one vector, and of some and a remainder.
    Case((6, 5), True),
    Case((6, 5), False),
    Case((4, 3, 7), True),
    Case((4, 3, 7), False),
    Case((3, 19, 7, 11), True),
    Case((3, 19, 7, 11), False),
    Case((3, 19, 7, 11), True, channels_last=True),
    Case((3, 19, 7, 11), False, channels_last=True),
    Case((3, 19, 7, 11), True, affine=False),
    Case((3, 19, 7, 11), False, affine=False),
    Case((2, 20, 2, 3, 5), True, channels_last=True),
    Case((2, 20, 2, 3, 5), False),
    # Several chunks of rows, and of a row.
    Case((700, 33), True),
    Case((700, 33), False),
    Case((2, 2, 40, 50), True),
    Case((2, 2, 40, 50), False),
]
SMALL = [case for case in CASES if len(case.shape) < 4 and case.shape[0] < 10]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", SMALL, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_ways = pytest.mark.parametrize("way", ["function", "switch"])


def stock(*args):
    return F.batch_norm(*args)


@pytest.fixture
def fused(way):
    if way == "function":
        yield gk.functional.batch_norm
    else:
        with gk.set_fused_double_backward(True):
            yield stock


def reference_function(x, mean, var, w, b, training, momentum, eps):
    w = torch.ones(x.shape[1], dtype=x.dtype) if w is None else w
    b = torch.zeros(x.shape[1], dtype=x.dtype) if b is None else b
    return formulas.batch_norm(x, mean, var, w, b, training, eps)


def all_orders(case, function, operands, cotangents):
    """Output, the first backward's results, the double backward's for grad_output, x and w."""
    x, w, b, g = (t.detach().requires_grad_() for t in operands)
    inputs = (x, w, b) if case.affine else (x,)
    output = function(x, w, b)
    first = torch.autograd.grad(output, inputs, g, create_graph=True)
    second = torch.autograd.grad(
        first, (g, x, w) if case.affine else (g, x), cotangents[: len(first)], allow_unused=True
    )
    if len(first) == 1 and not case.training:
        assert second[1] is None
        second = second[:1]
    return [output.detach(), *(t.detach() for t in first), *second]


def assert_no_worse_than_stock(ours, theirs, exact):
    for index, (a, s, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == s.dtype, index
        error = (a.double() - e).abs().max().item()
        stock_error = (s.double() - e).abs().max().item()
        # Few values, of which stock's may be exact by luck: some roundings of the largest are allowed.
        rounding = torch.finfo(a.dtype).eps * e.abs().max().item()
        allowed = 2 * stock_error + (8 if a.dtype == torch.float64 else 1) * rounding
        assert error <= allowed, f"{index}: {error:.3e}, stock {stock_error:.3e}"


def check_accuracy(case, dtype, parameter_dtype, function):
    operands, cotangents = case.tensors(dtype, parameter_dtype)
    running = case.running(parameter_dtype)
    ours = all_orders(case, case.bind(function, running), operands, cotangents)
    with gk.set_fused_double_backward(False):
        theirs = all_orders(case, case.bind(stock, running), operands, cotangents)
    exact = all_orders(
        case,
        case.bind(reference_function, [t.double() for t in running]),
        [t.double() for t in operands],
        [t.double() for t in cotangents],
    )
    assert_no_worse_than_stock(ours, theirs, exact)
    assert ours[0].stride() == theirs[0].stride()
    for result in ours:
        assert result.stride() == operands[0].stride() or result.ndim == 1
    return ours, theirs


@each_case
@each_dtype
@both_ways
def test_error_is_at_most_twice_stocks(case, dtype, fused, way):
    ours, theirs = check_accuracy(case, dtype, dtype, fused)
    # PyTorch's own kernels, but for the first backward of the evaluation mode.
    same = 1 if way == "function" and not case.training else 4 if case.affine else 2
    for a, s in zip(ours[:same], theirs, strict=False):
        assert torch.equal(a, s)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_ways
def test_half_input_with_float_parameters(case, dtype, fused):
    check_accuracy(case, dtype, torch.float32, fused)


@pytest.mark.parametrize("training", [True, False])
def test_reference_is_its_own_derivative(training):
    case = Case((3, 4, 5, 2), training)
    (x, w, b, g), (v, u, t) = case.tensors()
    mean, var = case.running()
    exact = all_orders(case, case.bind(reference_function, (mean, var)), (x, w, b, g), (v, u, t))
    first = formulas.batch_norm_backward(g, x, mean, var, w, training, EPS)
    second = formulas.batch_norm_double_backward(v, u, t, g, x, mean, var, w, training, EPS)
    for ours, wanted in zip([*first, *second], exact[1:], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def layouts(case):
    x, _ = case.tensors()[0][:2]
    yield "contiguous", lambda t: t.contiguous()
    if x.ndim == 4:
        yield "channels_last", lambda t: t.contiguous(memory_format=torch.channels_last)
    yield "transposed", lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
    yield "channels at the end", lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)
    yield "sliced", lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2]
    yield "every other row", lambda t: torch.cat([t, t], 0)[: t.shape[0]]
    if x.ndim > 2:  # or all values of a channel would be the same one
        yield "expanded", lambda t: t[:1].expand_as(t)


@pytest.mark.parametrize("case", [case for case in CASES if not case.channels_last and case.affine], ids=str)
@both_ways
def test_layouts(case, fused):
    (x, w, b, g), (v, u, t) = case.tensors()
    function = case.bind(fused, case.running())
    for (name, lay), others in itertools.product(layouts(case), (False, True)):
        same = (lambda t: t) if not others else lay
        # Expanded values differ from those they are expanded from.
        operands = [lay(x), w, b, same(g)]
        cotangents = [same(v), u, t]
        expected = all_orders(
            case, function, [o.contiguous() for o in operands], [c.contiguous() for c in cotangents]
        )
        for ours, wanted in zip(all_orders(case, function, operands, cotangents), expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@each_case
@both_ways
def test_strided_parameters(case, fused):
    """Of which ATen's own kernels on the CPU get some gradients wrong."""
    (x, w, b, g), cotangents = case.tensors()
    running = case.running()

    def run(function, lay):
        return all_orders(
            case, case.bind(function, [lay(t) for t in running]), (x, lay(w), lay(b), g), cotangents
        )

    # detach() keeps strides.
    ours = run(fused, lambda t: torch.stack([t, t.cos()], -1)[:, 0])
    for a, e in zip(ours, run(reference_function, lambda t: t), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@each_case
@both_ways
def test_only_some_of_the_first_gradients(case, fused):
    (x, w, b, _), _ = case.tensors()
    running = case.running()

    def second(function, wanted, leaves):
        leaves = [t.clone().requires_grad_(k in leaves) for k, t in enumerate((x, w, b))]
        output = case.bind(function, running)(*leaves).exp()
        first = torch.autograd.grad(output.sum(), [leaves[k] for k in wanted], create_graph=True)
        return torch.autograd.grad(
            sum(f.square().sum() for f in first),
            [leaf for leaf in leaves if leaf.requires_grad],
            allow_unused=True,
            materialize_grads=True,
        )

    operands = range(3 if case.affine else 1)
    for wanted in (c for n in operands for c in itertools.combinations(operands, n + 1)):
        for leaves in {wanted, tuple(operands)}:
            for a, e in zip(
                second(fused, wanted, leaves), second(reference_function, wanted, leaves), strict=True
            ):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@each_case
def test_every_combination_of_gradients(case):
    """Each of the incoming gradients may be undefined, and each result unneeded."""
    operands, (v, u, t) = case.tensors()
    mean, var = case.running()
    stats = ((mean, var), (None, None))
    if case.training:
        x = operands[0]
        dims = [0, *range(2, x.ndim)]
        stats = (None, None), (x.mean(dims), (x.var(dims, correction=0) + EPS).rsqrt())
    for has_v, has_u, has_t in itertools.product((False, True), repeat=3):
        if not (has_v or has_u or has_t):
            continue
        for needs in itertools.product((False, True), repeat=3):
            if not any(needs):
                continue
            x, w, _, g = (o.clone() for o in operands)
            g.requires_grad_(needs[0])
            x.requires_grad_(needs[1])
            w.requires_grad_(needs[2])
            if not case.affine:
                w = None
            wanted = [o for o in (g, x, w) if o is not None and o.requires_grad]
            if not wanted:
                continue
            results = OPS.batch_norm_backward(
                g, x, w, *stats[0], *stats[1], case.training, EPS, [True, True, True]
            )
            weight = torch.ones(case.channels, dtype=x.dtype) if w is None else w
            exact = formulas.batch_norm_backward(g, x, mean, var, weight, case.training, EPS)
            pick = [k for k, has in enumerate((has_v, has_u, has_t)) if has]
            cotangents = [(v, u, t)[k] for k in pick]
            pairs = [(results[k], exact[k], c) for k, c in zip(pick, cotangents, strict=True)]
            pairs = [p for p in pairs if p[0].requires_grad and p[1].requires_grad]
            if not pairs:
                continue
            ours, expected = (
                torch.autograd.grad(
                    [p[i] for p in pairs],
                    wanted,
                    [p[2] for p in pairs],
                    allow_unused=True,
                    materialize_grads=True,
                )
                for i in (0, 1)
            )
            for o, e in zip(ours, expected, strict=True):
                torch.testing.assert_close(o, e, rtol=1e-10, atol=1e-10)


@each_small_case
@both_ways
def test_gradcheck_up_to_third_order(case, fused):
    (x, w, b, g), _ = case.tensors()
    function = case.bind(fused, case.running())
    operands = tuple(o.requires_grad_() for o in (x, w, b))
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands, g)

    def first(g, x, w, b):
        return torch.autograd.grad(function(x, w, b), (x, w), g, create_graph=True)

    # PyTorch's own is wrong here in training.
    assert torch.autograd.gradgradcheck(first, (g.requires_grad_(), *operands))


@each_small_case
@both_ways
def test_third_order_equals_the_reference(case, fused):
    (x, w, b, _), _ = case.tensors()
    running = case.running()

    def third(function):
        call = case.bind(function, running)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        result = call(*leaves).pow(3).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(result, leaves, create_graph=True, materialize_grads=True)
            result = sum(grad.square().sum() for grad in gradients)
        return gradients

    for ours, wanted in zip(third(fused), third(reference_function), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


class CallCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.name().removeprefix("gradnorm_kernels::").split("::")[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_unneeded_is_computed(training):
    case = Case((4, 3, 5, 5), training)
    (x, w, b, g), (v, _, _) = case.tensors(torch.float32)
    x, w, b, g = (t.requires_grad_() for t in (x, w, b, g))
    function = case.bind(gk.functional.batch_norm, case.running(torch.float32))

    def calls(outputs, inputs, *grads, **options):
        with CallCounter() as counter:
            result = torch.autograd.grad(outputs, inputs, *grads, **options)
        return counter.calls, result

    output = function(x, w, b)
    backward, (grad_input,) = calls(output, x, g, create_graph=True)
    double, _ = calls(grad_input, (g, x, w), v, retain_graph=True, allow_unused=True)
    only_grad_output, _ = calls(grad_input, g, v)
    first = "native_batch_norm_backward" if training else "batch_norm_backward"
    assert backward == [first]
    assert double == ["batch_norm_double_backward"]
    assert only_grad_output == [first]


class Traffic(TorchDispatchMode):
    """Elements that all ops but views read and write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.elements += sum(t.numel() for t in tensors)
        return result


@pytest.mark.parametrize("training", [True, False])
def test_memory_traffic(training):
    """In tensors of the input's size; in training each pass but the forward's output is read twice."""

    def traffic(function):
        shape = (64, 4, 32, 32)
        x, g, v = (torch.empty(shape, device="meta", requires_grad=True) for _ in range(3))
        w, b = (torch.empty(4, device="meta", requires_grad=True) for _ in range(2))
        mean, var = (torch.empty(4, device="meta") for _ in range(2))
        passes = [Traffic() for _ in range(3)]
        with passes[0]:
            output = function(x, mean, var, w, b, training)
        with passes[1]:
            (grad_input,) = torch.autograd.grad(output, x, g, create_graph=True)
        with passes[2]:
            torch.autograd.grad(grad_input, (g, x, w), v, allow_unused=True)
        return [round(counter.elements / x.numel(), 2) for counter in passes]

    assert traffic(gk.functional.batch_norm) == ([2, 3, 5] if training else [2, 2, 3])
    assert traffic(F.batch_norm)[2] > (50 if training else 9)


@each_case
def test_undefined_gradients_stay_undefined(case):
    undefined = torch._C._functions.UndefinedGrad()
    (x, w, b, g), _ = case.tensors()
    x, w, b, g = (t.requires_grad_() for t in (x, w, b, g))
    function = case.bind(gk.functional.batch_norm, case.running())
    undefined(function(x, w, b)).sum().backward()
    (grad_input,) = torch.autograd.grad(function(x, w, b), x, g, create_graph=True)
    undefined(grad_input).sum().backward()
    assert all(t.grad is None for t in (x, w, b, g))


@each_case
def test_saved_tensors_are_not_modified(case):
    operands, cotangents = case.tensors(torch.float32)
    running = case.running(torch.float32)
    originals = [t.clone() for t in (*operands, *cotangents, *running)]
    all_orders(case, case.bind(gk.functional.batch_norm, running), operands, cotangents)
    for tensor, original in zip((*operands, *cotangents, *running), originals, strict=True):
        assert torch.equal(tensor, original)


@each_case
def test_double_backward_repeats_exactly_with_any_number_of_threads(case):
    (x, w, _, g), (v, u, t) = case.tensors(torch.float32)
    mean, var = case.running(torch.float32)
    operands = (v, u, t, g, x, w, mean, var, mean, var, case.training, EPS)
    threads = torch.get_num_threads()
    try:
        runs = []
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            runs.append(OPS.batch_norm_double_backward(*operands))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@each_dtype
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_running_statistics_are_stocks(dtype, momentum):
    case = Case((4, 3, 5, 5), True)
    (x, w, b, _), _ = case.tensors(dtype)
    mean, var = case.running(dtype)

    def run(function, x):
        running = mean.clone(), var.clone()
        for _ in range(3):
            function(x, *running, w, b, True, momentum)
        return running

    for ours in (run(gk.functional.batch_norm, x), run(gk.functional.batch_norm, x.clone().requires_grad_())):
        assert all(map(torch.equal, ours, run(F.batch_norm, x)))

    def loss(x, running):
        return gk.functional.batch_norm(x, *running, w, b, True, momentum).sum()

    running = mean.clone(), var.clone()
    for _ in range(3):
        torch.func.grad(loss)(x, running)
    for ours, theirs in zip(running, run(F.batch_norm, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_updated_statistics_are_not_used_silently():
    """A graph of the evaluation mode, differentiated after a step in training, is an error."""
    case = Case((4, 3, 5), False)
    (x, w, b, _), _ = case.tensors()
    mean, var = case.running()
    output = gk.functional.batch_norm(x.requires_grad_(), mean, var, w, b)
    gk.functional.batch_norm(x, mean, var, w, b, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_small_case
def test_torch_func(case):
    (x, w, b, _), _ = case.tensors()
    running = case.running()

    def transforms(function):
        call = case.bind(function, running)

        def f(x, w, b):
            return call(x, w, b).pow(3).sum()

        operands = (x, w, b)
        every = (0, 1, 2)
        yield from torch.func.grad(f, every)(*operands)
        second = torch.func.grad(
            lambda *o: sum(a.square().sum() for a in torch.func.grad(f, every)(*o)), every
        )
        yield from second(*operands)
        yield torch.func.hessian(f)(*operands)
        yield torch.func.jacrev(torch.func.jacrev(f, 1), 0)(*operands)
        yield torch.func.jvp(call, operands, tuple(o.cos() for o in operands))[1]
        yield torch.func.grad(lambda x: torch.func.jvp(lambda x: f(x, w, b), (x,), (x.cos(),))[1])(x)
        several = torch.stack([x, x.sin()])
        yield torch.func.vmap(call, in_dims=(0, None, None))(several, w, b)
        yield torch.func.vmap(torch.func.grad(f), in_dims=(0, None, None))(several, w, b)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf, w, b), leaf, create_graph=True)
        basis = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
        yield torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)[0]
        (yield torch.autograd.grad(torch.func.grad(f)(leaf, w, b).square().sum(), leaf)[0])

    for ours, wanted in zip(
        transforms(gk.functional.batch_norm), transforms(reference_function), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@each_small_case
@pytest.mark.parametrize("argument", range(3), ids=["input", "weight", "bias"])
def test_forward_mode(case, argument):
    (x, w, b, _), _ = case.tensors()
    running = case.running()

    def derivatives(function):
        with torch.autograd.forward_ad.dual_level():
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            operands = list(leaves)
            operands[argument] = torch.autograd.forward_ad.make_dual(leaves[argument], leaves[argument].cos())
            output = case.bind(function, running)(*operands)
            tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
            # PyTorch's own is wrong here in training.
            return tangent, *torch.autograd.grad(
                tangent.square().sum(), leaves, allow_unused=True, materialize_grads=True
            )

    for ours, wanted in zip(
        derivatives(gk.functional.batch_norm), derivatives(reference_function), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


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
        result = func(*tree_map_only(cls, lambda t: t.wrapped, args), **(kwargs or {}))
        return tree_map_only(torch.Tensor, cls, result)


@each_small_case
@both_ways
def test_tensor_subclasses(case, fused):
    (x, w, b, _), _ = case.tensors()
    running = case.running()

    def second(function, x):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(
            case.bind(function, running)(x, w, b).pow(3).sum(), x, create_graph=True
        )
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(second(fused, AtenOnly(x)).wrapped, second(reference_function, x.clone()))


@each_small_case
def test_opcheck(case):
    (x, w, b, g), (v, u, t) = case.tensors()
    mean, var = case.running()
    if case.training:
        # Traced, they are computed from x.
        dims = [0, *range(2, x.ndim)]
        mean, var = x.mean(dims), (x.var(dims, correction=0) + EPS).rsqrt()
    for requires_grad in (False, True):
        x, w, b, g, v = (o.detach().requires_grad_(requires_grad) for o in (x, w, b, g, v))
        torch.library.opcheck(OPS.batch_norm.default, (x, w, b, mean, var, case.training, 0.1, EPS))
        statistics = (mean, var, mean, var, case.training, EPS)
        torch.library.opcheck(OPS.batch_norm_backward.default, (g, x, w, *statistics, [True, True, True]))
        torch.library.opcheck(OPS.batch_norm_double_backward.default, (v, u, t, g, x, w, *statistics))


def penalised_gradients(net, params, buffers, x):
    def loss(params, x):
        return torch.func.functional_call(net, (params, buffers), (x,)).square().sum()

    def penalised(params):
        return loss(params, x) + torch.func.grad(loss, argnums=1)(params, x).abs().sum()

    return torch.func.grad(penalised)(params)


class Net(torch.nn.Module):
    def __init__(self, function, training):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.function, self.mode = function, training

    def forward(self, x):
        norm = self.norm
        x = self.function(
            self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.mode
        )
        return F.silu(x)


@pytest.mark.parametrize("training", [True, False])
@both_ways
def test_whole_compiled_step(training, fused):
    torch._dynamo.reset()
    net = Net(fused, training)
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    x = torch.randn(2, 3, 6, 6)
    # Of the reference: in training PyTorch's own is wrong through torch.func, too.
    net.function = reference_with_defaults
    expected = penalised_gradients(net, params, buffers, x)
    net.function = fused
    compiled = torch.compile(penalised_gradients, backend="aot_eager", fullgraph=True)
    ours = compiled(net, params, {k: v.clone() for k, v in buffers.items()}, x)
    for name, wanted in expected.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-3, atol=1e-4)


def reference_with_defaults(x, mean, var, w, b, training, momentum=0.1, eps=1e-5):
    return reference_function(x, mean, var, w, b, training, momentum, eps)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_matches_stock(training):
    net, x = torch.nn.Conv2d(3, 8, 3), torch.randn(4, 3, 8, 8, requires_grad=True)
    norm = torch.nn.BatchNorm2d(8)

    def run(function):
        running = norm.running_mean.clone(), norm.running_var.clone()
        with torch.autocast("cpu", torch.bfloat16):
            y = function(net(x), *running, norm.weight, norm.bias, training)
            (grad,) = torch.autograd.grad(y.float().pow(3).sum(), x, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), (x, norm.weight, net.weight))
        return y, grad, *second

    for ours, theirs in zip(run(gk.functional.batch_norm), run(F.batch_norm), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2 * theirs.abs().max().item())


@each_case
def test_nan_stays_in_its_channel(case):
    operands, cotangents = case.tensors(torch.float32)
    running = case.running(torch.float32)
    operands[0].select(1, 1).flatten()[-1:].fill_(float("nan"))
    bad = operands[0].clone()
    bad[-1, 1] = float("nan")
    ours = all_orders(case, case.bind(gk.functional.batch_norm, running), (bad, *operands[1:]), cotangents)
    theirs = all_orders(case, case.bind(stock, running), (bad, *operands[1:]), cotangents)
    for index, (a, s) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a.isnan(), s.isnan()), index


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    for training in (True, False):
        x, w, b = torch.empty(shape), torch.ones(3), torch.ones(3)
        mean, var = torch.zeros(3), torch.ones(3)
        tensors = [t.clone().requires_grad_() for t in (x, w, b)]

        def run(function, tensors=tensors, training=training, mean=mean, var=var):
            output = function(tensors[0], mean, var, *tensors[1:], training)
            return output, *torch.autograd.grad(output.sum(), tensors, allow_unused=True)

        for ours, theirs in zip(run(gk.functional.batch_norm), run(F.batch_norm), strict=True):
            torch.testing.assert_close(ours, theirs)
        for inference in (False, True):
            with torch.inference_mode(inference):
                statistics = (mean, var, mean, var, training, EPS)
                results = OPS.batch_norm_double_backward(x, w, b, x, x, w, *statistics)
                assert [r.shape for r in results] == [x.shape, x.shape, w.shape]
                results = OPS.batch_norm_backward(x, x, w, *statistics, [True, True, True])
                assert [r.shape for r in results] == [x.shape, w.shape, w.shape]


def test_no_channels():
    x = torch.empty(2, 0, 3, requires_grad=True)
    output = gk.functional.batch_norm(x, None, None, training=True)
    assert output.shape == x.shape == torch.autograd.grad(output.sum(), x)[0].shape
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gk.functional.batch_norm(x[:1, :, :1], None, None, training=True)


def test_inference_mode_and_devices_without_a_kernel():
    case = Case((3, 4, 5, 2), True)
    (x, w, b, g), (v, u, t) = case.tensors()
    mean, var = case.running()
    with torch.inference_mode():
        ours = gk.functional.batch_norm(x, mean.clone(), var.clone(), w, b, True)
    assert torch.equal(ours, F.batch_norm(x, mean.clone(), var.clone(), w, b, True))
    meta = [a.to("meta") for a in (v, u, t, g, x, w, mean, var, mean, var)]
    for result in OPS.batch_norm_double_backward(*meta, True, EPS):
        assert result.device.type == "meta"


@each_instruction_set
def test_every_instruction_set(capability):
    checks = """
for case in t.CASES[4:8]:
    for dtype in t.DTYPES:
        t.check_accuracy(case, dtype, dtype, t.gk.functional.batch_norm)
"""
    run_under(capability, __name__, checks)


def test_switch_leaves_the_rest_to_pytorch():
    """What ours does not cover works while the switch is on, and all is PyTorch's again when it is off."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    with gk.set_fused_double_backward(True):
        norm = torch.nn.BatchNorm1d(3)
        (grad,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        assert "NativeBatchNormBackward" not in grad.grad_fn.name()
        empty = torch.empty(0, 3, 5, requires_grad=True)
        torch.autograd.grad(norm(empty).sum(), empty, create_graph=True)
    (grad,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    assert "NativeBatchNormBackward" in grad.grad_fn.name()


BAD = {
    "input of integers": ({"input": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "input"),
    "input without channels": ({"input": torch.randn(3)}, ValueError, "input"),
    "one value per channel": ({"input": torch.randn(1, 3), "training": True}, ValueError, "input"),
    "weight of another shape": ({"weight": torch.ones(4)}, ValueError, "weight"),
    "bias of integers": ({"bias": torch.ones(3, dtype=torch.int64)}, TypeError, "bias"),
    "running_var elsewhere": ({"running_var": torch.ones(3, device="meta")}, RuntimeError, "running_var"),
    "no running_mean": ({"running_mean": None}, ValueError, "running_mean"),
    "running_mean alone": ({"running_var": None, "training": True}, ValueError, "running_var"),
    "running_mean with a gradient": (
        {"running_mean": torch.zeros(3, requires_grad=True)}, ValueError, "running_mean"
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(bad):
    arguments, error, name = BAD[bad]
    good = {
        "input": torch.randn(4, 3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
    }
    with pytest.raises(error, match=f"batch_norm: expected .*{name}"):
        gk.functional.batch_norm(**(good | arguments))


def test_bad_gradients_are_named():
    x, c = torch.randn(4, 3), torch.ones(3)
    statistics = (c, c, c, c, False, EPS)
    with pytest.raises(ValueError, match="_backward: expected grad_output to have the shape of input"):
        OPS.batch_norm_backward(x[:2], x, c, *statistics, [True, True, True])
    with pytest.raises(ValueError, match="_backward: expected input to be given"):
        OPS.batch_norm_backward(x, None, c, *statistics, [True, True, True])
    with pytest.raises(TypeError, match="_double_backward: expected grad_grad_input to have the dtype"):
        OPS.batch_norm_double_backward(x.double(), c, c, x, x, c, *statistics)
    with pytest.raises(ValueError, match="_double_backward: expected input to be given"):
        OPS.batch_norm_double_backward(x, c, c, x, None, c, *statistics)
    with pytest.raises(ValueError, match="_double_backward: expected grad_grad_weight to have shape"):
        OPS.batch_norm_double_backward(x, c[:2], c, x, x, c, *statistics)
    with pytest.raises(ValueError, match="_backward: expected save_mean to be given where training is True"):
        OPS.batch_norm_backward(x, x, c, c, c, None, None, True, EPS, [True, True, True])


def test_schemas():
    assert str(OPS.batch_norm.default._schema) == (
        "gradnorm_kernels::batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, bool training, float momentum, float eps) -> Tensor"
    )
