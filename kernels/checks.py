"""Errors only a kernel can find, because they are in the data: worded once for every backend."""

from __future__ import annotations

import torch

from .likelihoods import LIKELIHOODS, Domain

ROUNDING = 1e-6  # what resizing an image with antialiasing may leave beyond [0, 1]: up to 2.4e-7 was seen


#: what to do about a target
OF_TARGETS = {
    Domain.UNIT: "pass 8-bit images as torch.uint8 or divide them by 255, clamp(0, 1) what resizing left outside, and "
    "do not standardise images for a Bernoulli likelihood",
    Domain.COUNT: "pass raw counts, neither normalised nor their logarithms",
}
#: and about what the decoder gave
OF_RECONS = {
    Domain.UNIT: "pass logits to bce_with_logits instead",
    Domain.NOT_NEGATIVE: "end the decoder in softplus, exp or softmax",
}


def outside(tensor: torch.Tensor, domain: Domain, beyond: float = 0.0) -> torch.Tensor:
    """Where ``tensor`` leaves the domain; NaN does not."""
    if domain is Domain.UNIT:
        return (tensor < -beyond) | (tensor > 1 + beyond)
    wrong = tensor < 0
    if domain is Domain.COUNT:
        wrong |= (tensor != tensor.floor()) & (tensor == tensor)
    return wrong


def domain_error(name: str, tensor: torch.Tensor, domain: Domain) -> ValueError | None:
    """The error for ``tensor`` as ``name`` if some value is outside; NaN is not, nor what rounding left of a target."""
    is_target = name == "target"
    if domain is Domain.REAL or not tensor.is_floating_point():
        return None
    wrong = outside(tensor, domain, ROUNDING if is_target else 0.0)
    if not wrong.any():
        return None
    if domain is Domain.COUNT:
        got = f"{tensor[wrong][0].item():.9g}"
    else:
        seen = tensor[~tensor.isnan()]
        got = f"values from {seen.min().item():.9g} to {seen.max().item():.9g}"
    hint = (OF_TARGETS if is_target else OF_RECONS)[domain]
    return ValueError(f"{name} must {domain.value}, got {got}: {hint}")


def check_domains(likelihood: str, recon: torch.Tensor, target: torch.Tensor) -> None:
    """Raise the ``ValueError`` of a likelihood for CPU tensors with values it is not defined for."""
    row = LIKELIHOODS[likelihood]
    if recon.device.type != "cpu":
        return
    error = domain_error("target", target, row.target_domain) or domain_error(row.recon, recon, row.recon_domain)
    if error is not None:
        raise error
