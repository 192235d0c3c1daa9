"""Backend ``cuda`` on CPU tensors, in the emulator, with launches that do nothing: ``python tests/stubbed_cuda.py``."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
import build


def main() -> None:
    library = str(build.build())
    build.load(library)  # before fastvae
    ctypes.c_int32.in_dll(ctypes.CDLL(library), "emulator_idle").value = 1
    import stubbed_triton

    stubbed_triton.report("cuda")


if __name__ == "__main__":
    main()
