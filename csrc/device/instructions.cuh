// The PTX instructions C++ has no name for. A header guard, so that who defines it first brings instructions of their own:
// tests/cuda_emulator/.
#ifndef FASTVAE_INSTRUCTIONS
#define FASTVAE_INSTRUCTIONS

namespace fastvae {
namespace device {

// 2^x, within 2 ulp; subnormals are zero.
__device__ __forceinline__ float ex2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
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
