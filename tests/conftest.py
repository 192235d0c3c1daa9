"""What tests share: a seed, a device (``FASTVAE_TEST_DEVICE=cuda pytest tests/test_ops.py``), NaN in new memory.

``torch.empty`` gives NaN in the tests, so an output that a kernel leaves unwritten is seen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
if EMULATED := os.environ.get("FASTVAE_EMULATED_CUDA"):  # before `table` looks what backends there are
    import build

    build.load(EMULATED)

from table import DEVICE, INTERPRETED

if INTERPRETED:
    import interpreter

    interpreter.mend()
    if os.environ.get("FASTVAE_PERTURB"):
        interpreter.perturb()

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
torch.use_deterministic_algorithms(True, warn_only=True)  # without it, memory stays as it was found
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes goes first, so that several processes end together."""
    items.sort(key=lambda item: "the_op_table_in_the" not in item.name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases were fuzzed, by backend."""
    ran = getattr(sys.modules.get("test_fuzz"), "RAN", None)
    if ran:
        cases = ", ".join(f"{name} {count:,}" for name, count in ran.items())
        terminalreporter.write_line(f"fuzzed: {ran.total():,} cases ({cases})")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
