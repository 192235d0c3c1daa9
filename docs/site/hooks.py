"""What MkDocs is told at build time: which pages there are, in which order, and what they take from elsewhere.

A page that another change brings (a recipe, the gallery) is listed as soon as it is there. The tables of speed are the
README's own, and how they were measured is ``benchmarks/README.md``: nothing is written twice.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES: dict[str, Any] = {
    "Start": "index.md",
    "I have a …": ["recipes/index.md", "recipes/*.md"],
    "Several processes": "distributed.md",
    "Gallery": "gallery.md",
    "Performance": ["performance.md", "measured/*.md"],
    "Troubleshooting": "troubleshooting.md",
    "Reference": ["api/functions.md", "api/modules.md", "api/models.md", "api/other.md"],
    "Which call": "which-call.md",
    "How it works": ["mathematics.md", "pairs.md", "noise.md", "how-a-call-travels.md", "design.md"],
}
#: pages made of files that lie elsewhere, and those whose own title is long
TAKEN = {"measured/how.md": "benchmarks/README.md"} | {
    f"measured/{path.name}": f"benchmarks/results/{path.name}" for path in ROOT.glob("benchmarks/results/*.md")
}
SHORT = {
    "measured/how.md": "How it is measured",
    "measured/gpu-predictions.md": "Predictions for a GPU",
    "measured/nvidia-h200-2026-11-26.md": "H200, 26 November 2026",
    "measured/nvidia-h200-2026-11-27.md": "H200, 27 November 2026",
}


def on_files(files: Files, config: Any) -> Files:
    """Add what is taken, and list in the navigation what is there."""
    for page, source in TAKEN.items():
        files.append(File.generated(config, page, content=_without_outer_links((ROOT / source).read_text())))
    there = sorted(file.src_uri for file in files.documentation_pages())
    listed: set[str] = set()

    def find(pattern: str) -> list[Any]:
        found = [page for page in there if fnmatchcase(page, pattern) and page not in listed]
        listed.update(found)
        return [{SHORT[page]: page} if page in SHORT else page for page in found]

    nav: list[Any] = []
    for title, what in PAGES.items():
        if isinstance(what, str):
            nav += [{title: what} for _ in find(what)]
        else:
            nav.append({title: [page for pattern in what for page in find(pattern)]})
    if rest := [page for page in there if page not in listed]:
        nav.append({"More": rest})
    config["nav"] = nav
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill ``<!-- readme: NAME -->`` with the README's part NAME."""
    return re.sub(r"<!-- readme: (.+?) -->", lambda found: _of_readme(found[1]), markdown)


def _of_readme(name: str) -> str:
    """What is between the README's marks ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no part {name!r}")
    part = re.sub(r"(\d) (ms|µs|s)\b", "\\1\N{NO-BREAK SPACE}\\2", found[1])
    return part.replace("(docs/images/", "(images/")


def _without_outer_links(markdown: str) -> str:
    """Links to files of the repository that are no pages become their text."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", markdown)
