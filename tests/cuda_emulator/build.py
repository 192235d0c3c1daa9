"""Builds ``csrc/`` for the CPU, kernels and all: ``fastvae._C`` whose CUDA kernels run in the emulator.

``FASTVAE_EMULATED_CUDA=$(python tests/cuda_emulator/build.py) pytest tests/test_ops.py -k cuda`` runs tests on it; with
``--sanitize`` it also has AddressSanitizer and UndefinedBehaviorSanitizer in it (see ``make sanitize``).
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-DFASTVAE_WITH_CUDA"]
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
X86 = platform.machine() in ("x86_64", "AMD64")
HEADERS = ("cub/block/block_reduce.cuh", "cub/warp/warp_reduce.cuh", "cuda_bf16.h", "cuda_fp16.h")  # emulator.h is all


def jobs(csrc: Path, folder: Path) -> list[tuple[Path, str, list[str]]]:
    """What to compile, the longest first: a file, a name for what is made of it, its flags."""
    emulated = ["-x", "c++", "-DFASTVAE_ISA=device", "-include", str(HERE / "emulator.h"), f"-I{folder}/include"]
    made = [(source, source.stem, emulated) for source in sorted(csrc.glob("device/*.cu"), reverse=True)]
    made.append(
        (csrc / "bindings.cpp", "bindings", [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"])
    )
    common = ["-DFASTVAE_X86"] if X86 else []
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    sets = {"avx2": avx2, "avx512": [*avx2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]} if X86 else {}
    for source in sorted(csrc.glob("host/*.cpp")):
        if source.stem in ("primitives", "threads"):
            made.append((source, f"host_{source.stem}", common))
            continue
        for name, flags in {"baseline": [], **sets}.items():
            made.append((source, f"{name}_{source.stem}", [*common, f"-DFASTVAE_ISA={name}", *flags]))
    return [*made, (HERE / "emulator.cpp", "emulator", [])]


def build(csrc: Path = ROOT / "csrc", sanitize: bool = False) -> Path:
    """The extension's file, in ``build/emulated``; each object is kept under a hash of what it is made from."""
    folder = ROOT / "build" / "emulated"
    compiler, flags = os.environ.get("CXX", "g++"), FLAGS + (SANITIZERS if sanitize else [])
    for header in HEADERS:
        (folder / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / "include" / header).touch()

    def hashed(headers: Iterable[Path]) -> hashlib._Hash:
        contents = b"".join(path.read_bytes() for path in sorted(headers))
        return hashlib.sha256(repr((compiler, flags)).encode() + contents)

    host = hashed([*csrc.glob("*.h"), *csrc.glob("*/*.h")])
    device = hashed([*csrc.rglob("*.*h"), HERE / "emulator.h"])

    def compile(job: tuple[Path, str, list[str]]) -> Path:
        source, name, extra = job
        key = (device if source.suffix == ".cu" or name == "emulator" else host).copy()
        key.update(repr(extra).encode() + source.read_bytes())
        made = folder / f"{name}-{key.hexdigest()[:16]}.o"
        if not made.exists():
            unfinished = made.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            subprocess.run([compiler, *flags, *extra, "-c", str(source), "-o", str(unfinished)], check=True)
            unfinished.rename(made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, jobs(csrc, folder)))
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = folder / f"_C-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        subprocess.run(
            [compiler, *flags, "-shared", "-pthread", *map(str, objects), "-ldl", "-o", str(unfinished)], check=True
        )
        unfinished.rename(library)
    return library


def load(library: str) -> None:
    """Makes it ``fastvae._C``, its kernels serving CPU tensors; before anything imports that."""
    loader = importlib.machinery.ExtensionFileLoader("fastvae._C", library)
    spec = importlib.util.spec_from_loader("fastvae._C", loader)
    assert spec is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.cuda.EMULATED = True
    sys.modules["fastvae._C"] = module


if __name__ == "__main__":
    print(build(sanitize="--sanitize" in sys.argv[1:]))
