// Which tensors are plain, and what the kernels are told of them: the words of work.h.
#pragma once

#include <ATen/Parallel.h>

#include <limits>

#include "../types.h"
#include "python.h"

namespace fastvae {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

// A tracer, a dispatch mode or a transform of functions wants to see what is done.
constexpr DispatchKeySet LISTENERS({DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::PythonDispatcher,
                                    DispatchKey::PreDispatch, DispatchKey::FuncTorchDynamicLayerFrontMode,
                                    DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::FuncTorchVmapMode,
                                    DispatchKey::VmapMode, DispatchKey::Functionalize, DispatchKey::Tracer});
// A tensor is more than its elements: wrapped, batched, to be negated, nested.
constexpr DispatchKeySet WRAPPED({DispatchKey::Python, DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper,
                                  DispatchKey::Batched, DispatchKey::BatchedNestedTensor, DispatchKey::Functionalize,
                                  DispatchKey::Negative, DispatchKey::Conjugate, DispatchKey::ZeroTensor,
                                  DispatchKey::NestedTensor});

bool listened_to() { return c10::impl::tls_local_dispatch_key_set().included_.has_any(LISTENERS); }

int code_of(c10::ScalarType type) {
    switch (type) {
        case c10::ScalarType::Double: return FLOAT64;
        case c10::ScalarType::Float: return FLOAT32;
        case c10::ScalarType::BFloat16: return BFLOAT16;
        case c10::ScalarType::Half: return FLOAT16;
        case c10::ScalarType::Byte: return UINT8;
        default: return -1;
    }
}

// What arithmetic on `type` is in, and what a reduced loss is.
c10::ScalarType accumulator(c10::ScalarType type) {
    return type == c10::ScalarType::Double ? type : c10::ScalarType::Float;
}

bool plain(const Tensor& tensor, c10::Device device) {
    return tensor.layout() == c10::kStrided && tensor.device() == device && !tensor.key_set().has_any(WRAPPED) &&
           !tensor._fw_grad(0).defined();
}

int64_t cols_of(const Tensor& tensor) { return tensor.numel() / tensor.size(0); }

// Where the examples lie, and from one to the next; false where the elements of one are not contiguous and in order.
bool rows_of(const Tensor& tensor, const void*& first, int64_t& stride) {
    first = tensor.const_data_ptr();
    stride = cols_of(tensor);
    if (tensor.is_contiguous()) return true;
    int64_t dense = 1;
    for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
        if (tensor.stride(dim) != dense && tensor.size(dim) != 1) return false;
        dense *= tensor.size(dim);
    }
    stride = tensor.stride(0);
    return true;
}

struct Options {
    int likelihood = 0;
    double parameter = 0;
    bool log_scale = false;
    double low = 0, high = 0, beta = 1, free_bits = 0;
    int64_t samples = 0;
    Reduction reduction = NO_LOSS;
    bool with_gradient = false;

    bool total() const { return reduction >= SUM; }
};

// Where work on tensors like this one runs; holds its scratch memory, for `losses` reduced ones.
class Site {
  public:
    Site(const Kernels& kernels, const Tensor& tensor, int losses) {
        if (kernels.on_host) {
            place.threads = at::get_num_threads();
            return;
        }
        if (tensor.is_cuda()) {  // else it is emulated
            place.device = tensor.get_device();
            place.stream = stream(place.device);
        }
        if (losses != 0) {
            const int64_t count = losses * std::max(tensor.size(0), kernels.partials);
            scratch_ = at::empty({count}, tensor.options().dtype(c10::kDouble));
            place.scratch = scratch_.mutable_data_ptr<double>();
        }
    }

    Place place{};

  private:
    static void* stream(int device) {
        const GIL gil;
        THPObjectPtr number(PyLong_FromLong(device));
        THPObjectPtr handle(PyObject_CallOneArg(stream_of, number.get()));
        void* found = handle ? PyLong_AsVoidPtr(handle.get()) : nullptr;
        if (PyErr_Occurred() != nullptr) throw_python_error();
        return found;
    }

    Tensor scratch_;
};

Tensor dense_like(const Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); }

Tensor loss_like(const Tensor& tensor, Reduction reduction) {
    if (reduction == NONE) return dense_like(tensor);
    const auto options = tensor.options().dtype(accumulator(tensor.scalar_type()));
    return reduction == EXAMPLE ? at::empty({tensor.size(0)}, options) : at::empty({}, options);
}

// False: rows with gaps inside.
bool describe(Reconstruction& work, const Options& options, const Tensor& recon, const Tensor& target) {
    work.likelihood = options.likelihood;
    work.parameter = options.parameter;
    work.recon_type = code_of(recon.scalar_type());
    work.target_type = code_of(target.scalar_type());
    work.grid = {recon.size(0), cols_of(recon), recon.numel()};
    return rows_of(recon, work.recon, work.recon_stride) && rows_of(target, work.target, work.target_stride);
}

bool describe(Latent& work, const Options& options, const Tensor& mu, const Tensor& scale) {
    constexpr double infinite = std::numeric_limits<double>::infinity();
    work.type = code_of(mu.scalar_type());
    work.log_scale = options.log_scale;
    work.clamp = options.log_scale && (options.low > -infinite || options.high < infinite);
    work.low = options.low;
    work.high = options.high;
    work.free_bits = options.free_bits;
    work.samples = std::max<int64_t>(options.samples, 1);
    work.weight = 1;
    work.grid = {mu.size(0), cols_of(mu), mu.numel()};
    return rows_of(mu, work.mu, work.mu_stride) && rows_of(scale, work.scale, work.scale_stride);
}

bool describe_prior(Latent& work, const Tensor& mu, const Tensor& logvar) {
    return rows_of(mu, work.prior_mu, work.prior_mu_stride) && rows_of(logvar, work.prior_logvar, work.prior_logvar_stride);
}

}  // namespace
}  // namespace fastvae
