"""Everything a GPU is asked for, in one call under eight minutes: ``make gpu``, ``python benchmarks/gpu.py``.

Builds and installs the checkout without the network, checks every op on the device, then measures. Each step's output
goes to ``DIR/gpu-STEP.log`` as it runs, so an interrupted run leaves what it had; the results file is that of
``fastvae bench``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
ONLY = ("tests/test_gpu.py", "tests/test_training.py")
TESTS = ("tests/test_ops.py", "tests/test_noise.py", "tests/test_autograd.py", "tests/test_parameters.py")
WORKERS = 12  # where pytest-xdist is there: most of the op table is compiling Triton kernels
SANITIZED = "test_dtypes_and_reductions and float32 and (bce_with_logits or gaussian_kl) and cuda-"


def steps(output: Path, device: str, data: list[str]) -> Iterator[tuple[str, int, list[str], dict[str, str]]]:
    """``(name, seconds it may take, command, environment)``."""
    python = sys.executable
    here = {"FASTVAE_TEST_DEVICE": device}
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
    capability = "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else ""
    yield "build", 150, pip, {"FASTVAE_CUDA_ARCHS": capability} if capability else {}
    yield "info", 30, [python, "-m", "fastvae", "info"], {}
    yield "only-a-gpu-shows", 90, [*pytest, *ONLY, "-k", "test_gpu or graph", "-s"], {}
    for name, more in (("train", []), ("train-graph", ["--graph"])):
        run = ["--device", device, "--output", str(output / name), "--overwrite", *data, *more]
        yield name, 40, [python, "-m", "fastvae", "train", *run], {}
    results = ["--device", device, "--output", str(output / "gpu-results.json")]
    yield "measure", 200, [python, "-m", "fastvae", "bench", *results], {}
    workers = ["-n", str(WORKERS)] if find_spec("xdist") else []
    yield "op-table", 160, [*pytest, *workers, *TESTS, "-k", "not (gradcheck and torch)"], here
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        for tool in ("memcheck", "racecheck", "initcheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *pytest, TESTS[0], "-k", SANITIZED]
            yield tool, 60, command, here


def run(name: str, seconds: float, command: list[str], environment: dict[str, str], log: Path) -> bool:
    """Run one step with its output in ``log`` and the end of it here; whether it succeeded."""
    started = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT,
                timeout=seconds, check=False,
            )  # fmt: skip
            outcome = "ok" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
    print(f"== {name}: {outcome}, {time.monotonic() - started:.0f} s; {log}")
    print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), flush=True)
    return outcome == "ok"


def main() -> int:
    """Run every step, whatever became of the one before; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data-root", metavar="FOLDER", help="IDX files to train on (8×8 digits of scikit-learn)")
    parser.add_argument("--seconds", type=float, default=480, help="no step starts, or goes on, beyond this (480)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data = ["--data-root", args.data_root] if args.data_root else ["--data", "digits"]
    end, failed = time.monotonic() + args.seconds, []
    for name, seconds, command, environment in steps(args.output, args.device, data):
        left = min(seconds, end - time.monotonic())
        if left < 5:
            print(f"== {name}: not run, the time is up")
            failed.append(name)
        elif not run(name, left, command, environment, args.output / f"gpu-{name}.log"):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "every step succeeded")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
