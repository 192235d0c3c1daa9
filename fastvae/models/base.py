"""What the models share. An :class:`AutoEncoder` has codes and an error, a :class:`GaussianVAE` q(z|x) and the ELBO."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, functional
from ..kernels.likelihoods import LIKELIHOODS, OF_IMAGES

MEMORY = 0.02  # share of a batch in the running moments of the codes
BOUNDS = ("elbo", "iwae")
VARIANCES = ("fixed", "learned")


class Output(NamedTuple):
    """What ``forward`` returns: the decoder's output and q(z|x), whose scale is ``logvar`` or ``std``, or none."""

    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor | None = None
    std: Tensor | None = None


class Posterior(NamedTuple):
    """What ``encode`` returns: q(z|x), its mean and one of ``logvar`` and ``std``; or a code alone, ``[B, latent]``."""

    mu: Tensor
    logvar: Tensor | None = None
    std: Tensor | None = None


class Loss(NamedTuple):
    """``loss = reconstruction + beta · penalty``, per example."""

    loss: Tensor
    reconstruction: Tensor
    penalty: Tensor


class AutoEncoder(nn.Module):
    """A code for each example, and back. A subclass has ``encode(x, y)`` and ``decode(z, y)``.

    Args:
        data_shape: shape of one example, ``[C, H, W]``, ``[H, W]`` or ``[N]``.
        latent: elements of z.
        hidden: width of the hidden layers, where there are any.
        likelihood: what the decoder's output is, one of images; see :func:`fastvae.elbo_loss`.
    """

    #: what people call it
    title: ClassVar[str] = "Autoencoder"
    #: the loss and its two terms, as they are called
    terms: ClassVar[tuple[str, str, str]] = Loss._fields
    #: whether ``encode`` and ``decode`` need labels
    conditional: ClassVar[bool] = False
    #: options of ``fastvae train`` that are different for this model
    preset: ClassVar[dict[str, Any]] = {}
    #: what a checkpoint needs to build the model again
    config: dict[str, Any]
    codes_mean: Tensor
    codes_var: Tensor

    def __init__(self, data_shape: tuple[int, ...], latent: int, hidden: int | None, likelihood: str):
        super().__init__()
        checks.likelihood(likelihood, OF_IMAGES)
        for name, value in (("latent", latent), ("hidden", hidden)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.data_shape, self.latent, self.likelihood = tuple(data_shape), latent, likelihood
        self.config = {"data_shape": list(data_shape), "latent": latent, "likelihood": likelihood}
        if hidden is not None:
            self.config["hidden"] = hidden
        self._remember_codes()

    def _remember_codes(self) -> None:
        """Running mean and σ of the codes: a Gaussian to sample from, for want of a prior."""
        self.register_buffer("codes_mean", torch.zeros(self.latent))
        self.register_buffer("codes_var", torch.ones(self.latent))

    @property
    def data_size(self) -> int:
        """Elements of one example."""
        return math.prod(self.data_shape)

    def as_input(self, x: Tensor) -> Tensor:
        """``[B, *data_shape]`` in the dtype of the weights; uint8 becomes x/255.

        Raises:
            ValueError: x is not a batch of examples of ``data_shape``, flat or not.
        """
        if x.dim() == 0 or x[:1].numel() not in (0, self.data_size):
            expected = ", ".join(map(str, ("B", *self.data_shape)))
            raise ValueError(f"x must be [{expected}] for this model, got {list(x.shape)}")
        dtype = next(self.parameters()).dtype
        x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
        return x.reshape(-1, *self.data_shape)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Posterior:
        """The code, or q(z|x), of ``[B, *data_shape]``."""
        raise NotImplementedError

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The likelihood's argument (logits, probabilities or mean) for ``[B, latent]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        """Encode, decode: ``[B, *data_shape]`` → :class:`Output`."""
        z = self.encode(self.as_input(x), y).mu
        if self.training:
            var, mean = torch.var_mean(z.detach().to(self.codes_mean.dtype), 0, correction=0)
            self.codes_mean.lerp_(mean, MEMORY)
            self.codes_var.lerp_(var + (mean - self.codes_mean) ** 2, MEMORY)
        return Output(self.decode(z, y), z, z)

    def penalty(self, x: Tensor, out: Output) -> Tensor:
        """What is added to the reconstruction's error, per example."""
        return out.z.new_zeros(())

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, target: Tensor | None = None, beta: float | Tensor = 1.0
    ) -> Loss | functional.ELBOLoss:
        """The reconstruction term and the penalty, per example.

        Args:
            x: input, ``[B, *data_shape]``, floating point or uint8.
            y: labels, ``[B]``, where the model is conditional.
            target: what to reconstruct if it is not the input: a denoiser's.
            beta: weight of the penalty.
        """
        out = self(x, y)
        reconstruction = self.nll(out.recon, x if target is None else target, "batchmean")
        penalty = self.penalty(self.as_input(x), out)
        return Loss(reconstruction + beta * penalty, reconstruction, penalty)

    def nll(self, recon: Tensor, target: Tensor, reduction: str = "example") -> Tensor:
        """The reconstruction term of the decoder's output for ``target``, by default of each example, ``[B]``."""
        target = target.reshape(recon.shape)
        return functional._with_parameter("recon", recon, target, self.likelihood, self.learned(), reduction)

    def learned(self) -> dict[str, Tensor]:
        """Parameters of the likelihood that are learned."""
        return {}

    def mean(self, recon: Tensor) -> Tensor:
        """The mean of p(x|z), which is what one shows: ``[B, *data_shape]``."""
        return LIKELIHOODS[self.likelihood].mean(recon).reshape(-1, *self.data_shape)

    def draw(self, n: int) -> Tensor:
        """``n`` codes from the Gaussian fitted to those of the training (Ghosh et al. 2020), ``[n, latent]``."""
        noise = torch.randn(n, self.latent, dtype=self.codes_mean.dtype, device=self.codes_mean.device)
        return self.codes_mean + self.codes_var.sqrt() * noise

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None) -> Tensor:
        """``n`` images without the encoder, ``[n, *data_shape]``; ``y``, ``[n]``, says of which classes."""
        return self.mean(self.decode(self.draw(n), y))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode the code, or the mean of q(z|x): ``[B, *data_shape]`` → the same."""
        return self.mean(self.decode(self.encode(self.as_input(x), y).mu, y))


class GaussianVAE(AutoEncoder):
    """q(z|x) is a diagonal Gaussian, the prior N(0, I), the loss the negative ELBO or a tighter bound.

    Args:
        variance: of the likelihood ``"gaussian"``: ``"fixed"`` to 1, or one ``"learned"`` for all elements.
    """

    title = "VAE"
    terms = functional.ELBOLoss._fields

    def __init__(
        self, data_shape: tuple[int, ...], latent: int, hidden: int | None, likelihood: str, variance: str = "fixed"
    ):
        super().__init__(data_shape, latent, hidden, likelihood)
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(map(repr, VARIANCES))}, got {variance!r}")
        if variance == "learned":
            if likelihood != "gaussian":
                raise ValueError(f"variance can be learned with likelihood 'gaussian', got {likelihood!r}")
            self.config["variance"] = variance
            self.recon_logvar = nn.Parameter(torch.zeros(()))

    def _remember_codes(self) -> None:
        """There is a prior."""

    def forward(self, x: Tensor, y: Tensor | None = None, samples: int | None = None) -> Output:
        """Encode, sample, decode: ``[B, *data_shape]`` → :class:`Output`; ``samples`` come first in recon and z."""
        q = self.encode(self.as_input(x), y)
        z = functional.reparameterize(q.mu, q.logvar, std=q.std, samples=samples)
        return Output(self._decode_all(z, y), z, *q)

    def _decode_all(self, z: Tensor, y: Tensor | None) -> Tensor:
        """``decode`` for z with or without a dimension of samples before that of the batch."""
        if z.dim() == 2:
            return self.decode(z, y)
        return self.decode(z.flatten(0, 1), None if y is None else y.repeat(len(z))).unflatten(0, z.shape[:2])

    def loss(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        target: Tensor | None = None,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        samples: int = 1,
        bound: str = "elbo",
    ) -> functional.ELBOLoss:
        """The negative of a bound on log p(x), nats per example.

        Args:
            x: input images, ``[B, *data_shape]``, floating point or uint8.
            y: labels, ``[B]``, where the model is conditional.
            target: the images to reconstruct if they are not the input: a denoiser's.
            beta: weight of the KL.
            free_bits: least nats of each latent element.
            samples: of z for each example.
            bound: ``"elbo"``, or ``"iwae"``: see :meth:`log_weights`. Its kl is then that of the samples, and beta 1.
        """
        target = x if target is None else target
        if bound == "iwae":
            log_w, nll = self.log_weights(x, y, samples=samples, target=target)
            loss = -importance_bound(log_w).mean()
            return functional.ELBOLoss(loss, nll.mean(), (-log_w - nll).mean())
        out = self(x, y, None if samples == 1 else samples)
        return functional.elbo_loss(
            out.recon,
            target.reshape(out.recon.shape[samples != 1 :]),
            out.mu,
            out.logvar,
            std=out.std,
            likelihood=self.likelihood,
            likelihood_parameters=self.learned() or None,
            samples=None if samples == 1 else samples,
            beta=beta,
            free_bits=free_bits,
        )

    def learned(self) -> dict[str, Tensor]:
        """The log variance of the likelihood, where it is learned."""
        return {"logvar": self.recon_logvar} if "variance" in self.config else {}

    def log_weights(
        self, x: Tensor, y: Tensor | None = None, *, samples: int, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log w = log p(x|z) + log p(z) − log q(z|x), and −log p(x|z), of ``samples`` z each: ``[S, B]``.

        The mean of log w is the ELBO, and log of the mean of w over the samples a tighter bound on log p(x) (Burda,
        Grosse, Salakhutdinov 2016, eq. 8).
        """
        q = self.encode(self.as_input(x), y)
        z, noise = functional.reparameterize(q.mu, q.logvar, std=q.std, samples=samples, return_noise=True)
        target = x if target is None else target
        nll = torch.stack([self.nll(recon, target) for recon in self._decode_all(z, y)])
        log_std = 0.5 * q.logvar if q.std is None else q.std.log()  # type: ignore[operator]
        return (0.5 * (noise**2 - z**2) + log_std).sum(-1) - nll, nll

    def draw(self, n: int) -> Tensor:
        """``n`` codes from the prior, ``[n, latent]``."""
        weight = next(self.parameters())
        zeros = torch.zeros(n, self.latent, dtype=weight.dtype, device=weight.device)
        return functional.reparameterize(zeros, zeros)


def importance_bound(log_weights: Tensor) -> Tensor:
    """log of the mean over the samples of w, ``[S, B]`` → ``[B]``."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
