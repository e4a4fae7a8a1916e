// Gradients of the inner part of a mixer. Only the states at chunk boundaries are saved; everything else is recomputed,
// chunk by chunk from last to first. As in scan_backward.h, the order of every sum depends only on the sizes: batch
// elements are divided into runs, a run adds sequentially, and the runs are added in their order.
#pragma once
#include "mix_common.h"
#include "scan_backward.h"

namespace MMT_ISA {

// Gradients of the parameters of one direction, summed over one run of batch elements.
struct MixSums {
    vf *A, *D, *bias, *dt, *conv;  // as in MixWeights
    float *project;                // (columns, width)
    static int64_t vectors(const MixArgs &s, const MixPlan &plan) {
        return plan.blocks * (s.state + 2 + s.rank + s.taps + 1 + plan.columns);
    }
    MixSums(const MixArgs &s, const MixPlan &plan, vf *data)
        : A(data),
          D(A + plan.blocks * s.state),
          bias(D + plan.blocks),
          dt(bias + plan.blocks),
          conv(dt + plan.blocks * s.rank),
          project(reinterpret_cast<float *>(conv + plan.blocks * (s.taps + 1))) {}
};

struct MixScratch {  // buffers of one thread
    MixInput in;
    Buffer<BackwardTiles> tiles;
    Buffer<vf> du, ddt;          // (T, blocks)
    Buffer<float> dprojected;    // (T, columns)
    Buffer<vf> carry, after;     // from the following chunk: a g (blocks, state), dpre (blocks, taps)
    Buffer<vf> dpre;             // (T + taps), of one block
    MixScratch(const MixArgs &s, const MixPlan &plan)
        : in(s, plan, true),
          tiles(1),
          du(T * plan.blocks),
          ddt(T * plan.blocks),
          dprojected(T * plan.columns),
          carry(plan.blocks * s.state),
          after(plan.blocks * (s.taps + 1)),
          dpre(T + s.taps) {}
    bool ok() const {
        return in.ok() && tiles.data && du.data && ddt.data && dprojected.data && carry.data &&
               after.data && dpre.data;
    }
};

struct MixBackward {
    const MixArgs &s;
    const MixPlan &plan;
    const MixPacked &packed;
    float *dx_parts, *dz_parts;  // (directions, batch, length, width) if directions are computed separately, else null

    MixView target(const MixView &whole, float *parts, int64_t k) const {
        return parts ? part_view(s, plan, parts, k) : whole;
    }

    // Store a tile of the contribution of one direction to dx or dz. Direction 0 overwrites, the others add.
    void add(vf *tile, const MixView &whole, float *parts, const MixWeights &weights, int64_t b, int64_t k, int64_t block,
             int64_t t0, int rows) const {
        const Lane to = weights.lane(s, plan, target(whole, parts, k), b, k, block);
        if (!parts && k > 0) {
            vf before[T];
            load_tile(before, to, t0, rows);
            for (int t = 0; t < rows; ++t) tile[t] += before[t];
        }
        store_tile(tile, to, t0, rows);
    }

    // Run the scan of one block over one chunk: compute du and ddt, and add to the sums over channels in dprojected.
    void scan_block(MixScratch &m, const MixSums &sums, int64_t b, int64_t k, int64_t chunk, int64_t block) const {
        const MixWeights &weights = packed[k];
        BackwardTiles &w = *m.tiles.data;
        const int64_t N = s.state, t0 = chunk * T, blocks = plan.blocks;
        const int rows = plan.rows(chunk, s.length);
        const vf D = weights.D.data[block], bias = weights.bias.data[block];
        const vf *dt = weights.dt.data + block * s.rank, *A = weights.A.data + block * N;
        const float *low = m.in.projected.data + plan.low, scale = (float)s.scale;
        const float *h0 = chunk > 0 ? mix_saved_state(s, plan, b, k, chunk, block) : nullptr;
        vf *carry = m.carry.data + block * N;
        vf gate_slope[T];
        if (chunk == plan.chunks - 1)
            for (int64_t n = 0; n < N; ++n) carry[n] = vf{};
        load_tile(w.dy, weights.lane(s, plan, s.dout, b, k, block), t0, rows);
        for (int t = 0; t < rows; ++t) w.dy[t] *= scale;
        if (s.z.data) {
            load_tile(gate_slope, weights.lane(s, plan, s.z, b, k, block), t0, rows);
            for (int t = 0; t < rows; ++t) {
                const vf z = gate_slope[t], sig = sigmoid(z);
                gate_slope[t] = w.dy[t] * (sig * (1.0f + z * (1.0f - sig)));
                w.dy[t] *= z * sig;
            }
        }
        for (int t = 0; t < rows; ++t) {
            w.u[t] = m.in.u.data[t * blocks + block];
            w.dt[t] = softplus_and_slope(raw_step(dt, s.rank, low + t * plan.columns, bias), w.slope[t]);
            w.dtu[t] = w.dt[t] * w.u[t];
            w.gB[t] = w.gA[t] = vf{};
            w.y[t] = D * w.u[t];
        }
        for (int64_t n = 0; n < N; n += 4) {
            const float *B = m.in.projected.data + n, *C = B + plan.state4, *hn = h0 ? h0 + n * plan.padded : nullptr;
#define MMT_BACKWARD(K, Y)                                                                                             \
    backward_states<K, Y>(rows, w, A + n, hn, plan.padded, carry + n, sums.A + block * N + n, B, plan.columns, 1, C, \
                          plan.columns, 1)
            switch (min64(4, N - n) + (s.z.data ? 4 : 0)) {
                case 8: MMT_BACKWARD(4, true); break;
                case 7: MMT_BACKWARD(3, true); break;
                case 6: MMT_BACKWARD(2, true); break;
                case 5: MMT_BACKWARD(1, true); break;
                case 4: MMT_BACKWARD(4, false); break;
                case 3: MMT_BACKWARD(3, false); break;
                case 2: MMT_BACKWARD(2, false); break;
                default: MMT_BACKWARD(1, false);
            }
#undef MMT_BACKWARD
            add_partial_sums(w.dB, rows, m.dprojected.data + n, plan.columns);
            add_partial_sums(w.dC, rows, m.dprojected.data + plan.state4 + n, plan.columns);
        }
        vf sum_D{}, sum_bias{};
        for (int t = 0; t < rows; ++t) {
            const vf ddt = (w.gA[t] * 0.693147181f + w.u[t] * w.gB[t]) * w.slope[t];  // gA contains the factor log2(e)
            sum_bias += ddt;
            sum_D += w.dy[t] * w.u[t];
            m.du.data[t * blocks + block] = w.dt[t] * w.gB[t] + D * w.dy[t];
            m.ddt.data[t * blocks + block] = w.gA[t] = ddt;
        }
        sums.D[block] += sum_D;
        sums.bias[block] += sum_bias;
        for (int64_t r = 0; r < s.rank; ++r) {
            vf sum{};
            for (int t = 0; t < rows; ++t) sum += w.gA[t] * low[t * plan.columns + r];
            sums.dt[block * s.rank + r] += sum;
        }
        if (s.z.data) {
            for (int t = 0; t < rows; ++t) w.y[t] *= gate_slope[t];
            add(w.y, s.dz, dz_parts, weights, b, k, block, t0, rows);
        }
    }

    // Propagate du of one block through SiLU and the convolution to dx.
    template <int K>
    void convolution_block(MixScratch &m, const MixWeights &weights, const MixSums &sums, int64_t block, int rows,
                           bool last_chunk, vf *dx) const {
        const int64_t taps = K ? K : s.taps, stride = plan.blocks;
        const vf *weight = weights.conv.data + block * (taps + 1), *x = m.in.x.data + block;
        vf *after = m.after.data + block * (taps + 1), *dw = sums.conv + block * (taps + 1), *dpre = m.dpre.data;
        vf bias{};
        for (int t = 0; t < rows; ++t) {
            dpre[t] = m.du.data[t * stride + block] * m.in.slope.data[t * stride + block];
            bias += dpre[t];
        }
        dw[taps] += bias;
        for (int64_t j = 0; j < taps - 1; ++j) dpre[rows + j] = last_chunk ? vf{} : after[j];
        for (int64_t j = 0; j < taps - 1; ++j) after[j] = dpre[j];
        for (int64_t j = 0; j < taps; ++j) {
            vf sum{};
            for (int t = 0; t < rows; ++t) sum += dpre[t] * x[(t + j) * stride];
            dw[j] += sum;
        }
        for (int t = 0; t < rows; ++t) {
            vf d{};
#pragma GCC unroll 4
            for (int64_t j = 0; j < taps; ++j) d += weight[j] * dpre[t + taps - 1 - j];
            dx[t] = d;
        }
    }

    void chunk(MixScratch &m, const MixSums &sums, int64_t b, int64_t k, int64_t chunk) const {
        const MixWeights &weights = packed[k];
        const int64_t t0 = chunk * T;
        const int rows = plan.rows(chunk, s.length);
        prefetch_rows(weights.lane(s, plan, s.dout, b, k, 0), s.dim, t0, rows);
        if (s.z.data) prefetch_rows(weights.lane(s, plan, s.z, b, k, 0), s.dim, t0, rows);
        m.in.fill(s, plan, weights, b, k, chunk, true);
        memset(m.dprojected.data, 0, T * plan.columns * sizeof(float));
        for (int64_t block = 0; block < plan.blocks; ++block) scan_block(m, sums, b, k, chunk, block);
        float *du = reinterpret_cast<float *>(m.du.data), *dprojected = m.dprojected.data;
        gemm(dprojected + plan.low, plan.columns, {reinterpret_cast<const float *>(m.ddt.data), plan.width, 1},
             weights.low_back.data, plan.low_width, rows, plan.low_width, s.dim);
        gemm(du, plan.width, {dprojected, plan.columns, 1}, weights.project_back.data, plan.width, rows, plan.width,
             plan.used);
        gemm(sums.project, plan.width, {dprojected, 1, plan.columns}, reinterpret_cast<const float *>(m.in.u.data),
             plan.width, plan.used, plan.width, rows);
        for (int64_t block = 0; block < plan.blocks; ++block) {
            vf dx[T];
            const bool last = chunk == plan.chunks - 1;
            if (s.taps == 4)
                convolution_block<4>(m, weights, sums, block, rows, last, dx);
            else if (s.taps)
                convolution_block<0>(m, weights, sums, block, rows, last, dx);
            else
                for (int t = 0; t < rows; ++t) dx[t] = m.du.data[t * plan.blocks + block];
            add(dx, s.dx, dx_parts, weights, b, k, block, t0, rows);
        }
    }

    // Add the contributions of the directions to dx or dz in their order, for one block of channels of one batch element.
    void merge(const MixView &whole, float *parts, int64_t b, int64_t block) const {
        const Lane out = memory_lane(s, plan, whole, b, block);
        vf sum[T], part[T];
        for (int64_t t0 = 0; t0 < s.length; t0 += T) {
            const int rows = (int)min64(T, s.length - t0);
            for (int64_t k = 0; k < s.directions; ++k) {
                load_tile(k ? part : sum, memory_lane(s, plan, target(whole, parts, k), b, block), t0, rows);
                for (int t = 0; k && t < rows; ++t) sum[t] += part[t];
            }
            store_tile(sum, out, t0, rows);
        }
    }

    // Write the gradients of the parameters of one direction: the sum over all runs, accumulated in those of run 0.
    void write_parameters(vf *data, int64_t runs, int64_t k) const {
        const int64_t vectors = MixSums::vectors(s, plan), rows = s.rank + 2 * s.state;
        vf *first = data + k * vectors;
        for (int64_t run = 1; run < runs; ++run)
            for (int64_t i = 0; i < vectors; ++i) first[i] += data[(run * s.directions + k) * vectors + i];
        const MixSums sums(s, plan, first);
        for (int64_t d = 0; d < s.dim; ++d) {
            const int64_t block = d / W, i = d % W, channel = k * s.dim + d;
            for (int64_t n = 0; n < s.state; ++n) s.dA[channel * s.state + n] = sums.A[block * s.state + n][i];
            s.dD[channel] = sums.D[block][i];
            s.ddt_bias[channel] = sums.bias[block][i];
            for (int64_t r = 0; r < s.rank; ++r) s.ddt_proj[channel * s.rank + r] = sums.dt[block * s.rank + r][i];
            for (int64_t j = 0; j < s.taps; ++j) s.dconv[channel * s.taps + j] = sums.conv[block * (s.taps + 1) + j][i];
            if (s.dconv_bias) s.dconv_bias[channel] = sums.conv[block * (s.taps + 1) + s.taps][i];
        }
        for (int64_t column = 0; column < plan.used; ++column) {
            const int64_t row = plan.source(s, column);
            if (row >= 0) memcpy(s.dx_proj + (k * rows + row) * s.dim, sums.project + column * plan.width, s.dim * sizeof(float));
        }
    }
};

static int mix_backward(const MixArgs &s) {
    const MixPlan plan(s);
    const MixPacked packed(s, plan, true);
    const int64_t vectors = MixSums::vectors(s, plan);
    // At most 64 runs, and about 32 MB of sums.
    const int64_t room = (32 << 20) / (vectors * s.directions * (int64_t)sizeof(vf));
    const int64_t runs = min64(s.batch, max64(4, min64(64, room)));
    const bool split = split_directions(runs, s.directions, s.threads, s.dx.narrow);
    const int64_t whole = split ? s.directions * s.batch * s.length * plan.width : 0;
    Buffer<vf> sums(runs * s.directions * vectors);
    Buffer<float> dx_parts(whole), dz_parts(s.z.data ? whole : 0);
    if (!packed.data || !sums.data || !dx_parts.data || !dz_parts.data) return 1;
    const MixBackward pass{s, plan, packed, split ? dx_parts.data : nullptr, split ? dz_parts.data : nullptr};
    const int64_t tasks = runs * (split ? s.directions : 1);
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        MixScratch scratch(s, plan);
        failed = !scratch.ok();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            if (failed) continue;
            const int64_t run = split ? task / s.directions : task;
            const int64_t first = split ? task % s.directions : 0, end = split ? first + 1 : s.directions;
            const Range batch = part_of(s.batch, run, runs);
            memset(static_cast<void *>(sums.data + (run * s.directions + first) * vectors), 0,
                   (end - first) * vectors * sizeof(vf));
            for (int64_t b = batch.first; b < batch.last; ++b)
                for (int64_t k = first; k < end; ++k) {
                    const MixSums own(s, plan, sums.data + (run * s.directions + k) * vectors);
                    for (int64_t chunk = plan.chunks - 1; chunk >= 0; --chunk) pass.chunk(scratch, own, b, k, chunk);
                }
        }
        if (split) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < s.batch * plan.blocks; ++i) {
                pass.merge(s.dx, dx_parts.data, i / plan.blocks, i % plan.blocks);
                if (s.z.data) pass.merge(s.dz, dz_parts.data, i / plan.blocks, i % plan.blocks);
            }
        }
#pragma omp for schedule(static)
        for (int64_t k = 0; k < s.directions; ++k) pass.write_parameters(sums.data, runs, k);
    }
    return failed;
}

}  // namespace MMT_ISA
