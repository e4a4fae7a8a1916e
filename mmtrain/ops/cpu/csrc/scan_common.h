// Common code of the forward and the backward scan: division of the work, packed parameters, buffers.
//
// One vector lane is one channel. A block is W neighbouring channels of a group; its state is N vectors. A task processes
// several blocks of one batch element chunk by chunk (kChunk positions), so that complete rows of channels-last memory are
// used while they are in the caches. The N states are independent, so within a chunk they are processed four at a time.
// The inner loop then stays in registers for any N.
#pragma once
#include <stdlib.h>

#include "tile.h"

namespace MMT_ISA {

constexpr int T = (int)kChunk;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

template <class X>
struct Buffer {  // an aligned array, uninitialised unless `zero`; data is null if the allocation failed
    X *data;
    explicit Buffer(int64_t count, bool zero = false) {
        const size_t bytes = ((size_t)max64(count, 1) * sizeof(X) + 63) / 64 * 64;
        data = static_cast<X *>(aligned_alloc(64, bytes));
        if (data && zero) memset(static_cast<void *>(data), 0, bytes);
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
};

struct Plan {
    int64_t channels;        // per group
    int64_t blocks;          // per group
    int64_t padded;          // channels of all groups in `states`, with padding
    int64_t chunks;
    explicit Plan(const ScanArgs &s)
        : channels(s.dim / s.groups),
          blocks(ceil_div(channels, W)),
          padded(s.groups * ceil_div(channels, kChannelPad) * kChannelPad),
          chunks(ceil_div(s.length, T)) {}
    int lanes(int64_t block) const { return (int)min64(W, channels - block * W); }
    int rows(int64_t chunk, int64_t length) const { return (int)min64(T, length - chunk * T); }
    int64_t first_channel(int64_t group, int64_t block) const { return group * channels + block * W; }
};

// One block of channels of one batch element, which is one vector recurrence.
struct Block {
    int64_t batch, group, index;
};

struct Range {
    int64_t first, last;  // last is exclusive
    int64_t size() const { return last - first; }
};

// Divide 0..count into `parts` ranges and return range number `part`.
static inline Range part_of(int64_t count, int64_t part, int64_t parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

MMT_INLINE Lane lane(const View3 &v, const ScanArgs &s, const Plan &plan, const Block &at) {
    return Lane(v, at.batch, plan.first_channel(at.group, at.index), plan.lanes(at.index), s.length, s.reverse);
}

// `states` is (batch, chunks - 1, state, padded): the state at the start of every chunk except the first.
static inline float *saved_state(const ScanArgs &s, const Plan &plan, const Block &at, int64_t chunk) {
    const int64_t channel = at.group * (plan.padded / s.groups) + at.index * W;
    return s.states + (at.batch * (plan.chunks - 1) + chunk - 1) * s.state * plan.padded + channel;
}

// Convert the states of one block between memory, (batch, dim, state), and N vectors. Lanes past the last channel are 0.
static inline void read_states(const ScanArgs &s, const Plan &plan, const float *from, const Block &at, vf *to) {
    const int64_t first = at.batch * s.dim + plan.first_channel(at.group, at.index);
    for (int64_t n = 0; n < s.state; ++n) to[n] = vf{};
    for (int i = 0; from && i < plan.lanes(at.index); ++i)
        for (int64_t n = 0; n < s.state; ++n) to[n][i] = from[(first + i) * s.state + n];
}
static inline void write_states(const ScanArgs &s, const Plan &plan, const vf *from, const Block &at, float *to) {
    const int64_t first = at.batch * s.dim + plan.first_channel(at.group, at.index);
    for (int i = 0; i < plan.lanes(at.index); ++i)
        for (int64_t n = 0; n < s.state; ++n) to[(first + i) * s.state + n] = from[n][i];
}

// A * log2(e) (exp is computed as 2^x), D and the bias of Δ by block and lane. Lanes past the last channel are 0.
struct Packed {
    Buffer<vf> A, D, bias;
    Packed(const ScanArgs &s, const Plan &plan)
        : A(s.groups * plan.blocks * s.state, true),
          D(s.groups * plan.blocks, true),
          bias(s.groups * plan.blocks, true) {
        if (!ok()) return;
        for (int64_t g = 0; g < s.groups; ++g)
            for (int64_t block = 0; block < plan.blocks; ++block) {
                const int64_t d0 = plan.first_channel(g, block), slot = g * plan.blocks + block;
                for (int i = 0; i < plan.lanes(block); ++i) {
                    for (int64_t n = 0; n < s.state; ++n)
                        A.data[slot * s.state + n][i] = s.A[(d0 + i) * s.state + n] * 1.44269504f;
                    if (s.D) D.data[slot][i] = s.D[d0 + i];
                    if (s.bias) bias.data[slot][i] = s.bias[d0 + i];
                }
            }
    }
    bool ok() const { return A.data && D.data && bias.data; }
};

// B or C of one (batch, group), indexed (t, n) with positions t in the order of the recurrence.
struct Coefficients {
    const float *data;
    int64_t position, state;
    Coefficients(const View4 &v, const ScanArgs &s, int64_t b, int64_t g)
        : data(v.data + b * v.batch + g * v.group + (s.reverse ? (s.length - 1) * v.position : 0)),
          position(s.reverse ? -v.position : v.position),
          state(v.state) {}
    const float *at(int64_t t, int64_t n) const { return data + t * position + n * state; }
};

}  // namespace MMT_ISA
