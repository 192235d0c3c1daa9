"""Backend ``triton`` on CPU tensors with a GPU's driver that launches nothing: what it launches, and the host's time.

``python tests/stubbed_triton.py`` prints the time; kernels are compiled for sm_90 as they would be. Only in a process
of its own: Triton keeps its driver.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastvae
from fastvae.kernels import triton as backend

#: (which compiled kernel, grid, arguments) of each launch; tensors as their dtype, shape and alignment
LAUNCHES: list[tuple[Any, ...]] = []


def _seen(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.data_ptr() % 16
    return argument


class Launcher:
    """What Triton makes of a compiled kernel."""

    recording = True

    def __init__(self, *_: Any):
        pass

    def __call__(self, *args: Any) -> None:
        if self.recording:
            grid, arguments = args[:3], args[9:]  # between them: stream, function, metadata, hooks
            LAUNCHES.append((self, grid, tuple(map(_seen, arguments))))


class Utils:
    """The functions of a driver that Triton asks for."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 40, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Driver:
    """An H100 that is not there."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def install() -> None:
    driver.set_active(Driver())
    backend.DEVICES, backend.UNAVAILABLE = ("cpu", "cuda"), ""


def host_time(call: Callable[[], object]) -> str:
    call()
    call()
    times = [run / 300 * 1e6 for run in timeit.repeat(call, timer=time.thread_time, number=300, repeat=15)]
    return f"{min(times):.0f} µs at best, {statistics.median(times):.0f} median"


def report(name: str) -> None:
    """The host's time of two small losses on the backend of that name."""
    torch.set_num_threads(1)
    recon, target = torch.randn(128, 784, requires_grad=True), torch.rand(128, 784)
    mu, logvar = torch.randn(128, 20, requires_grad=True), torch.randn(128, 20, requires_grad=True)
    with fastvae.use_backend(name):
        calls: dict[str, Callable[[], object]] = {
            "elbo_loss": lambda: torch.autograd.grad(
                fastvae.elbo_loss(recon, target, mu, logvar).loss, (recon, mu, logvar)
            ),
            "bce_with_logits": lambda: torch.autograd.grad(fastvae.bce_with_logits(recon, target), recon),
        }
        for loss, call in calls.items():
            print(f"{name}: {loss}, forward + backward, launches stubbed: {host_time(call)}")


def main() -> None:
    install()
    Launcher.recording = False
    report("triton")


if __name__ == "__main__":
    main()
