"""Ops × contenders × shapes × dtypes × devices, forward and forward + backward."""

from __future__ import annotations

from typing import Any

import pytest

from fastvae.bench import works

from .cases import cases, measure


@pytest.mark.parametrize(
    ("device", "work", "name"), cases(lambda kind: [w for w in works.full(kind) if w.op != works.TRAINING])
)
def test_op(benchmark: Any, speeds: dict[str, float], device: str, work: works.Work, name: str) -> None:
    measure(benchmark, speeds, device, work, name)
