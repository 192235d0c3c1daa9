// A mixture of discretised logistics on a CPU: log-likelihood and gradient of a pixel in one pass over its parameters.
//
// A tile of pixels is brought into the cache with a register a parameter, a pixel a lane; the gradient is made where the
// parameters were, and leaves as they came. For float32, 8 bytes a parameter: read once, written once. While a tile is
// computed, memory would wait, and while it comes and goes, arithmetic: so the next tile is asked for meanwhile.
#include <cmath>
#include <memory>
#include <new>

#include "logistic.h"
#include "spans.h"
#include "transpose.h"

namespace fastvae {
namespace FASTVAE_ISA {
namespace {

template <class V>
class Registers {
  public:
    explicit Registers(int64_t count)
        : data_(static_cast<V*>(::operator new(count * sizeof(V), std::align_val_t(alignof(V))))) {}
    ~Registers() { ::operator delete(data_, std::align_val_t(alignof(V))); }
    Registers(const Registers&) = delete;
    V* data() { return data_; }

  private:
    V* data_;
};

// Levels as data in [−1, 1], each to nearest.
template <class T>
struct Levels {
    T of[256];
    Levels() {
        for (int k = 0; k < 256; ++k) of[k] = static_cast<T>(2 * k - 255) / static_cast<T>(255);
    }
};

// Where the parameters of component k are, as PixelCNN++ has them: all logits, then for each channel means, log scales and,
// of three channels, coefficients.
template <int CHANNELS>
struct Places {
    int64_t components;
    static constexpr int EACH = CHANNELS == 3 ? 3 : 2;  // kinds of parameters a channel has

    FASTVAE_INLINE int64_t of(int channel, int kind, int64_t k) const {
        return components + (channel * EACH + kind) * components + k;
    }
    int64_t count() const { return components * (1 + CHANNELS * EACH); }
};

// What the next tile has where this one has the pixels in work: cache lines of parameters, and of the gradient if there is
// one, `lines` for each component, `apart` bytes apart. A third of the time of a large call.
struct Ahead {
    const char *params, *grad;  // null: no tile follows, no gradient
    int64_t lines, apart;

    FASTVAE_INLINE void ask(int64_t component) const {
        if (params == nullptr) return;
        for (int64_t line = component * lines; line < (component + 1) * lines; ++line) {
            __builtin_prefetch(params + line * apart, 0, 3);
            if (grad != nullptr) __builtin_prefetch(grad + line * apart, 1, 3);
        }
    }
};

// −log of the mixture at x. `at` becomes its gradient times `factor` if asked. `scratch` holds two numbers a component.
template <int CHANNELS, class V>
__attribute__((noinline)) V mixture(V* at, const V* x, const Places<CHANNELS> places, V factor, V* scratch,
                                    bool with_gradient, const Ahead ahead) {
    const V least = constant<V>(-3e38);
    const int64_t K = places.components;
    V *additives = scratch, *factors = scratch + K;
    V top = constant<V>(-INFINITY), top_logit = top;
    for (int64_t k = 0; k < K; ++k) {
        ahead.ask(k);
        V additive = at[k], product;
        const auto place = [&](int channel, int kind) FASTVAE_LAMBDA -> V& { return at[places.of(channel, kind, k)]; };
        if constexpr (CHANNELS == 3) {
            using P = Three<V>;
            const P before(x[0], x[0], x[1]);  // what each coefficient is multiplied by
            const Coefficient<P> c = coefficient(P(place(0, 2), place(1, 2), place(2, 2)));
            const P moved = c.value * before, slope = c.slope * before;
            const P mean(place(0, 0), place(1, 0) + moved.a, place(2, 0) + moved.b + moved.c);
            const Level<P> found = level(P(x[0], x[1], x[2]), mean, P(place(0, 1), place(1, 1), place(2, 1)));
            additive += found.additive.a + found.additive.b + found.additive.c;
            product = found.factor.a * found.factor.b * found.factor.c;
            place(0, 0) = found.by_mean.a;
            place(1, 0) = found.by_mean.b;
            place(2, 0) = found.by_mean.c;
            place(0, 1) = found.by_log_scale.a;
            place(1, 1) = found.by_log_scale.b;
            place(2, 1) = found.by_log_scale.c;
            place(0, 2) = found.by_mean.b * slope.a;
            place(1, 2) = found.by_mean.c * slope.b;
            place(2, 2) = found.by_mean.c * slope.c;
        } else {
            const Level<V> found = level(x[0], place(0, 0), place(0, 1));
            additive += found.additive;
            product = found.factor;
            place(0, 0) = found.by_mean;
            place(0, 1) = found.by_log_scale;
        }
        top_logit = at_least(top_logit, at[k]);
        top = at_least(top, additive);
        additives[k] = additive;
        factors[k] = product;
    }
    const V shift = at_least(least, top), shift_logit = at_least(least, top_logit);  // where all are −∞, not NaN
    V total{}, total_logit{};
    for (int64_t k = 0; k < K; ++k) {
        factors[k] *= exp_negative(additives[k] - shift);
        additives[k] = exp_negative(at[k] - shift_logit);
        total += factors[k];
        total_logit += additives[k];
    }
    if (with_gradient) {
        const V by_total = divide(factor, total), by_logits = divide(factor, total_logit);
        for (int64_t k = 0; k < K; ++k) {
            const V share = -factors[k] * by_total;
            at[k] = additives[k] * by_logits + share;
            for (int64_t place = K + k; place < places.count(); place += K) at[place] *= share;
        }
    }
    return (top_logit - top) + (log(total_logit) - log(total));
}

// Parameters of a tile of pixels, in registers: `of(v)[c]` is parameter c of pixels LANES·v to LANES·(v + 1).
template <class Y>
struct Tile {
    using V = vector_t<Y>;
    static constexpr int LANES = lanes_of<V>::COUNT, VECTORS = MIXTURE_TILE / LANES;

    V* registers;
    int64_t count;   // of parameters
    int64_t pixels;  // of an example
    int64_t first;   // pixel of the tile
    int there;       // pixels of the tile

    FASTVAE_INLINE V* of(int v) const { return registers + v * count; }
    FASTVAE_INLINE int lanes(int v) const { return there - v * LANES < LANES ? there - v * LANES : LANES; }

    // Calls f(j, n): the n parameters from j on, a whole vector of them; the last ones overlap those before.
    template <class F>
    FASTVAE_INLINE void for_blocks(F f) const {
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) f(j, LANES);
        if (j < count) f(count < LANES ? 0 : count - LANES, count < LANES ? static_cast<int>(count) : LANES);
    }

    __attribute__((noinline)) void read_last(const Y* example) const {
        for (int v = 0; v * LANES < there; ++v) {
            V* to = of(v);
            const int n = lanes(v);
            const Y* from = example + (first + v * LANES) * count;
            for_blocks([&](int64_t j, int width) FASTVAE_LAMBDA {
                V rows[LANES];
                for (int k = 0; k < LANES; ++k) {  // the last pixel stands for those there are not
                    const Y* pixel = from + (k < n ? k : n - 1) * count + j;
                    rows[k] = width == LANES ? load(pixel, V{}) : load_first(pixel, width, V{});
                }
                transpose(rows);
                for (int k = 0; k < width; ++k) to[j + k] = rows[k];
            });
        }
    }
    __attribute__((noinline)) void read_first(const Y* example) const {
        for (int64_t c = 0; c < count; ++c) {
            for (int v = 0; v * LANES < there; ++v) {
                const Y* from = example + c * pixels + first + v * LANES;
                of(v)[c] = lanes(v) == LANES ? load(from, V{}) : load_first(from, lanes(v), V{});
            }
        }
    }
    __attribute__((noinline)) void write_last(Y* example) const {
        for (int v = 0; v * LANES < there; ++v) {
            const V* from = of(v);
            const int n = lanes(v);
            Y* to = example + (first + v * LANES) * count;
            for_blocks([&](int64_t j, int width) FASTVAE_LAMBDA {
                V rows[LANES];
                for (int k = 0; k < LANES; ++k) rows[k] = from[k < width ? j + k : j];
                transpose(rows);
                for (int k = 0; k < n; ++k) {
                    Y* pixel = to + k * count + j;
                    if (width == LANES) store(pixel, rows[k]);
                    else store_first(pixel, width, rows[k]);
                }
            });
        }
    }
    __attribute__((noinline)) void write_first(Y* example) const {
        for (int64_t c = 0; c < count; ++c) {
            for (int v = 0; v * LANES < there; ++v) {
                Y* to = example + c * pixels + first + v * LANES;
                if (lanes(v) == LANES) store(to, of(v)[c]);
                else store_first(to, lanes(v), of(v)[c]);
            }
        }
    }
};

// Levels of a channel in [−1, 1], of pixels `step` apart; the last stands for those there are not. Returns whether one is
// outside.
template <class X, class V>
bool read_levels(const X* from, int64_t step, int n, V& x) {
    using Scalar = typename lanes_of<V>::scalar;
    static const Levels<Scalar> levels;
    bool outside = false;
    for (int k = 0; k < lanes_of<V>::COUNT; ++k) {
        const X level = from[(k < n ? k : n - 1) * step];
        if constexpr (sizeof(X) == 1) {
            x[k] = levels.of[level];
        } else {
            outside |= level < 0 || level > 1;
            x[k] = 2 * level - 1;
        }
    }
    return outside;
}

// The cache lines of pixels v·LANES, … of tile `row`.
template <class Y>
Ahead ahead_of(const Mixture& work, int64_t row, int v, int64_t count) {
    constexpr int64_t LANES = Tile<Y>::LANES, LINE = 64, BYTES = sizeof(Y);
    const int64_t pixel = row % work.tiles() * MIXTURE_TILE + v * LANES;
    const int64_t place = row / work.tiles() * work.pixels * count + pixel * (work.channels_last ? count : 1);
    const char* grad = static_cast<const char*>(work.grad);
    Ahead ahead{static_cast<const char*>(work.params) + place * BYTES, grad == nullptr ? grad : grad + place * BYTES,
                count / work.components, work.pixels * BYTES};
    if (work.channels_last) {
        ahead.lines = (LANES * ahead.lines * BYTES + LINE - 1) / LINE;
        ahead.apart = LINE;
    }
    return ahead;
}

template <class Y, int CHANNELS>
int tiles(const Mixture& work, int64_t first, int64_t last) {
    using V = vector_t<Y>;
    using Scalar = typename lanes_of<V>::scalar;
    constexpr int LANES = lanes_of<V>::COUNT;
    const Places<CHANNELS> places{work.components};
    const int64_t count = places.count();
    Registers<V> registers(count * Tile<Y>::VECTORS + 2 * work.components);
    V* scratch = registers.data() + count * Tile<Y>::VECTORS;
    bool outside = false;
    for (int64_t row = first; row < last; ++row) {
        const int64_t example = row / work.tiles(), pixel = row % work.tiles() * MIXTURE_TILE;
        const int there = static_cast<int>(work.pixels - pixel < MIXTURE_TILE ? work.pixels - pixel : MIXTURE_TILE);
        const int64_t begin = example * work.pixels;
        const Tile<Y> tile{registers.data(), count, work.pixels, pixel, there};
        const Y* params = static_cast<const Y*>(work.params) + begin * count;
        if (work.channels_last) tile.read_last(params);
        else tile.read_first(params);
        for (int v = 0; v * LANES < there; ++v) {
            const int n = tile.lanes(v);
            const int64_t at = pixel + v * LANES;
            V x[CHANNELS], factor = constant<V>(work.of.weight);
            for (int channel = 0; channel < CHANNELS; ++channel) {
                const int64_t place = begin * CHANNELS + (work.channels_last ? at * CHANNELS + channel : channel * work.pixels + at);
                const int64_t step = work.channels_last ? CHANNELS : 1;
                if (work.target_type == UINT8) {
                    read_levels(static_cast<const uint8_t*>(work.target) + place, step, n, x[channel]);
                } else {
                    outside |= read_levels(static_cast<const Scalar*>(work.target) + place, step, n, x[channel]);
                }
            }
            if (work.of.upstream != nullptr) {
                factor *= load_first(static_cast<const Scalar*>(work.of.upstream) + begin + at, n, V{});
            }
            const Ahead ahead = row + 1 < last ? ahead_of<Y>(work, row + 1, v, count) : Ahead{};
            const V nll = mixture(tile.of(v), x, places, factor, scratch, work.grad != nullptr, ahead);
            for (int k = 0; work.of.values != nullptr && k < n; ++k) work.of.values[begin + at + k] = nll[k];
        }
        if (work.grad == nullptr) continue;
        if (work.channels_last) tile.write_last(static_cast<Y*>(work.grad) + begin * count);
        else tile.write_first(static_cast<Y*>(work.grad) + begin * count);
    }
    return outside;
}

}  // namespace

Span<Mixture> mixture_span(const Mixture& work) {
    return with_dtype(work.of.type, [&](auto y) -> Span<Mixture> {
        return work.channels == 3 ? tiles<decltype(y), 3> : tiles<decltype(y), 1>;
    });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
