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


def empty_like(tensor: Tensor, copies: int = 0) -> Tensor:
    """``layout.empty_like`` on the CPU, over huge pages where it is large; advice that is not taken changes nothing."""
    fresh = torch.empty((copies, *tensor.shape) if copies else tensor.shape, dtype=tensor.dtype, device="cpu")
    if _madvise is not None and fresh.nbytes >= LARGE:
        start = -(-fresh.data_ptr() // PAGE) * PAGE
        _madvise(start, (fresh.data_ptr() + fresh.nbytes - start) // PAGE * PAGE, HUGE_PAGE_ADVICE)
    return fresh
