// The latent pair on a GPU: z and KL(q‖p), each switched off at compile time when not asked for, and their gradients.
//
// Forward reads mu and scale once and writes z (float32: 8 bytes an element read, 4 written); backward reads them and the
// gradient of z again and writes two gradients (12 read, 8 written). Noise is made in registers, four normals a counter.
#include "../latent.h"

#include "memory.cuh"
#include "../philox.h"
#include "rows.cuh"

namespace fastvae {
namespace device {
namespace {

// Elements a thread takes at once: whole 16-byte pieces, and whole groups of four normals.
template <class T>
constexpr int VECTOR = sizeof(T) == 2 ? 8 : 4;

// Blocks a multiprocessor must have registers for; 0: as the compiler likes. Left to itself it spills float64.
template <class T>
constexpr int FORWARD_BLOCKS = sizeof(T) == 8 ? 2 : sizeof(T) == 4 ? 4 : 0;
template <class T>
constexpr int BACKWARD_BLOCKS = sizeof(T) == 8 ? 2 : 0;

// σ, and σ² where σ itself is not wanted, of a scale that was a T.
template <class T, bool LOG_SCALE, class V>
__device__ __forceinline__ V std_of_a(V scale) {
    if constexpr (LOG_SCALE && sizeof(T) == 2) return exp_narrow(V(0.5) * scale);
    else return std_of<LOG_SCALE>(scale);
}
template <class T, bool LOG_SCALE, class V>
__device__ __forceinline__ V var_of_a(V scale) {
    if constexpr (LOG_SCALE && sizeof(T) == 2) return exp_narrow(scale);
    else return var_of<LOG_SCALE>(scale);
}

// ε of elements first … first + N: `first` is a multiple of four where N is more than 1.
template <int N>
__device__ __forceinline__ Values<float, N> noise(uint64_t seed, int64_t first) {
    Values<float, N> epsilon;
    if constexpr (N == 1) {
        const uint64_t group = static_cast<uint64_t>(first) >> 2;
        const Normals n = normals(seed, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32));
        const int which = first & 3;
        const float low = which == 0 ? n.n0 : n.n1, high = which == 2 ? n.n2 : n.n3;
        epsilon.v[0] = which < 2 ? low : high;
    } else {
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            const uint64_t group = static_cast<uint64_t>(first + k) >> 2;
            const Normals n = normals(seed, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32));
            epsilon.v[k] = n.n0;
            epsilon.v[k + 1] = n.n1;
            epsilon.v[k + 2] = n.n2;
            epsilon.v[k + 3] = n.n3;
        }
    }
    return epsilon;
}

// What is asked of the KL: nothing, that to N(0, I), or that to a prior of tensors.
enum KL { WITHOUT, STANDARD, PRIOR };

// A row's tensors, and whether they can be read and written by vectors.
template <class T, KL TO>
struct Row {
    const T *mu, *scale, *prior_mu, *prior_logvar;
    int64_t flat, end, head;
    bool vectors;

    __device__ __forceinline__ Row(const Latent& work, const Turn& turn, bool with_noise) {
        flat = turn.row * work.grid.cols;
        const int64_t left = work.grid.total - flat;
        end = left < work.grid.cols ? left : work.grid.cols;
        mu = static_cast<const T*>(work.mu) + turn.row * work.mu_stride;
        scale = static_cast<const T*>(work.scale) + turn.row * work.scale_stride;
        head = head_of<VECTOR<T>>(mu);
        vectors = aligned<VECTOR<T>>(mu + head) && aligned<VECTOR<T>>(scale + head);
        if constexpr (TO == PRIOR) {
            prior_mu = static_cast<const T*>(work.prior_mu) + turn.row * work.prior_mu_stride;
            prior_logvar = static_cast<const T*>(work.prior_logvar) + turn.row * work.prior_logvar_stride;
            vectors = vectors && aligned<VECTOR<T>>(prior_mu + head) && aligned<VECTOR<T>>(prior_logvar + head);
        }
        if (with_noise) {
            vectors = vectors && (flat + head) % 4 == 0 && (work.samples == 1 || work.grid.total % VECTOR<T> == 0);
        }
    }

    __device__ __forceinline__ void require(const T* tensor) {
        vectors = vectors && (tensor == nullptr || aligned<VECTOR<T>>(tensor + flat + head));
    }

    template <int N>
    __device__ __forceinline__ Values<Prior<compute_t<T>>, N> prior(int64_t j) const {
        using V = compute_t<T>;
        Values<Prior<V>, N> priors;
        if constexpr (TO == PRIOR) {
            const Values<V, N> m = load<N>(prior_mu + j), s = load<N>(prior_logvar + j);
#pragma unroll
            for (int k = 0; k < N; ++k) priors.v[k] = prior_of(m.v[k], s.v[k]);
        }
        return priors;
    }
};

template <class T, bool LOG_SCALE, bool WITH_Z, KL TO>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS<T>) forward_kernel(const Latent work, const int group) {
    using V = compute_t<T>;
    __shared__ SumStorage storage;
    const uint64_t seed = WITH_Z ? static_cast<uint64_t>(*work.seed) : 0;
    const V floor = work.free_bits > 0 ? static_cast<V>(work.free_bits) : -V(INFINITY);
    const Bounds<V> bounds{static_cast<V>(work.low), static_cast<V>(work.high)};
    for_items(work.grid, group, [&](const Turn& turn) {
        Row<T, TO> row(work, turn, WITH_Z);
        T* const z = static_cast<T*>(work.z);
        T* const kl_out = static_cast<T*>(work.kl);
        if constexpr (WITH_Z) row.require(z);
        if constexpr (TO != WITHOUT) row.require(kl_out);
        double sum = 0;
        for_elements<VECTOR<T>>(turn, row.end, row.head, row.vectors, [&](auto n, int64_t j) {
            constexpr int N = decltype(n)::value;
            const Values<V, N> mu = load<N>(row.mu + j);
            Values<V, N> scale = load<N>(row.scale + j), std;
            if (LOG_SCALE && work.clamp) {
#pragma unroll
                for (int k = 0; k < N; ++k) scale.v[k] = clamped(scale.v[k], bounds);
            }
#pragma unroll
            for (int k = 0; k < N; ++k) std.v[k] = std_of_a<T, LOG_SCALE>(scale.v[k]);
            if constexpr (TO != WITHOUT) {
                const auto prior = row.template prior<N>(j);
                Values<V, N> kl;
                V part = 0;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const V var = WITH_Z ? std.v[k] * std.v[k] : var_of_a<T, LOG_SCALE>(scale.v[k]);
                    kl.v[k] = kl_element<LOG_SCALE>(mu.v[k], scale.v[k], var, prior.v[k]);
                    kl.v[k] = at_least(floor, kl.v[k]);
                    part += kl.v[k];
                }
                if (work.by_element) store<N>(kl_out + row.flat + j, kl);
                else sum += static_cast<double>(part);
            }
            if constexpr (WITH_Z) {
                for (int64_t sample = 0; sample < work.samples; ++sample) {
                    const int64_t at = sample * work.grid.total + row.flat + j;
                    const Values<float, N> epsilon = noise<N>(seed, at);
                    Values<V, N> drawn;
#pragma unroll
                    for (int k = 0; k < N; ++k) drawn.v[k] = mu.v[k] + std.v[k] * static_cast<V>(epsilon.v[k]);
                    store<N>(z + at, drawn);
                }
            }
        });
        if (TO != WITHOUT && !work.by_element) write_sum(storage, group, turn, sum, work.sums);
    });
}

// ∂mu = Σ g + c·∂kl/∂mu and ∂scale = Σ g·ε·∂σ/∂scale + c·∂kl/∂scale, Σ over samples; c is one number a row, or an element.
template <class T, bool LOG_SCALE, bool WITH_Z, KL TO>
__global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS<T>) backward_kernel(const Latent work, const int group) {
    using V = compute_t<T>;
    const uint64_t seed = WITH_Z ? static_cast<uint64_t>(*work.seed) : 0;
    const V floor = static_cast<V>(work.free_bits);
    const Bounds<V> bounds{static_cast<V>(work.low), static_cast<V>(work.high)};
    for_items(work.grid, group, [&](const Turn& turn) {
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
        for_elements<VECTOR<T>>(turn, row.end, row.head, row.vectors, [&](auto n, int64_t j) {
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
                           return launch_rows<forward_kernel<T, log_scale(), z(), to()>>(work, work.grid, VECTOR<T>, queue);
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
    work.weight = reduction_weight(reduction, work.grid);
    if (work.upstream == nullptr || work.by_element || work.upstream_stride == 0) merge_rows(work, work.grid.total);
    with_kernel(work, work.grad_z != nullptr, work.upstream != nullptr,
                [&](auto element, auto log_scale, auto z, auto to) {
                    using T = decltype(element);
                    return launch_rows<backward_kernel<T, log_scale(), z(), to()>>(work, work.grid, VECTOR<T>, queue);
                });
}

}  // namespace device
}  // namespace fastvae
