// Host vectors: as many floats, or doubles, as one register holds, by the vector extensions of GCC and Clang. Included
// by the host loops only, which are compiled once for each instruction set, each time in a namespace of its own.
//
// A vector takes the place of `float` in math.h and likelihoods.h, so a CPU runs the formulas a GPU runs.
#pragma once

#include <cmath>
#include <cstring>

#include "../types.h"

#ifdef __AVX2__
#include <immintrin.h>
#define FASTVAE_VECTOR_BYTES 32
#else
#define FASTVAE_VECTOR_BYTES 16
#endif

#define FASTVAE_INLINE inline __attribute__((always_inline))
#define FASTVAE_VECTOR(T, BYTES) T __attribute__((vector_size(BYTES)))
#define FASTVAE_LAMBDA __attribute__((always_inline))

namespace fastvae {
namespace FASTVAE_ISA {

using Float = FASTVAE_VECTOR(float, FASTVAE_VECTOR_BYTES);
using Double = FASTVAE_VECTOR(double, FASTVAE_VECTOR_BYTES);
using Int = FASTVAE_VECTOR(int32_t, FASTVAE_VECTOR_BYTES);
using Unsigned = FASTVAE_VECTOR(uint32_t, FASTVAE_VECTOR_BYTES);
using Long = FASTVAE_VECTOR(int64_t, FASTVAE_VECTOR_BYTES);

template <class V>
struct lanes_of;
template <>
struct lanes_of<Float> {
    using scalar = float;
    using integer = Int;
    static constexpr int COUNT = FASTVAE_VECTOR_BYTES / 4;
};
template <>
struct lanes_of<Double> {
    using scalar = double;
    using integer = Long;
    static constexpr int COUNT = FASTVAE_VECTOR_BYTES / 8;
};
template <class T>
struct vector_of {
    using type = Float;
};
template <>
struct vector_of<double> {
    using type = Double;
};
// The vector elements stored as T are computed in.
template <class T>
using vector_t = typename vector_of<T>::type;

template <class V>
FASTVAE_INLINE V broadcast(typename lanes_of<V>::scalar value) {
    return V{} + value;
}
template <class V>
FASTVAE_INLINE V constant(double value) {
    return broadcast<V>(static_cast<typename lanes_of<V>::scalar>(value));
}

// What math.h asks of a number.
FASTVAE_INLINE Int as_int(Float x) { return (Int)x; }
FASTVAE_INLINE Float as_float(Int x) { return (Float)x; }
FASTVAE_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }
FASTVAE_INLINE Float negative_absolute(Float x) { return (Float)((Int)x | INT32_MIN); }
FASTVAE_INLINE Double negative_absolute(Double x) { return (Double)((Long)x | INT64_MIN); }
FASTVAE_INLINE Float absolute(Float x) { return (Float)((Int)x & 0x7fffffff); }
FASTVAE_INLINE Double absolute(Double x) { return (Double)((Long)x & 0x7fffffffffffffffll); }
#ifdef __AVX2__  // math.h's, in one instruction, which the compiler dare not choose
FASTVAE_INLINE Float at_least(Float low, Float x) { return _mm256_max_ps(low, x); }
FASTVAE_INLINE Float at_most(Float high, Float x) { return _mm256_min_ps(high, x); }
#endif
// a where the sign bit of x is set, else b.
FASTVAE_INLINE Double if_negative(Double x, Double a, Double b) { return (Long)x < 0 ? a : b; }
FASTVAE_INLINE Double reciprocal_above_one(Double x) { return 1.0 / x; }
#ifdef __AVX2__
FASTVAE_INLINE Float if_negative(Float x, Float a, Float b) { return _mm256_blendv_ps(b, a, x); }
// 1/x for x ≥ 1, within 2 ulp: the processor's 12 bits and one step, a third of a division's time. The step is of the third
// order: Newton's own ends at 1 − 2⁻²⁴ for x = 1, and a saturated sigmoid must be 1.
FASTVAE_INLINE Float reciprocal_above_one(Float x) {
    const Float guess = _mm256_rcp_ps(x), error = 1.0f - x * guess;
    return guess + guess * (error + error * error);
}
#else
FASTVAE_INLINE Float if_negative(Float x, Float a, Float b) { return (Int)x < 0 ? a : b; }
FASTVAE_INLINE Float reciprocal_above_one(Float x) { return 1.0f / x; }
#endif
FASTVAE_INLINE Float divide(Float a, Float b) { return a / b; }
FASTVAE_INLINE Double divide(Double a, Double b) { return a / b; }
FASTVAE_INLINE Float square_root(Float x) {
#ifdef __AVX2__
    return _mm256_sqrt_ps(x);
#else
    for (int k = 0; k < lanes_of<Float>::COUNT; ++k) x[k] = std::sqrt(x[k]);
    return x;
#endif
}
// float64 is for checking: libm, a lane at a time
FASTVAE_INLINE Double exp(Double x) {
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) x[k] = std::exp(x[k]);
    return x;
}
FASTVAE_INLINE Double exp_negative(Double x) { return exp(x); }
FASTVAE_INLINE Double log(Double x) {
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) x[k] = std::log(x[k]);
    return x;
}
FASTVAE_INLINE Double log_normal(Double x) { return log(x); }

template <class V>
FASTVAE_INLINE double sum(V x) {
    double total = 0;
    for (int k = 0; k < lanes_of<V>::COUNT; ++k) total += x[k];
    return total;
}
template <class I>
FASTVAE_INLINE bool any(I mask) {
    bool found = false;
    for (unsigned k = 0; k < sizeof(I) / sizeof(mask[0]); ++k) found |= mask[k] != 0;
    return found;
}
// -1 in the first `count` lanes.
template <class V>
FASTVAE_INLINE typename lanes_of<V>::integer first_lanes(int count) {
    typename lanes_of<V>::integer lane{};
    for (int k = 0; k < lanes_of<V>::COUNT; ++k) lane[k] = k;
    return lane < count;
}

// One vector from memory, of whatever type, and back; `load` overloads are told apart by their last argument.
template <class T>
FASTVAE_INLINE T read(const void* pointer) {
    T value;
    std::memcpy(&value, pointer, sizeof value);
    return value;
}
FASTVAE_INLINE Float load(const float* pointer, Float) { return read<Float>(pointer); }
FASTVAE_INLINE Double load(const double* pointer, Double) { return read<Double>(pointer); }
FASTVAE_INLINE void store(float* pointer, Float x) { std::memcpy(pointer, &x, sizeof x); }
FASTVAE_INLINE void store(double* pointer, Double x) { std::memcpy(pointer, &x, sizeof x); }
FASTVAE_INLINE Double load(const float* pointer, Double) {
    Double x;
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) x[k] = pointer[k];
    return x;
}
FASTVAE_INLINE Double load(const uint8_t* pointer, Double) {
    Double x;
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) x[k] = pointer[k];
    return x / 255.0;
}

#ifdef __AVX2__
FASTVAE_INLINE Int widen(const void* pointer) { return (Int)_mm256_cvtepu16_epi32(read<__m128i>(pointer)); }
FASTVAE_INLINE void store_low_halves(void* pointer, Int words) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)words, (__m256i)words), 0x08);
    _mm_storeu_si128(static_cast<__m128i*>(pointer), _mm256_castsi256_si128(packed));
}
FASTVAE_INLINE Float load(const uint8_t* pointer, Float) {
    const Float x = to_float((Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pointer))));
    return x * ONE_255TH_HIGH + x * ONE_255TH_LOW;
}
#else
FASTVAE_INLINE Int widen(const void* pointer) {
    const auto* halves = static_cast<const uint16_t*>(pointer);
    Int words{};
    for (int k = 0; k < lanes_of<Float>::COUNT; ++k) words[k] = halves[k];
    return words;
}
FASTVAE_INLINE void store_low_halves(void* pointer, Int words) {
    auto* halves = static_cast<uint16_t*>(pointer);
    for (int k = 0; k < lanes_of<Float>::COUNT; ++k) halves[k] = static_cast<uint16_t>(words[k]);
}
FASTVAE_INLINE Float load(const uint8_t* pointer, Float) {
    Float x{};
    for (int k = 0; k < lanes_of<Float>::COUNT; ++k) x[k] = pointer[k];
    return x * ONE_255TH_HIGH + x * ONE_255TH_LOW;
}
#endif

FASTVAE_INLINE Float load(const bfloat16* pointer, Float) { return (Float)(widen(pointer) << 16); }
// Round to nearest even; a NaN stays one.
FASTVAE_INLINE void store(bfloat16* pointer, Float x) {
    const Unsigned word = (Unsigned)x, rounded = word + ((word >> 16) & 1) + 0x7fff;  // a NaN may wrap around
    const Unsigned chosen = x != x ? word | 0x400000 : rounded;
    store_low_halves(pointer, (Int)(chosen >> 16));
}

#ifdef __F16C__
FASTVAE_INLINE Float load(const float16* pointer, Float) { return _mm256_cvtph_ps(read<__m128i>(pointer)); }
FASTVAE_INLINE void store(float16* pointer, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(pointer), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Multiplying by 2^112 moves the exponent from one bias to the other, subnormals included.
FASTVAE_INLINE Float load(const float16* pointer, Float) {
    const Int half = widen(pointer), sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
    const Float value = (Float)magnitude * 0x1p112f;
    const Int bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : (Int)value;
    return (Float)(bits | sign);
}
// Round to nearest even: adding a power of two makes the hardware drop the right number of bits.
FASTVAE_INLINE void store(float16* pointer, Float x) {
    const Int word = (Int)x, sign = (Int)((Unsigned)word >> 16) & 0x8000, magnitude = word & 0x7fffffff;
    const Int subnormal = (Int)((Float)magnitude + 0.5f) - 0x3f000000;
    const Unsigned from = (Unsigned)magnitude;  // a NaN may overflow a signed sum
    const Int normal = (Int)(from - 0x38000000u + 0xfffu + ((from >> 13) & 1)) >> 13;
    Int half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? Int{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? Int{} + 0x7e00 : half;
    store_low_halves(pointer, half | sign);
}
#endif

// The last elements of a row, fewer than a vector: zeros stand for the others.
template <class T, class V>
FASTVAE_INLINE V load_first(const T* pointer, int count, V like) {
    T buffer[lanes_of<V>::COUNT] = {};
    std::memcpy(buffer, pointer, count * sizeof(T));
    return load(buffer, like);
}
template <class T, class V>
FASTVAE_INLINE void store_first(T* pointer, int count, V x) {
    T buffer[lanes_of<V>::COUNT];
    store(buffer, x);
    std::memcpy(pointer, buffer, count * sizeof(T));
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
