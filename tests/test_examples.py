"""The examples for other libraries' trainers: each runs as it is typed, learns, and is short enough to copy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LIBRARIES = {"accelerate_vae": "accelerate", "lightning_vae": "lightning", "trainer_vae": "transformers"}
UNTRAINED = 64 * 0.69  # nats of 8×8 pixels that are as likely on as off


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_learns(name: str, tmp_path: Path) -> None:
    """In a process and a folder of its own, as trainers set global state and write files."""
    pytest.importorskip(LIBRARIES[name], reason=f"{LIBRARIES[name]} is not installed")
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    nats = re.findall(r"([\d.]+) nats", done.stdout)
    assert float(nats[-1]) < 0.7 * UNTRAINED
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
