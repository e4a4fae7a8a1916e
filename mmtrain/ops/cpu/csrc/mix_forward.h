// The forward pass of the inner part of a mixer (MixArgs in args.h).
#pragma once
#include "mix_common.h"
#include "scan_forward.h"

namespace MMT_ISA {

struct MixForward {
    const MixArgs &s;
    const MixPlan &plan;
    const MixPacked &packed;
    float *parts;  // (directions, batch, length, width) if directions are computed separately, else null

    MixView target(int64_t k) const { return parts ? part_view(s, plan, parts, k) : s.out; }

    // Multiply a tile of y by scale · silu(z). Its positions are in the order of the lane `z`.
    void finish(vf *y, const Lane &z, int64_t t0, int rows) const {
        const float scale = (float)s.scale;
        if (!s.z.data) {
            for (int t = 0; t < rows; ++t) y[t] *= scale;
            return;
        }
        vf gate[T];
        load_tile(gate, z, t0, rows);
        for (int t = 0; t < rows; ++t) y[t] *= scale * (gate[t] * sigmoid(gate[t]));
    }

    void chunk(MixInput &in, ForwardTiles &w, vf *h, int64_t b, int64_t k, int64_t chunk) const {
        const MixWeights &weights = packed[k];
        const int64_t N = s.state, t0 = chunk * T;
        const int rows = plan.rows(chunk, s.length);
        const bool last = k == s.directions - 1;
        if (!parts && last && s.z.data) prefetch_rows(weights.lane(s, plan, s.z, b, k, 0), s.dim, t0, rows);
        in.fill(s, plan, weights, b, k, chunk, false);
        for (int64_t block = 0; block < plan.blocks; ++block) {
            vf *state = h + block * N;
            const vf *A = weights.A.data + block * N, *dt = weights.dt.data + block * s.rank;
            const vf D = weights.D.data[block], bias = weights.bias.data[block];
            if (chunk == 0)
                for (int64_t n = 0; n < N; ++n) state[n] = vf{};
            if (s.states && chunk > 0) {
                float *p = mix_saved_state(s, plan, b, k, chunk, block);
                for (int64_t n = 0; n < N; ++n) store(p + n * plan.padded, state[n]);
            }
            for (int t = 0; t < rows; ++t) {
                const vf u = in.u.data[t * plan.blocks + block];
                w.dt[t] = softplus(raw_step(dt, s.rank, in.projected.data + t * plan.columns + plan.low, bias));
                w.dtu[t] = w.dt[t] * u;
                w.y[t] = D * u;
            }
            for (int64_t n = 0; n < N; n += 4) {
                const float *B = in.projected.data + n, *C = B + plan.state4;
#define MMT_FORWARD(K) forward_states<K>(rows, w.dt, w.dtu, w.y, A + n, state + n, B, plan.columns, 1, C, plan.columns, 1)
                switch (min64(4, N - n)) {
                    case 4: MMT_FORWARD(4); break;
                    case 3: MMT_FORWARD(3); break;
                    case 2: MMT_FORWARD(2); break;
                    default: MMT_FORWARD(1);
                }
#undef MMT_FORWARD
            }
            const Lane out = weights.lane(s, plan, target(k), b, k, block);
            if (!parts && k > 0) {
                load_tile(w.u, out, t0, rows);
                for (int t = 0; t < rows; ++t) w.y[t] += w.u[t];
            }
            if (!parts && last) finish(w.y, weights.lane(s, plan, s.z, b, k, block), t0, rows);
            store_tile(w.y, out, t0, rows);
        }
    }

    // Add the directions of one block of channels of one batch element, in their order.
    void merge(int64_t b, int64_t block) const {
        const Lane out = memory_lane(s, plan, s.out, b, block), z = memory_lane(s, plan, s.z, b, block);
        vf y[T], part[T];
        for (int64_t t0 = 0; t0 < s.length; t0 += T) {
            const int rows = (int)min64(T, s.length - t0);
            for (int64_t k = 0; k < s.directions; ++k) {
                load_tile(k ? part : y, memory_lane(s, plan, target(k), b, block), t0, rows);
                for (int t = 0; k && t < rows; ++t) y[t] += part[t];
            }
            finish(y, z, t0, rows);
            store_tile(y, out, t0, rows);
        }
    }
};

static int mix_forward(const MixArgs &s) {
    const MixPlan plan(s);
    const MixPacked packed(s, plan, false);
    const bool split = split_directions(s.batch, s.directions, s.threads, s.out.narrow);
    Buffer<float> parts(split ? s.directions * s.batch * s.length * plan.width : 0);
    if (!packed.data || !parts.data) return 1;
    const MixForward pass{s, plan, packed, split ? parts.data : nullptr};
    const int64_t tasks = s.batch * (split ? s.directions : 1);
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        MixInput in(s, plan, false);
        Buffer<ForwardTiles> tiles(1);
        Buffer<vf> h(plan.blocks * s.state);
        failed = !in.ok() || !tiles.data || !h.data;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            if (failed) continue;
            const int64_t b = split ? task / s.directions : task;
            const int64_t first = split ? task % s.directions : 0, end = split ? first + 1 : s.directions;
            for (int64_t k = first; k < end; ++k)
                for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) pass.chunk(in, *tiles.data, h.data, b, k, chunk);
        }
        if (split) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * plan.blocks; ++i) pass.merge(i / plan.blocks, i % plan.blocks);
        }
    }
    return failed;
}

}  // namespace MMT_ISA
