"""One ``torch.autograd.Function`` per op: which primitive runs forward, which backward, and what is kept between.

Three rules hold for each of them:

* Under ``create_graph=True`` the backward is the reference expression, which torch can differentiate again.
* Under ``torch.func.vmap`` the op is the vmapped reference expression.
* A loss whose gradient was written by the forward hands that buffer over to the first backward, scaled in place by
  the upstream gradient (on the device: nothing to do where it is 1). Nobody else ever sees the buffer, so a second
  backward through the same graph computes its gradient afresh instead of finding one that was scaled before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .kernels import reference
from .kernels.layout import TOTAL_REDUCTIONS
from .kernels.reference import latent as reference_latent
from .kernels.reference import reconstruction as reference_reconstruction


def apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """``function.apply(*args)``; in plain eager mode by a class that spares a call 100 µs.

    A Function with ``setup_context``, which transforms and tracers need, binds its arguments through ``inspect`` at
    every call.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return _direct(function).apply(*args)


@functools.cache
def _direct(function: Any) -> Any:
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        outputs = function.forward(*args)
        function.setup_context(ctx, args, outputs)
        ctx.backend = backends.asked_for()
        return outputs

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.backend == backends.asked_for():
            return function.backward(ctx, *grads)
        with backends.use(ctx.backend):  # autograd has threads of its own, and backward may come after the block
            return function.backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(function.__name__, (torch.autograd.Function,), members)


def _needs_reference(tensor: Tensor) -> bool:
    """Whether this backward must be plain torch: to be differentiated again (``create_graph=True``) or transformed."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _vmapped(function: Callable[..., Any], in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    outputs = torch.vmap(function, in_dims, randomness="same")(*args)
    return outputs, tuple(0 for _ in outputs)


def _keep_gradient(ctx: Any, saved: tuple, gradient: list[Tensor]) -> None:
    """Keep the gradient the forward wrote: as an attribute, which a backward can take away, unless tracing."""
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*saved, *gradient)
    else:
        ctx.save_for_backward(*saved)
        ctx.gradient = gradient


def _take_gradient(ctx: Any, traced: list[Tensor], upstream: Tensor) -> Tensor | None:
    """The kept gradient times ``upstream``, once; None if there is none (any more)."""
    if traced:
        return (traced[0] * upstream).to(traced[0].dtype)
    gradient = ctx.__dict__.pop("gradient", None)
    if not gradient:
        return None
    ops.rescale_(gradient[0], upstream)
    return gradient[0]


class Reconstruction(torch.autograd.Function):
    """``(recon, target)`` → ``(nll, *gradient)``; the target's own gradient always is the reference's."""

    @staticmethod
    def forward(
        recon: Tensor, target: Tensor, likelihood: str, parameter: float, reduction: str, with_gradient: bool
    ) -> tuple[Tensor, ...]:
        return tuple(
            ops.reconstruction_forward(
                recon,
                target,
                likelihood=likelihood,
                parameter=parameter,
                reduction=reduction,
                with_gradient=with_gradient,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        recon, target, likelihood, parameter, reduction, _ = inputs
        _, *gradient = output
        ctx.mark_non_differentiable(*gradient)
        ctx.set_materialize_grads(False)  # or torch would fill zeros, as many as the data, for the gradient's gradient
        ctx.options = {"likelihood": likelihood, "parameter": parameter, "reduction": reduction}
        _keep_gradient(ctx, (recon, target), gradient)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad_nll is None:
            return (None,) * 6
        recon, target, *traced = ctx.saved_tensors
        grads = _reconstruction_gradients(ctx, grad_nll, recon, target, traced, ctx.options)
        return *grads, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, recon: Tensor, target: Tensor, *options: Any) -> tuple[Any, Any]:
        likelihood, parameter, reduction, with_gradient = options

        def function(recon: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            return _reconstruction_expression(recon, target, likelihood, parameter, reduction, with_gradient)

        return _vmapped(function, in_dims[:2], (recon, target))


def _reconstruction_expression(
    recon: Tensor, target: Tensor, likelihood: str, parameter: float, reduction: str, with_gradient: bool
) -> tuple[Tensor, ...]:
    """What ``ops.reconstruction_forward`` computes, without looking at the data."""
    nll = reference_reconstruction.negative_log_likelihood(recon, target, likelihood, parameter, reduction)
    if not with_gradient:
        return (nll,)
    one = torch.ones_like(nll)
    return nll, reference.reconstruction_backward(
        one, recon, target, likelihood=likelihood, parameter=parameter, reduction=reduction
    )


def _reconstruction_gradients(
    ctx: Any, grad_nll: Tensor, recon: Tensor, target: Tensor, traced: list[Tensor], options: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    grad_recon = grad_target = None
    if ctx.needs_input_grad[0]:
        if _needs_reference(recon):
            grad_recon = reference.reconstruction_backward(grad_nll, recon, target, **options)
        else:
            grad_recon = _take_gradient(ctx, traced, grad_nll)
            if grad_recon is None:
                grad_recon = ops.reconstruction_backward(grad_nll, recon, target, **options)
    if ctx.needs_input_grad[1]:
        grad_target = _target_gradient(grad_nll, recon, target, options)
    return grad_recon, grad_target


def _target_gradient(grad_nll: Tensor, recon: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Rarely asked for, so not a kernel: torch differentiates the reference expression."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = target if create_graph else target.detach().requires_grad_()
        nll = reference_reconstruction.negative_log_likelihood(recon, x, **options)
        return torch.autograd.grad(nll, x, grad_nll.to(nll.dtype), create_graph=create_graph)[0]


class Latent(torch.autograd.Function):
    """``(mu, scale, prior_mu, prior_logvar)`` → ``([z], [kl])``; noise is drawn again in the backward, never kept."""

    @staticmethod
    def forward(
        mu: Tensor,
        scale: Tensor,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        seed: Tensor | None,
        log_scale: bool,
        samples: int,
        free_bits: float,
        reduction: str,
    ) -> tuple[Tensor, ...]:
        options = {"log_scale": log_scale, "samples": samples, "free_bits": free_bits, "reduction": reduction}
        return tuple(ops.latent_forward(mu, scale, seed, prior_mu, prior_logvar, **options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        mu, scale, prior_mu, prior_logvar, seed, log_scale, samples, free_bits, reduction = inputs
        ctx.set_materialize_grads(False)
        ctx.options = {"log_scale": log_scale, "samples": samples, "free_bits": free_bits, "reduction": reduction}
        ctx.save_for_backward(mu, scale, seed, prior_mu, prior_logvar)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mu, scale, seed, prior_mu, prior_logvar = ctx.saved_tensors
        grad_z = grads[0] if seed is not None else None
        grad_kl = grads[-1] if ctx.options["reduction"] else None
        if grad_z is None and grad_kl is None:
            return (None,) * 9
        backward = reference.latent_backward if _needs_reference(mu) else ops.latent_backward
        gradients = backward(grad_z, grad_kl, mu, scale, seed, prior_mu, prior_logvar, **ctx.options)
        needed = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)]
        return *needed, *(None,) * (9 - len(needed))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        log_scale, samples, free_bits, reduction = args[5:]

        def function(
            mu: Tensor, scale: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, seed: Tensor | None
        ) -> tuple[Tensor, ...]:
            return tuple(
                reference.latent_forward(
                    mu,
                    scale,
                    seed,
                    prior_mu,
                    prior_logvar,
                    log_scale=log_scale,
                    samples=samples,
                    free_bits=free_bits,
                    reduction=reduction,
                )
            )

        return _vmapped(function, in_dims[:5], args[:5])


class ELBO(torch.autograd.Function):
    """``(recon, target, mu, scale)`` → ``(loss, reconstruction, kl, *gradient)``, one launch."""

    @staticmethod
    def forward(
        recon: Tensor,
        target: Tensor,
        mu: Tensor,
        scale: Tensor,
        likelihood: str,
        parameter: float,
        log_scale: bool,
        beta: float,
        free_bits: float,
        reduction: str,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        return tuple(
            ops.elbo_forward(
                recon,
                target,
                mu,
                scale,
                likelihood=likelihood,
                parameter=parameter,
                log_scale=log_scale,
                beta=beta,
                free_bits=free_bits,
                reduction=reduction,
                with_gradient=with_gradient,
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        recon, target, mu, scale, likelihood, parameter, log_scale, beta, free_bits, reduction, _ = inputs
        _, _, _, *gradient = output
        ctx.mark_non_differentiable(*gradient)
        ctx.set_materialize_grads(False)
        ctx.beta = beta
        ctx.reconstruction = {"likelihood": likelihood, "parameter": parameter, "reduction": reduction}
        ctx.latent = {"log_scale": log_scale, "samples": 0, "free_bits": free_bits, "reduction": reduction}
        _keep_gradient(ctx, (recon, target, mu, scale), gradient)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_nll: Tensor | None, grad_kl: Tensor | None, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        recon, target, mu, scale, *traced = ctx.saved_tensors
        weighted = grad_loss if grad_loss is None or ctx.beta == 1 else grad_loss * ctx.beta
        grad_nll, grad_kl = _sum(grad_loss, grad_nll), _sum(weighted, grad_kl)
        grad_recon = grad_target = grad_mu = grad_scale = None
        if grad_nll is not None:
            gradients = _reconstruction_gradients(ctx, grad_nll, recon, target, traced, ctx.reconstruction)
            grad_recon, grad_target = gradients
        if grad_kl is not None and any(ctx.needs_input_grad[2:4]):
            backward = reference.latent_backward if _needs_reference(mu) else ops.latent_backward
            grad_mu, grad_scale = backward(None, grad_kl, mu, scale, None, None, None, **ctx.latent)
        return grad_recon, grad_target, grad_mu, grad_scale, *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        likelihood, parameter, log_scale, beta, free_bits, reduction, with_gradient = args[4:]

        def function(recon: Tensor, target: Tensor, mu: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            nll, *gradient = _reconstruction_expression(recon, target, likelihood, parameter, reduction, with_gradient)
            kl = reference_latent.gaussian_kl(mu, scale, None, None, log_scale, free_bits, reduction)
            return nll + beta * kl, nll, kl, *gradient

        return _vmapped(function, in_dims[:4], args[:4])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def one_pass(recon: Tensor, reduction: str) -> bool:
    """Whether the forward should write the gradient: it is wanted, and one number will scale it."""
    return reduction in TOTAL_REDUCTIONS and torch.is_grad_enabled() and recon.requires_grad
