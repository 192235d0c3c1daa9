// A call of an op, done where it is plain.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

#include "node.h"

namespace fastvae {
namespace {

// A call that may be plain.
struct Call {
    Op op;
    const Kernels& kernels;
    Options options;
    variable_list tensors, losses, kept;

    const Tensor& first() const { return tensors[0]; }

    // Whether it was, and nothing was seen outside its domain.
    bool run() {
        for (const Tensor& tensor : tensors) {
            if (tensor.defined() && !plain(tensor, first().device())) return false;
        }
        const bool host = first().is_cpu();
        if (kernels.on_host ? !host : !(host || first().is_cuda())) return false;
        if (first().dim() == 0 || first().numel() == 0) return false;
        return op == RECONSTRUCTION ? reconstruction() : op == LATENT ? latent() : elbo();
    }

  private:
    bool reconstruction() {
        Reconstruction work{};
        if (tensors[2].defined() || tensors[3].defined() || tensors[4].defined() || !data_of(work)) return false;
        losses.push_back(loss_like(first(), options.reduction));
        const Site site(kernels, first(), options.reduction != NONE);
        return 0 == unlocked(first().numel(), [&] {
                   return kernels.reconstruction_forward(work, options.reduction, losses[0].mutable_data_ptr(), site.place);
               });
    }

    bool latent() {
        const Tensor &mu = first(), &seed = tensors[2];
        Latent work{};
        if (!latent_of(work, mu, tensors[1])) return false;
        if (tensors[3].defined() &&
            !(fits(tensors[3], mu) && fits(tensors[4], mu) && describe_prior(work, tensors[3], tensors[4]))) {
            return false;
        }
        if (seed.defined()) {
            if (seed.scalar_type() != c10::kLong || seed.numel() != 1) return false;
            work.seed = seed.const_data_ptr<int64_t>();
            std::vector<int64_t> sizes(mu.sizes().begin(), mu.sizes().end());
            if (options.samples != 0) sizes.insert(sizes.begin(), options.samples);
            losses.push_back(at::empty(sizes, mu.options()));
            work.z = losses[0].mutable_data_ptr();
        }
        const bool kl = options.reduction != NO_LOSS;
        if (kl) losses.push_back(loss_like(mu, options.reduction));
        const Site site(kernels, mu, kl && options.reduction != NONE);
        unlocked(mu.numel() * work.samples, [&] {
            kernels.latent_forward(work, options.reduction, kl ? losses.back().mutable_data_ptr() : nullptr, site.place);
        });
        return true;
    }

    bool elbo() {
        const Tensor &mu = tensors[2], &scale = tensors[3];
        Reconstruction data{};
        Latent work{};
        if (!latent_of(work, mu, scale) || mu.size(0) != first().size(0) || !data_of(data)) return false;
        if (options.with_gradient && kernels.on_host && options.total() && mu.scalar_type() != c10::kHalf) {
            kept.push_back(dense_like(mu));
            kept.push_back(dense_like(scale));
            work.grad_mu = kept[1].mutable_data_ptr();
            work.grad_scale = kept[2].mutable_data_ptr();
        }
        losses = {loss_like(first(), options.reduction), loss_like(first(), options.reduction),
                  loss_like(mu, options.reduction)};
        const ELBO out{code_of(losses[0].scalar_type()), losses[0].mutable_data_ptr(), losses[1].mutable_data_ptr(),
                       losses[2].mutable_data_ptr()};
        const Site site(kernels, first(), 2);
        return 0 == unlocked(first().numel(), [&] {
                   return kernels.elbo_forward(data, work, options.beta, options.reduction, out, site.place);
               });
    }

    static bool fits(const Tensor& tensor, const Tensor& like) {
        return tensor.defined() && tensor.sizes() == like.sizes() && tensor.scalar_type() == like.scalar_type();
    }

    // Of recon and target; with its gradient, the first of those that are kept.
    bool data_of(Reconstruction& work) {
        const Tensor &recon = first(), &target = tensors[1];
        const auto type = recon.scalar_type();
        if (options.likelihood < 0 || !at::isFloatingType(type) || code_of(type) < 0 || code_of(target.scalar_type()) < 0 ||
            target.sizes() != recon.sizes()) {
            return false;
        }
        // beside float64 a device knows float64 only
        if (!kernels.on_host && type == c10::kDouble && target.scalar_type() != type) return false;
        if (!describe(work, options, recon, target)) return false;
        if (options.with_gradient) {
            kept.insert(kept.begin(), dense_like(recon));
            work.grad = kept[0].mutable_data_ptr();
        }
        return true;
    }

    bool latent_of(Latent& work, const Tensor& mu, const Tensor& scale) const {
        return mu.dim() != 0 && mu.numel() != 0 && at::isFloatingType(mu.scalar_type()) && code_of(mu.scalar_type()) >= 0 &&
               fits(scale, mu) && describe(work, options, mu, scale);
    }
};

void record(const Call& call, PyObject* context, PyObject* given) {
    if (!c10::GradMode::is_enabled()) return;
    bool wanted = false;
    for (const Tensor& tensor : call.tensors) wanted = wanted || (tensor.defined() && tensor.requires_grad());
    if (!wanted) return;
    OpBackward* node = nullptr;
    using Pointer = decltype(torch::autograd::Edge::function);
    const auto held = new_node<Pointer>(static_cast<Pointer*>(nullptr), node);
    node->op = call.op;
    node->kernels = &call.kernels;
    node->options = call.options;
    node->device = call.first().device();
    node->kept = call.kept;
    node->asked = std::make_shared<Asked>(context, given);
    for (const Tensor& tensor : call.tensors) node->saved.emplace_back(tensor, /*is_output=*/false);
    node->set_next_edges(torch::autograd::collect_next_edges(call.tensors));
    for (const Tensor& loss : call.losses) torch::autograd::set_history(loss, held);
}

}  // namespace
}  // namespace fastvae
