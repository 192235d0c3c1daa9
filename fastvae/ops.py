"""The primitives as torch.library operators ``fastvae::…``, each with its fake.

An operator sends plain tensors to the backend that serves them and nothing more: no autograd (that is
``autograd.py``), no argument checks (that is ``functional.py``). Being operators, they are opaque, named nodes for
``torch.compile(fullgraph=True)``, ``torch.export`` and every other tracer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import pair_ops
from .kernels.layout import accumulator, keeps_kl_gradients, loss_dtype, loss_shape
from .kernels.parameters import gradient_dtype
from .kernels.rows import TERMS, value_dtype, value_shape
from .registry import backend_for

_library = torch.library.Library("fastvae", "DEF")

_LATENT = "Tensor mu, Tensor scale, Tensor? seed, Tensor? prior_mu, Tensor? prior_logvar"
_LATENT_OPTIONS = "bool log_scale, float low, float high, int samples, float free_bits, str reduction"
_RECONSTRUCTION = (
    "Tensor recon, Tensor target, Tensor? parameter_tensor=None, Tensor? zero_logits=None, Tensor? library=None"
)
_RECONSTRUCTION_OPTIONS = "str likelihood, float parameter, str reduction"
# the terms of kernels/reference/rows.py
_ROWS = "Tensor a, Tensor b, Tensor? c=None, Tensor? d=None, Tensor? e=None"
_ROWS_OPTIONS = "str term, int channels, bool channels_last, float unimix, float balance"

_SCHEMAS = {
    "latent_forward": f"({_LATENT}, *, {_LATENT_OPTIONS}) -> Tensor[]",
    "latent_backward": f"(Tensor? grad_z, Tensor? grad_kl, {_LATENT}, *, {_LATENT_OPTIONS}) -> Tensor[]",
    "reconstruction_forward": f"({_RECONSTRUCTION}, *, {_RECONSTRUCTION_OPTIONS}, bool with_gradient) -> Tensor[]",
    "reconstruction_backward": f"(Tensor grad_nll, {_RECONSTRUCTION}, *, {_RECONSTRUCTION_OPTIONS}) -> Tensor[]",
    "elbo_forward": "(Tensor recon, Tensor target, Tensor mu, Tensor scale, *, str likelihood, float parameter, "
    "bool log_scale, float low, float high, float beta, float free_bits, str reduction, bool with_gradient) "
    "-> Tensor[]",
    "rows_forward": f"({_ROWS}, *, {_ROWS_OPTIONS}, str reduction, bool with_gradient) -> Tensor[]",
    "rows_backward": f"(Tensor grad, {_ROWS}, *, {_ROWS_OPTIONS}, str reduction) -> Tensor[]",
    "rescale_": "(Tensor(a!) gradient, Tensor upstream) -> ()",
    **pair_ops.SCHEMAS,
}


LARGEST = sys.float_info.max


def _finite(operator: Any) -> Callable[..., list[Tensor]]:
    """Called with finite bounds: AOTInductor cannot read a package with an infinite number in it."""

    def call(*args: Any, low: float, high: float, **options: Any) -> list[Tensor]:
        found: list[Tensor] = operator(*args, low=max(low, -LARGEST), high=min(high, LARGEST), **options)
        return found

    return call


def unbounded(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a primitive, from those of its operator."""
    if options["low"] <= -LARGEST:
        options["low"] = -math.inf
    if options["high"] >= LARGEST:
        options["high"] = math.inf
    return options


def _latent_forward(mu: Tensor, scale: Tensor, *args: Tensor | None, **options: Any) -> list[Tensor]:
    return backend_for(mu.device.type).latent_forward(mu, scale, *args, **unbounded(options))


def _latent_backward(
    grad_z: Tensor | None, grad_kl: Tensor | None, mu: Tensor, *args: Any, **options: Any
) -> list[Tensor]:
    return backend_for(mu.device.type).latent_backward(grad_z, grad_kl, mu, *args, **unbounded(options))


def _reconstruction_forward(recon: Tensor, *args: Tensor | None, **options: Any) -> list[Tensor]:
    return backend_for(recon.device.type).reconstruction_forward(recon, *args, **options)


def _reconstruction_backward(grad_nll: Tensor, recon: Tensor, *args: Tensor | None, **options: Any) -> list[Tensor]:
    return backend_for(recon.device.type).reconstruction_backward(grad_nll, recon, *args, **options)


def _elbo_forward(recon: Tensor, target: Tensor, mu: Tensor, scale: Tensor, **options: Any) -> list[Tensor]:
    """A graph needs to know how many outputs there are: the gradients of β·KL always come where they may."""
    backend, options = backend_for(recon.device.type), unbounded(options)
    outputs: list[Tensor] = backend.elbo_forward(recon, target, mu, scale, **options)
    if len(outputs) == 4 and keeps_kl_gradients(recon, mu, options["reduction"]):
        upstream = mu.new_full((), options["beta"], dtype=accumulator(mu.dtype))
        latent = {name: options[name] for name in ("log_scale", "low", "high", "free_bits", "reduction")}
        outputs += backend.latent_backward(None, upstream, mu, scale, None, None, None, samples=0, **latent)
    return outputs


def _rows_forward(a: Tensor, *args: Tensor | None, **options: Any) -> list[Tensor]:
    return backend_for(a.device.type).rows_forward(a, *args, **options)


def _rows_backward(grad: Tensor, a: Tensor, *args: Tensor | None, **options: Any) -> list[Tensor]:
    return backend_for(a.device.type).rows_backward(grad, a, *args, **options)


def _rescale_(gradient: Tensor, upstream: Tensor) -> None:
    backend_for(gradient.device.type).rescale_(gradient, upstream)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _loss_like(tensor: Tensor, reduction: str) -> Tensor:
    return tensor.new_empty(loss_shape(reduction, tensor), dtype=loss_dtype(reduction, tensor.dtype))


def _latent_forward_fake(
    mu: Tensor, scale: Tensor, seed: Tensor | None, *_: Any, samples: int, reduction: str, **options: Any
) -> list[Tensor]:
    z = [mu.new_empty((samples, *mu.shape) if samples else mu.shape)] if seed is not None else []
    return z + ([_loss_like(mu, reduction)] if reduction else [])


def _latent_backward_fake(
    grad_z: Any, grad_kl: Any, mu: Tensor, scale: Tensor, seed: Any, *priors: Any, **_: Any
) -> list[Tensor]:
    return [_like(t) for t in (mu, scale, *priors) if t is not None]


def _reconstruction_forward_fake(
    recon: Tensor,
    target: Tensor,
    *tensors: Tensor | None,
    reduction: str,
    with_gradient: bool,
    **_: Any,
) -> list[Tensor]:
    return [_loss_like(recon, reduction), *(_gradients_like(recon, *tensors) if with_gradient else [])]


def _reconstruction_backward_fake(
    grad_nll: Tensor, recon: Tensor, target: Tensor, *tensors: Tensor | None, **_: Any
) -> list[Tensor]:
    return _gradients_like(recon, *tensors)


def _gradients_like(
    recon: Tensor,
    parameter_tensor: Tensor | None = None,
    zero_logits: Tensor | None = None,
    library: Tensor | None = None,
) -> list[Tensor]:
    if parameter_tensor is None:
        return [_like(recon)]
    dtype = gradient_dtype(parameter_tensor, recon.shape, accumulator(recon.dtype))
    gradients = [_like(recon), parameter_tensor.new_empty(parameter_tensor.shape, dtype=dtype)]
    return gradients + [_like(tensor) for tensor in (zero_logits, library) if tensor is not None]


def _elbo_forward_fake(
    recon: Tensor, target: Tensor, mu: Tensor, scale: Tensor, *, reduction: str, with_gradient: bool, **_: Any
) -> list[Tensor]:
    gradients = [_like(recon)] if with_gradient else []
    if with_gradient and keeps_kl_gradients(recon, mu, reduction):
        gradients += [_like(mu), _like(scale)]
    return [*(_loss_like(recon, reduction) for _ in range(3)), *gradients]


def _rows_forward_fake(
    *tensors: Tensor | None, term: str, channels_last: bool, reduction: str, with_gradient: bool, **_: Any
) -> list[Tensor]:
    first = tensors[0]
    assert first is not None
    values = first.new_empty(()).expand(value_shape(term, first, channels_last))
    gradients = [t for t in tensors[: TERMS[term].differentiable] if t is not None] if with_gradient else []
    loss = values.new_empty(loss_shape(reduction, values), dtype=value_dtype(term, reduction, first.dtype))
    return [loss, *map(_like, gradients)]


def _rows_backward_fake(grad: Tensor, *tensors: Tensor | None, term: str, **_: Any) -> list[Tensor]:
    return [_like(t) for t in tensors[: TERMS[term].differentiable] if t is not None]


def _rescale_fake(gradient: Tensor, upstream: Tensor) -> None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "latent_forward": (_latent_forward, _latent_forward_fake),
    "latent_backward": (_latent_backward, _latent_backward_fake),
    "reconstruction_forward": (_reconstruction_forward, _reconstruction_forward_fake),
    "reconstruction_backward": (_reconstruction_backward, _reconstruction_backward_fake),
    "elbo_forward": (_elbo_forward, _elbo_forward_fake),
    "rows_forward": (_rows_forward, _rows_forward_fake),
    "rows_backward": (_rows_backward, _rows_backward_fake),
    "rescale_": (_rescale_, _rescale_fake),
    **pair_ops.IMPLEMENTATIONS,
}

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _implementation, _fake = _IMPLEMENTATIONS[_name]
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvae::{_name}", _fake, lib=_library)

BY_NAME: dict[str, Any] = {name: getattr(torch.ops.fastvae, name).default for name in _SCHEMAS}
OPERATORS = SimpleNamespace(
    **{name: _finite(operator) if "low" in _SCHEMAS[name] else operator for name, operator in BY_NAME.items()}
)

dispatch_modes = torch._C._len_torch_dispatch_stack
recorded_by_jit = torch._C._is_tracing
transforms_active = torch._C._are_functorch_transforms_active
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def primitives(*tensors: Tensor | None) -> Any:
    """Where the primitives for such tensors are: in their backend, or the operators where somebody listens to those.

    Tracers, dispatch modes, function transforms and tensor subclasses listen. Others are spared 20 µs of dispatch.
    """
    if dispatch_modes() or transforms_active() or not _PLAIN.issuperset(map(type, tensors)):
        return OPERATORS
    first = tensors[0]
    assert first is not None
    return backend_for("cpu" if first.is_cpu else first.device.type)


def listened_to() -> bool:
    """Whether a compiler, a mode or a transform must see operators, whatever the tensors are."""
    # first: the others cannot be compiled
    return torch.compiler.is_compiling() or bool(dispatch_modes() or transforms_active() or recorded_by_jit())


def leaves_python() -> bool:
    """Whether what is recorded now will run without this library: ``torch.jit.trace``, and every export to ONNX.

    To be asked only where ``recorded_by_jit() or dispatch_modes()``, which cost a plain call no frame.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return recorded_by_jit() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


__all__ = [
    "BY_NAME",
    "OPERATORS",
    "dispatch_modes",
    "leaves_python",
    "listened_to",
    "primitives",
    "recorded_by_jit",
    "transforms_active",
    "unbounded",
]
