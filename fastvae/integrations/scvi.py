"""scvi-tools' ``VAE``, the module of ``SCVI``, on the fused kernels: the same losses and gradients, from fewer passes.

``patch(model)`` is all: train, evaluate and save the model as before. One instance is changed, no class. Its ``loss``
asks the distribution p(x|z) for the log-probability of each count and adds those of a cell up. Patched, a kernel makes
the sum, so nothing of the size of cells × genes is kept but what scvi-tools' own networks keep. What the other
methods return, sample and save is scvi-tools' own.

Tested with scvi-tools 1.4.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ..functional import negative_binomial_nll, poisson_nll, zero_inflated_negative_binomial_nll
from . import what_came

DEVICES = ("cpu", "cuda")  # those with kernels


def patch(model: Any) -> None:
    """Let the loss of ``model`` be computed by the fused kernels. Twice is as once.

    With ``gene_likelihood`` ``"nb"``, ``"zinb"`` and ``"poisson"``, and every ``dispersion``; ``"normal"`` stays as it
    is. So do batches that are no counts, normalised ones for instance, and several samples of z at a time: scvi-tools
    computes and warns as if nothing were patched. The KL stays, too: it is 10 numbers a cell.

    A copy of a patched module (``copy.deepcopy``) is patched, a saved and loaded model is not. Under
    ``torch.compile``, on a CPU, a batch that is no counts is a ``ValueError``.

    Args:
        model: a ``scvi.module.VAE``, or a model that has one, as ``scvi.model.SCVI``, ``LinearSCVI`` and ``SCANVI``.

    Raises:
        TypeError: it is something else, or of a subclass with a loss of its own.

    >>> model = scvi.model.SCVI(adata, gene_likelihood="nb")  # doctest: +SKIP
    >>> patch(model)  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    """
    vae = _vae(model)
    if not isinstance(vae.loss, _Loss):
        vae.loss = _Loss(vae)


def unpatch(model: Any) -> None:
    """Give ``model`` its own loss back, if it was patched. Args and errors are those of :func:`patch`."""
    vae = _vae(model)
    if isinstance(vae.loss, _Loss):
        del vae.loss


@contextlib.contextmanager
def fused(model: Any) -> Iterator[None]:
    """Patched within the block; then as before. Args and errors are those of :func:`patch`."""
    before = isinstance(_vae(model).loss, _Loss)
    patch(model)
    try:
        yield
    finally:
        if not before:
            unpatch(model)


def _vae(given: Any) -> Any:
    """The module of ``given``, if its loss is one that is known here."""
    from scvi.module import SCANVAE, VAE

    vae = given if isinstance(given, VAE) else getattr(given, "module", None)
    if not isinstance(vae, VAE):
        raise TypeError(f"model must be a scvi.module.VAE, or a model that has one, got {what_came(given)}")
    if not isinstance(vae.loss, _Loss) and getattr(vae.loss, "__func__", None) not in (VAE.loss, SCANVAE.loss):
        raise TypeError(f"model must have the loss of VAE or of SCANVAE, got {type(vae).__name__} with its own")
    return vae


class _Loss:
    """What stands for ``module.loss``. Copied with the module, it is the copy's."""

    def __init__(self, module: Any):
        self.module = module

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Of the same signature: scvi-tools' training plans look for ``kl_weight`` in it."""
        own: Callable[..., Any] = type(self.module).loss.__get__(self.module)
        return own

    def __call__(self, tensors: Any, inference_outputs: Any, generative_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        px = generative_outputs["px"]
        nll = _nll(px, tensors["X"])
        if nll is not None:
            generative_outputs = {**generative_outputs, "px": _Scored(-nll)}
        return self.__wrapped__(tensors, inference_outputs, generative_outputs, *args, **kwargs)


class _Scored:
    """What stands for p(x|z) in a loss: ``log_prob(x).sum(-1)`` is known, and nothing else is there."""

    def __init__(self, log_prob: Tensor):
        self._log_prob = log_prob

    def log_prob(self, _: Tensor) -> _Scored:
        return self

    def sum(self, dim: int) -> Tensor:
        if dim != -1:
            raise ValueError(f"dim must be -1, the genes, got {dim}")
        return self._log_prob


def _nll(px: Any, x: Tensor) -> Tensor | None:
    """Nats for each cell; None where scvi-tools shall compute them."""
    from scvi.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial

    if type(px) not in (NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial):
        return None
    mean = px.rate if type(px) is Poisson else px.mu
    if mean.device.type not in DEVICES or mean.shape != x.shape:
        return None
    if not x.is_cpu and not px.support.check(x).all():  # on a CPU the kernels look
        return None
    try:
        if type(px) is Poisson:
            return poisson_nll(mean, x, reduction="example")
        theta = _per_gene(px.theta)
        if type(px) is NegativeBinomial:
            return negative_binomial_nll(mean, x, dispersion=theta, reduction="example")
        return zero_inflated_negative_binomial_nll(
            mean, x, dispersion=theta, zero_logits=px.zi_logits, reduction="example"
        )
    except ValueError:
        return None


def _per_gene(theta: Tensor) -> Tensor:
    """``theta`` as it was before it was expanded to cells × genes, which spares a gradient of that size."""
    if theta.stride(0):
        return theta
    base = theta._base
    if base is not None and base.numel() == theta.shape[1] and base.shape[-1:] == theta.shape[1:]:
        return base
    return theta[0]
