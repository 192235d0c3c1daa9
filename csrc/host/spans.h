// The host loops by instruction set, and how they are run. A span function works on rows first … last and returns whether
// it saw a value outside its domain. What it writes for a row does not depend on the span.
#pragma once

#include <string>
#include <vector>

#include "../pairs.h"
#include "../work.h"

namespace fastvae {

template <class WORK>
using Span = int (*)(const WORK& work, int64_t first, int64_t last);

#define FASTVAE_HOST_KERNELS                                         \
    Span<Reconstruction> reconstruction_span(const Reconstruction&); \
    Span<WithTensor> with_tensor_span(const WithTensor&);            \
    Span<Latent> latent_forward_span(const Latent&);                 \
    Span<Latent> latent_backward_span(const Latent&);                \
    Span<Rescale> rescale_span(const Rescale&);                      \
    void gaussian_pairs(const GaussianPairs& work, int threads);     \
    void kernel_pairs(const KernelPairs& work, int threads);         \
    int64_t pairs_scratch(int type, int64_t rows, int64_t count, int64_t cols, int fields, bool backward); \
    Span<Mixture> mixture_span(const Mixture&);                      \
    Span<Logistic> logistic_span(const Logistic&);                   \
    Span<Categorical> categorical_span(const Categorical&);          \
    Span<LogRatio> log_ratio_span(const LogRatio&);                  \
    std::vector<std::string> likelihood_names(bool with_tensor);     \
    bool evaluate(const std::string& name, const float* numbers, float* results, int64_t count);

namespace baseline {
FASTVAE_HOST_KERNELS
}
#ifdef FASTVAE_X86
namespace avx2 {
FASTVAE_HOST_KERNELS
}
namespace avx512 {
FASTVAE_HOST_KERNELS
}
#endif

}  // namespace fastvae
