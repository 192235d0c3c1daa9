// CUDA C++ on a CPU, for tests: what csrc/device/ asks of the language, of the runtime and of CUB. Included before each file.
//
// A thread of a block is a fiber, blocks run one after another. What a GPU leaves open is drawn (EMU_ORDER, EMU_SEED), what
// it forbids is an error of the launch: a barrier that not all reach, or not the same one; CUB's storage used again without
// a barrier; a misaligned vector. EMU_PERTURB moves results by up to this part of the errors NVIDIA documents; EMU_SMS: multiprocessors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#define __CUDACC__ 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one launch at a time, and in it one block
#define __syncthreads() emulator::wait(emulator::BLOCK, __FILE__, __LINE__)
#define __syncwarp() emulator::wait(emulator::WARP, __FILE__, __LINE__)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

enum Scope { BLOCK, WARP };
constexpr int LANES = 32;

[[noreturn]] void fail(const std::string& what);         // ends the launch
void wait(Scope scope, const void* place, int line = 0);  // until all of the scope wait there
int64_t block_serial();                                   // a number for each block that ever ran
int run(dim3 grid, dim3 block, const std::function<void()>& thread);

float off_by(float x, int ulps);           // x, or up to so many ulps beside it
float absolutely_off(float x, float bound);  // x, or up to `bound` beside it

// The result is zero where it is subnormal.
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

template <class T>
void require_alignment(const T* pointer) {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    asm("" : "+r"(address));  // or the compiler takes it for granted
    if (address % sizeof(T) != 0) fail("misaligned address of " + std::to_string(sizeof(T)) + " bytes");
}

// Numbers that are only moved whole, from and to addresses that are multiples of their size.
template <int WORDS>
struct alignas(4 * WORDS) Vector {
    uint32_t words[WORDS];
    Vector() = default;
    Vector(const Vector& other) { *this = other; }
    Vector& operator=(const Vector& other) {
        require_alignment(this);
        require_alignment(&other);
        std::memcpy(words, other.words, sizeof words);
        return *this;
    }
};

// Memory of a reduction over COUNT threads: who wrote and was not yet read must not write again.
template <class T, int COUNT>
struct Storage {
    T value[COUNT];
    bool pending[COUNT];
    int64_t block;

    // Σ of all, for the first thread of the scope; NaN for the others.
    T sum(Scope scope, T mine) {
        if (block != block_serial()) {
            std::memset(this, 0, sizeof *this);
            block = block_serial();
        }
        const int place = threadIdx.x % COUNT;
        if (pending[place]) fail("storage of a reduction is used again without a barrier");
        pending[place] = true;
        value[place] = mine;
        wait(scope, this);
        if (place != 0) return std::numeric_limits<T>::quiet_NaN();
        std::memset(pending, 0, sizeof pending);
        for (int step = 1; step < LANES; step *= 2) {  // CUB's order: a tree in each warp, then one warp after another
            for (int k = 0; k < COUNT; k += 2 * step) value[k] += value[k + step];
        }
        for (int k = LANES; k < COUNT; k += LANES) value[0] += value[k];
        return value[0];
    }
};

}  // namespace emulator

using uint4 = emulator::Vector<4>;
using uint2 = emulator::Vector<2>;
struct float2 {
    float x, y;
};

inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __uint_as_float(uint32_t word) { return __builtin_bit_cast(float, word); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int word) { return __builtin_bit_cast(float, word); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {  // without the replicated sign
    const uint64_t bytes = uint64_t{high} << 32 | low;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * k & 7) & 255) << 8 * k;
    return result;
}

struct __half { _Float16 value; };  // the compiler's own, which rounds to nearest even
struct __half2 { _Float16 x, y; };
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { uint16_t x, y; };
inline __half __ushort_as_half(uint16_t bits) { return __builtin_bit_cast(__half, bits); }
inline uint16_t __half_as_ushort(__half x) { return __builtin_bit_cast(uint16_t, x); }
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {static_cast<_Float16>(x), static_cast<_Float16>(y)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t word = __float_as_uint(x);
    return {x != x ? uint16_t{0x7fff} : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x).bits, __float2bfloat16_rn(y).bits};
}

// CUDA's guide to C++: __fdividef has 2 ulp, and is 0 for a divisor beyond 2^126; __logf 2^-21.41 in [½, 2], 3 ulp outside.
inline float __fdividef(float x, float y) {
    if (std::fabs(y) > 0x1p126f && std::isfinite(y)) return std::isinf(x) ? NAN : std::copysign(0.0f, x) * std::copysign(1.0f, y);
    return emulator::off_by(x / y, 2);
}
inline float __frcp_rn(float x) { return 1 / x; }
inline float __logf(float x) {
    const float log = static_cast<float>(std::log(static_cast<double>(x)));
    return x >= 0.5f && x <= 2 ? emulator::absolutely_off(log, 0x1p-21f * 0.7526f) : emulator::off_by(log, 3);
}
#define FASTVAE_INSTRUCTIONS  // these, not csrc/device/instructions.cuh; errors from the PTX manual
namespace fastvae {
namespace device {
inline float ex2_approx(float x) {
    if (x == 0) return 1;  // documented
    const double power = std::exp2(static_cast<double>(emulator::flush(x)));
    return emulator::flush(emulator::off_by(static_cast<float>(power), 2));
}
inline void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
    low = a * b, high = static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float lg2_approx(float x) {
    const float log = static_cast<float>(std::log2(static_cast<double>(emulator::flush(x))));
    return x >= 0.5f && x <= 2 ? emulator::absolutely_off(log, 0x1p-22f) : emulator::off_by(log, 2);
}
inline float sin_approx(float x) { return emulator::absolutely_off(std::sin(x), 0x1p-21f * 1.4142f); }
inline float cos_approx(float x) { return emulator::absolutely_off(std::cos(x), 0x1p-21f * 1.4142f); }
inline float sqrt_approx(float x) { return emulator::flush(emulator::off_by(std::sqrt(emulator::flush(x)), 1)); }
inline void write_16_bytes(uint4* to, const uint4& x) { *to = x; }
}  // namespace device
}  // namespace fastvae

namespace cub {
template <class T, int THREADS>
struct BlockReduce {
    using TempStorage = emulator::Storage<T, THREADS>;
    TempStorage& storage;
    explicit BlockReduce(TempStorage& storage) : storage(storage) {}
    T Sum(T value) { return storage.sum(emulator::BLOCK, value); }
};
template <class T>
struct WarpReduce {
    using TempStorage = emulator::Storage<T, emulator::LANES>;
    TempStorage& storage;
    explicit WarpReduce(TempStorage& storage) : storage(storage) {}
    T Sum(T value) { return storage.sum(emulator::WARP, value); }
};
}  // namespace cub

using cudaError_t = int;  // 0, or 1: what cudaGetErrorString says
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 16;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <class KERNEL>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, KERNEL, int, size_t) {
    return *blocks = 4, cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
const char* cudaGetErrorString(cudaError_t error);

template <class... PARAMETERS, class... ARGUMENTS>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(PARAMETERS...), const ARGUMENTS&... given) {
    const std::tuple<PARAMETERS...> parameters(given...);
    return emulator::run(config->gridDim, config->blockDim, [&] { std::apply(kernel, parameters); });
}
