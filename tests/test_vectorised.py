"""The hot loops of the CPU backends in machine code: packed multiply-adds as wide as a register, nothing scalar."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch

import fastvae

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")

WIDE = re.compile(r"\bvfn?m(add|sub)\d+p[sd]\b.*%([yz])mm")
SCALAR = re.compile(r"\bv?(fn?m(add|sub)\d+|add|mul|div|sub)s[sd]\b")
A_POLYNOMIAL = 6  # packed multiply-adds of which a loop takes an exponential or a logarithm


def innermost_loops(listing: Iterator[tuple[str, str]]) -> Iterator[list[str]]:
    """Instructions from the target of each backward jump to the jump, with no such jump between.

    ``listing`` gives each instruction with the label or address before it, or "".
    """
    places: dict[str, int] = {}
    instructions: list[str] = []
    last = -1
    for label, instruction in listing:
        if label:
            places[label] = len(instructions)
        instructions.append(instruction)
        jump = re.match(r"j\w+\s+(\S+)", instruction)
        if jump and jump[1] in places and places[jump[1]] > last:
            yield instructions[places[jump[1]] :]
            last = len(instructions) - 1


def packed(loop: list[str], registers: str = "yz") -> int:
    """How many packed multiply-adds of ymm or zmm registers; 0 if arithmetic of the loop is scalar."""
    if any(SCALAR.search(i) for i in loop):
        return 0
    return sum(found is not None and found[2] in registers for found in map(WIDE.search, loop))


def from_text(assembly: str) -> Iterator[tuple[str, str]]:
    label = ""
    for line in assembly.splitlines():
        if named := re.match(r"(\.?\w+):", line):
            label = named[1]
        elif instruction := re.match(r"\s+([a-z].*)", line):
            yield label, instruction[1]
            label = ""


def from_objdump(library: str) -> Iterator[tuple[str, str]]:
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if instruction := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
                yield instruction[1], instruction[2]


def has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


def test_a_scalar_loop_is_not_packed() -> None:
    """The reader itself: it sees a packed loop, and is not content with a scalar one."""
    loop = ".L1:\n" + "\tvfmadd213ps %ymm0, %ymm1, %ymm2\n" * A_POLYNOMIAL + "{}\tjne .L1\n"
    assert [packed(i) for i in innermost_loops(from_text(loop.format("")))] == [A_POLYNOMIAL]
    assert [packed(i, "z") for i in innermost_loops(from_text(loop.format("")))] == [0]
    assert [packed(i) for i in innermost_loops(from_text(loop.format("\tvmulss %xmm0, %xmm1, %xmm2\n")))] == [0]


@pytest.mark.skipif(not has_avx2(), reason="this processor has no AVX2, which Numba compiles for where it is")
@pytest.mark.parametrize("target_type", ["float32", "uint8"])
@pytest.mark.parametrize("recon_type", ["float32", "bfloat16"])
def test_numba(recon_type: str, target_type: str) -> None:
    if not fastvae.backends()["numba"].available:
        pytest.skip(fastvae.backends()["numba"].reason)
    from numba import njit

    from fastvae.kernels.numba import intrinsics, reconstruction

    types = [getattr(intrinsics, name.upper()) for name in (recon_type, target_type)]
    logits = torch.zeros(2, 8, dtype=getattr(torch, recon_type), requires_grad=True)
    with fastvae.use_backend("numba"):
        fastvae.bce_with_logits(logits, torch.zeros(2, 8, dtype=getattr(torch, target_type)))
    cached = reconstruction.forward_rows(0, *types, True)
    options = {name: value for name, value in cached.targetoptions.items() if name != "nopython"}
    fresh = njit(**options)(cached.py_func)  # what comes from the disk has no assembly to show
    fresh.compile(cached.signatures[0])
    loops = innermost_loops(from_text(fresh.inspect_asm(fresh.signatures[0])))
    assert max(map(packed, loops)) >= A_POLYNOMIAL


@pytest.mark.parametrize("registers", ["y", "z"], ids=["avx2", "avx512"])
def test_compiled(registers: str) -> None:
    """Four likelihoods with an exponential or a logarithm × eight pairs of dtypes × with and without the gradient.

    In the loops of either instruction set, whether or not this processor has it: they are told by their registers.
    """
    if not fastvae.backends()["cpp"].available:
        pytest.skip(fastvae.backends()["cpp"].reason)
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    from fastvae import _C

    loops = list(innermost_loops(from_objdump(_C.__file__)))
    assert sum(packed(loop, registers) >= A_POLYNOMIAL for loop in loops) >= 4 * 8 * 2
