"""The reconstruction pair in pure torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_domains
from ..layout import accumulator, loss_dtype, reduction_weight
from ..likelihoods import LIKELIHOODS, zero_inflated_derivatives, zero_inflated_nll
from ..parameters import gradient_dtype


def prepare(recon: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the accumulator's dtype; uint8 becomes x/255."""
    dtype = accumulator(recon.dtype)
    return recon.to(dtype), target.to(dtype) / (1 if target.is_floating_point() else 255)


def by_example(elements: Tensor) -> Tensor:
    """A row for each example; not by ``flatten``, which the older vmap lacks, nor by −1, which needs an element."""
    return elements.reshape(elements.shape[0], elements.shape[1:].numel())


def reduce(elements: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Elementwise terms in accumulator precision to a loss of the ``reduction`` over inputs of ``dtype``."""
    if reduction == "example":
        elements = by_example(elements).sum(dim=1)
    elif reduction != "none":
        elements = elements.sum() * reduction_weight(reduction, elements)
    return elements.to(loss_dtype(reduction, dtype))


def spread(grad_loss: Tensor, reduction: str, like: Tensor) -> Tensor:
    """The upstream gradient of a reduced loss as the gradient of each element of ``like``, in accumulator precision."""
    grad = grad_loss.to(accumulator(like.dtype))
    if reduction == "example":
        return spread_rows(grad, like)
    return grad if reduction == "none" else grad * reduction_weight(reduction, like)


def number_of(parameter: float, parameter_tensor: Tensor | None, like: Tensor) -> float | Tensor:
    """What a likelihood's formulas take last."""
    return parameter if parameter_tensor is None else parameter_tensor.to(accumulator(like.dtype))


def softmax(scores: Tensor) -> Tensor:
    """Over all elements of an example."""
    return by_example(scores).softmax(1).reshape(scores.shape)


def spread_rows(values: Tensor, like: Tensor) -> Tensor:
    """One number for each example, as it broadcasts to ``like``."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def mean_of(recon: Tensor, library: Tensor | None) -> Tensor:
    """``recon``; or where those are scores, the mean that they stand for."""
    return recon if library is None else spread_rows(library, recon) * softmax(recon)


def negative_log_likelihood(
    recon: Tensor,
    target: Tensor,
    parameter_tensor: Tensor | None = None,
    zero_logits: Tensor | None = None,
    library: Tensor | None = None,
    *,
    likelihood: str,
    parameter: float,
    reduction: str,
) -> Tensor:
    """The loss alone, differentiable, without looking at the data: what ``vmap`` and double backward go through."""
    y, x = prepare(mean_of(recon, library), target)
    nll = LIKELIHOODS[likelihood].nll(y, x, number_of(parameter, parameter_tensor, recon))
    if zero_logits is not None:
        nll = zero_inflated_nll(nll, zero_logits, x)
    return reduce(nll, reduction, recon.dtype)


def reconstruction_forward(
    recon: Tensor,
    target: Tensor,
    *tensors: Tensor | None,
    likelihood: str,
    parameter: float,
    reduction: str,
    with_gradient: bool,
) -> list[Tensor]:
    from_scores = len(tensors) > 2 and tensors[2] is not None
    check_domains(likelihood, recon.new_zeros(()) if from_scores else recon, target)
    options: dict[str, Any] = {"likelihood": likelihood, "parameter": parameter, "reduction": reduction}
    nll = negative_log_likelihood(recon, target, *tensors, **options)
    if not with_gradient:
        return [nll]
    return [nll, *reconstruction_backward(nll.new_ones(()), recon, target, *tensors, **options)]


def reconstruction_backward(
    grad_nll: Tensor,
    recon: Tensor,
    target: Tensor,
    parameter_tensor: Tensor | None = None,
    zero_logits: Tensor | None = None,
    library: Tensor | None = None,
    *,
    likelihood: str,
    parameter: float,
    reduction: str,
) -> list[Tensor]:
    y, x = prepare(mean_of(recon, library), target)
    upstream, row = spread(grad_nll, reduction, recon), LIKELIHOODS[likelihood]
    number = number_of(parameter, parameter_tensor, recon)
    of_zero_logits = []
    if zero_logits is not None:
        by_nll, by_zero_logits = zero_inflated_derivatives(row.nll(y, x, number), zero_logits, x)
        of_zero_logits, upstream = [upstream * by_zero_logits], upstream * by_nll
    grad, of_library = upstream * row.derivative(y, x, number), []
    if library is not None:  # through library · softmax
        share = softmax(recon)
        of_library = [by_example(grad * share).sum(1)]
        grad = spread_rows(library, recon) * share * (grad - spread_rows(of_library[0], recon))
    gradients = [grad.to(recon.dtype)]
    if parameter_tensor is not None:
        assert row.parameter_derivative is not None
        elements = (upstream * row.parameter_derivative(y, x, number)).double()
        dtype = gradient_dtype(parameter_tensor, recon.shape, y.dtype)
        gradients.append(elements.sum_to_size(parameter_tensor.shape).to(dtype))
    return gradients + of_zero_logits + of_library


def target_gradient(
    grad_nll: Tensor,
    recon: Tensor,
    target: Tensor,
    parameter_tensor: Tensor | None = None,
    zero_logits: Tensor | None = None,
    library: Tensor | None = None,
    *,
    likelihood: str,
    parameter: float,
    reduction: str,
) -> Tensor:
    """The gradient in the target, which is asked for too rarely to be a kernel."""
    y, x = prepare(mean_of(recon, library), target)
    number, row = number_of(parameter, parameter_tensor, recon), LIKELIHOODS[likelihood]
    grad = spread(grad_nll, reduction, recon) * row.target_derivative(y, x, number)
    if zero_logits is not None:
        grad = grad * zero_inflated_derivatives(row.nll(y, x, number), zero_logits, x)[0]
    return grad.to(target.dtype)


def rescale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``gradient *= upstream``; on a CPU, where looking is free, nothing at all if ``upstream`` is 1.

    In accumulator precision: a GradScaler's 65536 is not a float16.
    """
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient.copy_(gradient.to(accumulator(gradient.dtype)) * upstream)
