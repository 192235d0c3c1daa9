// The latent pair's loop over rows, for its own kernels and for one that walks the data besides.
#pragma once

#include "../latent.h"
#include "../philox.h"
#include "memory.cuh"
#include "rows.cuh"

namespace fastvae {
namespace device {
namespace {

// Elements a thread takes at once: whole 16-byte pieces, and whole groups of four normals.
template <class T>
constexpr int TOGETHER = sizeof(T) == 2 ? 8 : 4;

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
        head = head_of<TOGETHER<T>>(mu);
        vectors = aligned<TOGETHER<T>>(mu + head) && aligned<TOGETHER<T>>(scale + head);
        if constexpr (TO == PRIOR) {
            prior_mu = static_cast<const T*>(work.prior_mu) + turn.row * work.prior_mu_stride;
            prior_logvar = static_cast<const T*>(work.prior_logvar) + turn.row * work.prior_logvar_stride;
            vectors = vectors && aligned<TOGETHER<T>>(prior_mu + head) && aligned<TOGETHER<T>>(prior_logvar + head);
        }
        if (with_noise) {
            vectors = vectors && (flat + head) % 4 == 0 && (work.samples == 1 || work.grid.total % TOGETHER<T> == 0);
        }
    }

    __device__ __forceinline__ void require(const T* tensor) {
        vectors = vectors && (tensor == nullptr || aligned<TOGETHER<T>>(tensor + flat + head));
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
__device__ __forceinline__ void forward_rows(const Latent& work, const int group, const Place& block,
                                             SumStorage& storage) {
    using V = compute_t<T>;
    const uint64_t seed = WITH_Z ? static_cast<uint64_t>(*work.seed) : 0;
    const V floor = work.free_bits > 0 ? static_cast<V>(work.free_bits) : -V(INFINITY);
    const Bounds<V> bounds{static_cast<V>(work.low), static_cast<V>(work.high)};
    for_items(work.grid, group, block, [&](const Turn& turn) {
        Row<T, TO> row(work, turn, WITH_Z);
        T* const z = static_cast<T*>(work.z);
        T* const kl_out = static_cast<T*>(work.kl);
        if constexpr (WITH_Z) row.require(z);
        if constexpr (TO != WITHOUT) row.require(kl_out);
        double sum = 0;
        for_elements<TOGETHER<T>>(turn, row.end, row.head, row.vectors, [&](auto n, int64_t j) {
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

}  // namespace
}  // namespace device
}  // namespace fastvae
