// The noise contract (kernels/reference/noise.py): ε of element i is normal i mod 4 of Philox4x32-10 with the seed as key
// and i / 4 as counter, through Box–Muller. One counter a number: one on a GPU thread, a register full on a CPU.
#pragma once

#include "math.h"

namespace fastvae {
namespace FASTVAE_ISA {

#ifdef __CUDACC__
using Word = uint32_t;
using Normal = float;
#else
using Word = Unsigned;
using Normal = Float;
FASTVAE_INLINE Float unsigned_to_float(Unsigned word) { return __builtin_convertvector(word, Float); }
FASTVAE_INLINE Int as_signed(Unsigned word) { return (Int)word; }
#endif

struct Normals {
    Normal n0, n1, n2, n3;
};

#ifdef __CUDACC__

// Two normals, as kernels/triton/noise.py makes them: u = (r + ½)·2⁻³² is in (0, 1], the angle 2π·(r + ½)·2⁻³² of a signed r.
// The special-function unit's logarithm is off by 2⁻²² near u = 1, where the radius would feel it; there two terms of its
// series stand for −ln u. Within 1e-5 of the contract at the errors NVIDIA documents.
FASTVAE_MATH void box_muller(uint32_t radius_word, uint32_t angle_word, float& cos_normal, float& sin_normal) {
    constexpr float UNIT = 0x1p-32f, TURN = 6.283185307179586f * UNIT, LN_2 = 0.6931471805599453f;
    const float u = fmaf(static_cast<float>(radius_word), UNIT, 0.5f * UNIT);
    const float square = u > 1 - 0x1p-8f ? (1.0f - u) * (3.0f - u) : lg2_approx(u) * (-2.0f * LN_2);
    const float radius = sqrt_approx(square);
    const float angle = fmaf(static_cast<float>(static_cast<int>(angle_word)), TURN, 0.5f * TURN);
    cos_normal = radius * cos_approx(angle);
    sin_normal = radius * sin_approx(angle);
}

#else

// −2·log u for u in [2⁻³³, 1], relative error 2⁻²³; a fitted polynomial shorter than that of math.h, which must do for all.
FASTVAE_MATH Normal squared_radius(Normal u) {
    const auto word = as_int(u);
    const auto e = (word - 0x3f3504f3) >> 23;
    const Normal r = as_float(word - e * (1 << 23)) - 1.0f, square = r * r;
    const Normal p = polynomial(r, constant<Normal>(0.08700361072), constant<Normal>(-0.1426747652),
                                constant<Normal>(0.1491478675), constant<Normal>(-0.1657758598),
                                constant<Normal>(0.1996306231), constant<Normal>(-0.2500133702),
                                constant<Normal>(0.3333391077));
    const Normal log = to_float(e) * 0.693147181f + (r + (r * square * p - 0.5f * square));
    return -2.0f * log;
}

// For angles in ±π/2, within 2e-7: polynomials fitted to 6e-8, and float32's own rounding.
FASTVAE_MATH Normal sin_half_turn(Normal angle) {
    const Normal z = angle * angle;
    return polynomial(z, constant<Normal>(2.600054796e-06), constant<Normal>(-0.0001980661521),
                      constant<Normal>(0.008333017292), constant<Normal>(-0.166666571)) * (z * angle) + angle;
}
FASTVAE_MATH Normal cos_half_turn(Normal angle) {
    return polynomial(angle * angle, constant<Normal>(2.319439028e-05), constant<Normal>(-0.001385592737),
                      constant<Normal>(0.04166398948), constant<Normal>(-0.4999993229), constant<Normal>(1.0));
}

// Two normals. u = (r + ½)·2⁻³² is in (0, 1], so its logarithm is finite and at most 0. The angle 2π·(r + ½)·2⁻³² is taken
// to ±π/2 in integers, exactly; in the other half turn both normals change their sign.
FASTVAE_MATH void box_muller(Word radius_word, Word angle_word, Normal& cos_normal, Normal& sin_normal) {
    const Normal radius = square_root(squared_radius((unsigned_to_float(radius_word) + 0.5f) * 0x1p-32f));
    constexpr float HALF_WORD = 7.314590396335798e-10f;  // π·2⁻³²
    const Normal angle = to_float(as_signed(angle_word << 1)) * HALF_WORD + HALF_WORD;
    const auto turned = as_signed((angle_word + 0x40000000u) & 0x80000000u);
    const Normal signed_radius = as_float(as_int(radius) ^ turned);
    cos_normal = signed_radius * cos_half_turn(angle);
    sin_normal = signed_radius * sin_half_turn(angle);
}

#endif

// Philox4x32-10.
template <class W>
FASTVAE_MATH void rounds(uint64_t seed, W& c0, W& c1, W& c2, W& c3) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        W high0, low0, high1, low1;
        multiply_wide(c0, 0xD2511F53u, high0, low0);
        multiply_wide(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// The four normals of the counter (c0, c1, 0, 0).
FASTVAE_MATH Normals normals(uint64_t seed, Word c0, Word c1) {
    Word c2{}, c3{};
#ifdef FASTVAE_WIDE_WORDS
    Wide e0 = even_words(c0), e1 = even_words(c1), e2{}, e3{}, o0 = odd_words(c0), o1 = odd_words(c1), o2{}, o3{};
    rounds(seed, e0, e1, e2, e3);
    rounds(seed, o0, o1, o2, o3);
    c0 = all_words(e0, o0), c1 = all_words(e1, o1), c2 = all_words(e2, o2), c3 = all_words(e3, o3);
#else
    rounds(seed, c0, c1, c2, c3);
#endif
    Normals result;
    box_muller(c0, c1, result.n0, result.n1);
    box_muller(c2, c3, result.n2, result.n3);
    return result;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
