// Gradients of the scan. With g_t = dL/dh_t = C_t dy_t + a_{t+1} g_{t+1} and a_t = exp(dt_t A):
//   du_t = D dy_t + dt_t Σ_n g_t B_t            dA  = Σ_t g_t a_t h_{t-1} dt_t
//   ddt_t = Σ_n g_t (A a_t h_{t-1} + B_t u_t)   dB_t = Σ_d g_t dt_t u_t    dC_t = Σ_d h_t dy_t
// Chunks run backwards; inside one, a_t and h_{t-1} are recomputed from the state saved at its start.
//
// Every sum has one fixed order, whatever the number of threads: the work is cut into tasks by the sizes alone
// (TaskGrid), a task adds up in sequence, and partial results of tasks are added in the order of the tasks.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

typedef float v4 __attribute__((vector_size(16), may_alias));

struct BackwardTiles {
    vf u[T], dt[T], dtu[T], slope[T], dy[T];
    vf gB[T], gA[T];     // Σ_n g B and Σ_n g a h A log2(e)
    vf dB[T], dC[T];     // partial sums over lanes: lane i belongs to state n + i % 4
    vf h[T][4], a[T][4];  // h_{t-1} and a_t of the four states at hand
};

template <int K>
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
        vf part[4] = {};
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            const vf a = exp2(dt * A_k[k]);
            w.h[t][k] = h[k];
            w.a[t][k] = a;
            h[k] = a * h[k] + dtu * B[k * B_n];
            part[k] = h[k] * dy;
        }
        w.dC[t] = partial_sums(part[0], part[1], part[2], part[3]);
    }
    for (int t = rows - 1; t >= 0; --t) {
        B -= B_t, C -= C_t;
        const vf dt = w.dt[t], dtu = w.dtu[t], dy = w.dy[t];
        vf gB = w.gB[t], gA = w.gA[t], part[4] = {};
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            g[k] = dy * C[k * C_n] + g[k];
            const vf a = w.a[t][k], q = g[k] * (a * w.h[t][k]);
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

// Finish the reduction over lanes and add it to rows of `total`: W / 4 positions come out of one vector.
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

// Tasks: batch elements in `batches` runs, times groups, times `splits` runs of channel blocks. At most one of the
// two is cut finely, so the partial results stay small beside the inputs.
struct TaskGrid {
    static constexpr int64_t kTasks = 128;
    int64_t batches, groups, splits;
    TaskGrid(const ScanArgs &s, const Plan &plan)
        : batches(min64(s.batch, kTasks)),
          groups(s.groups),
          splits(min64(plan.blocks, ceil_div(kTasks, s.batch * s.groups))) {}
    int64_t count() const { return batches * groups * splits; }
};

struct BackwardScratch {
    int64_t rows, columns;  // of the sums dB and dC: positions, and states padded to a multiple of 4
    Buffer<float> dA, dD, dbias;
    Buffer<float> shared;  // dB and dC of every task when channel blocks are split, else each thread has its own
    BackwardScratch(const ScanArgs &s, const Plan &plan, const TaskGrid &grid)
        : rows(ceil_div(s.length, 4) * 4),
          columns(ceil_div(s.state, 4) * 4),
          dA(grid.batches * s.groups * plan.blocks * s.state * W),
          dD(grid.batches * s.groups * plan.blocks * W),
          dbias(grid.batches * s.groups * plan.blocks * W),
          shared(grid.splits > 1 ? grid.count() * sums() : 0) {}
    int64_t sums() const { return 2 * rows * columns; }
    bool ok() const { return dA.data && dD.data && dbias.data && shared.data; }
};

static void prefetch_backward(const ScanArgs &s, const Plan &plan, const Block &at, int64_t chunk) {
    const int rows = plan.rows(chunk, s.length);
    prefetch_tile(lane(s.u, s, plan, at), chunk * T, rows);
    prefetch_tile(lane(s.delta, s, plan, at), chunk * T, rows);
    prefetch_tile(lane(s.dout, s, plan, at), chunk * T, rows);
    if (chunk > 0) {
        const float *h = saved_state(s, plan, at, chunk);
        for (int64_t n = 0; n < s.state; ++n) __builtin_prefetch(h + n * plan.padded);
    }
}

// Sums that the gradients of one block are added to.
struct Sums {
    vf *dA, *dD, *dbias;    // of the channels: N vectors, one, one
    float *dB, *dC;         // of the positions and states: rows of `columns`
    int64_t columns;
};

static void backward_block(const ScanArgs &s, const Plan &plan, const Packed &packed, BackwardTiles &w, vf *carry,
                           const Block &at, const Block &next, const Sums &sums) {
    const int64_t N = s.state, slot = at.group * plan.blocks + at.index, columns = sums.columns;
    const Lane u = lane(s.u, s, plan, at), delta = lane(s.delta, s, plan, at), dout = lane(s.dout, s, plan, at),
               du = lane(s.du, s, plan, at), ddelta = lane(s.ddelta, s, plan, at);
    const Coefficients B(s.B, s, at.batch, at.group), C(s.C, s, at.batch, at.group);
    const vf *A = packed.A.data + slot * N;
    const vf bias = packed.bias.data[slot], D = packed.D.data[slot];
    for (int64_t n = 0; n < N; ++n) carry[n] = vf{};
    for (int64_t chunk = plan.chunks - 1; chunk >= 0; --chunk) {
        const int64_t t0 = chunk * T;
        const int rows = plan.rows(chunk, s.length);
        load_tile(w.u, u, t0, rows);
        load_tile(w.dt, delta, t0, rows);
        load_tile(w.dy, dout, t0, rows);
        if (chunk > 0)
            prefetch_backward(s, plan, at, chunk - 1);
        else
            prefetch_backward(s, plan, next, plan.chunks - 1);
        for (int t = 0; t < rows; ++t) {
            const vf x = w.dt[t] + bias;
            w.dt[t] = s.softplus ? softplus(x) : x;
            w.slope[t] = s.softplus ? sigmoid(x) : splat(1.0f);
            w.dtu[t] = w.dt[t] * w.u[t];
            w.gB[t] = w.gA[t] = vf{};
        }
        const float *h0 = chunk > 0 ? saved_state(s, plan, at, chunk) : nullptr;
        for (int64_t n = 0; n < N; n += 4) {
            const float *Bn = B.at(t0, n), *Cn = C.at(t0, n), *hn = h0 ? h0 + n * plan.padded : nullptr;
#define MMT_BACKWARD(K)                                                                                       \
    backward_states<K>(rows, w, A + n, hn, plan.padded, carry + n, sums.dA + n, Bn, B.position, B.state, Cn, C.position, \
                       C.state)
            switch (min64(4, N - n)) {
                case 4: MMT_BACKWARD(4); break;
                case 3: MMT_BACKWARD(3); break;
                case 2: MMT_BACKWARD(2); break;
                default: MMT_BACKWARD(1);
            }
#undef MMT_BACKWARD
            add_partial_sums(w.dB, rows, sums.dB + t0 * columns + n, columns);
            add_partial_sums(w.dC, rows, sums.dC + t0 * columns + n, columns);
        }
        vf sum_D{}, sum_bias{};
        for (int t = 0; t < rows; ++t) {
            const vf ddt = w.gA[t] * 0.693147181f + w.u[t] * w.gB[t];  // gA holds A log2(e)
            const vf dx = ddt * w.slope[t];
            sum_bias += dx;
            sum_D += w.dy[t] * w.u[t];
            w.gB[t] = w.dt[t] * w.gB[t] + D * w.dy[t];
            w.gA[t] = dx;
        }
        *sums.dD += sum_D;
        *sums.dbias += sum_bias;
        store_tile(w.gB, du, t0, rows);
        store_tile(w.gA, ddelta, t0, rows);
    }
}

// Write dB or dC of one (batch, group): the sum of `count` partial sums that lie `apart` floats from each other.
static void write_sums(const ScanArgs &s, const View4 &v, int64_t b, int64_t g, float *sums, int64_t columns,
                       int64_t count, int64_t apart) {
    float *out = v.data + b * v.batch + g * v.group;
    for (int64_t t = 0; t < s.length; ++t) {
        float *row = sums + t * columns;
        float *p = out + (s.reverse ? s.length - 1 - t : t) * v.position;
        for (int64_t i = 1; i < count; ++i)
            for (int64_t n = 0; n < s.state; ++n) row[n] += row[i * apart + n];
        for (int64_t n = 0; n < s.state; ++n) p[n * v.state] = row[n];
    }
}

static void backward_task(const ScanArgs &s, const Plan &plan, const Packed &packed, const TaskGrid &grid,
                          BackwardScratch &scratch, BackwardTiles &tiles, vf *carry, float *own, int64_t task) {
    const int64_t split = task % grid.splits, g = task / grid.splits % grid.groups, run = task / grid.splits / grid.groups;
    const int64_t N = s.state, first = split * plan.blocks / grid.splits, last = (split + 1) * plan.blocks / grid.splits;
    const int64_t slot = (run * grid.groups + g) * plan.blocks;
    vf *dA = reinterpret_cast<vf *>(scratch.dA.data) + slot * N;
    vf *dD = reinterpret_cast<vf *>(scratch.dD.data) + slot, *dbias = reinterpret_cast<vf *>(scratch.dbias.data) + slot;
    memset(static_cast<void *>(dA + first * N), 0, (last - first) * N * sizeof(vf));
    memset(static_cast<void *>(dD + first), 0, (last - first) * sizeof(vf));
    memset(static_cast<void *>(dbias + first), 0, (last - first) * sizeof(vf));
    float *dB = grid.splits > 1 ? scratch.shared.data + task * scratch.sums() : own;
    float *dC = dB + scratch.rows * scratch.columns;
    for (int64_t b = run * s.batch / grid.batches; b < (run + 1) * s.batch / grid.batches; ++b) {
        memset(dB, 0, scratch.sums() * sizeof(float));
        for (int64_t block = first; block < last; ++block) {
            const Sums sums{dA + block * N, dD + block, dbias + block, dB, dC, scratch.columns};
            const Block next = block + 1 < last ? Block{b, g, block + 1} : Block{min64(b + 1, s.batch - 1), g, first};
            backward_block(s, plan, packed, tiles, carry, {b, g, block}, next, sums);
        }
        if (grid.splits == 1) {
            write_sums(s, s.dB, b, g, dB, scratch.columns, 1, 0);
            write_sums(s, s.dC, b, g, dC, scratch.columns, 1, 0);
        }
    }
}

// dA, dD and dbias of one block of channels: the sum over the runs of batch elements, in their order.
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
    if (!packed.ok() || !scratch.ok()) return 1;
    const int64_t tasks = grid.count(), slots = grid.groups * plan.blocks;
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        Buffer<BackwardTiles> tiles(1);
        Buffer<vf> carry(s.state);
        Buffer<float> own(grid.splits > 1 ? 0 : scratch.sums());
        failed = !tiles.data || !carry.data || !own.data;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task)
            if (!failed) backward_task(s, plan, packed, grid, scratch, *tiles.data, carry.data, own.data, task);
        if (grid.splits > 1) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * grid.groups; ++i) {
                float *sums = scratch.shared.data + i * grid.splits * scratch.sums();
                write_sums(s, s.dB, i / grid.groups, i % grid.groups, sums, scratch.columns, grid.splits, scratch.sums());
                write_sums(s, s.dC, i / grid.groups, i % grid.groups, sums + scratch.rows * scratch.columns,
                           scratch.columns, grid.splits, scratch.sums());
            }
        }
#pragma omp for schedule(static)
        for (int64_t slot = 0; slot < slots; ++slot) sum_over_batch(s, plan, grid, scratch, slot);
    }
    return failed;
}

}  // namespace MMT_ISA
