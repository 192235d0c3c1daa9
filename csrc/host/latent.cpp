// The latent pair on a CPU: z and KL(q‖p), each switched off at compile time when not asked for, and their gradients.
//
// Forward reads mu and scale once and writes z (float32: 8 bytes an element read, 4 written); backward reads them and
// the gradient of z again and writes two gradients (12 read, 8 written). Noise is made a tile at a time, in the first-level
// cache, and never leaves it. A row is an example, or 4096 elements where all tensors are dense.
#include <type_traits>

#include "spans.h"
#include "../latent.h"
#include "../philox.h"

namespace fastvae {
namespace FASTVAE_ISA {
namespace {

constexpr int WORDS = lanes_of<Float>::COUNT;  // counters at a time, four normals each
constexpr int TILE = 256;
constexpr int PADDED = TILE + 4 + 4 * WORDS;  // a tile may start within a group of four, and ends with whole registers

// Writes ε for elements first … first + count and returns where it begins in `tile`.
FASTVAE_INLINE const float* fill(float* tile, int64_t seed, int64_t first, int count) {
    const int64_t group = first >> 2, groups = ((first + count + 3) >> 2) - group;
    Unsigned lane{};
    for (int k = 0; k < WORDS; ++k) lane[k] = k;
    for (int64_t g = 0; g < groups; g += WORDS) {
        const uint64_t q = static_cast<uint64_t>(group + g);
        const Unsigned low = lane + static_cast<uint32_t>(q);
        const Unsigned carry = (Unsigned)(low < lane);  // -1 where the low word overflowed
        const Normals n = normals(static_cast<uint64_t>(seed), low, static_cast<uint32_t>(q >> 32) - carry);
        store_interleaved(tile + 4 * g, n.n0, n.n1, n.n2, n.n3);
    }
    return tile + (first & 3);
}

// How a row is walked: whole registers by `load` and `store`, the rest by `load_first` and `store_first`.
template <class T>
struct Whole {
    using V = vector_t<T>;
    static FASTVAE_INLINE V get(const T* pointer, int) { return load_ahead(pointer, V{}); }
    static FASTVAE_INLINE void put(T* pointer, int, V x) { store_ahead(pointer, x); }
    static FASTVAE_INLINE V of_sum(int, V x) { return x; }
};
template <class T>
struct First {
    using V = vector_t<T>;
    static FASTVAE_INLINE V get(const T* pointer, int count) { return load_first(pointer, count, V{}); }
    static FASTVAE_INLINE void put(T* pointer, int count, V x) { store_first(pointer, count, x); }
    static FASTVAE_INLINE V of_sum(int count, V x) { return first_lanes<V>(count) ? x : V{}; }
};

// Calls step(Whole{}, j, LANES) for whole registers of `count` elements and step(First{}, j, n) for the n that are left.
template <class T, class STEP>
FASTVAE_INLINE void walk(int count, STEP step) {
    constexpr int LANES = lanes_of<vector_t<T>>::COUNT;
    int j = 0;
    for (; j + LANES <= count; j += LANES) step(Whole<T>{}, j, LANES);
    if (j < count) step(First<T>{}, j, count - j);
}

template <class T, bool LOG_SCALE, bool WITH_PRIOR>
struct Tile {
    using V = vector_t<T>;
    const T *mu, *scale, *prior_mu, *prior_logvar;
    int64_t flat;
    int count;

    template <class ACCESS>
    FASTVAE_INLINE Prior<V> prior(ACCESS, int j, int n) const {
        if constexpr (WITH_PRIOR) return prior_of(ACCESS::get(prior_mu + j, n), ACCESS::get(prior_logvar + j, n));
        else return Prior<V>{};
    }
};

// Calls f(tile) for the tiles of a row.
template <class T, bool LOG_SCALE, bool WITH_PRIOR, class F>
FASTVAE_INLINE void for_tiles(const Latent& work, int64_t row, F f) {
    const int64_t begin = row * work.grid.cols, left = work.grid.total - begin;
    const int64_t end = left < work.grid.cols ? left : work.grid.cols;
    for (int64_t start = 0; start < end; start += TILE) {
        Tile<T, LOG_SCALE, WITH_PRIOR> tile{};
        tile.mu = static_cast<const T*>(work.mu) + row * work.mu_stride + start;
        tile.scale = static_cast<const T*>(work.scale) + row * work.scale_stride + start;
        if constexpr (WITH_PRIOR) {
            tile.prior_mu = static_cast<const T*>(work.prior_mu) + row * work.prior_mu_stride + start;
            tile.prior_logvar = static_cast<const T*>(work.prior_logvar) + row * work.prior_logvar_stride + start;
        }
        tile.flat = begin + start;
        tile.count = static_cast<int>(end - start < TILE ? end - start : TILE);
        f(tile);
    }
}

// The bounds of logvar: none; or some; or such that e^logvar is a normal number, which spares exp its own.
enum class Clamp { NONE, ANY, NORMAL };
constexpr double NORMAL_LOW = -87, NORMAL_HIGH = 88;

template <class T, bool LOG_SCALE, Clamp CLAMP, bool WITH_PRIOR, bool WITH_Z, bool WITH_KL>
int forward(const Latent& work, int64_t first, int64_t last) {
    using V = vector_t<T>;
    using Scalar = typename lanes_of<V>::scalar;
    constexpr bool BOUNDED = CLAMP == Clamp::NORMAL;
    alignas(64) float buffer[PADDED + WORDS];
    alignas(64) Scalar std_tile[TILE + WORDS];
    T* const z = static_cast<T*>(work.z);
    T* const kl_out = static_cast<T*>(work.kl);
    const V floor = constant<V>(work.free_bits > 0 ? work.free_bits : -HUGE_VAL);
    const Bounds<V> bounds{constant<V>(work.low), constant<V>(work.high)};
    const bool by_element = work.by_element;
    const int64_t seed = WITH_Z ? *work.seed : 0;
    for (int64_t row = first; row < last; ++row) {
        double row_sum = 0;
        for_tiles<T, LOG_SCALE, WITH_PRIOR>(work, row, [&](const auto& tile) FASTVAE_LAMBDA {
            V tile_sum{};
            walk<T>(tile.count, [&](auto access, int j, int n) FASTVAE_LAMBDA {
                V scale = access.get(tile.scale + j, n), var;
                if constexpr (CLAMP != Clamp::NONE) scale = clamped(scale, bounds);
                if constexpr (WITH_Z) {
                    const V std = std_of<LOG_SCALE, BOUNDED>(scale);
                    store(std_tile + j, std);
                    var = std * std;
                } else {
                    var = var_of<LOG_SCALE, BOUNDED>(scale);
                }
                if constexpr (WITH_KL) {
                    const V mu = access.get(tile.mu + j, n);
                    const V kl = at_least(floor, kl_element<LOG_SCALE>(mu, scale, var, tile.prior(access, j, n)));
                    if (by_element) access.put(kl_out + tile.flat + j, n, kl);
                    else tile_sum += access.of_sum(n, kl);
                }
            });
            if constexpr (WITH_KL) row_sum += sum(tile_sum);
            if constexpr (WITH_Z) {
                for (int64_t sample = 0; sample < work.samples; ++sample) {
                    const int64_t at = sample * work.grid.total + tile.flat;
                    const float* epsilon = fill(buffer, seed, at, tile.count);
                    walk<T>(tile.count, [&](auto access, int j, int n) FASTVAE_LAMBDA {
                        const V std = load(std_tile + j, V{});
                        access.put(z + at + j, n, access.get(tile.mu + j, n) + std * load(epsilon + j, V{}));
                    });
                }
            }
        });
        if (WITH_KL && !work.by_element) work.sums[row] = row_sum;
    }
    return 0;
}

// ∂mu = Σ g + c·∂kl/∂mu and ∂scale = Σ g·ε·∂σ/∂scale + c·∂kl/∂scale, Σ over samples; c is one number a row, or an element.
template <class T, bool LOG_SCALE, Clamp CLAMP, bool WITH_PRIOR, bool WITH_Z, bool WITH_KL>
int backward(const Latent& work, int64_t first, int64_t last) {
    using V = vector_t<T>;
    using Scalar = typename lanes_of<V>::scalar;
    constexpr bool BOUNDED = CLAMP == Clamp::NORMAL;
    alignas(64) float buffer[PADDED + WORDS];
    alignas(64) Scalar g[TILE + WORDS], g_epsilon[TILE + WORDS];
    const V half = constant<V>(0.5), floor = constant<V>(work.free_bits);
    const Bounds<V> bounds{constant<V>(work.low), constant<V>(work.high)};
    const bool floored = work.free_bits > 0;
    const int64_t seed = WITH_Z ? *work.seed : 0;
    const T* const grad_z = static_cast<const T*>(work.grad_z);
    for (int64_t row = first; row < last; ++row) {
        V row_c{};
        const T* upstream = nullptr;  // at the elements of this row
        if (WITH_KL && work.by_element) {
            upstream = static_cast<const T*>(work.upstream) + row * work.upstream_stride - row * work.grid.cols;
        } else if (WITH_KL) {
            row_c = constant<V>(work.weight) * static_cast<const Scalar*>(work.upstream)[row * work.upstream_stride];
        }
        for_tiles<T, LOG_SCALE, WITH_PRIOR>(work, row, [&](const auto& tile) FASTVAE_LAMBDA {
            if constexpr (WITH_Z) {
                for (int64_t sample = 0; sample < work.samples; ++sample) {
                    const int64_t at = sample * work.grid.total + tile.flat;
                    const float* epsilon = fill(buffer, seed, at, tile.count);
                    walk<T>(tile.count, [&](auto access, int j, int n) FASTVAE_LAMBDA {
                        const V value = access.get(grad_z + at + j, n), product = value * load(epsilon + j, V{});
                        store(g + j, sample == 0 ? value : load(g + j, V{}) + value);
                        store(g_epsilon + j, sample == 0 ? product : load(g_epsilon + j, V{}) + product);
                    });
                }
            }
            walk<T>(tile.count, [&](auto access, int j, int n) FASTVAE_LAMBDA {
                const int64_t at = tile.flat + j;
                const V mu = access.get(tile.mu + j, n), given = access.get(tile.scale + j, n);
                const V scale = CLAMP == Clamp::NONE ? given : clamped(given, bounds);
                const V std = std_of<LOG_SCALE, BOUNDED>(scale);
                V grad_mu{}, grad_scale{};
                if constexpr (WITH_Z) {
                    grad_mu = load(g + j, V{});
                    grad_scale = load(g_epsilon + j, V{});
                    if constexpr (LOG_SCALE) grad_scale = half * grad_scale * std;
                }
                if constexpr (WITH_KL) {
                    V c = work.by_element ? access.get(upstream + at, n) : row_c;
                    const Prior<V> prior = tile.prior(access, j, n);
                    if (floored) c = kl_element<LOG_SCALE>(mu, scale, std * std, prior) < floor ? V{} : c;
                    const KLGradients<V> kl = kl_gradients<LOG_SCALE>(c, mu, std, prior);
                    grad_mu += kl.mu;
                    grad_scale += kl.scale;
                    if constexpr (WITH_PRIOR) {
                        access.put(static_cast<T*>(work.grad_prior_mu) + at, n, kl.prior_mu);
                        access.put(static_cast<T*>(work.grad_prior_logvar) + at, n, kl.prior_logvar);
                    }
                }
                if constexpr (CLAMP != Clamp::NONE) grad_scale = scale == given ? grad_scale : V{};
                access.put(static_cast<T*>(work.grad_mu) + at, n, grad_mu);
                access.put(static_cast<T*>(work.grad_scale) + at, n, grad_scale);
            });
        });
    }
    return 0;
}

template <class F>
auto with_bool(bool value, F f) {
    return value ? f(std::true_type{}) : f(std::false_type{});
}

template <Clamp CLAMP>
using Clamped = std::integral_constant<Clamp, CLAMP>;

template <class F>
Span<Latent> with_clamp(const Latent& work, F f) {
    if (!work.clamp) return f(Clamped<Clamp::NONE>{});
    const bool normal = work.low >= NORMAL_LOW && work.high <= NORMAL_HIGH;
    return normal ? f(Clamped<Clamp::NORMAL>{}) : f(Clamped<Clamp::ANY>{});
}

// Calls f(T{}, LOG_SCALE, CLAMP, WITH_PRIOR, WITH_Z, WITH_KL) for the kernel of this work; a prior without KL is not one.
template <class F>
Span<Latent> with_kernel(const Latent& work, bool with_z, bool with_kl, F f) {
    return with_dtype(work.type, [&](auto element) -> Span<Latent> {
        using T = decltype(element);
        const auto with = [&](auto log_scale, auto clamp) -> Span<Latent> {
            if (!with_kl) return f(T{}, log_scale, clamp, std::false_type{}, std::true_type{}, std::false_type{});
            return with_bool(work.prior_mu != nullptr, [&](auto with_prior) -> Span<Latent> {
                return with_bool(with_z, [&](auto z) -> Span<Latent> {
                    return f(T{}, log_scale, clamp, with_prior, z, std::true_type{});
                });
            });
        };
        if (!work.log_scale) return with(std::false_type{}, Clamped<Clamp::NONE>{});  // std has no bounds
        return with_clamp(work, [&](auto clamp) -> Span<Latent> { return with(std::true_type{}, clamp); });
    });
}

}  // namespace

Span<Latent> latent_forward_span(const Latent& work) {
    const auto kernel = [](auto element, auto log_scale, auto clamp, auto prior, auto z, auto kl) -> Span<Latent> {
        return forward<decltype(element), log_scale(), clamp(), prior(), z(), kl()>;
    };
    return with_kernel(work, work.z != nullptr, work.by_element ? work.kl != nullptr : work.sums != nullptr, kernel);
}

Span<Latent> latent_backward_span(const Latent& work) {
    const auto kernel = [](auto element, auto log_scale, auto clamp, auto prior, auto z, auto kl) -> Span<Latent> {
        return backward<decltype(element), log_scale(), clamp(), prior(), z(), kl()>;
    };
    return with_kernel(work, work.grad_z != nullptr, work.upstream != nullptr, kernel);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
