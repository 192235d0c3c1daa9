"""What is measured: one table of ops, and lists of works (an op on given shapes and dtypes, in one direction)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from . import eager

TRAINING = "training step"


class Work(NamedTuple):
    """One op on one size. ``shape`` is that of the data, or of ``mu`` where the op has no data."""

    op: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    target: torch.dtype | None = None  # None: as ``dtype``
    latent: int = 0  # columns of mu and logvar, where the op has data too
    backward: bool = True

    @property
    def direction(self) -> str:
        """What a call does."""
        return "forward + backward" if self.backward else "forward"

    @property
    def types(self) -> str:
        """The dtypes, for people: ``float32`` or ``bfloat16, uint8 target``."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, {str(self.target).removeprefix('torch.')} target" if self.target else name

    @property
    def size(self) -> str:
        """The shapes, for people."""
        rows, cols = self.shape
        if self.op == TRAINING:
            return f"batch {rows}"
        return f"{rows}×{cols}" + (f", latent {self.latent}" if self.latent else "")

    @property
    def title(self) -> str:
        """All of it in one line; no two works share it."""
        parts = [self.op, self.size, self.types]
        return " · ".join(parts if self.op == TRAINING else [*parts, self.direction])


class Op(NamedTuple):
    """``ours`` and each of ``eager`` compute the same of ``inputs``, of which the first ``leaves`` are differentiable.

    ``eager`` holds the forms people write, by contender name; the first is the one that is also compiled. Where the
    op returns z, the upstream gradient of its first output is a tensor.
    """

    inputs: Callable[[Work, torch.Generator], list[Tensor]]
    leaves: tuple[int, ...]
    ours: Callable[..., Any]
    eager: dict[str, Callable[..., Any]]
    returns_z: bool = False


def _target(work: Work, generator: torch.Generator) -> Tensor:
    dtype, device = work.target or work.dtype, generator.device
    if dtype == torch.uint8:
        return torch.randint(0, 256, work.shape, dtype=dtype, device=device, generator=generator)
    return torch.rand(work.shape, device=device, generator=generator).to(dtype)


def _normal(shape: tuple[int, int], work: Work, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=generator.device, generator=generator).to(work.dtype)


def _logits(work: Work, generator: torch.Generator) -> list[Tensor]:
    return [_normal(work.shape, work, generator), _target(work, generator)]


def _probs(work: Work, generator: torch.Generator) -> list[Tensor]:
    logits, target = _logits(work, generator)
    return [torch.sigmoid(logits), target]


def _latent(work: Work, generator: torch.Generator) -> list[Tensor]:
    shape = (work.shape[0], work.latent or work.shape[1])
    return [_normal(shape, work, generator), _normal(shape, work, generator)]


OPS: dict[str, Op] = {
    "bce": Op(_probs, (0,), functional.bce, {"eager": eager.bce, "eager, clipped": eager.bce_clipped}),
    "bce_with_logits": Op(
        _logits,
        (0,),
        functional.bce_with_logits,
        {"eager": eager.bce_with_logits, "eager, probabilities": eager.bce_of_sigmoid},
    ),
    "gaussian_kl": Op(_latent, (0, 1), functional.gaussian_kl, {"eager": eager.gaussian_kl}),
    "reparameterize": Op(_latent, (0, 1), functional.reparameterize, {"eager": eager.reparameterize}, returns_z=True),
    "sample_with_kl": Op(_latent, (0, 1), functional.sample_with_kl, {"eager": eager.sample_with_kl}, returns_z=True),
    "elbo_loss": Op(
        lambda work, generator: _logits(work, generator) + _latent(work, generator),
        (0, 2, 3),
        lambda *args: functional.elbo_loss(*args).loss,
        {"eager": eager.elbo_loss, "eager, probabilities": eager.elbo_loss_of_sigmoid},
    ),
}


def bytes_moved(work: Work) -> int:
    """Bytes no implementation can avoid: each input read once, each output written once. 0 for a training step."""
    if work.op == TRAINING:
        return 0
    op, size = OPS[work.op], work.dtype.itemsize
    data, latent = math.prod(work.shape), work.shape[0] * (work.latent or work.shape[1])
    has_data, has_latent = 0 in op.leaves and op.inputs is not _latent, len(op.leaves) > 1
    total = has_data * data * (size + (work.target or work.dtype).itemsize) + has_latent * 2 * latent * size
    total += op.returns_z * latent * size
    if work.backward:
        total += has_data * data * size + has_latent * 2 * latent * size + op.returns_z * latent * size
    return total


def gradient_bytes(work: Work) -> int:
    """Bytes of the gradients that forward + backward returns."""
    return bytes_moved(work) - bytes_moved(work._replace(backward=False)) - _upstream_bytes(work)


def _upstream_bytes(work: Work) -> int:
    return math.prod(work.shape) * work.dtype.itemsize if OPS[work.op].returns_z else 0


F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8

#: what the bars of the CPU are about, and the short table
SHORT = (
    Work("bce_with_logits", (8192, 784)),
    Work("bce", (8192, 784)),
    Work("bce_with_logits", (8192, 784), BF16, U8),
    Work("sample_with_kl", (8192, 64)),
    Work("elbo_loss", (128, 784), latent=20),
    Work(TRAINING, (128, 784), latent=20),
)
#: 1.6 GB of float32 inputs; 1 GB of latents
LARGE_DATA, LARGE_LATENT = (262_144, 784), (1_048_576, 128)


def short(device: str) -> list[Work]:
    """The works of ``fastvae bench``: those of the bars, and on a GPU such as fill it."""
    large = (
        Work("bce_with_logits", LARGE_DATA),
        Work("bce_with_logits", LARGE_DATA, BF16, U8),
        Work("sample_with_kl", LARGE_LATENT),
    )
    return [*SHORT, *(large if device == "cuda" else ())]


def full(device: str) -> list[Work]:
    """Ops × shapes × dtypes × directions, and training steps."""
    data, latent = [(128, 784), (8192, 784)], [(128, 20), (8192, 64)]
    batches = [128, 1024, 8192]
    if device == "cuda":
        data, latent, batches = [*data, LARGE_DATA], [*latent, LARGE_LATENT], [*batches, 65_536]
    works = []
    for backward in (True, False):
        for shape in data:
            for op, columns in (("bce_with_logits", 0), ("bce", 0), ("elbo_loss", 20)):
                works.append(Work(op, shape, F32, latent=columns, backward=backward))
                works.append(Work(op, shape, BF16, latent=columns, backward=backward))
            works.append(Work("bce_with_logits", shape, F16, backward=backward))
            works.append(Work("bce_with_logits", shape, BF16, U8, backward=backward))
        for op in ("sample_with_kl", "reparameterize", "gaussian_kl"):
            works += [Work(op, shape, dtype, backward=backward) for shape in latent for dtype in (F32, BF16)]
    return works + [Work(TRAINING, (batch, 784), latent=20) for batch in batches]
