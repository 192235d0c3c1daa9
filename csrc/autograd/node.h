// An op's node in the graph of autograd.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>

#include "plain.h"

namespace fastvae {
namespace {

enum Op : int { RECONSTRUCTION, LATENT, ELBO_LOSS };  // `code` in fastvae/autograd.py
constexpr const char* NAMES[] = {"reconstruction_forwardBackward", "latent_forwardBackward", "elbo_forwardBackward"};

// One number for the first output, and nothing for the others.
bool one_number(const variable_list& grads, c10::Device device) {
    const Tensor& first = grads[0];
    for (size_t k = 1; k < grads.size(); ++k) {
        if (grads[k].defined()) return false;
    }
    return first.defined() && first.dim() == 0 && plain(first, device) &&
           (first.scalar_type() == c10::kFloat || first.scalar_type() == c10::kDouble);
}

// The gradients that the forward wrote are handed over to the first backward; whatever else is asked for, Python answers.
class OpBackward : public torch::autograd::Node {
  public:
    std::string name() const override { return NAMES[op]; }

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        variable_list gradients(saved.size());
        if (!c10::GradMode::is_enabled() && !listened_to()) {
            const bool done = op == RECONSTRUCTION ? of_reconstruction(grads, gradients)
                              : op == LATENT       ? of_latent(grads, gradients)
                                                   : of_elbo(grads, gradients);
            if (done) return gradients;
        }
        return in_python(*asked, needed(), inputs(), kept, grads);
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto& variable : saved) variable.reset_data();
        kept.clear();
    }

    // Under compiled autograd: a call of Python's backward is put into the graph, which asks for it each time.
    void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
        args.collect(std::string(NAMES[op]));
        args.collect(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(kernels)));
        for (const double number : {options.parameter, options.low, options.high, options.beta, options.free_bits}) {
            args.collect(number);
        }
        for (const int64_t number : {int64_t{options.likelihood}, int64_t{options.log_scale}, options.samples,
                                     int64_t{options.reduction}, int64_t{options.with_gradient}}) {
            args.collect(static_cast<uint64_t>(number));
        }
        for (const bool flag : needed()) args.collect(static_cast<uint64_t>(flag));
        args.collect(saved, /*is_output=*/false);
    }

    variable_list apply_with_saved(const variable_list& grads,
                                   torch::dynamo::autograd::SwapSavedVariables& swapped) override {
        using namespace torch::dynamo::autograd;
        swapped.before(saved);
        std::vector<at::IValue> tensors;
        std::vector<at::TypePtr> schema;
        std::vector<bool> there;
        for (const Tensor& tensor : inputs()) {
            there.push_back(tensor.defined());
            if (!tensor.defined()) continue;
            tensors.emplace_back(tensor);
            schema.push_back(at::TensorType::get());
        }
        const auto later = [asked = asked, needed = needed(), there](const variable_list& grads,
                                                                     const std::vector<at::IValue>& tensors) {
            variable_list inputs(there.size()), none;
            size_t next = 0;
            for (size_t k = 0; k < there.size(); ++k) {
                if (there[k]) inputs[k] = tensors[next++].toTensor();
            }
            return in_python(*asked, needed, inputs, none, grads);
        };
        const auto& compiler = getPyCompilerInterface();
        PyObject* graph = swapped.get_py_compiler();
        const auto bound = compiler->bind_function(graph, name(), later, schema, /*is_custom_function=*/true,
                                                   /*is_traceable=*/false);
        auto metadata = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            get_input_metadata(next_edges()));
        auto gradients = compiler->call_function(graph, "apply_functional", bound, grads, tensors, metadata);
        swapped.after(saved);
        return gradients;
    }

    Op op{};
    const Kernels* kernels = nullptr;
    Options options;
    c10::Device device{c10::kCPU};
    std::vector<torch::autograd::SavedVariable> saved;
    variable_list kept;
    std::shared_ptr<Asked> asked;

  private:
    bool of_reconstruction(const variable_list& grads, variable_list& gradients) {
        if (kept.size() != 1 || task_should_compute_output(1) || !one_number(grads, device)) return false;
        hand_over(grads[0], {0}, gradients);
        return true;
    }

    bool of_elbo(const variable_list& grads, variable_list& gradients) {
        if (kept.empty() || task_should_compute_output(1) || !one_number(grads, device)) return false;
        if (kept.size() == 3) {
            hand_over(grads[0], {0, 2, 3}, gradients);
            return true;
        }
        const Tensor &upstream = grads[0], mu = saved[2].unpack(), scale = saved[3].unpack();
        Latent work{};
        if (upstream.scalar_type() != accumulator(mu.scalar_type()) || !describe(work, options, mu, scale)) return false;
        const Tensor data = std::move(kept[0]), of_mu = dense_like(mu), of_scale = dense_like(scale);
        kept.clear();
        work.upstream = upstream.const_data_ptr();
        work.grad_mu = of_mu.mutable_data_ptr();
        work.grad_scale = of_scale.mutable_data_ptr();
        kernels->elbo_backward(rescaled(data), upstream.const_data_ptr(), code_of(upstream.scalar_type()), work,
                               options.beta, options.reduction, Site(*kernels, mu, 0).place);
        gradients[0] = data;
        if (task_should_compute_output(2)) gradients[2] = of_mu;
        if (task_should_compute_output(3)) gradients[3] = of_scale;
        return true;
    }

    // Noise is drawn again, never kept.
    bool of_latent(const variable_list& grads, variable_list& gradients) {
        if (options.reduction == NONE || options.reduction == EXAMPLE) return false;
        const Tensor mu = saved[0].unpack(), scale = saved[1].unpack(), seed = saved[2].unpack();
        const Tensor priors[] = {saved[3].unpack(), saved[4].unpack()};
        Tensor grad_z = seed.defined() ? grads[0] : Tensor();
        const Tensor grad_kl = options.reduction == NO_LOSS ? Tensor() : grads.back();
        if (!grad_z.defined() && !grad_kl.defined()) return true;
        if (grad_z.defined()) {
            if (!plain(grad_z, device) || grad_z.scalar_type() != mu.scalar_type()) return false;
            grad_z = grad_z.contiguous();
        }
        if (grad_kl.defined() && !(plain(grad_kl, device) && grad_kl.dim() == 0 &&
                                   grad_kl.scalar_type() == accumulator(mu.scalar_type()))) {
            return false;
        }
        Latent work{};
        const bool prior = priors[0].defined();
        if ((prior && !grad_kl.defined()) || !describe(work, options, mu, scale)) return false;
        if (prior && !describe_prior(work, priors[0], priors[1])) return false;
        const Tensor made[] = {dense_like(mu), dense_like(scale), prior ? dense_like(priors[0]) : Tensor(),
                               prior ? dense_like(priors[1]) : Tensor()};
        if (seed.defined()) work.seed = seed.const_data_ptr<int64_t>();
        if (grad_z.defined()) work.grad_z = grad_z.const_data_ptr();
        if (grad_kl.defined()) work.upstream = grad_kl.const_data_ptr();
        work.grad_mu = made[0].mutable_data_ptr();
        work.grad_scale = made[1].mutable_data_ptr();
        if (prior) {
            work.grad_prior_mu = made[2].mutable_data_ptr();
            work.grad_prior_logvar = made[3].mutable_data_ptr();
        }
        kernels->latent_backward(work, grad_kl.defined() ? options.reduction : NO_LOSS, Site(*kernels, mu, 0).place);
        constexpr size_t PLACES[] = {0, 1, 3, 4};
        for (size_t k = 0; k < 4; ++k) {
            if (made[k].defined() && task_should_compute_output(PLACES[k])) gradients[PLACES[k]] = made[k];
        }
        return true;
    }

    // Gradients of a total, times what came in; on a device that is looked at there.
    void hand_over(const Tensor& upstream, std::initializer_list<size_t> places, variable_list& gradients) {
        const bool one = kernels->on_host && (upstream.scalar_type() == c10::kFloat
                                                  ? *upstream.const_data_ptr<float>() == 1
                                                  : *upstream.const_data_ptr<double>() == 1);
        size_t next = 0;
        for (const size_t place : places) {
            Tensor& gradient = gradients[place] = std::move(kept[next++]);
            if (one) continue;
            kernels->rescale(rescaled(gradient), upstream.const_data_ptr(), code_of(upstream.scalar_type()),
                             Site(*kernels, gradient, 0).place);
        }
        kept.clear();
    }

    static Rescale rescaled(const Tensor& gradient) {
        return {code_of(gradient.scalar_type()), gradient.numel(), gradient.mutable_data_ptr(), 0};
    }

    std::vector<bool> needed() const {
        std::vector<bool> flags;
        for (size_t k = 0; k < saved.size(); ++k) flags.push_back(task_should_compute_output(k));
        return flags;
    }

    variable_list inputs() const {
        variable_list tensors;
        for (const auto& variable : saved) tensors.push_back(variable.unpack());
        return tensors;
    }
};

// Nodes are counted by a pointer of the standard library's, since torch 2.12 by torch's own.
template <class POINTER>
POINTER new_node(std::shared_ptr<torch::autograd::Node>*, OpBackward*& node) {
    node = new OpBackward();
    return POINTER(node, [](auto* last) { deleteNode(last); });
}
template <class POINTER>
POINTER new_node(c10::intrusive_ptr<torch::autograd::Node>*, OpBackward*& node) {
    auto made = c10::make_intrusive<OpBackward>();
    node = made.get();
    return made;
}

}  // namespace
}  // namespace fastvae
