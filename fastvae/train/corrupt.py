"""What happens to images before they are seen: corruption of a denoiser's input, binarisation of everybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import Config

BINARISATIONS = ("grey", "fixed", "dynamic")


def unit(images: Tensor) -> Tensor:
    """uint8 as x/255, floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def white(images: Tensor) -> float:
    """The value of a full pixel."""
    return 255 if images.dtype == torch.uint8 else 1


def salt_and_pepper(images: Tensor, share: float) -> Tensor:
    """``images`` with about ``share`` of the pixels set to black or white."""
    noise = torch.rand(images.shape, device=images.device)
    noisy = torch.where(noise < share / 2, torch.zeros_like(images), images)
    return torch.where(noise > 1 - share / 2, torch.full_like(images, white(images)), noisy)


def masking(images: Tensor, share: float) -> Tensor:
    """``images`` with about ``share`` of the pixels set to 0."""
    return images * (torch.rand(images.shape, device=images.device) >= share)


def gaussian(images: Tensor, std: float) -> Tensor:
    """``images`` in [0, 1] plus noise of that σ, clipped to [0, 1]."""
    clean = unit(images)
    return (clean + std * torch.randn_like(clean)).clamp(0, 1)


CORRUPTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "salt-and-pepper": salt_and_pepper,
    "masking": masking,
    "gaussian": gaussian,
}


def corrupted(images: Tensor, how: str, level: float) -> Tensor:
    """``images`` as a denoiser sees them; at level 0 as they are."""
    return CORRUPTIONS[how](images, level) if level else images


def seen(images: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """What goes into a model of that configuration, and what should come out."""
    target = binarised(images, config.binarise)
    return corrupted(target, config.corruption, config.denoise), target


def binarised(images: Tensor, how: str) -> Tensor:
    """``images``; ``"fixed"``: 1 where they are at least ½, else 0; ``"dynamic"``: 1 with the pixel for probability."""
    if how == "grey":
        return images
    clean = unit(images)
    ones = clean >= 0.5 if how == "fixed" else torch.rand_like(clean) < clean
    return ones.to(images.dtype) * int(white(images))
