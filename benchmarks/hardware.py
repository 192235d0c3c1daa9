"""Where numbers come from: the machine by the name of its processor, versions, date and commit. No host name."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import UserError


def origin(device: str) -> dict[str, Any]:
    """What every results file begins with."""
    return {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "versions": versions(device),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
    }


def hardware(device: str) -> dict[str, Any]:
    """The device itself."""
    kind = torch.device(device).type
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return {"device": kind, "name": cpu_name(), "vectors": torch.backends.cpu.get_cpu_capability()}


class Others:
    """Cores that other processes (or other guests of the host) keep busy from now on: how far to trust a ratio."""

    def __init__(self) -> None:
        self.begin = _clocks()

    def cores(self) -> float | None:
        """The mean so far; None where the system does not say."""
        now = _clocks()
        if self.begin is None or now is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self.begin, strict=True))
        return round(max(0.0, busy - own) / wall, 2) if wall else 0.0


def _clocks() -> tuple[float, float, float] | None:
    """Seconds on the wall, of all cores not being idle, and of this process and its finished children."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    except (OSError, ValueError):
        return None
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(os.times()[:4])


def checkout() -> Path:
    """The root of the repository, where results, the README and its pictures are; an installed copy has none."""
    root = Path(__file__).parent.parent
    if not (root / "benchmarks" / "README.md").exists():
        raise UserError(f"expected to run from a clone of the repository, got the installed {Path(__file__).parent}")
    return root


def cpu_name() -> str:
    """Such as ``AMD EPYC 7763``: the model, without trademarks and clock."""
    name = platform.processor() or platform.machine()
    if sys.platform.startswith("linux"):
        match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = match[1] if match else name
    elif sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") or name
    name = re.sub(r"\((R|TM|C)\)|CPU|Processor|\d+-Core|@.*$", " ", name, flags=re.IGNORECASE)
    return " ".join(name.split())


def installed(package: str) -> str | None:
    """The version of a package, if there is one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(device: str) -> dict[str, str]:
    """Of everything that a time depends on."""
    found = {"fastvae": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {name: number for name in ("numba", "triton") if (number := installed(name))}
    if torch.device(device).type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, ``+`` if files differ from it; None if installed."""
    folder = Path(__file__).parent
    if not _output("git", "-C", str(folder), "ls-files", Path(__file__).name):
        return None
    name = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{name}+" if changed else name


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
