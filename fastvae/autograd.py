"""One ``torch.autograd.Function`` per op: which primitive runs forward, which backward, and what is kept between.

Each is said once, for two ways to run it: as torch's tracers and transforms want it, and directly (:func:`apply`).
``run(primitives, *tensors, *options)`` computes, ``setup_context`` keeps, ``gradients(ctx, primitives, again, *grads)``
returns the gradients of the tensors; ``again`` says that those will be differentiated or vmapped, and ``primitives``
are plain torch. ``forward`` names its arguments: where no gradient is wanted, torch.compile counts them.

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

from . import ops, registry
from .kernels import reference
from .kernels.layout import TOTAL_REDUCTIONS
from .kernels.reference import latent as reference_latent
from .kernels.reference import reconstruction as reference_reconstruction

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def _is_batched(grad: Tensor | None) -> bool:
    """Whether it comes from the older vmap, which no mode and no transform announces."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def apply(
    function: type[torch.autograd.Function], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """``function.apply(*tensors, *options)``; in plain eager mode by a class that spares a call 100 µs.

    A Function with ``setup_context`` binds its arguments through ``inspect`` at every call.
    """
    if torch.compiler.is_dynamo_compiling() or ops.transforms_active():
        return function.apply(*tensors, *options)
    # a tensor may come out of a transform that has ended, or be a view that torch has yet to negate
    alive = [t if t is None else _unwrap_if_dead(t).resolve_neg() for t in tensors]
    return _direct(function)(*alive, options)


@functools.cache
def _direct(function: Any) -> Callable[..., tuple[Tensor, ...]]:
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, options = args
        ctx.primitives, ctx.backend = ops.primitives(*tensors), registry.asked_for()
        outputs = function.run(ctx.primitives, *tensors, *options)
        function.setup_context(ctx, (*tensors, *options), outputs)
        return outputs[: function.LOSSES]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # create_graph=True, or vmapped upstream gradients (of torch.func, or of is_grads_batched)
        if torch.is_grad_enabled() or ops.transforms_active() or any(map(_is_batched, grads)):
            return *function.gradients(ctx, reference, True, *grads), None
        grads = tuple(g if g is None else g.resolve_neg() for g in grads)
        if ctx.primitives is not ops.OPERATORS and not ops.listened_to():
            return *function.gradients(ctx, ctx.primitives, False, *grads), None
        with registry.use(ctx.backend):  # autograd has threads of its own, and backward may come after the block
            return *function.gradients(ctx, ops.OPERATORS, False, *grads), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    direct: Any = type(function.__name__, (torch.autograd.Function,), members)
    return super(torch.autograd.Function, direct).apply  # Function's own looks for what is not here


def _traced_gradients(function: Any, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward of a Function that is transformed; or traced, then in grad mode without being differentiated."""
    again = not torch.compiler.is_dynamo_compiling() and (torch.is_grad_enabled() or _is_wrapped(ctx.saved_tensors[0]))
    gradients: tuple[Tensor | None, ...] = function.gradients(ctx, reference if again else ops.OPERATORS, again, *grads)
    return gradients


def _vmapped(function: Callable[..., Any], in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    outputs = torch.vmap(function, in_dims, randomness="same")(*args)
    return outputs, tuple(0 for _ in outputs)


def _keep_gradient(ctx: Any, saved: tuple, gradient: list[Tensor]) -> None:
    """Keep the gradient the forward wrote: as an attribute, which a backward can take away, unless tracing."""
    if torch.compiler.is_dynamo_compiling():
        ctx.save_for_backward(*saved, *gradient)
    else:
        ctx.save_for_backward(*saved)
        ctx.gradient = gradient


def _take_gradient(ctx: Any, primitives: Any, traced: list[Tensor], upstream: Tensor) -> Tensor | None:
    """The kept gradient times ``upstream``, once; None if there is none (any more)."""
    if traced:
        return (traced[0] * upstream).to(traced[0].dtype)
    if torch.compiler.is_dynamo_compiling():  # nothing is kept elsewhere, and torch 2.11 cannot trace the next line
        return None
    gradient = ctx.__dict__.pop("gradient", None)
    if not gradient:
        return None
    primitives.rescale_(gradient[0], upstream)
    return gradient[0]


class Reconstruction(torch.autograd.Function):
    """``(recon, target)`` → ``(nll, *gradient)``; the target's own gradient always is the reference's."""

    LOSSES = 1  # of the outputs, those for the caller

    @staticmethod
    def run(
        primitives: Any,
        recon: Tensor,
        target: Tensor,
        likelihood: str,
        parameter: float,
        reduction: str,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        options = {"likelihood": likelihood, "parameter": parameter, "reduction": reduction}
        return tuple(primitives.reconstruction_forward(recon, target, **options, with_gradient=with_gradient))

    @staticmethod
    def forward(
        recon: Tensor, target: Tensor, likelihood: str, parameter: float, reduction: str, with_gradient: bool
    ) -> tuple[Tensor, ...]:
        return Reconstruction.run(ops.OPERATORS, recon, target, likelihood, parameter, reduction, with_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        recon, target, likelihood, parameter, reduction, _ = inputs
        _, *gradient = output
        ctx.mark_non_differentiable(*gradient)
        ctx.set_materialize_grads(False)  # or torch would fill zeros, as many as the data, for the gradient's gradient
        ctx.options = {"likelihood": likelihood, "parameter": parameter, "reduction": reduction}
        _keep_gradient(ctx, (recon, target), gradient)

    @staticmethod
    def gradients(
        ctx: Any, primitives: Any, again: bool, grad_nll: Tensor | None, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        if grad_nll is None:
            return None, None
        recon, target, *traced = ctx.saved_tensors
        return _reconstruction_gradients(ctx, primitives, again, grad_nll, recon, target, traced, ctx.options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_traced_gradients(Reconstruction, ctx, *grads), *(None,) * 4

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
    ctx: Any,
    primitives: Any,
    again: bool,
    grad_nll: Tensor,
    recon: Tensor,
    target: Tensor,
    traced: list[Tensor],
    options: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None]:
    grad_recon = grad_target = None
    recon_needed, target_needed, *_ = ctx.needs_input_grad
    if recon_needed:
        grad_recon = None if again else _take_gradient(ctx, primitives, traced, grad_nll)
        if grad_recon is None:
            grad_recon = primitives.reconstruction_backward(grad_nll, recon, target, **options)
    if target_needed:
        grad_target = reference_reconstruction.target_gradient(grad_nll, recon, target, **options)
    return grad_recon, grad_target


class Latent(torch.autograd.Function):
    """``(mu, scale, prior_mu, prior_logvar)`` → ``([z], [kl])``; noise is drawn again in the backward, never kept."""

    LOSSES = None  # every output

    @staticmethod
    def run(
        primitives: Any,
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
        return tuple(primitives.latent_forward(mu, scale, seed, prior_mu, prior_logvar, **options))

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
        tensors = mu, scale, prior_mu, prior_logvar, seed
        return Latent.run(ops.OPERATORS, *tensors, log_scale, samples, free_bits, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        mu, scale, prior_mu, prior_logvar, seed, log_scale, samples, free_bits, reduction = inputs
        ctx.set_materialize_grads(False)
        ctx.options = {"log_scale": log_scale, "samples": samples, "free_bits": free_bits, "reduction": reduction}
        ctx.save_for_backward(mu, scale, seed, prior_mu, prior_logvar)

    @staticmethod
    def gradients(ctx: Any, primitives: Any, again: bool, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mu, scale, seed, prior_mu, prior_logvar = ctx.saved_tensors
        grad_z = grads[0] if seed is not None else None
        grad_kl = grads[-1] if ctx.options["reduction"] else None
        if grad_z is None and grad_kl is None:
            return (None,) * 5
        gradients = primitives.latent_backward(grad_z, grad_kl, mu, scale, seed, prior_mu, prior_logvar, **ctx.options)
        needs = ctx.needs_input_grad[: len(gradients)]
        needed = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return *needed, *(None,) * (5 - len(needed))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_traced_gradients(Latent, ctx, *grads), *(None,) * 4

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

    LOSSES = 3

    @staticmethod
    def run(
        primitives: Any,
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
            primitives.elbo_forward(
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
        options = likelihood, parameter, log_scale, beta, free_bits, reduction, with_gradient
        return ELBO.run(ops.OPERATORS, recon, target, mu, scale, *options)

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
    def gradients(
        ctx: Any,
        primitives: Any,
        again: bool,
        grad_loss: Tensor | None,
        grad_nll: Tensor | None,
        grad_kl: Tensor | None,
        *_: Tensor,
    ) -> tuple[Tensor | None, ...]:
        recon, target, mu, scale, *traced = ctx.saved_tensors
        weighted = grad_loss if grad_loss is None or ctx.beta == 1 else grad_loss * ctx.beta
        grad_nll, grad_kl = _sum(grad_loss, grad_nll), _sum(weighted, grad_kl)
        grad_recon = grad_target = grad_mu = grad_scale = None
        if grad_nll is not None:
            grad_recon, grad_target = _reconstruction_gradients(
                ctx, primitives, again, grad_nll, recon, target, traced, ctx.reconstruction
            )
        if grad_kl is not None and any(ctx.needs_input_grad[2:4]):
            grad_mu, grad_scale = primitives.latent_backward(None, grad_kl, mu, scale, None, None, None, **ctx.latent)
        return grad_recon, grad_target, grad_mu, grad_scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_traced_gradients(ELBO, ctx, *grads), *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        likelihood, parameter, log_scale, beta, free_bits, reduction, with_gradient = args[4:]

        def function(recon: Tensor, target: Tensor, mu: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            nll, *gradient = _reconstruction_expression(recon, target, likelihood, parameter, reduction, with_gradient)
            kl = reference_latent.gaussian_kl(mu, scale, None, None, log_scale, free_bits, reduction)
            return (nll + beta * kl).to(nll.dtype), nll, kl, *gradient

        return _vmapped(function, in_dims[:4], args[:4])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def one_pass(recon: Tensor, reduction: str) -> bool:
    """Whether the forward should write the gradient: it is wanted, and one number will scale it.

    Not in float16, where what a GradScaler multiplies by is there to keep the gradient from vanishing, and would come
    too late.
    """
    wanted = torch.is_grad_enabled() and recon.requires_grad
    return wanted and reduction in TOTAL_REDUCTIONS and recon.dtype != torch.float16
