// The likelihoods of counts. log Γ and ψ come as differences, and by Stirling's series from 8 on, so that what cancels never
// is computed: eager's lgamma(x + θ) − lgamma(θ) is off by a nat where θ is a million.
//
// Γ(z + 8)/Γ(z) = P(q) = q(q + 6)(q + 10)(q + 12) with q = z(z + 7): that is how a z below 8 gets there.
#pragma once

#include "terms.h"

namespace fastvae {
namespace FASTVAE_ISA {

constexpr double COUNT_EPS = 1e-8;

// The sum Stirling's (z − ½)·log z − z + ½·log 2π lacks of log Γ(z), and its derivative, for z ≥ 8 and r = 1/z.
template <class V>
FASTVAE_MATH V stirling(V r) {
    const V square = r * r;
    if constexpr (SINGLE<V>) {
        return r * polynomial(square, constant<V>(1 / 1260.0), constant<V>(-1 / 360.0), constant<V>(1 / 12.0));
    } else {
        return r * polynomial(square, constant<V>(43867 / 244188.0), constant<V>(-3617 / 122400.0), constant<V>(1 / 156.0),
                              constant<V>(-691 / 360360.0), constant<V>(1 / 1188.0), constant<V>(-1 / 1680.0),
                              constant<V>(1 / 1260.0), constant<V>(-1 / 360.0), constant<V>(1 / 12.0));
    }
}
template <class V>
FASTVAE_MATH V stirling_slope(V r) {
    const V square = r * r;
    if constexpr (SINGLE<V>) {
        return square * polynomial(square, constant<V>(-1 / 252.0), constant<V>(1 / 120.0), constant<V>(-1 / 12.0));
    } else {
        return square * polynomial(square, constant<V>(-43867 / 14364.0), constant<V>(3617 / 8160.0),
                                   constant<V>(-1 / 12.0), constant<V>(691 / 32760.0), constant<V>(-1 / 132.0),
                                   constant<V>(1 / 240.0), constant<V>(-1 / 252.0), constant<V>(1 / 120.0),
                                   constant<V>(-1 / 12.0));
    }
}

// log x! of a count below 8; NaN if it is none.
template <class V>
FASTVAE_MATH V log_small_factorial(V x) {
    V result = x == constant<V>(7) ? constant<V>(8.525161361065415) : constant<V>(NAN);
    result = x == constant<V>(6) ? constant<V>(6.579251212010101) : result;
    result = x == constant<V>(5) ? constant<V>(4.787491742782046) : result;
    result = x == constant<V>(4) ? constant<V>(3.1780538303479458) : result;
    result = x == constant<V>(3) ? constant<V>(1.791759469228055) : result;
    result = x == constant<V>(2) ? constant<V>(0.6931471805599453) : result;
    result = x == constant<V>(1) ? constant<V>(0) : result;
    return x == constant<V>(0) ? constant<V>(0) : result;
}

// log x! = x·log c − start + ½·log c + rest: by Stirling from 8 on, where c and start are x, else with c = 1 and start = 0.
template <class V>
struct Factorial {
    V c, start, rest;
};
template <class V>
FASTVAE_MATH Factorial<V> factorial(V x) {
    const auto small = x < constant<V>(8);
    const V c = small ? constant<V>(1) : x;
    const V rest = small ? log_small_factorial(x) : constant<V>(0.9189385332046727) + stirling(reciprocal(c));
    return {c, small ? constant<V>(0) : x, rest};
}

struct Poisson : WithoutFactor<Poisson> {
    static constexpr const char* NAME = "poisson";
    static constexpr Domain TARGET = Domain::COUNT, RECON = Domain::NOT_NEGATIVE;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V) {
        const V rate = y + constant<V>(COUNT_EPS), inverse = reciprocal(rate);
        const Factorial<V> f = factorial(x);
        const V ratio = f.c * inverse, lost = f.c - ratio * rate;  // what the quotient was rounded by is put back
        const V log_ratio = log_normal(ratio) + lost * inverse * reciprocal(ratio);
        const V nll = (y - f.start) + (x * log_ratio + (constant<V>(0.5) * log_normal(f.c) + f.rest));
        return {nll, constant<V>(1), (rate - x) * inverse};
    }
};

struct PoissonLogRate : WithoutFactor<PoissonLogRate> {
    static constexpr const char* NAME = "poisson_log_rate";
    static constexpr Domain TARGET = Domain::COUNT, RECON = Domain::REAL;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V) {
        const V rate = exp(y);
        const Factorial<V> f = factorial(x);
        const V log_c = log_normal(f.c);
        const V nll = (rate - f.start) + (x * (log_c - y) + (constant<V>(0.5) * log_c + f.rest));
        return {nll, constant<V>(1), rate - x};
    }
};

// z, or z + 8 where it is below 8; there P(q), and ψ(z + 8) − ψ(z) where that is asked for.
template <class V>
struct Shifted {
    V z, by, product, slope;
};
template <class V>
FASTVAE_MATH Shifted<V> shifted(V z) {
    const V zero = constant<V>(0), one = constant<V>(1), eight = constant<V>(8);
    const auto small = z < eight;
    const V by = small ? eight : zero, low = small ? z : one, q = low * (low + constant<V>(7));
    const V product = q * (q + constant<V>(6)) * ((q + constant<V>(10)) * (q + constant<V>(12)));
    const V slope = polynomial(q, constant<V>(4), constant<V>(84), constant<V>(504), constant<V>(720)) *
                    (low + low + constant<V>(7));
    return {z + by, by, small ? product : one, small ? slope * reciprocal(product) : zero};
}

// What nll and its derivative in θ share. With a = θ and b = x + θ, moved up to 8: log(b/a) exactly, and 1 + y/θ.
struct NegativeBinomial : WithoutFactor<NegativeBinomial> {
    static constexpr const char* NAME = "negative_binomial";
    static constexpr Domain TARGET = Domain::COUNT, RECON = Domain::NOT_NEGATIVE;
    static constexpr bool WITH_TENSOR = true;

    template <class V>
    struct Shared {
        Shifted<V> a, b;
        V moved, by_a, by_b, log_ratio;    // b − a − x, 1/a, 1/b, log(b/a)
        V by_theta, by_total, log_growth;  // 1/(θ + ε), 1/(θ + y + ε), log((θ + y + ε)/(θ + ε))
    };
    template <class V>
    static FASTVAE_MATH Shared<V> shared(V y, V x, V theta) {
        const V one = constant<V>(1), lifted = theta + constant<V>(COUNT_EPS);
        const Shifted<V> a = shifted(theta), b = shifted(theta + x);
        const V moved = b.by - a.by, by_a = reciprocal(a.z), by_b = reciprocal(b.z);
        const V step = (x + moved) * by_a, ratio = one + step;
        const V by_theta = reciprocal(lifted), by_total = reciprocal(lifted + y), growth = y * by_theta, total = one + growth;
        return {a, b, moved, by_a, by_b,
                log_normal(ratio) + (step - (ratio - one)) * a.z * by_b,  // log1p: what the sum was rounded by is put back
                by_theta, by_total, log_normal(total) + (growth - (total - one)) * lifted * by_total};
    }
    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V theta) {
        const V half = constant<V>(0.5), mean = y + constant<V>(COUNT_EPS), by_mean = reciprocal(mean);
        const Shared<V> s = shared(y, x, theta);
        const Factorial<V> f = factorial(x);
        const V odds = log_normal((s.b.z * s.by_total) * (mean * reciprocal(f.c)));
        const V log_gamma = s.moved * log_normal(s.b.z) + (s.a.z - half) * s.log_ratio -
                            (s.moved + (x - f.start)) + (stirling(s.by_b) - stirling(s.by_a)) +
                            log_normal(s.a.product * reciprocal(s.b.product * square_root(f.c)));
        const V nll = theta * s.log_growth - x * odds - (log_gamma - f.rest);
        return {nll, constant<V>(1), (theta * s.by_total) * ((mean - x) * by_mean)};
    }
    template <class V>
    static FASTVAE_MATH V slope(V y, V x, V theta) {
        const V half = constant<V>(0.5);
        const Shared<V> s = shared(y, x, theta);
        const V direct = ((x - y) * (theta * s.by_theta) + x * constant<V>(COUNT_EPS) * s.by_theta) * s.by_total;
        const V digamma = (half * (s.by_b - s.by_a) + (stirling_slope(s.by_a) - stirling_slope(s.by_b))) -
                          (s.a.slope - s.b.slope);
        return (s.log_growth - s.log_ratio) + (direct + digamma);
    }
};

// −log of what a count's likelihood e^(−nll) is where it is 0 with probability σ(logit) besides; its derivatives.
template <class V>
struct ZeroInflated {
    V nll, by_nll, by_logit;
};
template <class V>
FASTVAE_MATH ZeroInflated<V> zero_inflated(V nll, V x, V logit) {
    const V zero = constant<V>(0), one = constant<V>(1), sum = logit + nll;
    const auto is_zero = x == zero;
    const V a = exp_negative(negative_absolute(logit)), b = is_zero ? exp_negative(negative_absolute(sum)) : zero;
    const V by_a = reciprocal_above_one(one + a), by_b = reciprocal_above_one(one + b);
    // softplus(−π) − softplus(−π − n) but for the quotient: min(−π, n) where −π is positive, as n is
    const V whole = is_zero ? at_most(positive_part(-logit), nll) : nll + positive_part(logit);
    const V by_nll = is_zero ? if_negative(sum, by_b, b * by_b) : one;
    const V of_zero = if_negative(logit, a * by_a, by_a), of_count = if_negative(logit, by_a, a * by_a);
    return {whole + log_normal((one + a) * by_b), by_nll, is_zero ? by_nll - of_count : of_zero};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
