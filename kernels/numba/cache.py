"""Compiled kernels on disk, so that a second process does not wait for the compiler.

Numba looks only at the file of the function itself; a kernel here is also made of the other files of this folder, so
their contents are part of the key (``STAMP``, which every kernel mentions).
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TypeVar

Function = TypeVar("Function")

STAMP = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:16]


def on_disk(function: Function) -> Function:
    """Keep what ``function`` compiles to in Numba's cache; in memory only where no folder is writable."""
    with contextlib.suppress(RuntimeError):
        function.enable_caching()  # type: ignore[attr-defined]
    return function
