// One element of q(z|x) = N(mu, σ²): σ, KL(q‖p), and the derivatives of the KL. Formulas: kernels/reference/latent.py.
#pragma once

#include "math.h"

namespace fastvae {
namespace FASTVAE_ISA {

constexpr double STD_EPS = 1e-8;  // inside the logarithm of σ², so that std = 0 is finite

// The prior of one element; N(0, 1) unless given.
template <class V>
struct Prior {
    V mu = constant<V>(0), logvar = constant<V>(0), precision = constant<V>(1);
};
template <class V>
FASTVAE_MATH Prior<V> prior_of(V mu, V logvar) {
    return {mu, logvar, exp(-logvar)};
}

// What logvar is clamped to: the latter, NaN or not, where it lies within.
template <class V>
struct Bounds {
    V low, high;
};
template <class V>
FASTVAE_MATH V clamped(V logvar, const Bounds<V>& bounds) {
    return at_most(bounds.high, at_least(bounds.low, logvar));
}

// σ of logvar, or of std itself. BOUNDED: what exp does at its ends is not needed.
template <bool LOG_SCALE, bool BOUNDED = false, class V>
FASTVAE_MATH V std_of(V scale) {
    if constexpr (LOG_SCALE && BOUNDED) return exp_of_bounded(constant<V>(0.5) * scale);
    else if constexpr (LOG_SCALE) return exp(constant<V>(0.5) * scale);
    else return scale;
}

// σ² where σ itself is not wanted.
template <bool LOG_SCALE, bool BOUNDED = false, class V>
FASTVAE_MATH V var_of(V scale) {
    if constexpr (LOG_SCALE && BOUNDED) return exp_of_bounded(scale);
    else if constexpr (LOG_SCALE) return exp(scale);
    else return scale * scale;
}

template <bool LOG_SCALE, class V>
FASTVAE_MATH V kl_element(V mu, V scale, V var, const Prior<V>& prior) {
    const V d = mu - prior.mu;
    V log_var;
    if constexpr (LOG_SCALE) log_var = scale;
    else log_var = log_normal(constant<V>(STD_EPS) + var);
    return constant<V>(0.5) * ((d * d + var) * prior.precision - constant<V>(1) + (prior.logvar - log_var));
}

template <class V>
struct KLGradients {
    V mu, scale, prior_mu, prior_logvar;
};

// The gradients of the KL of one element, times c.
template <bool LOG_SCALE, class V>
FASTVAE_MATH KLGradients<V> kl_gradients(V c, V mu, V std, const Prior<V>& prior) {
    const V one = constant<V>(1), half = constant<V>(0.5), d = mu - prior.mu, var = std * std;
    V slope;
    if constexpr (LOG_SCALE) slope = half * (var * prior.precision - one);
    else slope = std * prior.precision - divide(std, constant<V>(STD_EPS) + var);
    const V grad_mu = c * (d * prior.precision);  // c·d may leave the range, and precision bring it back
    return {grad_mu, c * slope, -grad_mu, half * c * (one - (var + d * d) * prior.precision)};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
