// out = Σ_k w_k y_k for arrays of equal size, and its gradients dy_k = w_k dout, dw_k = <dout, y_k>.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

constexpr int64_t kPiece = 4096;  // floats per task; the order of the sums of dw depends on it, so it is independent of the threads

static int weighted_sum_forward(const WeightedSumArgs &s) {
    const int64_t pieces = ceil_div(s.size, kPiece);
#pragma omp parallel for num_threads((int)s.threads) schedule(static)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = piece * kPiece, n = min64(kPiece, s.size - first), whole = n / W * W;
        float *out = s.out + first;
        for (int64_t k = 0; k < s.count; ++k) {
            const float *y = s.inputs[k] + first, w = s.weight[k];
            for (int64_t i = 0; i < whole; i += W) store(out + i, k ? load(out + i) + w * load(y + i) : w * load(y + i));
            for (int64_t i = whole; i < n; ++i) out[i] = k ? out[i] + w * y[i] : w * y[i];
        }
    }
    return 0;
}

static int weighted_sum_backward(const WeightedSumArgs &s) {
    const int64_t pieces = ceil_div(s.size, kPiece);
    Buffer<float> sums(pieces * s.count);
    if (!sums.data) return 1;
#pragma omp parallel for num_threads((int)s.threads) schedule(static)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = piece * kPiece, n = min64(kPiece, s.size - first), whole = n / W * W;
        const float *dout = s.dout + first;
        for (int64_t k = 0; k < s.count; ++k) {
            const float *y = s.inputs[k] + first, w = s.weight[k];
            float *dy = s.dinputs[k] + first, sum = 0;
            vf total[4] = {};
            for (int64_t i = 0; i < whole; i += W) {
                const vf d = load(dout + i);
                total[i / W % 4] += d * load(y + i);
                store(dy + i, w * d);
            }
            for (int64_t i = whole; i < n; ++i) sum += dout[i] * y[i], dy[i] = w * dout[i];
            const vf lanes = (total[0] + total[1]) + (total[2] + total[3]);
            for (int i = 0; i < W; ++i) sum += lanes[i];
            sums.data[piece * s.count + k] = sum;
        }
    }
    for (int64_t k = 0; k < s.count; ++k) {
        double sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) sum += sums.data[piece * s.count + k];
        s.dweight[k] = (float)sum;
    }
    return 0;
}

}  // namespace MMT_ISA
