"""Triton kernels of batch normalisation: its double backward, and the backward of its evaluation mode; and
the two backward passes of batch normalisation with an activation after it.

A tensor is outer x channels x inner here: N x C x HW when contiguous, and interleaved, NHW x C x 1, when
channels_last. A program takes every so-manieth tile of one channel, or of a block of interleaved ones.
Sums over a channel are sums of what the programs found, in a fixed order: the same bits in each run.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATIONS, Activation
from .common import FP_FUSION, at_most_128_registers, contiguous, gpu, launch, load, load_parameter, opmath


@triton.jit
def _tile(
    tile,
    outer,
    channels,
    units,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Offsets and mask of a tile, rows x columns, which are whole units."""
    # 64-bit before each product: a tensor, and a dimension, may have more than 2^31 elements.
    if interleaved:
        row = tl.cast(tile, tl.int64) * rows + tl.arange(0, rows)[:, None]
        column = tl.program_id(0) * columns + tl.arange(0, columns)[None, :]
        width = channels
        start = row * channels
    else:
        blocks = tl.cdiv(units, columns // unit)
        row = tl.cast(tile // blocks, tl.int64) * rows + tl.arange(0, rows)[:, None]
        column = tl.cast(tile % blocks, tl.int64) * columns + tl.arange(0, columns)[None, :]
        width = tl.cast(units, tl.int64) * unit
        start = (row * channels + tl.program_id(0)) * width
    return start + column, (row < outer) & (column < width)


@triton.jit
def _channel(channels, interleaved: tl.constexpr, columns: tl.constexpr):
    """The channels of a program, one or a row of them, and which of them exist."""
    channel = tl.program_id(0)
    if interleaved:
        channel = channel * columns + tl.arange(0, columns)[None, :]
    return channel, channel < channels


@triton.jit
def _zeros(like, rows: tl.constexpr, columns: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if like.dtype.element_ty == tl.float64 else tl.float32
    return tl.zeros([rows, columns], dtype)


@triton.jit
def _store_sum(ptr, sum, channel, exists, interleaved: tl.constexpr):
    """sum, of a program's tile, over rows and, unless interleaved, over columns."""
    if interleaved:
        tl.store(ptr + channel, tl.sum(sum, axis=0, keep_dims=True), mask=exists)
    else:
        tl.store(ptr + channel, tl.sum(sum))


@triton.jit
def _store_sums(ptr, sums, channel, exists, channels, interleaved: tl.constexpr):
    """Of every program side by side: ptr is (programs, sums, channels)."""
    count: tl.constexpr = len(sums)
    for i in tl.static_range(count):
        row = tl.program_id(1).to(tl.int64) * count + i
        _store_sum(ptr + row * channels, sums[i], channel, exists, interleaved)


@triton.jit
def batch_norm_sums_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    input_ptr,
    mean_ptr,
    sums_ptr,
    outer,
    channels,
    units,
    tiles,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Sums over each channel of v = grad_grad_input, v (x - mean), g = grad_output, g (x - mean) and v g.

    Moves 3n elements: reads 3.
    """
    channel, exists = _channel(channels, interleaved, columns)
    mean = load_parameter(mean_ptr, channel, exists, 0)
    zeros = _zeros(input_ptr, rows, columns)
    v_sum, vd_sum, g_sum, gd_sum, vg_sum = zeros, zeros, zeros, zeros, zeros
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets, mask = _tile(tile, outer, channels, units, unit, interleaved, rows, columns)
        v = load(grad_grad_input_ptr, offsets, mask)
        g = load(grad_output_ptr, offsets, mask)
        d = load(input_ptr, offsets, mask) - mean
        v_sum += v
        vd_sum += v * d
        g_sum += g
        gd_sum += g * d
        vg_sum += v * g
    sums = (v_sum, vd_sum, g_sum, gd_sum, vg_sum)
    _store_sums(sums_ptr, sums, channel, exists, channels, interleaved)


@triton.jit
def batch_norm_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_grad_weight_ptr,
    grad_grad_bias_ptr,
    grad_output_ptr,
    input_ptr,
    weight_ptr,
    mean_ptr,
    spread_ptr,
    sums_ptr,
    grad_grad_output_ptr,
    grad_input_ptr,
    grad_weight_ptr,
    outer,
    channels,
    units,
    tiles,
    eps: tl.constexpr,
    training: tl.constexpr,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """grad_grad_output, grad_input and grad_weight. In training spread is r, and sums holds the five sums. In
    evaluation mode spread is the variance, P is the identity and < > is 0; each program writes its share of
    grad_weight.

    Moves 5n elements: reads 3, writes 2.
    """
    channel, exists = _channel(channels, interleaved, columns)
    mean = load_parameter(mean_ptr, channel, exists, 0)
    r = load_parameter(spread_ptr, channel, exists, 1)
    if not training:
        r = tl.rsqrt(r + eps)
    wr = load_parameter(weight_ptr, channel, exists, 1) * r
    ur = load_parameter(grad_grad_weight_ptr, channel, exists, 0) * r
    t = load_parameter(grad_grad_bias_ptr, channel, exists, 0)
    if training:
        # normalization_double_backward, with as few factors as a channel can have: it takes more registers.
        count = tl.cast(outer, r.dtype) * units * unit
        v_mean = load(sums_ptr, channel, exists) / count
        vh_mean = load(sums_ptr + channels, channel, exists) / count * r
        g_mean = load(sums_ptr + 2 * channels, channel, exists) / count
        gh_mean = load(sums_ptr + 3 * channels, channel, exists) / count * r
        vg_mean = load(sums_ptr + 4 * channels, channel, exists) / count
        gpv_mean = vg_mean - v_mean * g_mean - vh_mean * gh_mean
        of_v = -wr * r * gh_mean
        of_g = ur - wr * r * vh_mean
        of_d = -r * (of_v * vh_mean + of_g * gh_mean + wr * r * gpv_mean)
        of_1 = -of_v * v_mean - of_g * g_mean
        if tl.program_id(1) == 0:
            tl.store(grad_weight_ptr + channel, count * r * gpv_mean, mask=exists)
        out_of_d = of_g
        out_of_1 = t - wr * v_mean
    else:
        out_of_d = ur
        out_of_1 = t
        vg_sum = _zeros(input_ptr, rows, columns)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets, mask = _tile(tile, outer, channels, units, unit, interleaved, rows, columns)
        v = load(grad_grad_input_ptr, offsets, mask)
        g = load(grad_output_ptr, offsets, mask)
        d = load(input_ptr, offsets, mask) - mean
        grad_grad_output = v * wr + (d * out_of_d + out_of_1)
        if training:
            grad_input = v * of_v + (g * of_g + (d * of_d + of_1))
        else:
            grad_input = g * ur
            vg_sum += v * g
        tl.store(grad_grad_output_ptr + offsets, grad_grad_output, mask=mask)
        tl.store(grad_input_ptr + offsets, grad_input, mask=mask)
    if not training:
        grad_weight_ptr += tl.program_id(1).to(tl.int64) * channels
        _store_sum(grad_weight_ptr, vg_sum * r, channel, exists, interleaved)


@triton.jit
def batch_norm_scale_kernel(
    input_ptr,
    factor_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    output_ptr,
    sums_ptr,
    outer,
    channels,
    units,
    tiles,
    eps: tl.constexpr,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """output = input * weight * r with r = (var + eps)^(-1/2). With factor, each program also writes its
    shares of sum(input) and of sum(input * (factor - mean) * r), with mean 0 where there is none.

    Moves 2n elements, reads 1 and writes 1; or 3n, reads 2 and writes 1.
    """
    channel, exists = _channel(channels, interleaved, columns)
    r = tl.rsqrt(load_parameter(var_ptr, channel, exists, 1) + eps)
    scale = load_parameter(weight_ptr, channel, exists, 1) * r
    mean = load_parameter(mean_ptr, channel, exists, 0)
    if factor_ptr is not None:
        sum = _zeros(input_ptr, rows, columns)
        product_sum = sum
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets, mask = _tile(tile, outer, channels, units, unit, interleaved, rows, columns)
        x = load(input_ptr, offsets, mask)
        tl.store(output_ptr + offsets, x * scale, mask=mask)
        if factor_ptr is not None:
            sum += x
            product_sum += x * (load(factor_ptr, offsets, mask) - mean)
    if factor_ptr is not None:
        sums_ptr += tl.program_id(1).to(tl.int64) * channels
        _store_sum(sums_ptr, sum, channel, exists, interleaved)
        sums_ptr += tl.num_programs(1).to(tl.int64) * channels
        _store_sum(sums_ptr, product_sum * r, channel, exists, interleaved)


# With an activation f: output = f(z), z = w h + b with h = (x - mean) r. As above v = grad_grad_input and
# g = grad_output; a = g f'(z) is the gradient of z, and k = g f''(z). Without f'' an activation is of linear
# pieces: ddf is None, and k is 0.


@triton.jit
def batch_norm_act_sums_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    invstd_ptr,
    sums_ptr,
    outer,
    channels,
    units,
    tiles,
    parameters: tl.constexpr,
    df: tl.constexpr,
    ddf: tl.constexpr,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Sums over each channel of a and a h; with grad_grad_input also of v, v h and v a; and with f'' also of
    k, k h, k h^2, v k and v k h.

    Moves 2n elements: reads 2; or 3n: reads 3.
    """
    channel, exists = _channel(channels, interleaved, columns)
    mean = load_parameter(mean_ptr, channel, exists, 0)
    r = load_parameter(invstd_ptr, channel, exists, 1)
    wr = load_parameter(weight_ptr, channel, exists, 1) * r
    bias = load_parameter(bias_ptr, channel, exists, 0)
    zeros = _zeros(input_ptr, rows, columns)
    a_sum, ad_sum = zeros, zeros
    if grad_grad_input_ptr is not None:
        v_sum, vd_sum, va_sum = zeros, zeros, zeros
        if ddf is not None:
            k_sum, kd_sum, kdd_sum, vk_sum, vkd_sum = zeros, zeros, zeros, zeros, zeros
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets, mask = _tile(tile, outer, channels, units, unit, interleaved, rows, columns)
        g = load(grad_output_ptr, offsets, mask)
        d = load(input_ptr, offsets, mask) - mean
        z = d * wr + bias
        # Outside the mask d is not 0, but g is, and so are a and k.
        a = df(g, z, parameters)
        a_sum += a
        ad_sum += a * d
        if grad_grad_input_ptr is not None:
            v = load(grad_grad_input_ptr, offsets, mask)
            v_sum += v
            vd_sum += v * d
            va_sum += v * a
            if ddf is not None:
                k = ddf(1.0, g, z, parameters)
                kd = k * d
                k_sum += k
                kd_sum += kd
                kdd_sum += kd * d
                vk_sum += v * k
                vkd_sum += v * kd
    ah_sum = ad_sum * r
    if grad_grad_input_ptr is None:
        _store_sums(sums_ptr, (a_sum, ah_sum), channel, exists, channels, interleaved)
    elif ddf is None:
        of_v = (a_sum, ah_sum, v_sum, vd_sum * r, va_sum)
        _store_sums(sums_ptr, of_v, channel, exists, channels, interleaved)
    else:
        kh_sum, khh_sum, vkh_sum = kd_sum * r, kdd_sum * r * r, vkd_sum * r
        of_k = (a_sum, ah_sum, v_sum, vd_sum * r, va_sum, k_sum, kh_sum, khh_sum, vk_sum, vkh_sum)
        _store_sums(sums_ptr, of_k, channel, exists, channels, interleaved)


@triton.jit
def batch_norm_act_bwd_kernel(
    grad_output_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    spread_ptr,
    sums_ptr,
    grad_input_ptr,
    outer,
    channels,
    units,
    tiles,
    eps: tl.constexpr,
    training: tl.constexpr,
    parameters: tl.constexpr,
    df: tl.constexpr,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """grad_input = w r P a. In training spread is r, and sums holds those of a and a h. In evaluation mode
    spread is the variance, P is the identity, and each program writes its shares of these sums, if there are
    any.

    Moves 3n elements: reads 2, writes 1.
    """
    channel, exists = _channel(channels, interleaved, columns)
    mean = load_parameter(mean_ptr, channel, exists, 0)
    r = load_parameter(spread_ptr, channel, exists, 1)
    if not training:
        r = tl.rsqrt(r + eps)
    wr = load_parameter(weight_ptr, channel, exists, 1) * r
    bias = load_parameter(bias_ptr, channel, exists, 0)
    if training:
        count = tl.cast(outer, r.dtype) * units * unit
        of_1 = -wr * (load(sums_ptr, channel, exists) / count)
        of_d = -wr * r * (load(sums_ptr + channels, channel, exists) / count)
    elif sums_ptr is not None:
        a_sum = _zeros(input_ptr, rows, columns)
        ad_sum = a_sum
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets, mask = _tile(tile, outer, channels, units, unit, interleaved, rows, columns)
        g = load(grad_output_ptr, offsets, mask)
        d = load(input_ptr, offsets, mask) - mean
        a = df(g, d * wr + bias, parameters)
        if training:
            tl.store(grad_input_ptr + offsets, a * wr + (d * of_d + of_1), mask=mask)
        else:
            tl.store(grad_input_ptr + offsets, a * wr, mask=mask)
            if sums_ptr is not None:
                a_sum += a
                ad_sum += a * d
    if not training and sums_ptr is not None:
        _store_sums(sums_ptr, (a_sum, ad_sum * r), channel, exists, channels, interleaved)


@triton.jit
def batch_norm_act_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    spread_ptr,
    sums_ptr,
    grad_grad_output_ptr,
    grad_input_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    outer,
    channels,
    units,
    tiles,
    eps: tl.constexpr,
    training: tl.constexpr,
    parameters: tl.constexpr,
    df: tl.constexpr,
    ddf: tl.constexpr,
    unit: tl.constexpr,
    interleaved: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """With q = w r P v, the gradient of a, and c = q k:

        grad_grad_output = q f'(z)
        grad_input       = w r (P c - r (<a h> P v + <v h> P a + <v P a> h))
        grad_weight      = sum(c h) + r sum(v P a),   grad_bias = sum(c)

    In training spread is r, and sums holds those of batch_norm_act_sums_kernel, from which the sums of c
    follow. In evaluation mode spread is the variance, P is the identity and < > is 0; each program writes its
    shares of grad_bias and grad_weight to sums.

    Moves 5n elements: reads 3, writes 2.
    """
    channel, exists = _channel(channels, interleaved, columns)
    mean = load_parameter(mean_ptr, channel, exists, 0)
    r = load_parameter(spread_ptr, channel, exists, 1)
    if not training:
        r = tl.rsqrt(r + eps)
    wr = load_parameter(weight_ptr, channel, exists, 1) * r
    bias = load_parameter(bias_ptr, channel, exists, 0)
    zeros = _zeros(input_ptr, rows, columns)
    if training:
        count = tl.cast(outer, r.dtype) * units * unit
        a_mean = load(sums_ptr, channel, exists) / count
        ah_mean = load(sums_ptr + channels, channel, exists) / count
        v_mean = load(sums_ptr + 2 * channels, channel, exists) / count
        vh_mean = load(sums_ptr + 3 * channels, channel, exists) / count
        va_mean = load(sums_ptr + 4 * channels, channel, exists) / count
        apv_mean = va_mean - v_mean * a_mean - vh_mean * ah_mean
        c_mean, ch_mean = 0.0, 0.0
        if ddf is not None:
            k_mean = load(sums_ptr + 5 * channels, channel, exists) / count
            kh_mean = load(sums_ptr + 6 * channels, channel, exists) / count
            khh_mean = load(sums_ptr + 7 * channels, channel, exists) / count
            vk_mean = load(sums_ptr + 8 * channels, channel, exists) / count
            vkh_mean = load(sums_ptr + 9 * channels, channel, exists) / count
            c_mean = wr * (vk_mean - v_mean * k_mean - vh_mean * kh_mean)
            ch_mean = wr * (vkh_mean - v_mean * kh_mean - vh_mean * khh_mean)
        # As in batch_norm_bwd_bwd_kernel. What multiplies a in grad_input multiplies d in q.
        of_v = -wr * r * ah_mean
        of_a = -wr * r * vh_mean
        of_d = -r * (of_v * vh_mean + of_a * ah_mean + wr * (r * apv_mean + ch_mean))
        of_1 = -of_v * v_mean - of_a * a_mean - wr * c_mean
        q_of_1 = -wr * v_mean
        if tl.program_id(1) == 0:
            tl.store(grad_weight_ptr + channel, count * (r * apv_mean + ch_mean), mask=exists)
            tl.store(grad_bias_ptr + channel, count * c_mean, mask=exists)
    else:
        c_sum, of_r_sum = zeros, zeros
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        offsets, mask = _tile(tile, outer, channels, units, unit, interleaved, rows, columns)
        v = load(grad_grad_input_ptr, offsets, mask)
        g = load(grad_output_ptr, offsets, mask)
        d = load(input_ptr, offsets, mask) - mean
        z = d * wr + bias
        q = v * wr
        if training:
            q += d * of_a + q_of_1
        a = df(g, z, parameters)
        c = zeros if ddf is None else ddf(q, g, z, parameters)
        if training:
            grad_input = c * wr + (v * of_v + (a * of_a + (d * of_d + of_1)))
        else:
            grad_input = c * wr
            c_sum += c
            of_r_sum += c * d + v * a
        tl.store(grad_grad_output_ptr + offsets, df(q, z, parameters), mask=mask)
        tl.store(grad_input_ptr + offsets, grad_input, mask=mask)
    if not training:
        _store_sums(sums_ptr, (c_sum, of_r_sum * r), channel, exists, channels, interleaved)


# Elements of a tile. With 4 warps a thread owns 8 of them, which is one or two 16-byte accesses per array.
_TILE = 1024
# Programs of a launch, at most: several waves of them on the largest GPUs, and few enough that what each of
# them writes for the sums is little beside what it reads.
_PROGRAMS = 2048
_OPTIONS = {"num_warps": 4, **FP_FUSION}
# Twice the sums, and derivatives of activations: half as many elements a thread.
_ACT_OPTIONS = {**_OPTIONS, "num_warps": 8}


class _Layout(NamedTuple):
    """How the kernels see a tensor, and the grid of their programs."""

    sizes: tuple[int, int, int, int]  # outer, channels, units, tiles
    constants: dict[str, Any]
    grid: tuple[int, int]

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(shape: torch.Size, interleaved: bool) -> _Layout:
        channels = shape[1]
        outer = shape.numel() // channels if interleaved else shape[0]
        inner = 1 if interleaved else shape.numel() // (outer * channels)
        # What divides inner is known when a kernel is compiled: it is how many elements an access may have.
        unit = math.gcd(inner, 8)
        if interleaved or inner == 1:
            # Without an inner dimension the channels are side by side.
            interleaved = True
            columns = min(triton.next_power_of_2(channels), 128)
            rows = _TILE // columns
            blocks, tiles = -(-channels // columns), -(-outer // rows)
        else:
            rows = min(triton.next_power_of_2(outer), max(_TILE // triton.next_power_of_2(inner), 4))
            columns = min(triton.next_power_of_2(inner), _TILE // rows)
            blocks, tiles = channels, -(-outer // rows) * -(-inner // columns)
        constants = {"unit": unit, "interleaved": interleaved, "rows": rows, "columns": columns}
        grid = (blocks, max(min(tiles, _PROGRAMS // blocks), 1))
        return _Layout((outer, channels, inner // unit, tiles), constants, grid)


def _is_interleaved(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def _in_layout(tensor: Tensor, interleaved: bool) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if interleaved else tensor.contiguous()


def _prepared(
    tensors: tuple[Tensor, ...], parameters: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor, ...], _Layout, tuple[Tensor | None, ...]]:
    """Tensors in the last one's layout, how that is walked, and operands of a value for each channel."""
    interleaved = _is_interleaved(tensors[-1])
    tensors = tuple(_in_layout(tensor, interleaved) for tensor in tensors)
    return tensors, _Layout.of(tensors[-1].shape, interleaved), contiguous(*parameters)


def _scale(
    input: Tensor,
    factor: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The scaled input and, if there is a factor, what the programs found of the two sums: shape
    (2, programs, channels)."""
    layout = _Layout.of(input.shape, interleaved)
    output = torch.empty_like(input)
    sums = input.new_empty((2, layout.grid[1], input.shape[1]), dtype=opmath(input.dtype))
    weight, mean, var_ = contiguous(weight, mean, var)
    with torch.cuda.device_of(input):  # does nothing for a CPU tensor (Triton's interpreter)
        launch(
            batch_norm_scale_kernel,
            layout.grid,
            input,
            factor,
            weight,
            mean,
            var_,
            output,
            None if factor is None else sums,
            *layout.sizes,
            eps=eps,
            **layout.constants,
            **_OPTIONS,
        )
    return output, sums


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """PyTorch's own kernel in training. In evaluation mode one launch of 2n elements, or, with gradients of
    parameters, one of 3n and a sum of what its programs found."""
    if training:
        return torch.ops.aten.native_batch_norm_backward(
            grad_output,
            input,
            weight,
            running_mean,
            running_var,
            save_mean,
            save_invstd,
            training,
            eps,
            output_mask,
        )
    assert running_var is not None  # checked at the Autograd key
    dtype = opmath(grad_output.dtype) if weight is None else weight.dtype
    with_input, with_weight, with_bias = output_mask
    if grad_output.numel() == 0:
        grad_input = torch.empty_like(grad_output)
        sums = grad_output.new_zeros(2, 1, grad_output.shape[1])
    else:
        interleaved = _is_interleaved(grad_output if input is None else input)
        g = _in_layout(grad_output, interleaved)
        factor = None
        if with_weight or with_bias:
            # What only grad_bias needs multiplies a sum that is not wanted.
            factor = g if input is None else _in_layout(input, interleaved)
        grad_input, sums = _scale(g, factor, weight, running_mean, running_var, eps, interleaved)
    return (
        grad_input if with_input else None,
        sums[1].sum(0).to(dtype) if with_weight else None,
        sums[0].sum(0).to(dtype) if with_bias else None,
    )


def batch_norm_double_backward(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In training three launches that move 8n elements: one for sums of each program, their sum, and one that
    reads all again. In evaluation mode two, that move 3n elements without input, and 5n with it."""
    dtype = opmath(grad_output.dtype) if weight is None else weight.dtype
    channels = grad_output.shape[1]
    if grad_output.numel() == 0:
        grad_input = None if input is None else torch.empty_like(input)
        return torch.empty_like(grad_output), grad_input, grad_output.new_zeros(channels, dtype=dtype)
    interleaved = _is_interleaved(grad_output if input is None else input)
    g = _in_layout(grad_output, interleaved)
    # Undefined where only gradients of parameters are differentiated: seldom, and not worth a kernel.
    v = torch.zeros_like(g) if grad_grad_input is None else _in_layout(grad_grad_input, interleaved)
    if input is None:
        assert running_var is not None  # checked at the Autograd key
        grad_grad_output, sums = _scale(v, g, weight, None, running_var, eps, interleaved)
        if grad_grad_bias is not None:
            shape = (-1, *[1] * (grad_grad_output.ndim - 2))
            grad_grad_output.add_(grad_grad_bias.reshape(shape))
        return grad_grad_output, None, None if grad_grad_input is None else sums[1].sum(0).to(dtype)

    statistics = (save_mean, save_invstd) if training else (running_mean, running_var)
    parameters = (grad_grad_weight, grad_grad_bias, weight, *statistics)
    (v, g, x), layout, (u, t, weight, mean, spread) = _prepared((v, g, input), parameters)
    grad_grad_output, grad_input = torch.empty_like(g), torch.empty_like(x)
    dtype_of_sums = opmath(x.dtype)
    with torch.cuda.device_of(x):
        if training:
            partial_sums = x.new_empty((layout.grid[1], 5, channels), dtype=dtype_of_sums)
            launch(
                batch_norm_sums_kernel,
                layout.grid,
                *(v, g, x, mean, partial_sums, *layout.sizes),
                **layout.constants,
                **_OPTIONS,
                **at_most_128_registers(gpu(x.device)),
            )
            per_channel = partial_sums.sum(0)
            grad_weight = x.new_empty(channels, dtype=dtype)
        else:
            per_channel = None
            grad_weight = x.new_empty((layout.grid[1], channels), dtype=dtype_of_sums)
        launch(
            batch_norm_bwd_bwd_kernel,
            layout.grid,
            v,
            u,
            t,
            g,
            x,
            weight,
            mean,
            spread,
            per_channel,
            grad_grad_output,
            grad_input,
            grad_weight,
            *layout.sizes,
            eps=eps,
            training=training,
            **layout.constants,
            **_OPTIONS,
        )
        if not training:
            grad_weight = grad_weight.sum(0).to(dtype)
    return grad_grad_output, grad_input, None if grad_grad_input is None else grad_weight


@functools.cache
def _select(activation: str, parameters: tuple[float, ...]) -> Activation:
    """The activation of a batch_norm_act, with its default parameters where there are none."""
    chosen = ACTIVATIONS.get(activation)
    if chosen is None or chosen.f is None:  # the derivatives are of its output
        names = ", ".join(repr(name) for name, row in ACTIVATIONS.items() if row.f is not None)
        raise ValueError(f"batch_norm_act: expected activation to be one of {names}, got {activation!r}")
    return replace(chosen, parameters=parameters or chosen.parameters)


def _act_sums(
    grad_grad_input: Tensor | None,
    operands: tuple[Tensor | None, ...],
    layout: _Layout,
    chosen: Activation,
) -> Tensor:
    """The sums of batch_norm_act_sums_kernel: shape (1, sums, channels)."""
    x = operands[1]
    assert x is not None
    ddf = None if grad_grad_input is None else chosen.ddf
    count = 2 if grad_grad_input is None else 5 if ddf is None else 10
    sums = x.new_empty((layout.grid[1], count, x.shape[1]), dtype=opmath(x.dtype))
    launch(
        batch_norm_act_sums_kernel,
        layout.grid,
        grad_grad_input,
        *operands,
        sums,
        *layout.sizes,
        parameters=chosen.parameters,
        df=chosen.df,
        ddf=ddf,
        **layout.constants,
        **_ACT_OPTIONS,
    )
    return sums.sum(0, keepdim=True)


def batch_norm_act_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    params: list[float],
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """In training three launches that move 5n elements: one for sums of each program, their sum, and one that
    reads all again. In evaluation mode one of 3n and, with gradients of parameters, a sum of what its
    programs found."""
    chosen = _select(activation, tuple(params))
    dtype = opmath(grad_output.dtype) if weight is None else weight.dtype
    with_input, with_weight, with_bias = output_mask
    sums: Tensor | None = None
    if input.numel() == 0:
        grad_input = torch.empty_like(input)
        sums = input.new_zeros(1, 2, input.shape[1])
    else:
        statistics = (save_mean, save_invstd) if training else (running_mean, running_var)
        (g, x), layout, parameters = _prepared((grad_output, input), (weight, bias, *statistics))
        operands = (g, x, *parameters)
        grad_input = torch.empty_like(x)
        with torch.cuda.device_of(x):
            if training:
                sums = _act_sums(None, operands, layout, chosen)
            elif with_weight or with_bias:
                sums = x.new_empty((layout.grid[1], 2, x.shape[1]), dtype=opmath(x.dtype))
            launch(
                batch_norm_act_bwd_kernel,
                layout.grid,
                *operands,
                sums,
                grad_input,
                *layout.sizes,
                eps=eps,
                training=training,
                parameters=chosen.parameters,
                df=chosen.df,
                **layout.constants,
                **_ACT_OPTIONS,
            )
    return (
        grad_input if with_input else None,
        sums[:, 1].sum(0).to(dtype) if with_weight and sums is not None else None,
        sums[:, 0].sum(0).to(dtype) if with_bias and sums is not None else None,
    )


def batch_norm_act_double_backward(
    grad_grad_input: Tensor,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    params: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In training three launches that move 8n elements: one for sums of each program, their sum, and one that
    reads all again. In evaluation mode one of 5n, and a sum of what its programs found."""
    chosen = _select(activation, tuple(params))
    dtype = opmath(grad_output.dtype) if weight is None else weight.dtype
    channels = input.shape[1]
    if input.numel() == 0:
        grad_weight, grad_bias = (input.new_zeros(channels, dtype=dtype) for _ in range(2))
        return torch.empty_like(grad_output), torch.empty_like(input), grad_weight, grad_bias
    statistics = (save_mean, save_invstd) if training else (running_mean, running_var)
    tensors = (grad_grad_input, grad_output, input)
    (v, g, x), layout, parameters = _prepared(tensors, (weight, bias, *statistics))
    operands = (g, x, *parameters)
    grad_grad_output, grad_input = torch.empty_like(g), torch.empty_like(x)
    with torch.cuda.device_of(x):
        if training:
            sums = _act_sums(v, operands, layout, chosen)
        else:
            sums = x.new_empty((layout.grid[1], 2, channels), dtype=opmath(x.dtype))
        # In evaluation mode nothing is written to them.
        grad_weight, grad_bias = (x.new_empty(channels, dtype=dtype) for _ in range(2))
        launch(
            batch_norm_act_bwd_bwd_kernel,
            layout.grid,
            v,
            *operands,
            sums,
            grad_grad_output,
            grad_input,
            grad_weight,
            grad_bias,
            *layout.sizes,
            eps=eps,
            training=training,
            parameters=chosen.parameters,
            df=chosen.df,
            ddf=chosen.ddf,
            **layout.constants,
            **_ACT_OPTIONS,
        )
    if not training:
        grad_bias, grad_weight = (sums[:, i].sum(0).to(dtype) for i in range(2))
    return grad_grad_output, grad_input, grad_weight, grad_bias
