// Host vectors: as many floats, or doubles, as one register holds, by the vector extensions of GCC and Clang. Included
// by the host loops only, which are compiled once for each instruction set, each time in a namespace of its own.
//
// A vector takes the place of `float` in math.h and likelihoods.h, so a CPU runs the formulas a GPU runs.
#pragma once

#include <cmath>
#include <cstring>

#include "../types.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define FASTVAE_VECTOR_BYTES 64
#elif defined(__AVX2__)
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
// a − b, modulo 2³²; b in a register, or one number.
template <class B>
FASTVAE_INLINE Int wrapping_minus(Int a, B b) {
    return (Int)((Unsigned)a - (Unsigned)(Int{} + b));
}
FASTVAE_INLINE Float negative_absolute(Float x) { return (Float)((Int)x | INT32_MIN); }
FASTVAE_INLINE Double negative_absolute(Double x) { return (Double)((Long)x | INT64_MIN); }
FASTVAE_INLINE Float absolute(Float x) { return (Float)((Int)x & 0x7fffffff); }
FASTVAE_INLINE Double absolute(Double x) { return (Double)((Long)x & 0x7fffffffffffffffll); }
// a where the sign bit of x is set, else b.
FASTVAE_INLINE Double if_negative(Double x, Double a, Double b) { return (Long)x < 0 ? a : b; }
FASTVAE_INLINE Double reciprocal_above_one(Double x) { return 1.0 / x; }
FASTVAE_INLINE Float divide(Float a, Float b) { return a / b; }
FASTVAE_INLINE Double divide(Double a, Double b) { return a / b; }
// float64 is for checking: libm, a lane at a time
FASTVAE_INLINE Double exp(Double x) {
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) x[k] = std::exp(x[k]);
    return x;
}
FASTVAE_INLINE Double exp_of_bounded(Double x) { return exp(x); }
FASTVAE_INLINE Double exp_negative(Double x) { return exp(x); }
FASTVAE_INLINE Double log(Double x) {
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) x[k] = std::log(x[k]);
    return x;
}
FASTVAE_INLINE Double log_normal(Double x) { return log(x); }
FASTVAE_INLINE Double square_root(Double x) {
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) x[k] = std::sqrt(x[k]);
    return x;
}
FASTVAE_INLINE Long to_integer(Double x) { return __builtin_convertvector(x, Long); }
FASTVAE_INLINE Int to_integer(Float x) { return __builtin_convertvector(x, Int); }
FASTVAE_INLINE Double to_float(Long x) { return __builtin_convertvector(x, Double); }

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
FASTVAE_INLINE Float over_255(Float x) { return x * ONE_255TH_HIGH + x * ONE_255TH_LOW; }
// x rounded to bfloat16, which is the upper half of each word: to nearest even; a NaN stays one.
FASTVAE_INLINE Unsigned rounded_to_half(Float x) {
    const Unsigned word = (Unsigned)x, rounded = word + ((word >> 16) & 1) + 0x7fff;  // a NaN may wrap around
    return x != x ? word | 0x400000 : rounded;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae

// What each instruction set does in its own way: the same functions in each file.
#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "neon.h"
#else
#include "portable.h"
#endif

namespace fastvae {
namespace FASTVAE_ISA {

// The same for what is walked from end to end, with a word to the memory about what is read or written next. A processor looks
// ahead by itself, but only to the end of a page, and arithmetic between loads leaves it few of them to go by.
constexpr int AHEAD = 2048;  // bytes
template <class T, class V>
FASTVAE_INLINE V load_ahead(const T* pointer, V like) {
    __builtin_prefetch(reinterpret_cast<const char*>(pointer) + AHEAD, 0);
    return load(pointer, like);
}
template <class T, class V>
FASTVAE_INLINE void store_ahead(T* pointer, V x) {
    __builtin_prefetch(reinterpret_cast<const char*>(pointer) + AHEAD, 1);
    store(pointer, x);
}

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
