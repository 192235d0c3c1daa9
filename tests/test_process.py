"""What the package costs to import, and what PyTorch users do to processes and threads."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import soak
from soak import ORDERS
from table import BACKENDS


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    heavy = (
        *("numba", "llvmlite", "triton", "matplotlib", "sklearn", "mlxtend"),
        *("pandas", "tqdm", "safetensors", "jinja2"),
    )
    code = (
        "import torch, sys; before = set(sys.modules); import fastvae;"
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    assert python(code) == "[]"


def test_numba_compiles_in_one_thread_before_others_run() -> None:
    """Numba's compiler, entered by 16 threads at once, has crashed a process."""
    numba = pytest.importorskip("numba")
    from fastvae.kernels.numba import threads

    asked: list[str] = []

    @numba.njit(nogil=True)
    def kernel(first: int, last: int) -> int:
        return last - first

    compiled = kernel.compile
    kernel.compile = lambda sig: (asked.append(threading.current_thread().name), compiled(sig))[1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        assert threads.run(kernel, 8, threads.MIN_ELEMENTS) == 1
    finally:
        torch.set_num_threads(before)
    assert asked == [threading.current_thread().name]


def test_torch_backend_needs_no_numba() -> None:
    code = (
        "import sys; sys.modules['numba'] = None; import torch, fastvae;"
        "print(fastvae.gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3)).item(), fastvae.backends()['numba'].reason)"
    )
    assert python(code).startswith("1.5 numba cannot be imported")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the soak is for Linux")
@pytest.mark.parametrize(
    ("bar", "backend", "count"),
    [
        ("resumes", "cpp", 2),
        ("steps", "cpp", 300),
        ("in_this_order", "torch", ORDERS.index(("op", "torch", "workers", "fork"))),
        ("in_this_order", "numba", ORDERS.index(("op", "fork", "torch", "workers"))),
        ("in_this_order", "cpp", ORDERS.index(("op", "fork", "torch", "workers"))),
        ("in_this_order", "cpp", ORDERS.index(("torch", "fork", "op", "workers"))),
        ("threads", "torch", 20),
        ("threads", "numba", 20),
        ("threads", "cpp", 20),
        ("interrupts", "numba", 10),
    ],
)
def test_a_little_of_the_soak(bar: str, backend: str, count: int) -> None:
    if backend not in BACKENDS:
        pytest.skip(f"no {backend}")
    well, seen = soak.trial(bar, backend, count, soak.SOON)
    assert well, seen
