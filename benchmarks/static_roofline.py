"""Reads the machine code of every Triton kernel, without a GPU: ``python -m fastvae.benchmarks.static_roofline``.

The backend is called with tensors that have shapes but no memory, and the launches it would make are recorded; so what
is compiled here, for sm_90 (or another ``--arch``), is what a user's call launches. Of each kernel's hot loop it
counts instructions and transcendentals (MUFU) an element, and says what bounds it on an H200.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..kernels import triton as backend
from ..kernels.triton import approx

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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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

    with mock.patch.object(backend, "run", run):
        call()
    return launches


def compile_for(launch: Launch, arch: int | str) -> Any:
    """Compile what the launch would: the same signature, alignments and constants as Triton's own call."""
    signature, constants, attributes = {}, dict(launch.constants), {}
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
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={"num_warps": backend.launch.WARPS})


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
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    spills = sum(op.startswith(("LDL", "STL")) for _, op, _ in code)
    return Report(name, dtype, moved, hot_loop(code, moved), registers, stack, spills)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ROWS, COLS, LATENT = 1 << 16, 784, 64


def works(dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """``(name, bytes an element, call)`` of every kernel for ``dtype``."""
    size = dtype.itemsize
    recon = _meta(ROWS, COLS, dtype=dtype)
    upstream, per_row = _meta(dtype=torch.float32), _meta(ROWS, dtype=torch.float32)
    for likelihood, parameter in (
        ("bernoulli_logits", 0.0),
        ("bernoulli_probs", 1e-8),
        ("bernoulli_probs_log_clamped", 0.0),
        ("continuous_bernoulli_logits", 0.0),
        ("gaussian", 1.0),
        ("mse", 0.0),
        ("l1", 0.0),
    ):
        for target_type in (dtype, torch.uint8):
            target = _meta(ROWS, COLS, dtype=target_type)
            read, of = size + target_type.itemsize, " uint8" if target_type == torch.uint8 else ""
            options = {"likelihood": likelihood, "parameter": parameter}

            def forward(reduction: str, gradient: bool, target: Any = target, options: Any = options) -> object:
                return backend.reconstruction_forward(
                    recon, target, **options, reduction=reduction, with_gradient=gradient
                )

            yield f"{likelihood}{of} one pass", read + size, lambda f=forward: f("batchmean", True)  # type: ignore[misc]
            if of:
                continue
            yield f"{likelihood} total", read, lambda f=forward: f("batchmean", False)  # type: ignore[misc]
            yield f"{likelihood} by example", read, lambda f=forward: f("example", False)  # type: ignore[misc]
            yield f"{likelihood} elementwise", read + size, lambda f=forward: f("none", False)  # type: ignore[misc]
            for reduction, grad, moved in (
                ("example", per_row, read + size),
                ("none", recon, read + 2 * size),
            ):
                yield (
                    f"{likelihood} backward {reduction}",
                    moved,
                    lambda g=grad, t=target, o=options, r=reduction: backend.reconstruction_backward(  # type: ignore[misc]
                        g, recon, t, **o, reduction=r
                    ),
                )
    mu = _meta(ROWS, 20, dtype=dtype)
    elbo: dict[str, Any] = {"likelihood": "bernoulli_logits", "parameter": 0.0, "log_scale": True, "beta": 1.0}
    elbo |= {"free_bits": 0.0, "with_gradient": True}
    yield "ELBO one pass", 3 * size, lambda: backend.elbo_forward(recon, recon, mu, mu, **elbo, reduction="batchmean")
    yield "rescale", 2 * size, lambda: backend.rescale_(recon, upstream)
    yield from _latent_works(dtype, upstream, per_row)


def _latent_works(
    dtype: torch.dtype, upstream: torch.Tensor, per_row: torch.Tensor
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    size = dtype.itemsize
    mu = _meta(ROWS * 16, LATENT, dtype=dtype)
    half = _meta(ROWS * 16, 2 * LATENT, dtype=dtype)[:, :LATENT]
    seed = _meta(1, dtype=torch.int64)
    for log_scale in (True, False):
        of = "" if log_scale else " std"
        base: dict[str, Any] = {"log_scale": log_scale, "samples": 0, "free_bits": 0.0}

        def forward(reduction: str, seed: Any = None, mu: Any = mu, base: Any = base, **changed: Any) -> object:
            prior = changed.pop("prior", None)
            return backend.latent_forward(mu, mu, seed, prior, prior, **{**base, "reduction": reduction, **changed})

        def backward(g: Any, c: Any, reduction: str, base: Any = base, **changed: Any) -> object:
            prior, seed_given = changed.pop("prior", None), seed if g is not None else None
            return backend.latent_backward(
                g, c, mu, mu, seed_given, prior, prior, **{**base, "reduction": reduction, **changed}
            )

        yield f"sample{of}", 3 * size, lambda f=forward: f("", seed)  # type: ignore[misc]
        yield f"sample+KL{of}", 3 * size, lambda f=forward: f("batchmean", seed)  # type: ignore[misc]
        yield f"KL{of} total", 2 * size, lambda f=forward: f("batchmean")  # type: ignore[misc]
        # the gradient of mu is that of z: mu is not read, nor is std
        yield f"sample{of} backward", (4 if log_scale else 3) * size, lambda b=backward: b(mu, None, "")  # type: ignore[misc]
        yield f"sample+KL{of} backward", 5 * size, lambda b=backward: b(mu, upstream, "batchmean")  # type: ignore[misc]
        yield f"KL{of} backward", 4 * size, lambda b=backward: b(None, upstream, "batchmean")  # type: ignore[misc]
    yield "sample strided", 3 * size, lambda: forward("", seed, half, {**base, "log_scale": True})
    yield "KL by example", 2 * size, lambda: forward("example", log_scale=True)
    yield "KL elementwise", 3 * size, lambda: forward("none", log_scale=True)
    yield "KL free bits", 2 * size, lambda: forward("batchmean", log_scale=True, free_bits=0.5)
    yield "KL prior", 4 * size, lambda: forward("batchmean", log_scale=True, prior=mu)
    yield "KL prior backward", 8 * size, lambda: backward(None, upstream, "batchmean", log_scale=True, prior=mu)
    yield "KL backward by example", 4 * size, lambda: backward(None, per_row.repeat(16), "example", log_scale=True)


def reports(dtype: str, arch: int, chosen: Callable[[str], bool]) -> Iterator[Report]:
    """A report for each kernel of a chosen name."""
    for name, moved, call in works(DTYPES[dtype]):
        if chosen(name):
            yield report(name, dtype, moved, record(call)[0], arch)


def amd_row(name: str, dtype: str, launch: Launch, arch: str) -> tuple[object, ...]:
    """Kernel, dtype, registers, stack, spills, accesses: of the assembly for an AMD GPU, which is not counted."""
    assembly = compile_for(launch, arch).asm["amdgcn"]
    registers, stack, spills = (
        int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]
        for key in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return (
        name,
        dtype,
        registers,
        stack,
        spills,
        " ".join(sorted(set(re.findall(r"global_(?:load|store)_\w+", assembly)))),
    )


AMD_HEADER = ("kernel", "dtype", "regs", "stack", "spills", "global accesses")
HEADER = (
    "kernel",
    "dtype",
    "B",
    "instr",
    "instr/B",
    "MUFU",
    "regs",
    "stack",
    "spills",
    "global accesses",
    "bound on an H200",
)


def _table_start(header: tuple[str, ...]) -> str:
    return "| " + " | ".join(header) + " |\n|" + " --- |" * len(header)


def _table_row(row: tuple[object, ...]) -> str:
    return "| " + " | ".join(map(str, row)) + " |"


def nvidia(dtypes: list[str], arch: int, only: str) -> None:
    """Print the table of an NVIDIA architecture."""
    print(_table_start(HEADER))
    seen: collections.Counter[str] = collections.Counter()
    for dtype in dtypes:
        for r in reports(dtype, arch, lambda name: only in name):
            row = (
                r.name, r.dtype, r.bytes, f"{r.loop.instructions:.1f}", f"{r.loop.instructions / r.bytes:.1f}",
                f"{r.loop.mufu:.1f}", r.registers, r.stack, r.spills, " ".join(r.loop.widths), r.bound,
            )  # fmt: skip
            print(_table_row(row), flush=True)
            seen[r.bound.split()[0]] += 1
    print(f"\nTriton {triton.__version__}, sm_{arch}: " + ", ".join(f"{n} bound by {b}" for b, n in seen.items()))


def amd(dtypes: list[str], arch: str, only: str) -> None:
    """Print the table of an AMD architecture."""
    approx.PTX.value = False
    print(_table_start(AMD_HEADER))
    for dtype in dtypes:
        for name, _, call in works(DTYPES[dtype]):
            if only in name:
                print(_table_row(amd_row(name, dtype, record(call)[0], arch)), flush=True)
    print(f"\nTriton {triton.__version__}, {arch}")


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", default="90", help="NVIDIA's compute capability (80, 86, 89, 90, 100), or gfx942, …")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="again for several; float32 and bfloat16")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    args = parser.parse_args()
    dtypes = args.dtype or ["float32", "bfloat16"]
    if args.arch.startswith("gfx"):
        amd(dtypes, args.arch, args.only)
    else:
        nvidia(dtypes, int(args.arch), args.only)


if __name__ == "__main__":
    main()
