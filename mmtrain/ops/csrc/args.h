// The argument blocks that Python fills in (mmtrain/ops/library.py mirrors them field by field) and the entry points.
// Every field is 8 bytes wide, so the layout is the same for every compiler. Strides count elements, not bytes.
#pragma once
#include <stdint.h>

struct View3 {  // a float tensor indexed (batch, channel, position)
    float *data;
    int64_t batch, channel, position;  // strides
};

struct View4 {  // a float tensor indexed (batch, group, state, position)
    float *data;
    int64_t batch, group, state, position;  // strides
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
    // Backward only.
    View3 dout, du, ddelta;
    float *dA;  // (dim, state), contiguous
    View4 dB, dC;
    float *dD, *dbias;  // (dim), or null
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

// Each returns 0, or 1 when scratch memory could not be had.
#define MMT_KERNELS(X) X(scan_forward, ScanArgs) X(scan_backward, ScanArgs) X(conv_forward, ConvArgs) X(conv_backward, ConvArgs)

// Positions per chunk: the kernel keeps the state at every multiple of it, and recomputes in between.
// Longer chunks mean fewer saved states and longer runs of memory; the tiles and recomputed states of one chunk (70 KiB
// with 16 lanes) must stay in the second-level cache. 16 and 32 measured slower, 128 no faster.
constexpr int64_t kChunk = 64;
// Channels of a group are padded to this in `states`, whatever the vector width of the machine.
constexpr int64_t kChannelPad = 16;
