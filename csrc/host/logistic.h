// A discretised logistic: the probability that a logistic variable falls into the bin of one level of 256, its logarithm and
// derivatives. Formula: kernels/reference/mixture.py, after PixelCNN++ (Salimans et al. 2017).
//
// With a = |x − mean|/s, h = (1/255)/s, E = e^−a and t = e^−h, the bin holds σ(a + h) − σ(a − h), which is
// E·(1 − t²)/((E + t)·(1 + E·t)): two exponentials, and nothing cancels but 1 − t, which comes with t.
#pragma once

#include "three.h"

namespace fastvae {
namespace FASTVAE_ISA {

constexpr double LOG_SCALE_MIN = -7;    // below, log s counts as this, and has no gradient
constexpr double HALF_BIN = 1 / 255.0;  // of data in [−1, 1]
constexpr double EDGE = 0.999;          // beyond, the bin is the lowest, or the highest, and has no other end
constexpr double NARROW = 1e-5;         // a bin of no more than this is the density at its middle times its width
constexpr double LEVELS = 127.5;        // of a unit of data
constexpr double EXP_MIN = -87;         // below, e^x is no normal float32, and here as good as e^-87

// e^−x and 1 − e^−x of x from 0 to 87.
template <class P>
struct Decay {
    P left, lost;
};
FASTVAE_INLINE Decay<Double> decay(Double x) {
    Decay<Double> result{exp(-x), {}};
    for (int k = 0; k < lanes_of<Double>::COUNT; ++k) result.lost[k] = -std::expm1(-x[k]);
    return result;
}
FASTVAE_INLINE Decay<Float> decay(Float x) {
    const Float shifted = x * -LOG2_E + MAGIC, n = shifted - MAGIC;
    const Float r = -x - n * LN2_HIGH - n * LN2_LOW, square = r * r;
    const Float low = 1.6666665459e-1f * r + 5.0000001201e-1f, middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
    const Float high = 1.9875691500e-4f * r + 1.3981999507e-3f;
    const Float growth = ((high * square + middle) * square + low) * square + r;  // e^r − 1
    const Float power = power_of_two(as_int(shifted) - MAGIC_BITS), grown = power * growth;
    return {grown + power, (1.0f - power) - grown};
}
template <class V>
FASTVAE_INLINE Decay<Three<V>> decay(const Three<V>& x) {
    const Decay<V> a = decay(x.a), b = decay(x.b), c = decay(x.c);
    return {{a.left, b.left, c.left}, {a.lost, b.lost, c.lost}};
}

// The logarithm is additive + log(factor), factor in [1e-5, 75]; then its derivatives.
template <class P>
struct Level {
    P additive, factor, by_mean, by_log_scale;
};

// x in [−1, 1]; of one register, or of three.
template <class P>
FASTVAE_INLINE Level<P> level(P x, P mean, P log_scale) {
    using V = register_t<P>;
    const P zero = constant<V>(0), one = constant<V>(1), two = constant<V>(2), least = constant<V>(EXP_MIN);
    const P clamped = at_least(P(constant<V>(LOG_SCALE_MIN)), log_scale);
    const P inverse = exp_of_bounded(at_least(least, -clamped)), middle = inverse * (x - mean), a = absolute(middle);
    const P E = exp_of_bounded(at_least(least, -a)), h = inverse * P(constant<V>(HALF_BIN));
    const Decay<P> t = decay(h);
    const P C = at_least(P(constant<V>(1e-30)), t.lost * (one + t.left));
    const P Et = E * t.left, near = E + t.left, far = one + Et, both = near * far;
    // a bin at an edge has one end, and where that is on the far side of the mean, most of the mass
    const auto lowest = less(x, P(constant<V>(-EDGE))), edge = lowest | less(P(constant<V>(EDGE)), x);
    const auto below = less(zero, if_negative(choose(lowest, middle, -middle), one, zero));  // by the sign of a 0, as below
    const auto unlikely = edge & below, likely = both_not(below, edge);
    const auto narrow = both_not(edge | less(P(constant<V>(NARROW)) * both, E * C), less(zero, both));
    const P inverse_all = reciprocal(choose(narrow, one + E, both * C));
    const P by_both = inverse_all * C;
    const P factor = by_both * choose(likely, near, choose(unlikely, far, C));
    const P additive = choose(likely, zero, -a), dense = inverse_all * inverse_all * P(constant<V>(1 / LEVELS));
    const P from_near = choose(likely, zero, by_both * far * t.left), from_far = choose(unlikely, zero, by_both * near * Et);
    const P by_a = choose(narrow, (E - one) * inverse_all, from_far - from_near);
    const P growth = choose(edge, zero, two * t.left * t.left * (inverse_all * both));  // of 1 − t²
    const P by_width = choose(narrow, one, (from_near + from_far + growth) * h);
    return {choose(narrow, additive - clamped, additive), choose(narrow, dense, factor),
            inverse * if_negative(middle, by_a, -by_a),
            choose(less(log_scale, P(constant<V>(LOG_SCALE_MIN))), zero, -(a * by_a + by_width))};
}

// tanh of a coefficient, and its derivative.
template <class P>
struct Coefficient {
    P value, slope;
};
template <class P>
FASTVAE_INLINE Coefficient<P> coefficient(P raw) {
    using V = register_t<P>;
    const P one = constant<V>(1), two = constant<V>(2), four = constant<V>(4);
    const Decay<P> e = decay(at_most(P(constant<V>(80)), two * absolute(raw)));
    const P inverse = reciprocal_above_one(one + e.left), value = e.lost * inverse;
    return {if_negative(raw, -value, value), four * e.left * (inverse * inverse)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
