"""What the package costs to import, and what PyTorch users do to processes and threads."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import fastvae

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_dataloader_workers_forked_after_an_op_ran(backend: str) -> None:
    code = f"""
import torch, fastvae
class Noisy(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, k):
        zeros = torch.zeros(64, 4096)
        return fastvae.reparameterize(zeros, zeros, seed=k)
with fastvae.use_backend("{backend}"):
    torch.set_num_threads(2)
    here = torch.stack([Noisy()[k] for k in range(4)])
    loader = torch.utils.data.DataLoader(Noisy(), num_workers=2, multiprocessing_context="fork")
    there = torch.cat(list(loader))
    print(torch.equal(here, there))
"""
    assert python(code) == "True"


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_python_threads_at_once(backend: str) -> None:
    inputs = [(torch.randn(200, 784), torch.rand(200, 784)) for _ in range(4)]
    with fastvae.use_backend(backend):
        want = [fastvae.bce_with_logits(*pair) for pair in inputs]
    failures: list[object] = []

    def work(k: int) -> None:
        with fastvae.use_backend(backend):
            for _ in range(20):
                logits = inputs[k][0].clone().requires_grad_()
                loss = fastvae.bce_with_logits(logits, inputs[k][1])
                loss.backward()
                if not torch.allclose(loss, want[k]) or not logits.grad.isfinite().all():
                    failures.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
