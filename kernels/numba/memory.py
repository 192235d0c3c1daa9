"""Where large outputs come from: fresh memory whose first touch is cheap.

A fresh 25 MB tensor is 6,000 page faults, which cost more than the kernel that fills it. Where the system grants huge
pages on request (Linux, ``transparent_hugepage`` = ``madvise`` or ``always``), asking makes it a dozen.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes: two huge pages at the least lie whole inside
PAGE = 4096
HUGE_PAGE_ADVICE = 14  # MADV_HUGEPAGE, <sys/mman.h>


def _advise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise


_madvise = _advise()


def advise(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a fresh CPU ``tensor`` if it is large; advice that is not taken changes nothing."""
    if _madvise is not None and tensor.nbytes >= LARGE:
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        _madvise(start, (tensor.data_ptr() + tensor.nbytes - start) // PAGE * PAGE, HUGE_PAGE_ADVICE)
    return tensor


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, over huge pages where it is large."""
    return advise(torch.empty(shape, dtype=dtype))
