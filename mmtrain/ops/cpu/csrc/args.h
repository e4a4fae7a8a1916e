// The argument blocks that Python fills in (mmtrain/ops/cpu/library.py mirrors them field by field) and the entry points.
// Every field is 8 bytes wide, so the layout is the same for every compiler. Strides count elements, not bytes.
#pragma once
#include <stdint.h>

struct View3 {  // a tensor indexed (batch, channel, position)
    void *data;
    int64_t narrow;                    // bfloat16 instead of float
    int64_t batch, channel, position;  // strides
};

struct View4 {  // a float tensor indexed (batch, group, state, position)
    float *data;
    int64_t batch, group, state, position;  // strides
};

struct MixView {  // a tensor indexed (outer batch, inner batch, channel, position)
    void *data;
    int64_t narrow;  // bfloat16 instead of float
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
    float *states;          // states at chunk boundaries, see scan_common.h; null in forward: do not keep them
    const float *initial;   // (batch, dim, state), contiguous, or null: the state before the first position
    float *last;            // the same of the state after the last one, or null; forward only
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

// The interior of a mixer: for each of the directions k, u_k = silu(conv_k(x)) (or x itself, without conv),
// (Δ low rank, B, C) = x_proj_k u_k, Δ = softplus(dt_proj_k low + dt_bias_k), y_k the scan of u_k; the result is
// scale · Σ_k y_k, times silu(z) with a gate. Parameters are contiguous, with the directions first.
struct MixArgs {
    int64_t batch, inner;  // sequences: outer times inner ones; inner ones
    int64_t directions, dim, length, state, rank;
    int64_t taps;  // of the convolution, or 0
    int64_t threads;
    double scale;
    MixView x, z;          // z.data null: no gate
    const int64_t *order;  // (directions, length): the position of every step
    const float *conv, *conv_bias;  // (directions, dim, taps), (directions, dim) or null
    const float *x_proj;            // (directions, rank + 2 state, dim)
    const float *dt_proj;           // (directions, dim, rank)
    const float *dt_bias, *A, *D;   // (directions, dim), (directions, dim, state), (directions, dim)
    MixView out;                    // forward only
    float *states;  // (batch, directions, chunks - 1, state, padded dim); null in forward: do not keep them
    // Backward only. Every gradient is written whole.
    MixView dout, dx, dz;
    float *dconv, *dconv_bias, *dx_proj, *ddt_proj, *ddt_bias, *dA, *dD;
};

struct WeightedSumArgs {
    int64_t count, size, threads;
    const float *const *inputs;  // `count` arrays of `size`
    const float *weight;         // (count)
    float *out;                  // forward only
    // Backward only.
    const float *dout;
    float *const *dinputs;
    float *dweight;
};

struct DropoutArgs {
    int64_t batch, each, threads;
    int64_t step, threshold;  // of the hash: 32 bits each
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
    int64_t count, threads;  // exponentials, of all threads together
    double *sum;             // of some of them, so that none is left out
};

// Each returns 0, or 1 when scratch memory could not be had.
#define MMT_KERNELS(X)                                                                                     \
    X(scan_forward, ScanArgs) X(scan_backward, ScanArgs) X(conv_forward, ConvArgs) X(conv_backward, ConvArgs) \
    X(mix_forward, MixArgs) X(mix_backward, MixArgs)                                                       \
    X(weighted_sum_forward, WeightedSumArgs) X(weighted_sum_backward, WeightedSumArgs)                        \
    X(dropout, DropoutArgs) X(exp_rate, ExpRateArgs) X(matmul_tn, MatmulArgs)

// Positions per chunk: the kernel keeps the state at every multiple of it, and recomputes in between.
// Longer chunks mean fewer saved states and longer runs of memory; the tiles and recomputed states of one chunk (70 KiB
// with 16 lanes) must stay in the second-level cache. 16 and 32 measured slower, 128 no faster.
constexpr int64_t kChunk = 64;
// Channels of a group are padded to this in `states`, whatever the vector width of the machine.
constexpr int64_t kChannelPad = 16;
