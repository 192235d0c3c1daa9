"""Turns the table of works into pytest cases, and a case into a pytest-benchmark row of the right group."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from fastvae.bench import contenders, memory, timing
from fastvae.bench.ops import bytes_moved
from fastvae.bench.works import TRAINING, Work

#: what was measured so far, by group and contender; pytest-benchmark's own tables show only times
in_bytes: dict[str, dict[str, dict[str, Any]]] = {}

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Tick:
    """A moment on the GPU's own clock. The difference of two is seconds, which is all a timer must give."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Tick) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def cases(select: Callable[[str], Iterable[Work]]) -> list[Any]:
    """Device × work × contender, the contenders of a work side by side; ``select`` gives the works of a device."""
    params = []
    for device in DEVICES:
        options: dict[str, Any] = {"disable_gc": True, "max_time": 0.5, "min_time": timing.MIN_BURST}
        if device == "cuda":
            options["timer"] = Tick
        for work in select(device):
            mark = pytest.mark.benchmark(group=f"{device} · {work.title}", **options)
            for name in contenders.names(work, device):
                params.append(pytest.param(device, work, name, id=case_id(device, work, name), marks=mark))
    return params


def case_id(device: str, work: Work, name: str) -> str:
    """In letters that ``-k`` and a shell take as they are."""
    return re.sub(r"[^\w.]+", "-", f"{device} {work.title} {name}".replace("×", "x"), flags=re.ASCII)


def measure(benchmark: Any, speeds: dict[str, float], device: str, work: Work, name: str) -> None:
    """Time one contender; what the time means in bytes goes to ``extra_info``."""
    contenders.forget_compiled()
    try:
        contender = contenders.contender(work, device, name)
    except contenders.UnavailableError as reason:
        pytest.skip(f"{name}: {reason}")
    benchmark.name = name  # the group says the rest
    with contender.context():
        benchmark(contender.call)
        if name != contenders.FLOOR:
            benchmark.extra_info["peak_extra_bytes"] = memory.peak_extra_bytes(contender.call, device)
    if benchmark.stats is None:  # --benchmark-disable
        return
    if total := bytes_moved(work):
        speed = total / benchmark.stats.stats.median
        benchmark.extra_info |= {
            "bytes": total,
            "gb_per_s": round(speed / 1e9, 3),
            "share_of_copy": round(speed / speeds["copy"], 4),
            "copy_gb_per_s": round(speeds["copy"] / 1e9, 2),
        }
        in_bytes.setdefault(f"{device} · {work.title}", {})[name] = benchmark.extra_info
    elif work.op == TRAINING:
        benchmark.extra_info["examples_per_s"] = round(work.shape[0] / benchmark.stats.stats.median)
