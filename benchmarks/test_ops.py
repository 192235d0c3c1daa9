"""Ops × contenders × shapes × dtypes × devices, forward and forward + backward; and whole optimiser steps by batch."""

from __future__ import annotations

from typing import Any

import pytest

from fastvae.benchmarks import works
from fastvae.benchmarks.cases import cases, report


@pytest.mark.parametrize(("device", "work", "name"), cases(works.full))
def test_op(benchmark: Any, request: pytest.FixtureRequest, device: str, work: works.Work, name: str) -> None:
    report(benchmark, request.session.items, device, work, name)
