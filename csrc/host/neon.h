// What simd.h, math.h and philox.h ask of a processor, in Arm's NEON (64 bits): the baseline there.
#pragma once

namespace fastvae {
namespace FASTVAE_ISA {

FASTVAE_INLINE float32x4_t native(Float x) { return (float32x4_t)x; }
FASTVAE_INLINE Float generic(float32x4_t x) { return (Float)x; }

// math.h's, in one instruction; of a NaN, NaN.
FASTVAE_INLINE Float at_least(Float low, Float x) { return generic(vmaxq_f32(native(low), native(x))); }
FASTVAE_INLINE Float at_most(Float high, Float x) { return generic(vminq_f32(native(high), native(x))); }
FASTVAE_INLINE Float if_negative(Float x, Float a, Float b) { return (Int)x < 0 ? a : b; }
FASTVAE_INLINE Float reciprocal_above_one(Float x) { return 1.0f / x; }
FASTVAE_INLINE Float square_root(Float x) { return generic(vsqrtq_f32(native(x))); }

FASTVAE_INLINE Int widen(const void* pointer) { return (Int)vmovl_u16(read<uint16x4_t>(pointer)); }
FASTVAE_INLINE Float load(const uint8_t* pointer, Float) {
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(read<uint32_t>(pointer)));
    return over_255(to_float((Int)vmovl_u16(vget_low_u16(vmovl_u8(bytes)))));
}
FASTVAE_INLINE Float load(const bfloat16* pointer, Float) { return (Float)(widen(pointer) << 16); }
FASTVAE_INLINE void store(bfloat16* pointer, Float x) {
    vst1_u16(reinterpret_cast<uint16_t*>(pointer), vshrn_n_u32((uint32x4_t)rounded_to_half(x), 16));
}
FASTVAE_INLINE Float load(const float16* pointer, Float) { return generic(vcvt_f32_f16(read<float16x4_t>(pointer))); }
FASTVAE_INLINE void store(float16* pointer, Float x) {
    const float16x4_t halves = vcvt_f16_f32(native(x));
    std::memcpy(pointer, &halves, sizeof halves);
}

// Both words of a·b.
FASTVAE_INLINE void multiply_wide(Unsigned a, uint32_t b, Unsigned& high, Unsigned& low) {
    const uint32x4_t words = (uint32x4_t)a;
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(words), b));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(words), b));
    low = (Unsigned)vuzp1q_u32(first, second);
    high = (Unsigned)vuzp2q_u32(first, second);
}

// The first of each, the second of each, …
FASTVAE_INLINE void store_interleaved(float* to, Float n0, Float n1, Float n2, Float n3) {
    vst4q_f32(to, {{native(n0), native(n1), native(n2), native(n3)}});
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
