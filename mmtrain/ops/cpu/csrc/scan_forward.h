// The forward scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = C_t . h_t + D u_t.
#pragma once
#include "scan_segments.h"

namespace MMT_ISA {

// Run K of the N states over one chunk. Adds their contributions to y and updates h.
template <int K>
static void forward_states(int rows, const vf *dt, const vf *dtu, vf *y, const vf *A, vf *h, const float *B, int64_t B_t,
                           int64_t B_n, const float *C, int64_t C_t, int64_t C_n) {
    vf a[K], state[K];
    for (int k = 0; k < K; ++k) a[k] = A[k], state[k] = h[k];
    for (int t = 0; t < rows; ++t, B += B_t, C += C_t) {
        const vf dt_t = dt[t], dtu_t = dtu[t];
        vf sum = y[t];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
            state[k] = exp2(dt_t * a[k]) * state[k] + dtu_t * B[k * B_n];
            sum += state[k] * C[k * C_n];
        }
        y[t] = sum;
    }
    for (int k = 0; k < K; ++k) h[k] = state[k];
}

struct ForwardTiles {
    vf u[T + 1], dt[T + 1], dtu[T + 1], y[T + 1];  // one unused row each, as in BackwardTiles
};

// Run one block over one chunk. h is its state.
static void forward_chunk(const ScanArgs &s, const Plan &plan, const Packed &packed, ForwardTiles &w, vf *h, const Block &at,
                          int64_t chunk) {
    const int64_t N = s.state, slot = at.group * plan.blocks + at.index, t0 = chunk * T;
    const int rows = plan.rows(chunk, s.length);
    const Coefficients B(s.B, s, at.batch, at.group), C(s.C, s, at.batch, at.group);
    const vf *A = packed.A.data + slot * N;
    const vf bias = packed.bias.data[slot], D = packed.D.data[slot];
    if (chunk == 0) read_states(s, plan, s.initial, at, h);
    if (s.states && chunk > 0) {
        float *p = saved_state(s, plan, at, chunk);
        for (int64_t n = 0; n < N; ++n) store(p + n * plan.padded, h[n]);
    }
    load_tile(w.u, lane(s.u, s, plan, at), t0, rows);
    load_tile(w.dt, lane(s.delta, s, plan, at), t0, rows);
    for (int t = 0; t < rows; ++t) {
        const vf x = w.dt[t] + bias;
        w.dt[t] = s.softplus ? softplus(x) : x;
        w.dtu[t] = w.dt[t] * w.u[t];
        w.y[t] = D * w.u[t];
    }
    for (int64_t n = 0; n < N; n += 4) {
        const float *Bn = B.at(t0, n), *Cn = C.at(t0, n);
#define MMT_FORWARD(K) \
    forward_states<K>(rows, w.dt, w.dtu, w.y, A + n, h + n, Bn, B.position, B.state, Cn, C.position, C.state)
        switch (min64(4, N - n)) {
            case 4: MMT_FORWARD(4); break;
            case 3: MMT_FORWARD(3); break;
            case 2: MMT_FORWARD(2); break;
            default: MMT_FORWARD(1);
        }
#undef MMT_FORWARD
    }
    if (s.out.data) store_tile(w.y, lane(s.out, s, plan, at), t0, rows);
    if (s.last && chunk == plan.chunks - 1) write_states(s, plan, h, at, s.last);
}

// Run a single recurrence in segments, see scan_segments.h.
static int scan_forward_segments(const ScanArgs &s, const Plan &plan, const Packed &packed) {
    const int64_t N = s.state;
    ScanArgs probe = s;  // the first pass computes only the states
    probe.out.data = probe.states = probe.last = nullptr;
    probe.initial = nullptr;
    Segments segments(s, true);
    Buffer<vf> first(N);
    if (!segments.ok() || !first.data) return 1;
    read_states(s, plan, s.initial, {0, 0, 0}, first.data);
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        Buffer<ForwardTiles> tiles(1);
        failed = !tiles.data;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < kSegments - 1; ++i) {
            if (failed) continue;
            const Range chunks = part_of(plan.chunks, i, kSegments);
            vf *h = segments.local.data + i * N, sum{};
            for (int64_t n = 0; n < N; ++n) h[n] = vf{};
            for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk) {
                forward_chunk(probe, plan, packed, *tiles.data, h, {0, 0, 0}, chunk);
                for (int t = 0; t < plan.rows(chunk, s.length); ++t) sum += tiles.data->dt[t];
            }
            segments.steps.data[i] = sum;
        }
#pragma omp single
        segments.join(s, packed, first.data, false);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < kSegments; ++i) {
            if (failed) continue;
            const Range chunks = part_of(plan.chunks, i, kSegments);
            for (int64_t chunk = chunks.first; chunk < chunks.last; ++chunk)
                forward_chunk(s, plan, packed, *tiles.data, segments.border.data + i * N, {0, 0, 0}, chunk);
        }
    }
    return failed;
}

static int scan_forward(const ScanArgs &s) {
    const Plan plan(s);
    const Packed packed(s, plan);
    if (!packed.ok()) return 1;
    if (segmented(s, plan)) return scan_forward_segments(s, plan, packed);
    // The result does not depend on the division into tasks, so the division may depend on the number of threads.
    const int64_t splits = min64(plan.blocks, ceil_div(4 * s.threads, s.batch * s.groups));
    const int64_t tasks = s.batch * s.groups * splits, most = ceil_div(plan.blocks, splits);
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        Buffer<ForwardTiles> tiles(1);
        Buffer<vf> h(most * s.state);
        failed = !tiles.data || !h.data;
#pragma omp for schedule(guided)
        for (int64_t task = 0; task < tasks; ++task) {
            if (failed) continue;
            const Range blocks = part_of(plan.blocks, task % splits, splits);
            const int64_t g = task / splits % s.groups, b = task / splits / s.groups;
            for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
                for (int64_t i = blocks.first; i < blocks.last; ++i)
                    forward_chunk(s, plan, packed, *tiles.data, h.data + (i - blocks.first) * s.state, {b, g, i}, chunk);
        }
    }
    return failed;
}

}  // namespace MMT_ISA
