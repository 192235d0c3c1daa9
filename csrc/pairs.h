// Sums over pairs, as Python asks for them: every row of x against every row of y, never stored. All tensors are dense
// and of the type of the arithmetic, float or double; x is [rows, cols], what it meets [count, cols].
#pragma once

#include <cstdint>

namespace fastvae {

// Densities of a mixture of `count` diagonal Gaussians at each row: log Σ_j w_ij ∏_d N(x_id; mu_jd, σ_jd²), and the same
// dimension by dimension, Σ_d log Σ_j w_ij N(x_id; mu_jd, σ_jd²). log w_ij is log_weights[j] (null: 0), plus `own` at j = i
// and `beside` at j = i + 1, cyclic. What has an address is computed: forward the two densities, backward the gradients.
// `kept`, written by the forward, is for the backward alone: in units of its own, NaN where a density is 0.
struct GaussianPairs {
    int type;
    int64_t rows, count, cols;
    const void *x, *mu, *logvar, *log_weights;
    double own, beside;
    void *log_joint, *log_product;
    double* kept_joint;  // [rows]: rounded to float, -1000 nats would put all shares of a row off
    void* kept_each;     // [rows, cols]
    const void *grad_joint, *grad_product;
    void *grad_x, *grad_mu, *grad_logvar, *grad_log_weights;
    void* scratch;  // gaussian_pairs_scratch(…) bytes
};

enum Kernel : int { RBF, IMQ };

// Σ_j k(‖x_i − y_j‖²) of each row in `sums`, of which only the total counts: where y is x, a row has what is due to earlier
// ones. Or, where `sums` is null, the gradients of that total. k is a sum over `scales` C of e^(−q/C) or C/(C + q). grad_y
// may be null.
struct KernelPairs {
    int type;
    int64_t rows, count, cols;
    const void *x, *y;
    int kernel;
    const double* scales;
    int64_t scale_count;
    double* sums;
    void *grad_x, *grad_y;
    void* scratch;
};

}  // namespace fastvae
