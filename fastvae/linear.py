"""A linear layer and the loss of its outputs, a chunk of examples at a time: the outputs are never held whole.

Matrix products are torch's (cuBLAS, MKL, …), the loss of a chunk is one pass of the kernels, and the gradients of the
products follow while the chunk is in cache. Triton has a kernel of its own for the first product and the loss. Where
the loss will be scaled by one number, the forward makes all gradients, as :mod:`fastvae.autograd` does; otherwise the
backward computes the chunk again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, ops, registry
from .kernels import reference
from .kernels.layout import TOTAL_REDUCTIONS, accumulator, reduction_weight

#: bytes of a chunk's outputs: what a core's cache holds beside its operands; enough work for a whole GPU
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}

Term = dict[str, Any]  # likelihood, parameter, reduction


def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, term: Term, chunk: int | None) -> Tensor:
    """The loss of ``target`` given ``hidden @ weight.T + bias``; ``chunk`` examples at a time."""
    tensors = [t for t in (hidden, weight, bias, target) if t is not None]
    # where others look on, or there is nothing to cut, two operations they know
    if (
        ops.listened_to()
        or target.requires_grad
        or not target.numel()
        or not hidden.numel()
        or ops.primitives(*tensors) is ops.OPERATORS
    ):
        return composed(hidden, weight, bias, target, term)
    size = chunk or chunk_of(target, hidden.dtype)
    return _Linear.apply(hidden, weight, bias, target, term, size)  # type: ignore[no-any-return, no-untyped-call]


def chunk_of(target: Tensor, dtype: torch.dtype) -> int:
    """Examples in a chunk, unless it is given."""
    example = target[0].numel() * dtype.itemsize
    return max(1, CHUNK_BYTES.get(target.device.type, CHUNK_BYTES["cuda"]) // example)


def composed(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, term: Term) -> Tensor:
    """The same in two operations."""
    recon, reduction = F.linear(hidden, weight, bias), term["reduction"]
    options = (term["likelihood"], term["parameter"], reduction, autograd.one_pass(recon, reduction))
    return autograd.apply(autograd.RECONSTRUCTION, (recon, target, None, None, None), options)[0]


class _Sums:
    """The gradients of hidden, weight and bias, those that are needed, over the chunks; all times ``factor``.

    In half precision the sums of products are kept in float32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...], factor: float):
        wide = accumulator(weight.dtype)
        self.factor, self.weight, self.dtype = factor, weight, weight.dtype
        self.of_hidden = hidden.new_empty(hidden.shape) if needed[0] else None
        self.of_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, gradient: Tensor, hidden: Tensor, at: slice) -> None:
        """``gradient`` is that of the outputs of the examples ``at``, whose inputs are ``hidden``."""
        rows, inputs = gradient.flatten(0, -2), hidden.flatten(0, -2)
        if self.of_hidden is not None:
            out = self.of_hidden[at].view(inputs.shape)
            torch.addmm(out, rows, self.weight, beta=0, alpha=self.factor, out=out)
        if self.of_weight is not None and self.of_weight.dtype == self.dtype:
            self.of_weight.addmm_(rows.t(), inputs, alpha=self.factor)
        elif self.of_weight is not None:
            self.of_weight.add_(rows.t() @ inputs, alpha=self.factor)
        if self.of_bias is not None:
            self.of_bias.add_(rows.sum(0, dtype=self.of_bias.dtype), alpha=self.factor)

    def tensors(self) -> list[Tensor | None]:
        return [self.of_hidden, self.of_weight, self.of_bias]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, term: Term, size: int
    ) -> Tensor:
        reduction = term["reduction"]
        primitives, total = ops.primitives(hidden, weight, bias, target), reduction in TOTAL_REDUCTIONS
        factor = reduction_weight(reduction, target)
        needed = ctx.needs_input_grad[:3]
        # as autograd.one_pass: in float16 what a GradScaler multiplies by would come too late
        one_pass = total and any(needed) and hidden.dtype != torch.float16
        sums = _Sums(hidden, weight, bias, needed, factor) if one_pass else None
        options = {**term, "reduction": "sum" if total else reduction, "with_gradient": one_pass}
        losses = []
        for at in _slices(len(hidden), size):
            nll, *gradient = _scored(primitives, hidden[at], weight, bias, target[at], options)
            losses.append(nll)
            if sums is not None:
                sums.add(gradient[0], hidden[at], at)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.term, ctx.size, ctx.factor, ctx.backend = term, size, factor, registry.asked_for()
        ctx.kept = None if sums is None else sums.tensors()
        if not total:
            return torch.cat(losses)
        return (torch.stack(losses).sum(dtype=torch.float64) * factor).to(losses[0].dtype)

    @staticmethod
    def backward(ctx, grad: Tensor | None):  # type: ignore[no-untyped-def, override]
        if grad is None:
            return (None,) * 6
        hidden, weight, bias, target = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or ops.listened_to() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return *_differentiable(grad, hidden, weight, bias, target, ctx.term, needed), None, None, None
        with registry.use(ctx.backend):
            primitives, kept = ops.primitives(hidden, weight, bias, target), ctx.kept
            ctx.kept = None  # handed over; a second backward computes its own
            total = ctx.term["reduction"] in TOTAL_REDUCTIONS
            if kept is None:
                upstream = torch.ones_like(grad) if total else grad
                kept = _again(primitives, upstream, hidden, weight, bias, target, ctx, needed)
            for gradient in kept if total else ():
                if gradient is not None:
                    primitives.rescale_(gradient, grad)
        # the sums of half-precision products are float32
        gradients = [None if g is None else g.to(hidden.dtype) for g in kept]
        return *gradients, None, None, None


def _scored(
    primitives: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Term
) -> list[Tensor]:
    """The loss of a chunk, and its gradient in the outputs: by the backend's own kernel where it has one for these."""
    own = getattr(primitives, "linear_forward", None)
    found: list[Tensor] | None = own(hidden, weight, bias, target, **options) if own else None
    return found or primitives.reconstruction_forward(F.linear(hidden, weight, bias), target, **options)


def _again(
    primitives: Any, upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ctx: Any,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients for ``upstream``, 0-d or by example: each chunk is computed again."""
    sums = _Sums(hidden, weight, bias, needed, ctx.factor)
    options = {**ctx.term, "reduction": "example" if upstream.dim() else "sum"}
    for at in _slices(len(hidden), ctx.size):
        recon = F.linear(hidden[at], weight, bias)
        part = upstream[at] if upstream.dim() else upstream
        (gradient,) = primitives.reconstruction_backward(part, recon, target[at], **options)
        sums.add(gradient, hidden[at], at)
    return sums.tensors()


def _differentiable(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, term: Term,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients as an expression, for ``create_graph=True`` and for vmap: whole, not in chunks."""
    recon = F.linear(hidden, weight, bias)
    (gradient,) = reference.reconstruction_backward(grad, recon, target, **term)
    rows = gradient.reshape(-1, gradient.shape[-1])
    return [
        gradient @ weight if needed[0] else None,
        rows.t() @ hidden.reshape(-1, hidden.shape[-1]) if needed[1] else None,
        rows.sum(0) if bias is not None and needed[2] else None,
    ]
