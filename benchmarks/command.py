"""``fastvae bench``: a short table for the machine it stands on, and all numbers as JSON."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import UserError


def run(options: Namespace, device: str) -> None:
    """Measure, print, save."""
    try:
        from . import suite, table, works
    except ImportError as error:
        raise UserError(f"{error}: pip install matplotlib pytest-benchmark") from None
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {device}")
    if options.output is not None:
        check_writable(options.output)
    every = works.full(kind) if options.full else works.short(kind)
    chosen = [work for work in every if options.only in work.title]
    if not chosen:
        names = ", ".join(sorted({work.op for work in every}))
        raise UserError(f"--only {options.only!r} matches no work; there are {names}")
    results = suite.run(chosen, device, suite.BUDGET / 2)
    print("\n".join(table.lines(results)))
    if options.output is not None:
        save(results, options.output)
        print(f"\nevery number: {options.output}")


def check_writable(path: Path) -> None:
    """Before minutes are spent, not after."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    if not existed:
        path.unlink()


def save(results: dict[str, Any], path: Path) -> None:
    """As JSON with a line for each work, so that two files can be compared by ``diff``."""
    try:
        path.write_text(as_json(results), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def as_json(results: dict[str, Any]) -> str:
    """One line a field, and one an element where the field is a list."""
    fields = []
    for name, value in results.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(element, ensure_ascii=False) for element in value) + "\n ]"
        fields.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(fields) + "\n}\n"
