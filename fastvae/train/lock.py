"""One run at a time in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder`` inside the ``with`` block; no file is left in it.

    Raises:
        UserError: another run has the folder.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: wait for it, or choose another --output") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
