"""Makes the README's table and a picture of a results file: ``python -m fastvae.benchmarks.publish RESULTS.json``.

The table stands between the comments ``<!-- benchmarks cpu -->`` and ``<!-- /benchmarks cpu -->`` (or ``cuda``) and is
replaced whole: no number is written by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import works
from .contenders import COMPILE, EAGER
from .hardware import checkout
from .run import slug
from .suite import SCHEMA
from .table import by_work, duration, is_busy, ratio, times
from .works import TRAINING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#b8c0c8", "#56b4e9", "#0072b2")  # eager and compile step back
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # no grid line through a label
HEIGHT = 0.26  # of a bar; three of them leave a gap between works


def load(path: Path) -> dict[str, Any]:
    """A results file of this schema."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a results file of schema {SCHEMA}")
    return results


def published(results: dict[str, Any]) -> list[str]:
    """Titles of the works people are shown: those of ``fastvae bench``, and every batch size of a training step."""
    titles = [work.title for work in works.short(results["hardware"]["device"]) if work.op != TRAINING]
    titles += [work["work"] for work in results["works"] if work["op"] == TRAINING]
    return [title for title in dict.fromkeys(titles) if results["default"] in by_work(results).get(title, {})]


def markdown(results: dict[str, Any], source: str) -> Iterator[str]:
    """The lines of the table, and where its numbers come from."""
    fast = results["default"]
    yield f"| forward + backward | eager | `torch.compile` | {fast} | vs eager | vs compile | GB/s, share of a copy |"
    yield "| --- " * 7 + "|"
    for title in published(results):
        rows = by_work(results)[title]
        cells = [duration(rows[name]["median_s"]) if name in rows else "–" for name in (EAGER, COMPILE, fast)]
        cells += [times(ratio(rows, EAGER, fast)), times(ratio(rows, COMPILE, fast))]
        own = rows[fast]
        cells.append(f"{own['gb_per_s']:.1f}, {own['share_of_copy']:.0%}" if "gb_per_s" in own else "–")
        name = title.replace(" · forward + backward", "").replace(" · ", ", ")
        yield f"| {' | '.join([name, *cells])} |"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if name != "fastvae")
    yield ""
    device = results["hardware"]["device"]
    others = f"{results['others']:.1f} cores busy with something else, " if is_busy(results) else ""
    yield (
        f"*{results['hardware']['name']}, {results['threads']} threads, copy {results['bandwidth']['copy']:.1f} GB/s; "
        f"{versions}; {results['date']}, {others}commit {results['commit'] or 'unknown'}. "
        f"Medians, contenders in turns: `{source}`, by `python -m fastvae.benchmarks.run --device {device}`.*"
    )


def draw(results: dict[str, Any], titles: list[str]) -> Figure:
    """How near each contender comes to the memory's speed: GB/s that had to move, a line at a copy's.

    One group of bars for each of ``titles`` that is about bytes; each bar ends in its time.
    """
    from ..train.plots import FAINT, INK, STYLE, plt

    names = [EAGER, COMPILE, results["default"]]
    table = {title: by_work(results)[title] for title in titles}
    table = {title: rows for title, rows in table.items() if "gb_per_s" in rows[results["default"]]}
    copy = results["bandwidth"]["copy"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.6 + 0.85 * len(table)))
        for k, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
            bars = [(y, rows[name]) for y, rows in enumerate(table.values()) if name in rows]
            places = [y + (k - 1) * HEIGHT for y, _ in bars]
            axes.barh(places, [row["gb_per_s"] for _, row in bars], HEIGHT * 0.88, color=colour, label=name, zorder=2)
            for place, (_, row) in zip(places, bars, strict=True):
                end, text = (row["gb_per_s"], place), duration(row["median_s"])
                style: dict[str, Any] = {"va": "center", "fontsize": 8.5, "color": INK, "zorder": 4, "bbox": PAPER}
                axes.annotate(text, end, (5, 0), textcoords="offset points", **style)
        axes.axvline(copy, color="#d55e00", linewidth=1.5, zorder=3)
        axes.text(copy, -0.62, f"copy, {copy:.0f} GB/s ", color="#d55e00", ha="right", va="center", fontsize=9)
        axes.set_yticks([])
        side = axes.get_yaxis_transform()  # x in widths of the axes, y in works
        for y, title in enumerate(table):
            op, size, types, *_ = title.split(" · ")
            axes.text(-0.015, y - 0.11, op, transform=side, ha="right", va="center", fontweight="bold")
            axes.text(-0.015, y + 0.15, f"{size}, {types}", transform=side, ha="right", va="center", fontsize=8.5)
        axes.set_ylim(len(table) - 0.45, -0.8)
        highest = max(row["gb_per_s"] for rows in table.values() for n, row in rows.items() if n in names)
        axes.set_xlim(0, max(copy, highest) * 1.12)
        axes.set_xlabel("GB/s of the bytes that must move, forward + backward; beside each bar its time")
        axes.spines["left"].set_color(FAINT)
        machine = results["hardware"]["name"]
        figure.suptitle(f"{machine}, {results['threads']} threads", x=0.01, ha="left", fontweight="bold", fontsize=12)
        figure.legend(loc="outside upper right", ncols=3, frameon=False)
    return figure


def insert(text: str, section: str, lines: list[str]) -> str:
    """``text`` with ``lines`` between the two comments of ``section``."""
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise UserError(f"expected one pair of comments {begin} … {end}, got {len(pattern.findall(text))}")
    return pattern.sub(lambda _: "\n".join([begin, *lines, end]), text)


def main(source: Path, *, readme: Path | None = None, pictures: Path | None = None, busy: bool = False) -> list[Path]:
    """Write the table and draw the picture; returns the files written. Of a ``busy`` machine only if told so."""
    root = checkout()
    readme, pictures = readme or root / "README.md", pictures or root / "docs" / "images"
    results = load(source)
    if is_busy(results) and not busy:
        raise UserError(
            f"others kept {results['others']:.1f} cores busy while {source} was measured: "
            "measure again on an idle machine, or publish it with that remark by --busy"
        )
    where = source.resolve().relative_to(root) if source.resolve().is_relative_to(root) else Path(source.name)
    picture = pictures / f"roofline-{slug(results)}.png"
    link = os.path.relpath(picture, readme.parent).replace(os.sep, "/")
    alt = f"What each contender makes of the memory's speed on {results['hardware']['name']}"
    lines = [*markdown(results, where.as_posix()), "", f"![{alt}]({link})"]
    try:
        text = insert(readme.read_text(encoding="utf-8"), f"benchmarks {results['hardware']['device']}", lines)
        draw(results, published(results)).savefig(picture, dpi=160)
        readme.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from None
    return [readme, picture]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fastvae.benchmarks.publish", description=__doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("--busy", action="store_true", help="also if the machine was not idle; the table says so")
    options = parser.parse_args()
    try:
        print(*main(options.results, busy=options.busy), sep="\n")
    except UserError as error:
        sys.exit(f"fastvae.benchmarks.publish: error: {error}")
