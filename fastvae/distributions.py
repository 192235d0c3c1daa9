"""``torch.distributions`` on the fused kernels: ``Normal``, ``Bernoulli``, ``Independent``, subclasses of torch's.

Change the import, and ``rsample``, ``log_prob`` and ``torch.distributions.kl_divergence`` are one pass each, with the
values, gradients, shapes and errors of torch's own. In half precision the sums over an event are float32, and under
autocast so is what is not summed. What the kernels do not compute is computed by torch's formulas: mixed dtypes,
forward-mode differentiation, tensors without an axis, values outside [0, 1] of a Bernoulli that does not validate.
``torch.manual_seed`` gives other samples than torch's, of the same distribution: see :func:`fastvae.reparameterize`.

>>> from torch.distributions import kl_divergence
>>> mu, logvar, logits, x = torch.zeros(8, 20), torch.zeros(8, 20), torch.zeros(8, 784), torch.ones(8, 784)
>>> q, p = Independent(Normal(mu, logvar=logvar), 1), Independent(Normal(0.0, 1.0).expand([20]), 1)
>>> z = q.rsample()
>>> elbo = Independent(Bernoulli(logits=logits), 1).log_prob(x) - kl_divergence(q, p)
>>> elbo.shape, elbo[0]
(torch.Size([8]), tensor(-543.4274))
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor, distributions
from torch.autograd import forward_ad
from torch.distributions import constraints, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all, lazy_property

from .checks import FLOATS
from .functional import bce_with_logits, gaussian_kl, gaussian_nll, reparameterize
from .importance import gaussian_log_prob

__all__ = ["Bernoulli", "Independent", "Normal"]

HALF = (torch.bfloat16, torch.float16)
ENTROPY_OF_A_STANDARD_NORMAL = 1.4189385332046727  # ½·(1 + log 2π)


class Normal(distributions.Normal):
    """N(loc, σ²), as ``torch.distributions.Normal``; ``Normal(loc, logvar=logvar)`` makes no exp and log round trip.

    ``Normal(0.0, 1.0)``, of numbers, is known to be the standard normal: expanded or not, a KL to it reads no prior.

    Args:
        loc: mean: a number or a tensor.
        scale: σ > 0, which broadcasts with ``loc``. Give this or ``logvar``.
        validate_args: see ``torch.distributions.Distribution``.
        logvar: log σ² instead. ``scale`` is then computed when it is asked for.

    Raises:
        TypeError: ``loc`` or what is given of the others is neither a number nor a tensor.
        ValueError: not exactly one of ``scale`` and ``logvar`` is given, or a parameter is invalid.

    Source: the KL of :func:`fastvae.gaussian_kl`, the density of :func:`fastvae.gaussian_log_prob`.

    >>> Normal(torch.zeros(2, 3), logvar=torch.zeros(2, 3)).log_prob(torch.zeros(2, 3))[0, 0]
    tensor(-0.9189)
    """

    arg_constraints = {  # noqa: RUF012  (torch's is one, too)
        "loc": constraints.real,
        "scale": constraints.positive,
        "logvar": constraints.real,
    }
    _is_standard: bool
    _by_logvar: bool

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float | None = None,
        validate_args: bool | None = None,
        *,
        logvar: Tensor | float | None = None,
    ):
        if (scale is None) == (logvar is None):
            came = "neither" if scale is None else "both"
            raise ValueError(f"exactly one of scale and logvar must be given, got {came}")
        self._by_logvar = scale is None
        given: Any = logvar if scale is None else scale
        numbers = isinstance(loc, Number) and isinstance(given, Number)
        self._is_standard = bool(numbers and loc == 0 and given == (0 if scale is None else 1))
        self.loc, spread = broadcast_all(loc, given)
        setattr(self, "logvar" if scale is None else "scale", spread)
        shape = torch.Size() if numbers else self.loc.shape
        looks = (_has_no_nan, self.loc), (_has_no_nan if scale is None else _is_positive, spread)
        _init(self, validate_args, *(() if self._is_standard else looks), batch_shape=shape)

    @lazy_property
    def scale(self) -> Tensor:  # type: ignore[override]
        """σ."""
        return torch.exp(0.5 * self.logvar)

    @lazy_property
    def logvar(self) -> Tensor:
        """Log σ²."""
        return 2 * self.scale.log()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """As torch's; what was given stays what is given."""
        new = self._get_checked_instance(Normal, _instance)
        shape = torch.Size(batch_shape)
        for name in ("loc", "scale", "logvar"):
            if name in self.__dict__:
                setattr(new, name, getattr(self, name).expand(shape))
        new._by_logvar, new._is_standard = self._by_logvar, self._is_standard
        distributions.Distribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """:meth:`rsample` without a gradient: the same numbers from the same seed."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw loc + σ·ε, ``[*sample_shape, *batch_shape]``, differentiably, with the noise of fastvae."""
        shape = self._extended_shape(sample_shape)
        if not shape.numel() or not _fit(self.loc, self.logvar if self._by_logvar else self.scale):
            return super().rsample(sample_shape)
        several = len(shape) > self.loc.dim()
        logvar, std = (self.logvar, None) if self._by_logvar else (None, self.scale)
        count = shape.numel() // self.loc.numel() if several else None
        z = reparameterize(self.loc, logvar, std=std, samples=count)
        return z.reshape(shape) if several else z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``value``, in nats."""
        return self._log_prob(value, 0)

    def _log_prob(self, value: Tensor, events: int) -> Tensor:
        """Summed over the last ``events`` axes of the distribution."""
        if self._validate_args:
            self._validate_sample(value)
        if not _fit(self.loc, value, self.logvar):
            return _summed(super().log_prob(value), events)
        if not events:
            value, loc, logvar = _as_autocast(*_broadcast(value, self.loc, self.logvar))
            return -gaussian_nll(loc, value, logvar=logvar, reduction="none")
        samples, shape = value.shape[: value.dim() - self.loc.dim()], self.loc.shape
        if value.shape[len(samples) :] == shape and value.dim() > self.loc.dim():  # one loc for several values
            batch = shape[: len(shape) - events]
            loc, logvar = (_by_example(tensor, events) for tensor in (self.loc, self.logvar))
            found = gaussian_log_prob(value.reshape(-1, *loc.shape), loc, logvar, samples=samples.numel())
            return _wide(found.reshape(*samples, *batch))
        value, loc, logvar = _broadcast(value, self.loc, self.logvar)
        of_rows = gaussian_log_prob(*(_by_example(tensor, events) for tensor in (value, loc, logvar)))
        return _wide(of_rows.reshape(loc.shape[: loc.dim() - events]))

    def entropy(self) -> Tensor:
        """½·(1 + log 2π + log σ²), in nats."""
        return ENTROPY_OF_A_STANDARD_NORMAL + 0.5 * self.logvar

    def _validate_sample(self, value: Tensor) -> None:
        if not (_is_plain(value, self._batch_shape) and _has_no_nan(value)):
            super()._validate_sample(value)


class Bernoulli(distributions.Bernoulli):
    """Bernoulli of logits (or of probabilities), as ``torch.distributions.Bernoulli``.

    Args:
        probs: probabilities of 1, a number or a tensor, whose logits are computed as in torch. Give this or ``logits``.
        logits: log odds of 1.
        validate_args: see ``torch.distributions.Distribution``. Without it values between 0 and 1 are welcome, too.

    Raises:
        ValueError: not exactly one of ``probs`` and ``logits`` is given, or a parameter is invalid.

    Source: the log-probability is that of :func:`fastvae.bce_with_logits`.

    >>> Bernoulli(logits=torch.zeros(1, 2)).log_prob(torch.ones(1, 2))
    tensor([[-0.6931, -0.6931]])
    """

    def __init__(self, probs: Any = None, logits: Any = None, validate_args: bool | None = None):
        if probs is None and isinstance(logits, Tensor):
            self.logits = self._param = logits
            _init(self, validate_args, (_has_no_nan, logits), batch_shape=logits.shape)
        else:
            super().__init__(probs, logits, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """As torch's."""
        return super().expand(batch_shape, self._get_checked_instance(Bernoulli, _instance))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of ``value``, in nats."""
        return self._log_prob(value, 0)

    def _log_prob(self, value: Tensor, events: int) -> Tensor:
        """Summed over the last ``events`` axes of the distribution."""
        if self._validate_args:
            self._validate_sample(value)
        if _fit(self.logits, value):
            logits, x = _broadcast(self.logits, value)
            shape = logits.shape[: logits.dim() - events]
            try:
                if not events:
                    logits, x = _as_autocast(logits, x)
                    return -bce_with_logits(logits, x, reduction="none")
                logits, x = _by_example(logits, events), _by_example(x, events)
                return -bce_with_logits(logits, x, reduction="example").reshape(shape)
            except ValueError:  # a value outside [0, 1], which torch takes
                pass
        return _summed(super().log_prob(value), events)

    def _validate_sample(self, value: Tensor) -> None:
        if not (_is_plain(value, self._batch_shape) and _is_binary(value)):
            super()._validate_sample(value)


class Independent(distributions.Independent):
    """The last axes of a distribution as one event, as ``torch.distributions.Independent``.

    ``Independent(base_distribution, reinterpreted_batch_ndims)`` sums over as many of the last axes. ``log_prob`` and
    the KL of a ``Normal`` or ``Bernoulli`` of this module are summed by the kernel that computes them. Any other
    distribution may be given, too. A ``ValueError`` says that it has fewer axes.

    >>> Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1).log_prob(torch.zeros(2, 3))
    tensor([-2.7568, -2.7568])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density or log-probability at ``value``, in nats."""
        base, events = self.base_dist, self.reinterpreted_batch_ndims
        if type(base).log_prob in (Normal.log_prob, Bernoulli.log_prob):
            found: Tensor = base._log_prob(value, events)
            return found
        return super().log_prob(value)


@register_kl(Normal, distributions.Normal)
def _kl_of_normals(q: Normal, p: distributions.Normal) -> Tensor:
    return _kl(q, p, 0)


@register_kl(Independent, distributions.Independent)
def _kl_of_independents(q: Independent, p: distributions.Independent) -> Tensor:
    events, normal = q.reinterpreted_batch_ndims, isinstance(q.base_dist, Normal)
    if normal and isinstance(p.base_dist, distributions.Normal) and events == p.reinterpreted_batch_ndims:
        return _kl(q.base_dist, p.base_dist, events)
    plain = (distributions.Independent(each.base_dist, each.reinterpreted_batch_ndims, False) for each in (q, p))
    return kl_divergence(*plain)  # torch's, or what replaced it: Pyro's knows more of them


def _kl(q: Normal, p: distributions.Normal, events: int) -> Tensor:
    """KL(q‖p), summed over the last ``events`` axes. Source: Kingma & Welling 2014, appendix B."""
    mu, logvar, standard = q.loc, q.logvar, getattr(p, "_is_standard", False)
    prior = [] if standard else [p.loc, p.logvar if isinstance(p, Normal) else p.scale]
    if not _fit(mu, logvar, *prior):
        plain = (distributions.Normal(each.loc, each.scale, validate_args=False) for each in (q, p))
        return _summed(kl_divergence(*plain), events)
    shape = mu.shape
    if shape[max(0, len(shape) - len(p.batch_shape)) :] != p.batch_shape:
        shape = torch.broadcast_shapes(shape, p.batch_shape)
        mu, logvar = mu.expand(shape), logvar.expand(shape)
    if not events:
        mu, logvar, *prior = _as_autocast(mu, logvar, *prior)
    elif len(shape) != events + 1:
        mu, logvar, *prior = (_by_example(tensor.expand(shape), events) for tensor in (mu, logvar, *prior))
    named: dict[str, Any] = dict(
        zip(("prior_mu", "prior_logvar" if isinstance(p, Normal) else "prior_std"), prior, strict=False)
    )
    if not events:
        return gaussian_kl(mu, logvar, **named, reduction="none")
    kl = gaussian_kl(mu, logvar, **named, reduction="example")
    return kl if len(shape) == events + 1 else kl.reshape(shape[: len(shape) - events])


def _init(
    self: distributions.Distribution,
    validate_args: bool | None,
    *quickly: tuple[Callable[[Tensor], bool], Tensor],
    batch_shape: torch.Size,
) -> None:
    """torch's, without a tensor for each comparison where one look at each parameter says that it is valid.

    ``quickly`` are checks that return False in doubt, each with its parameter.
    """
    asked = self._validate_args if validate_args is None else validate_args
    valid = bool(asked) and all(check(parameter) for check, parameter in quickly)
    distributions.Distribution.__init__(self, batch_shape, validate_args=False if valid else validate_args)
    if valid:
        self._validate_args = True


def _fit(*tensors: Tensor) -> bool:
    """Whether the kernels take them: of one floating dtype, on one device, with an axis and no forward derivative."""
    first, dtype, device = tensors[0], tensors[0].dtype, tensors[0].device
    return (
        first.dim() > 0
        and dtype in FLOATS
        and all(tensor.dtype == dtype and tensor.device == device for tensor in tensors)
        and forward_ad._current_level < 0
    )


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32 under autocast, where half precision is for matrix products."""
    first = tensors[0]
    if first.dtype in HALF and torch.is_autocast_enabled(first.device.type):
        return tuple(tensor.float() for tensor in tensors)
    return tensors


def _wide(sums: Tensor) -> Tensor:
    return sums.float() if sums.dtype in HALF else sums


def _broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    shape = tensors[0].shape
    if all(tensor.shape == shape for tensor in tensors):
        return tensors
    return torch.broadcast_tensors(*tensors)


def _by_example(tensor: Tensor, events: int) -> Tensor:
    """One axis, then those of the event."""
    if tensor.dim() == events + 1:
        return tensor
    batch = tensor.shape[: tensor.dim() - events]
    return tensor.reshape(batch.numel(), *tensor.shape[len(batch) :])


def _summed(elements: Tensor, events: int) -> Tensor:
    return elements.sum(list(range(-events, 0))) if events else elements


def _is_plain(value: Any, shape: torch.Size) -> bool:
    """Whether ``value`` needs no look at its shape, and its numbers can be looked at in one go."""
    return isinstance(value, Tensor) and value.shape == shape and value.is_floating_point() and value.numel() > 0


def _is_positive(values: Tensor) -> bool:
    """True if each element is above 0; NaN is not."""
    return values.numel() > 0 and bool(values.detach().min() > 0)


def _has_no_nan(values: Tensor) -> bool:
    """True if no element is NaN; False if one is, or if infinite ones cancel. One read of the memory, no write."""
    total = values.detach().sum()
    return bool(total == total)


def _is_binary(values: Tensor) -> bool:
    """Whether each element is 0 or 1: x − x² is 0 there alone, and NaN for infinite x."""
    values = values.detach()
    off = torch.addcmul(values, values, values, value=-1)
    return not (bool(off.max()) or bool(off.min()))
