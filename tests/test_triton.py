"""The Triton kernels without a GPU: their values by the interpreter, their machine code by the compiler.

With a GPU the op table runs on it too: ``make gpu``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastvae.benchmarks import static_roofline
from fastvae.kernels.likelihoods import LIKELIHOODS, OF_COUNTS

from table import INTERPRETED

HERE = Path(__file__).parent
# threads are the CPU backends' concern; the statistics of a million normals are the reference's, which these equal;
# finite differences would say again what float64 autograd says of every gradient
SKIPPED_THERE = ("threads", "normal_and_uncorrelated", "backends_agree", "gradcheck")
IN_THE_INTERPRETER = " and not ".join(("triton", *SKIPPED_THERE))
BY_DTYPE = f"{IN_THE_INTERPRETER} and test_dtypes"  # half of the table: two processes share it
OTHERS_OF_IT = f"{IN_THE_INTERPRETER} and not test_dtypes"
# (kernel, dtype) → the instructions an element its hot loop may take
BARS = {
    ("bernoulli_logits one pass", "float32"): 20,
    ("bernoulli_logits one pass", "bfloat16"): 20,
    ("bernoulli_logits uint8 one pass", "float32"): 21,
    ("bernoulli_logits uint8 one pass", "bfloat16"): 21,
    ("sample", "float32"): 28,
    ("sample", "bfloat16"): 31,
}
OTHERS = [
    ("bernoulli_logits by example", "float32"),
    ("bernoulli_logits elementwise", "bfloat16"),
    ("bernoulli_logits backward none", "float32"),
    ("bernoulli_probs one pass", "float32"),
    ("bernoulli_probs one pass", "float16"),
    ("bernoulli_probs_log_clamped one pass", "bfloat16"),
    ("continuous_bernoulli_logits one pass", "bfloat16"),
    ("gaussian elementwise", "float32"),
    ("negative_binomial by column one pass", "float32"),
    ("inflated one pass", "bfloat16"),
    ("softmax of scores", "float32"),
    ("from scores one pass", "float32"),
    ("what a softmax passes on", "float64"),
    ("bernoulli_logits one pass", "float64"),
    ("rescale", "bfloat16"),
    ("sample+KL", "float32"),
    ("sample+KL", "bfloat16"),
    ("sample+KL", "float64"),
    ("sample+KL backward", "float32"),
    ("sample+KL backward", "bfloat16"),
    ("sample strided", "float32"),
    ("KL std total", "float16"),
    ("KL prior backward", "float32"),
    ("KL by example", "bfloat16"),
]


# float32: what rounds to half precision, and float64, have room or none of these functions
PERTURBED = "triton and (test_long or (test_dtypes and float32))"


@pytest.mark.skipif(INTERPRETED, reason="this is the run by the interpreter")
@pytest.mark.parametrize(
    ("file", "tests", "perturb"),
    [
        ("test_ops.py", BY_DTYPE, ""),
        ("test_ops.py", OTHERS_OF_IT, ""),
        *(
            (f"test_{name}.py", IN_THE_INTERPRETER, "")
            for name in ("noise", "autograd", "parameters", "counts", "rows", "linear")
        ),
        ("test_ops.py", PERTURBED, "1"),
    ],
)
def test_the_op_table_in_the_interpreter(file: str, tests: str, perturb: str) -> None:
    """As it is; and with the results of a GPU's special-function units as far off as documented."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTVAE_PERTURB": perturb}
    run = subprocess.run(
        [*command, str(HERE / file)], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("kernel", "dtype", "arch"), [*((*k, 90) for k in [*BARS, *OTHERS]), *((*k, 80) for k in BARS)], ids=str
)
def test_machine_code(kernel: str, dtype: str, arch: int) -> None:
    """No spills, 16-byte accesses, lean loops; every kernel there is: ``make roofline``."""
    (report,) = static_roofline.reports(dtype, arch, lambda name: name == kernel)
    assert report.spills == 0
    assert report.stack == 0
    assert {"LDG.128"} <= set(report.loop.widths)
    others = {"STG.32"} if "example" in kernel else {"STG.64"} if "inflated" in kernel else set()
    assert {w for w in report.loop.widths if w.startswith("STG")} <= {"STG.128"} | others
    assert report.loop.instructions <= BARS.get((kernel, dtype), 1000)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "kernel",
    ["mixture RGB", "mixture RGB first", "mixture grey", "logistic", "categorical NLL", "categorical KL unimix",
     "log q − log p of a prior"],
)  # fmt: skip
def test_machine_code_of_rows(kernel: str, dtype: str) -> None:
    (report,) = static_roofline.reports(dtype, 90, lambda name: name == kernel)
    assert report.spills == 0
    assert report.stack == 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("likelihood", sorted(name for name, row in LIKELIHOODS.items() if name not in OF_COUNTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_machine_code_of_a_scored_layer(dtype: torch.dtype, likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by wgmma, operands by 16 bytes, no spills, and room for it in the shared memory of a small GPU."""
    from fastvae.kernels.triton import linear

    monkeypatch.setattr(linear, "serves", lambda *_: True)  # of tensors without memory it knows no device
    hidden, weight, bias = (torch.empty(*s, dtype=dtype, device="meta") for s in ((4096, 512), (784, 512), (784,)))
    target = torch.empty(4096, 784, dtype=torch.uint8, device="meta")
    options = {"likelihood": likelihood, "parameter": 1.0, "reduction": "sum", "with_gradient": True}
    launch, _ = static_roofline.record(lambda: linear.linear_forward(hidden, weight, bias, target, **options))
    compiled = static_roofline.compile_for(launch, 90)
    opcodes = [opcode for _, opcode, _ in static_roofline.instructions(compiled)]
    assert any("GMMA" in opcode for opcode in opcodes)
    assert any(opcode.startswith("LDGSTS") and opcode.endswith("128") for opcode in opcodes)
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
    assert compiled.metadata.shared <= 99 << 10


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian_logvar", "laplace", "laplace_log_scale"])
def test_a_second_backward_has_the_arithmetic_of_the_first(likelihood: str) -> None:
    """c − a·b of a parameter's gradient: fused in the forward that writes it too, though that needs a·b besides."""
    from fastvae.kernels import triton as backend

    data = [torch.empty(64, 512, dtype=torch.float64, device="meta") for _ in range(3)]
    options = {"likelihood": likelihood, "parameter": 0.0, "reduction": "sum"}
    half_or_one = "0d3FE0000000000000" if likelihood == "gaussian_logvar" else "0d3FF0000000000000"
    fused = []
    for call in (
        lambda: backend.reconstruction_forward(*data, **options, with_gradient=True),
        lambda: backend.reconstruction_backward(torch.empty((), dtype=torch.float64, device="meta"), *data, **options),
    ):
        (launch, *_) = static_roofline.record(call)
        code = static_roofline.compile_for(launch, 90).asm["ptx"]
        fused.append(len(re.findall(rf"fma\.rn\.f64 .*, {half_or_one};", code)))
    assert fused[0] == fused[1] > 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_it_compiles_for_amd() -> None:
    """In a process of its own: there, portable twins stand for the PTX."""
    command = [sys.executable, "-m", "fastvae.benchmarks.static_roofline", "--arch", "gfx942", "--only", "sample+KL"]
    run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| sample")]
    assert len(rows) == 8
    for _, _, _, stack, spills, accesses in rows:
        assert stack == spills == "0"
        assert "global_load_dwordx4" in accesses


def test_a_launch_covers_every_element_once() -> None:
    from fastvae.kernels.triton.launch import MAX_STEPS, PROGRAMS, TILE, plan

    for rows in (1, 2, 3, 8192, 100_000):
        for cols in (1, 3, 64, 784, 2048, 2049, 1 << 20, 3 << 31):
            tiles = plan(rows, cols, torch.float32)
            row_tiles = -(-rows // tiles.rows)
            assert tiles.rows * tiles.block <= TILE
            assert 1 <= tiles.steps <= MAX_STEPS
            assert tiles.programs == row_tiles * tiles.chunks
            assert tiles.chunks * tiles.steps * tiles.block >= cols, "every column"
            assert (tiles.chunks - 1) * tiles.steps * tiles.block < cols, "no program without work"
            if rows * cols <= TILE * PROGRAMS and cols >= TILE:
                assert tiles.steps == 1, "small inputs are spread over as many programs as there are tiles"


def test_noise_beyond_two_to_the_31() -> None:
    """Which element a program draws for is 64-bit: the last launch of a huge tensor would show it, its plan does."""
    from fastvae.kernels.triton.launch import plan

    tiles = plan(1, (1 << 33) + 5, torch.float32)
    assert tiles.programs < 1 << 31
    assert (tiles.programs - 1) * tiles.steps * tiles.block > 1 << 32


STUBBED = """
import stubbed_triton as stub, torch, fastvae
from fastvae.kernels.triton import launch

stub.install()
def call(op, t, k, reduction):
    shape = ((128, 784), (3, 5), (1, 16), (4, 1))[k % 4]
    wide = [torch.rand(shape[0], shape[1] + k % 3, dtype=t)[:, : shape[1]].requires_grad_() for _ in range(2)]
    if k % 5 == 4:
        wide = [torch.rand(shape[0] * shape[1] + 1, dtype=t)[1:].reshape(shape).requires_grad_() for _ in range(2)]
    value = getattr(fastvae, op)(*wide, reduction=reduction)
    torch.autograd.grad(value, wide[0], torch.ones_like(value))

seen = {}
with fastvae.use_backend("triton"):
    for fresh in (True, False, False):
        stub.LAUNCHES.clear()
        for k in range(20):
            for op, reduction in (("l1", "batchmean"), ("l1", "example"), ("gaussian_kl", "batchmean")):
                if fresh:
                    launch._compiled.clear()
                call(op, torch.float32, k, reduction)
        launches = list(stub.LAUNCHES)
        seen.setdefault("launches", launches)
        assert launches == seen["launches"], "what was compiled for other arguments was launched"
print(len(launches), len({launcher for launcher, _, _ in launches}), len(launch._compiled))
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
def test_launches_are_those_of_triton_itself() -> None:
    """With its own look-up each time, and with ours: the same compiled kernel and arguments, whatever the layout."""
    run = subprocess.run([sys.executable, "-c", STUBBED], cwd=HERE, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    launches, kernels, kept = map(int, run.stdout.split())
    assert launches >= 120
    assert kept >= kernels > 10


COUNTED = """
import stubbed_triton as stub, torch, fastvae

stub.install()
with fastvae.use_backend("triton"):
    for shape in ((128, 784), (3, 5)):
        recon, target = torch.randn(shape, requires_grad=True), torch.rand(shape)
        mu, logvar = (torch.randn(shape[0], 20, requires_grad=True) for _ in range(2))
        for _ in range(2):  # the second goes by our look-up
            stub.LAUNCHES.clear()
            loss = fastvae.elbo_loss(recon, target, mu, logvar, beta=0.5).loss
            forward = len(stub.LAUNCHES)
            torch.autograd.grad(loss, (recon, mu, logvar))
            print(forward, len(stub.LAUNCHES) - forward)
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
def test_the_elbo_takes_three_launches() -> None:
    """Two forward, one backward."""
    run = subprocess.run([sys.executable, "-c", COUNTED], cwd=HERE, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == ["2 1"] * 4
