// The reconstruction pair on a GPU: one loop over rows, into which a likelihood is plugged at compile time.
//
// Reads recon and target once, in 16-byte vectors. The one-pass forward writes the gradient beside the loss: for float32,
// 8 bytes an element read and 4 written; for bfloat16 with a uint8 target, 3 and 2. A backward by row is the same loop
// without the sum.
#include "latent.cuh"
#include "terms.cuh"

namespace fastvae {
namespace device {
namespace {

constexpr int FACTORS = 96;  // in [½, 2], multiplied before their logarithm is taken; 2¹²⁷ is the end of float32

// The KL that a loss has besides: its log σ² are of the data's type.
struct Besides {
    Latent work;
    int group;
    dim3 blocks;  // (0, 0, 0): there is none
};

// One launch for both: the first blocks, `blocks` of them, walk the data, and the others the KL.
template <class TERM, class Y, class X>
__global__ void __launch_bounds__(THREADS, BLOCKS<Y>)
    rows_kernel(const Reconstruction work, const int group, const dim3 blocks, const Besides besides) {
    using V = compute_t<Y>;
    __shared__ SumStorage storage;
    const int64_t index = blockIdx.x, of_data = int64_t{blocks.x} * blocks.y;
    if (index >= of_data) {
        const int64_t k = index - of_data, width = besides.blocks.x;
        const Place place{k % width, k / width, width, besides.blocks.y};
        return forward_rows<Y, true, false, STANDARD>(besides.work, besides.group, place, storage);
    }
    const Place block{index % blocks.x, index / blocks.x, blocks.x, blocks.y};
    const V parameter = static_cast<V>(work.parameter);
    for_items(work.grid, group, block, [&](const Turn& turn) {
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

// Launches the loop over rows, and that of a KL if there is one; returns how many sums they leave for each row.
template <class TERM, class Y, class X>
Segments launch_term(const Reconstruction& work, const Latent* latent, const Queue& queue) {
    if (work.nll != nullptr || work.upstream_by_element) {
        return {launch_rows<elements_kernel<TERM, Y, X>>(work, work.grid, VECTOR<Y>, queue), 0};
    }
    using SUMMED = std::conditional_t<std::is_same_v<TERM, BernoulliProbs>, BernoulliProbsSummed, TERM>;
    constexpr auto KERNEL = rows_kernel<SUMMED, Y, X>;
    const int64_t full = resident_blocks<KERNEL>(queue.device);
    const Share share = share_rows(work.grid, VECTOR<Y>, full);
    Besides besides{};
    Share other{};
    if (latent != nullptr) {
        other = share_rows(latent->grid, TOGETHER<Y>, full);
        besides = {*latent, other.group, other.grid};
    }
    const auto blocks = static_cast<unsigned>(share.blocks() + (latent == nullptr ? 0 : other.blocks()));
    launch(KERNEL, blocks, static_cast<cudaStream_t>(queue.stream), work, share.group, share.grid, besides);
    return {share.segments(), other.segments()};
}

Segments run(const Reconstruction& work, const Latent* latent, const Queue& queue) {
    if (work.grid.total == 0) {
        if (work.sums != nullptr && work.grid.rows != 0) {
            check(cudaMemsetAsync(work.sums, 0, work.grid.rows * sizeof(double), static_cast<cudaStream_t>(queue.stream)));
        }
        return {1, 0};
    }
    Segments segments{};
    for_types(work, [&](auto term, auto y, auto x) {
        segments = launch_term<decltype(term), decltype(y), decltype(x)>(work, latent, queue);
        return segments.of_data;
    });
    return segments;
}

}  // namespace

Segments sum_rows(const Reconstruction& work, const Latent& latent, const Queue& queue) {
    const bool both = latent.log_scale && latent.type == work.recon_type && work.grid.total > 0 && latent.grid.total > 0;
    if (both) return run(work, &latent, queue);
    return {run(work, nullptr, queue).of_data, sum_rows(latent, queue)};
}

void reconstruction_forward(Reconstruction work, Reduction reduction, void* loss, const Queue& queue) {
    const OnDevice guard(queue.device);
    const double weight = reduction_weight(reduction, work.grid);
    work.weight = weight;
    if (reduction != EXAMPLE) merge_rows(work, work.grid.total > 0 ? work.grid.total : 1);
    if (reduction == NONE) {
        work.nll = loss;
        run(work, nullptr, queue);
        return;
    }
    work.sums = queue.scratch;
    const int64_t segments = run(work, nullptr, queue).of_data;
    finish_sums(work.sums, segments, work.grid.rows, reduction, weight, work.recon_type, loss, queue);
}

void reconstruction_backward(Reconstruction work, Reduction reduction, const Queue& queue) {
    const OnDevice guard(queue.device);
    work.weight = reduction_weight(reduction, work.grid);
    if (work.upstream_by_element || work.upstream_stride == 0) {
        merge_rows(work, work.grid.total > 0 ? work.grid.total : 1);
    }
    run(work, nullptr, queue);
}

}  // namespace device
}  // namespace fastvae
