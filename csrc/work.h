// What Python asks for, in the words of kernels/__init__.py: a description of tensors that host and device loops share.
// A tensor is an address and a row stride in elements; outputs are dense.
#pragma once

#include <cstdint>

namespace fastvae {

// Rows of `cols` elements, the last one short where `total` runs out.
struct Rows {
    int64_t rows, cols, total;
};

struct Reconstruction {
    int likelihood, recon_type, target_type;
    Rows grid;
    const void* recon;
    int64_t recon_stride;
    const void* target;
    int64_t target_stride;
    double parameter;
    double weight;  // of a row's gradient
    void* grad;     // forward: null where no gradient is wanted
    double* sums;   // Σ nll of each row; null: elementwise, or a backward
    void* nll;      // elementwise nll
    // Backward: one number a row (stride 1), one for all (0), in the type of the arithmetic; or one an element, in that
    // of recon.
    const void* upstream;
    int64_t upstream_stride;
    bool upstream_by_element;
};

// A term whose parameter is a tensor, in the type of the arithmetic: one number a row (or for all: stride 0) if by_row,
// else one an element. What has an address is written: nll or sums, grad, and one of the parameter's gradients, which is
// one sum a row, or by element, or one row of sums for each `piece` rows. Every gradient is times weight and upstream.
// With zero_logits, one an element in the type of the arithmetic, a term of counts is zero-inflated. With library, one a row
// in that type, recon are scores, y is library · softmax(scores) over the row, the gradient is that in the scores, and flow
// is Σ y·∂nll/∂y of each row. A device keeps the shift of each row in `softmax`, then the factors: y is factor·e^(score − shift).
struct WithTensor {
    Reconstruction of;
    bool by_row;
    int64_t piece;
    const void* parameter;
    int64_t parameter_stride;
    void* grad_parameter;
    double *parameter_sums, *columns;
    const void* zero_logits;
    int64_t zero_logits_stride;
    void* grad_zero_logits;
    const void* library;
    double *flow, *softmax;
};

struct Latent {
    int type;
    bool log_scale;
    bool clamp;  // logvar is clamped to [low, high] before use
    double low, high;
    Rows grid;
    const void* mu;
    int64_t mu_stride;
    const void* scale;
    int64_t scale_stride;
    const void* prior_mu;  // null: N(0, I)
    int64_t prior_mu_stride;
    const void* prior_logvar;
    int64_t prior_logvar_stride;
    const int64_t* seed;
    int64_t samples;  // at least 1
    double free_bits;
    bool by_element;  // forward: kl is elementwise; backward: so is upstream
    void* z;          // null: not wanted
    void* kl;         // by_element only
    double* sums;     // Σ kl of each row
    // Backward
    const void* grad_z;    // null: no gradient of z came in
    const void* upstream;  // of kl, as above; null: none came in
    int64_t upstream_stride;
    double weight;
    void* grad_mu;
    void* grad_scale;
    void* grad_prior_mu;
    void* grad_prior_logvar;
};

constexpr int64_t MIXTURE_TILE = 32;  // pixels that are worked on at once: a multiple of every register's lanes

// Terms that are one number for a row of dense tensors, `values`; null in a backward. Gradients are times weight and, if there
// is one, upstream: one number a row, in the type of the arithmetic.
struct RowTerm {
    int type;
    double weight;
    const void* upstream;
    double* values;
};

// Rows are pixels: `pixels` of each example, of 10·components parameters (3·components for one channel). channels_last: those
// of a pixel lie together, else those of a channel.
struct Mixture {
    RowTerm of;
    int target_type, channels;  // of the target: uint8, or the type of the arithmetic
    bool channels_last;
    int64_t components, examples, pixels;
    const void *params, *target;
    void* grad;

    int64_t tiles() const { return (pixels + MIXTURE_TILE - 1) / MIXTURE_TILE; }
    int64_t total() const { return examples * pixels * components * (channels == 3 ? 10 : 3); }
};

// Rows of logits; of one target each, or of two distributions.
struct Categorical {
    RowTerm of;
    int64_t rows, cols;
    const void* logits;
    const int64_t* target;
    const void* logits_p;  // null: the negative log-likelihood of the target
    double unimix, weight_p;  // the latter, and weight, are those of the gradients in p and q
    void *grad, *grad_p;
};

// log q − log p of z, or log q alone: rows are `samples` of each example, one after the other.
struct LogRatio {
    RowTerm of;
    bool alone;
    int64_t samples, examples, cols;
    const void *z, *mu, *logvar, *prior_mu, *prior_logvar;  // the last two null: N(0, I)
    void *grad_z, *grad_mu, *grad_logvar, *grad_prior_mu, *grad_prior_logvar;  // all or none
};

// One discretised logistic an element; what has an address is written: nll by element or the sum of each row. Upstream as in
// Reconstruction.
struct Logistic {
    int type, target_type;
    Rows grid;
    const void* mean;
    int64_t mean_stride;
    const void* log_scale;
    int64_t log_scale_stride;
    const void* target;
    int64_t target_stride;
    double weight;
    const void* upstream;
    int64_t upstream_stride;
    bool upstream_by_element;
    void* nll;
    double* sums;
    void *grad_mean, *grad_log_scale;
};

constexpr int64_t ROW_BLOCK = 4096;  // elements of a row where tensors are dense: a multiple of every tile

struct Rescale {
    int type;
    int64_t total;
    void* gradient;
    double factor;
};

}  // namespace fastvae
