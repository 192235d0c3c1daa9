"""Draws how near each contender comes to the memory's speed: bars of GB/s that had to move, a line at a copy's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .contenders import COMPILE, EAGER
from .table import by_work, duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#b8c0c8", "#56b4e9", "#0072b2")  # eager and compile step back
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # no grid line through a label
HEIGHT = 0.26  # of a bar; three of them leave a gap between works


def draw(results: dict[str, Any], titles: list[str]) -> Figure:
    """One group of bars for each of ``titles`` that is about bytes; each bar ends in its time."""
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
