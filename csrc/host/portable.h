// What simd.h, math.h and philox.h ask of a processor, in the vector extensions of GCC and Clang alone.
#pragma once

namespace fastvae {
namespace FASTVAE_ISA {

FASTVAE_INLINE Float if_negative(Float x, Float a, Float b) { return (Int)x < 0 ? a : b; }
FASTVAE_INLINE Float reciprocal_above_one(Float x) { return 1.0f / x; }
FASTVAE_INLINE Float square_root(Float x) {
    for (int k = 0; k < lanes_of<Float>::COUNT; ++k) x[k] = std::sqrt(x[k]);
    return x;
}

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
    return over_255(x);
}
FASTVAE_INLINE Float load(const bfloat16* pointer, Float) { return (Float)(widen(pointer) << 16); }
FASTVAE_INLINE void store(bfloat16* pointer, Float x) { store_low_halves(pointer, (Int)(rounded_to_half(x) >> 16)); }
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

// Both words of a·b.
FASTVAE_INLINE void multiply_wide(Unsigned a, uint32_t b, Unsigned& high, Unsigned& low) {
    low = a * b;
    for (int k = 0; k < lanes_of<Float>::COUNT; ++k) high[k] = static_cast<uint32_t>(uint64_t{a[k]} * b >> 32);
}

// The first of each, the second of each, …
FASTVAE_INLINE void store_interleaved(float* to, Float n0, Float n1, Float n2, Float n3) {
    for (int k = 0; k < lanes_of<Float>::COUNT; ++k) {
        to[4 * k] = n0[k];
        to[4 * k + 1] = n1[k];
        to[4 * k + 2] = n2[k];
        to[4 * k + 3] = n3[k];
    }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
