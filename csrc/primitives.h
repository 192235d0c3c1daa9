// The primitives of kernels/__init__.py as the bindings call them: on a CPU here, on a GPU in device/primitives.h.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "pairs.h"
#include "work.h"

namespace fastvae {

enum Reduction : int { NO_LOSS = -1, NONE, EXAMPLE, SUM, MEAN, BATCHMEAN };

// What a sum over the grid is multiplied by; NaN for a mean over nothing, as in torch.
inline double reduction_weight(Reduction reduction, const Rows& grid) {
    if (reduction != MEAN && reduction != BATCHMEAN) return 1;
    const int64_t count = reduction == MEAN ? grid.total : grid.rows;
    return count == 0 ? std::nan("") : 1.0 / static_cast<double>(count);
}

// Rows of `block` elements where every tensor is dense: for work that does not ask what example an element belongs to.
inline void merge_rows(Reconstruction& work, int64_t block = ROW_BLOCK) {
    const int64_t cols = work.grid.cols;
    const bool by_element = work.upstream_by_element;
    if (work.grid.rows != 1 && (work.recon_stride != cols || work.target_stride != cols ||
                                (by_element && work.upstream_stride != cols))) {
        return;
    }
    work.grid = {(work.grid.total + block - 1) / block, block, work.grid.total};
    work.recon_stride = work.target_stride = block;
    if (by_element) work.upstream_stride = block;
}

inline void merge_rows(Latent& work, int64_t block = ROW_BLOCK) {
    const int64_t cols = work.grid.cols;
    const bool prior = work.prior_mu != nullptr, by_element = work.by_element && work.upstream != nullptr;
    if (work.grid.rows != 1 &&
        (work.mu_stride != cols || work.scale_stride != cols ||
         (prior && (work.prior_mu_stride != cols || work.prior_logvar_stride != cols)) ||
         (by_element && work.upstream_stride != cols))) {
        return;
    }
    work.grid = {(work.grid.total + block - 1) / block, block, work.grid.total};
    work.mu_stride = work.scale_stride = work.prior_mu_stride = work.prior_logvar_stride = block;
    if (by_element) work.upstream_stride = block;
}

// Where the three losses go, and the type (FLOAT32 or FLOAT64) of their sum.
struct ELBO {
    int type;
    void *loss, *nll, *kl;
};

// The instruction sets there are host loops for and this processor has, the narrowest first.
std::vector<std::string> instruction_sets();
// Which host loops run: the widest unless told otherwise. A name chooses, so that a test can see each; "" only asks.
std::string use_instructions(const std::string& name);

// The likelihoods there are functions for, in the order of their codes; or those whose parameter may be a tensor.
std::vector<std::string> likelihood_names(bool with_tensor);

// results[k] = function(numbers[k]), by the loops in use; false if there is no such function. For tests.
bool evaluate(const std::string& function, const float* numbers, float* results, int64_t count);

// Each returns, where it says int, whether a value was seen outside its domain.
int reconstruction_forward(Reconstruction work, Reduction reduction, void* loss, int threads);
void reconstruction_backward(Reconstruction work, Reduction reduction, int threads);
int with_tensor(const WithTensor& work, int threads);
int mixture(const Mixture& work, int threads);
int logistic(const Logistic& work, int threads);
int categorical(const Categorical& work, int threads);
void log_ratio(const LogRatio& work, int threads);
// Σ of each row, added in pairs.
void sum_rows(const double* values, int64_t rows, int64_t cols, double* sums);
void latent_forward(Latent work, Reduction reduction, void* kl, int threads);
void latent_backward(Latent work, Reduction reduction, int threads);
// Of a total also the gradients of β·KL, where the latent has an address for them.
int elbo_forward(Reconstruction reconstruction, Latent latent, double beta, Reduction reduction, const ELBO& out,
                 int threads);
void rescale(Rescale work, const void* upstream, int upstream_type, int threads);
// A gradient times what came from above, and the gradients of β·KL.
void elbo_backward(const Rescale& data, const void* upstream, int upstream_type, Latent latent, double beta,
                   Reduction reduction, int threads);
void gaussian_pairs(const GaussianPairs& work, int threads);
void kernel_pairs(const KernelPairs& work, int threads);
// Bytes that either of them wants: `fields` is 3 with a product over dimensions, 2 without, 1 for a kernel.
int64_t pairs_scratch(int type, int64_t rows, int64_t count, int64_t cols, int fields, bool backward);

}  // namespace fastvae
