"""Adding up what the directions give, and the gate: out = (Σ_k part_k) · silu(z), and the gate's backward.

Elementwise over memory, channels adjacent; what they cost is their traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmtrain.ops.triton.kernels.device import sigmoid


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
