// C += A B for matrices in the caches. A block of C is in registers while the loop runs over the inner dimension.
#pragma once
#include "vec.h"

namespace MMT_ISA {

struct Strided {  // element (i, k) of A is data[i * row + k * column]
    const float *data;
    int64_t row, column;
};

// Update a block of I rows by V vectors of C (row stride ldc). B is (K, V * W) with row stride ldb.
template <int I, int V>
static void gemm_block(float *C, int64_t ldc, const Strided &A, const float *B, int64_t ldb, int64_t K) {
    vf acc[I][V];
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[i][v] = load(C + i * ldc + v * W);
    const float *a = A.data;
    for (int64_t k = 0; k < K; ++k, a += A.column, B += ldb) {
        vf b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load(B + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[i][v] += a[i * A.row] * b[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(C + i * ldc + v * W, acc[i][v]);
}

#if MMT_LANES == 16
constexpr int kGemmRows = 6, kGemmVectors = 4;  // C takes 24 of 32 registers
#else
constexpr int kGemmRows = 4, kGemmVectors = 2;  // C takes 8 of 16 registers
#endif

template <int V>
static void gemm_columns(float *C, int64_t ldc, Strided A, const float *B, int64_t ldb, int64_t I, int64_t K) {
    for (; I >= kGemmRows; I -= kGemmRows, C += kGemmRows * ldc, A.data += kGemmRows * A.row)
        gemm_block<kGemmRows, V>(C, ldc, A, B, ldb, K);
    for (; I >= 2; I -= 2, C += 2 * ldc, A.data += 2 * A.row) gemm_block<2, V>(C, ldc, A, B, ldb, K);
    if (I) gemm_block<1, V>(C, ldc, A, B, ldb, K);
}

// C (I, J) += A (I, K) B (K, J); J is a multiple of W.
static void gemm(float *C, int64_t ldc, const Strided &A, const float *B, int64_t ldb, int64_t I, int64_t J, int64_t K) {
    int64_t j = 0;
    for (; j + kGemmVectors * W <= J; j += kGemmVectors * W) gemm_columns<kGemmVectors>(C + j, ldc, A, B + j, ldb, I, K);
    switch ((J - j) / W) {
#if MMT_LANES == 16
        case 3: gemm_columns<3>(C + j, ldc, A, B + j, ldb, I, K); break;
        case 2: gemm_columns<2>(C + j, ldc, A, B + j, ldb, I, K); break;
#endif
        case 1: gemm_columns<1>(C + j, ldc, A, B + j, ldb, I, K); break;
        default: break;
    }
}

}  // namespace MMT_ISA
