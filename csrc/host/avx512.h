// What simd.h, math.h and philox.h ask of a processor, in AVX-512 (F, BW, DQ, VL).
#pragma once

#define FASTVAE_OWN_EXP

namespace fastvae {
namespace FASTVAE_ISA {

FASTVAE_INLINE Float at_least(Float low, Float x) { return _mm512_max_ps(low, x); }
FASTVAE_INLINE Float at_most(Float high, Float x) { return _mm512_min_ps(high, x); }
FASTVAE_INLINE Float if_negative(Float x, Float a, Float b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)x), b, a);
}
// 1/x for x ≥ 1, within 2 ulp: the processor's 14 bits and one step of Newton's, which is exact for x = 1: 1 − 2⁻²⁸ is 1.
FASTVAE_INLINE Float reciprocal_above_one(Float x) {
    const Float guess = _mm512_rcp14_ps(x);
    return guess + guess * (1.0f - x * guess);
}
FASTVAE_INLINE Float square_root(Float x) { return _mm512_sqrt_ps(x); }

constexpr float SIXTEENTHS = 786432.0f;  // 1.5·2¹⁹: adding it rounds to sixteenths, whose count then sits in the low bits
// e^x for x in [-104, 89], within 2 ulp where that is a normal number. With x = (n + f)·ln 2, n a count of sixteenths and
// |f| ≤ 1/32: 2 to what n has after the point from a table, e^(f·ln 2) by three terms, and 2 to the rest by the processor,
// which rounds once, and to 0 or ∞.
FASTVAE_INLINE Float exp_of_bounded(Float x) {
    const Float table = {1.0f,         1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                         1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903319f,
                         1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};
    const Float shifted = x * 1.4426950408889634f + SIXTEENTHS, n = shifted - SIXTEENTHS;
    const Float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    const Float power = _mm512_permutexvar_ps((__m512i)shifted, table);  // by the low four bits
    const Float growth = ((1.6666667163e-1f * r + 0.5f) * r + 1.0f) * r;
    return _mm512_scalef_ps(power + power * growth, n);
}
// e^x for x ≤ 0, e^-87 below -87.
FASTVAE_INLINE Float exp_negative(Float x) { return exp_of_bounded(at_least(Float{} - 87.0f, x)); }
// e^x for any x.
FASTVAE_INLINE Float exp(Float x) { return exp_of_bounded(at_most(Float{} + 89.0f, at_least(Float{} - 104.0f, x))); }

// The number of each lane, times a factor.
FASTVAE_INLINE Int lanes(int factor) { return Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * factor; }

// x/255 rounded to nearest. The byte x at all four places of a word is x/255·(2³² − 1). Its first 24 bits are x/255 rounded
// down, and what is left is more than half of the last of them, unless x is 0: rounded up it is rounded to nearest.
FASTVAE_INLINE Float from_bytes(__m128i bytes) {
    const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), (__m512i)lanes(0x01010101));
    return _mm512_cvt_roundepu32_ps(words, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC) * 0x1p-32f;
}
FASTVAE_INLINE Float from_bfloat16(__m256i halves) {
    const __m512i upper = (__m512i)lanes(1 << 16);
    return (Float)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, _mm512_castsi256_si512(halves));
}
FASTVAE_INLINE __m256i to_bfloat16(Float x) {
#if defined(__clang__) || __GNUC__ >= 10
    // one instruction does it, where it is there; but it takes a subnormal number for 0
    constexpr int SUBNORMAL = 0x20;
    if (__builtin_expect(__builtin_cpu_supports("avx512bf16") && _mm512_fpclass_ps_mask(x, SUBNORMAL) == 0, 1)) {
        __m256i halves;
        __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
        return halves;
    }
#endif
    const __m512i odd = (__m512i)(lanes(0x00040004) + 0x00030001);  // 1, 3, 5, … in its lower half
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, (__m512i)rounded_to_half(x)));
}
FASTVAE_INLINE __m256i to_float16(Float x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

FASTVAE_INLINE Float load(const uint8_t* pointer, Float) { return from_bytes(read<__m128i>(pointer)); }
FASTVAE_INLINE Float load(const bfloat16* pointer, Float) { return from_bfloat16(read<__m256i>(pointer)); }
FASTVAE_INLINE Float load(const float16* pointer, Float) { return _mm512_cvtph_ps(read<__m256i>(pointer)); }
FASTVAE_INLINE void store(bfloat16* pointer, Float x) { _mm256_storeu_si256((__m256i*)pointer, to_bfloat16(x)); }
FASTVAE_INLINE void store(float16* pointer, Float x) { _mm256_storeu_si256((__m256i*)pointer, to_float16(x)); }

// Words in 64-bit lanes, those in even places and those in odd ones: Philox takes fewer instructions there. A product is of the
// lower halves, and what is left in the upper ones nobody reads.
#define FASTVAE_WIDE_WORDS
using Wide = FASTVAE_VECTOR(uint64_t, FASTVAE_VECTOR_BYTES);
FASTVAE_INLINE Wide even_words(Unsigned words) { return (Wide)words; }
FASTVAE_INLINE Wide odd_words(Unsigned words) { return (Wide)words >> 32; }
FASTVAE_INLINE Unsigned all_words(Wide even, Wide odd) {
    return (Unsigned)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, (__m512i)(odd << 32));
}
FASTVAE_INLINE void multiply_wide(Wide a, uint32_t b, Wide& high, Wide& low) {
    low = (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
    high = low >> 32;
}

// The first of each, the second of each, …
FASTVAE_INLINE void store_interleaved(float* to, Float n0, Float n1, Float n2, Float n3) {
    const __m512 a = _mm512_unpacklo_ps(n0, n1), b = _mm512_unpackhi_ps(n0, n1);
    const __m512 c = _mm512_unpacklo_ps(n2, n3), d = _mm512_unpackhi_ps(n2, n3);
    const auto low = [](__m512 x, __m512 y) FASTVAE_LAMBDA {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto high = [](__m512 x, __m512 y) FASTVAE_LAMBDA {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    // q0 holds all of places 0, 4, 8 and 12, q1 of 1, 5, 9 and 13, …: quarters are brought into order
    const __m512 q0 = low(a, c), q1 = high(a, c), q2 = low(b, d), q3 = high(b, d);
    const __m512 first = _mm512_shuffle_f32x4(q0, q1, 0x44), second = _mm512_shuffle_f32x4(q2, q3, 0x44);
    const __m512 third = _mm512_shuffle_f32x4(q0, q1, 0xee), fourth = _mm512_shuffle_f32x4(q2, q3, 0xee);
    _mm512_storeu_ps(to, _mm512_shuffle_f32x4(first, second, 0x88));
    _mm512_storeu_ps(to + 16, _mm512_shuffle_f32x4(first, second, 0xdd));
    _mm512_storeu_ps(to + 32, _mm512_shuffle_f32x4(third, fourth, 0x88));
    _mm512_storeu_ps(to + 48, _mm512_shuffle_f32x4(third, fourth, 0xdd));
}

// The last elements of a row under a mask: what lies beyond is neither read nor written.
FASTVAE_INLINE __mmask16 mask_of(int count) { return static_cast<__mmask16>((1u << count) - 1); }
FASTVAE_INLINE Float load_first(const float* pointer, int count, Float) {
    return _mm512_maskz_loadu_ps(mask_of(count), pointer);
}
FASTVAE_INLINE Float load_first(const uint8_t* pointer, int count, Float) {
    return from_bytes(_mm_maskz_loadu_epi8(mask_of(count), pointer));
}
FASTVAE_INLINE Float load_first(const bfloat16* pointer, int count, Float) {
    return from_bfloat16(_mm256_maskz_loadu_epi16(mask_of(count), pointer));
}
FASTVAE_INLINE Float load_first(const float16* pointer, int count, Float) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(count), pointer));
}
FASTVAE_INLINE void store_first(float* pointer, int count, Float x) {
    _mm512_mask_storeu_ps(pointer, mask_of(count), x);
}
FASTVAE_INLINE void store_first(bfloat16* pointer, int count, Float x) {
    _mm256_mask_storeu_epi16(pointer, mask_of(count), to_bfloat16(x));
}
FASTVAE_INLINE void store_first(float16* pointer, int count, Float x) {
    _mm256_mask_storeu_epi16(pointer, mask_of(count), to_float16(x));
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
