"""What every test shares: one seed, and one device (``FASTVAE_TEST_DEVICE=cuda pytest tests/test_ops.py``)."""

from __future__ import annotations

import pytest
import torch

from table import DEVICE

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
