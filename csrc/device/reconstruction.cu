// The reconstruction pair on a GPU: one loop over rows, into which a likelihood is plugged at compile time.
//
// Reads recon and target once, in 16-byte vectors. The one-pass forward writes the gradient beside the loss: for float32,
// 8 bytes an element read and 4 written; for bfloat16 with a uint8 target, 3 and 2. A backward by row is the same loop
// without the sum.
#include "terms.cuh"

namespace fastvae {
namespace device {
namespace {

constexpr int FACTORS = 96;  // in [½, 2], multiplied before their logarithm is taken; 2¹²⁷ is the end of float32

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

template <class TERM, class Y, class X>
int64_t launch(const Reconstruction& work, const Queue& queue) {
    if (work.nll != nullptr || work.upstream_by_element) {
        return launch_rows<elements_kernel<TERM, Y, X>>(work, work.grid, VECTOR<Y>, queue);
    }
    using SUMMED = std::conditional_t<std::is_same_v<TERM, BernoulliProbs>, BernoulliProbsSummed, TERM>;
    return launch_rows<rows_kernel<SUMMED, Y, X>>(work, work.grid, VECTOR<Y>, queue);
}

// Launches the loop over rows; returns how many sums it leaves for each.
int64_t run(const Reconstruction& work, const Queue& queue) {
    if (work.grid.total == 0) {
        if (work.sums != nullptr && work.grid.rows != 0) {
            check(cudaMemsetAsync(work.sums, 0, work.grid.rows * sizeof(double), static_cast<cudaStream_t>(queue.stream)));
        }
        return 1;
    }
    return for_types(work, [&](auto term, auto y, auto x) {
        return launch<decltype(term), decltype(y), decltype(x)>(work, queue);
    });
}

}  // namespace

int64_t sum_rows(const Reconstruction& work, const Queue& queue) { return run(work, queue); }

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
