"""pythae's VAEs on the fused kernels: the same losses and gradients, from fewer passes and without its -100 nats.

``patch(model)`` is all: train, generate, save and load the model as before. One instance is changed, no class. What is
replaced is ``loss_function``; networks and samples are pythae's own, so one seed gives one curve.

Tested with pythae 0.1.2: ``VAE``, ``BetaVAE``, ``DisentangledBetaVAE``, ``BetaTCVAE``, ``VAMP``, ``INFOVAE_MMD``,
``IWAE``, ``CIWAE``, ``MIWAE``, ``PIWAE``, ``VAE_LinNF``, ``VAE_IAF`` and what inherits its loss from one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import bce, elbo_loss, gaussian_kl, gaussian_nll, mse
from . import what_came

Losses = tuple[Tensor, ...]


def patch(model: Any) -> None:
    """Let ``model.loss_function`` be computed by the fused kernels. Twice is as once.

    A copy of a patched model (``copy.deepcopy``) is patched, a saved and loaded one is not: pythae's trainers copy, so
    what they train is patched, and what they save is loaded as it was.

    Args:
        model: one of those named above, with any encoder and decoder.

    Raises:
        TypeError: it is something else, or of a subclass with a loss of its own.

    >>> model = pythae.models.BetaVAE(pythae.models.BetaVAEConfig(input_dim=(1, 28, 28)))  # doctest: +SKIP
    >>> patch(model)  # doctest: +SKIP
    >>> pipeline = pythae.pipelines.TrainingPipeline(model=model)  # doctest: +SKIP
    """
    _fused_loss(model)
    if not isinstance(vars(model).get("loss_function"), _Loss):
        model.loss_function = _Loss(model)


def unpatch(model: Any) -> None:
    """Give ``model`` its own loss back, if it was patched. Args and errors are those of :func:`patch`."""
    _fused_loss(model)
    if isinstance(vars(model).get("loss_function"), _Loss):
        del model.loss_function


def _fused_loss(model: Any) -> Callable[..., Losses]:
    """What stands for the loss of the class of ``model``."""
    from pythae.models.base import BaseAE

    if not isinstance(model, BaseAE):
        raise TypeError(f"model must be a VAE of pythae, got {what_came(model)}")
    replaced = vars(model).get("loss_function")
    own = getattr(type(model), "loss_function", None)
    found = _table().get(own) if replaced is None or isinstance(replaced, _Loss) else None
    if found is None:
        raise TypeError(f"model must have the loss of one of {_names()}, got {type(model).__name__} with its own")
    return found


def _table() -> dict[Any, Callable[..., Losses]]:
    """The fused loss for each ``loss_function`` of pythae."""
    from pythae import models

    return {getattr(models, name).loss_function: fused for name, fused in _LOSSES.items()}


def _names() -> str:
    return ", ".join(_LOSSES)


class _Loss:
    """What stands for ``model.loss_function``. Copied with the model, it is the copy's."""

    def __init__(self, model: Any):
        self.model = model

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        own: Callable[..., Any] = type(self.model).loss_function.__get__(self.model)
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Losses:
        return _fused_loss(self.model)(self.model, *args, **kwargs)


# the terms, in nats for each example


def _reconstruction(model: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    """``[B]``, of ``[B, *data]``."""
    recon_x, x = recon_x.reshape(len(x), -1), x.reshape(len(x), -1)
    if model.model_config.reconstruction_loss == "bce":
        return bce(recon_x, x, eps=None, reduction="example")
    return 0.5 * mse(recon_x, x, reduction="example")


def _of_samples(model: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    """``[B, *samples]``, of ``[B, *samples, data]``: x is read for each sample, not repeated."""
    samples = recon_x.shape[1:-1]
    terms = [_reconstruction(model, recon, x) for recon in recon_x.flatten(1, -2).unbind(1)]
    return torch.stack(terms, 1).unflatten(1, samples)


def _log_density(z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """log q(z|x) but for its constant, over the last axis."""
    rows = [t.reshape(-1, z.shape[-1]) for t in (mu, z, log_var)]
    return -gaussian_nll(rows[0], rows[1], logvar=rows[2], full=False, reduction="example").reshape(z.shape[:-1])


def _log_prior(z: Tensor) -> Tensor:
    """log p(z) but for its constant, over the last axis."""
    return -0.5 * z.square().sum(-1)


# sums over pairs: what a fused kernel would take the place of


def _aggregate_posterior(model: Any, z: Tensor, mu: Tensor, log_var: Tensor, log_weights: Any) -> tuple[Tensor, Tensor]:
    """log Σ w·q(z|x) over the examples of the batch, whole and by dimension, each ``[B]``."""
    pairs = model._compute_log_gauss_density(z[:, None], mu[None], log_var[None])  # [B, B, latent]
    whole = torch.logsumexp(log_weights + pairs.sum(-1), dim=1)
    return whole, torch.logsumexp(log_weights[..., None] + pairs, dim=1).sum(-1)


def _mixture_log_prob(model: Any, z: Tensor) -> Tensor:
    """Log p(z) of the mixture of the posteriors of pseudo-inputs, ``[B]``."""
    found: Tensor = model._log_p_z(z)
    return found


def _mmd(model: Any, z: Tensor, z_prior: Tensor) -> Tensor:
    """Maximum mean discrepancy between the two, without a sample's distance to itself."""
    kernel, n = model.rbf_kernel if model.kernel_choice == "rbf" else model.imq_kernel, len(z)
    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(z, z), kernel(z_prior, z_prior)))
    found: Tensor = within / ((n - 1) * n) - 2 * kernel(z, z_prior).sum() / n**2
    return found


def _importance_weighted(log_w: Tensor) -> Tensor:
    """The negative bound whose gradient is that of the weighted sum, over axis 1."""
    return -(torch.softmax(log_w.detach(), 1) * log_w).sum(1)


# the losses: (loss, reconstruction, kl), each the mean over the batch, and what else pythae returns


def _means(loss: Tensor, *terms: Tensor) -> Losses:
    return tuple(term.mean(0) for term in (loss, *terms))


def _elbo(model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, beta: float) -> Losses:
    recon_x, x = recon_x.reshape(len(x), -1), x.reshape(len(x), -1)
    if model.model_config.reconstruction_loss == "bce":
        probs = {"likelihood": "bernoulli_probs", "likelihood_parameters": {"eps": None}}
        return tuple(elbo_loss(recon_x, x, mu, log_var, beta=beta, **probs))  # type: ignore[arg-type]
    loss, reconstruction, kl = elbo_loss(recon_x, x, mu, log_var, beta=2 * beta, likelihood="mse")
    return 0.5 * loss, 0.5 * reconstruction, kl


def _vae(model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Losses:
    return _elbo(model, recon_x, x, mu, log_var, 1.0)


def _beta_vae(model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Losses:
    return _elbo(model, recon_x, x, mu, log_var, model.beta)


def _disentangled(model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int) -> Losses:
    reconstruction = _reconstruction(model, recon_x, x)
    kl = gaussian_kl(mu, log_var, reduction="example")
    capacity = model.C * min(epoch / (model.warmup_epoch + 1), 1)
    return _means(reconstruction + model.beta * (kl - capacity).abs(), reconstruction, kl)


def _beta_tc_vae(
    model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, dataset_size: int
) -> Losses:
    reconstruction, batch = _reconstruction(model, recon_x, x), len(z)
    constant = 0.5 * math.log(2 * math.pi) * z.shape[1]
    if model.use_mss:
        log_weights = model._log_importance_weight_matrix(batch, dataset_size).to(z)
    else:
        log_weights = z.new_full((1, 1), -math.log(batch * dataset_size))
    log_q_z, log_prod_q_z = _aggregate_posterior(model, z, mu, log_var, log_weights)
    information = _log_density(z, mu, log_var) - constant - log_q_z
    by_dimension = log_prod_q_z - (_log_prior(z) - constant)
    kl = model.alpha * information + model.beta * (log_q_z - log_prod_q_z) + model.gamma * by_dimension
    return _means(reconstruction + kl, reconstruction, kl)


def _vamp(model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int) -> Losses:
    reconstruction = _reconstruction(model, recon_x, x)
    kl = _log_density(z, mu, log_var) - _mixture_log_prob(model, z)
    warming = model.linear_scheduling > 0 and model.training
    beta = min(epoch / model.linear_scheduling, 1.0) if warming else 1.0
    return _means(reconstruction + beta * kl, reconstruction, kl)


def _info_vae(
    model: Any, recon_x: Tensor, x: Tensor, z: Tensor, z_prior: Tensor, mu: Tensor, log_var: Tensor
) -> Losses:
    reconstruction = _reconstruction(model, recon_x, x)
    kl, mmd = gaussian_kl(mu, log_var, reduction="example"), _mmd(model, z, z_prior)
    loss = reconstruction + (1 - model.alpha) * kl + (model.alpha + model.lbd - 1) * mmd
    return *_means(loss, reconstruction, kl), mmd


def _flow(
    model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z0: Tensor, zk: Tensor, log_det: Tensor
) -> Losses:
    reconstruction = _reconstruction(model, recon_x, x)
    kl = _log_density(z0, mu, log_var) - _log_prior(zk) - log_det
    return _means(reconstruction + kl, reconstruction, kl)


def _weighted(
    model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, KL and the logarithms of the importance weights, ``[B, *samples]``."""
    reconstruction = _of_samples(model, recon_x, x)
    kl = _log_density(z, mu, log_var) - _log_prior(z)
    return reconstruction, kl, -(reconstruction + kl)


def _iwae(model: Any, *args: Tensor) -> Losses:
    reconstruction, kl, log_w = _weighted(model, *args)
    return _importance_weighted(log_w).mean(), reconstruction.mean(), kl.mean()


def _ciwae(model: Any, *args: Tensor) -> Losses:
    reconstruction, kl, log_w = _weighted(model, *args)
    return _means(model.beta * -log_w.mean(-1) + (1 - model.beta) * _importance_weighted(log_w), reconstruction, kl)


def _miwae(model: Any, *args: Tensor) -> Losses:
    reconstruction, kl, log_w = _weighted(model, *args)
    return _means(_importance_weighted(log_w).mean(-1), reconstruction, kl)


def _piwae(model: Any, *args: Tensor) -> Losses:
    reconstruction, kl, log_w = _weighted(model, *args)
    return _means(_importance_weighted(log_w).mean(-1), _importance_weighted(log_w.flatten(1)), reconstruction, kl)


_LOSSES: dict[str, Callable[..., Losses]] = {
    "VAE": _vae,
    "BetaVAE": _beta_vae,
    "DisentangledBetaVAE": _disentangled,
    "BetaTCVAE": _beta_tc_vae,
    "VAMP": _vamp,
    "INFOVAE_MMD": _info_vae,
    "IWAE": _iwae,
    "CIWAE": _ciwae,
    "MIWAE": _miwae,
    "PIWAE": _piwae,
    "VAE_LinNF": _flow,
    "VAE_IAF": _flow,
}
