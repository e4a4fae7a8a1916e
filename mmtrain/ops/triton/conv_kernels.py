"""The memory-bound kernels: the causal convolution, and the sum over scan directions with the gate.

The depthwise causal convolution is y_t = act(bias + Σ_k w_k x_{t-W+1+k}), with zeros before the start. The forward
kernel loads a tile of positions × channels for every tap; only the first load misses the L1 cache. The backward kernel
processes positions in sequence with the last W inputs and W gradients in registers. So for any W it reads every value
once and recomputes the pre-activation once. ``reverse`` (anti-causal) mirrors the positions: step t is at position
L-1-t.

The sum is out = (Σ_k part_k) · silu(z). Its forward and backward kernels are elementwise, with channels adjacent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmtrain.ops.triton.scan_kernels import sigmoid


@triton.jit
def conv_forward(
    x,  # (Bt, L, D): strides x_b, x_t; channels adjacent, as everywhere below
    weight,  # (D, W) dense
    bias,  # (D,) dense, if HAS_BIAS
    out,  # (Bt, L, D) dense: result
    x_b,
    x_t,
    length,
    dim,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_d = tl.cdiv(dim, BLOCK_D)
    blocks_t = tl.cdiv(length, BLOCK_T)
    pid = tl.program_id(0)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    t = pid // blocks_d % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    b = (pid // (blocks_d * blocks_t)).to(tl.int64)
    d_ok = d < dim
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        back = WIDTH - 1 - k
        from_t = t + back if REVERSE else t - back
        there = (from_t >= 0) & (from_t < length)
        x_k = tl.load(x + b * x_b + from_t[:, None] * x_t + d[None, :], mask=there[:, None] & d_ok[None, :], other=0.0)
        w_k = tl.load(weight + d * WIDTH + k, mask=d_ok, other=0.0)
        acc += x_k.to(tl.float32) * w_k.to(tl.float32)[None, :]
    if SILU:
        acc *= sigmoid(acc)
    to = out + b * length * dim + t[:, None] * dim + d[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(t < length)[:, None] & d_ok[None, :])


@triton.jit
def conv_backward(
    dout,  # (Bt, L, D): strides o_b, o_t; channels adjacent, as everywhere below
    x,  # (Bt, L, D): strides x_b, x_t
    weight,  # (D, W) dense
    bias,  # (D,) dense, if HAS_BIAS
    dx,  # (Bt, L, D) dense: result
    dweight,  # (parts, D, W) dense float32: partial sums
    dbias,  # (parts, D) dense float32, if HAS_BIAS: partial sums
    o_b,
    o_t,
    x_b,
    x_t,
    batch,
    length,
    dim,
    segment,  # positions processed in sequence, after W - 1 positions to fill the registers
    items,  # pairs of batch entry and segment per program; more pairs mean fewer partial sums
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_d = tl.cdiv(dim, BLOCK_D)
    segments = tl.cdiv(length, segment)
    pid = tl.program_id(0)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    part = pid // blocks_d
    d_ok = d < dim
    taps = ()
    dtaps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + d * WIDTH + k, mask=d_ok, other=0.0).to(tl.float32),)
        dtaps = dtaps + (tl.zeros([BLOCK_D], tl.float32),)
    shift = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)
    dshift = tl.zeros([BLOCK_D], tl.float32)
    origin = length - 1 if REVERSE else 0
    sign = -1 if REVERSE else 1
    for item in range(part * items, tl.minimum((part + 1) * items, batch * segments)):
        b = tl.zeros([], tl.int64) + item // segments
        start = item % segments * segment
        end = tl.minimum(start + segment, length)
        x_p = x + b * x_b + d
        o_p = dout + b * o_b + d
        dx_p = dx + b * length * dim + d
        xs = ()  # x_{t-W+1} to x_t, after appending x_t and dropping the oldest
        gs = ()  # gradients of the pre-activation, g_t to g_{t-W+1}, newest first
        for k in tl.static_range(WIDTH):
            before = start - WIDTH + k  # the first is dropped in the first step
            place = origin + sign * before
            xs = xs + (tl.load(x_p + place * x_t, mask=d_ok & (before >= 0), other=0.0).to(tl.float32),)
            gs = gs + (tl.zeros([BLOCK_D], tl.float32),)
        # The last W - 1 steps only complete the gradients of the segment's last inputs.
        for t0 in range(start, end + WIDTH - 1, UNROLL):
            for j in tl.static_range(UNROLL):
                t = t0 + j
                place = origin + sign * t
                there = d_ok & (t < length) & (t < end + WIDTH - 1)
                x_j = tl.load(x_p + place * x_t, mask=there, other=0.0).to(tl.float32)
                g = tl.load(o_p + place * o_t, mask=there, other=0.0).to(tl.float32)
                xs = xs[1:] + (x_j,)
                if SILU:
                    pre = shift
                    for k in tl.static_range(WIDTH):
                        pre += taps[k] * xs[k]
                    half = sigmoid(pre)
                    g *= half * (1.0 + pre * (1.0 - half))
                gs = (g,) + gs[: WIDTH - 1]
                own = tl.where(t < end, g, 0.0)
                dshift += own
                sums = ()
                dx_j = tl.zeros([BLOCK_D], tl.float32)
                for k in tl.static_range(WIDTH):
                    sums = sums + (dtaps[k] + own * xs[k],)
                    dx_j += taps[k] * gs[k]
                dtaps = sums
                s = t - (WIDTH - 1)
                place = origin + sign * s
                tl.store(dx_p + place * dim, dx_j.to(dx.dtype.element_ty), mask=d_ok & (s >= start) & (s < end))
    for k in tl.static_range(WIDTH):
        tl.store(dweight + (part * dim + d) * WIDTH + k, dtaps[k], mask=d_ok)
    if HAS_BIAS:
        tl.store(dbias + part * dim + d, dshift, mask=d_ok)


@triton.jit
def merge_directions(
    parts,  # (Bt, K, L, D) dense
    z,  # (Bt, L, D), if HAS_GATE: strides z_b, z_t, channels adjacent
    total,  # (Bt, L, D) dense, if SAVE: result, the sum before the gate
    out,  # (Bt, L, D) dense: result
    z_b,
    z_t,
    length,
    dim,
    DIRECTIONS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = length * dim
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    e = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = e < size
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(DIRECTIONS):
        acc += tl.load(parts + (b * DIRECTIONS + k) * size + e, mask=ok, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(total + b * size + e, acc.to(total.dtype.element_ty), mask=ok)
    if HAS_GATE:
        gate = tl.load(z + b * z_b + (e // dim) * z_t + e % dim, mask=ok, other=0.0).to(tl.float32)
        acc *= gate * sigmoid(gate)
    tl.store(out + b * size + e, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def gate_backward(
    dout,  # (Bt, L, D): strides o_b, o_t, channels adjacent
    total,  # (Bt, L, D) dense: the sum before the gate
    z,  # (Bt, L, D): strides z_b, z_t, channels adjacent
    dtotal,  # (Bt, L, D) dense: result
    dz,  # (Bt, L, D) dense: result
    o_b,
    o_t,
    z_b,
    z_t,
    length,
    dim,
    BLOCK: tl.constexpr,
):
    size = length * dim
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    e = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = e < size
    g = tl.load(dout + b * o_b + (e // dim) * o_t + e % dim, mask=ok, other=0.0).to(tl.float32)
    x = tl.load(z + b * z_b + (e // dim) * z_t + e % dim, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(total + b * size + e, mask=ok, other=0.0).to(tl.float32)
    half = sigmoid(x)
    tl.store(dtotal + b * size + e, (g * x * half).to(dtotal.dtype.element_ty), mask=ok)
    tl.store(dz + b * size + e, (g * y * half * (1.0 + x * (1.0 - half))).to(dz.dtype.element_ty), mask=ok)
