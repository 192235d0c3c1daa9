"""What a fresh process waits for: ``import fastvae`` beyond ``import torch``, and the first call of an op."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

IMPORT = "import torch, time; begin = time.perf_counter(); import fastvae; print(time.perf_counter() - begin)"
FIRST_CALL = """
import torch, fastvae, time
recon = torch.randn(128, 784, device="{device}", requires_grad=True)
target, (mu, logvar) = torch.rand_like(recon), torch.randn(2, 128, 20, device="{device}", requires_grad=True)
begin = time.perf_counter()
fastvae.elbo_loss(recon, target, mu, logvar).loss.backward()
recon.grad.sum().item()
print(time.perf_counter() - begin)
"""
#: where compiled kernels are kept between processes
CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR")


def seconds(code: str, **environment: str) -> float:
    """What ``code`` prints, run by a new interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return float(run.stdout)


def import_seconds(processes: int = 9) -> float:
    """Median time of ``import fastvae`` in processes that have imported torch."""
    seconds(IMPORT)  # bytecode and page cache
    return statistics.median(seconds(IMPORT) for _ in range(processes))


def first_call_seconds(device: str, processes: int = 5) -> dict[str, float]:
    """Forward and backward of ``elbo_loss`` in a new process, with an empty and with a filled compile cache."""
    code = FIRST_CALL.format(device=device)
    with tempfile.TemporaryDirectory() as folder:
        caches = dict.fromkeys(CACHES, folder)
        cold = seconds(code, **caches)
        return {"cold": cold, "warm": statistics.median(seconds(code, **caches) for _ in range(processes))}
