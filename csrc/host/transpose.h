// A square of as many rows as a register has lanes, turned: columns become rows. log₂ of that many steps swap blocks.
#pragma once

#include "simd.h"

namespace fastvae {
namespace FASTVAE_ISA {

// Of each pair of blocks of BLOCK lanes the first (or the second): that of a, then that of b.
template <int BLOCK, int SECOND, class V>
FASTVAE_INLINE V of_pairs(V a, V b) {
    using I = typename lanes_of<V>::integer;
    constexpr int LANES = lanes_of<V>::COUNT;
    I from{};
    for (int k = 0; k < LANES; ++k) {
        from[k] = k / (2 * BLOCK) * (2 * BLOCK) + SECOND * BLOCK + k % BLOCK + k / BLOCK % 2 * LANES;
    }
#if defined(__clang__)
    V result;
    for (int k = 0; k < LANES; ++k) result[k] = from[k] < LANES ? a[from[k]] : b[from[k] - LANES];
    return result;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

template <int BLOCK, class V>
FASTVAE_INLINE void swap_blocks(V* rows) {
    constexpr int LANES = lanes_of<V>::COUNT;
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k) {
        if (k / BLOCK % 2 != 0) continue;
        const V a = rows[k], b = rows[k + BLOCK];
        rows[k] = of_pairs<BLOCK, 0>(a, b);
        rows[k + BLOCK] = of_pairs<BLOCK, 1>(a, b);
    }
    if constexpr (BLOCK > 1) swap_blocks<BLOCK / 2>(rows);
}

template <class V>
FASTVAE_INLINE void transpose(V (&rows)[lanes_of<V>::COUNT]) {
    swap_blocks<lanes_of<V>::COUNT / 2>(rows);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
