// The reconstruction pair on a GPU: one loop over rows, into which a likelihood is plugged at compile time.
//
// Reads recon and target once, in 16-byte vectors. The one-pass forward writes the gradient beside the loss: for float32,
// 8 bytes an element read and 4 written; for bfloat16 with a uint8 target, 3 and 2. A backward by row is the same loop
// without the sum.
#include "../likelihoods.h"
#include "memory.cuh"
#include "rows.cuh"

namespace fastvae {
namespace device {
namespace {

constexpr int FACTORS = 96;  // in [½, 2], multiplied before their logarithm is taken; 2¹²⁷ is the end of float32

// Elements of Y in 16 bytes.
template <class Y>
constexpr int VECTOR = 16 / sizeof(Y);

// An SM has at least so many: two would not leave the counts of float64 the registers they need.
template <class Y>
constexpr int BLOCKS = sizeof(Y) == 8 ? 1 : 2;

template <class TERM, class Y, class X>
__global__ void __launch_bounds__(THREADS, BLOCKS<Y>) rows_kernel(const Reconstruction work, const int group) {
    using V = compute_t<Y>;
    __shared__ SumStorage storage;
    const V parameter = static_cast<V>(work.parameter);
    for_items(work.grid, group, [&](const Turn& turn) {
        const int64_t begin = turn.row * work.grid.cols, left = work.grid.total - begin;
        const int64_t end = left < work.grid.cols ? left : work.grid.cols;
        const Y* recon = static_cast<const Y*>(work.recon) + turn.row * work.recon_stride;
        const X* target = static_cast<const X*>(work.target) + turn.row * work.target_stride;
        Y* grad = work.grad == nullptr ? nullptr : static_cast<Y*>(work.grad) + begin;
        V weight = static_cast<V>(work.weight);
        if (work.upstream != nullptr) {
            weight *= static_cast<const V*>(work.upstream)[turn.row * work.upstream_stride];
        }
        const int64_t head = head_of<VECTOR<Y>>(recon);
        const bool vectors = aligned<VECTOR<Y>>(recon + head) && aligned<VECTOR<Y>>(target + head) &&
                             (grad == nullptr || aligned<VECTOR<Y>>(grad + head));
        double sum = 0;
        V additive = 0, product = 1;
        int factors = 0;
        for_elements<VECTOR<Y>>(turn, end, head, vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            const Values<V, N> y = load<N>(recon + j);
            const Values<V, N> x = load<N>(target + j);
            Values<V, N> gradient;
            V factor = 1;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const Terms<V> terms = TERM::terms(y.v[k], x.v[k], parameter);
                additive += terms.additive;
                factor *= terms.factor;
                gradient.v[k] = terms.derivative * weight;
            }
            if (grad != nullptr) store<N>(grad + j, gradient);
            product *= factor;
            factors += N;
            if (factors > FACTORS - VECTOR<Y>) {
                if constexpr (TERM::HAS_FACTOR) additive += V(TERM::FACTOR_SIGN) * log_normal(product);
                sum += static_cast<double>(additive);
                additive = 0;
                product = 1;
                factors = 0;
            }
        });
        if (work.sums != nullptr) {
            if constexpr (TERM::HAS_FACTOR) additive += V(TERM::FACTOR_SIGN) * log_normal(product);
            write_sum(storage, group, turn, sum + static_cast<double>(additive), work.sums);
        }
    });
}

// Elementwise nll, or the gradient for an upstream gradient of one number an element.
template <class TERM, class Y, class X>
__global__ void __launch_bounds__(THREADS) elements_kernel(const Reconstruction work, const int group) {
    using V = compute_t<Y>;
    const V parameter = static_cast<V>(work.parameter);
    for_items(work.grid, group, [&](const Turn& turn) {
        const int64_t begin = turn.row * work.grid.cols, left = work.grid.total - begin;
        const int64_t end = left < work.grid.cols ? left : work.grid.cols;
        const Y* recon = static_cast<const Y*>(work.recon) + turn.row * work.recon_stride;
        const X* target = static_cast<const X*>(work.target) + turn.row * work.target_stride;
        const bool backward = work.upstream != nullptr;
        const Y* upstream = backward ? static_cast<const Y*>(work.upstream) + turn.row * work.upstream_stride : nullptr;
        Y* out = static_cast<Y*>(backward ? work.grad : work.nll) + begin;
        const int64_t head = head_of<VECTOR<Y>>(recon);
        const bool vectors = aligned<VECTOR<Y>>(recon + head) && aligned<VECTOR<Y>>(target + head) &&
                             aligned<VECTOR<Y>>(out + head) && (!backward || aligned<VECTOR<Y>>(upstream + head));
        for_elements<VECTOR<Y>>(turn, end, head, vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            const Values<V, N> y = load<N>(recon + j);
            const Values<V, N> x = load<N>(target + j);
            Values<V, N> result;
            if (backward) {
                const Values<V, N> g = load<N>(upstream + j);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    result.v[k] = TERM::terms(y.v[k], x.v[k], parameter).derivative * g.v[k];
                }
            } else {
#pragma unroll
                for (int k = 0; k < N; ++k) result.v[k] = TERM::nll(y.v[k], x.v[k], parameter);
            }
            store<N>(out + j, result);
        });
    });
}

// Loss and gradients of a term whose parameter is a tensor, in one pass; INFLATED by the logits of a zero.
template <class TERM, class Y, class X, bool BY_ROW, bool INFLATED>
__global__ void __launch_bounds__(THREADS, BLOCKS<Y>)
    with_tensor_kernel(const WithTensor work, const int group) {
    using V = compute_t<Y>;
    __shared__ SumStorage storage;
    const Reconstruction& of = work.of;
    for_items(of.grid, group, [&](const Turn& turn) {
        const int64_t begin = turn.row * of.grid.cols, left = of.grid.total - begin;
        const int64_t end = left < of.grid.cols ? left : of.grid.cols;
        const Y* recon = static_cast<const Y*>(of.recon) + turn.row * of.recon_stride;
        const X* target = static_cast<const X*>(of.target) + turn.row * of.target_stride;
        const V* parameter = static_cast<const V*>(work.parameter) + turn.row * work.parameter_stride;
        Y* nll = of.nll == nullptr ? nullptr : static_cast<Y*>(of.nll) + begin;
        Y* grad = of.grad == nullptr ? nullptr : static_cast<Y*>(of.grad) + begin;
        V* grad_parameter = work.grad_parameter == nullptr ? nullptr : static_cast<V*>(work.grad_parameter) + begin;
        const Y* upstream = nullptr;
        V by_row = static_cast<V>(of.weight);
        if (of.upstream_by_element) upstream = static_cast<const Y*>(of.upstream) + turn.row * of.upstream_stride;
        else if (of.upstream != nullptr) by_row *= static_cast<const V*>(of.upstream)[turn.row * of.upstream_stride];
        const int64_t head = head_of<VECTOR<Y>>(recon);
        bool vectors = aligned<VECTOR<Y>>(recon + head) && aligned<VECTOR<Y>>(target + head) &&
                       (BY_ROW || aligned<VECTOR<Y>>(parameter + head));
        if (nll != nullptr) vectors = vectors && aligned<VECTOR<Y>>(nll + head);
        if (grad != nullptr) vectors = vectors && aligned<VECTOR<Y>>(grad + head);
        if (grad_parameter != nullptr) vectors = vectors && aligned<VECTOR<Y>>(grad_parameter + head);
        if (upstream != nullptr) vectors = vectors && aligned<VECTOR<Y>>(upstream + head);
        const V* logits = nullptr;
        V* grad_logits = nullptr;
        if constexpr (INFLATED) {
            logits = static_cast<const V*>(work.zero_logits) + turn.row * work.zero_logits_stride;
            vectors = vectors && aligned<VECTOR<Y>>(logits + head);
            if (work.grad_zero_logits != nullptr) {
                grad_logits = static_cast<V*>(work.grad_zero_logits) + begin;
                vectors = vectors && aligned<VECTOR<Y>>(grad_logits + head);
            }
        }
        double sum = 0, slope_sum = 0;
        for_elements<VECTOR<Y>>(turn, end, head, vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            const Values<V, N> y = load<N>(recon + j);
            const Values<V, N> x = load<N>(target + j);
            Values<V, N> p, c, of_nll, of_recon, of_parameter, logit, of_logit;
            if constexpr (!BY_ROW) p = load<N>(parameter + j);
            if constexpr (INFLATED) logit = load<N>(logits + j);
            if (upstream != nullptr) c = load<N>(upstream + j);
            V additive = 0, slopes = 0;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                if constexpr (BY_ROW) p.v[k] = *parameter;
                if (upstream == nullptr) c.v[k] = by_row;
                const Terms<V> terms = TERM::terms(y.v[k], x.v[k], p.v[k]);
                of_nll.v[k] = terms.additive;
                if constexpr (INFLATED) {
                    const ZeroInflated<V> term = zero_inflated(terms.additive, x.v[k], logit.v[k]);
                    of_nll.v[k] = term.nll;
                    of_logit.v[k] = term.by_logit * c.v[k];
                    c.v[k] *= term.by_nll;
                }
                of_recon.v[k] = terms.derivative * c.v[k];
                of_parameter.v[k] = TERM::slope(y.v[k], x.v[k], p.v[k]) * c.v[k];
                additive += of_nll.v[k];
                slopes += of_parameter.v[k];
            }
            sum += static_cast<double>(additive);
            slope_sum += static_cast<double>(slopes);
            if (nll != nullptr) store<N>(nll + j, of_nll);
            if (grad != nullptr) store<N>(grad + j, of_recon);
            if (grad_parameter != nullptr) store<N>(grad_parameter + j, of_parameter);
            if constexpr (INFLATED) {
                if (grad_logits != nullptr) store<N>(grad_logits + j, of_logit);
            }
        });
        if (of.sums != nullptr) write_sum(storage, group, turn, sum, of.sums);
        if (work.parameter_sums != nullptr) write_sum(storage, group, turn, slope_sum, work.parameter_sums);
    });
}

template <class TERM, class Y, class X>
int64_t launch_for_types(const WithTensor& work, const Queue& queue) {
    if constexpr (TERM::WITH_TENSOR) {
        const auto launch = [&](auto inflated) {
            constexpr bool INFLATED = decltype(inflated)::value;
            if (work.by_row) {
                return launch_rows<with_tensor_kernel<TERM, Y, X, true, INFLATED>>(work, work.of.grid, VECTOR<Y>, queue);
            }
            return launch_rows<with_tensor_kernel<TERM, Y, X, false, INFLATED>>(work, work.of.grid, VECTOR<Y>, queue);
        };
        if constexpr (TERM::TARGET == Domain::COUNT) {
            if (work.zero_logits != nullptr) return launch(std::true_type{});
        }
        return launch(std::false_type{});
    } else {
        throw std::invalid_argument(std::string(TERM::NAME) + " takes no tensor for its parameter");
    }
}

template <class TERM, class Y, class X>
int64_t launch_for_types(const Reconstruction& work, const Queue& queue) {
    if (work.nll != nullptr || work.upstream_by_element) {
        return launch_rows<elements_kernel<TERM, Y, X>>(work, work.grid, VECTOR<Y>, queue);
    }
    using SUMMED = std::conditional_t<std::is_same_v<TERM, BernoulliProbs>, BernoulliProbsSummed, TERM>;
    return launch_rows<rows_kernel<SUMMED, Y, X>>(work, work.grid, VECTOR<Y>, queue);
}

template <class TERM, class Y, class WORK>
int64_t launch_for_target(const WORK& work, const Reconstruction& of, const Queue& queue) {
    if (of.target_type == of.recon_type) return launch_for_types<TERM, Y, Y>(work, queue);
    if constexpr (sizeof(Y) < 8) {  // beside float64, a target of another type is converted by torch
        if constexpr (TERM::TARGET != Domain::COUNT) {  // a byte is x/255: counts come as floats
            if (of.target_type == UINT8) return launch_for_types<TERM, Y, uint8_t>(work, queue);
        }
        if (of.target_type == FLOAT32) return launch_for_types<TERM, Y, float>(work, queue);
    }
    throw std::invalid_argument("target must be uint8, float32 or of the dtype of recon");
}

// Launches the loop over the rows of `of`, which is all or a part of `work`; returns how many sums it leaves for each.
template <class WORK>
int64_t launch_for(const WORK& work, const Reconstruction& of, const Queue& queue) {
    int64_t segments = 0;
    with_likelihood(of.likelihood, [&](auto term) {
        with_dtype(of.recon_type, [&](auto y) {
            segments = launch_for_target<decltype(term), decltype(y)>(work, of, queue);
        });
    });
    return segments;
}

// Launches the loop over rows; returns how many sums it leaves for each.
int64_t run(const Reconstruction& work, const Queue& queue) {
    if (work.grid.total == 0) {
        if (work.sums != nullptr && work.grid.rows != 0) {
            check(cudaMemsetAsync(work.sums, 0, work.grid.rows * sizeof(double), static_cast<cudaStream_t>(queue.stream)));
        }
        return 1;
    }
    return launch_for(work, work, queue);
}

}  // namespace

int64_t sum_rows(const Reconstruction& work, const Queue& queue) { return run(work, queue); }

int64_t with_tensor(const WithTensor& work, const Queue& queue) {
    const OnDevice guard(queue.device);
    return launch_for(work, work.of, queue);
}

void reconstruction_forward(Reconstruction work, Reduction reduction, void* loss, const Queue& queue) {
    const OnDevice guard(queue.device);
    const double weight = reduction_weight(reduction, work.grid);
    work.weight = weight;
    if (reduction != EXAMPLE) merge_rows(work, work.grid.total > 0 ? work.grid.total : 1);
    if (reduction == NONE) {
        work.nll = loss;
        run(work, queue);
        return;
    }
    work.sums = queue.scratch;
    const int64_t segments = run(work, queue);
    finish_sums(work.sums, segments, work.grid.rows, reduction, weight, work.recon_type, loss, queue);
}

void reconstruction_backward(Reconstruction work, Reduction reduction, const Queue& queue) {
    const OnDevice guard(queue.device);
    work.weight = reduction_weight(reduction, work.grid);
    if (work.upstream_by_element || work.upstream_stride == 0) {
        merge_rows(work, work.grid.total > 0 ? work.grid.total : 1);
    }
    run(work, queue);
}

}  // namespace device
}  // namespace fastvae
