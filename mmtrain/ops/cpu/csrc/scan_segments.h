// Parallel scan of a single long recurrence (one block of channels of one sequence), which has no other parallelism.
//
// The sequence is divided into segments, which run in parallel. A first pass runs each segment from a state of zeros. A
// state h that enters a segment adds exp(A Σ Δ) h to its final state, which gives the states at the borders of segments.
// A second pass computes the results. The work almost doubles. The division depends only on the sizes, not on the number
// of threads.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

constexpr int64_t kSegments = 16;
constexpr int64_t kLeastChunks = 4 * kSegments;

static inline bool segmented(const ScanArgs &s, const Plan &plan) {
    return s.batch * s.groups * plan.blocks == 1 && plan.chunks >= kLeastChunks;
}

struct Segments {
    Buffer<vf> local;   // (kSegments, state): final state of a segment that starts from zeros
    Buffer<vf> border;  // (kSegments, state): state that enters a segment
    Buffer<vf> steps;   // (kSegments): Σ Δ over a segment
    explicit Segments(const ScanArgs &s, bool used)
        : local(used ? kSegments * s.state : 0), border(used ? kSegments * s.state : 0), steps(used ? kSegments : 0) {}
    bool ok() const { return local.data && border.data && steps.data; }

    // Compute `border` from `local` and `steps`. `first` enters segment 0, or the last segment in the backward pass.
    void join(const ScanArgs &s, const Packed &packed, const vf *first, bool backward) {
        const int64_t N = s.state;
        for (int64_t i = 0; i < kSegments; ++i) {
            const int64_t at = backward ? kSegments - 1 - i : i, before = backward ? at + 1 : at - 1;
            for (int64_t n = 0; n < N; ++n)
                border.data[at * N + n] =
                    i ? exp2(packed.A.data[n] * steps.data[before]) * border.data[before * N + n] + local.data[before * N + n]
                      : first[n];
        }
    }
};

}  // namespace MMT_ISA
