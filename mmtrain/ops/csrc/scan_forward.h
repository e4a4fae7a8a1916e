// h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = C_t . h_t + D u_t.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

// K states over one chunk. y is added to; h is carried.
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
    vf u[T], dt[T], dtu[T], y[T];
};

static void forward_block(const ScanArgs &s, const Plan &plan, const Packed &packed, ForwardTiles &w, vf *h, const Block &at,
                          const Block &next) {
    const int64_t N = s.state, slot = at.group * plan.blocks + at.index;
    const Lane u = lane(s.u, s, plan, at), delta = lane(s.delta, s, plan, at), out = lane(s.out, s, plan, at);
    const Coefficients B(s.B, s, at.batch, at.group), C(s.C, s, at.batch, at.group);
    const vf *A = packed.A.data + slot * N;
    const vf bias = packed.bias.data[slot], D = packed.D.data[slot];
    for (int64_t n = 0; n < N; ++n) h[n] = vf{};
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const int64_t t0 = chunk * T;
        const int rows = plan.rows(chunk, s.length);
        if (s.states && chunk > 0) {
            float *p = saved_state(s, plan, at, chunk);
            for (int64_t n = 0; n < N; ++n) store(p + n * plan.padded, h[n]);
        }
        load_tile(w.u, u, t0, rows);
        load_tile(w.dt, delta, t0, rows);
        if (chunk + 1 < plan.chunks) {
            prefetch_tile(u, t0 + T, plan.rows(chunk + 1, s.length));
            prefetch_tile(delta, t0 + T, plan.rows(chunk + 1, s.length));
        } else {
            prefetch_tile(lane(s.u, s, plan, next), 0, plan.rows(0, s.length));
            prefetch_tile(lane(s.delta, s, plan, next), 0, plan.rows(0, s.length));
        }
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
        if (s.out.data) store_tile(w.y, out, t0, rows);
    }
}

static Block block_of(const Plan &plan, const ScanArgs &s, int64_t task) {
    const int64_t slots = s.groups * plan.blocks;
    return {task / slots, task % slots / plan.blocks, task % plan.blocks};
}

static int scan_forward(const ScanArgs &s) {
    const Plan plan(s);
    const Packed packed(s, plan);
    if (!packed.ok()) return 1;
    const int64_t tasks = s.batch * s.groups * plan.blocks;
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        Buffer<ForwardTiles> tiles(1);
        Buffer<vf> h(s.state);
        failed = !tiles.data || !h.data;
#pragma omp for schedule(guided)
        for (int64_t task = 0; task < tasks; ++task) {
            if (failed) continue;
            forward_block(s, plan, packed, *tiles.data, h.data, block_of(plan, s, task), block_of(plan, s, min64(task + 1, tasks - 1)));
        }
    }
    return failed;
}

}  // namespace MMT_ISA
