// What a likelihood gives for one number, or one vector of them, and where its numbers must lie.
#pragma once

#include "math.h"

namespace fastvae {
namespace FASTVAE_ISA {

template <class V>
struct Terms {
    V additive, factor, derivative;
};

// As in kernels/likelihoods.py: on a CPU somebody looks.
enum class Domain { REAL, UNIT, NOT_NEGATIVE, COUNT };

template <class TERM>
struct WithoutFactor {
    static constexpr bool HAS_FACTOR = false, WITH_TENSOR = false;

    template <class V>
    static FASTVAE_MATH V nll(V y, V x, V parameter) {
        return TERM::terms(y, x, parameter).additive;
    }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
