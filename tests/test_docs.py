"""The site's pages: every snippet runs, every function has an entry, every error that is explained exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastvae

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS_TORCH = re.compile(r"^# torch >= ([\d.]+)\n")


@pytest.mark.parametrize("page", [p for p in PAGES if SNIPPET.search(p.read_text())], ids=lambda p: p.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after the other, as a reader would; a recipe for a library that is not here is skipped."""
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {"__name__": "__main__"}
    for snippet in SNIPPET.finditer(text):
        needs = NEEDS_TORCH.match(snippet[1])
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if needs and version < tuple(int(part) for part in needs[1].split(".")):
            continue
        line = text[: snippet.start(1)].count("\n")
        try:
            exec(compile("\n" * line + snippet[1], str(page), "exec"), names)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("fastvae"):
                raise
            pytest.skip(f"{error.name} is not installed")


def test_every_public_function_has_an_entry() -> None:
    entries = set(re.findall(r"^::: fastvae\.(\w+)$", "\n".join(p.read_text() for p in PAGES), re.MULTILINE))
    assert set(fastvae.__all__) - entries == {"functional", "random"}, "one by one, and by what is in it"


def says(template: str, message: str) -> bool:
    """Whether ``message`` begins an f-string's text, whose ``{…}`` may be anything."""
    if message in template:
        return True
    parts = [part.strip() for part in re.split(r"\{[^}]*\}", template)]
    for count in range(1, len(parts) + 1):
        pattern = ".*".join(map(re.escape, parts[:count])) + (".*" if count < len(parts) else "")
        if sum(map(len, parts[:count])) >= 9 and re.fullmatch(pattern, message):
            return True
    return False


def test_the_errors_that_are_explained_exist() -> None:
    sources = "\n".join(p.read_text() for folder in ("fastvae", "kernels") for p in (ROOT / folder).rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # a literal of several lines
    templates = re.findall(r'"([^"\n]*)"', sources)
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 10
    assert not any(says(template, "target ought to be nice") for template in templates), "the search can fail"
    for message in quoted:
        assert any(says(template, message) for template in templates), message
