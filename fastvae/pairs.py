"""Sums over pairs, whose tensors ``[B, B, D]`` are never made: the aggregate posterior, Gaussian mixtures, MMD.

Every row of z meets every row of something else: the encoder's own outputs, a mixture's components, draws of the
prior. The kernels go through the pairs tile by tile and keep a running log-sum-exp (or sum), as attention does; the
backward computes the pairs again. Memory is that of the inputs, O(B·D).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, checks
from .autograd import Gradients, Op
from .kernels.reference import pairs as reference

SAMPLINGS = ("weighted", "stratified")
KERNELS = ("rbf", "imq")


def aggregate_posterior(
    z: Tensor, mu: Tensor, logvar: Tensor, *, dataset_size: int | None = None, sampling: str = "weighted"
) -> tuple[Tensor, Tensor]:
    """Log q(z) and log ∏ q(z_d) of each row of z, where q(z) = Σ_j w_j N(z; mu_j, σ_j²) is over a minibatch.

    log q(z_i) = log Σ_j w_ij ∏_d N(z_id; mu_jd, σ_jd²), log ∏_d q(z_id) = Σ_d log Σ_j w_ij N(z_id; mu_jd, σ_jd²).
    Source: Chen et al. 2018 (β-TCVAE), eq. 5 and appendix C. Their difference is the total correlation.

    The weights, for M rows of mu from a data set of N = ``dataset_size``:

    * without ``dataset_size``, 1/M: the rows are all there is;
    * ``"weighted"``, 1/(N·M): minibatch weighted sampling, a lower bound (appendix C.1);
    * ``"stratified"``, 1/N at j = i, (N − M + 1)/(N·(M − 1)) at j = i + 1 (cyclic), 1/(M − 1) elsewhere: minibatch
      stratified sampling, unbiased in q(z) (appendix C.2). The code published with the paper puts the first two
      weights into the first two columns, whatever i is; here they are where the paper has them.

    Args:
        z: where the densities are taken, ``[B, *latent]``; as a rule a sample of each q(z|x).
        mu: means of the q(z|x), ``[M, *latent]``.
        logvar: their log σ², as ``mu``.
        dataset_size: N, at least M.
        sampling: ``"weighted"`` or ``"stratified"``; the latter needs ``dataset_size``, M = B, and at least 2 rows.

    Returns:
        ``(log_qz, log_prod_qz)``, each ``[B]``, nats; float64 for float64 inputs, else float32. Both are
        differentiable in z, mu and logvar.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``dataset_size`` not an int.
        ValueError: there are no rows, or shapes, devices, sizes or ``sampling`` do not fit.

    β-TCVAE's KL is log q(z|x) − log p(z), in three parts of which the total correlation weighs β:

    >>> import torch, fastvae
    >>> mu, logvar = torch.zeros(64, 10, requires_grad=True), torch.zeros(64, 10, requires_grad=True)
    >>> z = fastvae.reparameterize(mu, logvar, seed=0)
    >>> log_qz, log_prod_qz = fastvae.aggregate_posterior(z, mu, logvar)
    >>> total_correlation = (log_qz - log_prod_qz).mean()  # 0: all examples have one posterior, and it is factorised
    >>> total_correlation.backward()
    >>> abs(total_correlation.item()) < 1e-4
    True
    """
    rows = _rows("z", z)
    mu, logvar = _components("mu", mu, "logvar", logvar, "z", z)
    own, beside, base = _sampling(sampling, dataset_size, len(z), len(mu))
    tensors = _one_dtype(rows, mu, logvar)
    log_qz, log_prod_qz = autograd.apply(AGGREGATE_POSTERIOR, tensors, (own, beside, _keep(*tensors)))[:2]
    return log_qz + base, log_prod_qz + rows.shape[1] * base


def gaussian_mixture_log_prob(z: Tensor, means: Tensor, logvars: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Log p(z) of a mixture of K diagonal Gaussians: log Σ_k w_k ∏_d N(z_d; means_kd, exp(logvars_kd)).

    With the encoder's outputs for K pseudo-inputs it is the VampPrior (Tomczak & Welling 2018, eq. 9); with learned
    means and log variances the prior of VaDE (Jiang et al. 2017, eq. 4).

    Args:
        z: ``[*batch, *latent]``.
        means: ``[K, *latent]``.
        logvars: log σ² of each component, as ``means``.
        log_weights: log w, ``[K]``, taken as they are: for logits give ``logits.log_softmax(0)``. −inf switches a
            component off. None: 1/K each.

    Returns:
        nats, ``[*batch]``; float64 for float64 inputs, else float32. Differentiable in all four.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: z or the mixture is empty, or shapes or devices do not fit.

    >>> import torch, fastvae
    >>> means, logvars = torch.tensor([[-2.0], [2.0]]), torch.zeros(2, 1)
    >>> fastvae.gaussian_mixture_log_prob(torch.tensor([[2.0], [0.0]]), means, logvars)
    tensor([-1.6118, -2.9189])
    """
    checks.tensor("means", means)
    batch = checks.tensor("z", z).dim() - means.dim() + 1
    if batch < 1 or z.shape[batch:] != means.shape[1:]:
        raise ValueError(
            f"means must be [K, *latent] for z of [*batch, *latent], got {list(means.shape)} for {list(z.shape)}"
        )
    shape = z.shape[:batch]
    rows = _rows("z", z.reshape(math.prod(shape), *z.shape[batch:]), z)
    means, logvars = _components("means", means, "logvars", logvars, "z", z)
    base = 0.0
    if log_weights is None:
        base = -math.log(len(means))
    else:
        checks.tensor("log_weights", log_weights)
        if log_weights.shape != (len(means),):
            raise ValueError(f"log_weights must be [{len(means)}], one a component, got {list(log_weights.shape)}")
        if log_weights.device != z.device:
            raise ValueError(f"log_weights must be on the device of z, {z.device}, got {log_weights.device}")
    tensors = (*_one_dtype(rows, means, logvars), log_weights)
    return (autograd.apply(MIXTURE, tensors, (_keep(*tensors),))[0] + base).reshape(shape)


def mmd(
    z: Tensor,
    prior_z: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] | None = None,
    unbiased: bool = False,
) -> Tensor:
    """Squared maximum mean discrepancy of two samples: mean k(z, z') + mean k(p, p') − 2·mean k(z, p).

    ``"rbf"``: k = exp(−‖x − y‖²/C), ``"imq"``: k = C/(C + ‖x − y‖²), with C = 2·bandwidth². Source: Gretton et al.
    2012, eq. 5 (biased: all pairs, never negative) and eq. 3 (unbiased: without the pairs of a sample with itself,
    which may come out below 0). InfoVAE (Zhao et al. 2017) and WAE (Tolstikhin et al. 2018, who recommend ``"imq"``)
    add λ times it to the reconstruction.

    Args:
        z: a sample of the aggregate posterior, ``[B, *latent]``.
        prior_z: a sample of the prior, ``[M, *latent]``.
        kernel: ``"rbf"`` or ``"imq"``.
        bandwidth: σ of the kernel, in the units of z; several are several kernels, added up. None: √D, so that C = 2·D
            is the mean ‖x − y‖² of two draws of N(0, I) in D dimensions, which is Tolstikhin's.
        unbiased: which estimate; the unbiased one needs two rows of each sample.

    Returns:
        a scalar without unit; float64 for float64 inputs, else float32. Differentiable in both samples.

    Raises:
        TypeError: a sample is not a floating-point tensor, or ``bandwidth`` not a number.
        ValueError: a sample is too small, or shapes, devices, ``kernel`` or ``bandwidth`` do not fit.

    >>> import torch, fastvae
    >>> z, prior_z = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    >>> fastvae.mmd(z, prior_z, kernel="imq", bandwidth=1.0)  # C = 2: 1 + (1 + 1/3)/2 - 2·(1 + 1/3)/2
    tensor(0.3333)
    """
    x, y = _rows("z", z), _rows("prior_z", prior_z)
    _same_latent("prior_z", prior_z, "z", z)
    kernel = kernel_of(kernel)
    scales = kernel_scales(bandwidth, x.shape[1])
    for name, value in (("z", z), ("prior_z", prior_z)):
        if unbiased and len(value) < 2:
            raise ValueError(f"{name} must have at least 2 rows for the unbiased estimate, got {list(value.shape)}")
    return autograd.apply(MMD, _one_dtype(x, y), (kernel, scales, bool(unbiased)))[0]


def kernel_of(value: object) -> str:
    """``value`` if it is a kernel."""
    if value not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, KERNELS))}, got {value!r}")
    return str(value)


def kernel_scales(bandwidth: object, dimensions: int = 1) -> list[float]:
    """C = 2σ² of each bandwidth; √``dimensions`` if there is none."""
    if bandwidth is None:
        return [2.0 * dimensions]
    if isinstance(bandwidth, (str, Tensor)) or not isinstance(bandwidth, Sequence):
        return [2.0 * checks.number("bandwidth", bandwidth, 1e-15, 1e15) ** 2]
    if not bandwidth:
        raise ValueError("bandwidth must be a number or several, got none")
    return [2.0 * checks.number(f"bandwidth[{k}]", each, 1e-15, 1e15) ** 2 for k, each in enumerate(bandwidth)]


def _rows(name: str, value: Tensor, whole: Tensor | None = None) -> Tensor:
    """``value`` as ``[B, D]``, if there is anything in it; ``whole`` is what the user gave."""
    checks.tensor(name, value)
    if not value.numel():
        given = list((value if whole is None else whole).shape)
        raise ValueError(f"{name} must have at least one row and one latent dimension, got {given}")
    return value.reshape(len(value), -1)


def _same_latent(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape[1:] != other.shape[1:]:
        raise ValueError(
            f"{name} must have the latent shape of {other_name}, {list(other.shape[1:])}, got {list(value.shape[1:])}"
        )
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def _components(
    mean_name: str, mean: Tensor, logvar_name: str, logvar: Tensor, other_name: str, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Means and log variances as ``[N, D]``."""
    rows = _rows(mean_name, mean)
    latent = other[(0,) * (other.dim() - mean.dim())] if other.dim() > mean.dim() else other
    _same_latent(mean_name, mean, other_name, latent)
    checks.same_place(mean_name, mean, logvar_name, checks.tensor(logvar_name, logvar))
    return rows, _rows(logvar_name, logvar)


def sampling_of(value: object) -> str:
    """``value`` if it is a way of sampling a minibatch."""
    if value not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {value!r}")
    return str(value)


def dataset_size_of(value: object) -> int | None:
    """``value`` if it is a number of examples, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"dataset_size must be an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"dataset_size must be at least 1, got {value}")
    return int(value)


def _sampling(sampling: object, dataset_size: object, rows: int, count: int) -> tuple[float, float, float]:
    """Log weight of a row's own component and of the one beside it, relative to the others'; and that of the others."""
    sampling, size = sampling_of(sampling), dataset_size_of(dataset_size)
    if size is not None and size < count:
        raise ValueError(f"dataset_size must be at least the rows of mu, {count}, got {size}")
    if sampling == "weighted":
        return 0.0, 0.0, -math.log(count if size is None else size * count)
    if size is None:
        raise ValueError("sampling 'stratified' needs dataset_size, got None")
    if rows != count or count < 2:
        raise ValueError(f"sampling 'stratified' needs as many rows of mu as of z, at least 2, got {count} and {rows}")
    others = count - 1
    return math.log(others / size), math.log((size - others) / size), -math.log(others)


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _keep(*tensors: Tensor | None) -> bool:
    """Whether a backward may come, which wants the sums again."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _kept(ctx: Any, again: bool, saved: Gradients, inputs: int, count: int) -> Gradients:
    """The sums the forward left; none where the backward will be differentiated: they are not part of that graph."""
    if again:
        return (None,) * count
    return tuple(saved[inputs:] or ctx.gradient) or (None,) * count


def _of_aggregate(ctx: Any, primitives: Any, again: bool, saved: Gradients, grads: Gradients) -> Gradients:
    grad_qz, grad_prod = grads[:2]
    if grad_qz is None and grad_prod is None:
        return ()
    options = {name: ctx.options[name] for name in ("own", "beside")}
    kept = _kept(ctx, again, saved, 3, 2)
    return tuple(primitives.aggregate_posterior_backward(grad_qz, grad_prod, *saved[:3], *kept, **options))


def _of_mixture(ctx: Any, primitives: Any, again: bool, saved: Gradients, grads: Gradients) -> Gradients:
    if grads[0] is None:
        return ()
    return tuple(primitives.mixture_backward(grads[0], *saved[:4], *_kept(ctx, again, saved, 4, 1)))


def _of_mmd(ctx: Any, primitives: Any, again: bool, saved: Gradients, grads: Gradients) -> Gradients:
    if grads[0] is None:
        return ()
    return tuple(primitives.mmd_backward(grads[0], *saved[:2], **ctx.options, of_y=ctx.needs_input_grad[1]))


def _expression(function: Any) -> Any:
    return lambda *tensors, **options: tuple(function(*tensors, **options))


AGGREGATE_POSTERIOR = autograd.register(
    Op(  # (z, mu, logvar) → log q(z), log ∏ q(z_d)
        "aggregate_posterior_forward",
        3,
        ("own", "beside", "keep"),
        2,
        _of_aggregate,
        _expression(reference.aggregate_posterior_forward),
    )
)
MIXTURE = autograd.register(
    Op(  # (z, means, logvars, log_weights) → log p(z)
        "mixture_forward", 4, ("keep",), 1, _of_mixture, _expression(reference.mixture_forward)
    )
)
MMD = autograd.register(
    Op(  # (z, prior_z) → MMD²
        "mmd_forward", 2, ("family", "scales", "unbiased"), 1, _of_mmd, _expression(reference.mmd_forward)
    )
)
