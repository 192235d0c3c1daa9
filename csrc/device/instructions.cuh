// The PTX instructions C++ has no name for. A header guard, so that who defines it first brings instructions of their own:
// tests/cuda_emulator/.
#ifndef FASTVAE_INSTRUCTIONS
#define FASTVAE_INSTRUCTIONS

#include <cstdint>

namespace fastvae {
namespace device {

// 2^x, within 2 ulp; subnormals are zero.
__device__ __forceinline__ float ex2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
// log₂ x: 2⁻²² absolute for x in [½, 2], relative outside.
__device__ __forceinline__ float lg2_approx(float x) {
    asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
// sin x and cos x for x in [-π, π]: 2⁻²⁰·⁵ absolute.
__device__ __forceinline__ float sin_approx(float x) {
    asm("sin.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ __forceinline__ float cos_approx(float x) {
    asm("cos.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
// Both words of a·b. In C++ the compiler adds a zero to the high one.
__device__ __forceinline__ void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
    asm("{ .reg .b64 product; mul.wide.u32 product, %2, %3; mov.b64 {%1, %0}, product; }" : "=r"(high), "=r"(low)
        : "r"(a), "r"(b));
}
// √x, within 1 ulp; subnormals are zero.
__device__ __forceinline__ float sqrt_approx(float x) {
    asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
// *to = x in one instruction, because the compiler may write an assignment in parts.
__device__ __forceinline__ void write_16_bytes(uint4* to, const uint4& x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}

}  // namespace device
}  // namespace fastvae

#endif
