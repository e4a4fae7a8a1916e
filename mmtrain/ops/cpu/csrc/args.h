// The argument structures of the kernels and the list of entry points. mmtrain/ops/cpu/library.py mirrors the structures
// field by field. Every field is 8 bytes wide, so the layout is the same for every compiler. Strides are in elements.
#pragma once
#include <stdint.h>

struct View3 {  // a tensor indexed (batch, channel, position)
    void *data;
    int64_t narrow;                    // 1: bfloat16, 0: float
    int64_t batch, channel, position;  // strides
};

struct View4 {  // a float tensor indexed (batch, group, state, position)
    float *data;
    int64_t batch, group, state, position;  // strides
};

struct MixView {  // a tensor indexed (outer batch, inner batch, channel, position)
    void *data;
    int64_t narrow;  // 1: bfloat16, 0: float
    int64_t outer, inner, channel, position;  // strides
};

struct ScanArgs {
    int64_t batch, dim, length, state, groups;
    int64_t softplus, reverse, threads;
    View3 u, delta;
    const float *A;  // (dim, state), contiguous
    View4 B, C;
    const float *D, *bias;  // (dim), or null
    View3 out;              // forward only
    float *states;          // states at chunk boundaries, see scan_common.h; null in forward: do not save them
    const float *initial;   // state before the first position: (batch, dim, state), contiguous, or null
    float *last;            // state after the last position, likewise; forward only
    // Backward only.
    View3 dout, du, ddelta;
    float *dA;  // (dim, state), contiguous
    View4 dB, dC;
    float *dD, *dbias;  // (dim), or null
    const float *dlast;  // (batch, dim, state), contiguous, or null
    float *dinitial;     // the same, or null
};

struct ConvArgs {
    int64_t batch, dim, length, width;
    int64_t silu, reverse, threads;
    View3 x;
    const float *weight;  // (dim, width), contiguous
    const float *bias;    // (dim), or null
    View3 out;            // forward only
    // Backward only.
    View3 dout, dx;
    float *dweight;  // (dim, width), contiguous
    float *dbias;    // (dim), or null
};

// The inner part of a mixer. For each direction k: u_k = silu(conv_k(x)), or x without a convolution;
// (low, B, C) = x_proj_k u_k; Δ = softplus(dt_proj_k low + dt_bias_k); y_k is the scan of u_k. The result is
// scale · Σ_k y_k, times silu(z) with a gate. Parameters are contiguous; directions are their first dimension.
struct MixArgs {
    int64_t batch, inner;  // number of sequences (outer times inner batch); size of the inner batch
    int64_t directions, dim, length, state, rank;
    int64_t taps;  // of the convolution; 0: no convolution
    int64_t threads;
    double scale;
    MixView x, z;          // z.data null: no gate
    const int64_t *order;  // (directions, length): the position in memory of each step
    const float *conv, *conv_bias;  // (directions, dim, taps), (directions, dim) or null
    const float *x_proj;            // (directions, rank + 2 state, dim)
    const float *dt_proj;           // (directions, dim, rank)
    const float *dt_bias, *A, *D;   // (directions, dim), (directions, dim, state), (directions, dim)
    MixView out;                    // forward only
    float *states;  // (batch, directions, chunks - 1, state, padded dim); null in forward: do not save them
    // Backward only. Gradients are overwritten, not accumulated.
    MixView dout, dx, dz;
    float *dconv, *dconv_bias, *dx_proj, *ddt_proj, *ddt_bias, *dA, *dD;
};

struct WeightedSumArgs {
    int64_t count, size, threads;
    const float *const *inputs;  // `count` arrays of `size` elements
    const float *weight;         // (count)
    float *out;                  // forward only
    // Backward only.
    const float *dout;
    float *const *dinputs;
    float *dweight;
};

struct DropoutArgs {
    int64_t batch, each, threads;
    int64_t step, threshold;  // of the hash, 32 bits each
    double scale;
    const int32_t *seeds;  // (batch)
    const float *x;        // (batch, each), contiguous
    float *out;
};

struct MatmulArgs {
    int64_t m, n, k, threads;  // k is a multiple of 16
    const float *a, *b;        // (m, n), (m, k)
    float *c;                  // (n, k)
};

struct ExpRateArgs {
    int64_t count, threads;  // count: number of exponentials, over all threads
    double *sum;             // a result that depends on them, so that the compiler cannot remove them
};

// Each kernel returns 0, or 1 if it cannot allocate memory.
#define MMT_KERNELS(X)                                                                                     \
    X(scan_forward, ScanArgs) X(scan_backward, ScanArgs) X(conv_forward, ConvArgs) X(conv_backward, ConvArgs) \
    X(mix_forward, MixArgs) X(mix_backward, MixArgs)                                                       \
    X(weighted_sum_forward, WeightedSumArgs) X(weighted_sum_backward, WeightedSumArgs)                        \
    X(dropout, DropoutArgs) X(exp_rate, ExpRateArgs) X(matmul_tn, MatmulArgs)

// Positions per chunk. The forward pass saves the state at chunk boundaries, and the backward pass recomputes the others.
// Longer chunks mean fewer saved states and longer contiguous memory accesses, but the tiles and recomputed states of one
// chunk (70 KiB with 16 lanes) must fit in the second-level cache. Measured: 16 and 32 are slower, 128 is not faster.
constexpr int64_t kChunk = 64;
// In `states`, the channels of a group are padded to a multiple of this, for any vector width.
constexpr int64_t kChannelPad = 16;
