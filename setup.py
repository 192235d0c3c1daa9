"""Packages, where they lie, and the extensions ``fastvae._C`` and ``fastvae._autograd``. Metadata is in pyproject.toml.

``kernels/`` is installed as ``fastvae.kernels``, ``benchmarks/`` as ``fastvae.benchmarks``. The extension is built from
``csrc/`` with whatever is there: with ``nvcc`` for CPU and GPU, without it for the CPU, without a C++ compiler not at
all. The install succeeds each time.

``fastvae._C`` knows nothing of PyTorch. ``fastvae._autograd`` saves a call some 40 µs of Python, and serves the torch
that the environment holds at install, no other: without one there, or with ``FASTVAE_AUTOGRAD=0``, it is left out.

``CUDA_HOME`` says which CUDA toolkit, else the ``nvcc`` on the path is asked. ``FASTVAE_CUDA_ARCHS="80 90"`` builds
for those only (the last generation also as PTX, for newer ones); ``FASTVAE_CUDA=0`` builds for the CPU only.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

SOURCES = Path("csrc")
AUTOGRAD = SOURCES / "autograd" / "module.cpp"
CUDA_ARCHS = "80 86 89 90 100"
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 warns of its own headers
AVX512.append("-fno-tree-slp-vectorize")  # GCC 12 crashes in that pass, which has nothing to do: all is vectors


class Toolkit:
    """A CUDA toolkit: its compiler, the architectures to build for, and the folder of its libraries."""

    def __init__(self, nvcc: str):
        # the nvcc on the path may be a script that calls another: only a dry run says where it lies
        answer = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.*)$", answer, re.MULTILINE)
        if top is None:
            raise FileNotFoundError(f"{nvcc} does not say where its toolkit is")
        self.nvcc, self.top = nvcc, Path(top[1]).resolve()
        found = sorted(self.top.glob("lib*/libcudart_static.a")) + sorted(
            self.top.glob("targets/*/lib/*cudart_static.a")
        )
        if not found:
            raise FileNotFoundError(f"no libcudart_static.a under {self.top}")
        self.library = found[0]
        known = set(re.findall(r"sm_(\w+)", subprocess.check_output([nvcc, "--list-gpu-code"], text=True)))
        wanted = os.environ.get("FASTVAE_CUDA_ARCHS", CUDA_ARCHS).replace(",", " ").split()
        self.archs = [arch for arch in wanted if arch in known]
        if not self.archs:
            raise FileNotFoundError(f"{nvcc} knows none of the architectures {' '.join(wanted)}")

    def command(self, source: Path, target: Path) -> list[str]:
        # one intermediate code for a generation: it is the slower half of the work
        generations = [list(group) for _, group in groupby(self.archs, key=lambda arch: arch[:-1])]
        codes = [f"-gencode=arch=compute_{g[0]},code=[{','.join('sm_' + arch for arch in g)}]" for g in generations]
        codes.append("-gencode=arch=compute_{0},code=compute_{0}".format(generations[-1][0]))
        flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
        flags.append("-DFASTVAE_ISA=device")
        return [self.nvcc, *flags, *codes, "-c", str(source), "-o", str(target)]


def find_toolkit() -> Toolkit | str:
    """The CUDA toolkit to build with, or why there is none."""
    if os.environ.get("FASTVAE_CUDA") == "0":
        return "FASTVAE_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        return f"no nvcc in {home}/bin" if home else "no nvcc on the path"
    try:
        return Toolkit(nvcc)
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)


def find_torch() -> tuple[Path, str] | str:
    """Folder and version of this environment's torch, which an isolated build cannot import; or why there is none."""
    if os.environ.get("FASTVAE_AUTOGRAD") == "0":
        return "FASTVAE_AUTOGRAD=0"
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for place in places:
        if (place / "version.py").exists() and (place / "include").is_dir():
            version = re.search(r"^__version__ = ['\"](.+)['\"]$", (place / "version.py").read_text(), re.MULTILINE)
            if version is not None:
                return place, version[1]
    return "no torch in this environment"


class BuildExtension(build_ext):
    """Compiles the host loops once for each instruction set, the kernels with nvcc, and links them."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastvae._autograd":
            self.build_autograd(ext)
            return
        toolkit = find_toolkit()
        try:
            self.build(ext, toolkit)
        except subprocess.CalledProcessError as error:
            toolkit = f"{error.cmd[0]} failed"
        except (BaseError, CCompilerError, OSError) as error:
            say(f"no compiled extension, the other backends serve: {error}")
            raise
        else:
            return
        self.build(ext, toolkit)

    def build_autograd(self, ext: Extension) -> None:
        torch = find_torch()
        if isinstance(torch, str):
            say(f"no compiled graph nodes, small calls take longer: {torch}")
            raise CompileError(torch)
        place, version = torch
        flags = [*FLAGS[1:], "-std=c++20", f'-DFASTVAE_TORCH="{version}"']  # as the headers of torch 2.14 want it
        headers = [str(place / "include"), str(place / "include/torch/csrc/api/include")]
        try:
            made = self.compiler.compile(
                ext.sources,
                output_dir=str(Path(self.build_temp) / "csrc" / "autograd"),
                include_dirs=self.compiler.include_dirs,
                extra_postargs=[*flags, *(f"-isystem{header}" for header in headers)],
            )
            hidden = ["-Wl,--exclude-libs,ALL", "-Wl,-s"] if sys.platform.startswith("linux") else []
            self.compiler.link_shared_object(
                made,
                self.get_ext_fullpath(ext.name),
                libraries=["torch_python", "torch_cpu", "c10"],
                library_dirs=[str(place / "lib")],
                extra_postargs=hidden,
                target_lang="c++",
            )
        except (BaseError, CCompilerError, OSError) as error:
            say(f"no compiled graph nodes, small calls take longer: {error}")
            raise
        say(f"built graph nodes for torch {version}")

    def build(self, ext: Extension, toolkit: Toolkit | str) -> None:
        import pybind11  # a requirement of the build, not of reading this file

        objects = Path(self.build_temp) / "csrc"
        common = ["-DFASTVAE_X86"] if platform.machine() in ("x86_64", "AMD64") else []
        host = SOURCES / "host"
        jobs = [(host / "threads.cpp", "host", []), (host / "primitives.cpp", "host", common)]
        for source in ("reconstruction.cpp", "latent.cpp", "math.cpp", "pairs.cpp", "mixture.cpp", "rows.cpp"):
            jobs.append((host / source, "baseline", [*common, "-DFASTVAE_ISA=baseline"]))
            if common:
                jobs.append((host / source, "avx2", [*common, "-DFASTVAE_ISA=avx2", *AVX2]))
                jobs.append((host / source, "avx512", [*common, "-DFASTVAE_ISA=avx512", *AVX512]))
        with_cuda = isinstance(toolkit, Toolkit)
        archs = f'-DFASTVAE_CUDA_ARCHS="{" ".join(toolkit.archs)}"' if with_cuda else ""
        jobs.append((SOURCES / "bindings.cpp", "bindings", ["-DFASTVAE_WITH_CUDA", archs] if with_cuda else []))
        linux = sys.platform.startswith("linux")
        libraries = [f"-Wl,--version-script={SOURCES}/exports.map", "-Wl,-s", "-ldl"] if linux else []

        def compile_host(source: Path, folder: str, flags: list[str]) -> str:
            includes = [pybind11.get_include()] if folder == "bindings" else []
            (made,) = self.compiler.compile(
                [str(source)],
                output_dir=str(objects / folder),
                include_dirs=[*includes, *self.compiler.include_dirs],
                extra_postargs=[*FLAGS, *flags],
            )
            return made

        def compile_cuda(source: Path) -> str:
            target = objects / "cuda" / f"{source.stem}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            read = [source, *SOURCES.glob("*.h"), *source.parent.glob("*.*h"), Path("setup.py")]
            if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in read):
                subprocess.run(toolkit.command(source, target), check=True)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = sorted(SOURCES.glob("device/*.cu")) if with_cuda else []
            waiting = [pool.submit(compile_host, *job) for job in jobs[:1]]  # no compiler: seen at once
            waiting[0].result()
            waiting += [pool.submit(compile_cuda, kernel) for kernel in kernels]
            waiting += [pool.submit(compile_host, *job) for job in jobs[1:]]
            made = [job.result() for job in waiting]
        if with_cuda:
            libraries = [str(toolkit.library), "-lrt", *libraries]
        self.compiler.link_shared_object(
            made, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread", *libraries], target_lang="c++"
        )
        say(
            f"built for the CPU and for CUDA (sm_{' sm_'.join(toolkit.archs)}; {toolkit.top})"
            if with_cuda
            else f"built for the CPU only: {toolkit}"
        )


def say(what: str) -> None:
    print(f"fastvae: {what}", file=sys.stderr)


setup(
    packages=[
        *find_packages(include=["fastvae", "fastvae.*"]),
        "fastvae.benchmarks",
        "fastvae.kernels",
        *(f"fastvae.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastvae.benchmarks": "benchmarks", "fastvae.kernels": "kernels"},
    package_data={"fastvae": ["py.typed", "_C.pyi", "_autograd.pyi"], "fastvae.train": ["templates/*"]},
    include_package_data=False,  # only what the line above names
    ext_modules=[
        Extension("fastvae._C", [str(p) for p in sorted(SOURCES.rglob("*.cpp")) if p != AUTOGRAD], optional=True),
        Extension("fastvae._autograd", [str(AUTOGRAD)], optional=True),
    ],
    cmdclass={"build_ext": BuildExtension},
)
