// The Python module fastvae._C: integers in (addresses, strides, sizes, codes), work done, nothing of PyTorch anywhere.
// Checks of device, dtype, layout and size are Python's, before any address is taken (kernels/compiled/).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#ifdef FASTVAE_WITH_CUDA
#include "device/primitives.h"
#endif
#include "kernels.h"
#include "types.h"

namespace py = pybind11;

namespace fastvae {
namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

class ReleaseGIL {
  public:
    explicit ReleaseGIL(int64_t elements) {
        if (elements >= LONG) release_.emplace();
    }

  private:
    std::optional<py::gil_scoped_release> release_;
};

Rows rows_of(int64_t rows, int64_t cols) { return {rows, cols, rows * cols}; }

Reconstruction reconstruction_of(int likelihood, double parameter, int recon_type, int target_type, int64_t rows,
                                 int64_t cols, Address recon, int64_t recon_stride, Address target,
                                 int64_t target_stride, Address grad) {
    Reconstruction work{};
    work.likelihood = likelihood;
    work.parameter = parameter;
    work.recon_type = recon_type;
    work.target_type = target_type;
    work.grid = rows_of(rows, cols);
    work.recon = at(recon);
    work.recon_stride = recon_stride;
    work.target = at(target);
    work.target_stride = target_stride;
    work.grad = at(grad);
    return work;
}

Latent latent_of(int type, bool log_scale, double low, double high, double free_bits, int64_t rows, int64_t cols,
                 Address mu, int64_t mu_stride, Address scale, int64_t scale_stride) {
    Latent work{};
    work.type = type;
    work.log_scale = log_scale;
    work.clamp = log_scale && (low > -HUGE_VAL || high < HUGE_VAL);
    work.low = low;
    work.high = high;
    work.free_bits = free_bits;
    work.weight = 1;
    work.grid = rows_of(rows, cols);
    work.mu = at(mu);
    work.mu_stride = mu_stride;
    work.scale = at(scale);
    work.scale_stride = scale_stride;
    return work;
}

void set_prior(Latent& work, Address prior_mu, int64_t prior_mu_stride, Address prior_logvar,
               int64_t prior_logvar_stride) {
    work.prior_mu = at(prior_mu);
    work.prior_mu_stride = prior_mu_stride;
    work.prior_logvar = at(prior_logvar);
    work.prior_logvar_stride = prior_logvar_stride;
}

// Where the work runs: the last arguments of every function, a number of threads or a device, a stream and scratch memory.
int queue_of(int threads) { return threads; }
#ifdef FASTVAE_WITH_CUDA
device::Queue queue_of(int device, Address stream, Address scratch) { return {device, at(stream), at<double>(scratch)}; }
#endif

template <class... QUEUE>
void define(py::module_& module) {
    module.def("reconstruction_forward",
               [](int likelihood, double parameter, int recon_type, int target_type, int64_t rows, int64_t cols,
                  Address recon, int64_t recon_stride, Address target, int64_t target_stride, Address grad,
                  int reduction, Address loss, QUEUE... queue) {
                   const ReleaseGIL release(rows * cols);
                   return reconstruction_forward(
                       reconstruction_of(likelihood, parameter, recon_type, target_type, rows, cols, recon, recon_stride,
                                         target, target_stride, grad),
                       static_cast<Reduction>(reduction), at(loss), queue_of(queue...));
               });
    module.def("reconstruction_backward",
               [](int likelihood, double parameter, int recon_type, int target_type, int64_t rows, int64_t cols,
                  Address recon, int64_t recon_stride, Address target, int64_t target_stride, Address grad,
                  int reduction, Address upstream, int64_t upstream_stride, bool upstream_by_element, QUEUE... queue) {
                   Reconstruction work = reconstruction_of(likelihood, parameter, recon_type, target_type, rows, cols,
                                                           recon, recon_stride, target, target_stride, grad);
                   work.upstream = at(upstream);
                   work.upstream_stride = upstream_stride;
                   work.upstream_by_element = upstream_by_element;
                   const ReleaseGIL release(work.grid.total);
                   reconstruction_backward(work, static_cast<Reduction>(reduction), queue_of(queue...));
               });
    module.def("with_tensor",
               [](int likelihood, int recon_type, int target_type, int64_t rows, int64_t cols, int64_t total,
                  Address recon, int64_t recon_stride, Address target, int64_t target_stride, bool by_row, int64_t piece,
                  Address parameter, int64_t parameter_stride, Address zero_logits, int64_t zero_logits_stride,
                  Address upstream, int64_t upstream_stride, bool upstream_by_element, double weight, Address nll,
                  Address sums, Address grad, Address grad_parameter, Address parameter_sums, Address columns,
                  Address grad_zero_logits, Address library, Address flow, Address softmax, QUEUE... queue) {
                   Reconstruction of = reconstruction_of(likelihood, 0, recon_type, target_type, rows, cols, recon,
                                                         recon_stride, target, target_stride, grad);
                   of.grid.total = total;
                   of.weight = weight;
                   of.nll = at(nll);
                   of.sums = at<double>(sums);
                   of.upstream = at(upstream);
                   of.upstream_stride = upstream_stride;
                   of.upstream_by_element = upstream_by_element;
                   const ReleaseGIL release(total);
                   return with_tensor({of, by_row, piece, at(parameter), parameter_stride, at(grad_parameter),
                                       at<double>(parameter_sums), at<double>(columns), at(zero_logits),
                                       zero_logits_stride, at(grad_zero_logits), at(library), at<double>(flow),
                                       at<double>(softmax)},
                                      queue_of(queue...));
               });
    module.def("latent_forward",
               [](int type, bool log_scale, double low, double high, double free_bits, int64_t rows, int64_t cols,
                  Address mu, int64_t mu_stride, Address scale, int64_t scale_stride, Address prior_mu, int64_t prior_mu_stride, Address prior_logvar,
                  int64_t prior_logvar_stride, Address seed, int64_t samples, Address z, int reduction, Address kl,
                  QUEUE... queue) {
                   Latent work = latent_of(type, log_scale, low, high, free_bits, rows, cols, mu, mu_stride, scale,
                                           scale_stride);
                   set_prior(work, prior_mu, prior_mu_stride, prior_logvar, prior_logvar_stride);
                   work.seed = at<int64_t>(seed);
                   work.samples = samples;
                   work.z = at(z);
                   const ReleaseGIL release(work.grid.total * std::max<int64_t>(samples, 1));
                   latent_forward(work, static_cast<Reduction>(reduction), at(kl), queue_of(queue...));
               });
    module.def("latent_backward",
               [](int type, bool log_scale, double low, double high, double free_bits, int64_t rows, int64_t cols,
                  Address mu, int64_t mu_stride, Address scale, int64_t scale_stride, Address prior_mu, int64_t prior_mu_stride, Address prior_logvar,
                  int64_t prior_logvar_stride, Address seed, int64_t samples, Address grad_z, int reduction,
                  Address upstream, int64_t upstream_stride, bool upstream_by_element, Address grad_mu,
                  Address grad_scale, Address grad_prior_mu, Address grad_prior_logvar, QUEUE... queue) {
                   Latent work = latent_of(type, log_scale, low, high, free_bits, rows, cols, mu, mu_stride, scale,
                                           scale_stride);
                   set_prior(work, prior_mu, prior_mu_stride, prior_logvar, prior_logvar_stride);
                   work.seed = at<int64_t>(seed);
                   work.samples = samples;
                   work.grad_z = at(grad_z);
                   work.upstream = at(upstream);
                   work.upstream_stride = upstream_stride;
                   work.by_element = upstream_by_element;
                   work.grad_mu = at(grad_mu);
                   work.grad_scale = at(grad_scale);
                   work.grad_prior_mu = at(grad_prior_mu);
                   work.grad_prior_logvar = at(grad_prior_logvar);
                   const ReleaseGIL release(work.grid.total * std::max<int64_t>(samples, 1));
                   latent_backward(work, static_cast<Reduction>(reduction), queue_of(queue...));
               });
    module.def("elbo_forward",
               [](int likelihood, double parameter, int recon_type, int target_type, int64_t rows, int64_t cols,
                  Address recon, int64_t recon_stride, Address target, int64_t target_stride, Address grad, int type,
                  bool log_scale, double low, double high, double free_bits, int64_t latent_cols, Address mu,
                  int64_t mu_stride, Address scale, int64_t scale_stride, double beta, int reduction, int loss_type, Address loss, Address nll,
                  Address kl, Address grad_mu, Address grad_scale, QUEUE... queue) {
                   Latent latent = latent_of(type, log_scale, low, high, free_bits, rows, latent_cols, mu, mu_stride, scale,
                                             scale_stride);
                   latent.grad_mu = at(grad_mu);
                   latent.grad_scale = at(grad_scale);
                   const ReleaseGIL release(rows * cols);
                   return elbo_forward(
                       reconstruction_of(likelihood, parameter, recon_type, target_type, rows, cols, recon, recon_stride,
                                         target, target_stride, grad),
                       latent, beta, static_cast<Reduction>(reduction), ELBO{loss_type, at(loss), at(nll), at(kl)},
                       queue_of(queue...));
               });
    module.def("elbo_backward",
               [](int gradient_type, int64_t total, Address gradient, Address upstream, int upstream_type, int type,
                  bool log_scale, double low, double high, double free_bits, int64_t rows, int64_t cols, Address mu,
                  int64_t mu_stride, Address scale, int64_t scale_stride, double beta, int reduction,
                  Address latent_upstream, Address grad_mu, Address grad_scale, QUEUE... queue) {
                   Latent latent = latent_of(type, log_scale, low, high, free_bits, rows, cols, mu, mu_stride, scale,
                                             scale_stride);
                   latent.samples = 1;
                   latent.upstream = at(latent_upstream);
                   latent.grad_mu = at(grad_mu);
                   latent.grad_scale = at(grad_scale);
                   const ReleaseGIL release(total);
                   elbo_backward(Rescale{gradient_type, total, at(gradient), 0}, at(upstream), upstream_type, latent,
                                 beta, static_cast<Reduction>(reduction), queue_of(queue...));
               });
    module.def("rescale",
               [](int type, int64_t total, Address gradient, Address upstream, int upstream_type, QUEUE... queue) {
                   const ReleaseGIL release(total);
                   rescale(Rescale{type, total, at(gradient), 0}, at(upstream), upstream_type, queue_of(queue...));
               });
}

int queue_of(const Place& place, std::true_type) { return place.threads; }
#ifdef FASTVAE_WITH_CUDA
device::Queue queue_of(const Place& place, std::false_type) { return {place.device, place.stream, place.scratch}; }
#endif

// The kernels of a CPU, or of a device, for fastvae._autograd.
template <bool ON_HOST>
py::capsule kernels(int64_t partials) {
    using Host = std::bool_constant<ON_HOST>;
    static Kernels table{};
    table.partials = partials;
    table.on_host = ON_HOST;
    table.reconstruction_forward = [](const Reconstruction& work, Reduction reduction, void* loss, const Place& place) {
        if constexpr (ON_HOST) {
            return reconstruction_forward(work, reduction, loss, queue_of(place, Host{}));
        } else {
            reconstruction_forward(work, reduction, loss, queue_of(place, Host{}));
            return 0;
        }
    };
    table.latent_forward = [](const Latent& work, Reduction reduction, void* kl, const Place& place) {
        latent_forward(work, reduction, kl, queue_of(place, Host{}));
    };
    table.latent_backward = [](const Latent& work, Reduction reduction, const Place& place) {
        latent_backward(work, reduction, queue_of(place, Host{}));
    };
    table.elbo_forward = [](const Reconstruction& data, const Latent& latent, double beta, Reduction reduction,
                            const ELBO& out, const Place& place) {
        if constexpr (ON_HOST) {
            return elbo_forward(data, latent, beta, reduction, out, queue_of(place, Host{}));
        } else {
            elbo_forward(data, latent, beta, reduction, out, queue_of(place, Host{}));
            return 0;
        }
    };
    table.elbo_backward = [](const Rescale& data, const void* upstream, int upstream_type, const Latent& latent,
                             double beta, Reduction reduction, const Place& place) {
        elbo_backward(data, upstream, upstream_type, latent, beta, reduction, queue_of(place, Host{}));
    };
    table.rescale = [](const Rescale& work, const void* upstream, int upstream_type, const Place& place) {
        rescale(work, upstream, upstream_type, queue_of(place, Host{}));
    };
    return py::capsule(&table, KERNELS_CAPSULE);
}

// Sums over pairs, which have loops on a CPU only.
void define_pairs(py::module_& module) {
    module.def("pairs_scratch", &pairs_scratch);
    module.def("gaussian_pairs",
               [](int type, int64_t rows, int64_t count, int64_t cols, Address x, Address mu, Address logvar,
                  Address log_weights, double own, double beside, Address log_joint, Address log_product,
                  Address kept_joint, Address kept_each, Address grad_joint, Address grad_product, Address grad_x,
                  Address grad_mu, Address grad_logvar, Address grad_log_weights, Address scratch, int threads) {
                   const ReleaseGIL release(LONG);
                   gaussian_pairs({type, rows, count, cols, at(x), at(mu), at(logvar), at(log_weights), own, beside,
                                   at(log_joint), at(log_product), at<double>(kept_joint), at(kept_each), at(grad_joint),
                                   at(grad_product), at(grad_x), at(grad_mu), at(grad_logvar), at(grad_log_weights),
                                   at(scratch)},
                                  threads);
               });
    module.def("kernel_pairs",
               [](int type, int64_t rows, int64_t count, int64_t cols, Address x, Address y, int kernel,
                  const std::vector<double>& scales, Address sums, Address grad_x, Address grad_y, Address scratch,
                  int threads) {
                   const ReleaseGIL release(LONG);
                   kernel_pairs({type, rows, count, cols, at(x), at(y), kernel, scales.data(),
                                 static_cast<int64_t>(scales.size()), at<double>(sums), at(grad_x), at(grad_y),
                                 at(scratch)},
                                threads);
               });
}

}  // namespace
}  // namespace fastvae

namespace fastvae {
namespace {

RowTerm row_term(int type, double weight, Address upstream, Address values) {
    return {type, weight, at(upstream), at<double>(values)};
}

// Terms of which a CPU has kernels: each returns whether a target was seen outside its range.
void define_row_terms(py::module_& module) {
    module.def("logistic_mixture",
               [](int type, double weight, Address upstream, Address values, int target_type, int channels,
                  bool channels_last, int64_t components, int64_t examples, int64_t pixels, Address params, Address target,
                  Address grad, int threads) {
                   const Mixture work{row_term(type, weight, upstream, values), target_type, channels, channels_last,
                                      components, examples, pixels, at(params), at(target), at(grad)};
                   const ReleaseGIL release(work.total());
                   return mixture(work, threads);
               });
    module.def("logistic",
               [](int type, int target_type, int64_t rows, int64_t cols, int64_t total, Address mean, int64_t mean_stride,
                  Address target, int64_t target_stride, Address log_scale, int64_t log_scale_stride, double weight,
                  Address upstream, int64_t upstream_stride, bool upstream_by_element, Address nll, Address sums,
                  Address grad_mean, Address grad_log_scale, int threads) {
                   const Logistic work{type, target_type, {rows, cols, total}, at(mean), mean_stride, at(log_scale),
                                       log_scale_stride, at(target), target_stride, weight, at(upstream), upstream_stride,
                                       upstream_by_element, at(nll), at<double>(sums), at(grad_mean), at(grad_log_scale)};
                   const ReleaseGIL release(total);
                   return logistic(work, threads);
               });
    module.def("categorical",
               [](int type, double weight, Address upstream, Address values, int64_t rows, int64_t cols, Address logits,
                  Address target, Address logits_p, double unimix, double weight_p, Address grad, Address grad_p,
                  int threads) {
                   const Categorical work{row_term(type, weight, upstream, values), rows, cols, at(logits),
                                          at<int64_t>(target), at(logits_p), unimix, weight_p, at(grad), at(grad_p)};
                   const ReleaseGIL release(rows * cols);
                   return categorical(work, threads);
               });
    module.def("log_ratio",
               [](int type, double weight, Address upstream, Address values, bool alone, int64_t samples, int64_t examples, int64_t cols,
                  Address z, Address mu, Address logvar, Address prior_mu, Address prior_logvar, Address grad_z,
                  Address grad_mu, Address grad_logvar, Address grad_prior_mu, Address grad_prior_logvar, int threads) {
                   const LogRatio work{row_term(type, weight, upstream, values), alone, samples, examples, cols, at(z), at(mu),
                                       at(logvar), at(prior_mu), at(prior_logvar), at(grad_z), at(grad_mu), at(grad_logvar),
                                       at(grad_prior_mu), at(grad_prior_logvar)};
                   const ReleaseGIL release(samples * examples * cols);
                   log_ratio(work, threads);
               });
    module.def("sum_rows", [](Address values, int64_t rows, int64_t cols, Address sums) {
        sum_rows(at<double>(values), rows, cols, at<double>(sums));
    });
}

}  // namespace
}  // namespace fastvae

PYBIND11_MODULE(_C, module) {
    module.doc() = "Fused VAE kernels on raw addresses; see kernels/compiled/.";
    module.def("instruction_sets", &fastvae::instruction_sets);
    module.def("instructions", &fastvae::use_instructions, py::arg("use") = "");
    module.def("likelihood_names", &fastvae::likelihood_names, py::arg("with_tensor") = false);
    module.def("evaluate", [](const std::string& function, uintptr_t numbers, uintptr_t results, int64_t count) {
        if (!fastvae::evaluate(function, fastvae::at<float>(numbers), fastvae::at<float>(results), count)) {
            throw std::invalid_argument("no function " + function);
        }
    });
    module.attr("kernels") = fastvae::kernels<true>(0);
    fastvae::define<int>(module);
    fastvae::define_pairs(module);
    fastvae::define_row_terms(module);
#ifdef FASTVAE_WITH_CUDA
    py::module_ cuda = module.def_submodule("cuda");
    cuda.attr("PARTIALS") = fastvae::device::PARTIALS;
    cuda.attr("kernels") = fastvae::kernels<false>(fastvae::device::PARTIALS);
    cuda.def("versions", &fastvae::device::versions);
#ifdef FASTVAE_CUDA_ARCHS
    cuda.attr("ARCHS") = FASTVAE_CUDA_ARCHS;
#endif
    fastvae::define<int, uintptr_t, uintptr_t>(cuda);
#endif
}
