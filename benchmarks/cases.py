"""Turns the table of works into pytest cases, and what ``suite`` measured of one into a row of pytest-benchmark.

The contenders of a work that were selected take turns, once, in the first case of them. pytest-benchmark then reads
those times from a clock of its own, and does statistics, tables and files.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from . import contenders, memory, suite
from .works import Work

BUDGET = 0.5  # seconds of timing a contender
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: rows as in a results file, by group and contender, as far as measured; pytest-benchmark's own tables show only times
measured: dict[str, dict[str, suite.Row]] = {}

speeds = functools.cache(memory.bandwidth)
readings = functools.lru_cache(maxsize=1)(suite.readings)
_now = [0.0]


def clock() -> float:
    """A timer for pytest-benchmark: it stands still but in ``advance``."""
    return _now[0]


def advance(seconds: float) -> None:
    """What pytest-benchmark times: something that took ``seconds`` elsewhere."""
    _now[0] += seconds


def cases(select: Callable[[str], Iterable[Work]]) -> list[Any]:
    """Device × work × contender, the contenders of a work side by side; ``select`` gives the works of a device."""
    params = []
    for device in DEVICES:
        for work in select(device):
            mark = pytest.mark.benchmark(group=f"{device} · {work.title}", timer=clock)
            for name in contenders.names(work, device):
                params.append(pytest.param(device, work, name, id=case_id(device, work, name), marks=mark))
    return params


def case_id(device: str, work: Work, name: str) -> str:
    """In letters that ``-k`` and a shell take as they are."""
    return re.sub(r"[^\w.]+", "-", f"{device} {work.title} {name}".replace("×", "x"), flags=re.ASCII)


def selected(items: Iterable[pytest.Item], device: str, work: Work) -> tuple[str, ...]:
    """The contenders of ``work`` among the cases of this run."""
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    return tuple(p["name"] for p in params if p.get("work") == work and p["device"] == device)


def report(benchmark: Any, items: Iterable[pytest.Item], device: str, work: Work, name: str) -> None:
    """One contender's row; as it is in a results file it goes to ``extra_info``."""
    names = selected(items, device, work)
    found = readings(work, device, speeds(device)["copy"], BUDGET * len(names) * benchmark.enabled, names)
    row, times = found[name]
    if "skipped" in row:
        pytest.skip(f"{name}: {row['skipped']}")
    benchmark.name = name  # the group says the rest
    turns = iter(times)
    benchmark.pedantic(advance, setup=lambda: ((next(turns),), {}), rounds=len(times))
    benchmark.extra_info |= suite.description(work) | row
    if benchmark.enabled:  # else the rounds are too few to show
        measured.setdefault(benchmark.group, {})[name] = row
