"""diffusers' autoencoders on the fused kernels: the same posterior, its clamp, exponentials and sums in one pass each.

``patch(model)`` is all: train, sample, tile, slice, compile and save the model as before. One instance is changed, no
class. ``encode`` of the 2-D, video and audio autoencoders gives a ``DiagonalGaussianDistribution``; patched, it gives
the one of this module, which has the same attributes and methods and can be used without diffusers, too.

Tested with diffusers 0.42.1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Generators, gaussian_kl, gaussian_nll, reparameterize
from . import what_came

CLAMP = (-30.0, 20.0)  # of log σ², as diffusers has it
NOISES = ("torch", "fastvae")


class DiagonalGaussianDistribution:
    """q(z|x) from an encoder's output, mean and log σ² one after the other on the channel axis, read where they are.

    ``mean``, ``logvar`` (clamped to [-30, 20]), ``std``, ``var``, ``parameters`` and ``deterministic`` are attributes
    as in diffusers; those that the kernels need not are computed when they are asked for.

    Args:
        parameters: ``[B, 2·C, ...]``: images, videos, audio.
        deterministic: σ is 0; ``kl`` and ``nll`` are a tensor of one 0.
        noise: ``"torch"`` draws ε as diffusers does, so that a seed gives the same sample. ``"fastvae"`` draws it in
            the kernel: another sample of the same distribution, one pass, and nothing kept for the backward.

    Raises:
        TypeError: ``parameters`` is not a floating-point tensor.
        ValueError: it has not an even number of channels, or there is no such noise.

    >>> posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 16, 16))
    >>> posterior.sample().shape, posterior.kl()
    (torch.Size([2, 4, 16, 16]), tensor([0., 0.]))
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False, *, noise: str = "torch"):
        if not isinstance(parameters, Tensor) or not parameters.is_floating_point():
            came = parameters.dtype if isinstance(parameters, Tensor) else type(parameters).__name__
            raise TypeError(f"parameters must be a floating-point tensor, got {came}")
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(f"parameters must be [B, 2·C, ...], got {list(parameters.shape)}")
        self.parameters = parameters
        self.mean, self._logvar = parameters.chunk(2, dim=1)
        self.deterministic = deterministic
        self._noise = _known(noise)

    @functools.cached_property
    def logvar(self) -> Tensor:
        """Log σ², clamped."""
        return self._logvar.clamp(*CLAMP)

    @functools.cached_property
    def std(self) -> Tensor:
        """σ."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @functools.cached_property
    def var(self) -> Tensor:
        """σ²."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generators | None = None) -> Tensor:
        """Draw z, ``[B, C, ...]`` in the dtype of the parameters, from one generator or a list of one an example."""
        if isinstance(generator, (list, tuple)) and len(generator) == 1:
            (generator,) = generator
        if self._noise == "torch" or self.deterministic:
            noise = _randn(self.mean, generator)
            if self.deterministic:
                return self.mean + self.std * noise
            return reparameterize(self.mean, self._logvar, logvar_clamp=CLAMP, noise=noise)
        return reparameterize(self.mean, self._logvar, logvar_clamp=CLAMP, generator=generator)

    def kl(self, other: Any = None) -> Tensor:
        """KL to N(0, I), or to another such distribution, in nats, summed over axes 1 to 3: ``[B]`` for images.

        As in diffusers, a video ``[B, C, T, H, W]`` keeps its last axis. Half precision is summed in float32.
        """
        if self.deterministic:
            return torch.Tensor([0.0])
        prior = {} if other is None else {"prior_mu": other.mean, "prior_logvar": other.logvar}
        if self.mean.dim() == 4:
            return gaussian_kl(self.mean, self._logvar, logvar_clamp=CLAMP, **prior, reduction="example")
        return _sum(gaussian_kl(self.mean, self._logvar, logvar_clamp=CLAMP, **prior, reduction="none"), (1, 2, 3))

    def nll(self, sample: Tensor, dims: int | Sequence[int] = (1, 2, 3)) -> Tensor:
        """−log q(sample) in nats, summed over ``dims``."""
        if self.deterministic:
            return torch.Tensor([0.0])
        sample = sample.expand_as(self.mean)
        over = {dim % self.mean.dim() for dim in ((dims,) if isinstance(dims, int) else dims)}
        if over == set(range(1, self.mean.dim())):
            return gaussian_nll(self.mean, sample, logvar=self.logvar, reduction="example")
        return _sum(gaussian_nll(self.mean, sample, logvar=self.logvar, reduction="none"), dims)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean


def _sum(elements: Tensor, dims: int | Sequence[int]) -> Tensor:
    axes = dims if isinstance(dims, int) else list(dims)
    return elements.sum(axes, dtype=torch.float64 if elements.dtype == torch.float64 else torch.float32)


def _randn(like: Tensor, generator: Generators | None) -> Tensor:
    """The noise of diffusers' ``randn_tensor``: drawn on the generator's device, then moved."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(like):
            raise ValueError(f"generator must be one, or a list of one for each of {len(like)} examples")
        return torch.cat([_randn(like[:1], each) for each in generator])
    place = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=place, dtype=like.dtype).to(like.device)


def _known(noise: str) -> str:
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(map(repr, NOISES))}, got {noise!r}")
    return noise


def patch(model: Any, *, noise: str = "torch") -> None:
    """Let ``model.encode`` give the posterior of this module. Twice is as once, with the noise of the second.

    A copy of a patched model (``copy.deepcopy``) is patched, a saved and loaded one is not.

    Args:
        model: an autoencoder of diffusers that encodes to a ``DiagonalGaussianDistribution``, as ``AutoencoderKL`` and
            the video ones, compiled or not; or a pipeline that has one as its ``vae``.
        noise: ``"torch"``, the same samples as before from the same seed; or ``"fastvae"``, drawn in the kernel.

    Raises:
        TypeError: it is something else.
        ValueError: there is no such noise.

    >>> vae = diffusers.AutoencoderKL()  # doctest: +SKIP
    >>> patch(vae)  # doctest: +SKIP
    >>> posterior = vae.encode(images).latent_dist  # doctest: +SKIP
    """
    vae = _vae(model)
    encode = vars(vae).get("encode")
    if isinstance(encode, _Encode):
        encode.noise = _known(noise)
    else:
        vae.encode = _Encode(vae, encode, _known(noise))


def unpatch(model: Any) -> None:
    """Give ``model`` its own posterior back, if it was patched. Args and errors are those of :func:`patch`."""
    vae = _vae(model)
    encode = vars(vae).get("encode")
    if isinstance(encode, _Encode):
        del vae.encode
        if encode.replaced is not None:
            vae.encode = encode.replaced


def _vae(given: Any) -> Any:
    """The autoencoder of ``given``, without what ``torch.compile`` wraps around it."""
    vae = given if isinstance(given, nn.Module) else getattr(given, "vae", None)
    vae = getattr(vae, "_orig_mod", vae)
    if not (isinstance(vae, nn.Module) and callable(getattr(vae, "encode", None)) and _uses_it(type(vae))):
        raise TypeError(
            "model must be an autoencoder of diffusers that encodes to a DiagonalGaussianDistribution, or a pipeline "
            f"with one as its vae, got {what_came(given if vae is None else vae)}"
        )
    return vae


def _uses_it(cls: type) -> bool:
    """Whether a module that defines ``cls``, or what it inherits from, names the class that is replaced."""
    theirs = _theirs()
    modules = (sys.modules.get(each.__module__) for each in cls.__mro__ if each.__module__ != theirs.__module__)
    return any(getattr(module, "DiagonalGaussianDistribution", None) is theirs for module in modules)


def _theirs() -> Any:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution


class _Encode:
    """What stands for ``model.encode``. Copied with the model, it is the copy's."""

    def __init__(self, model: nn.Module, replaced: Callable[..., Any] | None, noise: str):
        self.model, self.replaced, self.noise = model, replaced, noise

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        own: Callable[..., Any] = self.replaced or type(self.model).encode.__get__(self.model)  # type: ignore[attr-defined]
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.__wrapped__(*args, **kwargs)
        if isinstance(output, tuple):
            return (self._fused(output[0]), *output[1:])
        output.latent_dist = self._fused(output.latent_dist)
        return output

    def _fused(self, posterior: Any) -> Any:
        if type(posterior) is not _theirs():
            return posterior
        return DiagonalGaussianDistribution(posterior.parameters, posterior.deterministic, noise=self.noise)
