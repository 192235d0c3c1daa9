"""What the suites share: a readable table, bandwidth measured once a run, and no host name in what is saved."""

from __future__ import annotations

from typing import Any

import pytest

from fastvae.bench import bandwidth

from .cases import in_bytes

COLUMNS = ["median", "iqr", "min", "rounds", "iterations"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark_columns"):
        config.option.benchmark_columns = COLUMNS


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for group, rows in in_bytes.items():
        terminalreporter.section(group, "-")
        for name, info in sorted(rows.items(), key=lambda row: -row[1]["gb_per_s"]):
            line = f"{name:22} {info['gb_per_s']:8.1f} GB/s {info['share_of_copy']:6.0%} of a copy"
            if "peak_extra_bytes" in info:
                line += f" {info['peak_extra_bytes'] / 1e6:10.2f} MB peak extra memory"
            terminalreporter.write_line(line)


_speeds: dict[str, dict[str, float]] = {}


@pytest.fixture
def speeds(device: str) -> dict[str, float]:
    """Bytes a second that the memory of ``device`` delivers in this run."""
    if device not in _speeds:
        _speeds[device] = bandwidth.measure(device)
    return _speeds[device]
