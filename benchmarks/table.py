"""The short table: one line a work, what the default backend takes and how many times longer the others do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .contenders import COMPILE, EAGER, FLOOR

BUSY = 0.1  # cores that others may keep busy, for each thread of ours

Rows = dict[str, dict[str, Any]]  # of one work, by contender


def by_work(results: dict[str, Any]) -> dict[str, Rows]:
    """The rows that have numbers, by work and contender."""
    return {
        work["work"]: {name: row for name, row in work["contenders"].items() if "skipped" not in row}
        for work in results["works"]
    }


def ratio(rows: Rows, slow: str, fast: str) -> float | None:
    """How many times longer ``slow`` takes than ``fast``; None if one of them did not run."""
    if slow not in rows or fast not in rows:
        return None
    return rows[slow]["median_s"] / rows[fast]["median_s"]


def duration(seconds: float) -> str:
    """Three digits and a unit people read.

    >>> duration(0.00123), duration(47.2e-6), duration(2.5)
    ('1.23 ms', '47.2 µs', '2.50 s')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        value = seconds * factor
        if value >= 1 or unit == "µs":
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError


def times(value: float | None) -> str:
    """A ratio.

    >>> times(2.34), times(None)
    ('2.3×', '–')
    """
    return "–" if value is None else f"{value:.{1 if value < 100 else 0}f}×"


def is_busy(results: dict[str, Any]) -> bool:
    """Whether too much else ran on the machine for the numbers to mean much."""
    return (results["others"] or 0) > BUSY * results["threads"]


def head(results: dict[str, Any]) -> Iterator[str]:
    """Where and with what, and whether others were at work there."""
    machine, versions, speeds = results["hardware"], results["versions"], results["bandwidth"]
    yield (
        f"{machine['name']}, {results['threads']} threads, torch {versions['torch']}; "
        f"copy {speeds['copy']:.1f} GB/s, 3-stream loop {speeds['three_stream']:.1f} GB/s"
    )
    if is_busy(results):
        yield f"others kept {results['others']:.1f} cores busy during this run: expect noise, and trust no ratio"
    yield ""


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Cells in columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        yield "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])


def _device(rows: Rows, name: str) -> float | None:
    """Seconds on a GPU alone; None if they were not measured."""
    return rows.get(name, {}).get("device_s")


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The report ``fastvae bench`` prints."""
    yield from head(results)
    fast = results["default"]
    all_rows = by_work(results)
    on_device = [name for name in (fast, EAGER, COMPILE) if any(_device(rows, name) for rows in all_rows.values())]
    table = [("work", fast, "GB/s", "vs eager", "vs compile", "vs floor", *(f"device: {n}" for n in on_device))]
    for title, rows in all_rows.items():
        if fast not in rows:
            continue
        own = rows[fast]
        table.append(
            (
                title,
                duration(own["median_s"]),
                f"{own['gb_per_s']:.1f}" if "gb_per_s" in own else "–",
                times(ratio(rows, EAGER, fast)),
                times(ratio(rows, COMPILE, fast)),
                times(ratio(rows, fast, FLOOR)),
                *(duration(seconds) if (seconds := _device(rows, name)) else "–" for name in on_device),
            )
        )
    yield from aligned(table)
    yield ""
    yield "vs eager, vs compile: how many times longer they take. vs floor: our time over that of the plainest loop"
    yield "that moves the bytes that must move. Contenders took turns; medians."
    if on_device:
        yield "device: what a call keeps the GPU, without the host's part: it finds its work queued."
    everybody = [pair for work in results["works"] for pair in work["contenders"].items()]
    yield from sorted({f"{name} was skipped: {row['skipped']}" for name, row in everybody if "skipped" in row})
