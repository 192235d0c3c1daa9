// Sums over pairs on a CPU: O(rows·count·cols) arithmetic in O((rows + count)·cols) memory.
//
// A tile is WIDTH rows of y beside each other in registers, so that sums over dimensions need no lane of another, and sums
// over the tile none but the last. Tiles are laid out anew once, [cols][fields][WIDTH]: 24 KB for 64 dimensions, which the
// first-level cache holds while rows of x pass by. Distances are taken as they are, (x − y)², not as x² − 2xy + y²: a
// subtraction and a fused multiply-add in place of two, and nothing cancels.
//
// The forward of a product over dimensions takes 17 instructions a vector of pairs and dimensions, seven of them e^x's; the
// backward takes 23. Exponents are of base 2 in float: one multiplication less. They are relative to a number that is at
// most HEADROOM below the largest so far, and is raised when that is passed, which is rare after the first tile.
//
// The gradients of x are summed over y and those of y over x. A task is a panel of tiles and a panel of rows, whose sums are
// its own; they are added up in one order. There are as many tasks for any number of threads, so the bits are the same.
#include <new>

#include "spans.h"
#include "../math.h"
#include "../pairs.h"
#include "threads.h"

namespace fastvae {
namespace FASTVAE_ISA {
namespace {

constexpr int VECTORS = 4;        // of a tile
constexpr int QUAD = 4;           // rows of x that share what is loaded of a tile
constexpr int ROWS = 8;           // of x, whose sums stay in the cache while the tiles go by
constexpr int64_t TASKS = 32;     // of a backward, or about as many
constexpr int CHUNK = 8;          // dimensions added up by themselves: one after the other, 64 lose more than torch's sum
constexpr int QUADS_A_SUM = 16;   // the same for the rows of x
constexpr double HEADROOM = 60;   // 2^60 times as many terms as there can be is within the range of float
constexpr double LOG_2PI = 1.8378770664093453;

template <class V>
constexpr int LANES = lanes_of<V>::COUNT;
template <class V>
constexpr int WIDTH = VECTORS * LANES<V>;
template <class V>
using scalar_t = typename lanes_of<V>::scalar;

// What e^x is taken as, and how many nats a unit of x is.
template <class V>
constexpr double NATS = SINGLE<V> ? 0.69314718055994531 : 1;

// 2^x for x ≤ 127, 0 below -127; relative error 2⁻²³. A polynomial of least relative error (2⁻²⁹) on [-½, ½].
FASTVAE_INLINE Float power(Float x) {
    constexpr float BIASED = MAGIC + 127;  // x's nearest integer, plus 127, sits in the low bits of x + BIASED
    x = at_least(constant<Float>(-127), x);
    const Float shifted = x + BIASED, r = x - (shifted - BIASED), square = r * r;
    const Float high = 1.534581222071e-04f * square + (1.339993121807e-03f * r + 9.618488956241e-03f);
    const Float low = 5.550328776970e-02f * r + 2.402264689064e-01f;
    return ((high * square + low) * square + (6.931472057373e-01f * r + 1.000000000554e+00f)) * as_float(as_int(shifted) << 23);
}
FASTVAE_INLINE Double power(Double x) { return exp(x); }

// The number x is the `power` of; -HUGE_VAL for 0.
template <class V>
double exponent_of(double x) {
    return x == 0 ? -HUGE_VAL : std::log(x) / NATS<V>;
}

template <class V>
FASTVAE_INLINE bool any_above(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (SINGLE<V>) return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    if constexpr (SINGLE<V>) return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#endif
    return any(a > b);
}

// Σ of each of four vectors.
template <class V>
FASTVAE_INLINE void add_sums(V a, V b, V c, V d, scalar_t<V>* to) {
#if defined(__AVX2__)
    if constexpr (SINGLE<V>) {
#if defined(__AVX512F__)
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));  // each holds all four
        const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
#else
        const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
#endif
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
        return;
    }
#endif
    const V all[] = {a, b, c, d};
    for (int k = 0; k < 4; ++k) {
        scalar_t<V> total = 0;
        for (int lane = 0; lane < LANES<V>; ++lane) total += all[k][lane];
        to[k] += total;
    }
}

// Memory of one task, aligned for any vector.
template <class S>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<S*>(::operator new(count * sizeof(S), std::align_val_t{64}))) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    S* get() const { return data_; }

  private:
    S* data_;
};

template <class S>
void set_zero(S* to, int64_t count) {
    for (int64_t k = 0; k < count; ++k) to[k] = 0;
}

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// How the pairs are cut up, and where in the scratch memory what lies.
template <class V>
struct Plan {
    int64_t rows, count, cols, fields, sums;  // sums: of y's gradients, per element of a tile
    int64_t tiles, quads, panel, panels, row_panel, row_panels;

    Plan(int64_t rows, int64_t count, int64_t cols, int fields, int sums)
        : rows(rows), count(count), cols(cols), fields(fields), sums(sums) {
        tiles = parts_of(count, WIDTH<V>);
        quads = parts_of(rows, QUAD);
        panel = parts_of(tiles, TASKS);
        panels = parts_of(tiles, panel);
        row_panel = parts_of(quads, larger(1, TASKS / panels));
        row_panels = parts_of(quads, row_panel);
    }
    int64_t tile_size() const { return cols * fields * WIDTH<V>; }
    int64_t sums_size() const { return (1 + cols * sums) * WIDTH<V>; }  // Σ u of each row of y first
    int64_t of_tiles() const { return 0; }
    int64_t of_constants() const { return tiles * tile_size(); }
    int64_t of_rows() const { return of_constants() + tiles * WIDTH<V>; }
    int64_t of_sums() const { return of_rows() + panels * quads * cols * QUAD; }
    int64_t size(bool backward) const {
        return backward ? of_sums() + row_panels * tiles * sums_size() : of_rows();
    }
};

// A row relative to what its largest terms are about.
template <class V>
struct Running {
    scalar_t<V> reference;
    V sum;
};

template <class V>
__attribute__((noinline)) void raise(scalar_t<V>* reference, scalar_t<V>* sum, const V& top) {
    scalar_t<V> largest = *reference;
    for (int k = 0; k < LANES<V>; ++k) {
        if (top[k] > largest) largest = top[k];
    }
    store(sum, load(sum, V{}) * power(broadcast<V>(*reference - largest)));
    *reference = largest;
}

template <class V>
FASTVAE_INLINE V largest(const V* x) {
    return at_least(at_least(x[0], x[1]), at_least(x[2], x[3]));
}

// Adds the terms of a tile to a sum.
template <class V>
FASTVAE_INLINE void accumulate(scalar_t<V>* reference, scalar_t<V>* sum, const V* exponents) {
    const V top = largest(exponents);
    if (__builtin_expect(any_above(top, broadcast<V>(*reference) + constant<V>(HEADROOM)), 0)) raise(reference, sum, top);
    const V from = broadcast<V>(*reference);
    const V first = power(exponents[0] - from) + power(exponents[1] - from);
    store(sum, load(sum, V{}) + (first + (power(exponents[2] - from) + power(exponents[3] - from))));
}

// A sum of chunks, with what was lost when they were rounded into it: in a hundred dimensions or more that would be felt in
// e^x of it.
template <class V>
FASTVAE_INLINE void add_chunk(V& total, V& lost, V chunk) {
    const V part = chunk - lost, sum = total + part;
    lost = (sum - total) - part;
    total = sum;
}

// Of a row of x: Σ_d w·(x − mu)² with each of a tile, and, for a product, each dimension's terms added to `sums`.
template <class V, bool OFFSET>
FASTVAE_INLINE void row_with_tile(const scalar_t<V>* tile, const scalar_t<V>* x, int64_t cols, const scalar_t<V>* offset,
                                  scalar_t<V>* references, scalar_t<V>* sums, V* total) {
    V lost[VECTORS]{};
    for (int v = 0; v < VECTORS; ++v) total[v] = V{};
    for (int64_t begin = 0; begin < cols; begin += CHUNK) {
        const int64_t end = smaller(cols, begin + CHUNK);
        V part[VECTORS]{};
        for (int64_t d = begin; d < end; ++d) {
            const scalar_t<V>* const at = tile + d * 3 * WIDTH<V>;
            const V value = broadcast<V>(x[d]);
            V exponents[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const scalar_t<V>* const lanes = at + v * LANES<V>;
                const V distance = value - load(lanes, V{}), square = distance * distance;
                const V precision = load(lanes + WIDTH<V>, V{});
                exponents[v] = square * precision + load(lanes + 2 * WIDTH<V>, V{});
                part[v] += square * precision;
                if constexpr (OFFSET) exponents[v] += load(offset + v * LANES<V>, V{});
            }
            accumulate<V>(references + d, sums + d * LANES<V>, exponents);
        }
        for (int v = 0; v < VECTORS; ++v) add_chunk(total[v], lost[v], part[v]);
    }
}

// Σ_d w·(x − mu)² of four rows with each of a tile; w is 1 where there is but one field.
template <class V, int FIELDS>
FASTVAE_INLINE void quad_with_tile(const scalar_t<V>* tile, const scalar_t<V>* const* x, int64_t cols,
                                   scalar_t<V> (*out)[WIDTH<V>]) {
    constexpr int AT_ONCE = 2;
    for (int from = 0; from < VECTORS; from += AT_ONCE) {
        V total[QUAD][AT_ONCE]{}, lost[QUAD][AT_ONCE]{};
        for (int64_t begin = 0; begin < cols; begin += CHUNK) {
            const int64_t end = smaller(cols, begin + CHUNK);
            V part[QUAD][AT_ONCE]{};
            for (int64_t d = begin; d < end; ++d) {
                const scalar_t<V>* const at = tile + d * FIELDS * WIDTH<V> + from * LANES<V>;
                for (int v = 0; v < AT_ONCE; ++v) {
                    const V mu = load(at + v * LANES<V>, V{});
                    V precision{};
                    if constexpr (FIELDS > 1) precision = load(at + WIDTH<V> + v * LANES<V>, V{});
                    for (int r = 0; r < QUAD; ++r) {
                        const V distance = broadcast<V>(x[r][d]) - mu, square = distance * distance;
                        if constexpr (FIELDS > 1) part[r][v] += square * precision;
                        else part[r][v] += square;
                    }
                }
            }
            for (int r = 0; r < QUAD; ++r) {
                for (int v = 0; v < AT_ONCE; ++v) add_chunk(total[r][v], lost[r][v], part[r][v]);
            }
        }
        for (int r = 0; r < QUAD; ++r) {
            for (int v = 0; v < AT_ONCE; ++v) store(out[r] + (from + v) * LANES<V>, total[r][v]);
        }
    }
}

// With shares u of four rows in each of a tile (`fixed`, plus `factors` times the share in each dimension if PRODUCT): adds
// Σ_j u·w·(x − mu) to x_sums, [cols][QUAD], and Σ_i u, Σ_i u·(x − mu), Σ_i u·(x − mu)² to y_sums. Of one field, w is 1 and
// the last sum is nobody's; without a product Σ_i u is the same for all dimensions.
template <class V, int FIELDS, bool PRODUCT, bool OFFSET>
FASTVAE_INLINE void gradients_of_quad(const scalar_t<V>* tile, const scalar_t<V>* const* x, int64_t cols,
                                      const scalar_t<V> (*fixed)[WIDTH<V>], const scalar_t<V>* factors,
                                      const scalar_t<V>* const* each, const scalar_t<V> (*offsets)[WIDTH<V>],
                                      scalar_t<V>* x_sums, scalar_t<V>* y_sums) {
    constexpr int SUMS = PRODUCT ? 3 : FIELDS == 1 ? 1 : 2;
    if constexpr (!PRODUCT) {
        for (int v = 0; v < WIDTH<V>; v += LANES<V>) {
            const V of_two = load(fixed[0] + v, V{}) + load(fixed[1] + v, V{});
            store(y_sums + v, load(y_sums + v, V{}) + (of_two + (load(fixed[2] + v, V{}) + load(fixed[3] + v, V{}))));
        }
    }
    y_sums += WIDTH<V>;
    for (int64_t d = 0; d < cols; ++d, y_sums += SUMS * WIDTH<V>) {
        const scalar_t<V>* const at = tile + d * FIELDS * WIDTH<V>;
        V of_x[QUAD]{};
        for (int v = 0; v < WIDTH<V>; v += LANES<V>) {
            const V mu = load(at + v, V{});
            V precision{}, constants{}, mass{}, first = load(y_sums + v, V{}), second{};
            if constexpr (FIELDS > 1) {
                precision = load(at + WIDTH<V> + v, V{});
                second = load(y_sums + WIDTH<V> + v, V{});
            }
            if constexpr (PRODUCT) {
                constants = load(at + 2 * WIDTH<V> + v, V{});
                mass = load(y_sums + 2 * WIDTH<V> + v, V{});
            }
            for (int r = 0; r < QUAD; ++r) {
                const V distance = broadcast<V>(x[r][d]) - mu;
                V share = load(fixed[r] + v, V{});
                if constexpr (PRODUCT) {
                    V exponent = distance * distance * precision + constants;
                    if constexpr (OFFSET) exponent += load(offsets[r] + v, V{});
                    share += power(exponent - broadcast<V>(each[r][d])) * broadcast<V>(factors[r]);
                    mass += share;
                }
                const V pull = share * distance;
                first += pull;
                if constexpr (FIELDS > 1) {
                    second += pull * distance;
                    of_x[r] += pull * precision;
                } else {
                    of_x[r] += pull;
                }
            }
            store(y_sums + v, first);
            if constexpr (FIELDS > 1) store(y_sums + WIDTH<V> + v, second);
            if constexpr (PRODUCT) store(y_sums + 2 * WIDTH<V> + v, mass);
        }
        add_sums<V>(of_x[0], of_x[1], of_x[2], of_x[3], x_sums + d * QUAD);
    }
}

template <class WORK>
int run(int (*piece)(const WORK&, int64_t, int64_t), const WORK& work, int64_t parts, int64_t cost, int threads) {
    struct Call {
        int (*piece)(const WORK&, int64_t, int64_t);
        const WORK* work;
    };
    const Call call{piece, &work};
    const auto span = [](const void* pointer, int64_t first, int64_t last) {
        const Call& call = *static_cast<const Call*>(pointer);
        return call.piece(*call.work, first, last);
    };
    return run_rows(span, &call, parts, cost, threads);
}

// Gaussians

template <class V>
struct Gaussians {
    using S = scalar_t<V>;
    const GaussianPairs& work;
    Plan<V> plan;
    bool product;

    Gaussians(const GaussianPairs& work, bool product)
        : work(work), plan(work.rows, work.count, work.cols, product ? 3 : 2, product ? 3 : 2), product(product) {}
    S* scratch(int64_t at) const { return static_cast<S*>(work.scratch) + at; }
    const S* x(int64_t row) const { return static_cast<const S*>(work.x) + row * work.cols; }
    bool offsets() const { return work.own != 0 || work.beside != 0; }
    // Whether one of `count` rows has a weight of its own in the tile.
    bool special(int64_t row, int64_t count, int64_t tile) const {
        if (!offsets()) return false;
        const int64_t first = tile * WIDTH<V>, last = first + WIDTH<V>;
        const int64_t after = row + count < work.count ? row + count : row + count - work.count;
        return (row < last && row + count >= first) || (after >= first && after < last);
    }
    void fill_offsets(int64_t row, int64_t tile, S* offset) const {
        const int64_t first = tile * WIDTH<V>, next = row + 1 < work.count ? row + 1 : 0;
        for (int k = 0; k < WIDTH<V>; ++k) {
            const double nats = first + k == row ? work.own : first + k == next ? work.beside : 0;
            offset[k] = static_cast<S>(nats / NATS<V>);
        }
    }
};

// mu, −½/σ² and −½·log(2πσ²), the latter two in units of `power`; and what a whole row of y has of the last, with its weight.
template <class V>
int lay_out(const Gaussians<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const GaussianPairs& work = all.work;
    const auto* const mu = static_cast<const S*>(work.mu);
    const auto* const logvar = static_cast<const S*>(work.logvar);
    for (int64_t t = first; t < last; ++t) {
        S* const tile = all.scratch(all.plan.of_tiles() + t * all.plan.tile_size());
        S* const constants = all.scratch(all.plan.of_constants() + t * WIDTH<V>);
        for (int k = 0; k < WIDTH<V>; ++k) {
            const int64_t j = t * WIDTH<V> + k;
            const bool there = j < work.count;
            double total = there ? 0 : -HUGE_VAL;
            if (there && work.log_weights != nullptr) total = static_cast<const S*>(work.log_weights)[j];
            for (int64_t d = 0; d < work.cols; ++d) {
                const double log_var = there ? static_cast<double>(logvar[j * work.cols + d]) : 0;
                const double constant = there ? -0.5 * (log_var + LOG_2PI) : -HUGE_VAL;
                S* const at = tile + d * all.plan.fields * WIDTH<V> + k;
                at[0] = there ? mu[j * work.cols + d] : 0;
                at[WIDTH<V>] = static_cast<S>(-0.5 / NATS<V> * std::exp(-log_var));
                if (all.product) at[2 * WIDTH<V>] = static_cast<S>(constant / NATS<V>);
                total += constant;
            }
            constants[k] = static_cast<S>(total / NATS<V>);
        }
    }
    return 0;
}

template <class V>
constexpr double LOWEST = SINGLE<V> ? -3e38 : -1e308;

// log Σ of a row: written for the backward, returned in units of `power`.
template <class V, class T>
double finish(scalar_t<V> reference, const scalar_t<V>* sum, T* kept) {
    const double value = reference + exponent_of<V>(fastvae::FASTVAE_ISA::sum(load(sum, V{})));
    if (kept != nullptr) *kept = static_cast<T>(value == -HUGE_VAL ? std::nan("") : value);
    return value;
}

template <class V>
void write_joint(const GaussianPairs& work, int64_t row, scalar_t<V> reference, const scalar_t<V>* sum) {
    using S = scalar_t<V>;
    double* const kept = work.kept_joint == nullptr ? nullptr : work.kept_joint + row;
    static_cast<S*>(work.log_joint)[row] = static_cast<S>(finish<V>(reference, sum, kept) * NATS<V>);
}

// Blocks of ROWS rows, with a product.
template <class V>
int product_forward(const Gaussians<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const GaussianPairs& work = all.work;
    const int64_t cols = work.cols, state = (cols + 1) * LANES<V>;
    const Buffer<S> sums_buffer(ROWS * state), references_buffer(ROWS * (cols + 1)), offset_buffer(WIDTH<V>);
    S *const sums = sums_buffer.get(), *const references = references_buffer.get(), *const offset = offset_buffer.get();
    for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * ROWS, there = smaller(ROWS, work.rows - begin);
        set_zero(sums, ROWS * state);
        for (int64_t k = 0; k < ROWS * (cols + 1); ++k) references[k] = static_cast<S>(LOWEST<V>);
        for (int64_t t = 0; t < all.plan.tiles; ++t) {
            const S* const tile = all.scratch(t * all.plan.tile_size());
            const S* const constants = all.scratch(all.plan.of_constants() + t * WIDTH<V>);
            for (int64_t r = 0; r < there; ++r) {
                const int64_t row = begin + r;
                S *const reference = references + r * (cols + 1), *const sum = sums + r * state;
                V total[VECTORS];
                const bool special = all.special(row, 1, t);
                if (special) {
                    all.fill_offsets(row, t, offset);
                    row_with_tile<V, true>(tile, all.x(row), cols, offset, reference, sum, total);
                } else {
                    row_with_tile<V, false>(tile, all.x(row), cols, offset, reference, sum, total);
                }
                // in the order of the backward: shares that are rounded as their sum was add up to 1
                for (int v = 0; v < VECTORS; ++v) {
                    total[v] += load(constants + v * LANES<V>, V{});
                    if (special) total[v] += load(offset + v * LANES<V>, V{});
                }
                accumulate<V>(reference + cols, sum + cols * LANES<V>, total);
            }
        }
        for (int64_t r = 0; r < there; ++r) {
            const int64_t row = begin + r;
            const S *const reference = references + r * (cols + 1), *const sum = sums + r * state;
            double total = 0;
            for (int64_t d = 0; d < cols; ++d) {
                S* const kept = work.kept_each == nullptr ? nullptr : static_cast<S*>(work.kept_each) + row * cols + d;
                total += finish<V>(reference[d], sum + d * LANES<V>, kept);
            }
            static_cast<S*>(work.log_product)[row] = static_cast<S>(total * NATS<V>);
            write_joint<V>(work, row, reference[cols], sum + cols * LANES<V>);
        }
    }
    return 0;
}

// Four rows; where there are fewer, the last one stands for those beyond.
template <class S>
struct Quad {
    const S* x[QUAD];
    int64_t row[QUAD];
    int there;
    Quad(const void* from, int64_t quad, int64_t rows, int64_t cols) {
        there = static_cast<int>(smaller(QUAD, rows - quad * QUAD));
        for (int r = 0; r < QUAD; ++r) {
            row[r] = quad * QUAD + (r < there ? r : there - 1);
            x[r] = static_cast<const S*>(from) + row[r] * cols;
        }
    }
};

// Quads without a product.
template <class V>
int joint_forward(const Gaussians<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const GaussianPairs& work = all.work;
    alignas(64) S distances[QUAD][WIDTH<V>], offset[WIDTH<V>], sums[QUAD][LANES<V>];
    for (int64_t q = first; q < last; ++q) {
        const Quad<S> quad(work.x, q, work.rows, work.cols);
        S references[QUAD];
        for (int r = 0; r < QUAD; ++r) {
            references[r] = static_cast<S>(LOWEST<V>);
            store(sums[r], V{});
        }
        for (int64_t t = 0; t < all.plan.tiles; ++t) {
            const S* const constants = all.scratch(all.plan.of_constants() + t * WIDTH<V>);
            quad_with_tile<V, 2>(all.scratch(t * all.plan.tile_size()), quad.x, work.cols, distances);
            for (int r = 0; r < quad.there; ++r) {
                V total[VECTORS];
                const bool special = all.special(quad.row[r], 1, t);
                if (special) all.fill_offsets(quad.row[r], t, offset);
                for (int v = 0; v < VECTORS; ++v) {
                    total[v] = load(distances[r] + v * LANES<V>, V{}) + load(constants + v * LANES<V>, V{});
                    if (special) total[v] += load(offset + v * LANES<V>, V{});
                }
                accumulate<V>(references + r, sums[r], total);
            }
        }
        for (int r = 0; r < quad.there; ++r) write_joint<V>(work, quad.row[r], references[r], sums[r]);
    }
    return 0;
}

// Adds up in parts the rows of x that a tile meets: y_sums goes into `total` every QUADS_A_SUM quads.
template <class V>
void add_to(scalar_t<V>* total, scalar_t<V>* part, int64_t size) {
    for (int64_t k = 0; k < size; k += LANES<V>) {
        store(total + k, load(total + k, V{}) + load(part + k, V{}));
        store(part + k, V{});
    }
}

// Calls of_quad(tile index, quad index, x_sums, y_sums) for the pairs of tasks first … last; of a sample `within` itself, for
// those of a row with itself and with later ones.
template <class V, class F>
FASTVAE_INLINE void for_tasks(const Plan<V>& plan, scalar_t<V>* scratch, bool within, int64_t first, int64_t last, F of_quad) {
    using S = scalar_t<V>;
    const Buffer<S> buffer(plan.sums_size());
    S* const part = buffer.get();
    set_zero(part, plan.sums_size());
    for (int64_t task = first; task < last; ++task) {
        const int64_t panel = task % plan.panels, row_panel = task / plan.panels;
        const int64_t first_quad = row_panel * plan.row_panel, end = smaller(plan.quads, first_quad + plan.row_panel);
        S* const x_sums = scratch + plan.of_rows() + panel * plan.quads * plan.cols * QUAD;
        set_zero(x_sums + first_quad * plan.cols * QUAD, (end - first_quad) * plan.cols * QUAD);
        const int64_t last_tile = smaller(plan.tiles, (panel + 1) * plan.panel);
        for (int64_t t = panel * plan.panel; t < last_tile; ++t) {
            S* const y_sums = scratch + plan.of_sums() + (row_panel * plan.tiles + t) * plan.sums_size();
            set_zero(y_sums, plan.sums_size());
            const int64_t last_quad = within ? smaller(end, (t + 1) * WIDTH<V> / QUAD) : end;
            for (int64_t q = first_quad; q < last_quad; ++q) {
                of_quad(t, q, x_sums + q * plan.cols * QUAD, part);
                if ((q - first_quad) % QUADS_A_SUM == QUADS_A_SUM - 1 || q + 1 == last_quad) {
                    add_to<V>(y_sums, part, plan.sums_size());
                }
            }
        }
    }
}

template <class V, bool PRODUCT>
int gaussian_backward(const Gaussians<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    constexpr int FIELDS = PRODUCT ? 3 : 2;
    const GaussianPairs& work = all.work;
    const bool joint = work.grad_joint != nullptr;
    alignas(64) S shares[QUAD][WIDTH<V>], offsets[QUAD][WIDTH<V>];
    if (!joint) set_zero(shares[0], QUAD * WIDTH<V>);
    for_tasks<V>(all.plan, all.scratch(0), false, first, last, [&](int64_t t, int64_t q, S* x_sums, S* y_sums) FASTVAE_LAMBDA {
        const Quad<S> quad(work.x, q, work.rows, work.cols);
        const S* const tile = all.scratch(t * all.plan.tile_size());
        const bool special = all.special(q * QUAD, quad.there, t);
        for (int r = 0; special && r < QUAD; ++r) all.fill_offsets(quad.row[r], t, offsets[r]);
        if (joint) {
            const S* const constants = all.scratch(all.plan.of_constants() + t * WIDTH<V>);
            quad_with_tile<V, FIELDS>(tile, quad.x, work.cols, shares);
            for (int r = 0; r < QUAD; ++r) {
                const double whole = work.kept_joint[quad.row[r]];
                const V kept = broadcast<V>(static_cast<S>(whole));
                const V rest = broadcast<V>(static_cast<S>(whole - static_cast<S>(whole)));
                const V factor = broadcast<V>(r < quad.there ? static_cast<const S*>(work.grad_joint)[quad.row[r]] : 0);
                for (int v = 0; v < WIDTH<V>; v += LANES<V>) {
                    V exponent = load(shares[r] + v, V{}) + load(constants + v, V{});
                    if (special) exponent += load(offsets[r] + v, V{});
                    store(shares[r] + v, power(exponent - kept - rest) * factor);
                }
            }
        }
        S factors[QUAD];
        const S* each[QUAD];
        for (int r = 0; PRODUCT && r < QUAD; ++r) {
            factors[r] = r < quad.there ? static_cast<const S*>(work.grad_product)[quad.row[r]] : 0;
            each[r] = static_cast<const S*>(work.kept_each) + quad.row[r] * work.cols;
        }
        if (PRODUCT && special) {
            gradients_of_quad<V, FIELDS, PRODUCT, true>(tile, quad.x, work.cols, shares, factors, each, offsets, x_sums, y_sums);
        } else {
            gradients_of_quad<V, FIELDS, PRODUCT, false>(tile, quad.x, work.cols, shares, factors, each, offsets, x_sums, y_sums);
        }
    });
    return 0;
}

// Σ over panels of x_sums.
template <class V>
FASTVAE_INLINE double x_sum(const Plan<V>& plan, const scalar_t<V>* scratch, int64_t row, int64_t d) {
    double total = 0;
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
        total += scratch[plan.of_rows() + ((panel * plan.quads + row / QUAD) * plan.cols + d) * QUAD + row % QUAD];
    }
    return total;
}

// The gradient in x: `factor` times those, for quads first … last.
template <class V>
void write_x(const Plan<V>& plan, const scalar_t<V>* scratch, double factor, void* grad, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    for (int64_t row = first * QUAD; row < smaller(last * QUAD, plan.rows); ++row) {
        for (int64_t d = 0; d < plan.cols; ++d) {
            static_cast<S*>(grad)[row * plan.cols + d] = static_cast<S>(factor * x_sum(plan, scratch, row, d));
        }
    }
}

// Σ over panels of rows of one number of y_sums.
template <class V>
FASTVAE_INLINE double y_sum(const Plan<V>& plan, const scalar_t<V>* scratch, int64_t tile, int64_t at) {
    double total = 0;
    for (int64_t panel = 0; panel < plan.row_panels; ++panel) {
        total += scratch[plan.of_sums() + (panel * plan.tiles + tile) * plan.sums_size() + at];
    }
    return total;
}

template <class V>
int write_gaussian_x(const Gaussians<V>& all, int64_t first, int64_t last) {
    write_x<V>(all.plan, all.scratch(0), 2 * NATS<V>, all.work.grad_x, first, last);
    return 0;
}

// Of tiles: ∂mu = Σ u·(x − mu)/σ², ∂logvar = ½(Σ u·(x − mu)²/σ² − Σ u), ∂log w = Σ u.
template <class V>
int write_gaussian_y(const Gaussians<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const GaussianPairs& work = all.work;
    const Plan<V>& plan = all.plan;
    for (int64_t t = first; t < last; ++t) {
        const S* const tile = all.scratch(t * plan.tile_size());
        const int64_t there = smaller(WIDTH<V>, work.count - t * WIDTH<V>);
        for (int64_t k = 0; k < there; ++k) {
            const int64_t j = t * WIDTH<V> + k;
            double mass = all.product ? 0 : y_sum<V>(plan, all.scratch(0), t, k);
            if (work.grad_log_weights != nullptr) static_cast<S*>(work.grad_log_weights)[j] = static_cast<S>(mass);
            for (int64_t d = 0; d < work.cols; ++d) {
                const int64_t at = WIDTH<V> + d * plan.sums * WIDTH<V> + k;
                const double precision = -2 * NATS<V> * tile[(d * plan.fields + 1) * WIDTH<V> + k];
                if (all.product) mass = y_sum<V>(plan, all.scratch(0), t, at + 2 * WIDTH<V>);
                const double of_mu = precision * y_sum<V>(plan, all.scratch(0), t, at);
                const double squares = precision * y_sum<V>(plan, all.scratch(0), t, at + WIDTH<V>);
                static_cast<S*>(work.grad_mu)[j * work.cols + d] = static_cast<S>(of_mu);
                static_cast<S*>(work.grad_logvar)[j * work.cols + d] = static_cast<S>(0.5 * (squares - mass));
            }
        }
    }
    return 0;
}

template <class V>
void gaussian(const GaussianPairs& work, int threads) {
    const bool backward = work.grad_x != nullptr;
    const bool product = backward ? work.grad_product != nullptr : work.log_product != nullptr;
    const Gaussians<V> all(work, product);
    const Plan<V>& plan = all.plan;
    const int64_t tile_cost = plan.tile_size(), row_cost = plan.tiles * WIDTH<V> * plan.cols;
    run(lay_out<V>, all, plan.tiles, 8 * tile_cost, threads);
    if (!backward) {
        if (product) run(product_forward<V>, all, parts_of(work.rows, ROWS), 8 * ROWS * row_cost, threads);
        else run(joint_forward<V>, all, plan.quads, QUAD * row_cost, threads);
        return;
    }
    const int64_t tasks = plan.panels * plan.row_panels;
    const int64_t cost = plan.row_panel * QUAD * plan.panel * WIDTH<V> * plan.cols;
    run(product ? gaussian_backward<V, true> : gaussian_backward<V, false>, all, tasks, cost, threads);
    run(write_gaussian_x<V>, all, plan.quads, QUAD * plan.cols * plan.panels, threads);
    run(write_gaussian_y<V>, all, plan.tiles, tile_cost * plan.row_panels, threads);
}

// Kernels of squared distances

template <class V>
struct Kernels {
    using S = scalar_t<V>;
    const KernelPairs& work;
    Plan<V> plan;

    explicit Kernels(const KernelPairs& work) : work(work), plan(work.rows, work.count, work.cols, 1, 1) {}
    S* scratch(int64_t at) const { return static_cast<S*>(work.scratch) + at; }
    int there(int64_t tile) const { return static_cast<int>(smaller(WIDTH<V>, work.count - tile * WIDTH<V>)); }
    // Whether a sample meets itself: each pair is taken once then.
    bool within() const { return work.x == work.y && work.rows == work.count && work.grad_y == nullptr; }
    // Whether rows of a quad are in the tile, too.
    bool crossed(int64_t tile, int64_t quad) const { return within() && tile * WIDTH<V> <= quad * QUAD; }

    // k, or its derivative, of squared distances.
    template <bool SLOPE>
    FASTVAE_INLINE V value(V squared) const {
        V total{};
        for (int64_t s = 0; s < work.scale_count; ++s) {
            const double scale = work.scales[s];
            if (work.kernel == RBF) {
                const V term = power(squared * constant<V>(-1 / (scale * NATS<V>)));
                total += SLOPE ? term * constant<V>(-1 / scale) : term;
            } else {
                const V term = divide(constant<V>(scale), constant<V>(scale) + squared);
                total += SLOPE ? term * term * constant<V>(-1 / scale) : term;
            }
        }
        return total;
    }
};

template <class V>
int lay_out_kernels(const Kernels<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const int64_t cols = all.work.cols;
    for (int64_t t = first; t < last; ++t) {
        S* const tile = all.scratch(t * all.plan.tile_size());
        for (int k = 0; k < WIDTH<V>; ++k) {
            for (int64_t d = 0; d < cols; ++d) {
                const int64_t j = t * WIDTH<V> + k;
                tile[d * WIDTH<V> + k] = k < all.there(t) ? static_cast<const S*>(all.work.y)[j * cols + d] : 0;
            }
        }
    }
    return 0;
}

// Lanes from `there` on are 0.
template <class V>
FASTVAE_INLINE V masked(V x, int there) {
    return there >= LANES<V> ? x : there <= 0 ? V{} : first_lanes<V>(there) ? x : V{};
}

// Of lanes where a row meets the rows from its `distance`-th predecessor on: none before itself, half of itself, the others.
template <class V>
FASTVAE_INLINE V from_itself(V x, int64_t distance) {
    typename lanes_of<V>::integer lane{};
    for (int k = 0; k < LANES<V>; ++k) lane[k] = k;
    const auto itself = static_cast<decltype(lane[0] + 0)>(larger(-1, smaller(distance, LANES<V>)));
    return lane < itself ? V{} : lane == itself ? x * constant<V>(0.5) : x;
}

template <class V>
int kernel_forward(const Kernels<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const KernelPairs& work = all.work;
    alignas(64) S distances[QUAD][WIDTH<V>];
    for (int64_t q = first; q < last; ++q) {
        const Quad<S> quad(work.x, q, work.rows, work.cols);
        V sums[QUAD]{};
        double totals[QUAD]{};
        for (int64_t t = all.within() ? q * QUAD / WIDTH<V> : 0; t < all.plan.tiles; ++t) {
            const int there = all.there(t);
            const bool crossed = all.crossed(t, q);
            quad_with_tile<V, 1>(all.scratch(t * all.plan.tile_size()), quad.x, work.cols, distances);
            for (int r = 0; r < QUAD; ++r) {
                for (int v = 0; v < WIDTH<V>; v += LANES<V>) {
                    V found = masked(all.template value<false>(load(distances[r] + v, V{})), there - v);
                    if (crossed) found = from_itself(found, quad.row[r] - t * WIDTH<V> - v);
                    sums[r] += found;
                }
            }
            if (t % QUADS_A_SUM == QUADS_A_SUM - 1 || t + 1 == all.plan.tiles) {
                for (int r = 0; r < QUAD; ++r) {
                    totals[r] += sum(sums[r]);
                    sums[r] = V{};
                }
            }
        }
        for (int r = 0; r < quad.there; ++r) work.sums[quad.row[r]] = all.within() ? 2 * totals[r] : totals[r];
    }
    return 0;
}

template <class V>
int kernel_backward(const Kernels<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const KernelPairs& work = all.work;
    alignas(64) S shares[QUAD][WIDTH<V>];
    const auto of_quad = [&](int64_t t, int64_t q, S* x_sums, S* y_sums) FASTVAE_LAMBDA {
        const Quad<S> quad(work.x, q, work.rows, work.cols);
        const S* const tile = all.scratch(t * all.plan.tile_size());
        const int there = all.there(t);
        const bool crossed = all.crossed(t, q);
        quad_with_tile<V, 1>(tile, quad.x, work.cols, shares);
        for (int r = 0; r < QUAD; ++r) {
            for (int v = 0; v < WIDTH<V>; v += LANES<V>) {
                V slope = masked(all.template value<true>(load(shares[r] + v, V{})), there - v);
                if (crossed) slope = from_itself(slope, quad.row[r] - t * WIDTH<V> - v);
                store(shares[r] + v, r < quad.there ? slope : V{});
            }
        }
        gradients_of_quad<V, 1, false, false>(tile, quad.x, work.cols, shares, nullptr, nullptr, nullptr, x_sums, y_sums);
    };
    for_tasks<V>(all.plan, all.scratch(0), all.within(), first, last, of_quad);
    return 0;
}

template <class V>
int write_kernel_x(const Kernels<V>& all, int64_t first, int64_t last) {
    write_x<V>(all.plan, all.scratch(0), 2, all.work.grad_x, first, last);
    return 0;
}

// The gradient in y; within a sample, that in x, which meets the rows after it as x and those before it as y.
template <class V, bool WITHIN>
int write_kernel_y(const Kernels<V>& all, int64_t first, int64_t last) {
    using S = scalar_t<V>;
    const KernelPairs& work = all.work;
    S* const grad = static_cast<S*>(WITHIN ? work.grad_x : work.grad_y);
    for (int64_t t = first; t < last; ++t) {
        for (int64_t k = 0; k < all.there(t); ++k) {
            const int64_t row = t * WIDTH<V> + k;
            for (int64_t d = 0; d < work.cols; ++d) {
                double total = -y_sum<V>(all.plan, all.scratch(0), t, WIDTH<V> + d * WIDTH<V> + k);
                if constexpr (WITHIN) total += x_sum(all.plan, all.scratch(0), row, d);
                grad[row * work.cols + d] = static_cast<S>(2 * total);
            }
        }
    }
    return 0;
}

template <class V>
void kernels(const KernelPairs& work, int threads) {
    const Kernels<V> all(work);
    const Plan<V>& plan = all.plan;
    run(lay_out_kernels<V>, all, plan.tiles, plan.tile_size(), threads);
    if (work.sums != nullptr) {
        run(kernel_forward<V>, all, plan.quads, QUAD * plan.tiles * plan.tile_size(), threads);
        return;
    }
    const int64_t tasks = plan.panels * plan.row_panels;
    run(kernel_backward<V>, all, tasks, plan.row_panel * QUAD * plan.panel * WIDTH<V> * plan.cols, threads);
    if (all.within()) {
        run(write_kernel_y<V, true>, all, plan.tiles, plan.tile_size() * (plan.row_panels + plan.panels), threads);
        return;
    }
    run(write_kernel_x<V>, all, plan.quads, QUAD * plan.cols * plan.panels, threads);
    if (work.grad_y != nullptr) run(write_kernel_y<V, false>, all, plan.tiles, plan.tile_size() * plan.row_panels, threads);
}

}  // namespace

void gaussian_pairs(const GaussianPairs& work, int threads) {
    if (work.type == FLOAT64) gaussian<Double>(work, threads);
    else gaussian<Float>(work, threads);
}

void kernel_pairs(const KernelPairs& work, int threads) {
    if (work.type == FLOAT64) kernels<Double>(work, threads);
    else kernels<Float>(work, threads);
}

int64_t pairs_scratch(int type, int64_t rows, int64_t count, int64_t cols, int fields, bool backward) {
    if (type == FLOAT64) return Plan<Double>(rows, count, cols, fields, fields).size(backward) * 8;
    return Plan<Float>(rows, count, cols, fields, fields).size(backward) * 4;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
