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
