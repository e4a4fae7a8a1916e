// Depthwise causal convolution: pre_t = bias + Σ_k weight_k x_{t-K+1+k} with zeros before the start, y = pre or silu(pre).
// One vector lane is one channel. The backward pass recomputes pre.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

constexpr int R = 64;  // positions per tile

struct ConvPlan {
    int64_t blocks, batches, tiles;  // a task is one of `batches` ranges of batch elements, times a block of channels
    explicit ConvPlan(const ConvArgs &s)
        : blocks(ceil_div(s.dim, W)), batches(min64(s.batch, ceil_div(128, blocks))), tiles(ceil_div(s.length, R)) {}
    int lanes(const ConvArgs &s, int64_t block) const { return (int)min64(W, s.dim - block * W); }
};

struct ConvScratch {  // tiles with K - 1 additional rows for earlier positions (x) or later positions (dpre)
    Buffer<vf> weight, x, dpre, y;
    explicit ConvScratch(const ConvArgs &s)
        : weight(s.width + 1), x(R + s.width), dpre(R + s.width), y(R) {}
    bool ok() const { return weight.data && x.data && dpre.data && y.data; }
};

static void pack_weight(const ConvArgs &s, int64_t d0, int lanes, vf *weight) {  // K taps, then the bias
    for (int64_t k = 0; k <= s.width; ++k) weight[k] = vf{};
    for (int i = 0; i < lanes; ++i) {
        for (int64_t k = 0; k < s.width; ++k) weight[k][i] = s.weight[(d0 + i) * s.width + k];
        if (s.bias) weight[s.width][i] = s.bias[d0 + i];
    }
}

// Load rows [start - K + 1, start + rows) of x, with zeros before the first position.
static void load_history(vf *x, const Lane &lane, int64_t start, int rows, int64_t K) {
    const int64_t have = min64(start, K - 1);
    for (int64_t k = 0; k < K - 1 - have; ++k) x[k] = vf{};
    // At most R rows at a time, because K - 1 may exceed the tile.
    for (int64_t from = start - have, to = K - 1 - have; from < start + rows; from += R, to += R)
        load_tile(x + to, lane, from, (int)min64(R, start + rows - from));
}

template <int K>
MMT_INLINE vf convolve(const vf *x, const vf *weight, int64_t width) {
    const int64_t taps = K ? K : width;
    vf sum = weight[taps];
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; ++k) sum += weight[k] * x[k];
    return sum;
}

template <int K>
static void conv_forward_block(const ConvArgs &s, const ConvPlan &plan, ConvScratch &w, int64_t b, int64_t block) {
    const int lanes = plan.lanes(s, block);
    const Lane x(s.x, b, block * W, lanes, s.length, s.reverse), out(s.out, b, block * W, lanes, s.length, s.reverse);
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        const int64_t t0 = tile * R;
        const int rows = (int)min64(R, s.length - t0);
        load_history(w.x.data, x, t0, rows, s.width);
        for (int t = 0; t < rows; ++t) {
            const vf pre = convolve<K>(w.x.data + t, w.weight.data, s.width);
            w.y.data[t] = s.silu ? pre * sigmoid(pre) : pre;
        }
        store_tile(w.y.data, out, t0, rows);
    }
}

// Process the tiles from last to first, because a tile needs the gradients of the K - 1 positions after it.
// dw contains the gradients of K taps, then of the bias.
template <int K>
static void conv_backward_block(const ConvArgs &s, const ConvPlan &plan, ConvScratch &w, int64_t b, int64_t block, vf *dw) {
    const int lanes = plan.lanes(s, block);
    const Lane x(s.x, b, block * W, lanes, s.length, s.reverse), dout(s.dout, b, block * W, lanes, s.length, s.reverse),
        dx(s.dx, b, block * W, lanes, s.length, s.reverse);
    const int64_t taps = K ? K : s.width;
    vf *dpre = w.dpre.data;
    for (int64_t k = 0; k < taps - 1; ++k) dpre[k] = vf{};
    for (int64_t tile = plan.tiles - 1; tile >= 0; --tile) {
        const int64_t t0 = tile * R;
        const int rows = (int)min64(R, s.length - t0);
        for (int64_t k = taps - 2; k >= 0; --k) dpre[rows + k] = dpre[k];  // the first rows of the tile after this one
        load_history(w.x.data, x, t0, rows, taps);
        load_tile(dpre, dout, t0, rows);
        if (s.silu)
            for (int t = 0; t < rows; ++t) {
                const vf pre = convolve<K>(w.x.data + t, w.weight.data, taps), sig = sigmoid(pre);
                dpre[t] *= sig * (1.0f + pre * (1.0f - sig));
            }
        for (int64_t k = 0; k < taps; ++k) {
            vf sum{};
            for (int t = 0; t < rows; ++t) sum += dpre[t] * w.x.data[t + k];
            dw[k] += sum;
        }
        vf sum{};
        for (int t = 0; t < rows; ++t) {
            sum += dpre[t];
            vf d{};
#pragma GCC unroll 4
            for (int64_t k = 0; k < taps; ++k) d += w.weight.data[k] * dpre[t + taps - 1 - k];
            w.y.data[t] = d;
        }
        dw[taps] += sum;
        store_tile(w.y.data, dx, t0, rows);
    }
}

template <int K>
static int conv_run(const ConvArgs &s, bool backward) {
    const ConvPlan plan(s);
    const int64_t stride = s.width + 1;
    Buffer<vf> dw(backward ? plan.batches * plan.blocks * stride : 0, true);
    if (!dw.data) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        const FlushSubnormals flush;
        ConvScratch w(s);
        failed = !w.ok();
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < plan.batches * plan.blocks; ++task) {
            if (failed) continue;
            const int64_t run = task / plan.blocks, block = task % plan.blocks;
            pack_weight(s, block * W, plan.lanes(s, block), w.weight.data);
            for (int64_t b = run * s.batch / plan.batches; b < (run + 1) * s.batch / plan.batches; ++b) {
                if (backward)
                    conv_backward_block<K>(s, plan, w, b, block, dw.data + task * stride);
                else
                    conv_forward_block<K>(s, plan, w, b, block);
            }
        }
    }
    if (failed || !backward) return failed;
    for (int64_t block = 0; block < plan.blocks; ++block)
        for (int64_t k = 0; k < stride; ++k) {
            vf sum{};
            for (int64_t run = 0; run < plan.batches; ++run) sum += dw.data[(run * plan.blocks + block) * stride + k];
            for (int i = 0; i < plan.lanes(s, block); ++i) {
                if (k < s.width)
                    s.dweight[(block * W + i) * s.width + k] = sum[i];
                else if (s.dbias)
                    s.dbias[block * W + i] = sum[i];
            }
        }
    return 0;
}

static int conv_any(const ConvArgs &s, bool backward) {
    switch (s.width) {
        case 2: return conv_run<2>(s, backward);
        case 3: return conv_run<3>(s, backward);
        case 4: return conv_run<4>(s, backward);
        default: return conv_run<0>(s, backward);
    }
}

static int conv_forward(const ConvArgs &s) { return conv_any(s, false); }
static int conv_backward(const ConvArgs &s) { return conv_any(s, true); }

}  // namespace MMT_ISA
