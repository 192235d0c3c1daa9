"""Measures everything on one device and leaves a results file: ``python -m fastvae.benchmarks.run [--device cuda]``.

The works of ``fastvae bench --full``, then the bars. ``others`` in the file says whether the machine was idle.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import bars, suite, table, works
from .command import check_writable, save
from .hardware import checkout


def slug(results: dict[str, Any]) -> str:
    """The hardware as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", results["hardware"]["name"].lower()).strip("-")


def main(device: str = "cpu", output: Path | None = None) -> Path:
    """Measure all works and the bars, print both, write ``output`` and return where that is.

    Without ``output``: ``benchmarks/results/<hardware>-<date>.json``.
    """
    path = output or checkout() / "benchmarks" / "results"
    if output is not None:
        check_writable(path)
    results = suite.run(works.full(device.partition(":")[0]), device)
    print("\n".join(table.lines(results)), end="\n\n")
    found = bars.every(results, device)
    print("\n".join(bars.lines(found)))
    results["bars"] = [bar._asdict() for bar in found]
    if output is None:
        path /= f"{slug(results)}-{results['date']}.json"
    save(results, path)
    print(f"\nevery number: {path}")
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastvae.benchmarks.run", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: cpu)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="(default: named after the hardware)")
    parser.add_argument("--publish", action="store_true", help="then write the table of the README and the picture")
    return parser.parse_args()


if __name__ == "__main__":
    options = _options()
    try:
        if options.publish:
            checkout()
        written = main(options.device, options.output)
        if options.publish:
            from . import publish

            publish.main(written)
    except UserError as error:
        sys.exit(f"fastvae.benchmarks.run: error: {error}")
