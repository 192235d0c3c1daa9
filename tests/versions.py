"""Runs the tests with the oldest versions that pyproject.toml admits, and with the newest.

``make versions`` makes an environment for each in ``build/versions``, installs fastvae there for the CPU, runs
``TESTS`` and some of Triton's kernels, interpreted, and prints a table. It ends with 1 if a test fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "versions"
TESTS = [f"test_{name}.py" for name in ("ops", "noise", "autograd", "parameters", "compile", "edges", "errors", "math")]
INTERPRETED = "triton and test_sizes"
SHOWN = ("torch", "triton", "numba", "numpy")


def oldest() -> list[str]:
    """What pyproject.toml asks for at least, exactly; the oldest Triton is that torch's own."""
    text = (ROOT / "pyproject.toml").read_text()
    return [f"{name}=={least}" for name, least in re.findall(r'"(torch|numba)>=([\d.]+)"', text)] + ["triton==3.4.0"]


# no open range of torch: pip might choose another build than the one a newest triton or numba is tried with
VERSIONS = {"oldest": oldest(), "newest": ["torch==2.14.1", "triton", "numba"]}


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Outside of the checkout, or its folders would be imported in place of what is installed.

    What torch compiled for another version of fastvae is out of reach: its cache does not know that operators change.
    """
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"), **environment}
    return subprocess.run(
        list(map(str, command)), cwd=FOLDER, env=variables, capture_output=True, text=True, check=False
    )


def prepare(name: str) -> Path:
    """The environment's folder of programs, with fastvae as it is now."""
    programs = FOLDER / name / "bin"
    if not programs.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / name], check=True)
    tools = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(SHOWN)]
    (FOLDER / "constraints.txt").write_text("\n".join(tools))
    sources = FOLDER / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "runs", "shared"))
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    needed = ["setuptools", "pybind11", "pytest", "pytest-benchmark", "hypothesis"]
    for what in (
        [*VERSIONS[name], "--constraint", FOLDER / "constraints.txt", *needed],
        ["--no-deps", "--no-build-isolation", "--force-reinstall", sources],
    ):
        done = run(*pip, *what, FASTVAE_CUDA="0")
        if done.returncode != 0:
            raise SystemExit(f"{name}: {done.stdout}{done.stderr}")
    return programs


def counted(programs: Path, files: list[str], *options: str, **environment: str) -> tuple[str, bool]:
    """What pytest says last, and whether all passed."""
    # without the conftest.py of the checkout, which puts the checkout on the path
    fixed = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--confcutdir", ROOT / "tests"]
    done = run(programs / "pytest", *fixed, *options, *(ROOT / "tests" / file for file in files), **environment)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr[-2000:]]
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:])
    return re.sub(r" in .*", "", last[0].strip("= ")), done.returncode == 0


def main() -> int:
    """Prints a row for each set of versions."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER / "inductor", ignore_errors=True)
    ask = f"from importlib.metadata import version; print(*map(version, {SHOWN}), sep=' | ')"
    print(
        f"| | {' | '.join(SHOWN)} | tests | Triton, interpreted | minutes |\n|{' --- |' * (len(SHOWN) + 4)}", flush=True
    )
    failed = False
    for name in VERSIONS:
        programs = prepare(name)
        since = time.monotonic()
        tests, well = counted(programs, TESTS)
        interpreted, also = counted(programs, ["test_ops.py"], "-k", INTERPRETED, TRITON_INTERPRET="1")
        failed |= not (well and also)
        versions = run(programs / "python", "-c", ask).stdout.strip()
        print(f"| {name} | {versions} | {tests} | {interpreted} | {(time.monotonic() - since) / 60:.0f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
