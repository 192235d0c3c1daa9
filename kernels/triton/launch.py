"""Launch sizes, in one place: what one program covers, how many threads it has, how many programs there are.

A *tile* is what a program holds at once; a program walks ``steps`` tiles of ``block`` columns along its rows.
The numbers and their reasons (a Hopper or Ampere card, 108 to 132 multiprocessors):

* 2048 elements a tile, 4 warps: 16 elements a thread are four 16-byte loads of each float32 tensor (two of each
  bfloat16 one) in flight before the first use, and at 32 to 96 registers a thread 5 to 16 programs share a
  multiprocessor.
* 512 in float64, whose exp and log, libm's, need the registers.
* At least 2048 programs where the input is large enough: two for each of 8 places on 128 multiprocessors, so that the
  last ones to finish are few beside the rest. Only beyond that does a program take more steps.
* At most 64 steps: a thread multiplies one factor in [1, 2] a step, and 2¹²⁷ is the end of float32.
* Rows shorter than a tile share it.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

TILE = 2048
FLOAT64_TILE = 512
WARPS = 4
PROGRAMS = 2048
MAX_STEPS = 64


class Launch(NamedTuple):
    """Tiles of ``rows`` × ``block``; ``chunks`` programs along the columns, ``programs`` in all."""

    rows: int
    block: int
    steps: int
    chunks: int
    programs: int


def plan(rows: int, cols: int, dtype: torch.dtype) -> Launch:
    """How ``rows`` rows of ``cols`` elements are covered; dense tensors whose rows do not matter are one row."""
    tile = FLOAT64_TILE if dtype == torch.float64 else TILE
    block = min(tile, max(4, 1 << (cols - 1).bit_length()))
    tile_rows = min(tile // block, 1 << (rows - 1).bit_length())
    row_tiles, col_tiles = -(-rows // tile_rows), -(-cols // block)
    steps = max(1, min(col_tiles, MAX_STEPS, row_tiles * col_tiles // PROGRAMS))
    chunks = -(-col_tiles // steps)
    return Launch(tile_rows, block, steps, chunks, row_tiles * chunks)


def run(kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Launch on the device of ``on``, whichever is current. ``args`` and then ``constants`` are all its parameters."""
    if on.device.type == "cuda" and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            _launch(kernel, programs, on.device.index, args, constants)
    else:
        _launch(kernel, programs, on.device.index, args, constants)


# what Triton compiled for a kernel, a device, and all it tells apart in arguments; and the order of the constants
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}


def _launch(kernel: Any, programs: int, device: int | None, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """``kernel[grid](…)``; from the second call on with what that compiled, which spares Triton its own look-up.

    There every argument is classified, and every global variable that the kernel mentions is compared with what it
    was: 18 µs a launch, against 10 (tests/stubbed_triton.py).
    """
    if INTERPRETED:
        kernel[(programs,)](*args, **constants, num_warps=WARPS)
        return
    key = (id(kernel), device, *map(_kind, args), *constants.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants, num_warps=WARPS)
        _compiled[key] = compiled, tuple(kernel.arg_names[len(args) :])
    else:
        compiled, names = found
        compiled[(programs, 1, 1)](*args, *[constants[name] for name in names])


def _kind(argument: Tensor | float) -> Any:
    """All that Triton specialises on: dtype and alignment of a tensor, 1 and multiples of 16, 32 bits or 64."""
    if type(argument) is int:
        return argument == 1, argument & 15 == 0, -(1 << 31) <= argument < 1 << 31
    if isinstance(argument, Tensor):
        return argument.dtype if argument.data_ptr() & 15 == 0 else (argument.dtype,)
    return float  # kernels say float64
