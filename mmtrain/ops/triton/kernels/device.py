"""What the kernels share on the device: softplus and its derivative, and the way a direction walks over a grid."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: A direction's order over the grid H×W (positions are numbered row by row): row-major, row-major from the end,
#: column-major, column-major from the end.
ROWS, ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED = range(4)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1], to a few units in the last place *relative* to the result.

    2·atanh(e/(2 + e)) as a power series, s² <= 1/9: seven terms leave 2e-8. The hardware's log2 is only accurate in
    absolute terms near 1, and the steps of a freshly initialised Mamba are as small as 1e-3.
    """
    s = e / (2.0 + e)
    q = s * s
    p = 1.0 / 13
    p = p * q + 1.0 / 11
    p = p * q + 1.0 / 9
    p = p * q + 1.0 / 7
    p = p * q + 1.0 / 5
    p = p * q + 1.0 / 3
    return 2.0 * (s + s * q * p)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow and without losing small results."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp2(-tl.abs(x) * LOG2E))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow: the derivative of softplus."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def direction(order, height, width):
    """(origin, extent, fast, slow): step t of this order is at origin + (t % extent)·fast + (t // extent)·slow."""
    columns = order >= 2
    extent = tl.where(columns, height, height * width)
    fast = tl.where(columns, width, 1)
    slow = tl.where(columns, 1, 0)
    backwards = order % 2 == 1
    sign = tl.where(backwards, -1, 1)
    return tl.where(backwards, height * width - 1, 0), extent, sign * fast, sign * slow


@triton.jit
def next_position(place, inner, extent, fast, slow):
    """(position, t % extent) one step on: additions only, since a division a step would cost as much as two states."""
    wraps = inner + 1 == extent
    return place + tl.where(wraps, slow - (extent - 1) * fast, fast), tl.where(wraps, 0, inner + 1)
