"""Triton kernels of the elementwise activations.

One kernel per pass serves every activation: an activation is its f, f', f'' and f''', four small
functions that the kernel receives as compile-time constants. To add one, write the four
functions and give them a row in `ACTIVATIONS`.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FP_FUSION, Launcher, on_meta, widen

# Kernels. A tensor is a flat array here: the launcher sees to it that all arrays of a launch share
# one memory layout. `parameters` is spelled out because Triton's generated launcher has a local
# variable `params`.


@triton.jit
def tile(n, block_size: tl.constexpr):
    # 64-bit before the product: a tensor may have more than 2^31 elements.
    offsets = tl.program_id(0).to(tl.int64) * block_size + tl.arange(0, block_size)
    return offsets, offsets < n


@triton.jit
def activation_fwd_kernel(
    input_ptr, output_ptr, n, parameters: tl.constexpr, f: tl.constexpr, block_size: tl.constexpr
):
    """output = f(input). Moves 2n elements: reads 1, writes 1."""
    offsets, mask = tile(n, block_size)
    x = widen(tl.load(input_ptr + offsets, mask=mask))
    tl.store(output_ptr + offsets, f(x, parameters), mask=mask)


@triton.jit
def activation_bwd_kernel(
    grad_output_ptr,
    input_ptr,
    grad_input_ptr,
    n,
    parameters: tl.constexpr,
    df: tl.constexpr,
    block_size: tl.constexpr,
):
    """grad_input = grad_output * f'(input). Moves 3n elements: reads 2, writes 1."""
    offsets, mask = tile(n, block_size)
    x = widen(tl.load(input_ptr + offsets, mask=mask))
    grad_output = widen(tl.load(grad_output_ptr + offsets, mask=mask))
    tl.store(grad_input_ptr + offsets, df(grad_output, x, parameters), mask=mask)


@triton.jit
def activation_bwd_bwd_kernel(
    grad_grad_input_ptr,
    grad_output_ptr,
    input_ptr,
    grad_grad_output_ptr,
    grad_input_ptr,
    n,
    parameters: tl.constexpr,
    df: tl.constexpr,
    ddf: tl.constexpr,
    block_size: tl.constexpr,
):
    """grad_grad_output = grad_grad_input * f'(input) and
    grad_input = grad_grad_input * grad_output * f''(input).

    Moves 5n elements: reads 3, writes 2. What f' and f'' have in common is computed once: the
    compiler merges equal subexpressions.
    """
    offsets, mask = tile(n, block_size)
    x = widen(tl.load(input_ptr + offsets, mask=mask))
    v = widen(tl.load(grad_grad_input_ptr + offsets, mask=mask))
    g = widen(tl.load(grad_output_ptr + offsets, mask=mask))
    grad_grad_output = df(v, x, parameters)
    grad_input = ddf(v, g, x, parameters)
    tl.store(grad_grad_output_ptr + offsets, grad_grad_output, mask=mask)
    tl.store(grad_input_ptr + offsets, grad_input, mask=mask)


@triton.jit
def activation_bwd_bwd_bwd_kernel(
    grad_of_grad_grad_output_ptr,
    grad_of_grad_input_ptr,
    grad_grad_input_ptr,
    grad_output_ptr,
    input_ptr,
    grad_of_grad_grad_input_ptr,
    grad_of_grad_output_ptr,
    grad_of_input_ptr,
    n,
    parameters: tl.constexpr,
    df: tl.constexpr,
    ddf: tl.constexpr,
    dddf: tl.constexpr,
    block_size: tl.constexpr,
):
    """What the double backward's gradients a and b give: a f' + b f'' g, b f'' v and a f'' v + b f''' v g.

    Moves 8n elements: reads 5, writes 3.
    """
    offsets, mask = tile(n, block_size)
    x = widen(tl.load(input_ptr + offsets, mask=mask))
    a = widen(tl.load(grad_of_grad_grad_output_ptr + offsets, mask=mask))
    b = widen(tl.load(grad_of_grad_input_ptr + offsets, mask=mask))
    v = widen(tl.load(grad_grad_input_ptr + offsets, mask=mask))
    g = widen(tl.load(grad_output_ptr + offsets, mask=mask))
    of_v = df(a, x, parameters) + ddf(b, g, x, parameters)
    of_g = ddf(b, v, x, parameters)
    of_x = ddf(a, v, x, parameters) + dddf(b, v, g, x, parameters)
    tl.store(grad_of_grad_grad_input_ptr + offsets, of_v, mask=mask)
    tl.store(grad_of_grad_output_ptr + offsets, of_g, mask=mask)
    tl.store(grad_of_input_ptr + offsets, of_x, mask=mask)


# The activations: f(x), df(g, x) = g f'(x), ddf(v, g, x) = v f''(x) g and dddf(b, v, g, x) = b f'''(x) v g,
# with the parameters last. v and g are not multiplied with each other: both may be large where f'' is 0.


@triton.jit
def expm1(x):
    """exp(x) - 1, by its series near 0, where the difference would cancel."""
    series = x * 0.0 + 1.0
    for k in tl.static_range(15 if x.dtype == tl.float64 else 8, 1, -1):
        series = 1.0 + series * x * (1.0 / k)
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def _log1p_fraction(x):
    """log(1 + x) for 0 <= x <= 1, by the series of 2 artanh(x / (2 + x))."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = square * 0.0
    for k in tl.static_range(17 if x.dtype == tl.float64 else 8, 0, -1):
        series = series * square + 2.0 / (2 * k - 1)
    return series * ratio


@triton.jit
def logistic(x):
    """s(x) and s'(x) = s (1 - s), the smaller of s and 1 - s free of cancellation."""
    e = tl.exp(-tl.abs(x))
    smaller = e / (1.0 + e)
    larger = 1.0 - smaller
    return tl.where(x >= 0, larger, smaller), smaller * larger


@triton.jit
def _logistic_bends(x):
    """s'' = s' (1 - 2 s) and its derivative."""
    s, q = logistic(x)
    skew = 1.0 - 2.0 * s
    return q * skew, q * (skew * skew - 2.0 * q)


# GELU, erf: f = x Phi(x), f' = Phi + x phi, f'' = 2 phi - x (x phi), f''' = x^2 (x phi) - 4 x phi.

_SQRT_1_2 = tl.constexpr(math.sqrt(0.5))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * _SQRT_1_2)


@triton.jit
def _normal_pdf(x):
    return _INV_SQRT_2PI * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_erf_f(x, parameters: tl.constexpr):
    return x * _normal_cdf(x)


@triton.jit
def gelu_erf_df(g, x, parameters: tl.constexpr):
    return g * (_normal_cdf(x) + x * _normal_pdf(x))


@triton.jit
def gelu_erf_ddf(v, g, x, parameters: tl.constexpr):
    phi = _normal_pdf(x)
    # Not (2 - x^2) phi: x^2 may be inf where phi is 0.
    return v * (2.0 * phi - x * (x * phi)) * g


@triton.jit
def gelu_erf_dddf(b, v, g, x, parameters: tl.constexpr):
    moment = x * _normal_pdf(x)
    return b * (x * (x * moment) - 4.0 * moment) * v * g


# GELU, tanh: f = x s with s = sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3) = A x + B x^3.
# With q = s (1 - s) = ds/dz, z' = A + 3 B x^2 and z'' = 6 B x,
#     f' = s + x q z',   f'' = 2 q z' + x S'',   S'' = q z'' + z' (q z') (1 - 2 s),   f''' = 3 S'' + x S''',
#     S''' = q z''' + 3 s''(z) z' z'' + s'''(z) z'^3.
# q is the first factor of every product below: it is 0 long before a power of x overflows.

_A = tl.constexpr(2 * math.sqrt(2 / math.pi))
_B = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
_B3 = tl.constexpr(6 * math.sqrt(2 / math.pi) * 0.044715)


@triton.jit
def _gelu_tanh_gate(x):
    return logistic(x * (_A + _B * x * x))


@triton.jit
def gelu_tanh_f(x, parameters: tl.constexpr):
    s, _ = _gelu_tanh_gate(x)
    return x * s


@triton.jit
def gelu_tanh_df(g, x, parameters: tl.constexpr):
    s, q = _gelu_tanh_gate(x)
    qx = q * x
    return g * (s + (_A * qx + _B3 * (qx * x * x)))


@triton.jit
def gelu_tanh_ddf(v, g, x, parameters: tl.constexpr):
    s, q = _gelu_tanh_gate(x)
    qxx = q * x * x
    qdz = _A * q + _B3 * qxx
    qdzdz = _A * qdz + _B3 * (qdz * x * x)
    return v * (2.0 * (qdz + _B3 * qxx) + qdzdz * x * (1.0 - 2.0 * s)) * g


@triton.jit
def _times_slope(t, x):
    """t z'"""
    return _A * t + _B3 * (t * x * x)


@triton.jit
def gelu_tanh_dddf(b, v, g, x, parameters: tl.constexpr):
    _, q = _gelu_tanh_gate(x)
    second, third = _logistic_bends(x * (_A + _B * x * x))
    bend = 2.0 * _B3 * q
    curvature = bend * x + _times_slope(_times_slope(second, x), x)
    last = bend + 6.0 * _B3 * (_times_slope(second, x) * x)
    last += _times_slope(_times_slope(_times_slope(third, x), x), x)
    return b * (3.0 * curvature + x * last) * v * g


# SiLU: f = x s, f' = s + x s', f'' = 2 s' + x s'', f''' = 3 s'' + x s'''.


@triton.jit
def silu_f(x, parameters: tl.constexpr):
    s, _ = logistic(x)
    return x * s


@triton.jit
def silu_df(g, x, parameters: tl.constexpr):
    s, q = logistic(x)
    return g * (s + x * q)


@triton.jit
def silu_ddf(v, g, x, parameters: tl.constexpr):
    s, q = logistic(x)
    return v * (2.0 * q + x * q * (1.0 - 2.0 * s)) * g


@triton.jit
def silu_dddf(b, v, g, x, parameters: tl.constexpr):
    second, third = _logistic_bends(x)
    return b * (3.0 * second + x * third) * v * g


# Quick GELU: f = x s(z) with z = c x, f' = s + z s', f'' = c (2 s' + z s''), f''' = c^2 (3 s'' + z s''').

_C = tl.constexpr(1.702)


@triton.jit
def quick_gelu_f(x, parameters: tl.constexpr):
    s, _ = logistic(x * _C)
    return x * s


@triton.jit
def quick_gelu_df(g, x, parameters: tl.constexpr):
    s, q = logistic(x * _C)
    return g * (s + x * q * _C)


@triton.jit
def quick_gelu_ddf(v, g, x, parameters: tl.constexpr):
    s, q = logistic(x * _C)
    return v * ((2.0 * q + x * q * (1.0 - 2.0 * s) * _C) * _C) * g


@triton.jit
def quick_gelu_dddf(b, v, g, x, parameters: tl.constexpr):
    second, third = _logistic_bends(x * _C)
    return b * ((3.0 * second + x * third * _C) * (_C * _C)) * v * g


# Mish: f = x t with t = tanh(log(1 + e)), e = exp(x). With D = 2 + 2 e + e^2,
#     t = e (2 + e) / D = 1 - 2 / D,   t' = 4 e (1 + e) / D^2,   t'' = 4 e (2 + 2 e - 3 e^2 - 2 e^3) / D^3.
# For x > 0 the fractions are reduced by powers of e, to be written in d = exp(-|x|) on either side. With s
# the logistic function and u = 1 - t^2 = 4 (1 + e)^2 / D^2, t''' = u (s'' - 6 t s s' + s^3 (4 t^2 - 2 u)).


@triton.jit
def _mish_gate(x):
    """t, t' and t''."""
    positive = x > 0
    d = tl.exp(-tl.abs(x))
    scale = 1.0 / tl.where(positive, 1.0 + d * (2.0 + 2.0 * d), 2.0 + d * (2.0 + d))
    decay = tl.where(positive, d * d, d) * scale
    value = tl.where(positive, 1.0 - 2.0 * decay, decay * (d + 2.0))
    slope = 4.0 * decay * (1.0 + d) * scale
    cubic = tl.where(
        positive, -2.0 + d * (-3.0 + d * (2.0 + 2.0 * d)), 2.0 + d * (2.0 + d * (-3.0 - 2.0 * d))
    )
    return value, slope, 4.0 * decay * scale * scale * cubic


@triton.jit
def mish_f(x, parameters: tl.constexpr):
    value, _, _ = _mish_gate(x)
    return x * value


@triton.jit
def mish_df(g, x, parameters: tl.constexpr):
    value, slope, _ = _mish_gate(x)
    return g * (value + x * slope)


@triton.jit
def mish_ddf(v, g, x, parameters: tl.constexpr):
    _, slope, curvature = _mish_gate(x)
    return v * (2.0 * slope + x * curvature) * g


@triton.jit
def mish_dddf(b, v, g, x, parameters: tl.constexpr):
    value, _, curvature = _mish_gate(x)
    positive = x > 0
    d = tl.exp(-tl.abs(x))
    root = 2.0 * tl.where(positive, d, 1.0) * (1.0 + d)
    root /= tl.where(positive, 1.0 + d * (2.0 + 2.0 * d), 2.0 + d * (2.0 + d))
    u = root * root
    s, q = logistic(x)
    third = u * (q * (1.0 - 2.0 * s - 6.0 * value * s) + s * s * s * (4.0 * value * value - 2.0 * u))
    return b * (3.0 * curvature + x * third) * v * g


# Softplus, parameters (beta, threshold): with z = beta x, f = log(1 + exp(z)) / beta, f' = s(z),
# f'' = beta s'(z), f''' = beta^2 s''(z); above the threshold f = x.


@triton.jit
def softplus_f(x, parameters: tl.constexpr):
    z = x * parameters[0]
    smooth = tl.where(z > 0, z, 0.0) + _log1p_fraction(tl.exp(-tl.abs(z)))
    return tl.where(z > parameters[1], x, smooth / parameters[0])


@triton.jit
def softplus_df(g, x, parameters: tl.constexpr):
    z = x * parameters[0]
    s, _ = logistic(z)
    return tl.where(z > parameters[1], g, g * s)


@triton.jit
def softplus_ddf(v, g, x, parameters: tl.constexpr):
    z = x * parameters[0]
    _, q = logistic(z)
    return v * tl.where(z >= parameters[1], 0.0, q * parameters[0]) * g


@triton.jit
def softplus_dddf(b, v, g, x, parameters: tl.constexpr):
    z = x * parameters[0]
    second, _ = _logistic_bends(z)
    return b * tl.where(z >= parameters[1], 0.0, second * (parameters[0] * parameters[0])) * v * g


# ELU, parameters (alpha, scale, input_scale): f = scale x for x > 0, else
# scale alpha (exp(input_scale x) - 1).


@triton.jit
def _nonpositive(x):
    return tl.where(x > 0, 0.0, x)  # and NaN stays NaN


@triton.jit
def elu_f(x, parameters: tl.constexpr):
    negative = expm1(_nonpositive(x) * parameters[2])
    return tl.where(x > 0, x * parameters[1], negative * (parameters[0] * parameters[1]))


@triton.jit
def elu_df(g, x, parameters: tl.constexpr):
    slope = tl.exp(_nonpositive(x) * parameters[2]) * (parameters[0] * parameters[1] * parameters[2])
    return tl.where(x > 0, g * parameters[1], g * slope)


@triton.jit
def elu_ddf(v, g, x, parameters: tl.constexpr):
    slope = tl.exp(_nonpositive(x) * parameters[2]) * (parameters[0] * parameters[1] * parameters[2])
    return v * tl.where(x >= 0, 0.0, slope * parameters[2]) * g


@triton.jit
def elu_dddf(b, v, g, x, parameters: tl.constexpr):
    return b * elu_ddf(v, g, x, parameters) * parameters[2]


# tanh and the sigmoid: their derivatives are functions of y = f(x), which is what the op saves. f itself
# is ATen's kernel.


@triton.jit
def tanh_df(g, y, parameters: tl.constexpr):
    return g * ((1.0 - y) * (1.0 + y))


@triton.jit
def tanh_ddf(v, g, y, parameters: tl.constexpr):
    return v * (-2.0 * y) * g


@triton.jit
def parabola_dddf(b, v, g, y, parameters: tl.constexpr):
    """Of both: f' is a parabola in y, with the second derivative -2."""
    return b * -2.0 * v * g


@triton.jit
def sigmoid_df(g, y, parameters: tl.constexpr):
    return g * (y * (1.0 - y))


@triton.jit
def sigmoid_ddf(v, g, y, parameters: tl.constexpr):
    return v * (1.0 - 2.0 * y) * g


# Of linear pieces: no f''.


@triton.jit
def relu_f(x, parameters: tl.constexpr):
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def relu_df(g, x, parameters: tl.constexpr):
    return tl.where(x <= 0, 0.0, g)


@triton.jit
def relu6_f(x, parameters: tl.constexpr):
    return tl.where(x <= 0, 0.0, tl.where(x >= 6, 6.0, x))


@triton.jit
def relu6_df(g, x, parameters: tl.constexpr):
    return tl.where((x <= 0) | (x >= 6), 0.0, g)


@triton.jit
def leaky_relu_f(x, parameters: tl.constexpr):
    return tl.where(x > 0, x, x * parameters[0])


@triton.jit
def leaky_relu_df(g, x, parameters: tl.constexpr):
    return tl.where(x > 0, g, g * parameters[0])


@triton.jit
def hardsigmoid_f(x, parameters: tl.constexpr):
    return tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, (x + 3.0) / 6.0))


@triton.jit
def hardsigmoid_df(g, x, parameters: tl.constexpr):
    return tl.where((x > -3) & (x < 3), g / 6.0, 0.0)


# Hardswish: f = x h, with h the hard sigmoid.


@triton.jit
def hardswish_f(x, parameters: tl.constexpr):
    return x * hardsigmoid_f(x, parameters)


@triton.jit
def hardswish_df(g, x, parameters: tl.constexpr):
    return tl.where(x <= -3, 0.0, tl.where(x >= 3, g, g * (x / 3.0 + 0.5)))


@triton.jit
def hardswish_ddf(v, g, x, parameters: tl.constexpr):
    return tl.where((x > -3) & (x < 3), v / 3.0 * g, 0.0)


@triton.jit
def zero_dddf(b, v, g, x, parameters: tl.constexpr):
    """Of pieces that are parabolas."""
    return tl.zeros_like(x)


# Softsign: f = x / (1 + |x|), f' = r^2, f'' = -2 sgn(x) r^3, f''' = 6 r^4 with r = 1 / (1 + |x|), both 0
# at 0. r falls as slowly as |x| grows, so that v and g may outweigh its powers: each is multiplied with its
# share.


@triton.jit
def softsign_f(x, parameters: tl.constexpr):
    return x / (1.0 + tl.abs(x))


@triton.jit
def softsign_df(g, x, parameters: tl.constexpr):
    r = 1.0 / (1.0 + tl.abs(x))
    return g * r * r


@triton.jit
def softsign_ddf(v, g, x, parameters: tl.constexpr):
    r = 1.0 / (1.0 + tl.abs(x))
    side = tl.where(x > 0, -2.0, tl.where(x < 0, 2.0, 0.0))
    return v * r * r * side * (g * r)


@triton.jit
def softsign_dddf(b, v, g, x, parameters: tl.constexpr):
    r = 1.0 / (1.0 + tl.abs(x))
    return b * r * (v * r) * (g * r) * r * tl.where(x == 0, 0.0, 6.0)


# Log-sigmoid: f = log s(x), f' = s(-x), f'' = -s'(x), f''' = s''(-x).


@triton.jit
def logsigmoid_f(x, parameters: tl.constexpr):
    return _nonpositive(x) - _log1p_fraction(tl.exp(-tl.abs(x)))


@triton.jit
def logsigmoid_df(g, x, parameters: tl.constexpr):
    s, _ = logistic(-x)
    return g * s


@triton.jit
def logsigmoid_ddf(v, g, x, parameters: tl.constexpr):
    _, q = logistic(-x)
    return v * -q * g


@triton.jit
def logsigmoid_dddf(b, v, g, x, parameters: tl.constexpr):
    second, _ = _logistic_bends(-x)
    return b * second * v * g


# Squared ReLU: f = x^2 for x > 0, else 0.


@triton.jit
def squared_relu_f(x, parameters: tl.constexpr):
    return tl.where(x <= 0, 0.0, x * x)


@triton.jit
def squared_relu_df(g, x, parameters: tl.constexpr):
    return tl.where(x <= 0, 0.0, 2.0 * (g * x))


@triton.jit
def squared_relu_ddf(v, g, x, parameters: tl.constexpr):
    return tl.where(x <= 0, 0.0, 2.0 * (v * g))


# Sine and cosine of w x, with the parameter w.


@triton.jit
def sin_f(x, parameters: tl.constexpr):
    return tl.sin(x * parameters[0])


@triton.jit
def sin_df(g, x, parameters: tl.constexpr):
    return g * (tl.cos(x * parameters[0]) * parameters[0])


@triton.jit
def sin_ddf(v, g, x, parameters: tl.constexpr):
    return v * (-tl.sin(x * parameters[0]) * (parameters[0] * parameters[0])) * g


@triton.jit
def sin_dddf(b, v, g, x, parameters: tl.constexpr):
    return b * (-tl.cos(x * parameters[0]) * (parameters[0] * parameters[0] * parameters[0])) * v * g


@triton.jit
def cos_f(x, parameters: tl.constexpr):
    return tl.cos(x * parameters[0])


@triton.jit
def cos_df(g, x, parameters: tl.constexpr):
    return g * (-tl.sin(x * parameters[0]) * parameters[0])


@triton.jit
def cos_ddf(v, g, x, parameters: tl.constexpr):
    return v * (-tl.cos(x * parameters[0]) * (parameters[0] * parameters[0])) * g


@triton.jit
def cos_dddf(b, v, g, x, parameters: tl.constexpr):
    return b * (tl.sin(x * parameters[0]) * (parameters[0] * parameters[0] * parameters[0])) * v * g


@dataclass(frozen=True, eq=False)  # eq=False: hashed by identity, in the hot path
class Activation:
    """f, f', f'' and f''', and the parameters that follow their tensors: compile-time floats, such as
    ELU's alpha. There is no op for a pass whose functions are missing."""

    f: Any
    df: Any
    ddf: Any = None
    dddf: Any = None
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Pass:
    """A kernel, what its ops are called after the activation, the numbers of arrays it reads and
    writes, and the functions it is built from."""

    kernel: Any
    suffix: str
    reads: int
    writes: int
    functions: tuple[str, ...]


FORWARD = Pass(activation_fwd_kernel, "", 1, 1, ("f",))
BACKWARD = Pass(activation_bwd_kernel, "_backward", 2, 1, ("df",))
DOUBLE_BACKWARD = Pass(activation_bwd_bwd_kernel, "_double_backward", 3, 2, ("df", "ddf"))
TRIPLE_BACKWARD = Pass(activation_bwd_bwd_bwd_kernel, "_triple_backward", 5, 3, ("df", "ddf", "dddf"))


def passes(activation: Activation) -> list[Pass]:
    every = (FORWARD, BACKWARD, DOUBLE_BACKWARD, TRIPLE_BACKWARD)
    return [p for p in every if None not in (getattr(activation, name) for name in p.functions)]


ACTIVATIONS = {
    "gelu_none": Activation(gelu_erf_f, gelu_erf_df, gelu_erf_ddf, gelu_erf_dddf),
    "gelu_tanh": Activation(gelu_tanh_f, gelu_tanh_df, gelu_tanh_ddf, gelu_tanh_dddf),
    "silu": Activation(silu_f, silu_df, silu_ddf, silu_dddf),
    "quick_gelu": Activation(quick_gelu_f, quick_gelu_df, quick_gelu_ddf, quick_gelu_dddf),
    "mish": Activation(mish_f, mish_df, mish_ddf, mish_dddf),
    "softplus": Activation(softplus_f, softplus_df, softplus_ddf, softplus_dddf, (1.0, 20.0)),
    "elu": Activation(elu_f, elu_df, elu_ddf, elu_dddf, (1.0, 1.0, 1.0)),
    "tanh": Activation(None, tanh_df, tanh_ddf, parabola_dddf),
    "sigmoid": Activation(None, sigmoid_df, sigmoid_ddf, parabola_dddf),
    "relu": Activation(relu_f, relu_df),
    "relu6": Activation(relu6_f, relu6_df),
    "leaky_relu": Activation(leaky_relu_f, leaky_relu_df, parameters=(0.01,)),
    "hardsigmoid": Activation(hardsigmoid_f, hardsigmoid_df),
    "hardswish": Activation(hardswish_f, hardswish_df, hardswish_ddf, zero_dddf),
    "softsign": Activation(softsign_f, softsign_df, softsign_ddf, softsign_dddf),
    "logsigmoid": Activation(logsigmoid_f, logsigmoid_df, logsigmoid_ddf, logsigmoid_dddf),
    "squared_relu": Activation(squared_relu_f, squared_relu_df, squared_relu_ddf, zero_dddf),
    "sin": Activation(sin_f, sin_df, sin_ddf, sin_dddf, (1.0,)),
    "cos": Activation(cos_f, cos_df, cos_ddf, cos_dddf, (1.0,)),
}

# Elements a program owns. With 4 warps a thread owns 8 elements (4 of float64), which is one or two
# 16-byte accesses per array: bytes in flight enough, and registers few enough that most warps of an
# SM are resident.
_BLOCK = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 1024, torch.float64: 512}
_OPTIONS = {"num_warps": 4, **FP_FUSION}


@functools.cache
def _launcher(pass_: Pass, activation: Activation, dtype: torch.dtype) -> Launcher:
    functions = {name: getattr(activation, name) for name in pass_.functions}
    constants = {"parameters": activation.parameters, **functions, "block_size": _BLOCK[dtype]}
    return Launcher(pass_.kernel, constants | _OPTIONS)


def _launch(pass_: Pass, activation: Activation, tensors: tuple[Tensor, ...]) -> None:
    """Run over the tensors, inputs before outputs, which all share one dense memory layout."""
    like = tensors[0]
    n, dtype = like.numel(), like.dtype
    if n == 0:
        return
    grid = (-(-n // _BLOCK[dtype]),)  # triton.cdiv takes 2 us of host time
    with torch.cuda.device_of(like):  # does nothing for a CPU tensor (Triton's interpreter)
        _launcher(pass_, activation, dtype)(grid, (*tensors, n))


def _same_layout(shape: torch.Size, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether these strides are of one layout. That of a dimension of size 1 says nothing."""
    return a == b or all(i == j or size == 1 for size, i, j in zip(shape, a, b, strict=True))


def _in_one_layout(
    op: str, inputs: tuple[Tensor, ...], settings: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inputs in the layout of the op's output, copied where they differ, and an empty output.

    The op's Meta kernel says what the output looks like, and rejects inputs that do not match.
    """
    meta = on_meta(op, inputs, *settings, **options)
    meta = meta[0] if isinstance(meta, tuple) else meta

    def empty() -> Tensor:
        return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=inputs[-1].device)

    def in_layout(tensor: Tensor) -> Tensor:
        same = tensor.shape == meta.shape and tensor.dtype == meta.dtype
        same = same and _same_layout(meta.shape, tensor.stride(), meta.stride())
        return tensor if same else empty().copy_(tensor)

    return tuple(in_layout(tensor) for tensor in inputs), empty()


def make_op(pass_: Pass, op: str, select: Callable[..., Activation]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Tensor | tuple[Tensor, ...]:
        inputs, settings = args[: pass_.reads], args[pass_.reads :]
        activation = select(*settings, **options)
        like = inputs[-1]
        dtype = like.dtype
        if dtype not in _BLOCK:
            if pass_ is FORWARD:
                # Some of PyTorch's own take integers and complex numbers.
                with contextlib.suppress(RuntimeError):
                    return getattr(torch.ops.aten, op)(*args, **options)
            names = ", ".join(str(dtype)[6:] for dtype in _BLOCK)
            raise TypeError(f"{op}: expected input to be one of {names}, got {dtype}")
        # empty_like keeps the strides of a dense tensor, and of no other.
        output = torch.empty_like(like)
        shape, strides, device = output.shape, output.stride(), output.device
        for tensor in inputs:
            if (
                tensor.shape != shape
                or tensor.dtype != dtype
                or tensor.device != device
                or not _same_layout(shape, tensor.stride(), strides)
            ):
                inputs, output = _in_one_layout(op, inputs, settings, options)
                break
        outputs = (output, *(torch.empty_like(output) for _ in range(pass_.writes - 1)))
        _launch(pass_, activation, inputs + outputs)
        return output if pass_.writes == 1 else outputs

    run.__name__ = run.__qualname__ = op
    return run


def _select_gelu(*, approximate: str = "none") -> Activation:
    activation = ACTIVATIONS.get(f"gelu_{approximate}")
    if activation is None:
        raise ValueError(f"gelu: expected approximate to be 'none' or 'tanh', got {approximate!r}")
    return activation


def _select(name: str) -> Callable[..., Activation]:
    """What gives the Activation of an op's parameters, of which those at their defaults may be left out."""
    schema = getattr(torch.ops.gradnorm_kernels, name).default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments[1:]}

    @functools.cache
    def select(**parameters: float) -> Activation:
        return replace(ACTIVATIONS[name], parameters=tuple((defaults | parameters).values()))

    return select


# The ops, under their own names.
for _name, _activation in ACTIVATIONS.items():
    _op, _selector = ("gelu", _select_gelu) if _name.startswith("gelu_") else (_name, _select(_name))
    for _pass in passes(_activation):
        globals()[_op + _pass.suffix] = make_op(_pass, _op + _pass.suffix, _selector)
