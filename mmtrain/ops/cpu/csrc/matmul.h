// C (N, K) = Aᵀ B for contiguous A (M, N) and B (M, K): the gradient of the weight of a linear layer. M is large. It is
// divided into parts, depending only on the sizes, whose sums are added in a fixed order. So the result does not depend
// on the number of threads.
#pragma once
#include "gemm.h"
#include "scan_common.h"

namespace MMT_ISA {

static int matmul_tn(const MatmulArgs &s) {
    constexpr int64_t kPanel = 128, kRows = 96;  // rows of A and B, rows of C: blocks that fit in the caches
    const int64_t bands = ceil_div(s.n, kRows), parts = bands >= 16 ? 1 : max64(1, min64(16, s.m / 1024));
    const int64_t size = s.n * s.k;
    Buffer<float> sums(parts > 1 ? parts * size : 0);
    if (!sums.data) return 1;
#pragma omp parallel num_threads((int)s.threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < parts * bands; ++task) {
            const int64_t part = task / bands, n0 = task % bands * kRows, rows = min64(kRows, s.n - n0);
            const Range range = part_of(s.m, part, parts);
            float *c = (parts > 1 ? sums.data + part * size : s.c) + n0 * s.k;
            memset(c, 0, rows * s.k * sizeof(float));
            for (int64_t m = range.first; m < range.last; m += kPanel)
                gemm(c, s.k, {s.a + m * s.n + n0, 1, s.n}, s.b + m * s.k, s.k, rows, s.k, min64(kPanel, range.last - m));
        }
        if (parts > 1) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < size; i += W) {  // size is a multiple of W, as K is
                vf sum = load(sums.data + i);
                for (int64_t part = 1; part < parts; ++part) sum += load(sums.data + part * size + i);
                store(s.c + i, sum);
            }
        }
    }
    return 0;
}

}  // namespace MMT_ISA
