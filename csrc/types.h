// What a tensor's memory holds: dtype codes as Python passes them (kernels/compiled/__init__.py), the C++ type behind
// each code, and the type arithmetic is done in: double for double, float for the rest.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace fastvae {

enum DType : int { FLOAT64, FLOAT32, BFLOAT16, FLOAT16, UINT8 };

// Storage only: 16 bits that are converted in registers.
struct alignas(2) bfloat16 {
    uint16_t bits;
};
struct alignas(2) float16 {
    uint16_t bits;
};

template <class T>
struct compute_of {
    using type = float;
};
template <>
struct compute_of<double> {
    using type = double;
};
template <class T>
using compute_t = typename compute_of<T>::type;

// x·HIGH + x·LOW is x/255 rounded to nearest for every uint8 x, fused or not: HIGH has so few bits that x·HIGH is exact.
constexpr float ONE_255TH_HIGH = 0x1.01p-8f, ONE_255TH_LOW = 0x1.010102p-24f;

// Calls f(T{}) for the floating-point type of the code.
template <class F>
auto with_dtype(int dtype, F f) {
    switch (dtype) {
        case FLOAT64: return f(double{});
        case FLOAT32: return f(float{});
        case BFLOAT16: return f(bfloat16{});
        case FLOAT16: return f(float16{});
        default: throw std::invalid_argument("dtype code must be that of a floating-point type");
    }
}

}  // namespace fastvae
