// One block of channels of one sequence is a single recurrence: nothing to share out but the sequence itself. Where it is
// long it is cut into segments, by the sizes alone, that run side by side. A first pass finds what each segment makes of a
// state of zeros; since a state h that enters a segment leaves it as exp(A Σ Δ) h more than that, the states at the
// borders follow, and a second pass computes all the rest. It costs almost twice the work, for any number of threads.
#pragma once
#include "scan_common.h"

namespace MMT_ISA {

constexpr int64_t kSegments = 16;
constexpr int64_t kLeastChunks = 4 * kSegments;

static inline bool segmented(const ScanArgs &s, const Plan &plan) {
    return s.batch * s.groups * plan.blocks == 1 && plan.chunks >= kLeastChunks;
}

struct Segments {
    Buffer<vf> local;   // (kSegments, state): what a segment makes of zeros
    Buffer<vf> border;  // (kSegments, state): what enters it
    Buffer<vf> steps;   // (kSegments): Σ Δ
    explicit Segments(const ScanArgs &s, bool used)
        : local(used ? kSegments * s.state : 0), border(used ? kSegments * s.state : 0), steps(used ? kSegments : 0) {}
    bool ok() const { return local.data && border.data && steps.data; }

    // The borders in the order of the pass: `first` enters segment 0 (of the backward pass: the last one).
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
