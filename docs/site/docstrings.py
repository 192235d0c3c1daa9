"""Docstrings as Markdown: examples in a fence, roles of reStructuredText as links or code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

#: what has an entry of its own in the reference, and can be linked
PAGES = "\n".join(path.read_text() for path in (Path(__file__).parent.parent / "api").glob("*.md"))
ENTRIES = set(re.findall(r"^::: (\S+)$", PAGES, re.MULTILINE)) - {"fastvae.nn", "fastvae.models"}


class AsMarkdown(griffe.Extension):
    """What doctest runs is shown as a session, not as a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """``text`` with fences around its examples, which end at an empty line."""
    text = re.sub(r":\w+:`~?([^`]+)`", _link, text)
    blocks = re.split(r"(\n\s*\n)", text)
    return "".join(f"```pycon\n{block}\n```" if block.lstrip().startswith(">>>") else block for block in blocks)


def _link(role: re.Match[str]) -> str:
    name = role[1]
    return f"[`{name}`][{name}]" if name in ENTRIES else f"`{name}`"
