"""What is measured: lists of works, a work being an op on given shapes and dtypes in one direction."""

from __future__ import annotations

from typing import NamedTuple

import torch

TRAINING = "training step"


class Work(NamedTuple):
    """One op on one size. ``shape`` is that of the data, or of ``mu`` where the op has no data."""

    op: str
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    target: torch.dtype | None = None  # None: as ``dtype``
    latent: int = 0  # columns of mu and logvar, where the op has data too
    backward: bool = True
    hidden: int = 0  # inputs of the layer, where the op has one

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
        more = {"latent": self.latent, "hidden": self.hidden}
        return f"{rows}×{cols}" + "".join(f", {name} {size}" for name, size in more.items() if size)

    @property
    def title(self) -> str:
        """All of it in one line; no two works share it."""
        parts = [self.op, self.size, self.types]
        return " · ".join(parts if self.op == TRAINING else [*parts, self.direction])


F32, BF16, F16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8

#: what most bars of the CPU are about, and the short table
SHORT = (
    Work("bce_with_logits", (8192, 784)),
    Work("bce", (8192, 784)),
    Work("bce_with_logits", (8192, 784), BF16, U8),
    Work("sample_with_kl", (8192, 64)),
    Work("elbo_loss", (128, 784), latent=20),
    Work(TRAINING, (128, 784), latent=20),
)
#: cells × genes
COUNTS, MANY_COUNTS = (Work("negative_binomial_nll", (cells, 20_000)) for cells in (128, 1024))
INFLATED, MANY_INFLATED = (Work("zero_inflated_negative_binomial_nll", (cells, 20_000)) for cells in (128, 1024))
SCORES = Work("negative_binomial_nll_from_scores", (128, 20_000))
#: 1.6 GB of float32 inputs; 1 GB of latents
LARGE_DATA, LARGE_LATENT = (262_144, 784), (1_048_576, 128)
LARGE_LAYER = Work("linear_bce", (65_536, 784), BF16, U8, hidden=512)


def short(device: str) -> list[Work]:
    """The works of ``fastvae bench``: those of the bars, two of counts, and on a GPU such as fill it."""
    large = (
        Work("bce_with_logits", LARGE_DATA),
        Work("bce_with_logits", LARGE_DATA, BF16, U8),
        Work("sample_with_kl", LARGE_LATENT),
        LARGE_LAYER,
    )
    return [*SHORT, COUNTS, INFLATED, *(large if device == "cuda" else ())]


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
    works += [Work("linear_bce", shape, dtype, hidden=512) for shape in data[:2] for dtype in (F32, BF16)]
    works += [
        COUNTS,
        MANY_COUNTS,
        COUNTS._replace(dtype=BF16),
        COUNTS._replace(backward=False),
        INFLATED,
        MANY_INFLATED,
        SCORES,
    ]
    works += [LARGE_LAYER] if device == "cuda" else []
    return works + [Work(TRAINING, (batch, 784), latent=20) for batch in batches]
