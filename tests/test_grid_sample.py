"""Grid sampling on the CPU: its table, and what is its own: paddings, points outside, the orders' kernels."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import reference
import torch
import torch.nn.functional as F
from contract import OPS, Call, Case, OpContract, Operands, assert_close, flat
from hypothesis import strategies as st

import gradnorm_kernels as gk
from gradnorm_kernels.kernels import composite

PADDINGS = ("zeros", "border", "reflection")


@dataclass(frozen=True)
class GridSample(Case):
    name: str
    image: tuple
    points: tuple
    mode: str = "bilinear"
    padding: str = "zeros"
    align_corners: bool = False
    names = ("input", "grid")
    # Of points that are NaN, PyTorch's kernels differ, and its backward may read outside of the input.
    finite = (1,)
    # PyTorch's own has no forward mode where nothing requires a gradient.
    wrong_in_pytorch = ("jvp", "reverse over jvp")

    @property
    def curved(self):
        return self.mode == "bilinear"

    def shapes(self):
        return self.image, (self.image[0], *self.points, len(self.points))

    def draw(self, dtype=torch.float64, *dtypes):
        operands = super().draw(dtype, *dtypes)
        x, grid = operands.inputs
        # Odd eighths: coordinates that every dtype holds, and none at a pixel. The last point is inside.
        grid = ((4 * grid.double()).floor() + 0.5) / 4
        grid.view(-1, len(self.points))[-1:] = 0.125
        return Operands([x, grid.to(x.dtype)], operands.grad_output, operands.grad_grads)

    def fused(self, x, grid):
        return gk.functional.grid_sample(x, grid, self.mode, self.padding, self.align_corners)

    def stock(self, x, grid):
        return F.grid_sample(x, grid, self.mode, self.padding, self.align_corners)

    def reference(self, x, grid):
        return reference.grid_sample(x, grid, self.mode, self.padding, self.align_corners)

    def calls(self, operands):
        inputs, (v, u), g = operands.inputs, operands.grad_grads, operands.grad_output
        settings = (int(self.mode == "nearest"), PADDINGS.index(self.padding), self.align_corners)
        yield Call("grid_sample", (*inputs, *settings))
        yield Call("grid_sample_backward", (g, *inputs, *settings, [True] * 2))
        yield Call("grid_sample_double_backward", (v, u, g, *inputs, *settings, [True] * 3))

    def is_pytorchs(self, call):
        return call.name != "grid_sample_double_backward" or self.mode == "nearest"

    def same_bits(self, operands):
        return False  # PyTorch's kernels add in the order of the grid's strides.

    @property
    def large(self):
        return replace(self, image=(3, 20, *[9] * len(self.points)), points=(10,) * len(self.points))

    def passes(self, switch):
        aten = f"grid_sampler_{len(self.points)}d"
        double_backward = ["grid_sample_double_backward"], None
        return [
            ([aten if switch else "grid_sample"], None),
            ([f"{aten}_backward"], None),
            double_backward,
            double_backward,
        ]


CASES = [
    *(
        GridSample(f"bilinear {padding} {align}", (2, 3, 5, 4), (3, 7), "bilinear", padding, align)
        for padding, align in itertools.product(PADDINGS, (False, True))
    ),
    *(
        GridSample(f"nearest {padding}", (2, 3, 5, 4), (3, 7), "nearest", padding, padding == "border")
        for padding in PADDINGS
    ),
    GridSample("several blocks", (2, 11, 6, 5), (9, 17), padding="border"),
    GridSample("one pixel", (2, 40, 1, 1), (2, 3), padding="reflection", align_corners=True),
    GridSample("no images", (0, 2, 3, 4), (2, 3)),
    GridSample("no points", (2, 2, 3, 4), (0, 3)),
    GridSample("small", (1, 2, 3, 3), (2, 2)),
    GridSample("small reflection", (1, 2, 3, 3), (2, 2), padding="reflection", align_corners=True),
    GridSample("small nearest", (1, 2, 3, 3), (2, 2), "nearest"),
    *(
        GridSample(f"3D {padding}", (2, 3, 3, 4, 5), (2, 3, 4), "bilinear", padding, padding == "border")
        for padding in PADDINGS
    ),
    GridSample("3D nearest", (2, 3, 3, 4, 5), (2, 3, 4), "nearest", "reflection"),
    GridSample("small 3D", (1, 1, 2, 2, 3), (1, 1, 2)),
]


@st.composite
def random_cases(draw):
    sizes = st.integers(1, 7)
    dims = draw(st.sampled_from([2, 3]))
    image, points = (draw(st.tuples(*[sizes] * dims)) for _ in range(2))
    mode = draw(st.sampled_from(["bilinear", "nearest"]))
    padding, align_corners = draw(st.sampled_from(PADDINGS)), draw(st.booleans())
    image = draw(st.integers(1, 3)), draw(sizes), *image
    return GridSample("", image, points, mode, padding, align_corners)


class TestGridSample(OpContract):
    cases = CASES
    traced = ("small", "small 3D")
    kernels = ("bilinear zeros False", "bilinear reflection True", "several blocks", "3D border")
    random_cases = random_cases()
    outlived = 1
    schemas = """
        grid_sample(Tensor input, Tensor grid, int interpolation_mode, int padding_mode, bool align_corners)
            -> Tensor;
        grid_sample_backward(Tensor grad_output, Tensor input, Tensor grid, int interpolation_mode,
            int padding_mode, bool align_corners, bool[2] output_mask)
            -> (Tensor grad_input, Tensor grad_grid);
        grid_sample_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_grid, Tensor grad_output,
            Tensor input, Tensor grid, int interpolation_mode, int padding_mode, bool align_corners,
            bool[3] output_mask) -> (Tensor grad_grad_output, Tensor grad_input, Tensor grad_grid)
    """

    def bad(self):
        x, grid = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 3, 2)
        sample = gk.functional.grid_sample
        yield lambda: sample(x, grid, "linear"), ValueError, "mode to be 'bilinear', 'nearest' or 'bicubic'"
        yield lambda: sample(x, grid, padding_mode="wrap"), ValueError, "padding_mode to be 'zeros'"
        for device in ("cpu", "meta"):
            some = x.to(device), grid.to(device)
            for modes, got in (((2, 0), "0 or 1 .* got .* 2 and 0"), ((0, 3), "0, 1 or 2, got .* 0 and 3")):
                yield lambda s=some, m=modes: OPS.grid_sample(*s, *m, False), ValueError, got
        for bad in (grid[:1], grid[..., :1], grid[..., None, :]):
            yield lambda bad=bad: sample(x, bad), ValueError, "expected input .* grid of shape"
        yield lambda: sample(x[:, :, :0], grid), ValueError, "dimensions that are not empty"
        yield lambda: sample(x, grid.double()), TypeError, "expected grid to have the dtype of input"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_every_setting_equals_stock_far_outside_and_at_pixels(dims, mode):
    """At pixels and mirrors, where the derivative jumps, too."""
    for padding, align_corners in itertools.product(PADDINGS, (False, True)):
        case = GridSample("", (2, 3, 4, 5, 3)[: dims + 2], (3, 4, 2)[:dims], mode, padding, align_corners)
        drawn = Case.draw(case)
        x, grid = drawn.inputs
        for points in (3 * grid, grid.round(), 1e3 * grid):
            operands = Operands([x, points], drawn.grad_output, drawn.grad_grads)
            expected = flat(operands.orders(case.stock))
            assert_close(flat(operands.orders(case.fused)), expected)
            with gk.set_fused_double_backward(True):
                assert_close(flat(operands.orders(case.stock)), expected)
            assert_close(flat(operands.orders(case.reference)), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_points_that_are_nowhere(bad):
    """Kernel and composite agree. Where there is no padding by pixels, the sample's own results, and these
    alone, are not finite."""
    for dims, padding in itertools.product((2, 3), PADDINGS):
        case = GridSample("", (1, 2, 3, 4, 3)[: dims + 2], (2, 2, 2)[:dims], padding=padding)
        *_, call = case.calls(case.draw(torch.float32))
        call.args[4][(0,) * (dims + 1)] = bad
        results = call()
        for a, e in zip(results, composite.call(call.name, *call.args), strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)
        grad_grad_output, grad_input, grad_grid = results
        assert grad_input.isfinite().all()
        assert grad_grad_output[:, :, 1:].isfinite().all() and grad_grid[:, 1:].isfinite().all()
        if padding != "zeros":
            assert grad_grad_output.isfinite().all() and grad_grid.isfinite().all()


def test_no_channels():
    case = GridSample("", (2, 0, 3, 4), (2, 3))
    operands = case.draw()
    assert_close(flat(operands.orders(case.fused)), flat(operands.orders(case.reference)))


def test_zeros_go_no_further_than_they_are_asked_for():
    """Of an image alone, the second derivative reaches the image by nothing."""
    image, grid = torch.randn(1, 2, 4, 4, requires_grad=True), torch.rand(1, 3, 3, 2, requires_grad=True)
    before = image * 1
    with gk.set_fused_double_backward(True):
        (gradient,) = torch.autograd.grad(
            F.grid_sample(before, grid, align_corners=False).sum(), image, create_graph=True
        )
        gradient.square().sum().backward()
    assert grid.grad is not None and image.grad is None


def test_bicubic_is_pytorchs():
    x, grid = torch.randn(1, 2, 4, 4), torch.rand(1, 3, 3, 2)
    expected = F.grid_sample(x, grid, "bicubic", align_corners=False)
    assert torch.equal(gk.functional.grid_sample(x, grid, "bicubic"), expected)
