"""The contracts that every family of ops meets, once: a family's tests are a table of cases and a subclass.

    class TestSoftmax(OpContract):
        cases = [SoftmaxCase("rows", (2, 5)), ...]
        schemas = "softmax(Tensor input, int dim, ScalarType? dtype=None) -> Tensor; ..."

A test that takes `case` runs on every row, one that takes `small_case` on rows of which whole Jacobians can
be computed, and one that takes `traced_case` on the rows that `traced` names: tracers take seconds a row
(`compiled_case`: the first of these, in `make test-all` each of them).
`ours` is how a case's function comes to be fused: called as ours, or PyTorch's own under the switch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import usual
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import all_orders
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import gradnorm_kernels as gk

OPS = torch.ops.gradnorm_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
ERRORS = (TypeError, ValueError, RuntimeError)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass
class Operands:
    """Of a case's function and its derivatives; an input that is not there, and its grad_grad, are None."""

    inputs: list[Tensor | None]
    grad_output: Tensor
    grad_grads: list[Tensor | None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        def each(tensors):
            return [None if t is None else function(t) for t in tensors]

        return Operands(each(self.inputs), function(self.grad_output), each(self.grad_grads))

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.inputs, self.grad_output, *self.grad_grads) if t is not None]

    def orders(self, function: Callable[..., Tensor], **options: Any) -> list[list[Tensor]]:
        return all_orders(function, self.inputs, self.grad_output, self.grad_grads, **options)


@dataclass(frozen=True)
class Call:
    """A call of one of our ops, with the arguments that autograd would give it."""

    name: str
    args: tuple[Any, ...]

    @property
    def op(self) -> Any:
        return getattr(OPS, self.name).default

    @property
    def arguments(self) -> list[str]:
        return [argument.name for argument in self.op._schema.arguments]

    def __call__(self, run: Callable[..., Any] | None = None, **changes: Any) -> Any:
        """By `run` where it is given; with arguments of these names changed."""
        n = len(self.op._schema.arguments) - sum(a.kwarg_only for a in self.op._schema.arguments)
        values = dict(zip(self.arguments, self.args, strict=False)) | changes
        positional = [values.pop(name) for name in self.arguments[:n] if name in values]
        return self.op(*positional, **values) if run is None else run(self.op, *positional, **values)


class Case:
    """A row of a family's table: what the methods here say of it is what the tests below need."""

    name: str
    # Of the inputs, in their order.
    names: Sequence[str] = ("input",)
    channels_last = False
    # Transforms of PyTorch's own op that are wrong or raise, also under the switch.
    wrong_in_pytorch: Sequence[str] = ()
    # Whether PyTorch's own second derivative is right, and a yardstick.
    right_in_pytorch = True
    # Arguments of calls that may not need a gradient.
    constants: Sequence[str] = ()
    # Whether its second derivative by an input is anything but zeros.
    curved = True
    # Which of an Operands' tensors() may not hold NaN or infinity.
    finite: Sequence[int] = ()
    # How many of the inputs have a dtype of their own: the last ones.
    parameters = 0
    # What a value is about as large as. Roundings are of it, where the largest value is smaller.
    unit = 1.0

    def __str__(self) -> str:
        return self.name

    def shapes(self) -> Sequence[tuple[int, ...] | None]:
        """Of the inputs; None for one that is not given."""
        raise NotImplementedError

    def fused(self, *inputs: Tensor | None) -> Tensor:
        raise NotImplementedError

    def stock(self, *inputs: Tensor | None) -> Tensor:
        """PyTorch's own, which the switch makes ours."""
        raise NotImplementedError

    def reference(self, *inputs: Tensor | None) -> Tensor:
        raise NotImplementedError

    def calls(self, operands: Operands) -> Iterator[Call]:
        """Every op with its arguments. Statistics of the input are computed from it, and detached."""
        raise NotImplementedError

    def passes(self, switch: bool) -> list[tuple[list[str] | None, float | None]] | None:
        """The kernels of `large`'s forward, first backward to the input alone, double backward of that to
        everything, and to grad_output alone; and how many tensors of its size each reads and writes; None is
        what does not matter."""
        return None

    @property
    def large(self) -> Case:
        """A case like it that is more than one thread's work, and beside whose input parameters are small."""
        return self

    def draw(self, dtype: torch.dtype = torch.float64, parameters: torch.dtype | None = None) -> Operands:
        shapes = self.shapes()
        inputs = [None if shape is None else self._one(shape) for shape in shapes]
        grad_output = self._one(self.reference(*inputs).shape)
        grad_grads = [None if shape is None else self._one(shape) for shape in shapes]
        operands = Operands(inputs, grad_output, grad_grads).map(lambda t: t.to(dtype))
        for tensors in (operands.inputs, operands.grad_grads):
            for k in range(len(shapes) - self.parameters, len(shapes)):
                if parameters and tensors[k] is not None:
                    tensors[k] = tensors[k].to(parameters)
        return operands

    def _one(self, shape: Sequence[int]) -> Tensor:
        t = torch.randn(tuple(shape), dtype=torch.float64)
        return channels_last(t) if self.channels_last else t

    def roundings(self, dtype: torch.dtype) -> float:
        """Of the largest value, which are allowed beside twice stock's error."""
        return 0

    def same_bits(self, operands: Operands) -> bool:
        """Whether operands of these strides give the bits of contiguous ones."""
        return True

    def result_names(self) -> list[str]:
        given = [name for name, shape in zip(self.names, self.shapes(), strict=True) if shape is not None]
        gradients = [f"grad_{name}" for name in given]
        return ["output", *gradients, "grad_grad_output", *(f"second {name}" for name in gradients)]

    def is_pytorchs(self, call: Call) -> bool:
        """Whether the kernel is PyTorch's own, whose bits may change with the threads and the mask."""
        return False

    def is_small(self) -> bool:
        sizes = [math.prod(shape) for shape in self.shapes() if shape is not None]
        return 0 not in sizes and sum(sizes) <= 64


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.ndim]) if t.ndim in formats else t


# Between the elements and before them lie other values, which a wrong stride would read.
LAYOUTS = {
    "channels_last": channels_last,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t,
    "middle last": lambda t: (
        t.movedim(t.ndim // 2, -1).contiguous().movedim(-1, t.ndim // 2) if t.ndim else t
    ),
    "sliced": lambda t: torch.stack([t, t.cos()], -1)[..., 0],
    "every other row": lambda t: torch.cat([t, t.cos()], 1)[:, : t.shape[1]] if t.ndim > 1 else t,
    "offset by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t) if t.ndim > 1 else t,
}


def strides(t: Tensor) -> list[int]:
    """That of a dimension of size 1 says nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


def flat(results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [t for order in results for t in order]


def subsets(items: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """All but the empty one; the whole first."""
    for n in range(len(items), 0, -1):
        yield from itertools.combinations(items, n)


def yardstick(case: Case, operands: Operands) -> list[Tensor]:
    """PyTorch's own results; the reference's in this dtype where PyTorch raises or is wrong."""
    with gk.set_fused_double_backward(False):
        try:
            return flat(operands.orders(case.stock if case.right_in_pytorch else case.reference))
        except RuntimeError:
            return flat(operands.orders(case.reference))


def assert_no_worse_than_stock(
    case: Case,
    ours: Sequence[Tensor],
    stock: Sequence[Tensor],
    exact: Sequence[Tensor],
    roundings: float = 0,
    floor: float = 0,
) -> None:
    """The error is at most twice stock's, and some roundings of the largest value where few elements make the
    comparison of two maxima a matter of luck, or where the reference itself rounds."""
    for name, a, s, e in zip(case.result_names(), ours, stock, exact, strict=True):
        assert (a.dtype, a.shape) == (s.dtype, e.shape), name
        if a.numel() == 0:
            continue
        error, stock_error = ((t.double() - e).abs().max().item() for t in (a, s))
        allowed = max(
            roundings,
            case.roundings(a.dtype),
            16 if a.dtype == torch.float64 else 2 if a.numel() < 2000 else 0,
        )
        if a.numel() < exact[0].numel():
            # Terms of a sum may cancel.
            allowed = max(allowed, 1) * math.sqrt(exact[0].numel() / a.numel())
        tiny = floor + allowed * torch.finfo(a.dtype).eps * max(e.abs().max().item(), case.unit)
        if math.isnan(stock_error):  # whose intermediates overflow in float16
            stock_error = torch.finfo(a.dtype).eps * e.abs().max().item()
        assert error <= 2 * stock_error + tiny, f"{name}: {error:.3e}, stock {stock_error:.3e}"


def assert_close(results: Any, expected: Any, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    for a, e in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Calls(TorchDispatchMode):
    """The kernels called, and the elements of the tensors that they read and write; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            name = func.name().split("::")[1].split(".")[0]
            self.names += [name] if name != "empty" else []
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.elements += sum(t.numel() for t in tensors)
        return result


class AtenOnly(Tensor):
    """A tensor subclass that knows ATen's ops alone, as DTensor does."""

    @staticmethod
    def __new__(cls, wrapped):
        return Tensor._make_wrapper_subclass(
            cls, wrapped.shape, strides=wrapped.stride(), dtype=wrapped.dtype
        )

    def __init__(self, wrapped):
        self.wrapped = wrapped

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            return NotImplemented
        args, kwargs = tree_map_only(cls, lambda t: t.wrapped, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


def transforms(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What torch.func and forward mode make of a function of its inputs."""
    inputs = [t.detach() for t in inputs]
    x, *rest = inputs
    every = tuple(range(len(inputs)))
    tangents = tuple(t.cos() for t in inputs)

    def f(*inputs):
        return function(*inputs).pow(3).sum()

    def of_first(x):
        return f(x, *rest)

    def norm(*inputs):
        return sum(g.sin().sum() for g in torch.func.grad(f, every)(*inputs))

    def batched():
        leaf = x.clone().requires_grad_()
        basis = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
        (grad,) = torch.autograd.grad(of_first(leaf), leaf, create_graph=True)
        return torch.autograd.grad(grad, leaf, basis, is_grads_batched=True)

    def inside_autograd():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(torch.func.grad(of_first)(leaf).sin().sum(), leaf)

    def vmapped(transform):
        for k, t in enumerate(inputs):
            in_dims = tuple(0 if k == j else None for j in every)
            several = [torch.stack([t, t.cos(), t + 1]) if k == j else u for j, u in enumerate(inputs)]
            yield torch.func.vmap(transform(k), in_dims)(*several)

    def dual_numbers():
        leaves = [t.clone().requires_grad_() for t in inputs]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(leaf, t) for leaf, t in zip(leaves, tangents, strict=True)]
            tangent = forward_ad.unpack_dual(function(*duals)).tangent
            # Where the tangent is constant, all gradients are 0.
            loss = tangent.square().sum() + sum(0 * leaf.sum() for leaf in leaves)
            gradients = torch.autograd.grad(loss, leaves)
        return tangent, gradients

    def third(x):
        return torch.func.grad(norm)(x, *rest).square().sum()

    def of_tangent(*inputs):
        return torch.func.jvp(f, inputs, tangents)[1]

    yield "gradients", lambda: torch.func.grad(f, every)(*inputs)
    yield "second order", lambda: torch.func.grad(norm, every)(*inputs)
    yield "third order", lambda: torch.func.grad(third)(x)
    yield "forward over reverse", lambda: torch.func.hessian(f, every)(*inputs)
    yield "reverse over reverse", lambda: torch.func.jacrev(torch.func.jacrev(of_first))(x)
    yield "jvp", lambda: torch.func.jvp(function, tuple(inputs), tangents)
    yield "reverse over jvp", lambda: torch.func.grad(of_tangent, every)(*inputs)
    yield "vmap", lambda: list(vmapped(lambda k: function))
    yield "vmap of gradients", lambda: list(vmapped(lambda k: torch.func.grad(f, k)))
    yield "vmap of Hessians", lambda: torch.func.vmap(torch.func.hessian(of_first))(torch.stack([x, x.cos()]))
    yield "batched gradients", batched
    yield "a transform inside autograd", inside_autograd
    yield "reverse over dual numbers", dual_numbers


def nth_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], order: int) -> Iterator[Any]:
    """The gradients of each order, each of a function of the last ones that no derivative of is constant."""
    result = function(*inputs).sin().sum()
    for _ in range(order):
        gradients = torch.autograd.grad(result, inputs, create_graph=True, materialize_grads=True)
        yield gradients
        result = sum(g.sin().sum() for g in gradients)


def penalised_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss and the norm of its gradient, through torch.func."""

    def loss(*inputs):
        return function(*inputs).pow(3).sum()

    def penalised(*inputs):
        return loss(*inputs) + torch.func.grad(loss)(*inputs).abs().sum()

    return torch.func.grad(penalised, tuple(range(len(inputs))))(*inputs)


def given_inputs(case: Case, function: Callable[..., Tensor], operands: Operands) -> tuple[Any, list[Tensor]]:
    """The function of the inputs that are there, and these."""
    there = [k for k, t in enumerate(operands.inputs) if t is not None]

    def call(*tensors):
        inputs: list[Tensor | None] = [None] * len(operands.inputs)
        for k, t in zip(there, tensors, strict=True):
            inputs[k] = t
        return function(*inputs)

    return call, [operands.inputs[k] for k in there]


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "shape": lambda t: t.new_ones(*t.shape, 7),
    "dtype": lambda t: t.double(),
    "device": lambda t: t.to("meta"),
}


class OpContract:
    cases: Sequence[Case] = ()
    # Rows of cases, by name, that tests which trace run on.
    traced: Sequence[str] = ()
    # Rows of cases, by name, that between them take every way through the kernels; by default all.
    kernels: Sequence[str] = ()
    # Of every op of the family, with a semicolon between them.
    schemas = ""
    # (op, argument, how it is broken) that is no error, or PyTorch's own; "" is every one.
    accepted: Sequence[tuple[str, str, str]] = ()
    # Or the output: whether the backward needs anything that the caller could modify.
    saves_inputs = True
    # How many times PyTorch's own nodes, recorded under the switch, can be differentiated without it: most
    # of its double backwards have no right derivative.
    outlived = 1
    # Whether the ops' results are in memory that they take themselves, or all in what ATen's ops took.
    takes_memory = True
    # How opcheck differentiates what it traces.
    traced_by = "test_aot_dispatch_dynamic"
    # Strategy of cases for the fuzzed test.
    random_cases: st.SearchStrategy[Case] | None = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        by_name = {str(case): case for case in self.cases}
        few = metafunc.config.getoption("--few-rows") and self.traced
        cases = [by_name[name] for name in self.traced] if few else self.cases
        choices = {
            "case": cases,
            "small_case": [case for case in cases if case.is_small()],
            "traced_case": [by_name[name] for name in self.traced],
            # Of the tests that take seconds a row, `make test` runs one.
            "compiled_case": usual([by_name[name] for name in self.traced], *self.traced[:1]),
            # float16 is computed as bfloat16 is.
            "dtype": usual(DTYPES, *map(str, DTYPES[:3])),
            "half": HALF,
            "layout": LAYOUTS,
            "broken": BROKEN,
        }
        if "layout" in metafunc.fixturenames:
            choices["case"] = usual(cases, *self.traced)
        marked = {name for mark in metafunc.definition.iter_markers("parametrize") for name in [mark.args[0]]}
        for name, values in choices.items():
            if name in metafunc.fixturenames and name not in marked:
                metafunc.parametrize(name, values, ids=str)

    @pytest.fixture(params=["function", "switch"])
    def ours(self, request):
        with gk.set_fused_double_backward(request.param == "switch"):
            yield by_function if request.param == "function" else by_switch

    def bad(self) -> Iterator[tuple[Callable[[], Any], Any, str]]:
        """Calls that the broken tensors below leave out, the error that each raises, and what it says."""
        yield from ()

    def check_accuracy(self, case, operands, ours, roundings=0, choices=None):
        """With every choice of defined gradients of the first gradients, or so many."""
        given = [k for k, v in enumerate(operands.grad_grads) if v is not None]
        for defined in itertools.islice(subsets(given), choices):
            grad_grads = [v if k in defined else None for k, v in enumerate(operands.grad_grads)]
            some = Operands(operands.inputs, operands.grad_output, grad_grads)
            exact = flat(some.map(Tensor.double).orders(case.reference))
            results, stock = flat(some.orders(ours(case))), yardstick(case, some)
            assert_no_worse_than_stock(case, results, stock, exact, roundings)

    def test_error_is_at_most_twice_stocks(self, case, dtype, ours):
        self.check_accuracy(case, case.draw(dtype), ours)

    def test_half_input_with_float32_parameters(self, case, half, ours):
        if case.parameters:
            self.check_accuracy(case, case.draw(half, torch.float32), ours)

    def test_every_choice_of_gradients(self, case, ours):
        """Of inputs that need one, and of first gradients that are computed."""
        operands = case.draw()
        function, inputs = given_inputs(case, ours(case), operands)
        reference, _ = given_inputs(case, case.reference, operands)
        grad_grads = [v for v in operands.grad_grads if v is not None]

        def second(function, needed, computed):
            leaves = [t.clone().requires_grad_(k in needed) for k, t in enumerate(inputs)]
            g = operands.grad_output.clone().requires_grad_()
            first = torch.autograd.grad(
                function(*leaves), [leaves[k] for k in computed], g, create_graph=True
            )
            pairs = [(f, grad_grads[k]) for f, k in zip(first, computed, strict=True) if f.requires_grad]
            wanted = [g, *(leaves[k] for k in needed)]
            if not pairs:
                return first
            results, incoming = zip(*pairs, strict=True)
            second = [
                torch.autograd.grad(results, some, incoming, retain_graph=True, materialize_grads=True)
                for some in (wanted, *([leaf] for leaf in wanted))
            ]
            return first, second

        every = range(len(inputs))
        for needed in subsets(every):
            for computed in {needed, *((k,) for k in needed)}:
                assert_close(second(function, needed, computed), second(reference, needed, computed))
        assert not function(*inputs).requires_grad

    def test_switch_keeps_the_forward_and_the_first_backward(self, case, dtype):
        operands = case.draw(dtype)
        function, inputs = given_inputs(case, case.stock, operands)

        def first(create_graph):
            leaves = [t.detach().requires_grad_() for t in inputs]
            output = function(*leaves)
            g = operands.grad_output
            return output, *torch.autograd.grad(output, leaves, g, create_graph=create_graph)

        expected = first(False)
        with gk.set_fused_double_backward(True):
            for results in (first(False), first(True)):
                for a, e in zip(results, expected, strict=True):
                    assert torch.equal(a, e) and a.stride() == e.stride()

    def test_any_strides(self, case, layout, ours):
        if math.prod(case.draw().grad_output.shape) == 0:
            pytest.skip("no element")
        change, dense, half = LAYOUTS[layout], case.draw(torch.float32), case.draw(torch.bfloat16)
        for operands in (
            dense.map(change),
            half.map(change),
            Operands([change(dense.inputs[0]), *dense.inputs[1:]], dense.grad_output, dense.grad_grads),
            Operands(dense.inputs, change(dense.grad_output), dense.map(change).grad_grads),
        ):
            before, contiguous = operands.map(torch.clone), operands.map(Tensor.contiguous)
            results = operands.orders(ours(case))
            assert all(map(torch.equal, operands.tensors(), before.tensors()))
            if case.same_bits(operands) and ours is by_function:
                assert all(map(torch.equal, flat(results), flat(contiguous.orders(ours(case)))))
            else:
                exact = flat(contiguous.map(Tensor.double).orders(case.reference))
                stock = yardstick(case, contiguous)
                assert_no_worse_than_stock(case, flat(results), stock, exact, roundings=4)
            if ours is by_function:
                self.check_strides(case, operands, results)

    def check_strides(self, case, operands, results):
        """PyTorch's own; the second gradients lie as the first."""
        (output,), first, second = results
        assert strides(output) == strides(case.stock(*operands.inputs))
        assert strides(second[1]) == strides(first[0])

    def test_fuzzed_shapes_and_strides(self, ours):
        if self.random_cases is None:
            pytest.skip("no strategy")

        @settings(deadline=None)
        @given(data=st.data(), case=self.random_cases, dtype=st.sampled_from(DTYPES))
        def check(data, case, dtype):
            operands = case.draw(dtype).map(
                lambda t: t if (chosen := data.draw(random_strides(t.ndim))) is None else strided(t, *chosen)
            )
            exact = flat(operands.map(Tensor.double).orders(case.reference))
            results, stock = flat(operands.orders(ours(case))), yardstick(case, operands)
            assert_no_worse_than_stock(case, results, stock, exact, roundings=30)

        check()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_nan_and_inf_reach_what_they_reach_in_the_reference(self, case, dtype, ours):
        operands = case.draw(dtype)
        for bad, which in itertools.product((math.nan, math.inf), range(len(operands.tensors()))):
            broken = operands.map(torch.clone)
            tensor = broken.tensors()[which]
            if tensor.numel() == 0 or which in case.finite:
                continue
            tensor[(-1,) * tensor.ndim] = bad
            exact = flat(broken.map(Tensor.double).orders(case.reference))
            for name, a, e in zip(case.result_names(), flat(broken.orders(ours(case))), exact, strict=True):
                assert self.is_reached(a, e), f"{bad} in tensor {which}: {name}"

    def is_reached(self, ours, exact):
        return torch.equal(ours.isfinite(), exact.isfinite())

    def test_memory_that_the_ops_take_is_poisoned(self, traced_case):
        """What conftest.py does to uninitialised memory reaches that which C++ takes, too."""
        calls = list(traced_case.calls(traced_case.draw(torch.float32)))
        with profile() as events:
            for call in calls:
                call()
        taken = [e for e in events.function_events if e.name in ("aten::empty", "aten::empty_strided")]
        assert taken or not self.takes_memory
        assert all("aten::fill_" in [child.name for child in e.cpu_children] for e in taken)

    def test_threads_change_no_bit(self, case):
        large = case.large
        calls = [c for c in large.calls(large.draw(torch.float32)) if not large.is_pytorchs(c)]
        runs = []
        for count in (1, 2, 7):
            with threads(count):
                runs.append([call() for call in calls])
        for run in runs[1:]:
            for a, e in zip(tree_leaves(run), tree_leaves(runs[0]), strict=True):
                assert a is e is None or torch.equal(a, e)

    def check_kernels(self):
        """With each instruction set, by test_instruction_sets.py."""
        for case in self.cases:
            if str(case) in self.kernels or not self.kernels:
                for dtype in DTYPES[:3]:
                    self.check_accuracy(case, case.draw(dtype), by_function)
                self.test_nan_and_inf_reach_what_they_reach_in_the_reference(case, torch.float32, by_function)

    def test_gradcheck_up_to_third_order(self, small_case, ours):
        operands = small_case.draw().map(Tensor.requires_grad_)
        function, inputs = given_inputs(small_case, ours(small_case), operands)
        fast = {"fast_mode": len(inputs) > 1}
        assert torch.autograd.gradcheck(function, inputs, **fast)
        assert torch.autograd.gradgradcheck(function, inputs, **fast)

        def gradients(g, *inputs):
            return torch.autograd.grad(function(*inputs), inputs, g, create_graph=True)

        assert torch.autograd.gradgradcheck(gradients, (operands.grad_output, *inputs), **fast)

    def test_gradcheck_of_the_ops(self, small_case):
        operands = small_case.draw()
        for k, call in enumerate(small_case.calls(operands)):
            tensors = operands.tensors()

            def function(*tensors, k=k):
                tensors = iter(tensors)
                values = operands.map(lambda _: next(tensors))
                return [t for t in tree_leaves(list(small_case.calls(values))[k]()) if t is not None]

            taken = [any(t is a for a in call.args) for t in tensors]
            tensors = [t.detach().clone().requires_grad_(r) for t, r in zip(tensors, taken, strict=True)]
            assert torch.autograd.gradcheck(function, tensors, fast_mode=True), call.name
            # Its fast mode compares the wrong outputs where one of them is constant, such as zeros.
            assert torch.autograd.gradgradcheck(function, tensors, fast_mode=small_case.curved), call.name

    def test_third_and_fourth_order_equal_the_references(self, small_case, ours):
        operands = small_case.draw().map(Tensor.requires_grad_)
        function, inputs = given_inputs(small_case, ours(small_case), operands)
        reference, _ = given_inputs(small_case, small_case.reference, operands)
        assert_close(list(nth_gradients(function, inputs, 4)), list(nth_gradients(reference, inputs, 4)))

    def test_a_graph_recorded_under_the_switch_outlives_it(self, small_case):
        operands = small_case.draw().map(Tensor.requires_grad_)
        function, inputs = given_inputs(small_case, small_case.stock, operands)
        reference, _ = given_inputs(small_case, small_case.reference, operands)

        def gradients(function, switch):
            with gk.set_fused_double_backward(switch):
                first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
            later = nth_gradients(lambda *_: torch.cat([f.flatten() for f in first]), inputs, self.outlived)
            return list(later)

        assert_close(gradients(function, True), gradients(reference, False))

    def test_transforms_and_forward_mode(self, small_case, ours):
        operands = small_case.draw()
        function, inputs = given_inputs(small_case, ours(small_case), operands)
        reference, _ = given_inputs(small_case, small_case.reference, operands)
        for (name, ours_by), (_, by) in zip(
            transforms(function, inputs), transforms(reference, inputs), strict=True
        ):
            if ours is by_function or name not in small_case.wrong_in_pytorch:
                assert_close(ours_by(), by())

    def test_hooks_and_checkpoints(self, small_case, ours):
        """What else looks at a graph: the gradient of the output itself, hooks, what runs it later."""
        operands = small_case.draw()
        fused, inputs = given_inputs(small_case, ours(small_case), operands)
        stock, _ = given_inputs(small_case, small_case.stock, operands)
        reference, _ = given_inputs(small_case, small_case.reference, operands)
        inputs = [t.requires_grad_() for t in inputs]

        def gradients(function, watch=lambda output: [output], of_output=True):
            output = function(*(t.sin() for t in inputs))
            watched = watch(output)
            first = torch.autograd.grad(output.pow(3).sum(), inputs, create_graph=True)
            loss = output.cos().sum() + sum(f.square().sum() for f in first)
            if watched and watched[0] is output:
                return torch.autograd.grad(loss, (*inputs, output) if of_output else inputs)
            watched.clear()
            gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
            return *gradients, *watched

        def node_hook(seen, output):
            output.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))

        def hooked(add):
            def watch(output):
                seen = [None]
                add(seen, output)
                return seen

            return watch

        with gk.set_fused_double_backward(False):
            try:
                # Not the reference's: of the output, whatever else computes from it has a gradient.
                expected = gradients(stock if small_case.right_in_pytorch else reference)
            except RuntimeError:  # not differentiable twice
                expected = gradients(reference)
        assert_close(gradients(fused), expected)
        for add in (lambda seen, output: output.register_hook(seen.append), node_hook):
            results = gradients(fused, hooked(add))
            assert_close(results, expected[: len(inputs)] + expected[-1:])
        again = gradients(lambda *inputs: checkpoint(fused, *inputs, use_reentrant=False), of_output=False)
        assert_close(again, expected[:-1])
        with torch.autograd.graph.save_on_cpu():
            assert_close(gradients(fused), expected)

    def test_tensor_subclasses(self, small_case, ours):
        if ours is by_switch and "tensor subclasses" in small_case.wrong_in_pytorch:
            pytest.skip("PyTorch's own raises")
        operands = small_case.draw()
        function, inputs = given_inputs(small_case, ours(small_case), operands)
        reference, _ = given_inputs(small_case, small_case.reference, operands)

        def second(function, inputs):
            inputs = [t.requires_grad_() for t in inputs]
            (gradient,) = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs[:1], create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), inputs, materialize_grads=True)

        expected = second(reference, [t.clone() for t in inputs])
        results = second(function, [AtenOnly(t.detach()) for t in inputs])
        assert_close([getattr(t, "wrapped", t) for t in results], expected)

    def test_undefined_gradients_stay_undefined(self, case, ours):
        undefined = torch._C._functions.UndefinedGrad()
        operands = case.draw().map(Tensor.requires_grad_)
        function, inputs = given_inputs(case, ours(case), operands)
        undefined(function(*inputs)).sum().backward()
        first = torch.autograd.grad(function(*inputs), inputs, operands.grad_output, create_graph=True)
        sum(undefined(f).sum() for f in first).backward()
        assert all(t.grad is None for t in operands.tensors())

    def test_saved_tensors_are_not_modified_and_runs_repeat_exactly(self, case):
        operands = case.draw(torch.float32)
        before = operands.map(torch.clone)
        first, second = (flat(operands.orders(case.fused)) for _ in range(2))
        assert all(map(torch.equal, operands.tensors(), before.tensors()))
        assert all(map(torch.equal, first, second))
        # What the caller modifies is either not needed any more or an error.
        function, inputs = given_inputs(case, case.fused, operands)
        errors = 0
        for k in range(len(inputs) + 1):
            leaves = [t.clone().requires_grad_() for t in inputs]
            operands_now = [leaf * 1 for leaf in leaves]
            output = function(*operands_now)
            expected = torch.autograd.grad(output, leaves, operands.grad_output, retain_graph=True)
            (*operands_now, output)[k].add_(1)
            try:
                results = torch.autograd.grad(output, leaves, operands.grad_output)
                assert all(map(torch.equal, results, expected))
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                errors += 1
        assert errors or not (self.saves_inputs and operands.grad_output.numel())

    def test_each_pass_is_one_kernel_of_the_least_traffic(self, case, ours):
        passes = case.passes(ours is by_switch)
        if passes is None:
            pytest.skip("not one kernel a pass")
        for results, wanted in zip(self.count(case.large, ours), passes, strict=True):
            assert wanted[0] is None or results[0] == wanted[0]
            assert wanted[1] is None or wanted[1] <= results[1] <= 1.03 * wanted[1] + 0.02
        with gk.set_fused_double_backward(False):
            try:
                stock = self.count(case.large, by_switch)[2][1]
            except RuntimeError:  # PyTorch's own has no double backward
                return
        assert passes[2][1] is None or stock > passes[2][1]

    def count(self, case, ours):
        """The kernels of each pass, and how many tensors of the input's size they read and write."""
        operands = case.draw(torch.float32).map(lambda t: t.to("meta").requires_grad_())
        function, inputs = given_inputs(case, ours(case), operands)
        g, v = operands.grad_output, operands.grad_grads[0].detach()
        counters = [Calls() for _ in range(4)]
        with counters[0]:
            output = function(*inputs)
        with counters[1]:
            (grad_input,) = torch.autograd.grad(output, inputs[0], g, create_graph=True)
        with counters[2]:
            torch.autograd.grad(grad_input, (g, *inputs), v, retain_graph=True, allow_unused=True)
        with counters[3]:
            torch.autograd.grad(grad_input, g, v)
        return [(counter.names, counter.elements / inputs[0].numel()) for counter in counters]

    def test_only_what_the_mask_asks_for(self, case):
        operands = case.draw(torch.float32)
        for call in case.calls(operands):
            if "output_mask" not in call.arguments:
                continue
            everything, exact = call(), {} if case.is_pytorchs(call) else {"rtol": 0, "atol": 0}
            full = call.args[call.arguments.index("output_mask")]
            for mask in itertools.product((True, False), repeat=len(full)):
                mask = [asked and possible for asked, possible in zip(mask, full, strict=True)]
                for result, wanted, asked in zip(call(output_mask=mask), everything, mask, strict=True):
                    assert (result is None) == (wanted is None or not asked)
                    if result is not None:
                        torch.testing.assert_close(result, wanted, **exact)

    def test_inference_mode_and_meta_tensors(self, case, ours):
        operands = case.draw(torch.float32)
        results = operands.orders(ours(case))
        with torch.inference_mode():
            output = ours(case)(*operands.inputs)
            # Without a gradient PyTorch's own may take another kernel.
            tolerance = 1e-5 if ours is by_switch else 0
            assert_close(output, results[0][0], rtol=tolerance, atol=tolerance)
            for call in case.calls(operands):
                meta = tree_map_only(Tensor, lambda t: t.to("meta"), call.args)
                self.check_meta(tree_leaves(Call(call.name, meta)()), tree_leaves(call()))
        on_meta = flat(operands.map(lambda t: t.to("meta")).orders(ours(case)))
        # The layout of PyTorch's own forward on meta, and of all it does under the switch, is its own.
        own = len(on_meta) if ours is by_switch else 1
        self.check_meta(on_meta[:own], flat(results)[:own], with_strides=False)
        self.check_meta(on_meta[own:], flat(results)[own:])

    def check_meta(self, on_meta, on_cpu, with_strides=True):
        for a, e in zip(on_meta, on_cpu, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                assert a.device.type == "meta"
                assert (a.shape, a.dtype) == (e.shape, e.dtype)
                assert not with_strides or strides(a) == strides(e)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
    def test_nested_tensors(self, small_case, ours):
        """As PyTorch's own takes them, or an error where that raises."""
        operands = small_case.draw(torch.float32)
        x, *rest = operands.inputs

        def gradients(function):
            nested = torch.nested.nested_tensor([x, torch.cat([x, x.cos()])], requires_grad=True)
            output = function(nested, *rest)
            output.to_padded_tensor(0.0).sin().sum().backward()
            return [*output.unbind(), *nested.grad.unbind()]

        with gk.set_fused_double_backward(False):
            try:
                expected = gradients(small_case.stock)
            except ERRORS:
                expected = None
        if expected is None:
            with pytest.raises(ERRORS):
                gradients(ours(small_case))
        else:
            assert_close(gradients(ours(small_case)), expected, rtol=1e-5, atol=1e-5)

    def test_autocast_matches_stock(self, small_case, ours):
        operands = small_case.draw(torch.float32).map(Tensor.requires_grad_)
        function, inputs = given_inputs(small_case, ours(small_case), operands)
        stock, _ = given_inputs(small_case, small_case.stock, operands)

        def run(function):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = function(*inputs), function(inputs[0].bfloat16(), *inputs[1:])
                loss = sum(output.float().sin().sum() for output in outputs)
                first = torch.autograd.grad(loss, inputs, create_graph=True)
            return *outputs, *first

        results = run(function)
        with gk.set_fused_double_backward(False):
            expected = run(stock)
        assert [r.dtype for r in results] == [e.dtype for e in expected]
        assert_close(results, expected, rtol=5e-2, atol=1e-1)
        penalty = sum(r.float().square().sum() for r in results)
        second = torch.autograd.grad(penalty, inputs, materialize_grads=True)
        assert all(s.isfinite().all() and s.dtype == torch.float32 for s in second)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_opcheck(self, compiled_case):
        plain = compiled_case.draw(torch.float32).map(lambda t: LAYOUTS["transposed"](t).requires_grad_())
        for call in compiled_case.calls(plain):
            self.opcheck(call, "test_schema", "test_autograd_registration", "test_faketensor")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_opcheck_of_traces_and_half_types(self, compiled_case):
        for call in compiled_case.calls(compiled_case.draw(torch.float32).map(Tensor.requires_grad_)):
            self.opcheck(call, self.traced_by)
        for call in compiled_case.calls(compiled_case.draw(torch.bfloat16)):
            self.opcheck(call, "test_schema", "test_faketensor")

    def opcheck(self, call, *checks):
        args = dict(zip(call.arguments, call.args, strict=False))
        only = {a.name for a in call.op._schema.arguments if a.kwarg_only}
        kwargs = {name: args.pop(name) for name in only & args.keys()}
        torch.library.opcheck(call.op, tuple(args.values()), kwargs, test_utils=checks)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiled_step_has_eagers_gradients(self, compiled_case, ours, fresh_dynamo):
        operands = compiled_case.draw(torch.float32)
        function, inputs = given_inputs(compiled_case, ours(compiled_case), operands)
        reference, _ = given_inputs(compiled_case, compiled_case.reference, operands)

        def step(*inputs):
            return penalised_gradients(function, inputs)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        expected = penalised_gradients(reference, [t.double() for t in inputs])
        assert_close([t.double() for t in compiled(*inputs)], expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_the_ops_themselves_trace(self, compiled_case, dynamic, fresh_dynamo):
        """Called by name inside a compiled region, to plain ops that can be differentiated."""
        calls = list(compiled_case.calls(compiled_case.draw()))
        named = [item for call in calls for item in zip(call.arguments, call.args, strict=False)]
        named = [(name, t.detach()) for name, t in named if isinstance(t, Tensor)]
        # Not every release of Dynamo traces what looks at a schema.
        ops = [
            (call.op, call.args, [a.name for a in call.op._schema.arguments if a.kwarg_only])
            for call in calls
        ]

        def step(*inputs):
            inputs = iter(inputs)
            results = []
            for op, drawn, keywords in ops:
                args = [next(inputs) if isinstance(a, Tensor) else a for a in drawn]
                n = len(args) - len(keywords)
                result = op(*args[:n], **dict(zip(keywords, args[n:], strict=True)))
                results += [t for t in tree_leaves(result) if t is not None]
            return results

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        # With symbolic shapes test_opcheck differentiates, where PyTorch can.
        inputs = [
            t.requires_grad_(not dynamic and t.is_floating_point() and name not in compiled_case.constants)
            for name, t in named
        ]
        results, expected = compiled(*inputs), step(*inputs)
        assert_close(results, expected)
        if not dynamic:
            losses = (sum(r.sin().sum() for r in some if r.requires_grad) for some in (results, expected))
            leaves = [t for t in inputs if t.requires_grad]
            assert_close(*(torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in losses))

    def test_bad_input_is_named(self, traced_case, broken):
        operands = traced_case.draw(torch.float32)
        calls = list(traced_case.calls(operands))
        for call in calls:
            tensors = [
                (n, a) for n, a in zip(call.arguments, call.args, strict=False) if isinstance(a, Tensor)
            ]
            for name, tensor in tensors:
                if any(
                    op in ("", call.name) and argument in ("", name) and how in ("", broken)
                    for op, argument, how in self.accepted
                ):
                    continue
                bad = BROKEN[broken](tensor)
                for inference in (False, True):
                    with (
                        torch.inference_mode(inference),
                        pytest.raises(ERRORS, match=rf"{call.name}: expected .*\b{name}\b"),
                    ):
                        call(**{name: bad})

    def test_other_bad_input_is_named(self):
        for call, error, message in self.bad():
            with pytest.raises(error, match=message):
                call()

    def test_schemas_are_these_and_every_op_is_tested(self):
        schemas = " ".join(self.schemas.split()).split("; ")
        names = {schema.split("(")[0] for schema in schemas}
        assert {str(getattr(OPS, name).default._schema) for name in names} == {
            f"gradnorm_kernels::{schema}" for schema in schemas
        }
        assert names == {call.name for case in self.cases for call in case.calls(case.draw())}


def by_function(case: Case) -> Callable[..., Tensor]:
    return case.fused


def by_switch(case: Case) -> Callable[..., Tensor]:
    return case.stock


@st.composite
def random_strides(draw, ndim):
    """Of a tensor: its dimensions permuted, steps between elements, and an offset; or None."""
    if not ndim or not draw(st.booleans()):
        return None
    return draw(st.permutations(range(ndim))), [draw(st.integers(1, 3)) for _ in range(ndim)]


def strided(tensor, order, steps):
    """NaN lies between the elements."""
    padded = tensor.new_full([n * s + 1 for n, s in zip(tensor.shape, steps, strict=True)], math.nan)
    padded = padded.permute(order).contiguous().permute([order.index(k) for k in range(tensor.ndim)])
    return padded[tuple(slice(1, None, s) for s in steps)].copy_(tensor)
