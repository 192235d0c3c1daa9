"""Fresh processes: what ``import fastvae`` adds to ``import torch``, and the first call with and without a cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from fastvae.benchmarks import startup
from fastvae.benchmarks.cases import DEVICES, advance, clock


def read(code: str, **environment: str) -> None:
    """What a process measured of itself: starting an interpreter is nobody's cost."""
    advance(startup.seconds(code, **environment))


@pytest.mark.benchmark(group="import fastvae, torch being imported", timer=clock)
def test_import(benchmark: Any) -> None:
    benchmark.name = "import fastvae"
    benchmark.pedantic(read, args=(startup.IMPORT,), rounds=9, warmup_rounds=1)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("device", DEVICES)
def test_first_call(benchmark: Any, tmp_path: Path, device: str, cache: str) -> None:
    benchmark.group, benchmark.name = f"{device} · first elbo_loss of a process", f"{cache} compile cache"
    code = startup.FIRST_CALL.format(device=device)

    def folders() -> tuple[tuple[str], dict[str, str]]:
        folder = tempfile.mkdtemp(dir=tmp_path) if cache == "cold" else str(tmp_path)
        return (code,), dict.fromkeys(startup.CACHES, folder)

    benchmark.pedantic(read, setup=folders, rounds=3, warmup_rounds=cache == "warm")
