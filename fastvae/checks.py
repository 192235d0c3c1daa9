"""Argument checks of the public functions: every error names the argument, what was expected and what came."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from . import ops
from .kernels.layout import accumulator
from .kernels.likelihoods import LIKELIHOODS, NAMES, OF_COUNTS
from .kernels.reference.latent import STD_EPS

REDUCTIONS = ("none", "example", "sum", "mean", "batchmean")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DATA = (*FLOATS, torch.uint8)
COUNTS = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64)
FREE_BITS = ("element", "example", "dimension")
LARGEST = sys.float_info.max
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def tensor(name: str, value: object) -> Tensor:
    """``value`` if it is a floating-point tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        if type(value).__name__ == "Proxy":
            raise TypeError(
                f"{name} must be a tensor, got a Proxy of torch.fx: call the function as fastvae.NAME, or write "
                "torch.fx.wrap('NAME') in the module that imported it by name; torch.export needs neither"
            )
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {_dtype(value)}")
    if value.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, [B, ...], got a 0-d tensor")
    return value


def target(value: object, recon_name: str, recon: Tensor, likelihood: str) -> Tensor:
    """``value`` if it is data for ``recon``: of its shape and device, floating point or uint8; or counts."""
    if not isinstance(value, Tensor):
        raise TypeError(f"target must be a tensor, got {type(value).__name__}")
    if value.dtype == recon.dtype and value.shape == recon.shape and value.device == recon.device:
        return value  # as most are
    if likelihood in OF_COUNTS:
        if value.dtype in COUNTS:
            value = value.to(accumulator(recon.dtype))
        elif value.dtype not in FLOATS:
            raise TypeError(f"target must be floating point or an integer, got {_dtype(value)}")
    elif value.dtype not in DATA:
        if value.dtype not in (torch.bool, *COUNTS):
            raise TypeError(f"target must be real numbers, got {_dtype(value)}")
        value = value.to(accumulator(recon.dtype))
    if value.shape != recon.shape and value.shape == recon.shape[1:]:
        raise ValueError(
            f"target must have the shape of {recon_name}, {_shape(recon)}, got {_shape(value)}; if {recon_name} holds "
            f"samples of each example, give target.expand_as({recon_name}), or samples= to elbo_loss"
        )
    same_place(recon_name, recon, "target", value)
    dtype = value.dtype
    if dtype in (recon.dtype, torch.uint8) or (dtype == torch.float32 and recon.dtype != torch.float64):
        return value
    return value.to(accumulator(recon.dtype))


def same_place(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both have one shape and one device."""
    if other.shape != value.shape:
        raise ValueError(f"{other_name} must have the shape of {name}, {_shape(value)}, got {_shape(other)}")
    if other.device != value.device:
        raise ValueError(f"{other_name} must be on the device of {name}, {value.device}, got {other.device}")


def scale(
    mu: Tensor,
    logvar: Tensor | None,
    std: Tensor | None,
    log_std: Tensor | None = None,
    std_raw: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """The one that was given as log σ² or σ, in the shape of ``mu``, and whether it is log σ²."""
    if log_std is not None or std_raw is not None:
        return _other_scale(mu, logvar, std, log_std, std_raw)
    if (logvar is None) == (std is None):
        raise ValueError(f"exactly one of logvar and std must be given, got {'neither' if std is None else 'both'}")
    name, given = ("std", std) if logvar is None else ("logvar", logvar)
    return _scale(name, given, mu), std is None


def _other_scale(mu: Tensor, *given: Tensor | None) -> tuple[Tensor, bool]:
    named = [pair for pair in zip(("logvar", "std", "log_std", "std_raw"), given, strict=True) if pair[1] is not None]
    if len(named) != 1:
        names = " and ".join(name for name, _ in named)
        raise ValueError(f"exactly one of logvar, std, log_std and std_raw must be given, got {names}")
    ((name, value),) = named
    checked = _scale(name, value, mu)
    return (2 * checked, True) if name == "log_std" else (torch.nn.functional.softplus(checked), False)


def _scale(name: str, value: object, mu: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        return tensor(name, value)  # raises
    if value.shape == mu.shape and value.device == mu.device:
        return value
    _fits(name, value, "mu", mu)
    return value.expand(mu.shape)


def normal(name: str, value: object) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a distribution, if it is a Normal, or independent ones."""
    base = value.base_dist if isinstance(value, Independent) else value
    if not isinstance(base, Normal):
        raise TypeError(f"{name} must be a Normal, or an Independent of one, got {_type(base)}")
    return base.loc, base.scale


def exact_std(std_eps: object, scale: Tensor, log_scale: bool) -> tuple[Tensor, bool]:
    """The scale as log σ² where it is σ and nothing shall be added to σ² in the logarithm."""
    if std_eps is None:
        return scale, log_scale
    if log_scale:
        raise ValueError("std_eps is what gaussian_kl adds to std², got logvar")
    if std_eps != 0 and std_eps != STD_EPS:
        raise ValueError(f"std_eps must be {STD_EPS:g}, which is the default, or 0, got {std_eps!s:.40}")
    if std_eps:
        return scale, log_scale
    return 2 * scale.to(accumulator(scale.dtype)).log(), True


def logvar_clamp(value: object, log_scale: bool = True) -> tuple[float, float]:
    """``value`` as the bounds of logvar; infinite ones for None."""
    if value is None:
        return -math.inf, math.inf
    if not log_scale:
        raise ValueError("logvar_clamp bounds logvar (or 2·log_std), got std: clamp that yourself")
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"logvar_clamp must be a pair of numbers (low, high), got {value!s:.40}")
    low, high = (_bound(f"logvar_clamp[{k}]", bound) for k, bound in enumerate(value))
    if low > high:
        raise ValueError(f"logvar_clamp must be (low, high) with low <= high, got ({low:g}, {high:g})")
    return low, high


def _bound(name: str, value: object) -> float:
    if value in (-math.inf, math.inf):
        return float(value)  # type: ignore[arg-type]
    return number(name, value, -LARGEST_FLOAT32, LARGEST_FLOAT32)


def prior(mu: Tensor, prior_mu: object, prior_logvar: object, prior_std: object = None) -> tuple[Any, Any]:
    """Mean and log variance, as tensors that broadcast to ``mu``, or neither."""
    if prior_mu is None and prior_logvar is None and prior_std is None:
        return None, None
    if prior_logvar is not None and prior_std is not None:
        raise ValueError("at most one of prior_logvar and prior_std may be given, got both")
    if prior_mu is None or (prior_logvar is None and prior_std is None):
        missing = "prior_mu" if prior_mu is None else "prior_logvar or prior_std"
        raise ValueError(f"prior_mu and prior_logvar (or prior_std) come together, got no {missing}")
    prior_mu = _prior("prior_mu", prior_mu, mu)
    if prior_std is None:
        return prior_mu, _prior("prior_logvar", prior_logvar, mu)
    prior_std = _prior("prior_std", prior_std, mu)
    return prior_mu, 2 * prior_std.to(accumulator(prior_std.dtype)).log()


def _prior(name: str, value: object, mu: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number or a floating-point tensor, got {_type(value)}")
        low = 0 if name == "prior_std" else -LARGEST
        return mu.new_full((), number(name, value, low, above=name == "prior_std"))
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a number or a floating-point tensor, got one of {_dtype(value)}")
    _fits(name, value, "mu", mu)
    return value


def _fits(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``value`` is on the device of ``other`` and broadcasts to its shape."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")
    if value.shape != other.shape and not _broadcasts(value, other):
        raise ValueError(f"{name} must broadcast to the shape of {other_name}, {_shape(other)}, got {_shape(value)}")


def _broadcasts(value: Tensor, to: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(value.shape, to.shape) == to.shape
    except RuntimeError:
        return False


def one_dtype(
    mu: Tensor, scale: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All of them in the dtype they promote to; the prior also in the shape of ``mu``.

    The prior is broadcast last, so that its gradient is summed in the wider dtype and rounded once.
    """
    if prior_mu is None and mu.dtype == scale.dtype:
        return mu, scale, None, None
    dtype = torch.promote_types(mu.dtype, scale.dtype)
    if prior_mu is None or prior_logvar is None:
        return mu.to(dtype), scale.to(dtype), None, None
    dtype = torch.promote_types(dtype, torch.promote_types(prior_mu.dtype, prior_logvar.dtype))
    prior_mu, prior_logvar = (value.to(dtype).expand(mu.shape) for value in (prior_mu, prior_logvar))
    return mu.to(dtype), scale.to(dtype), prior_mu, prior_logvar


def reduction(value: object, allowed: tuple[str, ...] = REDUCTIONS) -> str:
    """``value`` if it is a reduction."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reduction must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
    return str(value)


def weight(name: str, value: object, recon: Tensor) -> Tensor:
    """``value`` if it is a weight of elements: floating point, or a mask, of a shape that broadcasts to ``recon``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_type(value)}")
    if value.dtype not in (*FLOATS, *((torch.bool,) if name == "weight" else ())):
        mask = ", or bool for a mask" if name == "weight" else ""
        raise TypeError(f"{name} must be floating point{mask}, got {_dtype(value)}")
    _fits(name, value, "the data", recon)
    return value


def group(value: object) -> str:
    """``value`` if it is what free bits are per."""
    if value not in FREE_BITS:
        raise ValueError(f"free_bits_per must be one of {', '.join(map(repr, FREE_BITS))}, got {value!r}")
    return str(value)


def free_bits(value: object, per: object, mu: Tensor, reduction: str) -> float | Tensor:
    """``value`` as nats for each of what ``per`` names: a number, or a tensor that broadcasts to those."""
    per = group(per)
    if per != "element" and reduction == "none":
        raise ValueError(f"reduction must not be 'none' with free bits per {per}, which add elements up first")
    if per == "dimension" and reduction == "example":
        raise ValueError("reduction must not be 'example' with free bits per dimension, which are a batch's")
    if not isinstance(value, Tensor):
        return number("free_bits", value, 0)
    if value.dtype not in FLOATS:
        raise TypeError(f"free_bits must be a number or a floating-point tensor, got one of {_dtype(value)}")
    shape = {"element": mu.shape, "example": mu.shape[:1], "dimension": mu.shape[1:]}[per]
    if value.device != mu.device:
        raise ValueError(f"free_bits must be on the device of mu, {mu.device}, got {value.device}")
    if not _broadcasts(value, mu.new_empty(()).expand(shape)):
        raise ValueError(f"free_bits per {per} must broadcast to {list(shape)}, got {_shape(value)}")
    return value


def number(name: str, value: object, low: float, high: float = LARGEST, *, above: bool = False) -> float:
    """``value`` as a float in [low, high], or above ``low`` if ``above``; NumPy's numbers are numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {_type(value)}")
    if not isinstance(value, (int, float)):
        value = float(value)
    if not (low < value <= high if above else low <= value <= high):  # type: ignore[operator]
        bound = f"> {low:g}" if above else f">= {low:g}"
        limit = "" if high == LARGEST and not value > high else f" and <= {high:g}"  # type: ignore[operator]
        raise ValueError(f"{name} must be {bound}{limit}, got {value!s:.40}")
    return float(value)


def parameter(name: str, value: object, low: float, high: float, recon: Tensor) -> tuple[float, Tensor | None]:
    """``value`` as a number above ``low``, or a tensor that broadcasts to ``recon``; looked at where that is cheap."""
    if not isinstance(value, Tensor):
        return number(name, value, low, high, above=True), None
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be a number or a floating-point tensor, got one of {_dtype(value)}")
    _fits(name, value, "the data", recon)
    looked_at = type(value) in (Tensor, torch.nn.Parameter) and value.is_cpu and low > -math.inf
    if looked_at and not ops.listened_to() and (value <= low).any():
        raise ValueError(f"{name} must be > {low:g}, got {value.min().item():.9g}")
    return 0.0, value


def logits_of_zero(value: object, recon: Tensor) -> Tensor:
    """``value`` in the shape of ``recon`` and the dtype of the arithmetic, if it is a number or broadcasts to that."""
    number, logits = parameter("zero_logits", value, -math.inf, LARGEST, recon)
    dtype = accumulator(recon.dtype)
    if logits is None:
        logits = recon.new_full((), number, dtype=dtype)
    return logits.to(dtype).expand(recon.shape)


def library_size(value: object, scores: Tensor) -> Tensor:
    """``value`` as one number for each example of ``scores``, ``[B]``, in the dtype of the arithmetic."""
    if scores.dim() < 2:
        raise ValueError(f"scores must be [B, *data], which softmax goes over, got {_shape(scores)}")
    batch = scores.shape[0]  # len is a constant to tracers
    if isinstance(value, Tensor) and value.numel() != 1:
        if value.shape[:1] != (batch,) or value.numel() != batch:
            raise ValueError(f"library_size must be one number for each example, [{batch}], got {_shape(value)}")
        value = value.reshape(batch, *(1,) * (scores.dim() - 1))  # by example, whatever dimensions of 1 it came with
    number, sizes = parameter("library_size", value, 0.0, LARGEST, scores)
    if sizes is None:
        return scores.new_full((batch,), number)
    return sizes.to(scores.dtype).reshape(-1).expand(batch).contiguous()


def beta(value: object, name: str = "beta") -> float | Tensor:
    """``value`` as a number of at least 0, or a tensor of one; looked at where that is cheap."""
    if type(value) is float and 0 <= value <= LARGEST:
        return value
    if not isinstance(value, Tensor):
        return number(name, value, 0)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be a number or a floating-point tensor, got one of {_dtype(value)}")
    if value.dim():
        raise ValueError(f"{name} must be a number or a 0-d tensor, got one of shape {_shape(value)}")
    if type(value) is Tensor and value.is_cpu and not ops.listened_to():
        number(name, value.item(), 0)
    return value


def likelihood(value: object, known: tuple[str, ...] = NAMES) -> str:
    """``value`` if it is a likelihood of ``elbo_loss``, or one of those that are ``known``."""
    if value not in known:
        raise ValueError(f"likelihood must be one of {', '.join(map(repr, known))}, got {value!r}")
    return str(value)


def needs_no_parameter(name: str) -> None:
    """Raise if the likelihood has a number that must be given, where none was."""
    number = LIKELIHOODS[name].number
    if number is not None and number.default is None:
        raise ValueError(f"likelihood {name!r} needs its {number.name}: a number or a tensor")


def linear(hidden: Tensor, weight: object, bias: object) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three, in the dtype of autocast if that is on, if ``weight`` and ``bias`` are of a layer for ``hidden``."""
    given = [("weight", weight), *([] if bias is None else [("bias", bias)])]
    for name, value in given:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_type(value)}")
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {_dtype(value)}")
        if value.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {value.device}")
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have a batch dimension and one of features, [B, *, K], got {_shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [M, {hidden.shape[-1]}], as hidden ends with that, got {_shape(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], as weight begins with that, got {_shape(bias)}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, value in given:
        assert isinstance(value, Tensor)
        if value.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {_dtype(hidden)}, got {_dtype(value)}")
    return hidden, weight, bias


def chunk(value: object) -> int | None:
    """``value`` if it is a number of examples, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"chunk must be an int or None, got {_type(value)}")
    if value < 1:
        raise ValueError(f"chunk must be at least 1 example, got {value}")
    return int(value)


def generators(value: object, mu: Tensor) -> Sequence[torch.Generator]:
    """``value`` if it is a generator for each example."""
    assert isinstance(value, (list, tuple))
    if len(value) != len(mu):
        raise ValueError(f"generator must be one, or a list of one for each of {len(mu)} examples, got {len(value)}")
    for each in value:
        if not isinstance(each, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got a list with {_type(each)}")
    return value


def noise(value: object, mu: Tensor, samples: int) -> Tensor:
    """``value`` if it is noise for z."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise TypeError(f"noise must be a floating-point tensor, got {_dtype(value)}")
    if value.device != mu.device:
        raise ValueError(f"noise must be on the device of mu, {mu.device}, got {value.device}")
    shape = [samples, *mu.shape] if samples else list(mu.shape)
    if list(value.shape) != shape:
        raise ValueError(f"noise must have the shape of z, {shape}, got {_shape(value)}")
    return value


def sample_count(value: object) -> int:
    """``samples`` as the primitives take it: 0 for None."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"samples must be an int or None, got {_type(value)}")
    if value < 1:
        raise ValueError(f"samples must be at least 1, or None for one z of the shape of mu, got {value}")
    return int(value)


def samples_of(name: str, value: Tensor, samples: object) -> int:
    """``samples`` if ``value`` has so many, before the batch."""
    count = sample_count(samples)
    if value.dim() < 2 or value.shape[0] != count:
        raise ValueError(f"{name} must be [samples, B, ...] with samples={count}, got {_shape(value)}")
    return count


def _type(value: object) -> str:
    return type(value).__name__


def _shape(value: Tensor) -> str:
    return str(list(value.shape))


def _dtype(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
