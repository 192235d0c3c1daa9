// Terms that are one number for a row: of a categorical distribution, of Gaussians' densities; and the discretised logistic,
// one an element. A row is read again for its gradient while it is in the cache.
#include <type_traits>

#include "logistic.h"
#include "spans.h"

namespace fastvae {
namespace FASTVAE_ISA {
namespace {

constexpr int64_t PART = 1024;  // elements added up in the type of the arithmetic, before float64 takes over

template <class V>
constexpr int LANES = lanes_of<V>::COUNT;

// Calls f(j, n, whole) for each vector of a row, from element j on; the last may have but n elements, and is not whole.
template <class V, class F>
FASTVAE_INLINE void for_vectors(int64_t begin, int64_t end, F f) {
    int64_t j = begin;
    for (; j + LANES<V> <= end; j += LANES<V>) f(j, LANES<V>, std::true_type{});
    if (j < end) f(j, static_cast<int>(end - j), std::false_type{});
}
template <class V, class WHOLE, class T>
FASTVAE_INLINE V read(const T* from, int64_t j, int n, WHOLE) {
    if constexpr (WHOLE::value) return load(from + j, V{});
    else return load_first(from + j, n, V{});
}
template <class V, class WHOLE, class T>
FASTVAE_INLINE void write(T* to, int64_t j, int n, V x, WHOLE) {
    if constexpr (WHOLE::value) store(to + j, x);
    else store_first(to + j, n, x);
}
template <class V, class WHOLE>
FASTVAE_INLINE V only(V x, V other, int n, WHOLE) {
    if constexpr (WHOLE::value) return x;
    else return first_lanes<V>(n) ? x : other;
}

// Σ f of a row, by parts. f(j, n, whole) gives a vector of terms, 0 beyond the end.
template <class V, class F>
FASTVAE_INLINE double sum_of(int64_t count, F f) {
    double total = 0;
    for (int64_t start = 0; start < count; start += PART) {
        V part{};
        for_vectors<V>(start, start + PART < count ? start + PART : count,
                       [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA { part += f(j, n, whole); });
        total += sum(part);
    }
    return total;
}

// The factor of a row's gradients.
template <class Scalar>
FASTVAE_INLINE double factor_of(const RowTerm& of, int64_t row) {
    return of.upstream == nullptr ? of.weight : of.weight * static_cast<const Scalar*>(of.upstream)[row];
}

// Of a row of logits: the greatest, and Σ e^(logit − greatest).
template <class V>
struct Softmax {
    V shift;
    double total;

    template <class Y>
    static FASTVAE_INLINE Softmax of(const Y* logits, int64_t count) {
        const V lowest = constant<V>(-INFINITY);
        V greatest = lowest;
        for_vectors<V>(0, count, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
            greatest = at_least(greatest, only(read<V>(logits, j, n, whole), lowest, n, whole));
        });
        auto top = greatest[0];
        for (int k = 1; k < LANES<V>; ++k) top = greatest[k] > top || greatest[k] != greatest[k] ? greatest[k] : top;
        const V shift = broadcast<V>(top);
        const double total = sum_of<V>(count, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
            return only(exp(read<V>(logits, j, n, whole) - shift), V{}, n, whole);
        });
        return {shift, total};
    }
    FASTVAE_INLINE double log_total() const { return std::log(total); }
};

template <class Y>
int categorical_nll(const Categorical& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    using Scalar = typename lanes_of<V>::scalar;
    bool outside = false;
    for (int64_t row = first; row < last; ++row) {
        const Y* logits = static_cast<const Y*>(work.logits) + row * work.cols;
        const int64_t target = work.target[row];
        if (target < 0 || target >= work.cols) {
            outside = true;
            continue;
        }
        const Softmax<V> softmax = Softmax<V>::of(logits, work.cols);
        const double chosen = load_first(logits + target, 1, V{})[0];
        if (work.of.values != nullptr) work.of.values[row] = softmax.log_total() - (chosen - softmax.shift[0]);
        if (work.grad == nullptr) continue;
        Y* grad = static_cast<Y*>(work.grad) + row * work.cols;
        const double factor = factor_of<Scalar>(work.of, row);
        const V scale = constant<V>(factor / softmax.total);
        for_vectors<V>(0, work.cols, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
            write(grad, j, n, exp(read<V>(logits, j, n, whole) - softmax.shift) * scale, whole);
        });
        const double others = (softmax.total - std::exp(chosen - softmax.shift[0])) / softmax.total;
        const V at_target = constant<V>(-factor * others);
        store_first(grad + target, 1, at_target);
    }
    return outside;
}

// KL of softmax(q) to softmax(p), both mixed with the uniform distribution. With d = log q − log p and s the softmax of the
// logits, q = (1 − u)·s + u/n: ∂/∂q's logits are (1 − u)·s_q·(d − Σ s_q·d), ∂/∂p's s_p·(Σ (1 − u)·s_p·q/p) − (1 − u)·s_p·q/p.
template <class Y, bool MIXED>
int categorical_kl(const Categorical& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    using Scalar = typename lanes_of<V>::scalar;
    const double rest = 1 - work.unimix;
    const V share = constant<V>(work.unimix / work.cols), zero{};
    for (int64_t row = first; row < last; ++row) {
        const Y* logits_q = static_cast<const Y*>(work.logits) + row * work.cols;
        const Y* logits_p = static_cast<const Y*>(work.logits_p) + row * work.cols;
        const Softmax<V> of_q = Softmax<V>::of(logits_q, work.cols), of_p = Softmax<V>::of(logits_p, work.cols);
        const V by_q = constant<V>(1 / of_q.total), by_p = constant<V>(1 / of_p.total);
        const V apart = constant<V>(of_p.log_total() - of_q.log_total());
        struct Both {
            V s_q, s_p, q, p, d;
        };
        const auto at = [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
            const V l_q = read<V>(logits_q, j, n, whole) - of_q.shift, l_p = read<V>(logits_p, j, n, whole) - of_p.shift;
            const V s_q = exp(l_q) * by_q, s_p = exp(l_p) * by_p;
            Both both{s_q, s_p, s_q, s_p, (l_q - l_p) + apart};
            if constexpr (MIXED) {
                both.q = constant<V>(rest) * s_q + share;
                both.p = constant<V>(rest) * s_p + share;
                both.d = log(both.q) - log(both.p);
            }
            both.d = both.q == zero ? zero : both.d;
            return both;
        };
        if (work.of.values != nullptr) {
            work.of.values[row] = sum_of<V>(work.cols, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
                const Both both = at(j, n, whole);
                return only(both.q * both.d, zero, n, whole);
            });
        }
        if (work.grad == nullptr && work.grad_p == nullptr) continue;
        double mean = 0, flow = 1;
        const double kl = work.of.values != nullptr && !MIXED ? work.of.values[row] : 0;
        if (MIXED || work.of.values == nullptr) {
            mean = sum_of<V>(work.cols, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
                const Both both = at(j, n, whole);
                return only(both.s_q * both.d, zero, n, whole);
            });
        } else {
            mean = kl;
        }
        if constexpr (MIXED) {
            flow = rest * sum_of<V>(work.cols, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
                const Both both = at(j, n, whole);
                return only(both.s_p * divide(both.q, both.p), zero, n, whole);
            });
        }
        const double upstream = work.of.upstream == nullptr ? 1 : static_cast<const Scalar*>(work.of.upstream)[row];
        const V factor_q = constant<V>(rest * work.of.weight * upstream), factor_p = constant<V>(work.weight_p * upstream);
        const V mean_all = constant<V>(mean), flow_all = constant<V>(flow);
        Y *grad = static_cast<Y*>(work.grad) + row * work.cols, *grad_p = static_cast<Y*>(work.grad_p) + row * work.cols;
        for_vectors<V>(0, work.cols, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
            const Both both = at(j, n, whole);
            write(grad, j, n, factor_q * (both.s_q * (both.d - mean_all)), whole);
            V moved = both.s_p - both.q;
            if constexpr (MIXED) moved = both.s_p * (flow_all - constant<V>(rest) * divide(both.q, both.p));
            write(grad_p, j, n, factor_p * moved, whole);
        });
    }
    return 0;
}

template <class Y, bool PRIOR>
int log_ratio(const LogRatio& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    using Scalar = typename lanes_of<V>::scalar;
    const int64_t cols = work.cols;
    const V half = constant<V>(0.5), standard = constant<V>(work.alone ? 0 : 1);
    const auto row_of = [&](const void* tensor, int64_t row) FASTVAE_LAMBDA {
        return static_cast<const Y*>(tensor) + row * cols;
    };
    const auto grad_of = [&](void* tensor, int64_t row) FASTVAE_LAMBDA { return static_cast<Y*>(tensor) + row * cols; };
    for (int64_t example = first; example < last; ++example) {
        const Y *mu = row_of(work.mu, example), *logvar = row_of(work.logvar, example);
        const Y *prior_mu = mu, *prior_logvar = logvar;
        if (PRIOR) prior_mu = row_of(work.prior_mu, example), prior_logvar = row_of(work.prior_logvar, example);
        for (int64_t s = 0; work.of.values != nullptr && s < work.samples; ++s) {
            const int64_t row = s * work.examples + example;
            const Y* z = row_of(work.z, row);
            work.of.values[row] = sum_of<V>(cols, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
                const V at = read<V>(z, j, n, whole), l = read<V>(logvar, j, n, whole), d = at - read<V>(mu, j, n, whole);
                V twice = -(d * d * exp(-l)) - l;
                if constexpr (PRIOR) {
                    const V m = read<V>(prior_logvar, j, n, whole), e = at - read<V>(prior_mu, j, n, whole);
                    twice += e * e * exp(-m) + m;
                } else {
                    twice += standard * at * at;
                }
                return only(half * twice, V{}, n, whole);
            });
        }
        if (work.grad_z == nullptr) continue;
        // the samples of a vector of elements one after the other: what all share is read and written once
        for_vectors<V>(0, cols, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
            const V mean = read<V>(mu, j, n, whole), precision = exp(-read<V>(logvar, j, n, whole));
            V prior_mean{}, prior_precision = standard;
            if constexpr (PRIOR) {
                prior_mean = read<V>(prior_mu, j, n, whole);
                prior_precision = exp(-read<V>(prior_logvar, j, n, whole));
            }
            V by_mu{}, by_logvar{}, by_prior_mu{}, by_prior_logvar{};
            for (int64_t s = 0; s < work.samples; ++s) {
                const int64_t row = s * work.examples + example;
                const V factor = constant<V>(factor_of<Scalar>(work.of, row)), at = read<V>(row_of(work.z, row), j, n, whole);
                const V d = at - mean, e = at - prior_mean, far = d * precision, prior_far = e * prior_precision;
                write(grad_of(work.grad_z, row), j, n, factor * (prior_far - far), whole);
                by_mu += factor * far;
                by_logvar += factor * (half * d * far - half);
                by_prior_mu -= factor * prior_far;
                by_prior_logvar += factor * (half - half * e * prior_far);
            }
            write(grad_of(work.grad_mu, example), j, n, by_mu, whole);
            write(grad_of(work.grad_logvar, example), j, n, by_logvar, whole);
            if constexpr (PRIOR) {
                write(grad_of(work.grad_prior_mu, example), j, n, by_prior_mu, whole);
                write(grad_of(work.grad_prior_logvar, example), j, n, by_prior_logvar, whole);
            }
        });
    }
    return 0;
}

template <class Y, class X>
int logistic(const Logistic& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    using Scalar = typename lanes_of<V>::scalar;
    V least{}, greatest{};
    const V one = constant<V>(1), two = constant<V>(2);
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = row * work.grid.cols, left = work.grid.total - begin;
        const int64_t count = work.grid.cols < left ? work.grid.cols : left;
        const Y* mean = static_cast<const Y*>(work.mean) + row * work.mean_stride;
        const Y* log_scale = static_cast<const Y*>(work.log_scale) + row * work.log_scale_stride;
        const X* target = static_cast<const X*>(work.target) + row * work.target_stride;
        Y *nll = static_cast<Y*>(work.nll), *grad_mean = static_cast<Y*>(work.grad_mean);
        Y* grad_log_scale = static_cast<Y*>(work.grad_log_scale);
        const Y* upstream = nullptr;
        V by_row = constant<V>(work.weight);
        if (work.upstream_by_element) upstream = static_cast<const Y*>(work.upstream) + row * work.upstream_stride;
        else if (work.upstream != nullptr) by_row *= static_cast<const Scalar*>(work.upstream)[row * work.upstream_stride];
        const double row_sum = sum_of<V>(count, [&](int64_t j, int n, auto whole) FASTVAE_LAMBDA {
            const V x = read<V>(target, j, n, whole);
            least = at_most(x, least);
            greatest = at_least(x, greatest);
            const Level<V> found = level(two * x - one, read<V>(mean, j, n, whole), read<V>(log_scale, j, n, whole));
            const V value = -(found.additive + log_normal(found.factor));
            if (nll != nullptr) write(nll + begin, j, n, value, whole);
            if (grad_mean != nullptr) {
                const V factor = upstream != nullptr ? read<V>(upstream, j, n, whole) : by_row;
                write(grad_mean + begin, j, n, -factor * found.by_mean, whole);
                write(grad_log_scale + begin, j, n, -factor * found.by_log_scale, whole);
            }
            return only(value, V{}, n, whole);
        });
        if (work.sums != nullptr) work.sums[row] = row_sum;
    }
    return any((least < V{}) | (greatest > one));
}

}  // namespace

Span<Categorical> categorical_span(const Categorical& work) {
    return with_dtype(work.of.type, [&](auto y) -> Span<Categorical> {
        using Y = decltype(y);
        if (work.logits_p == nullptr) return categorical_nll<Y>;
        return work.unimix > 0 ? categorical_kl<Y, true> : categorical_kl<Y, false>;
    });
}

Span<LogRatio> log_ratio_span(const LogRatio& work) {
    return with_dtype(work.of.type, [&](auto y) -> Span<LogRatio> {
        using Y = decltype(y);
        return work.prior_mu == nullptr ? log_ratio<Y, false> : log_ratio<Y, true>;
    });
}

Span<Logistic> logistic_span(const Logistic& work) {
    return with_dtype(work.type, [&](auto y) -> Span<Logistic> {
        using Y = decltype(y);
        return work.target_type == UINT8 ? logistic<Y, uint8_t> : logistic<Y, compute_t<Y>>;
    });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
