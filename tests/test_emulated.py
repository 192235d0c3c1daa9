"""The CUDA kernels without a GPU: the op table in the emulator of ``cuda_emulator/``, threads in an order it draws.

With a GPU the table runs on it too: ``make gpu``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build
from conftest import EMULATED

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.skipif(bool(EMULATED), reason="this is the run in the emulator"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator is for Linux"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}"),
]


@pytest.fixture(scope="session")
def library() -> Path:
    return build.build()


# What hardware may give: threads in any order, and results of the special-function units as far off as documented.
SETTINGS = {
    "as it is": {},
    "threads backward": {"EMU_ORDER": "backward", "EMU_SMS": "1"},
    "perturbed": {"EMU_PERTURB": "1", "EMU_SEED": "1"},
}


@pytest.mark.parametrize(
    ("setting", "tests"),
    [
        ("as it is", "cuda"),
        ("threads backward", "cuda and (test_sizes or test_layouts or test_long)"),
        ("perturbed", "cuda and (test_dtypes or test_sizes or test_layouts or test_long or test_counts)"),
    ],
)
def test_the_op_table_in_the_emulator(setting: str, tests: str, library: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests]
    files = [str(HERE / f"test_{name}.py") for name in ("ops", "noise", "autograd", "edges", "parameters", "counts")]
    environment = {**os.environ, **SETTINGS[setting], "FASTVAE_EMULATED_CUDA": str(library)}
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


COUNTED = """
import ctypes, os, sys

sys.path.insert(0, "cuda_emulator")
import build

library = os.environ["FASTVAE_EMULATED_CUDA"]
build.load(library)
import torch, fastvae

launches = ctypes.c_int64.in_dll(ctypes.CDLL(library), "emulator_launches")
for shape in ((128, 784), (3, 5)):
    for scale in (1, 2):  # an upstream gradient of 1, and another
        recon, target = torch.randn(shape, requires_grad=True), torch.rand(shape)
        mu, logvar = (torch.randn(shape[0], 20, requires_grad=True) for _ in range(2))
        before = launches.value
        with fastvae.use_backend("cuda"):
            loss = scale * fastvae.elbo_loss(recon, target, mu, logvar, beta=0.5).loss
            forward = launches.value
            loss.backward()
        print(forward - before, launches.value - forward)
"""


def test_the_elbo_takes_three_launches(library: Path) -> None:
    """Two forward, one backward."""
    environment = {**os.environ, "FASTVAE_EMULATED_CUDA": str(library)}
    run = subprocess.run(
        [sys.executable, "-c", COUNTED], cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == ["2 1"] * 4
