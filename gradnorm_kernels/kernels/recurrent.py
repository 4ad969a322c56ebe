"""The Triton kernel of a recurrent cell's step: forward, backward and double backward.

A program takes a block of the state's elements, and the four gates of each. csrc/cpu/recurrent.h has the
mathematics.
"""

# mypy: allow-untyped-defs
# Triton types the arguments of a kernel when it is called.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import expm1, logistic, tile
from .common import (
    BACKWARD,
    DOUBLE_BACKWARD,
    DTYPES,
    FORWARD,
    FP_FUSION,
    contiguous,
    empty_like,
    launch,
    load,
    on_meta,
)


@triton.jit
def _tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    size = -e / (2.0 + e)
    return tl.where(x >= 0, size, -size)


@triton.jit
def _load_gates(ptr, at, features, mask):
    return (
        load(ptr, at, mask),
        load(ptr, at + features, mask),
        load(ptr, at + 2 * features, mask),
        load(ptr, at + 3 * features, mask),
    )


@triton.jit
def _store_gates(ptr, at, features, mask, i, f, g, o):
    tl.store(ptr + at, i, mask=mask)
    tl.store(ptr + at + features, f, mask=mask)
    tl.store(ptr + at + 2 * features, g, mask=mask)
    tl.store(ptr + at + 3 * features, o, mask=mask)


# A cell's steps: of its gates and state c' the output h and the next state c; with the gradients dh and dc of
# these, those of gates and state; with the gradients v of those, those of dh, dc, gates and state.


@triton.jit
def lstm_values(i, f, g, o, state):
    c = logistic(f)[0] * state + logistic(i)[0] * _tanh(g)
    return logistic(o)[0] * _tanh(c), c


@triton.jit
def _lstm(i, f, g, o, state):
    si, di = logistic(i)
    sf, df = logistic(f)
    so, do = logistic(o)
    tg = _tanh(g)
    t = _tanh(sf * state + si * tg)
    return si, di, sf, df, so, do, tg, 1.0 - tg * tg, t, 1.0 - t * t


@triton.jit
def lstm_gradients(dh, dc, i, f, g, o, state):
    si, di, sf, df, so, do, tg, dg, t, dt = _lstm(i, f, g, o, state)
    d = dc + dh * so * dt
    return d * tg * di, d * state * df, d * si * dg, dh * t * do, d * sf


@triton.jit
def lstm_second(vi, vf, vg, vo, vc, dh, dc, i, f, g, o, state):
    si, di, sf, df, so, do, tg, dg, t, dt = _lstm(i, f, g, o, state)
    d = dc + dh * so * dt
    # Of d, and of c through t.
    of_d = vi * tg * di + vf * state * df + vg * si * dg + vc * sf
    of_c = (vo * do - 2.0 * of_d * so * t) * dh * dt
    return (
        of_d * so * dt + vo * t * do,
        of_d,
        d * (vi * tg * di * (1.0 - 2.0 * si) + vg * di * dg) + of_c * tg * di,
        d * (vf * state * df * (1.0 - 2.0 * sf) + vc * df) + of_c * state * df,
        d * (vi * di - 2.0 * vg * si * tg) * dg + of_c * si * dg,
        dh * (of_d * dt * do + vo * t * do * (1.0 - 2.0 * so)),
        d * vf * df + of_c * sf,
    )


@triton.jit
def gru_values(r, z, x, a, state):
    n = _tanh(x + logistic(r)[0] * a)
    h = n + logistic(z)[0] * (state - n)
    return h, h


@triton.jit
def gru_gradients(dh, dc, r, z, x, a, state):
    sr, dr = logistic(r)
    sz, dz = logistic(z)
    n = _tanh(x + sr * a)
    d = dh + dc
    of_sum = d * (1.0 - sz) * (1.0 - n * n)
    return of_sum * a * dr, d * (state - n) * dz, of_sum, of_sum * sr, d * sz


@triton.jit
def gru_second(vr, vz, vx, va, vc, dh, dc, r, z, x, a, state):
    sr, dr = logistic(r)
    sz, dz = logistic(z)
    n = _tanh(x + sr * a)
    dn = 1.0 - n * n
    m = 1.0 - sz
    d = dh + dc
    change = state - n
    # Of the sum's gradient over d m dn, and of the sum itself.
    k = vr * a * dr + vx + va * sr
    of_sum = d * dn * (-2.0 * m * n * k - vz * dz)
    of_d = m * dn * k + vz * change * dz + vc * sz
    return (
        of_d,
        of_d,
        of_sum * a * dr + d * m * dn * (vr * a * dr * (1.0 - 2.0 * sr) + va * dr),
        d * (vz * change * (1.0 - 2.0 * sz) + vc - dn * k) * dz,
        of_sum,
        of_sum * sr + d * m * dn * vr * dr,
        d * vz * dz,
    )


@triton.jit
def step_kernel(
    grad_grad_gates_ptr,
    grad_grad_state_ptr,
    grad_hidden_ptr,
    grad_next_state_ptr,
    gates_ptr,
    state_ptr,
    of_hidden_ptr,
    of_next_state_ptr,
    of_gates_ptr,
    of_state_ptr,
    n,
    features,
    cell: tl.constexpr,
    order: tl.constexpr,
    block_size: tl.constexpr,
):
    """cell is the function of the cell and the order, from above.

    Moves 7n, 12n or 19n elements: reads 5, 7 or 12 and writes the rest.
    """
    own, mask = tile(n, block_size)
    at = own + own // features * (3 * features)
    p, q, r, s = _load_gates(gates_ptr, at, features, mask)
    state = load(state_ptr, own, mask)
    if order == 0:
        hidden, next_state = cell(p, q, r, s, state)
        tl.store(of_hidden_ptr + own, hidden, mask=mask)
        tl.store(of_next_state_ptr + own, next_state, mask=mask)
    else:
        dh = load(grad_hidden_ptr, own, mask)
        dc = load(grad_next_state_ptr, own, mask)
        if order == 1:
            of_p, of_q, of_r, of_s, of_state = cell(dh, dc, p, q, r, s, state)
        else:
            vp, vq, vr, vs = _load_gates(grad_grad_gates_ptr, at, features, mask)
            vc = load(grad_grad_state_ptr, own, mask)
            of_h, of_c, of_p, of_q, of_r, of_s, of_state = cell(vp, vq, vr, vs, vc, dh, dc, p, q, r, s, state)
            tl.store(of_hidden_ptr + own, of_h, mask=mask)
            tl.store(of_next_state_ptr + own, of_c, mask=mask)
        _store_gates(of_gates_ptr, at, features, mask, of_p, of_q, of_r, of_s)
        tl.store(of_state_ptr + own, of_state, mask=mask)


def _run(op: str, order: int, cell: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The tensors are the op's: gates and state come last."""
    gates, state = tensors[-2:]
    like_gates = (gates, *tensors[: order == DOUBLE_BACKWARD])
    like_state = tensors[order == DOUBLE_BACKWARD : -2]
    if (
        state.dtype not in DTYPES
        or state.ndim == 0
        or any(t.dtype != state.dtype or t.device != state.device for t in tensors)
        or any(t.shape != (*state.shape[:-1], 4 * state.shape[-1]) for t in like_gates)
        or any(t.shape != state.shape for t in like_state)
    ):
        on_meta(op, tensors)

    of_hidden, of_next = (empty_like(state, order != BACKWARD) for _ in range(2))
    of_gates, of_state = (empty_like(t, order != FORWARD) for t in (gates, state))
    if state.numel() > 0:
        block_size = 256
        with torch.cuda.device_of(state):  # does nothing for a CPU tensor (Triton's interpreter)
            launch(
                step_kernel,
                (-(-state.numel() // block_size),),
                *[None] * (6 - len(tensors)),
                *contiguous(*tensors),
                of_hidden,
                of_next,
                of_gates,
                of_state,
                state.numel(),
                state.shape[-1],
                cell=cell,
                order=order,
                block_size=block_size,
                num_warps=4,
                **FP_FUSION,
            )
    return tuple(result for result in (of_hidden, of_next, of_gates, of_state) if result is not None)


def _op(name: str, order: int, cell: Any) -> Callable[..., Any]:
    def op(*tensors: Tensor) -> Any:
        return _run(name, order, cell, tensors)

    return op


lstm_step = _op("lstm_step", FORWARD, lstm_values)
lstm_step_backward = _op("lstm_step_backward", BACKWARD, lstm_gradients)
lstm_step_double_backward = _op("lstm_step_double_backward", DOUBLE_BACKWARD, lstm_second)
gru_step = _op("gru_step", FORWARD, gru_values)
gru_step_backward = _op("gru_step_backward", BACKWARD, gru_gradients)
gru_step_double_backward = _op("gru_step_double_backward", DOUBLE_BACKWARD, gru_second)
