"""Cutting long sequences, where batch, directions and channels alone do not fill the GPU.

The recurrence is linear in the state: what a split makes of the state it starts from is the state it ends in from zero
plus that state times exp(A ΣΔ). So `split_local` runs every split from zero, keeping only the end and ΣΔ; `split_carry`
goes once over the splits of a sequence and leaves the true state at the start of each; then the main kernel runs every
split from there. The price is one more exponential per state and position. Backwards it is the same with
s_t = exp(Δ_t A) (s_{t+1} + dy_t C_t), from the last position to the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmtrain.ops.triton.kernels.device import LOG2E, direction, next_position, softplus


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
    if BACKWARD:  # from the last step to the first: the opposite order, whose step t is this one's length - 1 - t
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
    ends,  # (Bt, K, splits, D, N) dense float32: the ends of the splits run from zero; overwritten by their true starts
    steps,  # (Bt, K, splits, D) dense float32
    A,  # (K, D, N) float32: strides a_k, a_n, a_d
    initial,  # (Bt, K, D, N) dense float32, if HAS_INITIAL: the start of the first split (backwards: of the last)
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
