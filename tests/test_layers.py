"""How the files hang together: no circle among imports, none upward, and few frames on the way of one call."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fastvae

from table import INTERPRETED

PACKAGES = {"fastvae": Path(fastvae.__file__).parent, "fastvae.kernels": Path(fastvae.kernels.__path__[0])}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports of the library when it is imported itself: not inside functions or for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def look(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join((*base, *([node.module] if node.module else [])))
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    found.add(inner if inner in known else source)
            elif isinstance(node, ast.Try):
                look(node.body)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                look(node.body + node.orelse)

    look(ast.parse(path.read_text()).body)
    # a package is imported before what is in it; that of the module itself is there already
    packages = {".".join(other.split(".")[:k]) for other in found for k in range(1, other.count(".") + 1)}
    found |= {package for package in packages if not f"{name}.".startswith(f"{package}.")}
    return {other for other in found if other in known and other != name}


def test_no_circles_among_files() -> None:
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert graph["fastvae.functional"] >= {"fastvae.autograd", "fastvae.checks"}, "the test sees imports"
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_import_upward() -> None:
    """Kernels know nothing of the public functions, those nothing of models, and those nothing of training."""
    layers = ("fastvae.kernels", "fastvae.autograd", "fastvae.functional", "fastvae.nn", "fastvae.models")
    layers = (*layers, "fastvae.train", "fastvae.cli")
    known = modules()

    def layer(name: str) -> int | None:
        return next((k for k, prefix in enumerate(layers) if f"{name}.".startswith(f"{prefix}.")), None)

    for name, path in known.items():
        for other in imports(name, path, known):
            here, there = layer(name), layer(other)
            if here is not None and there is not None:
                assert there <= here, f"{name} imports {other}"


FRAMES = """
import sys
import torch, fastvae

if sys.argv[1] == "triton":  # launches nothing
    import stubbed_triton
    stubbed_triton.install()
    stubbed_triton.Launcher.recording = False
recon, target = torch.randn(128, 784, requires_grad=True), torch.rand(128, 784)
mu, logvar = (torch.randn(128, 20, requires_grad=True) for _ in range(2))
frames = []
with fastvae.use_backend(sys.argv[1]):
    for _ in range(2):
        fastvae.elbo_loss(recon, target, mu, logvar)
    sys.setprofile(lambda frame, event, _: frames.append(frame.f_code.co_name) if event == "call" else None)
    fastvae.elbo_loss(recon, target, mu, logvar)
    sys.setprofile(None)
print(len(frames), *frames)
"""


@pytest.mark.parametrize("backend", ["cpp", "numba", "triton"])
def test_a_small_call_enters_few_frames(backend: str) -> None:
    """What a call costs besides its kernel is Python: torch's own frames count too, and Numba counts its kernels."""
    if backend == "triton":
        pytest.importorskip("triton")
        if INTERPRETED:
            pytest.skip("the interpreter launches nothing")
    elif not fastvae.backends()[backend].available:
        pytest.skip(fastvae.backends()[backend].reason)
    run = subprocess.run(
        [sys.executable, "-c", FRAMES, backend], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    count, *frames = run.stdout.split()
    assert int(count) <= 35, frames


def test_every_bug_can_be_planted() -> None:
    """``make bugs`` takes minutes; that its texts are still in the sources is seen here."""
    planted_bugs = pytest.importorskip("planted_bugs", reason="the extension is not built", exc_type=ImportError)
    root = Path(__file__).parent.parent
    for bug in planted_bugs.BUGS:
        assert (root / bug.file).read_text().count(bug.right) == 1, f"{bug.what}, in {bug.file}"
