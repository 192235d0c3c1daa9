"""Errors only a kernel can find, because they are in the data: worded once for every backend."""

from __future__ import annotations

import torch

from .likelihoods import LIKELIHOODS

ROUNDING = 1e-6  # what resizing an image with antialiasing may leave beyond [0, 1]: up to 2.4e-7 was seen


def unit_range_error(name: str, tensor: torch.Tensor) -> ValueError | None:
    """The error for ``tensor`` as ``name`` if some value lies outside [0, 1]; NaN does not, nor a target's rounding."""
    beyond = ROUNDING if name == "target" else 0.0
    if tensor.dtype == torch.uint8 or not ((tensor < -beyond) | (tensor > 1 + beyond)).any():
        return None
    seen = tensor[~tensor.isnan()]
    hint = (
        "pass 8-bit images as torch.uint8 or divide them by 255, clamp(0, 1) what resizing left outside, and do not "
        "standardise images for a Bernoulli likelihood"
        if name == "target"
        else "pass logits to bce_with_logits instead"
    )
    return ValueError(
        f"{name} must lie in [0, 1], got values from {seen.min().item():.9g} to {seen.max().item():.9g}: {hint}"
    )


def check_unit_range(likelihood: str, recon: torch.Tensor, target: torch.Tensor) -> None:
    """Raise the ``ValueError`` of a likelihood on [0, 1] for CPU tensors with values outside [0, 1]."""
    row = LIKELIHOODS[likelihood]
    if recon.device.type != "cpu":
        return
    error = unit_range_error("target", target) if row.unit_target else None
    if error is None and row.unit_recon:
        error = unit_range_error(row.recon, recon)
    if error is not None:
        raise error
