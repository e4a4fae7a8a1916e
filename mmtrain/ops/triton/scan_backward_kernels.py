"""The backward kernel of the directional scan. It recomputes the states chunk by chunk from the saved states.

With g_t = dL/dh_t = dy_t C_t + s_{t+1}, where s_t = exp(Δ_t A) g_t is the gradient passed to position t-1:
dC_t = Σ_d dy_t h_t, dB_t = Σ_d g_t Δ_t u_t, du_t = Δ_t Σ_n g_t B_t + D dy_t, dA = Σ_t Δ_t s_t h_{t-1},
dΔ_t = u_t Σ_n g_t B_t + Σ_n A s_t h_{t-1}.

A program processes the chunks from last to first, each in three passes. Pass 0 computes Δ and its derivative once per
element. Pass 1 runs the recurrence from the saved state and writes the state before every group of UNROLL positions to
a scratch buffer of the program, which is small enough for the L2 cache. Pass 2 processes the groups from last to first:
it recomputes the states of a group in registers and then computes its gradients. This takes two exponentials per state
and position. (The inverse recurrence h_{t-1} = (h_t - Δ_t B_t u_t) / exp(Δ_t A) would need no recomputation, but it
divides by numbers close to 0.)

The tile is [BLOCK_D, N]; a warp has 8 channels by 4 lanes of 4 states, the compiler's layout for a dense A. Sums over
states then take 2 shuffles, and sums over channels 3, after the sum over the channels of a thread. dB and dC are sums
over all channels of a block, across warps; those of a group of positions are reduced together with one use of shared
memory. Sums over blocks, batch entries and splits are written to partial buffers, which the caller adds. There are no
atomic operations, so repeated runs are bit-identical.

BLOCK_D < 32·warps is important: then the compiler loads vectors of channels directly into the layout of the tile, and
otherwise through shared memory with barriers. A thread has at most 8 states, which with 2 positions per group take
about 250 registers, so 8 warps run per SM. These are few, but each has 16 independent chains. In the bf16 code for
sm_90, a state and position takes 51 instructions of a lane (20 of fp32 arithmetic, 4 shuffles), 4 times the 13 of the
forward kernel. So this kernel is bound by instruction issue, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmtrain.ops.triton.scan_kernels import LN2, LOG2E, direction, next_position, sigmoid, softplus


@triton.jit
def stack(parts, COUNT: tl.constexpr):
    """Stack COUNT (1, 2, 4 or 8) tensors [R, ...] to [R, ..., COUNT], without moving data between threads."""
    tl.static_assert(COUNT == 1 or COUNT == 2 or COUNT == 4 or COUNT == 8)
    if COUNT == 1:
        return tl.expand_dims(parts[0], -1)
    elif COUNT == 2:
        return tl.join(parts[0], parts[1])
    elif COUNT == 4:
        return _flat(tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])), COUNT)
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        return _flat(tl.join(even, odd), COUNT)


@triton.jit
def _flat(tensor, COUNT: tl.constexpr):
    """Merge the trailing dimensions of length 2 to one of length COUNT. One or two dimensions precede them."""
    rank: tl.constexpr = len(tensor.shape)
    twos: tl.constexpr = 2 if COUNT == 4 else 3
    if rank - twos == 1:
        return tl.reshape(tensor, [tensor.shape[0], COUNT])
    else:
        return tl.reshape(tensor, [tensor.shape[0], tensor.shape[1], COUNT])


@triton.jit
def fold(tensor, TIMES: tl.constexpr):
    """Reduce [R, N] to [R / TIMES, N] by adding TIMES blocks of rows, which are in one thread."""
    if TIMES == 1:
        return tensor
    else:
        return tl.sum(tl.reshape(tensor, [TIMES, tensor.shape[0] // TIMES, tensor.shape[1]]), axis=0)


@triton.jit
def scan_backward(
    dy,  # (Bt, L, D): strides dy_b, dy_t; the same for every direction; channels adjacent, as everywhere below
    u,  # (Bt, K or 1, L, D): strides u_b, u_k (0 if shared), u_t
    delta,  # (Bt, K, L, D)
    A,  # (K, D, N) dense float32
    B,  # (Bt, K, G, L, N), states adjacent
    C,  # (Bt, K, G, L, N)
    skip,  # (K, D) dense, if HAS_SKIP
    bias,  # (K, D) dense, if HAS_BIAS
    initial,  # (Bt, K, D, N) dense float32, if HAS_INITIAL: the state before position 0
    states,  # (Bt, K, chunks, D, N) dense float32: the state before every chunk (the first is not read)
    incoming,  # (Bt, K, splits, D, N) dense float32, if HAS_INCOMING: s at the end of every split
    scratch,  # (programs, 2 · CHUNK + CHUNK / UNROLL · BLOCK_N, BLOCK_D) float32
    du,  # (Bt, K, L, D) dense: result per direction
    ddelta,  # (Bt, K, L, D) dense: result
    dA,  # (parts, K, D, N) dense float32: partial sums
    dBC,  # (blocks, Bt, K, G, L, 2, N) dense float32: partial sums of dB and dC
    dskip,  # (parts, K, D) dense float32, if HAS_SKIP: partial sums
    dbias,  # (parts, K, D) dense float32, if HAS_BIAS: partial sums
    dinitial,  # (Bt, K, D, N) dense float32, if HAS_INITIAL: result
    dy_b,
    dy_t,
    u_b,
    u_k,
    u_t,
    delta_b,
    delta_k,
    delta_t,
    b_b,
    b_k,
    b_g,
    b_t,
    c_b,
    c_k,
    c_g,
    c_t,
    batch,
    batches,  # batch entries per program; several for short sequences, which reduces the partial sums of dA
    directions,
    groups,
    channels,  # per group
    height,
    width,
    orders,  # two bits per direction
    splits,
    split_length,  # a multiple of CHUNK
    STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_INCOMING: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    FOLD: tl.constexpr,
    TILE_T: tl.constexpr,
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
    k = pid // (blocks * groups * splits) % directions
    batch_part = pid // (blocks * groups * splits * directions)

    n = tl.arange(0, BLOCK_N)
    local_d = tl.arange(0, BLOCK_D)
    d = block * BLOCK_D + local_d
    n_ok = n < STATE
    d_ok = d < channels
    # Accesses are vectorised only without a mask along n, so leave it out if it is not needed.
    ok = d_ok[:, None] if STATE == BLOCK_N else d_ok[:, None] & n_ok[None, :]
    first_d = group * channels + block * BLOCK_D
    d += group * channels
    tile = d[:, None] * STATE + n[None, :]  # in a tensor (D, N)
    a2 = tl.load(A + k * dim * STATE + tile, mask=ok, other=0.0) * LOG2E
    if HAS_SKIP:
        skip_d = tl.load(skip + k * dim + d, mask=d_ok, other=0.0).to(tl.float32)
        dskip_d = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias_row = tl.load(bias + k * dim + first_d + local_d, mask=d_ok, other=0.0).to(tl.float32)
        dbias_d = tl.zeros([BLOCK_D], tl.float32)
    da = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    groups_per_chunk: tl.constexpr = CHUNK // UNROLL
    steps = scratch + pid.to(tl.int64) * (2 * CHUNK + groups_per_chunk * BLOCK_N) * BLOCK_D  # Δ, then its derivative
    saved_groups = steps + 2 * CHUNK * BLOCK_D + local_d[:, None] * BLOCK_N + n[None, :]

    origin, extent, fast, slow = direction((orders >> (2 * k)) & 3, height, width)
    start = split * split_length
    end = tl.minimum(start + split_length, length)
    first_chunk = start // CHUNK
    chunks = tl.cdiv(end, CHUNK) - first_chunk
    first_b = (batch_part * batches).to(tl.int64)
    for i_b in range(tl.minimum(batch - batch_part * batches, batches)):
        b = first_b + i_b
        bk = b * directions + k
        dy_p = dy + b * dy_b + d
        u_p = u + b * u_b + k * u_k + d
        delta_row = delta + b * delta_b + k * delta_k + first_d
        B_p = B + b * b_b + k * b_k + group * b_g + n
        C_p = C + b * c_b + k * c_k + group * c_g + n
        du_p = du + bk * length * dim + first_d
        ddelta_p = ddelta + bk * length * dim + first_d
        part = (block * batch * directions + bk) * groups + group
        dBC_p = dBC + part * length * (2 * STATE)
        s = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        if HAS_INCOMING:
            s += tl.load(incoming + (bk * splits + split) * STATE * dim + tile, mask=ok, other=0.0)

        for back in range(chunks):
            chunk = first_chunk + chunks - 1 - back
            t_chunk = chunk * CHUNK
            h = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
            if chunk > 0:
                saved = states + (bk * tl.cdiv(length, CHUNK) + chunk) * STATE * dim
                h += tl.load(saved + tile, mask=ok, other=0.0)
            elif HAS_INITIAL:
                h += tl.load(initial + bk * STATE * dim + tile, mask=ok, other=0.0)

            # Pass 0: compute Δ for the whole chunk, each element in one thread.
            count = tl.cdiv(tl.minimum(end - t_chunk, CHUNK), UNROLL)
            for i in range(0, count * UNROLL, TILE_T):
                i_r = i + tl.arange(0, TILE_T)
                t_r = t_chunk + i_r
                there = (t_r < end)[:, None] & d_ok[None, :]
                place_r = origin + (t_r % extent) * fast + (t_r // extent) * slow
                x = tl.load(delta_row + place_r[:, None] * delta_t + local_d[None, :], mask=there, other=0.0)
                x = x.to(tl.float32)
                slope = tl.full([TILE_T, BLOCK_D], 1.0, tl.float32)
                if HAS_BIAS:
                    x += bias_row[None, :]
                if SOFTPLUS:
                    slope = sigmoid(x)
                    x = softplus(x)
                x = tl.where(there, x, 0.0)  # past the end: decay 1 and input 0, so the state does not change
                to = i_r[:, None] * BLOCK_D + local_d[None, :]
                tl.store(steps + to, x, mask=i_r[:, None] < CHUNK)
                tl.store(steps + CHUNK * BLOCK_D + to, slope, mask=i_r[:, None] < CHUNK)
            tl.debug_barrier()  # other threads read these values below

            # Pass 1: run forward through the chunk, except its last group.
            inner = t_chunk % extent
            place = origin + inner * fast + (t_chunk // extent) * slow
            for i in range(count - 1):
                tl.store(saved_groups + i * (BLOCK_D * BLOCK_N), h)
                for j in tl.static_range(
                    UNROLL
                ):  # all positions are within the sequence, because another group follows
                    u_j = tl.load(u_p + place * u_t, mask=d_ok, other=0.0).to(tl.float32)
                    step = tl.load(steps + (i * UNROLL + j) * BLOCK_D + local_d)
                    B_j = tl.load(B_p + place * b_t, mask=None if STATE == BLOCK_N else n_ok).to(tl.float32)
                    h = tl.exp2(step[:, None] * a2) * h + (step * u_j)[:, None] * B_j[None, :]
                    place, inner = next_position(place, inner, extent, fast, slow)
            tl.store(saved_groups + (count - 1) * (BLOCK_D * BLOCK_N), h)
            tl.debug_barrier()  # other threads may read the scratch buffer below

            # Pass 2: process the groups from last to first.
            for i_back in range(count):
                i = count - 1 - i_back
                t = t_chunk + i * UNROLL
                h = tl.load(saved_groups + i * (BLOCK_D * BLOCK_N))
                inner = t % extent
                place = origin + inner * fast + (t // extent) * slow
                kept = ()
                for j in tl.static_range(UNROLL):
                    there = t + j < end
                    u_j = tl.load(u_p + place * u_t, mask=d_ok & there, other=0.0).to(tl.float32)
                    step = tl.load(steps + (i * UNROLL + j) * BLOCK_D + local_d)
                    B_j = tl.load(B_p + place * b_t, mask=there if STATE == BLOCK_N else n_ok & there, other=0.0)
                    decay = tl.exp2(step[:, None] * a2)
                    kept = kept + ((place, u_j, step, B_j, decay, h),)
                    h = decay * h + (step * u_j)[:, None] * B_j.to(tl.float32)[None, :]
                    place, inner = next_position(place, inner, extent, fast, slow)
                sums_B = ()
                sums_C = ()
                dus = ()
                dsteps = ()
                for j in tl.static_range(UNROLL - 1, -1, -1):
                    there = t + j < end
                    at, u_j, step, B_j, decay, before = kept[j]
                    C_j = tl.load(C_p + at * c_t, mask=there if STATE == BLOCK_N else n_ok & there, other=0.0)
                    dy_j = tl.load(dy_p + at * dy_t, mask=d_ok & there, other=0.0).to(tl.float32)
                    g = dy_j[:, None] * C_j.to(tl.float32)[None, :] + s
                    s = decay * g  # past the end: decay 1 and dy 0, so s does not change
                    flow = s * before
                    da += step[:, None] * flow
                    along = tl.sum(g * B_j.to(tl.float32)[None, :], axis=1)
                    dstep = u_j * along + tl.sum(flow * a2, axis=1) * LN2
                    du_j = step * along
                    if HAS_SKIP:
                        du_j += skip_d * dy_j
                        dskip_d += dy_j * u_j
                    if SOFTPLUS:
                        dstep *= tl.load(steps + (CHUNK + i * UNROLL + j) * BLOCK_D + local_d)
                    if HAS_BIAS:
                        dbias_d += tl.where(there, dstep, 0.0)
                    dus = dus + (du_j,)
                    dsteps = dsteps + (dstep,)
                    sums_B = sums_B + (fold(g * (step * u_j)[:, None], FOLD),)
                    sums_C = sums_C + (fold(h * dy_j[:, None], FOLD),)
                    h = before
                # Column r of the stacked tensors is step t + UNROLL - 1 - r.
                t_r = t + UNROLL - 1 - tl.arange(0, UNROLL)
                place_r = origin + (t_r % extent) * fast + (t_r // extent) * slow
                to = place_r[None, :] * dim + local_d[:, None]
                stored = d_ok[:, None] & (t_r < end)[None, :]
                tl.store(du_p + to, stack(dus, UNROLL).to(du.dtype.element_ty), mask=stored)
                tl.store(ddelta_p + to, stack(dsteps, UNROLL).to(ddelta.dtype.element_ty), mask=stored)
                # dB is in the first UNROLL columns, dC in the others: one reduction through shared memory for both.
                c = tl.arange(0, 2 * UNROLL)
                t_c = t + UNROLL - 1 - c % UNROLL
                place_c = origin + (t_c % extent) * fast + (t_c // extent) * slow
                to = (place_c * 2 + c // UNROLL)[None, :] * STATE + n[:, None]
                total = tl.sum(stack(sums_B + sums_C, 2 * UNROLL), axis=0)
                tl.store(dBC_p + to, total, mask=n_ok[:, None] & (t_c < end)[None, :])
            tl.debug_barrier()  # the next chunk overwrites the scratch buffer
        if HAS_INITIAL and split == 0:
            tl.store(dinitial + bk * STATE * dim + tile, s, mask=ok)

    out = (batch_part * splits + split).to(tl.int64) * directions + k
    tl.store(dA + out * dim * STATE + tile, da, mask=ok)
    if HAS_SKIP:
        tl.store(dskip + out * dim + d, dskip_d, mask=d_ok)
    if HAS_BIAS:
        tl.store(dbias + out * dim + d, dbias_d, mask=d_ok)
