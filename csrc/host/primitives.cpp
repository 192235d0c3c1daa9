// The primitives on a CPU: picks the loops for this processor, runs them, adds the sums of rows up. Rows are added in
// one order, whatever thread summed them: the same bits for any number of threads.
#include "spans.h"

#include <algorithm>
#include <memory>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../primitives.h"
#include "threads.h"
#include "../types.h"

namespace fastvae {
namespace {

// What this processor has of the instruction sets the loops were compiled for; each goes with the ones before it.
enum Instructions { BASELINE, AVX2, AVX512 };
const char* const NAMES[] = {"baseline", "avx2", "avx512"};

Instructions widest() {
#ifdef FASTVAE_X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return BASELINE;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? AVX512 : AVX2;
#else
    return BASELINE;
#endif
}

Instructions used = widest();
#ifdef FASTVAE_X86
#define FASTVAE_PICK(FUNCTION) (used == AVX512 ? avx512::FUNCTION : used == AVX2 ? avx2::FUNCTION : baseline::FUNCTION)
#else
#define FASTVAE_PICK(FUNCTION) baseline::FUNCTION
#endif

template <class WORK>
int run(Span<WORK> (*choose)(const WORK&), const WORK& work, const Rows& grid, int64_t cost, int threads) {
    struct Call {
        Span<WORK> span;
        const WORK* work;
    };
    const Call call{choose(work), &work};
    const auto piece = [](const void* pointer, int64_t first, int64_t last) {
        const Call& call = *static_cast<const Call*>(pointer);
        return call.span(*call.work, first, last);
    };
    return run_rows(piece, &call, grid.rows, grid.cols * cost, threads);
}

// Asks for huge pages under a large output that nobody has written yet. A fresh 25 MB tensor is 6,000 page faults,
// which cost more than the kernel that fills it; huge pages make it a dozen. Advice not taken changes nothing.
void advise(void* output, int64_t elements, int type) {
#ifdef __linux__
    constexpr uintptr_t LARGE = 4 << 20, PAGE = 4096;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(output);
    const uintptr_t bytes = elements * with_dtype(type, [](auto element) { return sizeof element; });
    if (output == nullptr || bytes < LARGE) return;
    const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = (begin + bytes) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)output, (void)elements, (void)type;
#endif
}

// The rows of the latent, which are few, then those of the reconstruction: one parallel run for both.
struct Both {
    Span<Latent> latent_span;
    const Latent* latent;
    Span<Reconstruction> reconstruction_span;
    const Reconstruction* reconstruction;
};

int run_both(const Both& both, int threads) {
    const auto piece = [](const void* pointer, int64_t first, int64_t last) {
        const Both& both = *static_cast<const Both*>(pointer);
        const int64_t between = both.latent->grid.rows;
        int flags = 0;
        if (first < between) flags |= both.latent_span(*both.latent, first, std::min(last, between));
        if (last > between) {
            const int64_t from = std::max(first, between) - between;
            flags |= both.reconstruction_span(*both.reconstruction, from, last - between);
        }
        return flags;
    };
    const int64_t rows = both.latent->grid.rows + both.reconstruction->grid.rows;
    const int64_t elements = both.latent->grid.total + both.reconstruction->grid.total;
    return run_rows(piece, &both, rows, rows == 0 ? 0 : elements / rows, threads);
}

// Σ of each row, on the stack where they are few.
class Sums {
  public:
    explicit Sums(int64_t rows) : rows_(rows), large_(rows > FEW ? new double[rows] : nullptr) {}
    double* data() { return large_ ? large_.get() : few_; }

    // Σ of `count` numbers, added in pairs: one after the other, thousands lose more in float64 than eager's sum does.
    static double sum(const double* numbers, int64_t count) {
        if (count <= 2) return count == 0 ? 0 : count == 1 ? numbers[0] : numbers[0] + numbers[1];
        const int64_t half = count / 2;
        return sum(numbers, half) + sum(numbers + half, count - half);
    }

    // Writes the loss and returns it where it is one number.
    double finish(Reduction reduction, double weight, int type, void* loss) {
        const int64_t count = reduction == EXAMPLE ? rows_ : 1;
        const double value = reduction == EXAMPLE ? 0 : sum(data(), rows_) * weight;
        for (int64_t k = 0; k < count; ++k) put(type, loss, k, reduction == EXAMPLE ? data()[k] : value);
        return value;
    }

    static void put(int type, void* loss, int64_t index, double value) {
        if (type == FLOAT64) static_cast<double*>(loss)[index] = value;
        else static_cast<float*>(loss)[index] = static_cast<float>(value);
    }

  private:
    static constexpr int64_t FEW = 256;
    int64_t rows_;
    std::unique_ptr<double[]> large_;
    double few_[FEW];
};

}  // namespace

std::vector<std::string> instruction_sets() { return {NAMES, NAMES + widest() + 1}; }

std::string use_instructions(const std::string& name) {
    const std::vector<std::string> there = instruction_sets();
    const auto found = std::find(there.begin(), there.end(), name);
    if (found != there.end()) {
        used = static_cast<Instructions>(found - there.begin());
    } else if (!name.empty()) {
        std::string names;
        for (const std::string& one : there) names += (names.empty() ? "'" : ", '") + one + "'";
        throw std::invalid_argument("instructions must be one of " + names + " on this processor, got '" + name + "'");
    }
    return NAMES[used];
}

std::vector<std::string> likelihood_names(bool with_tensor) { return baseline::likelihood_names(with_tensor); }

bool evaluate(const std::string& function, const float* numbers, float* results, int64_t count) {
    return FASTVAE_PICK(evaluate)(function, numbers, results, count);
}

int reconstruction_forward(Reconstruction work, Reduction reduction, void* loss, int threads) {
    work.weight = reduction_weight(reduction, work.grid);
    advise(work.grad, work.grid.total, work.recon_type);
    if (reduction == NONE) {
        advise(loss, work.grid.total, work.recon_type);
        work.nll = loss;
        merge_rows(work);
        return run(FASTVAE_PICK(reconstruction_span), work, work.grid, 1, threads);
    }
    const double weight = work.weight;
    if (reduction != EXAMPLE) merge_rows(work);
    Sums sums(work.grid.rows);
    work.sums = sums.data();
    const int flags = run(FASTVAE_PICK(reconstruction_span), work, work.grid, 1, threads);
    sums.finish(reduction, weight, work.recon_type, loss);
    return flags;
}

void reconstruction_backward(Reconstruction work, Reduction reduction, int threads) {
    work.weight = reduction_weight(reduction, work.grid);
    advise(work.grad, work.grid.total, work.recon_type);
    if (work.upstream_by_element || work.upstream_stride == 0) merge_rows(work);
    run(FASTVAE_PICK(reconstruction_span), work, work.grid, 1, threads);
}

int with_tensor(const WithTensor& work, int threads) {
    const Reconstruction& of = work.of;
    advise(of.grad, of.grid.total, of.recon_type);
    advise(of.nll, of.grid.total, of.recon_type);
    const int real = of.recon_type == FLOAT64 ? FLOAT64 : FLOAT32;
    advise(work.grad_parameter, of.grid.total, real);
    advise(work.grad_zero_logits, of.grid.total, real);
    const Rows pieces{(of.grid.rows + work.piece - 1) / work.piece, of.grid.cols * work.piece, of.grid.total};
    return run(FASTVAE_PICK(with_tensor_span), work, pieces, 1, threads);
}

// A parameter costs as much as a few elements of another term.
int mixture(const Mixture& work, int threads) {
    constexpr int64_t COST = 8;
    advise(work.grad, work.total(), work.of.type);
    const Rows grid{work.examples * work.tiles(), MIXTURE_TILE * work.components * COST, 0};
    return run(FASTVAE_PICK(mixture_span), work, grid, 1, threads);
}

int logistic(const Logistic& work, int threads) {
    constexpr int64_t COST = 4;
    for (void* output : {work.nll, work.grad_mean, work.grad_log_scale}) advise(output, work.grid.total, work.type);
    return run(FASTVAE_PICK(logistic_span), work, work.grid, COST, threads);
}

int categorical(const Categorical& work, int threads) {
    for (void* output : {work.grad, work.grad_p}) advise(output, work.rows * work.cols, work.of.type);
    return run(FASTVAE_PICK(categorical_span), work, Rows{work.rows, work.cols, 0}, 2, threads);
}

void log_ratio(const LogRatio& work, int threads) {
    advise(work.grad_z, work.samples * work.examples * work.cols, work.of.type);
    run(FASTVAE_PICK(log_ratio_span), work, Rows{work.examples, work.cols * work.samples, 0}, 1, threads);
}

void sum_rows(const double* values, int64_t rows, int64_t cols, double* sums) {
    for (int64_t row = 0; row < rows; ++row) sums[row] = Sums::sum(values + row * cols, cols);
}

void latent_forward(Latent work, Reduction reduction, void* kl, int threads) {
    const double weight = reduction_weight(reduction, work.grid);
    const int64_t cost = work.z == nullptr ? 1 : 4 * work.samples;
    advise(work.z, work.grid.total * work.samples, work.type);
    if (reduction == NONE) advise(kl, work.grid.total, work.type);
    work.by_element = reduction == NONE;
    if (reduction != EXAMPLE) merge_rows(work);
    Sums sums(work.grid.rows);
    if (reduction == NONE) work.kl = kl;
    else if (kl != nullptr) work.sums = sums.data();
    run(FASTVAE_PICK(latent_forward_span), work, work.grid, cost, threads);
    if (work.sums != nullptr) sums.finish(reduction, weight, work.type, kl);
}

void latent_backward(Latent work, Reduction reduction, int threads) {
    work.weight *= reduction_weight(reduction, work.grid);
    for (void* output : {work.grad_mu, work.grad_scale, work.grad_prior_mu, work.grad_prior_logvar}) {
        advise(output, work.grid.total, work.type);
    }
    if (work.upstream == nullptr || work.by_element || work.upstream_stride == 0) merge_rows(work);
    run(FASTVAE_PICK(latent_backward_span), work, work.grid, work.grad_z == nullptr ? 1 : 4 * work.samples, threads);
}

// The gradients of β·KL for an upstream gradient of 1.
static void kl_gradients(Latent work, double beta, Reduction reduction, int threads) {
    static const float one = 1;
    static const double one_wide = 1;
    work.samples = 1;
    work.weight = beta;
    work.upstream = work.type == FLOAT64 ? static_cast<const void*>(&one_wide) : &one;
    latent_backward(work, reduction, threads);
}

int elbo_forward(Reconstruction reconstruction, Latent latent, double beta, Reduction reduction, const ELBO& out,
                 int threads) {
    const double nll_weight = reduction_weight(reduction, reconstruction.grid);
    const double kl_weight = reduction_weight(reduction, latent.grid);
    if (latent.grad_mu != nullptr) kl_gradients(latent, beta, reduction, threads);
    reconstruction.weight = nll_weight;
    advise(reconstruction.grad, reconstruction.grid.total, reconstruction.recon_type);
    if (reduction != EXAMPLE) {
        merge_rows(reconstruction);
        merge_rows(latent);
    }
    Sums nll(reconstruction.grid.rows), kl(latent.grid.rows);
    reconstruction.sums = nll.data();
    latent.sums = kl.data();
    const int flags = run_both({FASTVAE_PICK(latent_forward_span)(latent), &latent,
                                FASTVAE_PICK(reconstruction_span)(reconstruction), &reconstruction},
                               threads);
    const double nll_total = nll.finish(reduction, nll_weight, reconstruction.recon_type, out.nll);
    const double kl_total = kl.finish(reduction, kl_weight, latent.type, out.kl);
    if (reduction != EXAMPLE) Sums::put(out.type, out.loss, 0, nll_total + beta * kl_total);
    for (int64_t row = 0; reduction == EXAMPLE && row < reconstruction.grid.rows; ++row) {
        Sums::put(out.type, out.loss, row, nll.data()[row] + beta * kl.data()[row]);
    }
    return flags;
}

void rescale(Rescale work, const void* upstream, int upstream_type, int threads) {
    work.factor = upstream_type == FLOAT64 ? *static_cast<const double*>(upstream) : *static_cast<const float*>(upstream);
    if (work.factor == 1) return;
    const Rows grid{(work.total + ROW_BLOCK - 1) / ROW_BLOCK, ROW_BLOCK, work.total};
    run(FASTVAE_PICK(rescale_span), work, grid, 1, threads);
}

void elbo_backward(const Rescale& data, const void* upstream, int upstream_type, Latent latent, double beta,
                   Reduction reduction, int threads) {
    rescale(data, upstream, upstream_type, threads);
    latent.weight = beta;
    latent_backward(latent, reduction, threads);
}

void gaussian_pairs(const GaussianPairs& work, int threads) { FASTVAE_PICK(gaussian_pairs)(work, threads); }
void kernel_pairs(const KernelPairs& work, int threads) { FASTVAE_PICK(kernel_pairs)(work, threads); }
int64_t pairs_scratch(int type, int64_t rows, int64_t count, int64_t cols, int fields, bool backward) {
    return FASTVAE_PICK(pairs_scratch)(type, rows, count, cols, fields, backward);
}

}  // namespace fastvae
