"""Measures works and gives plain dictionaries, ready for JSON; ``benchmarks/README.md`` says what each field is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from ..registry import backend_name
from . import hardware
from .contenders import FLOOR, contenders, ours
from .memory import bandwidth, peak_extra_bytes
from .ops import bytes_moved
from .timing import device_seconds, interleaved, median, quartiles
from .works import TRAINING, Work

SCHEMA = 2
BUDGET = 4.0  # seconds of timing a work

Row = dict[str, Any]


def run(works: Iterable[Work], device: str, budget: float = BUDGET) -> dict[str, Any]:
    """Origin, bandwidth, and what was measured of each work, under a progress bar."""
    others = hardware.Others()
    speeds = bandwidth(device)
    measured = []
    bar = tqdm(works, unit="work", disable=None, leave=False)
    for work in bar:
        bar.set_description(work.title)
        measured.append(measure(work, device, speeds["copy"], budget))
    return {
        "schema": SCHEMA,
        **hardware.origin(device),
        "default": ours(backend_name(torch.device(device).type)),
        "others": others.cores(),
        "bandwidth": {name: round(speed / 1e9, 2) for name, speed in speeds.items()},
        "works": measured,
    }


def measure(work: Work, device: str, copy_speed: float, budget: float = BUDGET) -> dict[str, Any]:
    """What the work is and a row for each contender; those that cannot run have ``skipped`` instead of numbers."""
    rows = {name: row for name, (row, _) in readings(work, device, copy_speed, budget).items()}
    return description(work) | {"contenders": rows}


def readings(
    work: Work, device: str, copy_speed: float, budget: float, names: Iterable[str] | None = None
) -> dict[str, tuple[Row, list[float]]]:
    """The row and the times in seconds of each contender (of ``names``), all timed in turns."""
    kind = torch.device(device).type
    found, skipped = contenders(work, device, names)
    calls = {name: contender.call for name, contender in found.items()}
    times = interleaved(calls, kind, budget=budget, context=lambda name: found[name].context())
    rows: dict[str, tuple[Row, list[float]]] = {name: ({"skipped": reason}, []) for name, reason in skipped.items()}
    for name, contender in found.items():
        row = timed(times[name], work, copy_speed)
        if name != FLOOR:
            with contender.context():
                row["peak_extra_bytes"] = peak_extra_bytes(contender.call, kind)
                if kind == "cuda" and work.op != TRAINING:
                    row["device_s"] = device_seconds(contender.call)
        rows[name] = row, times[name]
    return rows


def description(work: Work) -> dict[str, Any]:
    """The work for people, and the bytes it must move where it is about bytes."""
    fields = {"work": work.title, "op": work.op, "size": work.size, "types": work.types, "direction": work.direction}
    return fields | ({"bytes": bytes_moved(work)} if bytes_moved(work) else {})


def timed(times: list[float], work: Work, copy_speed: float) -> Row:
    """Times in seconds, and what they are in bytes."""
    seconds, total = median(times), bytes_moved(work)
    low, high = quartiles(times)
    row: Row = {"median_s": seconds, "quartiles_s": [low, high], "rounds": len(times)}
    if total:
        speed = total / seconds
        row |= {"gb_per_s": round(speed / 1e9, 3), "share_of_copy": round(speed / copy_speed, 4)}
    return row
