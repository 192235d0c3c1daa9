"""Backend ``cuda``: the compiled kernels on the current stream of the tensors' device.

Nothing waits for the device and nothing but torch allocates, so a CUDA graph can capture every op. In the emulator of
``tests/cuda_emulator`` the same kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..reference import (  # noqa: F401  (no kernels of its own: sums over pairs, some rows at a time)
    aggregate_posterior_backward,
    aggregate_posterior_forward,
    mixture_backward,
    mixture_forward,
    mmd_backward,
    mmd_forward,
)
from ..reference.rows import rows_backward, rows_forward
from ..work import WithTensor
from . import native
from .primitives import Compiled


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs``, as in ``"80 90"``, runs on a GPU of that compute capability.

    Machine code runs on its generation from its minor number on; the last one's intermediate code on all that follow.
    """
    major, minor = capability
    found = [(int(arch[:-1]), int(arch[-1])) for arch in re.findall(r"\d+", archs)]
    return any(arch[0] == major and arch[1] <= minor for arch in found) or found[-1] <= capability


def _unavailable() -> str:
    if not hasattr(native, "cuda"):
        return "the extension was built without CUDA: no nvcc was found at install"
    if EMULATED:
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    driver, built = native.cuda.versions()
    if driver // 1000 < built // 1000:
        known, wanted = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, built))
        return (
            f"the extension was built with CUDA {wanted}, the driver knows CUDA {known}: install with the nvcc of that"
        )
    for capability in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())):
        if not runs_on(native.cuda.ARCHS, capability):
            wanted = "".join(map(str, capability))
            return f"the extension was built for GPUs {native.cuda.ARCHS}: install with FASTVAE_CUDA_ARCHS={wanted}"
    return ""


EMULATED = hasattr(native, "cuda") and hasattr(native.cuda, "EMULATED")
DEVICES = ("cpu",) if EMULATED else ("cuda",)
UNAVAILABLE = _unavailable()


def _queue(tensor: Tensor, losses: int) -> tuple[tuple[int, int, int], Tensor | None]:
    """Device, stream, and scratch memory for the sums of rows: torch's, so that a graph can capture it."""
    device = 0 if EMULATED else tensor.get_device()
    # the handle itself: torch.cuda.current_stream() would make an object around it at every call
    stream = 0 if EMULATED else torch._C._cuda_getCurrentRawStream(device)
    if not losses:
        return (device, stream, 0), None
    sums = losses * max(tensor.shape[0], native.cuda.PARTIALS)
    scratch = torch.empty(sums, dtype=torch.float64, device=tensor.device)
    return (device, stream, scratch.data_ptr()), scratch


def _target(recon: Tensor, target: Tensor) -> Tensor:
    """Beside float64 the kernels know float64 only; other targets are for checking there, and converted first."""
    if recon.dtype != torch.float64 or target.dtype == torch.float64:
        return target
    return target.double() if target.is_floating_point() else target.double() / 255


class CompiledCUDA(Compiled):
    """As on a CPU, with the targets of float64."""

    on_host = False

    def for_softmax(self, work: WithTensor) -> Tensor | None:
        return None if work.library is None else work.library.new_empty((2, work.rows), dtype=torch.float64)

    def fill_with_tensor(self, work: WithTensor) -> int:
        wanted = [name for name in ("sums", "parameter_sums", "flow") if getattr(work, name) is not None]
        for name in wanted:
            length = max(work.rows, self.native.PARTIALS)
            setattr(work, name, torch.empty(length, dtype=torch.float64, device=work.like.device))
        parts = super().fill_with_tensor(work)
        for name in wanted:
            setattr(work, name, getattr(work, name)[: work.rows * parts].view(work.rows, parts))
        return 0

    def reconstruction_forward(
        self, recon: Tensor, target: Tensor, *tensor: Tensor | None, **options: Any
    ) -> list[Tensor]:
        return super().reconstruction_forward(recon, _target(recon, target), *tensor, **options)

    def reconstruction_backward(
        self, grad_nll: Tensor, recon: Tensor, target: Tensor, *tensor: Tensor | None, **options: Any
    ) -> list[Tensor]:
        return super().reconstruction_backward(grad_nll, recon, _target(recon, target), *tensor, **options)

    def elbo_forward(self, recon: Tensor, target: Tensor, *latent: Tensor, **options: Any) -> list[Tensor]:
        return super().elbo_forward(recon, _target(recon, target), *latent, **options)


_primitives = CompiledCUDA(getattr(native, "cuda", None), _queue)

KERNELS = native.cuda.kernels if hasattr(native, "cuda") else None  # for csrc/autograd
elbo_backward = _primitives.elbo_backward
elbo_forward = _primitives.elbo_forward
latent_backward = _primitives.latent_backward
latent_forward = _primitives.latent_forward
reconstruction_backward = _primitives.reconstruction_backward
reconstruction_forward = _primitives.reconstruction_forward
rescale_ = _primitives.rescale_

__all__ = ["elbo_forward", "latent_backward", "latent_forward", "reconstruction_backward", "reconstruction_forward"]
__all__ += ["rescale_", "rows_backward", "rows_forward"]  # the last two are the reference's compositions
