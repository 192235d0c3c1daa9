"""What only a GPU can show: no synchronisation, graphs, the same bits, more elements than 2³¹, few launches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae.random import philox4x32

from table import OPS, value_and_gradients
from test_compile import test_reduce_overhead_trains_evaluates_and_draws_afresh  # noqa: F401  (with CUDA graphs here)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: see `make gpu`")

GPU_BACKENDS = [
    name for name in ("triton", "cuda") if name in fastvae.backends() and fastvae.backends()[name].available
]


@pytest.fixture(autouse=True, params=GPU_BACKENDS or ["none"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it is launches of its own
    with fastvae.use_backend(request.param), torch.device("cuda"):
        yield request.param


def test_compiled_kernels_serve_a_gpu_unless_told_otherwise() -> None:
    from fastvae import registry

    with registry.use(None):
        assert registry.backend_name("cuda") == next(n for n in ("cuda", "triton") if n in GPU_BACKENDS)


def a_step(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward of what a VAE needs: z, its use, the ELBO."""
    z = fastvae.reparameterize(mu, logvar)
    out = fastvae.elbo_loss(recon + 0.01 * z.sum(), target, mu, logvar)
    return out.loss.detach(), *torch.autograd.grad(out.loss, (recon, mu, logvar))


def step_inputs(batch: int = 128) -> list[Tensor]:
    recon, mu, logvar = torch.randn(batch, 784), torch.randn(batch, 20), torch.randn(batch, 20)
    return [recon.requires_grad_(), torch.rand(batch, 784), mu.requires_grad_(), logvar.requires_grad_()]


@pytest.mark.parametrize("reduction", ["none", "example", "batchmean"])
@pytest.mark.parametrize("op", OPS)
def test_no_op_synchronises(op: str, reduction: str) -> None:
    inputs = [t.float() for t in OPS[op].inputs(64, 100)]

    def run() -> None:
        value_and_gradients(lambda *a: OPS[op].call(*a, reduction=reduction), inputs, OPS[op].differentiable)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_does_not_synchronise() -> None:
    inputs = step_inputs()
    a_step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        a_step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_draws_fresh_noise_and_gives_the_losses_of_an_uncaptured_one() -> None:
    inputs = step_inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            a_step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = a_step(*inputs)
    torch.manual_seed(5)
    eager = [a_step(*inputs) for _ in range(4)]
    torch.manual_seed(5)
    replayed = []
    for _ in range(4):
        graph.replay()
        replayed.append([t.clone() for t in captured])
    assert not torch.equal(replayed[0][0], replayed[1][0]), "fresh noise at every replay"
    for want, got in zip(eager, replayed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("op", ["bce_with_logits", "bce", "gaussian_kl"])
def test_same_bits_over_a_hundred_runs(op: str) -> None:
    inputs = [t.float() for t in OPS[op].inputs(3000, 784)]
    first = None
    for _ in range(100):
        value, gradients = value_and_gradients(OPS[op].call, inputs, OPS[op].differentiable)
        first = first or (value, *gradients)
        assert all(torch.equal(a, b) for a, b in zip(first, (value, *gradients), strict=True))


def test_noise_is_that_of_the_cpu() -> None:
    zeros = torch.zeros(1000, 1001)
    z = fastvae.reparameterize(zeros, zeros, seed=77).cpu()
    with fastvae.use_backend("numba"):
        want = fastvae.reparameterize(zeros.cpu(), zeros.cpu(), seed=77)
    torch.testing.assert_close(z, want, rtol=0, atol=2e-5)


def test_more_than_two_to_the_31_elements() -> None:
    count = (1 << 31) + 4096 + 3
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip("needs 17 GB of free GPU memory")
    zeros = torch.zeros(1, count, dtype=torch.bfloat16)
    z = fastvae.reparameterize(zeros, std=torch.ones((), dtype=torch.bfloat16).expand(1, count), seed=3)
    for element in (count - 1, count - 2, 1 << 31, 7):
        words = philox4x32(3, element // 4)
        radius_word, angle_word = words[:2] if element % 4 < 2 else words[2:]
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) * 2.0**-32))
        angle = 2 * math.pi * (angle_word + 0.5) * 2.0**-32
        want = radius * (math.sin(angle) if element % 2 else math.cos(angle))
        assert abs(z[0, element].item() - want) < 0.01 * max(1, abs(want))
    del z
    logits = zeros.requires_grad_()
    loss = fastvae.bce_with_logits(logits, torch.ones(1, 1, dtype=torch.uint8).expand(1, count), reduction="mean")
    loss.backward()
    assert abs(loss.item() - math.log(2)) < 1e-4
    assert logits.grad is not None
    assert logits.grad[0, -1].item() == logits.grad[0, 0].item() != 0


def launches(call: Callable[[], object]) -> int:
    """Kernels a call puts on the device."""
    call()
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)


def test_the_whole_elbo_takes_fewer_launches_than_compiled() -> None:
    recon, target, mu, logvar = step_inputs()

    def eager(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        bce = F.binary_cross_entropy_with_logits(recon, target, reduction="sum") / len(recon)
        return bce + -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(recon)

    compiled = torch.compile(eager, fullgraph=True)
    theirs = launches(lambda: torch.autograd.grad(compiled(recon, target, mu, logvar), (recon, mu, logvar)))
    ours = launches(lambda: torch.autograd.grad(fastvae.elbo_loss(recon, target, mu, logvar).loss, (recon, mu, logvar)))
    print(f"launches: {ours} ours, {theirs} compiled")
    assert ours < theirs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_current() -> None:
    with torch.cuda.device(0):
        inputs = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in step_inputs()]
        assert all(t.device.index == 1 for t in a_step(*inputs))
