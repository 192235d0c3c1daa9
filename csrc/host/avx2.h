// What simd.h, math.h and philox.h ask of a processor, in AVX2, FMA and F16C.
#pragma once

namespace fastvae {
namespace FASTVAE_ISA {

// math.h's, in one instruction, which the compiler dare not choose.
FASTVAE_INLINE Float at_least(Float low, Float x) { return _mm256_max_ps(low, x); }
FASTVAE_INLINE Float at_most(Float high, Float x) { return _mm256_min_ps(high, x); }
FASTVAE_INLINE Float if_negative(Float x, Float a, Float b) { return _mm256_blendv_ps(b, a, x); }
// 1/x for x ≥ 1, within 2 ulp: the processor's 12 bits and one step, a third of a division's time. The step is of the third
// order: Newton's own ends at 1 − 2⁻²⁴ for x = 1, and a saturated sigmoid must be 1.
FASTVAE_INLINE Float reciprocal_above_one(Float x) {
    const Float guess = _mm256_rcp_ps(x), error = 1.0f - x * guess;
    return guess + guess * (error + error * error);
}
FASTVAE_INLINE Float square_root(Float x) { return _mm256_sqrt_ps(x); }

FASTVAE_INLINE Int widen(const void* pointer) { return (Int)_mm256_cvtepu16_epi32(read<__m128i>(pointer)); }
FASTVAE_INLINE void store_low_halves(void* pointer, Int words) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)words, (__m256i)words), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(pointer), _mm256_castsi256_si128(packed));
}
FASTVAE_INLINE Float load(const uint8_t* pointer, Float) {
    return over_255(to_float((Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pointer)))));
}
FASTVAE_INLINE Float load(const bfloat16* pointer, Float) { return (Float)(widen(pointer) << 16); }
FASTVAE_INLINE void store(bfloat16* pointer, Float x) { store_low_halves(pointer, (Int)(rounded_to_half(x) >> 16)); }
FASTVAE_INLINE Float load(const float16* pointer, Float) { return _mm256_cvtph_ps(read<__m128i>(pointer)); }
FASTVAE_INLINE void store(float16* pointer, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(pointer), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// Both words of a·b.
FASTVAE_INLINE void multiply_wide(Unsigned a, uint32_t b, Unsigned& high, Unsigned& low) {
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(b)), words = (__m256i)a;
    const __m256i even = _mm256_mul_epu32(words, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), factor);
    high = (Unsigned)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (Unsigned)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}

// The first of each, the second of each, …
FASTVAE_INLINE void store_interleaved(float* to, Float n0, Float n1, Float n2, Float n3) {
    const __m256 a = _mm256_unpacklo_ps(n0, n1), b = _mm256_unpackhi_ps(n0, n1);
    const __m256 c = _mm256_unpacklo_ps(n2, n3), d = _mm256_unpackhi_ps(n2, n3);
    const auto pair = [](__m256 low, __m256 high, auto pick) FASTVAE_LAMBDA {
        return _mm256_castpd_ps(pick(_mm256_castps_pd(low), _mm256_castps_pd(high)));
    };
    const auto low = [](__m256d x, __m256d y) FASTVAE_LAMBDA { return _mm256_unpacklo_pd(x, y); };
    const auto high = [](__m256d x, __m256d y) FASTVAE_LAMBDA { return _mm256_unpackhi_pd(x, y); };
    const __m256 q04 = pair(a, c, low), q15 = pair(a, c, high), q26 = pair(b, d, low), q37 = pair(b, d, high);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(q04, q15, 0x20));
    _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(q26, q37, 0x20));
    _mm256_storeu_ps(to + 16, _mm256_permute2f128_ps(q04, q15, 0x31));
    _mm256_storeu_ps(to + 24, _mm256_permute2f128_ps(q26, q37, 0x31));
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
