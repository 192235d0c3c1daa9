"""What the suite prints and saves: what times mean in bytes, and no host name in what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastvae.benchmarks.cases import measured

#: ``--doctest-modules`` would import the instruments a second time, under a name without ``fastvae``
collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for group, rows in measured.items():
        in_bytes = {name: row for name, row in rows.items() if "gb_per_s" in row}
        if in_bytes:
            terminalreporter.section(group, "-")
        for name, row in sorted(in_bytes.items(), key=lambda pair: -pair[1]["gb_per_s"]):
            line = f"{name:22} {row['gb_per_s']:8.1f} GB/s {row['share_of_copy']:6.0%} of a copy"
            if "peak_extra_bytes" in row:
                line += f" {row['peak_extra_bytes'] / 1e6:10.2f} MB peak extra memory"
            terminalreporter.write_line(line)
