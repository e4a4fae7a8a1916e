// Gradients of the scan. With g_t = dL/dh_t = C_t dy_t + a_{t+1} g_{t+1} and a_t = exp(dt_t A):
//   du_t = D dy_t + dt_t Σ_n g_t B_t            dA  = Σ_t g_t a_t h_{t-1} dt_t
//   ddt_t = Σ_n g_t (A a_t h_{t-1} + B_t u_t)   dB_t = Σ_d g_t dt_t u_t    dC_t = Σ_d h_t dy_t
// Chunks are processed from last to first. Within a chunk, a_t and h_{t-1} are recomputed from the state at its start.
//
// Every sum has a fixed order for any number of threads: the division into tasks depends only on the sizes (TaskGrid), a
// task adds sequentially, and the partial results of tasks are added in the order of the tasks.
#pragma once
#include "scan_segments.h"

namespace MMT_ISA {

typedef float v4 __attribute__((vector_size(16), may_alias));

struct BackwardTiles {
    // One unused row each: arrays of exactly 4 KiB would map to the same lines of the first-level cache.
    vf u[T + 1], dt[T + 1], dtu[T + 1], slope[T + 1], dy[T + 1];
    vf y[T + 1];             // Σ_n C h, if requested
    vf gB[T + 1], gA[T + 1]; // Σ_n g B and Σ_n g a h A log2(e)
    vf dB[T + 1], dC[T + 1]; // partial sums over lanes: lane i belongs to state n + i % 4
    vf ah[T + 1][4], a[T + 1][4];  // a_t h_{t-1} and a_t of the four current states
};

template <int K, bool WithY = false>
static void backward_states(int rows, BackwardTiles &w, const vf *A, const float *h0, int64_t h0_n, vf *carry, vf *dA,
                            const float *B, int64_t B_t, int64_t B_n, const float *C, int64_t C_t, int64_t C_n) {
    vf A_k[K], h[K], g[K], sum[K];
    for (int k = 0; k < K; ++k) {
        A_k[k] = A[k];
        h[k] = h0 ? load(h0 + k * h0_n) : vf{};
        g[k] = carry[k];
        sum[k] = vf{};
    }
    for (int t = 0; t < rows; ++t, B += B_t, C += C_t) {
        const vf dt = w.dt[t], dtu = w.dtu[t], dy = w.dy[t];
        vf part[4] = {}, sum_y{};
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            const vf a = exp2(dt * A_k[k]);
            w.ah[t][k] = h[k] = a * h[k];
            w.a[t][k] = a;
            h[k] += dtu * B[k * B_n];
            part[k] = h[k] * dy;
            if (WithY) sum_y += h[k] * C[k * C_n];
        }
        w.dC[t] = partial_sums(part[0], part[1], part[2], part[3]);
        if (WithY) w.y[t] += sum_y;
    }
    for (int t = rows - 1; t >= 0; --t) {
        B -= B_t, C -= C_t;
        const vf dt = w.dt[t], dtu = w.dtu[t], dy = w.dy[t];
        vf gB = w.gB[t], gA = w.gA[t], part[4] = {};
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            g[k] = dy * C[k * C_n] + g[k];
            const vf a = w.a[t][k], q = g[k] * w.ah[t][k];
            sum[k] += q * dt;
            gA += q * A_k[k];
            gB += g[k] * B[k * B_n];
            part[k] = g[k] * dtu;
            g[k] *= a;
        }
        w.gB[t] = gB;
        w.gA[t] = gA;
        w.dB[t] = partial_sums(part[0], part[1], part[2], part[3]);
    }
    for (int k = 0; k < K; ++k) {
        carry[k] = g[k];
        dA[k] += sum[k];
    }
}

// Finish the reduction over lanes and add it to rows of `total`. One vector gives the sums of W / 4 positions.
static void add_partial_sums(const vf *part, int rows, float *total, int64_t stride) {
    constexpr int step = W / 4;
    for (int t = 0; t < rows; t += step) {
        vf v[4] = {};
        for (int i = 0; i < step && t + i < rows; ++i) v[i] = part[t + i];
#if MMT_LANES == 16
        const vf s = pair_sum<8>(pair_sum<4>(v[0], v[1]), pair_sum<4>(v[2], v[3]));
#elif MMT_LANES == 8
        const vf s = pair_sum<4>(v[0], v[1]);
#else
        const vf s = v[0];
#endif
        v4 sums[step];
        memcpy(sums, &s, sizeof s);
        for (int i = 0; i < step; ++i) {
            v4 *p = reinterpret_cast<v4 *>(total + (t + i) * stride);
            *p += sums[i];
        }
    }
}

// The division into tasks: `batches` ranges of batch elements, times groups, times `splits` ranges of channel blocks. It
// depends only on the sizes. A task has about two million state updates (a millisecond), so that the partial results are
// small compared with the inputs.
struct TaskGrid {
    int64_t batches, groups, splits;
    TaskGrid(const ScanArgs &s, const Plan &plan) {
        const int64_t updates = s.batch * s.dim * s.length * s.state;
        const int64_t wanted = min64(128, max64(1, updates >> 21));
        batches = min64(s.batch, wanted);
        groups = s.groups;
        splits = min64(plan.blocks, ceil_div(wanted, s.batch * s.groups));
        if (segmented(s, plan)) batches = kSegments;  // a task is a segment of the only sequence
    }
    int64_t count() const { return batches * groups * splits; }
};

struct BackwardScratch {
    int64_t columns;  // states padded to a multiple of 4, in the sums over channels dB and dC
    int64_t rows;     // positions padded likewise
    Buffer<float> dA, dD, dbias;
    Buffer<float> split_sums;  // (task, 2, rows, columns): dB and dC of every task, if channel blocks are divided
    BackwardScratch(const ScanArgs &s, const Plan &plan, const TaskGrid &grid)
        : columns(ceil_div(s.state, 4) * 4),
          rows(ceil_div(s.length, 4) * 4),
          dA(grid.batches * s.groups * plan.blocks * s.state * W, true),
          dD(grid.batches * s.groups * plan.blocks * W, true),
          dbias(grid.batches * s.groups * plan.blocks * W, true),
          split_sums(grid.splits > 1 ? grid.count() * 2 * rows * columns : 0) {}
    bool ok() const { return dA.data && dD.data && dbias.data && split_sums.data; }
};

// The sums to which the gradients of one block over one chunk are added.
struct Sums {
    vf *dA, *dD, *dbias;  // of the block: N vectors, one vector, one vector
    float *dB, *dC;       // of the chunk: T rows of `columns`
    int64_t columns;
};

// Run one block over one chunk. carry is a_{t+1} g_{t+1} at its end.
static void backward_chunk(const ScanArgs &s, const Plan &plan, const Packed &packed, BackwardTiles &w, vf *carry, vf *initial,
                           const Block &at, int64_t chunk, const Sums &sums) {
    const int64_t N = s.state, slot = at.group * plan.blocks + at.index, columns = sums.columns, t0 = chunk * T;
    const int rows = plan.rows(chunk, s.length);
    const Coefficients B(s.B, s, at.batch, at.group), C(s.C, s, at.batch, at.group);
    const vf *A = packed.A.data + slot * N;
    const vf bias = packed.bias.data[slot], D = packed.D.data[slot];
    const float *h0 = chunk > 0 ? saved_state(s, plan, at, chunk) : nullptr;
    int64_t h0_n = plan.padded;
    if (chunk == 0 && s.initial) {
        read_states(s, plan, s.initial, at, initial);
        h0 = reinterpret_cast<const float *>(initial);
        h0_n = W;
    }
    if (chunk == plan.chunks - 1) read_states(s, plan, s.dlast, at, carry);
    load_tile(w.u, lane(s.u, s, plan, at), t0, rows);
    load_tile(w.dt, lane(s.delta, s, plan, at), t0, rows);
    load_tile(w.dy, lane(s.dout, s, plan, at), t0, rows);
    for (int t = 0; t < rows; ++t) {
        const vf x = w.dt[t] + bias;
        w.slope[t] = splat(1.0f);
        w.dt[t] = s.softplus ? softplus_and_slope(x, w.slope[t]) : x;
        w.dtu[t] = w.dt[t] * w.u[t];
        w.gB[t] = w.gA[t] = vf{};
    }
    for (int64_t n = 0; n < N; n += 4) {
        const float *Bn = B.at(t0, n), *Cn = C.at(t0, n), *hn = h0 ? h0 + n * h0_n : nullptr;
#define MMT_BACKWARD(K)                                                                                                  \
    backward_states<K>(rows, w, A + n, hn, h0_n, carry + n, sums.dA + n, Bn, B.position, B.state, Cn, C.position, \
                       C.state)
        switch (min64(4, N - n)) {
            case 4: MMT_BACKWARD(4); break;
            case 3: MMT_BACKWARD(3); break;
            case 2: MMT_BACKWARD(2); break;
            default: MMT_BACKWARD(1);
        }
#undef MMT_BACKWARD
        add_partial_sums(w.dB, rows, sums.dB + n, columns);
        add_partial_sums(w.dC, rows, sums.dC + n, columns);
    }
    vf sum_D{}, sum_bias{};
    for (int t = 0; t < rows; ++t) {
        const vf ddt = w.gA[t] * 0.693147181f + w.u[t] * w.gB[t];  // gA contains the factor log2(e)
        const vf dx = ddt * w.slope[t];
        sum_bias += dx;
        sum_D += w.dy[t] * w.u[t];
        w.gB[t] = w.dt[t] * w.gB[t] + D * w.dy[t];
        w.gA[t] = dx;
    }
    *sums.dD += sum_D;
    *sums.dbias += sum_bias;
    if (chunk == 0 && s.dinitial) write_states(s, plan, carry, at, s.dinitial);
    store_tile(w.gB, lane(s.du, s, plan, at), t0, rows);
    store_tile(w.gA, lane(s.ddelta, s, plan, at), t0, rows);
}

// Write rows [t0, t0 + rows) of dB or dC of one (batch, group): the sum of `count` arrays at a distance of `apart` floats.
static void write_sums(const ScanArgs &s, const View4 &v, int64_t b, int64_t g, int64_t t0, int64_t rows, float *sums,
                       int64_t columns, int64_t count, int64_t apart) {
    float *out = v.data + b * v.batch + g * v.group;
    for (int64_t t = 0; t < rows; ++t) {
        float *row = sums + t * columns;
        float *p = out + (s.reverse ? s.length - 1 - t0 - t : t0 + t) * v.position;
        for (int64_t i = 1; i < count; ++i)
            for (int64_t n = 0; n < s.state; ++n) row[n] += row[i * apart + n];
        for (int64_t n = 0; n < s.state; ++n) p[n * v.state] = row[n];
    }
}

static void backward_task(const ScanArgs &s, const Plan &plan, const Packed &packed, const TaskGrid &grid,
                          BackwardScratch &scratch, BackwardTiles &tiles, vf *carry, vf *initial, float *chunk_sums, int64_t task) {
    const int64_t g = task / grid.splits % grid.groups, run = task / grid.splits / grid.groups, N = s.state;
    const bool segment = segmented(s, plan);
    const Range blocks = part_of(plan.blocks, task % grid.splits, grid.splits);
    const Range batch = segment ? Range{0, 1} : part_of(s.batch, run, grid.batches);
    const Range chunks = segment ? part_of(plan.chunks, run, kSegments) : Range{0, plan.chunks};
    const int64_t slot = (run * grid.groups + g) * plan.blocks, columns = scratch.columns;
    vf *dA = reinterpret_cast<vf *>(scratch.dA.data) + slot * N;
    vf *dD = reinterpret_cast<vf *>(scratch.dD.data) + slot, *dbias = reinterpret_cast<vf *>(scratch.dbias.data) + slot;
    float *dB = chunk_sums, *dC = chunk_sums + T * columns;
    float *split_sums = scratch.split_sums.data + task * 2 * scratch.rows * columns;
    for (int64_t b = batch.first; b < batch.last; ++b)
        for (int64_t chunk = chunks.last - 1; chunk >= chunks.first; --chunk) {
            const int64_t t0 = chunk * T, rows = plan.rows(chunk, s.length);
            memset(chunk_sums, 0, 2 * T * columns * sizeof(float));
            for (int64_t i = blocks.first; i < blocks.last; ++i)
                backward_chunk(s, plan, packed, tiles, carry + (i - blocks.first) * N, initial, {b, g, i}, chunk,
                               {dA + i * N, dD + i, dbias + i, dB, dC, columns});
            if (grid.splits == 1) {
                write_sums(s, s.dB, b, g, t0, rows, dB, columns, 1, 0);
                write_sums(s, s.dC, b, g, t0, rows, dC, columns, 1, 0);
            } else {  // in this case the range contains one batch element
                memcpy(split_sums + t0 * columns, dB, rows * columns * sizeof(float));
                memcpy(split_sums + (scratch.rows + t0) * columns, dC, rows * columns * sizeof(float));
            }
        }
}

// Run only the recurrence of g over one chunk of a single block, and return the sum of Δ.
static vf carry_chunk(const ScanArgs &s, const Plan &plan, const Packed &packed, BackwardTiles &w, vf *carry, int64_t chunk) {
    const int64_t t0 = chunk * T;
    const int rows = plan.rows(chunk, s.length);
    const Block at{0, 0, 0};
    const Coefficients C(s.C, s, 0, 0);
    vf sum{};
    load_tile(w.dt, lane(s.delta, s, plan, at), t0, rows);
    load_tile(w.dy, lane(s.dout, s, plan, at), t0, rows);
    for (int t = 0; t < rows; ++t) {
        const vf x = w.dt[t] + packed.bias.data[0];
        w.dt[t] = s.softplus ? softplus(x) : x;
        sum += w.dt[t];
    }
    for (int64_t n = 0; n < s.state; ++n) {
        vf g = carry[n];
        for (int t = rows - 1; t >= 0; --t) g = (w.dy[t] * *C.at(t0 + t, n) + g) * exp2(w.dt[t] * packed.A.data[n]);
        carry[n] = g;
    }
    return sum;
}

// Compute the gradient that enters every segment from the segment after it. All threads of a team call this; a thread
// whose allocation failed does no work.
static void backward_borders(const ScanArgs &s, const Plan &plan, const Packed &packed, BackwardTiles *w, Segments &segments,
                             vf *last, bool failed) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 1; i < kSegments; ++i) {
        if (failed) continue;
        const Range chunks = part_of(plan.chunks, i, kSegments);
        vf *carry = segments.local.data + i * s.state, sum{};
        for (int64_t n = 0; n < s.state; ++n) carry[n] = vf{};
        for (int64_t chunk = chunks.last - 1; chunk >= chunks.first; --chunk)
            sum += carry_chunk(s, plan, packed, *w, carry, chunk);
        segments.steps.data[i] = sum;
    }
#pragma omp single
    {
        read_states(s, plan, s.dlast, {0, 0, 0}, last);
        segments.join(s, packed, last, true);
    }
}

// Compute dA, dD and dbias of one block of channels: the sum over the ranges of batch elements, in their order.
static void sum_over_batch(const ScanArgs &s, const Plan &plan, const TaskGrid &grid, BackwardScratch &scratch, int64_t slot) {
    const int64_t N = s.state, slots = grid.groups * plan.blocks;
    vf *dA = reinterpret_cast<vf *>(scratch.dA.data), *dD = reinterpret_cast<vf *>(scratch.dD.data);
    vf *dbias = reinterpret_cast<vf *>(scratch.dbias.data);
    for (int64_t run = 1; run < grid.batches; ++run) {
        for (int64_t n = 0; n < N; ++n) dA[slot * N + n] += dA[(run * slots + slot) * N + n];
        dD[slot] += dD[run * slots + slot];
        dbias[slot] += dbias[run * slots + slot];
    }
    const int64_t d0 = plan.first_channel(slot / plan.blocks, slot % plan.blocks);
    for (int i = 0; i < plan.lanes(slot % plan.blocks); ++i) {
        for (int64_t n = 0; n < N; ++n) s.dA[(d0 + i) * N + n] = dA[slot * N + n][i];
        if (s.dD) s.dD[d0 + i] = dD[slot][i];
        if (s.dbias) s.dbias[d0 + i] = dbias[slot][i];
    }
}

static int scan_backward(const ScanArgs &s) {
    const Plan plan(s);
    const TaskGrid grid(s, plan);
    const Packed packed(s, plan);
    BackwardScratch scratch(s, plan, grid);
    const bool by_segment = segmented(s, plan);
    Segments segments(s, by_segment);
    Buffer<vf> last(s.state);
    if (!packed.ok() || !scratch.ok() || !segments.ok() || !last.data) return 1;
    const int64_t slots = grid.groups * plan.blocks, sums = scratch.rows * scratch.columns;
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        Buffer<BackwardTiles> tiles(1);
        Buffer<vf> carry(ceil_div(plan.blocks, grid.splits) * s.state), initial(s.state);
        Buffer<float> chunk_sums(2 * T * scratch.columns);
        failed = !tiles.data || !carry.data || !initial.data || !chunk_sums.data;
        if (by_segment) backward_borders(s, plan, packed, tiles.data, segments, last.data, failed);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < grid.count(); ++task) {
            vf *own = by_segment ? segments.border.data + task * s.state : carry.data;
            if (!failed) backward_task(s, plan, packed, grid, scratch, *tiles.data, own, initial.data, chunk_sums.data, task);
        }
        if (grid.splits > 1) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * grid.groups * plan.chunks; ++i) {
                const int64_t chunk = i % plan.chunks, g = i / plan.chunks % grid.groups, b = i / plan.chunks / grid.groups;
                float *first = scratch.split_sums.data + (b * grid.groups + g) * grid.splits * 2 * sums;
                float *row = first + chunk * T * scratch.columns;
                const int64_t rows = plan.rows(chunk, s.length);
                write_sums(s, s.dB, b, g, chunk * T, rows, row, scratch.columns, grid.splits, 2 * sums);
                write_sums(s, s.dC, b, g, chunk * T, rows, row + sums, scratch.columns, grid.splits, 2 * sums);
            }
        }
#pragma omp for schedule(static)
        for (int64_t slot = 0; slot < slots; ++slot) sum_over_batch(s, plan, grid, scratch, slot);
    }
    return failed;
}

}  // namespace MMT_ISA
