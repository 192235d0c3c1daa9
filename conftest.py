"""``pytest`` runs the tests, ``pytest --benchmark-only`` the benchmarks; with paths, what they name."""

from __future__ import annotations

import pytest

COLUMNS = ["median", "iqr", "min", "rounds"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark_only", False):
        return
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(config.rootpath / "benchmarks")]
    config.option.benchmark_columns = config.option.benchmark_columns or COLUMNS
