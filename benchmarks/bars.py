"""Prints each bar the CPU kernels are held to, with what was measured beside it: ``python -m fastvae.benchmarks.bars``.

Speed and memory come from one run in which contenders take turns, then accuracy against float64, the parts of a small
call, and what a fresh process waits for. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import accuracy, launch_cost, startup, suite
from .contenders import COMPILE, EAGER, FLOOR
from .ops import OPS, gradient_bytes
from .table import aligned, by_work, duration, head, ratio
from .works import COUNTS, INFLATED, MANY_COUNTS, MANY_INFLATED, SCORES, SHORT, TRAINING, Work

LOGITS, PROBS, HALF, LATENT, SMALL, STEP = SHORT

#: work, times faster than eager, times faster than compile, times the floor's time at most (None: state it)
SPEED: tuple[tuple[Work, float, float, float | None], ...] = (
    (LOGITS, 5, 3.5, 2.5),
    (PROBS, 12, 2.5, 3),
    (LATENT, 3, 8, None),
    (SMALL, 3.3, 2.8, None),
    (HALF, 4, 2, None),
    (COUNTS, 6, 4.5, None),
    (MANY_COUNTS, 6, 4.5, None),
    (INFLATED, 6, 4.5, None),
    (MANY_INFLATED, 6, 4.5, None),
    (SCORES, 6, 5, None),
    (STEP, 1, 1, None),
)
IMPORT_MS = 60
ROW_SUMS = 0.01  # of a gradient: one float64 a row or block, and scalars, are not a second buffer
PARTIAL_SUMS = 0.25  # of a gradient: what is learned for a column is summed in parts, a float64 for each 8 rows


class Bar(NamedTuple):
    """``passed`` is None where the bar is to state the number."""

    what: str
    measured: str
    bar: str
    passed: bool | None


def speed(results: dict[str, Any]) -> Iterator[Bar]:
    """Ratios of medians in one run."""
    fast = results["default"]
    for work, eager, compiled, floor in SPEED:
        rows = by_work(results).get(work.title, {})
        for name, least in ((EAGER, eager), (COMPILE, compiled)):
            value = ratio(rows, name, fast)
            passed = value is not None and value >= least
            yield Bar(f"{work.title}, vs {name}", _ratio(value), f"≥ {least:g}×", passed)
        value = ratio(rows, fast, FLOOR)
        if floor is not None:
            yield Bar(f"{work.title}, vs {FLOOR}", _ratio(value), f"≤ {floor:g}×", value is not None and value <= floor)
        elif work.op != TRAINING:
            yield Bar(f"{work.title}, vs {FLOOR}", _ratio(value), "state it", None)


def _ratio(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}×"


def compiled_step(results: dict[str, Any]) -> Iterator[Bar]:
    """Our ops inside a compiled model, which is how people who compile use them."""
    name = f"{results['default']} + {COMPILE}"
    value = ratio(by_work(results).get(STEP.title, {}), COMPILE, name)
    if value is not None:
        yield Bar(f"{STEP.title}, {name} vs {COMPILE}", _ratio(value), "state it", None)


def memory(results: dict[str, Any]) -> Iterator[Bar]:
    """Peak extra memory of forward + backward, in units of the gradients it returns."""
    for work, *_ in SPEED:
        row = by_work(results).get(work.title, {}).get(results["default"])
        if row and work.op != TRAINING and work != LATENT:
            share, most = row["peak_extra_bytes"] / gradient_bytes(work), 1 + PARTIAL_SUMS * OPS[work.op].learned
            what, passed = f"{work.title}, peak extra memory", share <= most + ROW_SUMS
            yield Bar(what, f"{share:.3f} gradients", f"≤ {most:g}", passed)


def errors(device: str) -> Iterator[Bar]:
    """One line an op and dtype: the worse of the loss and its gradients."""
    for op, dtype, ours, eager, passed in accuracy.measure(device):
        what = f"{op} · {str(dtype).removeprefix('torch.')}, error against float64"
        yield Bar(what, f"{ours:.1e}, eager {eager:.1e}", "≤ 2× eager", passed)


def small_call(device: str) -> Iterator[Bar]:
    """Where the microseconds of the small call go."""
    for part, time in launch_cost.parts(SMALL, device).items():
        yield Bar(f"{SMALL.title}, {part}", duration(time), "state it", None)


def fresh_process(device: str) -> Iterator[Bar]:
    """Import and first call."""
    time = startup.import_seconds()
    passed = time <= IMPORT_MS / 1e3
    yield Bar("import fastvae, torch being imported", duration(time), f"≤ {IMPORT_MS} ms", passed)
    for cache, time in startup.first_call_seconds(device).items():
        yield Bar(f"first elbo_loss of a process, {cache} compile cache", duration(time), "state it", None)


def every(results: dict[str, Any], device: str) -> list[Bar]:
    """All bars; those of speed and memory from ``results``, and only of a CPU, for which they were set."""
    timed = [*speed(results), *compiled_step(results), *memory(results)] if device == "cpu" else []
    return [*timed, *errors(device), *small_call(device), *fresh_process(device)]


def lines(bars: list[Bar]) -> Iterator[str]:
    """A table and a count."""
    verdicts = {True: "pass", False: "MISS", None: ""}
    yield from map(str.rstrip, aligned([(*bar[:3], verdicts[bar.passed]) for bar in bars]))
    judged = [bar for bar in bars if bar.passed is not None]
    yield f"\n{sum(bar.passed is True for bar in judged)} of {len(judged)} bars met"


def main() -> int:
    """Measure and print."""
    results = suite.run([work for work, *_ in SPEED], "cpu")
    print("\n".join(head(results)))
    found = every(results, "cpu")
    print("\n".join(lines(found)))
    return 0 if all(bar.passed is not False for bar in found) else 1


if __name__ == "__main__":
    sys.exit(main())
