// Memory in 16-byte pieces: loads and stores of N neighbouring elements of any type, converted in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../types.h"
#include "instructions.cuh"

namespace fastvae {
namespace device {

template <class V, int N>
struct Values {
    V v[N];
};

// BYTES of raw memory in as few registers and instructions as there can be.
template <int BYTES>
struct Raw {
    static_assert(BYTES % 16 == 0);
    using Piece = uint4;
    Piece piece[BYTES / 16];
    static constexpr int ALIGNMENT = 16;
};
template <>
struct Raw<8> {
    using Piece = uint2;
    Piece piece[1];
    static constexpr int ALIGNMENT = 8;
};
template <>
struct Raw<4> {
    using Piece = uint32_t;
    Piece piece[1];
    static constexpr int ALIGNMENT = 4;
};

template <class T, int N>
__device__ __forceinline__ Raw<N * sizeof(T)> read_raw(const T* pointer) {
    using R = Raw<N * sizeof(T)>;
    R raw;
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(R) / sizeof(typename R::Piece)); ++k) {
        raw.piece[k] = reinterpret_cast<const typename R::Piece*>(pointer)[k];
    }
    return raw;
}
__device__ __forceinline__ void write_piece(uint4* to, const uint4& x) { write_16_bytes(to, x); }
__device__ __forceinline__ void write_piece(uint2* to, const uint2& x) { *to = x; }
__device__ __forceinline__ void write_piece(uint32_t* to, const uint32_t& x) { *to = x; }
template <class T, int N>
__device__ __forceinline__ void write_raw(T* pointer, const Raw<N * sizeof(T)>& raw) {
    using R = Raw<N * sizeof(T)>;
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(R) / sizeof(typename R::Piece)); ++k) {
        write_piece(reinterpret_cast<typename R::Piece*>(pointer) + k, raw.piece[k]);
    }
}

// One element.
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float of_255(float x) { return fmaf(x, ONE_255TH_HIGH, x * ONE_255TH_LOW); }
__device__ __forceinline__ float widen(uint8_t x) { return of_255(static_cast<float>(x)); }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, bfloat16* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ void narrow(float x, float16* to) { to->bits = __half_as_ushort(__float2half_rn(x)); }

// N elements of T at `pointer`; aligned to 16 bytes, or to their size if that is less, unless N is 1.
template <int N, class T>
__device__ __forceinline__ Values<compute_t<T>, N> load(const T* pointer) {
    Values<compute_t<T>, N> values;
    if constexpr (N == 1) {
        values.v[0] = widen(*pointer);
    } else {
        const Raw<N * sizeof(T)> raw = read_raw<T, N>(pointer);
        if constexpr (sizeof(T) == 8) {
            memcpy(&values, &raw, sizeof values);
        } else if constexpr (sizeof(T) == 4) {
            memcpy(&values, &raw, sizeof values);
        } else if constexpr (sizeof(T) == 2) {
            uint32_t words[N / 2];
            memcpy(words, &raw, sizeof words);
#pragma unroll
            for (int k = 0; k < N / 2; ++k) {
                if constexpr (std::is_same_v<T, bfloat16>) {
                    values.v[2 * k] = __uint_as_float(words[k] << 16);
                    values.v[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
                } else {
                    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[k]));
                    values.v[2 * k] = pair.x;
                    values.v[2 * k + 1] = pair.y;
                }
            }
        } else {
            uint32_t words[N / 4];
            memcpy(words, &raw, sizeof words);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                // the byte as the low mantissa bits of 2²³: cheaper than an integer conversion
                const float shifted = __uint_as_float(__byte_perm(words[k / 4], 0x4B000000u, 0x7440 + k % 4));
                values.v[k] = of_255(shifted - 8388608.0f);
            }
        }
    }
    return values;
}

template <int N, class T>
__device__ __forceinline__ void store(T* pointer, const Values<compute_t<T>, N>& values) {
    if constexpr (N == 1) {
        narrow(values.v[0], pointer);
    } else {
        Raw<N * sizeof(T)> raw;
        if constexpr (sizeof(T) >= 4) {
            memcpy(&raw, &values, sizeof raw);
        } else {
            uint32_t words[N / 2];
#pragma unroll
            for (int k = 0; k < N / 2; ++k) {
                if constexpr (std::is_same_v<T, bfloat16>) {
                    const __nv_bfloat162 pair = __floats2bfloat162_rn(values.v[2 * k], values.v[2 * k + 1]);
                    words[k] = *reinterpret_cast<const uint32_t*>(&pair);
                } else {
                    const __half2 pair = __floats2half2_rn(values.v[2 * k], values.v[2 * k + 1]);
                    words[k] = *reinterpret_cast<const uint32_t*>(&pair);
                }
            }
            memcpy(&raw, words, sizeof raw);
        }
        write_raw<T, N>(pointer, raw);
    }
}

// Whether `load<N>` and `store<N>` may be used at this address; a missing tensor does not mind.
template <int N, class T>
__device__ __forceinline__ bool aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % Raw<N * sizeof(T)>::ALIGNMENT == 0;
}

}  // namespace device
}  // namespace fastvae
