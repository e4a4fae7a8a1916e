"""The forward kernels of the directional scan, and device functions that are shared with other kernels.

A program computes one (batch entry, direction, block of channels). It processes the positions in sequence, with the
state [N, BLOCK_D] in registers. With BLOCK_D = 32·warps the compiler assigns one channel and all its N states to each
thread. So there are no shuffles, no shared memory and no barriers; N independent chains hide latencies; and softplus is
computed once per channel. An associative scan over positions, as in Mamba's CUDA kernel, would cost two additional
multiply-adds and half a shuffle per state and position. It is not needed if there are many channels.

Limits on an H100 (132 SMs; per SM and clock 16 ex2, 128 fp32 operations, 4 warp instructions), per position and 32
channels with N = 16: 16 exponentials + softplus take 36 clocks of the ex2 unit, 82 fp32 instructions take 20 clocks,
and issuing all of about 215 instructions (counted in the bf16 code for sm_90) takes 54 clocks. Memory traffic is 2
bytes for u, 2 for delta and 2 to 4 for y per channel, about 17 clocks of an SM's share of 3.35 TB/s. So the kernel is
bound by instruction issue, at two thirds of the rate that the ex2 unit allows, and saves instructions: exp is exp2 with
log2(e) folded into A, positions are advanced by additions, B and C are loaded as vectors. Few warps are sufficient,
because each has N chains. (These figures are computed from the compiled code, not measured.)

If batch, directions and channels do not fill the GPU, long sequences are divided into splits. The recurrence is linear
in the state: a state h at the start of a split adds exp(A ΣΔ) h to the state at its end. `split_local` runs every split
from a zero state and writes only the final state and ΣΔ. `split_carry` computes from these the true state at the start
of each split. Then the main kernel runs every split from its true state. The cost is one additional exponential per
state and position. The backward pass does the same with s_t = exp(Δ_t A) (s_{t+1} + dy_t C_t), from the last position
to the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Codes of the scan orders over a grid H×W, whose positions are numbered row by row.
ROWS, ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED = range(4)


@triton.jit
def log1p_unit(e):
    """Return log(1 + e) for e in [0, 1], with a *relative* error of a few units in the last place.

    It is computed as 2·atanh(e/(2 + e)) by a power series with s² <= 1/9; seven terms have an error of 2e-8. The log2
    instruction has a small absolute error only, but the step sizes of an initialised Mamba are as small as 1e-3.
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
    """Return log(1 + exp(x)), without overflow and accurate for small results."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp2(-tl.abs(x) * LOG2E))


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), the derivative of softplus, without overflow."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def direction(order, height, width):
    """Return (origin, extent, fast, slow) of an order.

    Step t is at position origin + (t % extent)·fast + (t // extent)·slow.
    """
    columns = order >= 2
    extent = tl.where(columns, height, height * width)
    fast = tl.where(columns, width, 1)
    slow = tl.where(columns, 1, 0)
    backwards = order % 2 == 1
    sign = tl.where(backwards, -1, 1)
    return tl.where(backwards, height * width - 1, 0), extent, sign * fast, sign * slow


@triton.jit
def next_position(place, inner, extent, fast, slow):
    """Return (position, t % extent) of the next step, by additions: a division costs as much as two states."""
    wraps = inner + 1 == extent
    return place + tl.where(wraps, slow - (extent - 1) * fast, fast), tl.where(wraps, 0, inner + 1)


# `one` is 1. It and the strides of A are not specialised, so that the compiler does not know that states are adjacent
# in A and in the initial state. Then it assigns one channel of the tile [N, BLOCK_D] to a lane. Otherwise it would
# assign four adjacent states, for wide loads outside the loop, and the loop would need shuffles and barriers.
@triton.jit(do_not_specialize=["a_n", "a_d", "one"])
def scan_forward(
    u,  # (Bt, K or 1, L, D): strides u_b, u_k (0 if shared), u_t; channels adjacent, as everywhere below
    delta,  # (Bt, K, L, D)
    A,  # (K, D, N) float32: strides a_k, a_n, a_d
    B,  # (Bt, K, G, L, N), states adjacent
    C,  # (Bt, K, G, L, N)
    skip,  # (K, D) dense, if HAS_SKIP
    bias,  # (K, D) dense, if HAS_BIAS
    initial,  # (Bt, K, splits, D, N) dense float32, if HAS_INITIAL
    y,  # (Bt, K, L, D) dense: result
    states,  # (Bt, K, chunks, D, N) dense float32, if SAVE: result, the state before each chunk
    last,  # (Bt, K, D, N) dense float32, if SAVE_LAST: result
    u_b,
    u_k,
    u_t,
    delta_b,
    delta_k,
    delta_t,
    a_k,
    a_n,
    a_d,
    b_b,
    b_k,
    b_g,
    b_t,
    c_b,
    c_k,
    c_g,
    c_t,
    directions,
    groups,
    channels,  # per group
    height,
    width,
    orders,  # two bits per direction
    splits,
    split_length,
    one,
    STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    length = height * width
    dim = groups * channels
    blocks = tl.cdiv(channels, BLOCK_D)
    pid = tl.program_id(0)
    block = pid % blocks
    group = pid // blocks % groups
    split = pid // (blocks * groups) % splits
    bk = (pid // (blocks * groups * splits)).to(tl.int64)
    k = (bk % directions).to(tl.int32)
    b = bk // directions

    n = tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n_ok = n < STATE
    d_ok = d < channels
    ok = n_ok[:, None] & d_ok[None, :]
    d += group * channels
    tile = d[None, :] * STATE + n[:, None]
    a2 = tl.load(A + k * a_k + n[:, None] * a_n + d[None, :] * a_d, mask=ok, other=0.0) * LOG2E
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_INITIAL:
        h += tl.load(
            initial + (bk * splits + split) * STATE * dim + d[None, :] * STATE + n[:, None] * one, mask=ok, other=0.0
        )
    if HAS_SKIP:
        skip_d = tl.load(skip + k * dim + d, mask=d_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias_d = tl.load(bias + k * dim + d, mask=d_ok, other=0.0).to(tl.float32)
    u += b * u_b + k * u_k
    delta += b * delta_b + k * delta_k
    B += b * b_b + k * b_k + group * b_g
    C += b * c_b + k * c_k + group * c_g
    y += bk * length * dim
    states += bk * tl.cdiv(length, CHUNK) * STATE * dim

    origin, extent, fast, slow = direction((orders >> (2 * k)) & 3, height, width)
    start = split * split_length
    end = tl.minimum(start + split_length, length)
    inner = start % extent
    place = origin + inner * fast + (start // extent) * slow
    for t in range(start, end, UNROLL):
        if SAVE:
            if t % CHUNK == 0:
                tl.store(states + (t // CHUNK) * STATE * dim + tile, h, mask=ok)
        # First issue all loads of a group of positions, so that computing the first positions hides their latency.
        group_inputs = ()
        for j in tl.static_range(UNROLL):
            there = t + j < end
            group_inputs = group_inputs + (
                (
                    place,
                    tl.load(u + place * u_t + d, mask=d_ok & there, other=0.0),
                    tl.load(delta + place * delta_t + d, mask=d_ok & there, other=0.0),
                    # These loads are vectorised only without a mask along n, so leave it out if it is not needed.
                    tl.load(B + place * b_t + n, mask=there if STATE == BLOCK_N else n_ok & there, other=0.0),
                    tl.load(C + place * c_t + n, mask=there if STATE == BLOCK_N else n_ok & there, other=0.0),
                ),
            )
            place, inner = next_position(place, inner, extent, fast, slow)
        for j in tl.static_range(UNROLL):
            there = t + j < end
            at, u_j, step, B_j, C_j = group_inputs[j]
            u_j = u_j.to(tl.float32)
            step = step.to(tl.float32)
            if HAS_BIAS:
                step += bias_d
            if SOFTPLUS:
                step = softplus(step)
            step = tl.where(there, step, 0.0)  # past the end: decay 1 and input 0, so h does not change
            h = tl.exp2(step[None, :] * a2) * h + (step * u_j)[None, :] * B_j.to(tl.float32)[:, None]
            y_j = tl.sum(h * C_j.to(tl.float32)[:, None], axis=0)
            if HAS_SKIP:
                y_j += skip_d * u_j
            tl.store(y + at * dim + d, y_j.to(y.dtype.element_ty), mask=d_ok & there)
    if SAVE_LAST and split == splits - 1:
        tl.store(last + bk * STATE * dim + tile, h, mask=ok)


@triton.jit(do_not_specialize=["a_n", "a_d"])
def split_local(
    value,  # u (Bt, K or 1, L, D), backwards dy (Bt, 1, L, D): strides v_b, v_k (0 if shared), v_t
    delta,  # (Bt, K, L, D)
    A,  # (K, D, N) float32
    row,  # B, backwards C: (Bt, K, G, L, N), states adjacent
    bias,  # (K, D) dense, if HAS_BIAS
    ends,  # (Bt, K, splits, D, N) dense float32: result
    steps,  # (Bt, K, splits, D) dense float32: result, ΣΔ
    v_b,
    v_k,
    v_t,
    delta_b,
    delta_k,
    delta_t,
    a_k,
    a_n,
    a_d,
    r_b,
    r_k,
    r_g,
    r_t,
    directions,
    groups,
    channels,  # per group
    height,
    width,
    orders,
    splits,
    split_length,
    STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    length = height * width
    dim = groups * channels
    blocks = tl.cdiv(channels, BLOCK_D)
    pid = tl.program_id(0)
    block = pid % blocks
    group = pid // blocks % groups
    split = pid // (blocks * groups) % splits
    bk = (pid // (blocks * groups * splits)).to(tl.int64)
    k = (bk % directions).to(tl.int32)
    b = bk // directions

    n = tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n_ok = n < STATE
    d_ok = d < channels
    ok = n_ok[:, None] & d_ok[None, :]
    d += group * channels
    a2 = tl.load(A + k * a_k + n[:, None] * a_n + d[None, :] * a_d, mask=ok, other=0.0) * LOG2E
    if HAS_BIAS:
        bias_d = tl.load(bias + k * dim + d, mask=d_ok, other=0.0).to(tl.float32)
    value += b * v_b + k * v_k
    delta += b * delta_b + k * delta_k
    row += b * r_b + k * r_k + group * r_g
    order = (orders >> (2 * k)) & 3
    start = split * split_length
    end = tl.minimum(start + split_length, length)
    count = end - start
    if BACKWARD:  # use the opposite order: its step t is step length - 1 - t of this order
        order = order ^ 1
        start = length - end
    origin, extent, fast, slow = direction(order, height, width)
    inner = start % extent
    place = origin + inner * fast + (start // extent) * slow
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(0, count, UNROLL):
        for j in tl.static_range(UNROLL):
            there = i + j < count
            v = tl.load(value + place * v_t + d, mask=d_ok & there, other=0.0).to(tl.float32)
            step = tl.load(delta + place * delta_t + d, mask=d_ok & there, other=0.0).to(tl.float32)
            r = tl.load(row + place * r_t + n, mask=there if STATE == BLOCK_N else n_ok & there, other=0.0)
            place, inner = next_position(place, inner, extent, fast, slow)
            if HAS_BIAS:
                step += bias_d
            if SOFTPLUS:
                step = softplus(step)
            step = tl.where(there, step, 0.0)
            total += step
            decay = tl.exp2(step[None, :] * a2)
            if BACKWARD:
                h = decay * (h + v[None, :] * r.to(tl.float32)[:, None])
            else:
                h = decay * h + (step * v)[None, :] * r.to(tl.float32)[:, None]
    at = bk * splits + split
    tl.store(ends + at * STATE * dim + d[None, :] * STATE + n[:, None], h, mask=ok)
    tl.store(steps + at * dim + d, total, mask=d_ok)


@triton.jit
def split_carry(
    ends,  # (Bt, K, splits, D, N) dense float32: final states of splits run from zero; replaced by true initial states
    steps,  # (Bt, K, splits, D) dense float32
    A,  # (K, D, N) float32: strides a_k, a_n, a_d
    initial,  # (Bt, K, D, N) dense float32, if HAS_INITIAL: state before the first split (backward: after the last)
    a_k,
    a_n,
    a_d,
    directions,
    dim,
    splits,
    STATE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(STATE * dim, BLOCK)
    pid = tl.program_id(0)
    bk = (pid // blocks).to(tl.int64)
    e = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = e < STATE * dim
    d = e // STATE
    n = e % STATE
    a2 = tl.load(A + (bk % directions) * a_k + n * a_n + d * a_d, mask=ok, other=0.0) * LOG2E
    running = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        running += tl.load(initial + bk * STATE * dim + e, mask=ok, other=0.0)
    for i in range(splits):
        at = bk * splits + (splits - 1 - i if BACKWARD else i)
        end = tl.load(ends + at * STATE * dim + e, mask=ok, other=0.0)
        step = tl.load(steps + at * dim + d, mask=ok, other=0.0)
        tl.store(ends + at * STATE * dim + e, running, mask=ok)
        running = end + tl.exp2(a2 * step) * running
