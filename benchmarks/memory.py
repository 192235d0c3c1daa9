"""Peak extra memory of a call: the most bytes alive during it beyond those alive before."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], Any], kind: str) -> int:
    """Of one call, results included. Torch's allocators are watched: the CPU's through its profiler."""
    call()
    if kind == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    alive = peak = 0
    # the file lists every allocation and release with its sign, but not in order
    changes = (e for e in events if e.get("name") == "[memory]")
    for event in sorted(changes, key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0))):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's C++ half reports its start and stop on stderr, past Python, and offers no switch for it."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
