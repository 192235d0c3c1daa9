"""What the suites share: a readable table, bandwidth measured once a run, and no host name in what is saved."""

from __future__ import annotations

from typing import Any

import pytest

from fastvae.bench import bandwidth

COLUMNS = ["median", "iqr", "min", "rounds", "iterations"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark_columns"):
        config.option.benchmark_columns = COLUMNS


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)


_speeds: dict[str, dict[str, float]] = {}


@pytest.fixture
def speeds(device: str) -> dict[str, float]:
    """Bytes a second that the memory of ``device`` delivers in this run."""
    if device not in _speeds:
        _speeds[device] = bandwidth.measure(device)
    return _speeds[device]
