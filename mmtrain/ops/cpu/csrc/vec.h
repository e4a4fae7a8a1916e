// Vectors of W floats (with the compiler's vector extensions), and the functions on them that the kernels need.
// Everything here has internal linkage, because this header is compiled several times with different -m flags.
#pragma once
#include <stdint.h>
#include <string.h>

#include <utility>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#define MMT_INLINE static inline __attribute__((always_inline))

namespace MMT_ISA {

constexpr int W = MMT_LANES;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));

MMT_INLINE vf splat(float x) { return x - vf{}; }
MMT_INLINE vf load(const float *p) { return *reinterpret_cast<const vf_unaligned *>(p); }
MMT_INLINE void store(float *p, vf v) { *reinterpret_cast<vf_unaligned *>(p) = v; }

// Load the first n < W elements. The other lanes are 0, and memory after the n elements is not accessed.
MMT_INLINE vf load_first(const float *p, int n) {
#if MMT_LANES == 16
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vf v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
}

MMT_INLINE void store_first(float *p, vf v, int n) {
#if MMT_LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// bfloat16 is the upper half of a float. It is converted to float when loaded, and rounded to nearest even when stored.
MMT_INLINE vf load(const uint16_t *p) {
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh *>(p), vu) << 16);
}
MMT_INLINE void store(uint16_t *p, vf v) {
    const vu bits = (vu)v, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const vu kept = v == v ? rounded : 0x7FC0u - vu{};
    *reinterpret_cast<vh *>(p) = __builtin_convertvector(kept, vh);
}
MMT_INLINE vf load_first(const uint16_t *p, int n) {
    uint16_t some[W] = {};
    memcpy(some, p, n * sizeof *p);
    return load(some);
}
MMT_INLINE void store_first(uint16_t *p, vf v, int n) {
    uint16_t some[W];
    store(some, v);
    memcpy(p, some, n * sizeof *p);
}

// The same for one element.
MMT_INLINE float widened(float x) { return x; }
MMT_INLINE float widened(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
MMT_INLINE void put(float *p, float x) { *p = x; }
MMT_INLINE void put(uint16_t *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *p = x == x ? (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16) : 0x7FC0u;
}

// permute<Pattern>(a, b): lane i of the result is lane Pattern::at(i) of the 2W lanes of a and b.
template <class Pattern, int... I>
MMT_INLINE vf permute_impl(vf a, vf b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Pattern::at(I)...);
#else
    return __builtin_shuffle(a, b, vi{Pattern::at(I)...});
#endif
}

template <class Pattern>
MMT_INLINE vf permute(vf a, vf b) {
    return permute_impl<Pattern>(a, b, std::make_integer_sequence<int, W>{});
}

struct InterleaveLow {
    static constexpr int at(int i) { return (i & 1 ? W : 0) + i / 2; }
};
struct InterleaveHigh {
    static constexpr int at(int i) { return InterleaveLow::at(i) + W / 2; }
};

// Transpose W vectors of W lanes by log2(W) rounds of perfect shuffles.
MMT_INLINE void transpose(vf (&v)[W]) {
#pragma GCC unroll 8
    for (int round = 1; round < W; round *= 2) {
        vf next[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            next[2 * i] = permute<InterleaveLow>(v[i], v[i + W / 2]);
            next[2 * i + 1] = permute<InterleaveHigh>(v[i], v[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = next[i];
    }
}

template <int Distance>
struct Keep {
    static constexpr int at(int i) { return i & Distance ? W + i : i; }
};
template <int Distance>
struct Cross {
    static constexpr int at(int i) { return i & Distance ? W + i - Distance : i + Distance; }
};

// One round of a transposed reduction: add lanes that differ in bit `Distance` of their index. Lanes in which the bit is 0
// get the sums of a, the others those of b.
template <int Distance>
MMT_INLINE vf pair_sum(vf a, vf b) {
    return permute<Keep<Distance>>(a, b) + permute<Cross<Distance>>(a, b);
}

// Within each 128 bits, interleave elements (UnpackOne) or pairs of elements (UnpackTwo) of a and b, from index First.
template <int First>
struct UnpackOne {
    static constexpr int at(int i) { return (i & 1 ? W : 0) + i / 4 * 4 + First + (i & 3) / 2; }
};
template <int First>
struct UnpackTwo {
    static constexpr int at(int i) { return (i & 2 ? W : 0) + i / 4 * 4 + First + (i & 1); }
};

// Lane i of the result is a partial sum of vector i % 4. All shuffles are within 128 bits, which are the cheapest.
MMT_INLINE vf partial_sums(vf a, vf b, vf c, vf d) {
    const vf ab = permute<UnpackOne<0>>(a, b) + permute<UnpackOne<2>>(a, b);
    const vf cd = permute<UnpackOne<0>>(c, d) + permute<UnpackOne<2>>(c, d);
    return permute<UnpackTwo<0>>(ab, cd) + permute<UnpackTwo<2>>(ab, cd);
}

// 2^x within 1 ulp for results in the normal range; 0 below, inf above; NaN remains NaN. The polynomial (relative minimax
// on [-1/2, 1/2], error 2e-9) has constant term exactly 1, so that decays close to 1 have no systematic error.
MMT_INLINE vf exp2_fraction(vf f) {
    vf p = splat(0.000153533619596f);
    p = p * f + splat(0.00133988750167f);
    p = p * f + splat(0.00961843691766f);
    p = p * f + splat(0.0555033236742f);
    p = p * f + splat(0.240226477385f);
    p = p * f + splat(0.693147182465f);
    return p * f + splat(1.0f);
}

MMT_INLINE vf vmax(vf a, float b) { return a < b ? splat(b) : a; }  // NaN in a remains NaN
MMT_INLINE vf vmin(vf a, float b) { return a > b ? splat(b) : a; }

// 2^x = 2^fraction * 2^r with r = round(x). Without AVX-512, adding a magic number rounds, for which SSE2 is sufficient.
#if MMT_LANES == 16
MMT_INLINE vf round_fraction(vf x, vf &fraction) {
    fraction = (vf)_mm512_reduce_ps((__m512)x, 0x08);  // x - rint(x); 0 for infinities
    return x - fraction;
}
MMT_INLINE vf scale(vf p, vf r) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)r); }
MMT_INLINE vf clamp_exponent(vf x) { return x; }  // scalef saturates
#else
MMT_INLINE vf round_fraction(vf x, vf &fraction) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    vf r = (x + magic) - magic;
    fraction = x - r;
    return r;
}
MMT_INLINE vf scale(vf p, vf r) {
    vf biased = r + (12582912.0f + 127.0f);  // the low 8 bits of its representation are r + 127, the exponent field of 2^r
    return p * (vf)((vi)biased << 23);
}
MMT_INLINE vf clamp_exponent(vf x) { return vmin(vmax(x, -127.0f), 128.0f); }  // scale() returns 0 and inf at these limits
#endif

MMT_INLINE vf exp2(vf x) {
    vf fraction;
    vf r = round_fraction(clamp_exponent(x), fraction);
    return scale(exp2_fraction(fraction), r);
}

// e^x for x <= 0, within 2 ulp everywhere by exact reduction of the argument (Cody and Waite).
MMT_INLINE vf exp_nonpositive(vf x) {
    x = vmax(x, -87.0f);
    vf fraction;
    vf r = round_fraction(x * 1.44269504f, fraction);
    fraction = ((x - r * 0.693145752f) - r * 1.42860677e-6f) * 1.44269504f;
    return scale(exp2_fraction(fraction), r);
}

MMT_INLINE vf vabs(vf x) { return x < 0.0f ? -x : x; }

MMT_INLINE vf sigmoid(vf x) {
    vf e = exp_nonpositive(-vabs(x));
    return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p(e) = 2 atanh(e / (2 + e)), which has no cancellation for small e.
MMT_INLINE vf softplus_of(vf x, vf e) {  // e = e^-|x|
    vf s = e / (2.0f + e);
    vf z = s * s;
    vf q = splat(0.121447794139f);
    q = q * z + splat(0.107153706253f);
    q = q * z + splat(0.143082976341f);
    q = q * z + splat(0.199994444847f);
    q = q * z + splat(0.333333373070f);
    return vmax(x, 0.0f) + 2.0f * (s + s * z * q);
}

MMT_INLINE vf softplus(vf x) { return softplus_of(x, exp_nonpositive(-vabs(x))); }

// softplus and its derivative, the sigmoid, from one exponential.
MMT_INLINE vf softplus_and_slope(vf x, vf &slope) {
    vf e = exp_nonpositive(-vabs(x));
    slope = (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
    return softplus_of(x, e);
}

// Flush subnormal numbers to zero while a kernel runs. Decaying states become subnormal, which is 100 times slower.
struct FlushSubnormals {
#if defined(__SSE__)
    unsigned saved;
    FlushSubnormals() : saved(_mm_getcsr()) { _mm_setcsr(saved | 0x8040u); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#else
    FlushSubnormals() {}
    ~FlushSubnormals() {}
#endif
};

}  // namespace MMT_ISA
