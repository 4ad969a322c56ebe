"""Triton kernel of grid sampling's double backward; forward and first backward are PyTorch's.

csrc/grid_sample.cpp has the mathematics.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import NotCoveredError
from .common import FP_FUSION, contiguous, empty_like, launch, load, on_meta, opmath, opmath_of

_BLOCK = 128


@triton.jit
def _locate(grid_ptr, step_ptr, offsets, mask, size, padding: tl.constexpr, align_corners: tl.constexpr):
    """By one coordinate of each point: the pixel below it, how far it is from that, the derivative of this,
    and that times the coordinate's step."""
    coordinate = load(grid_ptr, offsets, mask)
    last = tl.cast(size, coordinate.dtype) - 1
    low: tl.constexpr = 0.0 if align_corners else -0.5
    half = last / 2 if align_corners else (last + 1) / 2
    slope = coordinate * 0 + half
    x = (coordinate + 1) * half + low
    if padding == 2:
        turn = 4 * half
        slope = tl.where(x < low, -slope, slope)
        x = tl.abs(x - low)
        x -= tl.floor(x / turn) * turn
        slope = tl.where(x > turn - x, -slope, slope)
        x = tl.where(x > turn - x, turn - x, x) + low
    if padding != 0:
        # NaN is not above 0.
        slope = tl.where((x > 0) & (x < last), slope, 0.0)
        x = tl.where(x > 0, tl.where(x < last, x, last), 0.0)
    lower = tl.floor(x)
    pixel = tl.where((lower >= -1) & (lower <= last), lower, -2.0).to(tl.int64)
    return pixel, x - lower, slope, slope * load(step_ptr, offsets, mask)


@triton.jit
def _corner(lower, upper_share, upper: tl.constexpr):
    """Along one dimension: its pixel, its share, and the derivative of that."""
    if upper:
        return lower + 1, upper_share, 1.0
    else:
        return lower, 1.0 - upper_share, -1.0


@triton.jit
def grid_sample_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_grad_grid_ptr,
    grad_output_ptr,
    input_ptr,
    grid_ptr,
    grad_grad_output_ptr,
    grad_input_ptr,
    grad_grid_ptr,
    channels,
    points,
    size_x,
    size_y,
    size_z,
    padding: tl.constexpr,
    align_corners: tl.constexpr,
    dims: tl.constexpr,
    block: tl.constexpr,
):
    """With w_k the weights of the corners x_k and v_k, and a_k their derivatives along the steps m u:

        grad_grad_output = sum_k v_k w_k + x_k a_k
        grad_input_k    += g a_k
        grad_grid        = m sum g (v_k dw_k + x_k da_k)

    A program has some points of a sample, in all channels. Reads each corner, g, u and the grid once; adds
    to grad_input atomically.
    """
    blocks = tl.cdiv(points, block)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    point = (tl.program_id(0) % blocks).to(tl.int64) * block + tl.arange(0, block)
    mask = point < points
    own = (sample * points + point) * dims
    x0, tx, slope_x, ux = _locate(grid_ptr, grad_grad_grid_ptr, own, mask, size_x, padding, align_corners)
    y0, ty, slope_y, uy = _locate(grid_ptr, grad_grad_grid_ptr, own + 1, mask, size_y, padding, align_corners)
    zero = tl.zeros([block], opmath_of(input_ptr))
    # An image is a volume of one layer, in which every point is.
    z0, tz, slope_z, uz = tl.zeros([block], tl.int64), zero, zero, zero
    if dims == 3:
        z0, tz, slope_z, uz = _locate(
            grid_ptr, grad_grad_grid_ptr, own + 2, mask, size_z, padding, align_corners
        )

    sum_x, sum_y, sum_z = zero, zero, zero
    for channel in range(channels):
        plane = sample * channels + channel
        g = load(grad_output_ptr, plane * points + point, mask)
        total = zero
        for k in tl.static_range(2**dims):
            x, wx, sx = _corner(x0, tx, k & 1)
            y, wy, sy = _corner(y0, ty, k >> 1 & 1)
            z, wz, sz = _corner(z0, tz, k >> 2)
            is_inside = mask & (x >= 0) & (x < size_x) & (y >= 0) & (y < size_y) & (z >= 0) & (z < size_z)
            pixel = ((plane * size_z + z) * size_y + y) * size_x + x
            x_k = load(input_ptr, pixel, is_inside)
            change = ux * sx * wy * wz + uy * wx * sy * wz + uz * wx * wy * sz
            total += x_k * change
            if grad_input_ptr is not None:
                tl.atomic_add(grad_input_ptr + pixel, g * change, mask=is_inside, sem="relaxed")
            of_x = uy * sx * sy * wz + uz * sx * wy * sz
            of_y = ux * sx * sy * wz + uz * wx * sy * sz
            of_z = ux * sx * wy * sz + uy * wx * sy * sz
            sum_x += g * x_k * of_x
            sum_y += g * x_k * of_y
            sum_z += g * x_k * of_z
            if grad_grad_input_ptr is not None:
                v_k = load(grad_grad_input_ptr, pixel, is_inside)
                total += v_k * wx * wy * wz
                sum_x += g * v_k * sx * wy * wz
                sum_y += g * v_k * wx * sy * wz
                sum_z += g * v_k * wx * wy * sz
        if grad_grad_output_ptr is not None:
            tl.store(grad_grad_output_ptr + plane * points + point, total, mask=mask)
    if grad_grid_ptr is not None:
        tl.store(grad_grid_ptr + own, slope_x * sum_x, mask=mask)
        tl.store(grad_grid_ptr + own + 1, slope_y * sum_y, mask=mask)
        if dims == 3:
            tl.store(grad_grid_ptr + own + 2, slope_z * sum_z, mask=mask)


def grid_sample_double_backward(
    grad_grad_input: Tensor | None,
    grad_grad_grid: Tensor | None,
    grad_output: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    op = "grid_sample_double_backward"
    settings = interpolation_mode, padding_mode, align_corners
    v, u = grad_grad_input, grad_grad_grid
    tensors = (input if v is None else v, grid if u is None else u, grad_output, input, grid)
    # Their shapes and dtypes; or it raises.
    on_meta_device = on_meta(op, tensors, *settings, tuple(output_mask))
    if u is None or interpolation_mode == 1 or grad_output.numel() == 0:
        # Derivatives of first order.
        zeros = [None if t is None else torch.zeros_like(t, device=input.device) for t in on_meta_device]
        name = f"grid_sampler_{input.ndim - 2}d"
        if v is not None and output_mask[0]:
            zeros[0] = getattr(torch.ops.aten, name)(v, grid, *settings)
        if v is not None and output_mask[2] and interpolation_mode == 0:
            backward = getattr(torch.ops.aten, f"{name}_backward")
            zeros[2] = backward(grad_output, v, grid, *settings, [False, True])[1]
        return zeros[0], zeros[1], zeros[2]
    exact = torch.are_deterministic_algorithms_enabled()
    if output_mask[1] and exact and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise NotCoveredError
    grad_grad_output = empty_like(grad_output, output_mask[0])
    grad_input = input.new_zeros(input.shape, dtype=opmath(input.dtype)) if output_mask[1] else None
    grad_grid = empty_like(grid, output_mask[2])
    points = grad_output.shape[2:].numel()
    with torch.cuda.device_of(input):  # does nothing for a CPU tensor (Triton's interpreter)
        launch(
            grid_sample_bwd_bwd_kernel,
            (input.shape[0] * -(-points // _BLOCK),),
            *contiguous(v, u, grad_output, input, grid),
            grad_grad_output,
            grad_input,
            grad_grid,
            input.shape[1],
            points,
            *(*reversed(input.shape[2:]), 1)[:3],
            padding=padding_mode,
            align_corners=align_corners,
            dims=input.ndim - 2,
            block=_BLOCK,
            **FP_FUSION,
        )
    return grad_grad_output, None if grad_input is None else grad_input.to(input.dtype), grad_grid
