// Each reconstruction term for one number (or one vector of them): (y, x, parameter) → nll = additive + log(factor), and
// ∂nll/∂y. A loop multiplies factors in [½, 2] and takes one logarithm for many, times FACTOR_SIGN; a term without a
// factor has HAS_FACTOR false. Where the parameter may be a tensor, WITH_TENSOR is true and slope is ∂nll/∂parameter.
// Formulas and sources: kernels/likelihoods.py.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "counts.h"

namespace fastvae {
namespace FASTVAE_ISA {

struct BernoulliLogits {
    static constexpr const char* NAME = "bernoulli_logits";
    static constexpr bool HAS_FACTOR = true, WITH_TENSOR = false;
    static constexpr Domain TARGET = Domain::UNIT, RECON = Domain::REAL;
    static constexpr float FACTOR_SIGN = 1;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V) {
        const V one = constant<V>(1), a = exp_negative(negative_absolute(y)), factor = one + a;
        return {positive_part(y) - y * x, factor, if_negative(y, a, one) * reciprocal_above_one(factor) - x};
    }
    // For elementwise output: what 1 + a rounds away of a small a is put back.
    template <class V>
    static FASTVAE_MATH V nll(V y, V x, V) {
        const V one = constant<V>(1), a = exp_negative(negative_absolute(y)), factor = one + a;
        return positive_part(y) - y * x + divide(a - (factor - one), factor) + log_normal(factor);
    }
};

struct BernoulliProbs : WithoutFactor<BernoulliProbs> {
    static constexpr const char* NAME = "bernoulli_probs";
    static constexpr Domain TARGET = Domain::UNIT, RECON = Domain::UNIT;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V eps) {
        const V one = constant<V>(1), zero = constant<V>(0), high = one - eps, z = one - y;
        const V p = at_most(high, at_least(eps, y)), q = at_most(high, at_least(eps, z));
        V derivative = divide(y - x, p * q);  // (1−x)/q − x/p with one division
        derivative = y < eps ? zero : derivative;
        derivative = z < eps ? zero : derivative;
        return {-x * log(p) - (one - x) * log(q), one, derivative};
    }
};

// BernoulliProbs where many elements are added up and, on a CPU, eps is at least MIN_EPS. With l the larger of p and q, s the
// smaller and w the weight of log s: −log l − w·log(s/l). l is in [½, 1], so its logarithm is a factor; both terms are
// positive, so nothing cancels.
struct BernoulliProbsSummed {
    static constexpr bool HAS_FACTOR = true;
    static constexpr Domain TARGET = Domain::UNIT, RECON = Domain::UNIT;
    static constexpr float FACTOR_SIGN = -1, MIN_EPS = 1e-18f;  // s² is a normal number

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V eps) {
        const V one = constant<V>(1), zero = constant<V>(0), high = one - eps, z = one - y;
        const V p = at_most(high, at_least(eps, y)), q = at_most(high, at_least(eps, z));
        const V inverse = divide(one, p * q), larger = at_least(p, q), smaller = at_most(p, q);
#ifdef __CUDACC__
        const V ratio = divide(smaller, larger);
#else
        const V ratio = smaller * smaller * inverse;  // a division less
#endif
        const V weight = p < q ? x : one - x;
        V derivative = (y - x) * inverse;
        derivative = y < eps ? zero : derivative;
        derivative = z < eps ? zero : derivative;
        return {-weight * log_normal(ratio), larger, derivative};
    }
};

struct BernoulliProbsLogClamped : WithoutFactor<BernoulliProbsLogClamped> {
    static constexpr const char* NAME = "bernoulli_probs_log_clamped";
    static constexpr Domain TARGET = Domain::UNIT, RECON = Domain::UNIT;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V) {
        const V one = constant<V>(1), zero = constant<V>(0), low = constant<V>(-100), tiny = constant<V>(1e-12);
        const V z = one - y, spread = z * y, correction = divide((one - z) - y, z);
        V log_y = log(y);
        // log1p(−y): what 1 − y rounds away of a small y is put back
        V log_z = log(z) + (z > tiny ? correction : zero);
        log_y = at_least(low, log_y);
        log_z = at_least(low, log_z);
        return {(x - one) * log_z - x * log_y, one, divide(y - x, at_least(tiny, spread))};
    }
};

struct ContinuousBernoulliLogits : WithoutFactor<ContinuousBernoulliLogits> {
    static constexpr const char* NAME = "continuous_bernoulli_logits";
    static constexpr Domain TARGET = Domain::UNIT, RECON = Domain::REAL;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V) {
        const V one = constant<V>(1), half = constant<V>(0.5), zero = constant<V>(0);
        const V magnitude = absolute(y);
        const auto small = magnitude < half;
        const V s = small ? y : zero, s2 = s * s;
        const V log_series =
            half * s + s2 * polynomial(s2, constant<V>(1 / 479001600.0), constant<V>(-1 / 9676800.0),
                                       constant<V>(1 / 181440.0), constant<V>(-1 / 2880.0), constant<V>(1 / 24.0));
        const V mean_series =
            half + s * polynomial(s2, constant<V>(1 / 47900160.0), constant<V>(-1 / 1209600.0),
                                  constant<V>(1 / 30240.0), constant<V>(-1 / 720.0), constant<V>(1 / 12.0));
        const V v = small ? one : magnitude, a = exp_negative(-v), inverse = divide(one, one - a);
        const V log_normalizer = positive_part(y) + log_normal(divide(one - a, v));
        const V mean = (y >= zero ? inverse : -a * inverse) - divide(one, y >= zero ? v : -v);
        return {(small ? log_series : log_normalizer) - x * y, one, (small ? mean_series : mean) - x};
    }
};

struct Gaussian : WithoutFactor<Gaussian> {
    static constexpr const char* NAME = "gaussian";
    static constexpr Domain TARGET = Domain::REAL, RECON = Domain::REAL;
    static constexpr bool WITH_TENSOR = true;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V var) {
        const V d = y - x, half = constant<V>(0.5), precision = reciprocal(var);
        return {half * d * d * precision + half * log_normal(constant<V>(6.283185307179586) * var), constant<V>(1),
                d * precision};
    }
    template <class V>
    static FASTVAE_MATH V slope(V y, V x, V var) {
        const V d = y - x, precision = reciprocal(var);
        return constant<V>(0.5) * precision * (constant<V>(1) - d * d * precision);
    }
};

struct GaussianLogVar : WithoutFactor<GaussianLogVar> {
    static constexpr const char* NAME = "gaussian_logvar";
    static constexpr Domain TARGET = Domain::REAL, RECON = Domain::REAL;
    static constexpr bool WITH_TENSOR = true;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V logvar) {
        const V d = y - x, half = constant<V>(0.5), precision = exp(-logvar);
        return {half * d * d * precision + half * logvar + constant<V>(0.9189385332046727), constant<V>(1), d * precision};
    }
    template <class V>
    static FASTVAE_MATH V slope(V y, V x, V logvar) {
        const V d = y - x, half = constant<V>(0.5);
        return half - half * d * d * exp(-logvar);
    }
};

struct SquaredError : WithoutFactor<SquaredError> {
    static constexpr const char* NAME = "mse";
    static constexpr Domain TARGET = Domain::REAL, RECON = Domain::REAL;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V) {
        const V d = y - x;
        return {d * d, constant<V>(1), d + d};
    }
};

struct AbsoluteError : WithoutFactor<AbsoluteError> {
    static constexpr const char* NAME = "l1";
    static constexpr Domain TARGET = Domain::REAL, RECON = Domain::REAL;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V) {
        const V d = y - x, one = constant<V>(1), zero = constant<V>(0);
        const V not_positive = d < zero ? -one : d * zero;  // d·0 keeps a NaN
        return {absolute(d), one, d > zero ? one : not_positive};
    }
};

struct Laplace : WithoutFactor<Laplace> {
    static constexpr const char* NAME = "laplace";
    static constexpr Domain TARGET = Domain::REAL, RECON = Domain::REAL;
    static constexpr bool WITH_TENSOR = true;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V scale) {
        const Terms<V> l1 = AbsoluteError::terms(y, x, scale);
        const V precision = reciprocal(scale);
        return {l1.additive * precision + log_normal(constant<V>(2) * scale), l1.factor, l1.derivative * precision};
    }
    template <class V>
    static FASTVAE_MATH V slope(V y, V x, V scale) {
        const V one = constant<V>(1), precision = reciprocal(scale);
        return precision * (one - absolute(y - x) * precision);
    }
};

struct LaplaceLogScale : WithoutFactor<LaplaceLogScale> {
    static constexpr const char* NAME = "laplace_log_scale";
    static constexpr Domain TARGET = Domain::REAL, RECON = Domain::REAL;
    static constexpr bool WITH_TENSOR = true;

    template <class V>
    static FASTVAE_MATH Terms<V> terms(V y, V x, V log_scale) {
        const Terms<V> l1 = AbsoluteError::terms(y, x, log_scale);
        const V precision = exp(-log_scale);
        return {l1.additive * precision + (log_scale + constant<V>(0.6931471805599453)), l1.factor,
                l1.derivative * precision};
    }
    template <class V>
    static FASTVAE_MATH V slope(V y, V x, V log_scale) {
        return constant<V>(1) - absolute(y - x) * exp(-log_scale);
    }
};

// Every likelihood there is; its code is its place here, and Python learns both from likelihood_names().
template <class... TERM>
struct Listed {};
using Likelihoods = Listed<BernoulliLogits, BernoulliProbs, BernoulliProbsLogClamped, ContinuousBernoulliLogits, Gaussian,
                           GaussianLogVar, SquaredError, AbsoluteError, Laplace, LaplaceLogScale, Poisson, PoissonLogRate,
                           NegativeBinomial>;

// All of them, or those whose parameter may be a tensor.
template <class... TERM>
std::vector<std::string> names_of(bool with_tensor, Listed<TERM...>) {
    std::vector<std::string> names;
    ((!with_tensor || TERM::WITH_TENSOR ? names.push_back(TERM::NAME) : void()), ...);
    return names;
}

template <class F, class FIRST, class... REST>
auto with_code(int code, F f, Listed<FIRST, REST...>) -> decltype(f(FIRST{})) {
    if (code == 0) return f(FIRST{});
    if constexpr (sizeof...(REST) != 0) return with_code(code - 1, f, Listed<REST...>{});
    throw std::invalid_argument("likelihood code is none of likelihood_names()");
}

// Calls f(LIKELIHOOD{}) for the likelihood of the code.
template <class F>
auto with_likelihood(int code, F f) {
    return with_code(code, f, Likelihoods{});
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
