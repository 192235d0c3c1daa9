// exp and log for `float` on a GPU and for vectors on a CPU. Polynomials from the Cephes library (Moshier), in fused
// multiply-adds and 32-bit integers, so that a compiler has nothing to decide. NaN in gives NaN out.
//
// On a GPU they come from the special-function units where the promise on accuracy holds at the errors NVIDIA documents for
// those; each says its error.
#pragma once

#include <cmath>
#include <type_traits>

#ifdef __CUDACC__
#include "device/instructions.cuh"
#include "types.h"
#define FASTVAE_MATH __device__ __forceinline__
#else
#include "host/simd.h"
#define FASTVAE_MATH FASTVAE_INLINE
#endif

namespace fastvae {
namespace FASTVAE_ISA {

// The larger (smaller) of a constant and x; x where that is a NaN.
template <class V>
FASTVAE_MATH V at_least(V low, V x) {
    return low > x ? low : x;
}
template <class V>
FASTVAE_MATH V at_most(V high, V x) {
    return high < x ? high : x;
}

#ifdef __CUDACC__
// What the functions below ask of a number, for one number.
template <class V>
FASTVAE_MATH V constant(double value) {
    return static_cast<V>(value);
}
FASTVAE_MATH int as_int(float x) { return __float_as_int(x); }
FASTVAE_MATH float as_float(int x) { return __int_as_float(x); }
FASTVAE_MATH float to_float(int x) { return static_cast<float>(x); }
// a − b, modulo 2³².
FASTVAE_MATH int wrapping_minus(int a, int b) { return static_cast<int>(static_cast<unsigned>(a) - static_cast<unsigned>(b)); }
// 2ⁿ for n from -127, which gives 0, to 128.
FASTVAE_MATH float power_of_two(int n) { return as_float(static_cast<int>(static_cast<unsigned>(n + 127) << 23)); }
FASTVAE_MATH float negative_absolute(float x) { return -fabsf(x); }
FASTVAE_MATH double negative_absolute(double x) { return -fabs(x); }
FASTVAE_MATH float absolute(float x) { return fabsf(x); }
FASTVAE_MATH double absolute(double x) { return fabs(x); }
FASTVAE_MATH float positive_part(float x) { return fmaxf(x, 0.0f); }
FASTVAE_MATH double positive_part(double x) { return fmax(x, 0.0); }
template <class V>
FASTVAE_MATH V if_negative(V x, V a, V b) {
    return x < V(0) ? a : b;
}
FASTVAE_MATH float divide(float a, float b) { return __fdividef(a, b); }  // 2 ulp
FASTVAE_MATH double divide(double a, double b) { return a / b; }
FASTVAE_MATH float reciprocal(float x) { return __frcp_rn(x); }
FASTVAE_MATH double reciprocal(double x) { return 1 / x; }
template <class V>
FASTVAE_MATH V reciprocal_above_one(V x) {
    return divide(V(1), x);
}
FASTVAE_MATH double exp(double x) { return ::exp(x); }
FASTVAE_MATH double exp_negative(double x) { return ::exp(x); }
FASTVAE_MATH double log(double x) { return ::log(x); }
FASTVAE_MATH double log_normal(double x) { return ::log(x); }
FASTVAE_MATH float square_root(float x) { return ::sqrtf(x); }
FASTVAE_MATH double square_root(double x) { return ::sqrt(x); }
template <class V>
constexpr bool SINGLE = std::is_same_v<V, float>;
#else
template <class V>
constexpr bool SINGLE = std::is_same_v<V, Float>;
FASTVAE_MATH Float power_of_two(Int n) { return as_float((n + 127) << 23); }
template <class V>
FASTVAE_MATH V positive_part(V x) {
    return at_least(V{}, x);
}
template <class V>
FASTVAE_MATH V reciprocal(V x) {
    return divide(constant<V>(1), x);
}
#endif

template <class V>
FASTVAE_MATH V polynomial(V, V c0) {
    return c0;
}
// c0·xⁿ + c1·xⁿ⁻¹ + …
template <class V, class... C>
FASTVAE_MATH V polynomial(V x, V c0, V c1, C... c) {
    return polynomial(x, c0 * x + c1, c...);
}

// e^r for r within ±½ln 2, in pairs: half the latency of one long chain.
template <class V>
FASTVAE_MATH V exp_mantissa(V r) {
    const V square = r * r;
    const V low = 1.6666665459e-1f * r + 5.0000001201e-1f, middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
    const V high = 1.9875691500e-4f * r + 1.3981999507e-3f;
    return (((high * square + middle) * square + low) * square + r) + 1.0f;
}

constexpr float LOG2_E = 1.4426950408889634f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
constexpr float MAGIC = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, which then sits in the low bits
constexpr int MAGIC_BITS = 0x4B400000;

// e^x for any x, within 2 ulp where that is a normal number: below 88.72 finite, above it infinite, and 0 below -104.
template <class V>
FASTVAE_MATH V exp_polynomial(V x) {
    // at these ends the product with 2^n has overflowed, or rounded to 0, by itself
    x = at_most(constant<V>(89), at_least(constant<V>(-104), x));
    const V shifted = x * LOG2_E + MAGIC, n = shifted - MAGIC;
    const V r = x - n * LN2_HIGH - n * LN2_LOW;
    // 2^n in two factors: n is from -150 to 128
    const auto exponent = as_int(shifted) - MAGIC_BITS, half = exponent >> 1;
    return exp_mantissa(r) * power_of_two(half) * power_of_two(exponent - half);
}

// log x for a positive normal x; within 1 ulp. Anything else gives something finite or NaN.
template <class V>
FASTVAE_MATH V log_normal_polynomial(V x) {
    const auto word = as_int(x);
    const auto e = wrapping_minus(word, 0x3f3504f3) >> 23;
    const V r = as_float(wrapping_minus(word, e * (1 << 23))) - 1.0f;
    const V p = polynomial(r, constant<V>(7.0376836292e-2), constant<V>(-1.1514610310e-1), constant<V>(1.1676998740e-1),
                           constant<V>(-1.2420140846e-1), constant<V>(1.4249322787e-1), constant<V>(-1.6668057665e-1),
                           constant<V>(2.0000714765e-1), constant<V>(-2.4999993993e-1), constant<V>(3.3333331174e-1));
    const V n = to_float(e), square = r * r;
    // x − x carries a NaN through the bit pattern
    return (r + (r * square * p + n * -2.12194440e-4f - 0.5f * square)) + n * 0.693359375f + (x - x);
}

#ifdef __CUDACC__

FASTVAE_MATH float log_normal(float x) { return log_normal_polynomial(x); }

FASTVAE_MATH float exp(float x) { return exp_polynomial(x); }
// The same for x in half precision, relative error 2⁻²²: what x·log₂e and log₂e itself are rounded by is put back.
FASTVAE_MATH float exp_narrow(float x) {
    constexpr float LOG2_E_LOW = 1.92596298909109e-08f, LN_2 = 0.6931471805599453f;
    const float power = x * LOG2_E, lost = fmaf(x, LOG2_E, -power) + x * LOG2_E_LOW;
    const float value = ex2_approx(power), corrected = value + value * lost * LN_2;
    return corrected == corrected ? corrected : value;  // ∞ − ∞ where x or e^x is infinite
}
// e^x for x ≤ 0; absolute error about 2⁻²³, 0 below -87.
FASTVAE_MATH float exp_negative(float x) { return ex2_approx(x * 1.4426950408889634f); }
// log x for x ≥ 0; absolute error 2⁻²² for x in [½, 2], 2 ulp outside; −∞ at 0.
FASTVAE_MATH float log(float x) { return __logf(x); }

#else

#ifndef FASTVAE_OWN_EXP
// e^x for x from -87 to 88, NaN or not; within 2 ulp.
FASTVAE_INLINE Float exp_of_bounded(Float x) {
    const Float shifted = x * LOG2_E + MAGIC, n = shifted - MAGIC;
    const Float r = x - n * LN2_HIGH - n * LN2_LOW;
    return exp_mantissa(r) * power_of_two(as_int(shifted) - MAGIC_BITS);
}
// e^x for x ≤ 0, e^-87 below -87; within 2 ulp.
FASTVAE_INLINE Float exp_negative(Float x) { return exp_of_bounded(at_least(constant<Float>(-87), x)); }
FASTVAE_INLINE Float exp(Float x) { return exp_polynomial(x); }
#endif
FASTVAE_INLINE Float log_normal(Float x) { return log_normal_polynomial(x); }
// log x for x ≥ 0, subnormals included; about -104 at 0, be it positive or negative.
FASTVAE_INLINE Float log(Float x) {
    const auto small = x < 1.17549435e-38f;
    return log_normal_polynomial(absolute(small ? x * 8388608.0f : x)) - (small ? Float{} + 15.942385f : Float{});
}

#endif

}  // namespace FASTVAE_ISA
}  // namespace fastvae
