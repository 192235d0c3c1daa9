"""The compiled extension: what it links to, what its kernels came out as, and that every install succeeds.

The ops themselves are in the table of ``test_ops.py``, where ``cpp`` is one of the backends.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastvae

from table import DTYPES, INSTRUCTION_SETS, OPS, REDUCTIONS, instruction_set, value_and_gradients
from test_ops import check

ROOT = Path(__file__).parent.parent
BUILT = fastvae.backends()["cpp"].available
pytestmark = pytest.mark.skipif(not BUILT, reason=f"extension: {fastvae.backends()['cpp'].reason}")


def native():
    from fastvae import _C

    return _C


def run(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tool(name: str, *folders: Path) -> str:
    """Path of a program, or the test is skipped by its name."""
    path = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"no {name}")
    return path


def cuobjdump() -> str:
    """From a CUDA toolkit, or the one Triton brings along."""
    triton = find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return tool("cuobjdump", *folders)


def built_for_cuda() -> str:
    """The extension's file. Where setup.py finds an nvcc, one without kernels is an nvcc that failed: no skip."""
    if not hasattr(native(), "cuda"):
        if os.environ.get("FASTVAE_CUDA") == "0":
            pytest.skip("FASTVAE_CUDA=0")
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
        if nvcc is None:
            pytest.skip(f"no nvcc in {home}/bin" if home else "no nvcc on the path")
        pytest.fail(f"{nvcc} is here, but the extension was built without CUDA: pip install -v says why")
    return native().__file__


def test_it_links_to_nothing_of_pytorch() -> None:
    """And shows nothing but its entry point: what it brings along cannot be taken for another library's."""
    nm, library = tool("nm"), native().__file__
    undefined = run(nm, "-D", "-C", "--undefined-only", library)
    assert "PyObject" in undefined or "Py_" in undefined, "these must be the symbols of a Python extension"
    assert not re.search(r"torch|c10|\bat::|GOMP|cudart|U cuda[A-Z]", undefined)
    exported = re.findall(r" [TDBRWV] (\S+)", run(nm, "-D", "--defined-only", library))
    assert exported == ["PyInit__C"]


def test_it_loads_without_pytorch() -> None:
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('_C', {native().__file__!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "print(module.instructions() != '' and 'torch' not in sys.modules)"
    )
    assert run(sys.executable, "-c", code).strip() == "True"


def test_errors_are_python_errors() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="dtype code"):
        native().rescale(9, 1, one.data_ptr(), torch.zeros(1).data_ptr(), 1, 1)
    with pytest.raises(ValueError, match="likelihood code"):
        native().reconstruction_forward(
            len(native().likelihood_names()),
            0.0,
            1,
            1,
            1,
            1,
            one.data_ptr(),
            1,
            one.data_ptr(),
            1,
            0,
            2,
            one.data_ptr(),
            1,
        )
    with pytest.raises(ValueError, match="target must be uint8, float32"):
        native().reconstruction_forward(
            0, 0.0, 1, 2, 1, 1, one.data_ptr(), 1, one.data_ptr(), 1, 0, 2, one.data_ptr(), 1
        )
    with pytest.raises(ValueError, match="instructions must be"):
        native().instructions("sse9")


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(instructions: str, dtype: torch.dtype, reduction: str) -> None:
    assert native().instructions() == instructions
    with fastvae.use_backend("cpp"):
        for op in OPS.values():
            check(op, op.inputs(3, 77), dtype, reduction)


def test_every_half_precision_number(instructions: str) -> None:
    """Read, doubled or divided, rounded: the bits torch gets, for each of the 65536, subnormals and NaN included."""
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    # AVX-512 takes a vector with a subnormal number in it another way
    beside_subnormal = torch.stack([words, torch.ones_like(words)], dim=1).flatten()
    for dtype, order in itertools.product((torch.bfloat16, torch.float16), (words, beside_subnormal)):
        for factor in (2.0, 0.5, 1 / 3, 1e-3, -1.0):
            numbers = order.view(dtype)
            want = (numbers.float() * factor).to(dtype)
            got = numbers.clone()
            with fastvae.use_backend("cpp"):
                fastvae.ops.primitives(got).rescale_(got, torch.tensor(factor))
            same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
            assert same.all(), f"{dtype} times {factor}: {numbers[~same][:5]} → {got[~same][:5]}, not {want[~same][:5]}"


def test_noise_is_the_same_for_every_instruction_set() -> None:
    """To the bit where multiply-adds are fused, which the baseline of x86-64 has none of."""
    zeros, seen = torch.zeros(100, 1001), {}
    for name in native().instruction_sets():
        with instruction_set(name), fastvae.use_backend("cpp"):
            seen[name] = fastvae.reparameterize(zeros, zeros, seed=3)
    for z in seen.values():
        torch.testing.assert_close(z, seen["baseline"], rtol=0, atol=1e-6)
    if "avx512" in seen:
        assert torch.equal(seen["avx512"], seen["avx2"])


def test_gradients_without_an_exponential_are_the_same_bits_for_every_instruction_set() -> None:
    """Sums, products, quotients and roundings are: 77 columns, so the last elements of a row too."""
    y, x = OPS["bce"].inputs(3, 77)
    for dtype in DTYPES:
        inputs, seen = [y.to(dtype), x.to(dtype)], []
        for name in native().instruction_sets():
            with instruction_set(name), fastvae.use_backend("cpp"):
                for op in ("bce", "mse", "l1"):
                    call = functools.partial(OPS[op].call, reduction="example")
                    seen.append((op, value_and_gradients(call, inputs, 1)[1][0]))
        for op, gradient in seen:
            assert torch.equal(gradient, dict(seen)[op]), f"{op}, {dtype}"


def test_no_kernel_spills_or_has_a_stack() -> None:
    library = built_for_cuda()
    usage = run(cuobjdump(), "--dump-resource-usage", "-arch", "sm_90", library)
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) > 100
    assert [k for k in kernels if k[2] != "0" or k[3] != "0"] == []


def test_kernels_move_16_bytes_at_a_time() -> None:
    sass = run(cuobjdump(), "-sass", "-arch", "sm_90", built_for_cuda())
    kernels = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s+Function :|\Z)", sass, re.DOTALL))
    streaming = {name: body for name, body in kernels.items() if "finish" not in name}
    assert len(streaming) > 100
    for name, body in streaming.items():
        assert "LDG.E.128" in body, name
        assert "STG.E.128" in body or "softmax_kernel" in name, name  # which writes two numbers a row
        assert not re.search(r"\b(LDL|STL)\b", body), name


def copy_of_the_sources(folder: Path) -> Path:
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "runs", "__pycache__")
    )
    return folder


def install(sources: Path, target: Path, **environment: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    return run(*command, "--target", str(target), str(sources), env={**os.environ, **environment})


def backends_of(target: Path) -> str:
    # an editable install would lend the package the extension it lacks
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
    code += "import fastvae; print({n: s.available or s.reason for n, s in fastvae.backends().items()})"
    return run(sys.executable, "-c", code, cwd=str(target), env={**os.environ, "PYTHONPATH": str(target)})


def test_install_without_a_compiler(tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path / "sources")
    said = install(sources, tmp_path / "site", CC="/nonexistent/cc", CXX="/nonexistent/c++", CUDA_HOME="/nonexistent")
    assert said.count("fastvae: ") - said.count("fastvae: filename") == 2
    assert "no compiled extension, the other backends serve" in said
    assert "no compiled graph nodes, small calls take longer" in said
    assert not list((tmp_path / "site/fastvae").glob("_*.so"))
    assert "an install builds it where it finds a C++ compiler" in backends_of(tmp_path / "site")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80 86 90", (8, 6), True),
        ("80 90", (8, 9), True),  # machine code of its generation
        ("86 90", (8, 0), False),
        ("80 90", (12, 0), True),  # intermediate code of 9.0
        ("80 90", (7, 5), False),
        ("90 100", (9, 0), True),
        ("100", (9, 0), False),
    ],
)
def test_which_gpus_the_code_runs_on(archs: str, capability: tuple[int, int], runs: bool) -> None:
    from fastvae.kernels.compiled.cuda import runs_on

    assert runs_on(archs, capability) == runs


@pytest.mark.slow
def test_install_without_nvcc(tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path / "sources")
    said = install(sources, tmp_path / "site", CUDA_HOME="/nonexistent", FASTVAE_AUTOGRAD="0")
    assert said.count("fastvae: ") - said.count("fastvae: filename") == 2
    assert "built for the CPU only: no nvcc in /nonexistent/bin" in said
    assert "no compiled graph nodes, small calls take longer: FASTVAE_AUTOGRAD=0" in said
    serving = backends_of(tmp_path / "site")
    assert "'cpp': True" in serving
    assert "'cuda': 'the extension was built without CUDA" in serving
