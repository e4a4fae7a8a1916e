// out = scale x for elements whose hash is at least the threshold, else 0. The hash is a function of the seed of the
// sample and of the position in the sample.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

// A hash by xor-shift and multiply; its high bits mix best. mmtrain/ops/elementwise.py has the same in PyTorch.
template <class U>
MMT_INLINE U mix32(U x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    return (x ^ (x >> 15)) * 0x846CA68Bu;
}

static int dropout(const DropoutArgs &s) {
    constexpr int64_t kPart = 8192;  // elements of one sample at a time
    const int64_t parts = ceil_div(s.each, kPart);
    const float scale = (float)s.scale;
    const uint32_t step = (uint32_t)s.step;
    vu lane{};
    for (int i = 0; i < W; ++i) lane[i] = (uint32_t)i * step;
#pragma omp parallel for num_threads((int)s.threads) schedule(static)
    for (int64_t task = 0; task < s.batch * parts; ++task) {
        const int64_t b = task / parts, first = task % parts * kPart, n = min64(kPart, s.each - first);
        const float *x = s.x + b * s.each + first;
        float *out = s.out + b * s.each + first;
        const uint32_t start = (uint32_t)s.seeds[b] + (uint32_t)first * step;
        const vi threshold = (int32_t)s.threshold - vi{};
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            const vu bits = mix32(lane + (start + (uint32_t)i * step));
            store(out + i, (vi)bits >= threshold ? load(x + i) * scale : vf{});
        }
        for (; i < n; ++i) out[i] = (int32_t)mix32(start + (uint32_t)i * step) >= (int32_t)s.threshold ? x[i] * scale : 0.0f;
    }
    return 0;
}

}  // namespace MMT_ISA
