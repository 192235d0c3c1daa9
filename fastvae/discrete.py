"""Discrete data and discrete latents: images of 256 levels, classes of a softmax, their samples.

Reductions and units are those of :mod:`fastvae.functional`. An element is a pixel of all its channels for a mixture,
and all axes but the last for what a softmax goes over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, checks
from .functional import Generators, Parameter, reparameterize
from .kernels.layout import accumulator
from .kernels.reference import mixture as reference
from .kernels.reference import rows as reference_rows

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _rows(
    term: str,
    tensors: tuple[Tensor | None, ...],
    reduction: str,
    *,
    channels: int = 0,
    channels_last: bool = True,
    unimix: float = 0.0,
    balance: float = -1.0,
) -> Tensor:
    first, *others = tensors
    assert first is not None
    floating = [t for t in others if t is not None and t.is_floating_point()]
    options = term, channels, channels_last, unimix, balance, reduction
    with_gradient = autograd.one_pass(first, reduction, *floating)
    padded = (*tensors, *(None,) * (5 - len(tensors)))
    return autograd.apply(autograd.ROWS, padded, (*options, with_gradient))[0]


def _levels(target: object, like: Tensor) -> Tensor:
    """``target`` as kernels take levels: integers, or floats in [0, 1]; they look at its range, so a graph does too."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.device != like.device:
        raise ValueError(f"target must be on the device of the parameters, {like.device}, got {target.device}")
    if target.is_floating_point():
        return target.to(accumulator(like.dtype))
    if target.dtype not in INTEGERS:
        name = str(target.dtype).removeprefix("torch.")
        raise TypeError(f"target must be levels from 0 to 255 in an integer dtype, or floats in [0, 1], got {name}")
    return target


def discretized_logistic_nll(
    mean: Tensor, target: Tensor, *, log_scale: Parameter, reduction: str = "batchmean"
) -> Tensor:
    """Negative log-likelihood of images of 256 levels under a discretised logistic for each element.

    With x = 2k/255 − 1 for level k: −log(σ((x + 1/255 − mean)/s) − σ((x − 1/255 − mean)/s)); level 0 has all the mass
    below, 255 all above. Where the mass is at most 1e-5, the density at x times the width stands for it, and log s
    counts as −7 below that: PixelCNN++'s, whose gradients these are. Source: Salimans et al. 2017, section 2.1; Kingma
    et al. 2016, appendix B, for VAEs.

    Args:
        mean: in units of [−1, 1], ``[B, *data]``.
        target: levels 0 to 255 in an integer dtype, or k/255 in [0, 1], as ``mean``.
        log_scale: log s in units of [−1, 1]: a number, or a tensor that broadcasts to ``mean``.
        reduction: see :mod:`fastvae.functional`.

    Returns:
        nats: elementwise, ``[B]`` or a scalar. Divide nats per element by log 2 for bits per dimension.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: shapes or devices differ, the reduction is not one, or (on a CPU) a target is outside its range.

    >>> x = torch.tensor([[0, 127, 255]], dtype=torch.uint8)
    >>> discretized_logistic_nll(torch.zeros(1, 3), x, log_scale=0.0, reduction="none").round(decimals=2)
    tensor([[1.3100, 6.2300, 1.3100]])
    """
    mean = checks.tensor("mean", mean)
    target, reduction = _levels(target, mean), checks.reduction(reduction)
    checks.same_place("mean", mean, "target", target)
    number, scale = checks.parameter("log_scale", log_scale, -float("inf"), checks.LARGEST, mean)
    if scale is None:
        scale = mean.new_full((), number)
    tensors = mean, scale.to(mean.dtype).expand(mean.shape), target
    if target.requires_grad and torch.is_grad_enabled():  # too rare for a kernel
        options = {"channels": 0, "channels_last": True, "unimix": 0.0, "balance": -1.0}
        return reference_rows.rows_value(*tensors, term="logistic", reduction=reduction, **options)
    return _rows("logistic", tensors, reduction)


def _layout(params: Tensor, target: Tensor) -> tuple[int, bool]:
    """Channels, and whether they are the last axis."""
    if params.dim() == target.dim() and params.dim() > 1:
        fits_first = params.shape[0] == target.shape[0] and params.shape[2:] == target.shape[2:]
        for axis, last, fits in ((-1, True, params.shape[:-1] == target.shape[:-1]), (1, False, fits_first)):
            channels = target.shape[axis]
            if fits and channels in reference.KINDS:
                return channels, _components(params, axis, channels, last)
    raise ValueError(
        "params and target must be [B, *spatial, 10·K] and [B, *spatial, 3], or [B, 10·K, *spatial] and "
        "[B, 3, *spatial] "
        f"(3·K and 1 for one channel), got {list(params.shape)} and {list(target.shape)}"
    )


def _components(params: Tensor, axis: int, channels: int, last: bool) -> bool:
    count, each = params.shape[axis], reference.parameters_of(channels)
    if count == 0 or count % each:
        of = "RGB" if channels == 3 else "one channel"
        raise ValueError(f"params must have {each}·K parameters for each pixel of {of}, K at least 1, got {count}")
    return last


def discretized_logistic_mixture_nll(params: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """Negative log-likelihood of images under a mixture of discretised logistics for each pixel, as in PixelCNN++.

    −log Σ_k π_k ∏_c p_kc(x_c), p_kc the :func:`discretized_logistic_nll` of channel c, where component k's mean of
    green moves by tanh(a_k)·red, and that of blue by tanh(b_k)·red + tanh(c_k)·green. One kernel makes loss and
    gradient in one pass over the parameters. Source: Salimans et al. 2017, sections 2.1 and 2.2; VDVAE and NVAE end in
    it.

    Args:
        params: ``[B, *spatial, 10·K]`` or ``[B, 10·K, *spatial]``, in the order of PixelCNN++: K logits, then for each
            of red, green and blue K means, K log scales, K coefficients. For one channel, 3·K: logits, means, log
            scales.
        target: levels 0 to 255 in an integer dtype, or k/255 in [0, 1]; its layout says that of ``params``:
            ``[B, *spatial, 3]`` or ``[B, 3, *spatial]``, or 1 in place of 3.
        reduction: see :mod:`fastvae.functional`; an element is a pixel.

    Returns:
        nats: ``[B, *spatial]``, ``[B]`` or a scalar. Bits per dimension are nats per example over 3·H·W·log 2.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: shapes or devices do not fit, K or B is 0, the reduction is not one, or (on a CPU) a target is
            outside its range.

    >>> params, x = torch.zeros(2, 8, 8, 100), torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    >>> discretized_logistic_mixture_nll(params, x).shape
    torch.Size([])
    >>> first = discretized_logistic_mixture_nll(params.movedim(-1, 1), x.movedim(-1, 1), reduction="none")
    >>> torch.equal(first, discretized_logistic_mixture_nll(params, x, reduction="none"))
    True
    """
    params = checks.tensor("params", params)
    target, reduction = _levels(target, params), checks.reduction(reduction)
    channels, last = _layout(params, target)
    if not params.shape[0]:
        raise ValueError(f"params must have at least one example, got {list(params.shape)}")
    if not last and params.dim() > 2 and not params.is_contiguous() and params.movedim(1, -1).is_contiguous():
        params, target, last = params.movedim(1, -1), target.movedim(1, -1), True  # channels_last in memory
    if target.requires_grad and torch.is_grad_enabled():  # too rare for a kernel
        options = {"channels": channels, "channels_last": last, "unimix": 0.0, "balance": -1.0}
        return reference_rows.rows_value(params, target, term="logistic_mixture", reduction=reduction, **options)
    return _rows("logistic_mixture", (params, target), reduction, channels=channels, channels_last=last)


def _noise(shape: torch.Size, device: torch.device, generator: Generators | None, seed: int | None) -> Tensor:
    """ε of :func:`fastvae.reparameterize`, float32."""
    zeros = torch.zeros(shape, device=device)
    return reparameterize(zeros, zeros, generator=generator, seed=seed)


def _gumbel(noise: Tensor) -> Tensor:
    """−log(−log Φ(ε)): a Gumbel variable from each normal one."""
    return -torch.log(-torch.special.log_ndtr(noise))


@torch.no_grad()
def discretized_logistic_mixture_sample(
    params: Tensor,
    *,
    channels: int = 3,
    channels_last: bool = True,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Draw images from a mixture of discretised logistics: what :func:`discretized_logistic_mixture_nll` scores.

    A component by Gumbel's maximum, then red, green given red, blue given both, each a logistic variable rounded to its
    level. PixelCNN++ conditions on what is not rounded yet. The noise is that of :func:`fastvae.reparameterize`, so one
    seed gives one image on every device and backend, but for values that rounding decides.

    Args:
        params: ``[B, *spatial, 10·K]``, or ``[B, 10·K, *spatial]`` with ``channels_last=False``; 3·K for one channel.
        channels: 3 or 1.
        channels_last: where the parameters of a pixel are.
        generator: source of the seed; torch's default generator if None.
        seed: a 64-bit int instead.

    Returns:
        Levels, uint8, ``[B, *spatial, channels]`` or ``[B, channels, *spatial]``.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: ``channels`` is neither 3 nor 1, or ``params`` are not 10·K (3·K) a pixel.

    >>> discretized_logistic_mixture_sample(torch.zeros(2, 8, 8, 100), seed=0).shape
    torch.Size([2, 8, 8, 3])
    """
    params = checks.tensor("params", params)
    if channels not in reference.KINDS:
        raise ValueError(f"channels must be 3 or 1, got {channels!s:.40}")
    if params.dim() < 2:
        raise ValueError(f"params must be [B, *spatial, channels] or [B, channels, *spatial], got {list(params.shape)}")
    _components(params, -1 if channels_last else 1, channels, channels_last)
    wide = (params if channels_last else params.movedim(1, -1)).to(accumulator(params.dtype))
    logits, kinds = reference.by_component(wide, channels)
    count = logits.shape[-1]
    noise = _noise(torch.Size((*logits.shape[:-1], count + channels)), params.device, generator, seed).to(wide.dtype)
    chosen = (logits + _gumbel(noise[..., :count])).argmax(-1)[..., None, None]
    of_pixel = [kind.gather(-1, chosen.expand(*kind.shape[:-1], 1)).squeeze(-1) for kind in kinds]
    mean, log_scale = of_pixel[0], of_pixel[1].clamp(min=reference.LOG_SCALE_MIN)
    at = noise[..., count:]
    logistic = log_scale.exp() * (torch.special.log_ndtr(at) - torch.special.log_ndtr(-at))
    levels: list[Tensor] = []
    for channel in range(channels):
        centre = mean[..., channel]
        if channel:
            before = [reference.scaled(level, wide.dtype) for level in levels]
            c = torch.tanh(of_pixel[2])
            centre = centre + (c[..., 0] * before[0] if channel == 1 else c[..., 1] * before[0] + c[..., 2] * before[1])
        x = centre + logistic[..., channel]
        levels.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.stack(levels, -1 if channels_last else 1)


def categorical_nll(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """Negative log-likelihood of classes, −log softmax(logits)[target] over the last axis: ``F.cross_entropy``'s.

    Text and one-hot VAEs end in it. Logits are read once, loss and gradient leave in one pass.

    Args:
        logits: ``[B, *positions, classes]``.
        target: classes, ``[B, *positions]``, of any integer dtype.
        reduction: see :mod:`fastvae.functional`; an element is a position.

    Returns:
        nats: ``[B, *positions]``, ``[B]`` or a scalar.

    Raises:
        TypeError: ``logits`` are not floating point, or ``target`` not integers.
        ValueError: shapes or devices differ, there are no classes, the reduction is not one, or (on a CPU) a target is
            none of the classes.

    >>> categorical_nll(torch.zeros(2, 5, 10), torch.zeros(2, 5, dtype=torch.int64))
    tensor(11.5129)
    """
    logits = checks.tensor("logits", logits)
    reduction = checks.reduction(reduction)
    _classes("logits", logits)
    if not isinstance(target, Tensor) or target.dtype not in INTEGERS:
        got = str(target.dtype).removeprefix("torch.") if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be classes, a tensor of integers, got {got}")
    if target.shape != logits.shape[:-1]:
        wanted, came = list(logits.shape[:-1]), list(target.shape)
        raise ValueError(f"target must have the shape of logits but for the last axis, {wanted}, got {came}")
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of logits, {logits.device}, got {target.device}")
    return _rows("categorical_nll", (logits, target), reduction)


def _classes(name: str, logits: Tensor) -> None:
    if logits.dim() < 2 or not logits.shape[-1]:
        raise ValueError(f"{name} must be [B, *, classes] with at least one class, got {list(logits.shape)}")


def categorical_kl(
    logits_q: Tensor,
    logits_p: Tensor,
    *,
    balance: float | None = None,
    unimix: float = 0.0,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(q‖p) of categorical distributions: Σ q·(log q − log p) over the last axis.

    With ``balance`` α, α·KL(sg(q)‖p) + (1 − α)·KL(q‖sg(p)): the same value, of whose gradient p gets α times and q 1 −
    α times its part. Source: Hafner et al. 2021 (DreamerV2), algorithm 2, where α is 0.8. With ``unimix`` u both are
    (1 − u)·softmax + u/classes: Hafner et al. 2023 (DreamerV3), where u is 0.01. DreamerV3's two losses, each clipped
    at 1 nat, are ``categorical_kl(q.detach(), p, unimix=0.01, reduction="example").clamp(min=1)`` and its mirror image.

    Args:
        logits_q: ``[B, *groups, classes]``.
        logits_p: likewise.
        balance: α in [0, 1], or None for the KL as it is.
        unimix: u in [0, 1].
        reduction: see :mod:`fastvae.functional`; an element is a group.

    Returns:
        nats: ``[B, *groups]``, ``[B]`` or a scalar.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: shapes or devices differ, there are no classes, or a number or the reduction is not one.

    >>> categorical_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]]), balance=0.8)
    tensor(0.4338)
    """
    logits_q, logits_p = checks.tensor("logits_q", logits_q), checks.tensor("logits_p", logits_p)
    reduction = checks.reduction(reduction)
    _classes("logits_q", logits_q)
    checks.same_place("logits_q", logits_q, "logits_p", logits_p)
    dtype = torch.promote_types(logits_q.dtype, logits_p.dtype)
    share = -1.0 if balance is None else checks.number("balance", balance, 0, 1)
    mixed = checks.number("unimix", unimix, 0, 1)
    pair = logits_q.to(dtype), logits_p.to(dtype)
    return _rows("categorical_kl", pair, reduction, unimix=mixed, balance=share)


def _straight_through(one_hot: Tensor, probs: Tensor) -> Tensor:
    """``one_hot`` with the gradient of ``probs``."""
    return one_hot + (probs - probs.detach()) if probs.requires_grad else one_hot


def _one_hot(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(scores, dtype=dtype).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


def straight_through_sample(
    logits: Tensor, *, unimix: float = 0.0, generator: torch.Generator | None = None, seed: int | None = None
) -> Tensor:
    """Draw one-hot vectors from softmax(logits), with the gradient of the probabilities: straight through.

    Source: Bengio et al. 2013; DreamerV2's latents (Hafner et al. 2021, algorithm 1). By Gumbel's maximum over the
    noise of :func:`fastvae.reparameterize`, so one seed gives one sample on every device and backend.

    Args:
        logits: ``[B, *groups, classes]``.
        unimix: of :func:`categorical_kl`.
        generator: source of the seed; torch's default generator if None.
        seed: a 64-bit int instead.

    Returns:
        As ``logits``: one 1 on the last axis.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: there are no classes, or ``unimix`` is not in [0, 1].

    >>> straight_through_sample(torch.tensor([[0.0, 100.0, 0.0]]), seed=0)
    tensor([[0., 1., 0.]])
    """
    logits = checks.tensor("logits", logits)
    _classes("logits", logits)
    mixed = checks.number("unimix", unimix, 0, 1)
    log_probs = reference_rows.log_probs(logits.to(accumulator(logits.dtype)), mixed)
    gumbel = _gumbel(_noise(logits.shape, logits.device, generator, seed)).to(log_probs.dtype)
    one_hot = _one_hot(log_probs.detach() + gumbel, logits.dtype)
    return _straight_through(one_hot, log_probs.exp().to(logits.dtype))


def gumbel_softmax(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """softmax((logits + g)/τ) of Gumbel noise g: a differentiable sample that is one-hot as τ goes to 0.

    Source: Jang et al. 2017; Maddison et al. 2017. As ``F.gumbel_softmax``, with the noise of
    :func:`fastvae.reparameterize`: the sample of a seed is the same on every device and backend.

    Args:
        logits: ``[B, *groups, classes]``.
        temperature: τ > 0.
        hard: one-hot, with the gradient of the soft sample.
        generator: source of the seed; torch's default generator if None.
        seed: a 64-bit int instead.

    Returns:
        As ``logits``, summing to 1 over the last axis.

    Raises:
        TypeError: an argument is not of a type named here.
        ValueError: there are no classes, or ``temperature`` is not positive.

    >>> gumbel_softmax(torch.zeros(2, 5), temperature=0.5, seed=0).sum(-1).round(decimals=4)
    tensor([1., 1.])
    """
    logits = checks.tensor("logits", logits)
    _classes("logits", logits)
    tau = checks.number("temperature", temperature, 0, above=True)
    wide = logits.to(accumulator(logits.dtype))
    gumbel = _gumbel(_noise(logits.shape, logits.device, generator, seed)).to(wide.dtype)
    soft = ((wide + gumbel) / tau).softmax(-1).to(logits.dtype)
    return _straight_through(_one_hot(soft.detach(), logits.dtype), soft) if hard else soft
