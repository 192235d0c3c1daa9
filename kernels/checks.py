"""Errors only a kernel can find, because they are in the data: worded once for every backend."""

from __future__ import annotations

import torch


def unit_range_error(name: str, tensor: torch.Tensor) -> ValueError | None:
    """The error for ``tensor`` as Bernoulli ``name`` if some value lies outside [0, 1]; NaN is not outside."""
    if tensor.dtype == torch.uint8 or not ((tensor < 0) | (tensor > 1)).any():
        return None
    seen = tensor[~tensor.isnan()]
    hint = (
        "pass 8-bit images as torch.uint8 or divide them by 255, and do not standardise them for a Bernoulli likelihood"
        if name == "target"
        else "pass logits to bce_with_logits instead"
    )
    return ValueError(
        f"{name} must lie in [0, 1], got values from {seen.min().item():g} to {seen.max().item():g}: {hint}"
    )


def check_unit_range(likelihood: str, recon: torch.Tensor, target: torch.Tensor) -> None:
    """Raise the ``ValueError`` of a Bernoulli likelihood for CPU tensors with values outside [0, 1], if it is due."""
    if "bernoulli" not in likelihood or recon.device.type != "cpu":
        return
    error = unit_range_error("target", target)
    if error is None and "probs" in likelihood:
        error = unit_range_error("probs", recon)
    if error is not None:
        raise error
