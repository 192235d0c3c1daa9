// The primitives on a GPU: as primitives.h, launched on a stream. Nothing is allocated, nothing waited for, so that a graph
// can capture it. Errors of a launch are exceptions.
#pragma once

#include <utility>

#include "../primitives.h"

namespace fastvae {
namespace device {

// Where to run. `scratch` holds max(rows, PARTIALS) numbers, twice as many for elbo_forward.
struct Queue {
    int device;
    void* stream;
    double* scratch;
};

constexpr int64_t PARTIALS = 2048;  // sums of a total are first added up to as many, or fewer

std::pair<int, int> versions();  // of CUDA: what the driver knows, what this was built with; 13000 is 13.0
void reconstruction_forward(Reconstruction work, Reduction reduction, void* loss, const Queue& queue);
void reconstruction_backward(Reconstruction work, Reduction reduction, const Queue& queue);
int64_t with_tensor(const WithTensor& work, const Queue& queue);  // the sums it leaves for each row
void latent_forward(Latent work, Reduction reduction, void* kl, const Queue& queue);
void latent_backward(Latent work, Reduction reduction, const Queue& queue);
void elbo_forward(Reconstruction reconstruction, Latent latent, double beta, Reduction reduction, const ELBO& out,
                  const Queue& queue);
void rescale(const Rescale& work, const void* upstream, int upstream_type, const Queue& queue);
void elbo_backward(const Rescale& data, const void* upstream, int upstream_type, Latent latent, double beta,
                   Reduction reduction, const Queue& queue);

}  // namespace device
}  // namespace fastvae
