// Compute exponentials and nothing else, to measure their peak rate, which bounds the speed of a scan.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

static int exp_rate(const ExpRateArgs &s) {
    double total = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(+ : total)
    {
        vf x[8], sum[8] = {};  // independent of each other, so that throughput and not latency is measured
        for (int i = 0; i < 8; ++i) x[i] = splat(-0.01f * (float)(i + 1));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.count / (8 * W); ++i)
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                sum[j] += exp2(x[j]);
                x[j] -= 1e-7f;
            }
        for (int j = 0; j < 8; ++j) total += sum[j][0];
    }
    *s.sum = total;
    return 0;
}

}  // namespace MMT_ISA
