"""Reads the machine code of every Triton kernel, without a GPU: ``python -m fastvae.benchmarks.static_roofline``.

The backend is called with tensors that have shapes but no memory, and the launches it would make are recorded; so what
is compiled here, for sm_90 (or another ``--arch``), is what a user's call launches. Of each kernel's hot loop it
counts instructions and transcendentals (MUFU) an element, and says what bounds it on an H200.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..kernels import triton as backend
from ..kernels.layout import accumulator
from ..kernels.likelihoods import DEFAULT_NUMBERS, LIKELIHOODS, OF_COUNTS, WITH_TENSOR
from ..kernels.triton import approx, launch
from ..kernels.triton import linear as backend_linear
from ..kernels.triton import rows as backend_rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# H200: 132 multiprocessors × 4 warps × 32 lanes at 1.98 GHz over the 4.3 TB/s a copy reaches
ISSUE_PER_BYTE = 7.8
MUFU_PER_BYTE = ISSUE_PER_BYTE / 8  # 16 lanes a clock and multiprocessor, against 128

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int64: "i64",
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
BOUNDS = {"low": -math.inf, "high": math.inf}


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]


class Loop(NamedTuple):
    """The hot loop, an element."""

    instructions: float
    mufu: float
    widths: tuple[str, ...]


class Report(NamedTuple):
    """What the machine code of one kernel says."""

    name: str
    dtype: str
    bytes: int
    loop: Loop
    registers: int
    stack: int
    spills: int

    @property
    def bound(self) -> str:
        """What an H200 would wait for."""
        shares = {
            "memory": 1.0,
            "issue": self.loop.instructions / self.bytes / ISSUE_PER_BYTE,
            "MUFU": self.loop.mufu / self.bytes / MUFU_PER_BYTE,
        }
        worst = max(shares, key=lambda name: shares[name])
        share = max(share for name, share in shares.items() if name != "memory")
        return f"{worst} ({share:.0%} of the time memory takes)"


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches ``call`` makes of the Triton backend."""
    launches: list[Launch] = []

    def run(kernel: Any, programs: int, on: torch.Tensor, *args: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, args, constants))

    with contextlib.ExitStack() as stack:
        for module in (backend, backend_linear, backend_rows):
            stack.enter_context(mock.patch.object(module, "run", run))
        call()
    return launches


def compile_for(launch: Launch, arch: int | str) -> Any:
    """Compile what the launch would: the same signature, alignments and constants as Triton's own call."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    warps = constants.pop("num_warps", 4)
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        fixed = parameter.do_not_specialize
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and not fixed)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        elif value == 1 and not fixed:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants.keys() - {"num_warps"}, "constexpr")
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={"num_warps": warps})


def _tool(flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)([^;]*);")


def instructions(compiled: Any) -> list[tuple[int, str, str]]:
    """``(address, opcode, operands)`` of the kernel, without padding."""
    return [(int(a, 16), op, rest) for a, op, rest in INSTRUCTION.findall(_tool("-sass", compiled.asm["cubin"]))]


def loops(code: list[tuple[int, str, str]]) -> Iterator[list[tuple[int, str, str]]]:
    """The bodies of the innermost loops: from the target of a backward branch to the branch."""
    spans = []
    for address, op, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if op.startswith("BRA") and target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    for low, high in spans:
        if not any((low, high) != (a, b) and low <= a and b <= high for a, b in spans):
            yield [line for line in code if low <= line[0] <= high]


def _width(op: str) -> int:
    """Bytes a thread moves by a global load or store."""
    match = re.search(r"\.(U8|S8|U16|S16|64|128)\b", op)
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[match[1]] if match else 4


def hot_loop(code: list[tuple[int, str, str]], moved: int) -> Loop:
    """Of the loops that move data, the leanest an element: the walk without masks. ``moved``: bytes an element."""
    best = None
    for body in [*loops(code), code]:
        memory = [op for _, op, _ in body if op.startswith(("LDG", "STG"))]
        elements = sum(map(_width, memory)) / moved
        if elements < 1 or (best is not None and body is code):
            continue
        count = sum(not op.startswith("NOP") for _, op, _ in body) / elements
        mufu = sum(op.startswith("MUFU") for _, op, _ in body) / elements
        if best is None or count < best.instructions:
            best = Loop(count, mufu, tuple(sorted({f"{op[:3]}.{8 * _width(op)}" for op in memory})))
    assert best is not None, "a kernel that moves nothing"
    return best


def report(name: str, dtype: str, moved: int, launch: Launch, arch: int) -> Report:
    """Compile one launch and read its code."""
    compiled = compile_for(launch, arch)
    code = instructions(compiled)
    usage = _tool("--dump-resource-usage", compiled.asm["cubin"])
    registers, stack = (int(_number(f"{key}:", usage)) for key in ("REG", "STACK"))
    spills = sum(op.startswith(("LDL", "STL")) for _, op, _ in code)
    return Report(name, dtype, moved, hot_loop(code, moved), registers, stack, spills)


def _number(before: str, text: str) -> str:
    """The digits that stand after the expression ``before``."""
    found = re.search(rf"{before}(\d+)", text)
    assert found is not None, f"no {before} in what the tool says"
    return found[1]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ROWS, COLS, LATENT = 1 << 16, 784, 64

#: name, bytes an element, and the call of the backend that launches the kernel
Work = tuple[str, int, Callable[[], object]]
#: which of the launches a call makes is the kernel; of others the first
WHICH = {"from scores one pass": 1, "what a softmax passes on": 2}


def works(dtype: torch.dtype) -> Iterator[Work]:
    """Every kernel for ``dtype``."""
    for likelihood in LIKELIHOODS:
        yield from _reconstruction_works(likelihood, dtype)
    size, recon, mu = dtype.itemsize, _meta(ROWS, COLS, dtype=dtype), _meta(ROWS, 20, dtype=dtype)
    elbo = partial(backend.elbo_forward, likelihood="bernoulli_logits", parameter=0.0, log_scale=True, beta=1.0)
    options: dict[str, Any] = {**BOUNDS, "free_bits": 0.0, "with_gradient": True, "reduction": "batchmean"}
    yield "ELBO one pass", 3 * size, partial(elbo, recon, recon, mu, mu, **options)
    yield "rescale", 2 * size, partial(backend.rescale_, recon, _meta())
    yield from _works_with_tensor(dtype)
    yield from _latent_works(dtype)
    yield from _row_works(dtype)


def _reconstruction_works(likelihood: str, dtype: torch.dtype) -> Iterator[Work]:
    size, recon, pixels = dtype.itemsize, _meta(ROWS, COLS, dtype=dtype), _meta(ROWS, COLS, dtype=torch.uint8)
    options: dict[str, Any] = {"likelihood": likelihood, "parameter": DEFAULT_NUMBERS[likelihood]}
    forward = partial(backend.reconstruction_forward, recon, **options)
    for of, target in (("", recon), (" uint8", pixels))[: 1 if likelihood in OF_COUNTS else 2]:
        one_pass = partial(forward, target, reduction="batchmean", with_gradient=True)
        yield f"{likelihood}{of} one pass", 2 * size + target.itemsize, one_pass
    for name, reduction, moved in (("total", "batchmean", 2), ("by example", "example", 2), ("elementwise", "none", 3)):
        call = partial(forward, recon, reduction=reduction, with_gradient=False)
        yield f"{likelihood} {name}", moved * size, call
    for reduction, grad, moved in (("example", _meta(ROWS), 3), ("none", recon, 4)):
        backward = partial(backend.reconstruction_backward, grad, recon, recon, reduction=reduction, **options)
        yield f"{likelihood} backward {reduction}", moved * size, backward


def _works_with_tensor(dtype: torch.dtype) -> Iterator[Work]:
    """By column a parameter stays in the cache; its gradient leaves by element. Scores are float32 or float64."""
    size, recon, real = dtype.itemsize, _meta(ROWS, COLS, dtype=dtype), accumulator(dtype)
    column, whole, library = _meta(COLS, dtype=real), _meta(ROWS, COLS, dtype=real), _meta(ROWS, dtype=real)
    options: dict[str, Any] = {"parameter": 0.0, "reduction": "batchmean", "with_gradient": True}
    for likelihood in sorted(WITH_TENSOR):
        one_pass = partial(backend.reconstruction_forward, recon, recon, column, likelihood=likelihood, **options)
        yield f"{likelihood} by column one pass", 3 * size + real.itemsize, one_pass
    counts = partial(backend.reconstruction_forward, recon, recon, column, likelihood="negative_binomial", **options)
    yield "inflated one pass", 3 * size + 3 * real.itemsize, partial(counts, whole)
    if dtype == real:
        from_scores = partial(counts, None, library)
        yield "softmax of scores", size, from_scores
        yield "from scores one pass", 4 * size, from_scores
        yield "what a softmax passes on", 3 * size, from_scores


def _row_works(dtype: torch.dtype) -> Iterator[Work]:
    """An element of a mixture is a parameter, of the others what its name says."""
    size, pixels = dtype.itemsize, torch.uint8
    options: dict[str, Any] = {"reduction": "batchmean", "with_gradient": True}
    options |= {"channels": 3, "channels_last": True, "unimix": 0.0, "balance": -1.0}

    def forward(term: str, *tensors: torch.Tensor, **changed: Any) -> Callable[[], object]:
        return partial(backend.rows_forward, *tensors, term=term, **{**options, **changed})

    rgb, first = _meta(1024, 32, 32, 3, dtype=pixels), _meta(1024, 3, 32, 32, dtype=pixels)
    yield "mixture RGB", 2 * size, forward("logistic_mixture", _meta(1024, 32, 32, 100, dtype=dtype), rgb)
    channels_first = _meta(1024, 100, 32, 32, dtype=dtype)
    yield "mixture RGB first", 2 * size, forward("logistic_mixture", channels_first, first, channels_last=False)
    grey = _meta(1024, 28, 28, 30, dtype=dtype), _meta(1024, 28, 28, 1, dtype=pixels)
    yield "mixture grey", 2 * size, forward("logistic_mixture", *grey, channels=1)
    data = _meta(ROWS, COLS, dtype=dtype)
    yield "logistic", 4 * size + 1, forward("logistic", data, data, _meta(ROWS, COLS, dtype=pixels))
    logits, classes = _meta(ROWS, 512, dtype=dtype), _meta(ROWS, dtype=torch.int64)
    yield "categorical NLL", 2 * size, forward("categorical_nll", logits, classes)
    yield "categorical KL", 4 * size, forward("categorical_kl", logits, logits)
    yield "categorical KL unimix", 4 * size, forward("categorical_kl", logits, logits, unimix=0.01)
    latent = _meta(ROWS, LATENT, dtype=dtype)
    yield "log q − log p", 6 * size, forward("log_ratio", latent, latent, latent)
    yield "log q − log p of a prior", 10 * size, forward("log_ratio", *[latent] * 5)


def _latent_works(dtype: torch.dtype) -> Iterator[Work]:
    size, rows = dtype.itemsize, ROWS * 16
    whole, strided = _meta(rows, LATENT, dtype=dtype), _meta(rows, 2 * LATENT, dtype=dtype)[:, :LATENT]
    seed, one, per_row = _meta(1, dtype=torch.int64), _meta(), _meta(rows)

    def forward(
        seed: Any, reduction: str, *, mu: Any = whole, prior: Any = None, **changed: Any
    ) -> Callable[[], object]:
        options = {"log_scale": True, **BOUNDS, "samples": 0, "free_bits": 0.0, "reduction": reduction, **changed}
        return partial(backend.latent_forward, mu, mu, seed, prior, prior, **options)

    def backward(
        grad_z: Any, grad_kl: Any, reduction: str, *, prior: Any = None, **changed: Any
    ) -> Callable[[], object]:
        options = {"log_scale": True, **BOUNDS, "samples": 0, "free_bits": 0.0, "reduction": reduction, **changed}
        drawn = None if grad_z is None else seed
        return partial(backend.latent_backward, grad_z, grad_kl, whole, whole, drawn, prior, prior, **options)

    for of, log_scale in (("", True), (" std", False)):
        yield f"sample{of}", 3 * size, forward(seed, "", log_scale=log_scale)
        yield f"sample+KL{of}", 3 * size, forward(seed, "batchmean", log_scale=log_scale)
        yield f"KL{of} total", 2 * size, forward(None, "batchmean", log_scale=log_scale)
        # the gradient of mu is that of z: mu is not read, nor is std
        yield f"sample{of} backward", (3 + log_scale) * size, backward(whole, None, "", log_scale=log_scale)
        yield f"sample+KL{of} backward", 5 * size, backward(whole, one, "batchmean", log_scale=log_scale)
        yield f"KL{of} backward", 4 * size, backward(None, one, "batchmean", log_scale=log_scale)
    yield "sample strided", 3 * size, forward(seed, "", mu=strided)
    yield "KL by example", 2 * size, forward(None, "example")
    yield "KL elementwise", 3 * size, forward(None, "none")
    yield "KL free bits", 2 * size, forward(None, "batchmean", free_bits=0.5)
    yield "KL clamped", 2 * size, forward(None, "batchmean", low=-30.0, high=20.0)
    yield "KL clamped backward", 4 * size, backward(None, one, "batchmean", low=-30.0, high=20.0)
    yield "KL prior", 4 * size, forward(None, "batchmean", prior=whole)
    yield "KL prior backward", 8 * size, backward(None, one, "batchmean", prior=whole)
    yield "KL backward by example", 4 * size, backward(None, per_row, "example")


def reports(dtype: str, arch: int, chosen: Callable[[str], bool]) -> Iterator[Report]:
    """A report for each kernel of a chosen name."""
    for name, moved, call in works(getattr(torch, dtype)):
        if chosen(name):
            yield report(name, dtype, moved, record(call)[WHICH.get(name, 0)], arch)


def nvidia(dtypes: list[str], arch: int, only: str) -> Iterator[str]:
    """The table of an NVIDIA architecture."""
    yield "| kernel | dtype | B | instr | instr/B | MUFU | regs | stack | spills | global accesses | bound on an H200 |"
    yield "|" + " --- |" * 11
    seen: collections.Counter[str] = collections.Counter()
    for dtype in dtypes:
        for r in reports(dtype, arch, lambda name: only in name):
            count, mufu = f"{r.loop.instructions:.1f} | {r.loop.instructions / r.bytes:.1f}", f"{r.loop.mufu:.1f}"
            usage = f"{r.registers} | {r.stack} | {r.spills} | {' '.join(r.loop.widths)}"
            yield f"| {r.name} | {r.dtype} | {r.bytes} | {count} | {mufu} | {usage} | {r.bound} |"
            seen[r.bound.split()[0]] += 1
    yield f"\nTriton {triton.__version__}, sm_{arch}: " + ", ".join(f"{n} bound by {b}" for b, n in seen.items())


def amd(dtypes: list[str], arch: str, only: str) -> Iterator[str]:
    """The table of an AMD architecture, whose instructions are not counted."""
    approx.PTX.value = False
    launch.WARPS, launch.HALF_WARPS = 2, 4  # a warp has 64 threads
    yield "| kernel | dtype | regs | stack | spills | global accesses |"
    yield "|" + " --- |" * 6
    for dtype in dtypes:
        for name, _, call in works(getattr(torch, dtype)):
            if only in name:
                assembly = compile_for(record(call)[WHICH.get(name, 0)], arch).asm["amdgcn"]
                keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
                usage = " | ".join(_number(rf"\.{key}:\s+", assembly) for key in keys)
                accesses = " ".join(sorted(set(re.findall(r"global_(?:load|store)_\w+", assembly))))
                yield f"| {name} | {dtype} | {usage} | {accesses} |"
    yield f"\nTriton {triton.__version__}, {arch}"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", default="90", help="NVIDIA's compute capability (80, 86, 89, 90, 100), or gfx942, …")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="again for several; float32 and bfloat16")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    args = parser.parse_args()
    dtypes = args.dtype or ["float32", "bfloat16"]
    is_amd = args.arch.startswith("gfx")
    for line in amd(dtypes, args.arch, args.only) if is_amd else nvidia(dtypes, int(args.arch), args.only):
        print(line, flush=True)


if __name__ == "__main__":
    main()
