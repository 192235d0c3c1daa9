// The reconstruction pair on a CPU: one loop over rows, into which a likelihood is plugged at compile time.
//
// Reads recon and target once. The one-pass forward writes the gradient beside the loss: for float32, 8 bytes an element
// read and 4 written. A row is an example, or 4096 elements where a total of dense tensors is wanted.
#include <type_traits>

#include "spans.h"
#include "../likelihoods.h"

namespace fastvae {
namespace FASTVAE_ISA {
namespace {

constexpr int FACTORS = 96;  // in [½, 2], multiplied before their logarithm is taken; 2¹²⁷ is the end of float32

template <class T>
constexpr int CODE = FLOAT32;
template <>
constexpr int CODE<double> = FLOAT64;
template <>
constexpr int CODE<bfloat16> = BFLOAT16;
template <>
constexpr int CODE<float16> = FLOAT16;

// Whether a number was seen outside the domain; NaN is not.
template <Domain DOMAIN, class V>
struct Watch {
    V least{}, greatest{};
    typename lanes_of<V>::integer fractions{};

    FASTVAE_INLINE void see(V x) {
        if constexpr (DOMAIN != Domain::REAL) least = at_most(x, least);
        if constexpr (DOMAIN == Domain::UNIT) greatest = at_least(x, greatest);
        // from 2²³ on a float has no fraction, and may not fit an integer
        if constexpr (DOMAIN == Domain::COUNT) {
            fractions |= (absolute(x) < constant<V>(8388608)) & (to_float(to_integer(x)) != x);
        }
    }
    FASTVAE_INLINE bool outside() const {
        return any((least < constant<V>(0)) | (greatest > constant<V>(1)) | fractions);
    }
};
// A byte's x/255 needs no watching.
template <class TERM, class V, class X>
using WatchTarget = Watch<sizeof(X) == 1 ? Domain::REAL : TERM::TARGET, V>;
template <class TERM, class V>
using WatchRecon = Watch<TERM::RECON, V>;

template <class T>
FASTVAE_INLINE T smaller(T a, T b) {
    return a < b ? a : b;
}

template <class TERM, class Y, class X, bool WITH_GRADIENT>
int forward_rows(const Reconstruction& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    constexpr int LANES = lanes_of<V>::COUNT;
    const V parameter = constant<V>(work.parameter), weight = constant<V>(work.weight), one = constant<V>(1);
    WatchTarget<TERM, V, X> targets;
    WatchRecon<TERM, V> recons;
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = row * work.grid.cols, end = smaller(work.grid.cols, work.grid.total - begin);
        const Y* recon = static_cast<const Y*>(work.recon) + row * work.recon_stride;
        const X* target = static_cast<const X*>(work.target) + row * work.target_stride;
        Y* grad = static_cast<Y*>(work.grad) + begin;
        double row_sum = 0;
        for (int64_t start = 0; start < end; start += FACTORS * LANES) {
            const int64_t stop = smaller<int64_t>(start + FACTORS * LANES, end);
            V additive{}, product = one;
            int64_t j = start;
            for (; j + LANES <= stop; j += LANES) {
                const V y = load_ahead(recon + j, V{}), x = load_ahead(target + j, V{});
                targets.see(x);
                recons.see(y);
                const Terms<V> terms = TERM::terms(y, x, parameter);
                additive += terms.additive;
                if constexpr (TERM::HAS_FACTOR) product *= terms.factor;
                if constexpr (WITH_GRADIENT) store_ahead(grad + j, terms.derivative * weight);
            }
            if (j < stop) {
                const int count = static_cast<int>(stop - j);
                const auto there = first_lanes<V>(count);
                const V y = load_first(recon + j, count, V{}), x = load_first(target + j, count, V{});
                targets.see(x);
                recons.see(y);
                const Terms<V> terms = TERM::terms(y, x, parameter);
                additive += there ? terms.additive : V{};
                if constexpr (TERM::HAS_FACTOR) product *= there ? terms.factor : one;
                if constexpr (WITH_GRADIENT) store_first(grad + j, count, terms.derivative * weight);
            }
            if constexpr (TERM::HAS_FACTOR) additive += TERM::FACTOR_SIGN * log_normal(product);
            row_sum += sum(additive);
        }
        work.sums[row] = row_sum;
    }
    return targets.outside() || recons.outside();
}

// Elementwise nll, or the gradient for an upstream gradient given by row or by element.
template <class TERM, class Y, class X, bool BACKWARD>
int elements(const Reconstruction& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    using Scalar = typename lanes_of<V>::scalar;
    constexpr int LANES = lanes_of<V>::COUNT;
    const V parameter = constant<V>(work.parameter);
    WatchTarget<TERM, V, X> targets;
    WatchRecon<TERM, V> recons;
    for (int64_t row = first; row < last; ++row) {
        const int64_t begin = row * work.grid.cols, end = smaller(work.grid.cols, work.grid.total - begin);
        const Y* recon = static_cast<const Y*>(work.recon) + row * work.recon_stride;
        const X* target = static_cast<const X*>(work.target) + row * work.target_stride;
        Y* out = static_cast<Y*>(BACKWARD ? work.grad : work.nll) + begin;
        const Y* upstream = nullptr;
        V by_row{};
        if (BACKWARD && work.upstream_by_element) {
            upstream = static_cast<const Y*>(work.upstream) + row * work.upstream_stride;
        } else if (BACKWARD) {
            by_row = constant<V>(work.weight) * static_cast<const Scalar*>(work.upstream)[row * work.upstream_stride];
        }
        const auto value = [&](V y, V x, V factor) FASTVAE_LAMBDA {
            if constexpr (!BACKWARD) {
                targets.see(x);
                recons.see(y);
            }
            if constexpr (BACKWARD) return TERM::terms(y, x, parameter).derivative * factor;
            else return TERM::nll(y, x, parameter);
        };
        int64_t j = 0;
        for (; j + LANES <= end; j += LANES) {
            const V factor = upstream ? load_ahead(upstream + j, V{}) : by_row;
            store_ahead(out + j, value(load_ahead(recon + j, V{}), load_ahead(target + j, V{}), factor));
        }
        if (j < end) {
            const int count = static_cast<int>(end - j);
            const V factor = upstream ? load_first(upstream + j, count, V{}) : by_row;
            const V y = load_first(recon + j, count, V{}), x = load_first(target + j, count, V{});
            store_first(out + j, count, value(y, x, factor));
        }
    }
    return targets.outside() || recons.outside();
}

template <class TERM, class Y, class X>
Span<Reconstruction> span_of(const Reconstruction& work) {
    if constexpr (std::is_same_v<TERM, BernoulliProbs> && std::is_same_v<vector_t<Y>, Float>) {
        if (work.sums != nullptr && work.parameter >= BernoulliProbsSummed::MIN_EPS) {
            using SUMMED = BernoulliProbsSummed;
            return work.grad != nullptr ? forward_rows<SUMMED, Y, X, true> : forward_rows<SUMMED, Y, X, false>;
        }
    }
    if (work.sums != nullptr) {
        return work.grad != nullptr ? forward_rows<TERM, Y, X, true> : forward_rows<TERM, Y, X, false>;
    }
    return work.nll != nullptr ? elements<TERM, Y, X, false> : elements<TERM, Y, X, true>;
}

// e^score over Σ e^scores of a row, without overflow: inverse · e^(score − shift).
template <class V>
struct Softmax {
    V shift, inverse;

    template <class Y>
    static FASTVAE_INLINE Softmax of(const Y* scores, int64_t count) {
        constexpr int LANES = lanes_of<V>::COUNT;
        const V lowest = constant<V>(-INFINITY);
        V greatest = lowest;
        // each vector of the row, padded to a whole one by -∞
        const auto for_vectors = [&](int64_t first, int64_t last, auto see) FASTVAE_LAMBDA {
            int64_t j = first;
            for (; j + LANES <= last; j += LANES) see(load(scores + j, V{}));
            if (j < last) {
                const int left = static_cast<int>(last - j);
                see(first_lanes<V>(left) ? load_first(scores + j, left, V{}) : lowest);
            }
        };
        for_vectors(0, count, [&](V y) FASTVAE_LAMBDA { greatest = at_least(greatest, y); });
        auto top = greatest[0];
        for (int k = 1; k < LANES; ++k) top = greatest[k] > top ? greatest[k] : top;
        const V shift = broadcast<V>(top);
        double total = 0;
        for (int64_t start = 0; start < count; start += FACTORS * LANES) {
            V part{};
            for_vectors(start, smaller<int64_t>(start + FACTORS * LANES, count),
                        [&](V y) FASTVAE_LAMBDA { part += exp(y - shift); });
            total += sum(part);
        }
        return {shift, constant<V>(1 / total)};
    }

    FASTVAE_INLINE V operator()(V score) const { return exp(score - shift) * inverse; }
};

// What a softmax passes on: from y·∂nll/∂y, whose sum over the row is `flow`, to ∂nll/∂score.
template <class Y, class V>
void less_mean_flow(const Y* scores, Y* grad, int64_t count, const Softmax<V> softmax, V flow) {
    constexpr int LANES = lanes_of<V>::COUNT;
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) {
        store(grad + j, load(grad + j, V{}) - softmax(load(scores + j, V{})) * flow);
    }
    if (j < count) {
        const int left = static_cast<int>(count - j);
        const V score = load_first(scores + j, left, V{});
        store_first(grad + j, left, load_first(grad + j, left, V{}) - softmax(score) * flow);
    }
}

// Loss and gradients of a term whose parameter is a tensor, in one pass over rows; from scores a row is read again while it
// is in the cache.
template <class TERM, class Y, class X, bool BY_ROW>
int with_tensor(const WithTensor& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    using Scalar = typename lanes_of<V>::scalar;
    constexpr int LANES = lanes_of<V>::COUNT;
    const Reconstruction& of = work.of;
    const V one = constant<V>(1);
    WatchTarget<TERM, V, X> targets;
    WatchRecon<TERM, V> recons;
    for (int64_t row = first * work.piece; row < smaller(last * work.piece, of.grid.rows); ++row) {
        const int64_t begin = row * of.grid.cols, end = smaller(of.grid.cols, of.grid.total - begin);
        const Y* recon = static_cast<const Y*>(of.recon) + row * of.recon_stride;
        const X* target = static_cast<const X*>(of.target) + row * of.target_stride;
        const Scalar* parameter = static_cast<const Scalar*>(work.parameter) + row * work.parameter_stride;
        const Y* upstream = nullptr;
        V by_row = constant<V>(of.weight);
        if (of.upstream_by_element) upstream = static_cast<const Y*>(of.upstream) + row * of.upstream_stride;
        else if (of.upstream != nullptr) by_row *= static_cast<const Scalar*>(of.upstream)[row * of.upstream_stride];
        Y *nll = static_cast<Y*>(of.nll), *grad = static_cast<Y*>(of.grad);
        Scalar* grad_parameter = static_cast<Scalar*>(work.grad_parameter);
        double* columns = work.columns == nullptr ? nullptr : work.columns + row / work.piece * of.grid.cols;
        const Scalar* logits = static_cast<const Scalar*>(work.zero_logits);
        if (logits != nullptr) logits += row * work.zero_logits_stride;
        Scalar* grad_logits = static_cast<Scalar*>(work.grad_zero_logits);
        const V number = BY_ROW ? broadcast<V>(*parameter) : one;
        const bool from_scores = TERM::TARGET == Domain::COUNT && work.library != nullptr;
        Softmax<V> softmax{};
        V library = one;
        if (from_scores) {
            library = broadcast<V>(static_cast<const Scalar*>(work.library)[row]);
            softmax = Softmax<V>::of(recon, end);
        }
        V additive{}, slopes{}, flow{};
        // `count` elements from j on, as many as a vector holds if WHOLE
        const auto step = [&](auto whole, int64_t j, int count) FASTVAE_LAMBDA {
            constexpr bool WHOLE = decltype(whole)::value;
            const auto there = first_lanes<V>(count);
            const auto read = [&](const auto* from) FASTVAE_LAMBDA {
                if constexpr (WHOLE) return load_ahead(from + j, V{});
                else return load_first(from + j, count, V{});
            };
            const auto write = [&](auto* to, V value) FASTVAE_LAMBDA {
                if constexpr (WHOLE) store_ahead(to + j, value);
                else store_first(to + j, count, value);
            };
            const auto add = [&](V& total, V value) FASTVAE_LAMBDA { total += WHOLE || there ? value : V{}; };
            V y = read(recon);
            const V x = read(target);
            if constexpr (TERM::TARGET == Domain::COUNT) {
                if (from_scores) y = library * softmax(y);
            }
            targets.see(x);
            recons.see(y);
            V p = number;
            if constexpr (!BY_ROW) p = read(parameter);
            if constexpr (!BY_ROW && !WHOLE) p = there ? p : one;
            const Terms<V> terms = TERM::terms(y, x, p);
            ZeroInflated<V> term{terms.additive, one, {}};
            if constexpr (TERM::TARGET == Domain::COUNT) {
                if (logits != nullptr) term = zero_inflated(terms.additive, x, read(logits));
            }
            if (of.sums != nullptr) add(additive, term.nll);
            if (nll != nullptr) write(nll + begin, term.nll);
            if (grad == nullptr) return;
            V factor = upstream != nullptr ? read(upstream) : by_row;
            if constexpr (TERM::TARGET == Domain::COUNT) {
                if (grad_logits != nullptr) write(grad_logits + begin, term.by_logit * factor);
                factor *= term.by_nll;
            }
            const V slope = TERM::slope(y, x, p) * factor;
            if constexpr (TERM::TARGET == Domain::COUNT) {
                if (from_scores) {
                    factor *= y;
                    add(flow, terms.derivative * factor);
                }
            }
            write(grad + begin, terms.derivative * factor);
            if constexpr (BY_ROW) {
                add(slopes, slope);
            } else if (columns != nullptr) {
                for (int k = 0; k < (WHOLE ? LANES : count); ++k) columns[j + k] += slope[k];
            } else {
                write(grad_parameter + begin, slope);
            }
        };
        double row_sum = 0, slope_sum = 0, flow_sum = 0;
        for (int64_t start = 0; start < end; start += FACTORS * LANES) {
            const int64_t stop = smaller<int64_t>(start + FACTORS * LANES, end);
            int64_t j = start;
            for (; j + LANES <= stop; j += LANES) step(std::true_type{}, j, LANES);
            if (j < stop) step(std::false_type{}, j, static_cast<int>(stop - j));
            row_sum += sum(additive);
            slope_sum += sum(slopes);
            flow_sum += sum(flow);
            additive = slopes = flow = V{};
        }
        if (from_scores && grad != nullptr) {
            work.flow[row] = flow_sum;
            less_mean_flow(recon, grad + begin, end, softmax, constant<V>(flow_sum));
        }
        if (of.sums != nullptr) of.sums[row] = row_sum;
        if (work.parameter_sums != nullptr) work.parameter_sums[row] = slope_sum;
    }
    return targets.outside() || recons.outside();
}

template <class T>
int rescale(const Rescale& work, int64_t first, int64_t last) {
    using V = vector_t<T>;
    constexpr int LANES = lanes_of<V>::COUNT;
    T* gradient = static_cast<T*>(work.gradient);
    const V factor = constant<V>(work.factor);
    int64_t j = first * ROW_BLOCK;
    const int64_t end = smaller(last * ROW_BLOCK, work.total);
    for (; j + LANES <= end; j += LANES) store(gradient + j, load(gradient + j, V{}) * factor);
    if (j < end) {
        const int count = static_cast<int>(end - j);
        store_first(gradient + j, count, load_first(gradient + j, count, V{}) * factor);
    }
    return 0;
}

}  // namespace

// Calls f(TERM{}, Y{}, X{}) for the likelihood and the types of the work.
template <class F>
auto with_types(const Reconstruction& work, F f) {
    return with_likelihood(work.likelihood, [&](auto term) {
        return with_dtype(work.recon_type, [&](auto y) {
            // a byte is x/255: counts come as floats
            if constexpr (decltype(term)::TARGET != Domain::COUNT) {
                if (work.target_type == UINT8) return f(term, y, uint8_t{});
            }
            if (work.target_type == CODE<decltype(y)>) return f(term, y, y);
            if (work.target_type == FLOAT32) return f(term, y, float{});
            throw std::invalid_argument("target must be uint8, float32 or of the dtype of recon");
        });
    });
}

Span<Reconstruction> reconstruction_span(const Reconstruction& work) {
    return with_types(work, [&](auto term, auto y, auto x) {
        return span_of<decltype(term), decltype(y), decltype(x)>(work);
    });
}

Span<WithTensor> with_tensor_span(const WithTensor& work) {
    return with_types(work.of, [&](auto term, auto y, auto x) -> Span<WithTensor> {
        using TERM = decltype(term);
        if constexpr (TERM::WITH_TENSOR) {
            return work.by_row ? with_tensor<TERM, decltype(y), decltype(x), true>
                               : with_tensor<TERM, decltype(y), decltype(x), false>;
        } else {
            throw std::invalid_argument(std::string(TERM::NAME) + " takes no tensor for its parameter");
        }
    });
}

std::vector<std::string> likelihood_names(bool with_tensor) { return names_of(with_tensor, Likelihoods{}); }

Span<Rescale> rescale_span(const Rescale& work) {
    return with_dtype(work.type, [](auto element) -> Span<Rescale> { return rescale<decltype(element)>; });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
