"""Launch sizes, in one place: what one program covers, how many threads it has, how many programs there are.

A *tile* is what a program holds at once; a program walks ``steps`` tiles of ``block`` columns along its rows.
The numbers, as an H200 liked them best among tiles of 1024 to 4096 elements, 2 to 8 warps and 2048 to 32,768 programs:

* 8 elements a thread: two 16-byte loads of each float32 tensor, or one of each bfloat16 one, in flight before the first
  use. With 16, `bce_with_logits` takes as long in float32 and 7% longer in bfloat16: they need the registers of 8.
* 8 warps in half precision, 4 in float32: 3 to 8% for the sampler in bfloat16, 1% for losses.
* 4 elements a thread in float64, whose exp and log, libm's, need the registers.
* At least 8192 programs where the input is large enough: so many that the last ones to finish are few beside the rest.
  2048 take up to 5% longer, and so do 32,768 in bfloat16. Only beyond that does a program take more steps.
* At most 64 steps: a thread multiplies one factor in [1, 2] a step, and 2¹²⁷ is the end of float32.
* Rows shorter than a tile share it.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

TILE = 1024
FLOAT64_TILE = 512
WARPS = 4 if torch.version.hip is None else 2  # of 32 threads, or of 64
HALF_TILE, HALF_WARPS = 2 * TILE, 2 * WARPS
PROGRAMS = 8192
MAX_STEPS = 64


class Launch(NamedTuple):
    """Tiles of ``rows`` × ``block``; ``chunks`` programs along the columns, ``programs`` of ``warps`` in all."""

    rows: int
    block: int
    steps: int
    chunks: int
    programs: int
    warps: int


@functools.cache
def plan(rows: int, cols: int, dtype: torch.dtype) -> Launch:
    """How ``rows`` rows of ``cols`` elements are covered; dense tensors whose rows do not matter are one row."""
    half = dtype.itemsize == 2
    tile = HALF_TILE if half else FLOAT64_TILE if dtype == torch.float64 else TILE
    block = min(tile, max(4, 1 << (cols - 1).bit_length()))
    tile_rows = min(tile // block, 1 << (rows - 1).bit_length())
    row_tiles, col_tiles = -(-rows // tile_rows), -(-cols // block)
    steps = max(1, min(col_tiles, MAX_STEPS, row_tiles * col_tiles // PROGRAMS))
    chunks = -(-col_tiles // steps)
    return Launch(tile_rows, block, steps, chunks, row_tiles * chunks, HALF_WARPS if half else WARPS)


# what Triton compiled for a kernel, a device, and all it tells apart in arguments; its launcher; the order of constants
_compiled: dict[tuple[Any, ...], tuple[Any, Any, tuple[str, ...]]] = {}


def run(kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """``kernel[grid](…)`` on the device of ``on``, whichever is current.

    ``args`` and then ``constants`` are all its parameters; among the latter may be Triton's ``num_warps``, else 4.
    From the second call on what that compiled is launched as Triton itself does, without Triton's look-up: there
    every argument is classified in Python, and every global variable that the kernel mentions is compared with what it
    was. 18 µs a launch, against 6 (tests/stubbed_triton.py).
    """
    device = on.get_device()  # -1: a CPU
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return run(kernel, programs, on, *args, **constants)
    if INTERPRETED:
        kernel[(programs,)](*args, **constants)
        return None
    # all that Triton specialises on: dtype and alignment of a tensor; 1 and multiples of 16, 32 bits or 64
    key: list[Any] = [id(kernel), device]
    for argument in args:
        if type(argument) is int:
            key.append((argument == 1) | (argument & 15 == 0) << 1 | (-(1 << 31) <= argument < 1 << 31) << 2)
        elif isinstance(argument, Tensor):
            key.append(argument.dtype if argument.data_ptr() & 15 == 0 else (argument.dtype,))
        else:
            key.append(float)  # kernels say float64
    look_up = (*key, *constants.values())
    found = _compiled.get(look_up)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants)
        names = tuple(kernel.arg_names[len(args) :])
        _compiled[look_up] = compiled, compiled.run, names
        return None
    compiled, launch, names = found
    for name in names:
        args += (constants[name],)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
        compiled[(programs, 1, 1)](*args)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
        launch(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
    return None
