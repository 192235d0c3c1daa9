// The latent pair on a GPU: z and KL(q‖p), each switched off at compile time when not asked for, and their gradients.
//
// Forward reads mu and scale once and writes z (float32: 8 bytes an element read, 4 written); backward reads them and the
// gradient of z again and writes two gradients (12 read, 8 written). Noise is made in registers, four normals a counter.
#include "latent.cuh"

namespace fastvae {
namespace device {
namespace {

template <class T, bool LOG_SCALE, bool WITH_Z, KL TO>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS<T>) forward_kernel(const Latent work, const int group) {
    __shared__ SumStorage storage;
    forward_rows<T, LOG_SCALE, WITH_Z, TO>(work, group, of_the_grid(), storage);
}

// ∂mu = Σ g + c·∂kl/∂mu and ∂scale = Σ g·ε·∂σ/∂scale + c·∂kl/∂scale, Σ over samples; c is one number a row, or an element.
template <class T, bool LOG_SCALE, bool WITH_Z, KL TO>
__device__ __forceinline__ void backward_rows(const Latent& work, const int group, const Place& block) {
    using V = compute_t<T>;
    const uint64_t seed = WITH_Z ? static_cast<uint64_t>(*work.seed) : 0;
    const V floor = static_cast<V>(work.free_bits);
    const Bounds<V> bounds{static_cast<V>(work.low), static_cast<V>(work.high)};
    for_items(work.grid, group, block, [&](const Turn& turn) {
        Row<T, TO> row(work, turn, WITH_Z);
        const T* const grad_z = static_cast<const T*>(work.grad_z);
        T* const grad_mu = static_cast<T*>(work.grad_mu);
        T* const grad_scale = static_cast<T*>(work.grad_scale);
        T* const grad_prior_mu = static_cast<T*>(work.grad_prior_mu);
        T* const grad_prior_logvar = static_cast<T*>(work.grad_prior_logvar);
        const T* by_element = nullptr;  // at the elements of this row
        V row_c = 0;
        if constexpr (TO != WITHOUT) {
            if (work.by_element) {
                by_element = static_cast<const T*>(work.upstream) + turn.row * work.upstream_stride - row.flat;
            } else {
                row_c = static_cast<const V*>(work.upstream)[turn.row * work.upstream_stride] *
                        static_cast<V>(work.weight);
            }
            row.require(by_element);
            row.require(grad_prior_mu);
            row.require(grad_prior_logvar);
        }
        row.require(grad_mu);
        row.require(grad_scale);
        if constexpr (WITH_Z) row.require(grad_z);
        for_elements<TOGETHER<T>>(turn, row.end, row.head, row.vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            // read before the noise is made, so that memory works meanwhile
            Values<V, N> scale = load<N>(row.scale + j), mu, std;
            if constexpr (TO != WITHOUT) mu = load<N>(row.mu + j);
            Values<V, N> of_mu{}, of_scale{};
            if constexpr (WITH_Z) {
                for (int64_t sample = 0; sample < work.samples; ++sample) {
                    const int64_t at = sample * work.grid.total + row.flat + j;
                    const Values<V, N> g = load<N>(grad_z + at);
                    const Values<float, N> epsilon = noise<N>(seed, at);
#pragma unroll
                    for (int k = 0; k < N; ++k) {
                        of_mu.v[k] += g.v[k];
                        of_scale.v[k] += g.v[k] * static_cast<V>(epsilon.v[k]);
                    }
                }
            }
            bool moved[N]{};  // by the clamp, or NaN: the value given is not kept, for want of registers
            if (LOG_SCALE && work.clamp) {
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const V within = clamped(scale.v[k], bounds);
                    moved[k] = within != scale.v[k];
                    scale.v[k] = within;
                }
            }
#pragma unroll
            for (int k = 0; k < N; ++k) {
                std.v[k] = std_of_a<T, LOG_SCALE>(scale.v[k]);
                if constexpr (WITH_Z && LOG_SCALE) of_scale.v[k] *= static_cast<V>(0.5) * std.v[k];
            }
            if constexpr (TO != WITHOUT) {
                const auto prior = row.template prior<N>(j);
                Values<V, N> c, of_prior_mu, of_prior_logvar;
#pragma unroll
                for (int k = 0; k < N; ++k) c.v[k] = row_c;
                if (by_element != nullptr) c = load<N>(by_element + row.flat + j);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    if (floor > 0 &&
                        kl_element<LOG_SCALE>(mu.v[k], scale.v[k], std.v[k] * std.v[k], prior.v[k]) < floor) {
                        c.v[k] = 0;
                    }
                    const KLGradients<V> kl = kl_gradients<LOG_SCALE>(c.v[k], mu.v[k], std.v[k], prior.v[k]);
                    of_mu.v[k] += kl.mu;
                    of_scale.v[k] += kl.scale;
                    of_prior_mu.v[k] = kl.prior_mu;
                    of_prior_logvar.v[k] = kl.prior_logvar;
                }
                if (grad_prior_mu != nullptr) {
                    store<N>(grad_prior_mu + row.flat + j, of_prior_mu);
                    store<N>(grad_prior_logvar + row.flat + j, of_prior_logvar);
                }
            }
            if constexpr (LOG_SCALE) {
#pragma unroll
                for (int k = 0; k < N; ++k) of_scale.v[k] = moved[k] ? V{} : of_scale.v[k];
            }
            store<N>(grad_mu + row.flat + j, of_mu);
            store<N>(grad_scale + row.flat + j, of_scale);
        });
    });
}

template <class T, bool LOG_SCALE, bool WITH_Z, KL TO>
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS<T>) backward_kernel(const Latent work, const int group) {
    backward_rows<T, LOG_SCALE, WITH_Z, TO>(work, group, of_the_grid());
}

// The backward of a loss: its first blocks, `latent` of them, write the gradients of the KL, the others rescale a gradient.
template <class T, bool LOG_SCALE>
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS<T>)
    elbo_backward_kernel(const Latent work, const int group, const dim3 latent, T* gradient, const int64_t total,
                         const compute_t<T>* upstream) {
    const int64_t block = blockIdx.x, of_latent = int64_t{latent.x} * latent.y;
    if (block < of_latent) {
        const Place place{block % latent.x, block / latent.x, latent.x, latent.y};
        backward_rows<T, LOG_SCALE, false, STANDARD>(work, group, place);
    } else {
        rescale_part(gradient, total, *upstream, block - of_latent, gridDim.x - of_latent);
    }
}

template <class F>
int64_t with_bool(bool value, F f) {
    return value ? f(std::true_type{}) : f(std::false_type{});
}
template <KL TO>
using To = std::integral_constant<KL, TO>;

// f(T{}, LOG_SCALE, WITH_Z, TO), which launches; without z and KL there is nothing to do.
template <class F>
int64_t with_kernel(const Latent& work, bool with_z, bool with_kl, F f) {
    int64_t segments = 1;
    with_dtype(work.type, [&](auto element) {
        segments = with_bool(work.log_scale, [&](auto log_scale) {
            if (!with_kl) return with_z ? f(element, log_scale, std::true_type{}, To<WITHOUT>{}) : int64_t{1};
            return with_bool(with_z, [&](auto z) {
                return work.prior_mu == nullptr ? f(element, log_scale, z, To<STANDARD>{})
                                                : f(element, log_scale, z, To<PRIOR>{});
            });
        });
    });
    return segments;
}

int64_t run_forward(const Latent& work, const Queue& queue) {
    if (work.grid.total == 0) {
        if (work.sums != nullptr && work.grid.rows != 0) {
            check(cudaMemsetAsync(work.sums, 0, work.grid.rows * sizeof(double), static_cast<cudaStream_t>(queue.stream)));
        }
        return 1;
    }
    return with_kernel(work, work.z != nullptr, work.kl != nullptr || work.sums != nullptr,
                       [&](auto element, auto log_scale, auto z, auto to) {
                           using T = decltype(element);
                           return launch_rows<forward_kernel<T, log_scale(), z(), to()>>(work, work.grid, TOGETHER<T>, queue);
                       });
}

}  // namespace

int64_t sum_rows(const Latent& work, const Queue& queue) { return run_forward(work, queue); }

void latent_forward(Latent work, Reduction reduction, void* kl, const Queue& queue) {
    const OnDevice guard(queue.device);
    const double weight = reduction_weight(reduction, work.grid);
    work.by_element = reduction == NONE;
    if (reduction != EXAMPLE) merge_rows(work, work.grid.total > 0 ? work.grid.total : 1);
    if (reduction == NONE) work.kl = kl;
    else if (kl != nullptr) work.sums = queue.scratch;
    const int64_t segments = run_forward(work, queue);
    if (work.sums != nullptr) {
        finish_sums(work.sums, segments, work.grid.rows, reduction, weight, work.type, kl, queue);
    }
}

void latent_backward(Latent work, Reduction reduction, const Queue& queue) {
    if (work.grid.total == 0) return;
    const OnDevice guard(queue.device);
    work.weight *= reduction_weight(reduction, work.grid);
    if (work.upstream == nullptr || work.by_element || work.upstream_stride == 0) merge_rows(work, work.grid.total);
    with_kernel(work, work.grad_z != nullptr, work.upstream != nullptr,
                [&](auto element, auto log_scale, auto z, auto to) {
                    using T = decltype(element);
                    return launch_rows<backward_kernel<T, log_scale(), z(), to()>>(work, work.grid, TOGETHER<T>, queue);
                });
}

void elbo_backward(const Rescale& data, const void* upstream, int upstream_type, Latent latent, double beta,
                   Reduction reduction, const Queue& queue) {
    const OnDevice guard(queue.device);
    latent.weight = beta;
    if (data.type != latent.type || (upstream_type == FLOAT64) != (data.type == FLOAT64)) {
        rescale(data, upstream, upstream_type, queue);
        return latent_backward(latent, reduction, queue);
    }
    latent.weight *= reduction_weight(reduction, latent.grid);
    merge_rows(latent, latent.grid.total);
    with_dtype(latent.type, [&](auto element) {
        using T = decltype(element);
        with_bool(latent.log_scale, [&](auto log_scale) {
            constexpr auto KERNEL = elbo_backward_kernel<T, log_scale()>;
            const int64_t full = resident_blocks<KERNEL>(queue.device);
            const Share share = share_rows(latent.grid, TOGETHER<T>, full);
            const int64_t wanted = ceil_divide(data.total, THREADS * 16);
            const auto blocks = static_cast<unsigned>(share.blocks() + (wanted < full ? wanted : full));
            launch(KERNEL, blocks, static_cast<cudaStream_t>(queue.stream), latent, share.group, share.grid,
                   static_cast<T*>(data.gradient), data.total, static_cast<const compute_t<T>*>(upstream));
            return int64_t{1};
        });
    });
}

}  // namespace device
}  // namespace fastvae
