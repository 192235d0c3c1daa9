// What fastvae._C lends to fastvae._autograd: the primitives of an op's plain call, by address, for one kind of device.
// Both modules are built from one tree.
#pragma once

#include "primitives.h"

namespace fastvae {

constexpr char KERNELS_CAPSULE[] = "fastvae.kernels";
constexpr int64_t LONG = 1 << 14;  // elements from which other Python threads may run meanwhile

// Where the work runs: on so many threads of a CPU; or on a device, with its stream and scratch memory.
struct Place {
    int threads, device;
    void* stream;
    double* scratch;
};

struct Kernels {
    bool on_host;
    int64_t partials;  // numbers of scratch memory that a loss wants at least
    int (*reconstruction_forward)(const Reconstruction& work, Reduction reduction, void* loss, const Place& place);
    void (*latent_forward)(const Latent& work, Reduction reduction, void* kl, const Place& place);
    void (*latent_backward)(const Latent& work, Reduction reduction, const Place& place);
    int (*elbo_forward)(const Reconstruction& data, const Latent& latent, double beta, Reduction reduction,
                        const ELBO& out, const Place& place);
    void (*elbo_backward)(const Rescale& data, const void* upstream, int upstream_type, const Latent& latent,
                          double beta, Reduction reduction, const Place& place);
    void (*rescale)(const Rescale& work, const void* upstream, int upstream_type, const Place& place);
};

}  // namespace fastvae
