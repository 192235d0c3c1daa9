"""The table: every op × backend × dtype × layout × reduction against float64, no worse than twice eager's own error."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae

from table import DTYPES, INTERPRETED, OPS, REDUCTIONS, TARGETS, Op, on, reduce, value_and_gradients

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "chunk": lambda t: torch.cat([t, t], dim=1).chunk(2, dim=1)[1],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


def tiny(dtype: torch.dtype, op: Op, inputs: list[Tensor], reduction: str) -> float:
    """What rounding alone may cost: 2⁻²³ nats an element (2⁻⁵⁰ in float64), once for each element that was added."""
    eps = 2.0**-50 if dtype == torch.float64 else 2.0**-22
    count = inputs[0].numel()
    count = {"none": 1, "mean": 1, "sum": count, "batchmean": count / inputs[0].shape[0]}.get(
        reduction, count / inputs[0].shape[0]
    )
    return eps * count


def error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def check(op: Op, inputs: list[Tensor], dtype: torch.dtype, reduction: str) -> None:
    """Ours against float64 on the same rounded inputs; eager in ``dtype`` sets the tolerance."""
    rounded = [t.to(dtype) for t in inputs]
    exact = [t.double() for t in rounded]
    plain = [t.contiguous() for t in rounded]
    want, want_grads = value_and_gradients(lambda *a: reduce(op.expected(*a), reduction), exact, op.differentiable)
    eager, eager_grads = value_and_gradients(lambda *a: reduce(op.eager(*a), reduction), plain, op.differentiable)
    ours, our_grads = value_and_gradients(lambda *a: op.call(*a, reduction=reduction), rounded, op.differentiable)
    assert ours.shape == want.shape
    assert ours.dtype == (dtype if reduction == "none" or dtype == torch.float64 else torch.float32)
    assert error(ours, want) <= 2 * error(eager, want) + tiny(dtype, op, inputs, reduction) * (
        1 + want.abs().max().item()
    )
    for k, (grad, eager_grad, want_grad) in enumerate(zip(our_grads, eager_grads, want_grads, strict=True)):
        assert grad.dtype == dtype
        assert grad.shape == inputs[k].shape
        slack = tiny(dtype, op, inputs, "none") * (1 + want_grad.abs().max().item())
        assert error(grad, want_grad) <= 2 * error(eager_grad, want_grad) + slack, f"gradient of input {k}"


# in the interpreter one total stands for the three, which differ by their weight
@pytest.mark.parametrize("reduction", ("none", "example", "batchmean") if INTERPRETED else REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", TARGETS)
def test_dtypes_and_reductions(backend: str, op: str, dtype: torch.dtype, reduction: str) -> None:
    with on(backend):
        check(OPS[op], OPS[op].inputs(7, 301), dtype, reduction)


@pytest.mark.parametrize("scale", [3.0, 15.0] if INTERPRETED else [1.0, 3.0, 8.0, 15.0])
@pytest.mark.parametrize("backend", TARGETS)
def test_long_sums_are_no_worse_than_torchs(backend: str, scale: float) -> None:
    """From mixed to all but certain pixels: what an element loses, or all lose alike, an image loses 784 times."""
    logits = (torch.randn(256, 784) - 1) * scale
    probs = torch.sigmoid(logits.double()).float()
    target = (torch.rand(256, 784) < probs).float()
    for ours, theirs, y in (
        (fastvae.bce, F.binary_cross_entropy, probs),
        (fastvae.bce_with_logits, F.binary_cross_entropy_with_logits, logits),
    ):
        with on(backend):
            got = ours(y, target, reduction="example")
        want = theirs(y.double(), target.double(), reduction="none").sum(dim=1)
        assert error(got, want) <= 2 * error(theirs(y, target, reduction="none").sum(dim=1), want)


@pytest.mark.parametrize("op", ["mse", "gaussian_kl"])
@pytest.mark.parametrize("backend", TARGETS)
def test_a_float64_sum_of_many_examples_keeps_its_last_digits(backend: str, op: str) -> None:
    """Every addition of the same number may round alike: 4099 of them, one after the other, lost 900 ulps."""
    shape = (1000 if INTERPRETED else 4099, 2)
    one = OPS[op].inputs(1, 2)
    want = shape[0] * OPS[op].expected(*one).sum()
    with on(backend):
        got = OPS[op].call(*[t.expand(shape) for t in one], reduction="sum")
    torch.testing.assert_close(got, want, rtol=64 * 2.0**-53, atol=0)


@pytest.mark.parametrize("reduction", ["none", "example", "batchmean"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["bce_with_logits", "gaussian_kl", "gaussian_kl_prior"])
@pytest.mark.parametrize("backend", TARGETS)
def test_layouts(backend: str, op: str, layout: str, reduction: str) -> None:
    with on(backend):
        check(OPS[op], [LAYOUTS[layout](t) for t in OPS[op].inputs(6, 4, 9, 2)], torch.float32, reduction)


@pytest.mark.parametrize("reduction", ["none", "example"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["bce_with_logits", "gaussian_kl", "gaussian_kl_prior"])
@pytest.mark.parametrize("backend", TARGETS)
def test_each_tensor_has_strides_and_an_offset_of_its_own(
    backend: str, op: str, dtype: torch.dtype, reduction: str
) -> None:
    def inside(k: int, t: Tensor) -> Tensor:
        wide = torch.zeros(len(t), t.shape[1] + 2 * k + 1, dtype=dtype)
        return wide[:, k : k + t.shape[1]].copy_(t)

    with on(backend):
        check(OPS[op], [inside(k, t) for k, t in enumerate(OPS[op].inputs(5, 67))], dtype, reduction)


@pytest.mark.parametrize("backend", TARGETS)
def test_factors_of_a_sum_do_not_overflow(backend: str) -> None:
    """A logit of 0 is a factor of 2, and a thread may take hundreds: twice 128 would be infinite in float32."""
    zeros = torch.zeros(1, 1_000_000)
    with on(backend):
        assert fastvae.bce_with_logits(zeros, zeros, reduction="mean").item() == pytest.approx(math.log(2))


SIZES = [(1,), (5,), (3, 1), (1, 5000), (4097, 3), (2, 40_000), (33, 4096)]


@pytest.mark.parametrize("shape", SIZES[: 6 if INTERPRETED else 7], ids=str)
@pytest.mark.parametrize("op", ["bce_with_logits", "gaussian_kl"])
@pytest.mark.parametrize("backend", TARGETS)
def test_sizes_around_the_blocks(backend: str, op: str, shape: tuple[int, ...]) -> None:
    with on(backend):
        for reduction in ("none", "example", "sum"):
            check(OPS[op], OPS[op].inputs(*shape), torch.float32, reduction)


CHANNELS_LAST = [
    ((3, 4, 5, 6), torch.channels_last),
    ((3, 4, 5, 6), torch.contiguous_format),
    ((3, 4, 2, 5, 6), torch.channels_last_3d),
]


@pytest.mark.parametrize(("shape", "memory_format"), CHANNELS_LAST, ids=str)
@pytest.mark.parametrize("reduction", ["none", "example", "batchmean"])
@pytest.mark.parametrize("backend", TARGETS)
def test_channels_last(
    backend: str, reduction: str, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """The gradient has the layout of its tensor, as eager's; targets in either layout, uint8 among them."""
    op = OPS["bce_with_logits"]
    logits, target = (t.float() for t in op.inputs(*shape))
    for x in (target, (target * 255).byte()):
        with on(backend):
            want, (want_grad,) = value_and_gradients(lambda *a: op.call(*a, reduction=reduction), [logits, x], 1)
            for x_format in (memory_format, torch.contiguous_format):
                moved = [logits.to(memory_format=memory_format), x.to(memory_format=x_format)]
                got, (grad,) = value_and_gradients(lambda *a: op.call(*a, reduction=reduction), moved, 1)
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
                # torch's own exp rounds the last elements of a loop otherwise than whole vectors, where AVX-512 is
                tolerance = 1e-6 if backend == "torch" else 0
                torch.testing.assert_close(grad, want_grad, rtol=tolerance, atol=tolerance)
                assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", TARGETS)
def test_tensors_are_served_where_they_are_whatever_the_default_device(backend: str, op: str) -> None:
    """On a GPU machine that default is often "cuda"; "meta", which has no memory, shows the same anywhere."""
    inputs = [t.float() for t in OPS[op].inputs(3, 20)]
    with on(backend):
        for reduction in ("none", "example", "batchmean"):
            call = functools.partial(OPS[op].call, reduction=reduction)
            want, gradients = value_and_gradients(call, inputs, OPS[op].differentiable)
            with torch.device("meta"):
                got, others = value_and_gradients(call, inputs, OPS[op].differentiable)
            assert all(torch.equal(a, b) for a, b in zip((want, *gradients), (got, *others), strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", TARGETS)
def test_zero_size(backend: str, op: str) -> None:
    with on(backend):
        for shape in ((0, 5), (3, 0), (0,))[: 2 if "scores" in op else 3]:
            inputs = OPS[op].inputs(*shape)
            for reduction in REDUCTIONS:
                ours, grads = value_and_gradients(
                    lambda *a, r=reduction: OPS[op].call(*a, reduction=r), inputs, OPS[op].differentiable
                )
                want = (
                    reduce(OPS[op].expected(*inputs), reduction)
                    if shape != (0,) or reduction != "example"
                    else inputs[0]
                )
                torch.testing.assert_close(ours, want, equal_nan=True)
                assert [g.shape for g in grads] == [t.shape for t in inputs[: OPS[op].differentiable]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", TARGETS)
def test_gradcheck_and_gradgradcheck(backend: str, op: str, reduction: str) -> None:
    """On the kernels themselves, in float64, with every input differentiable, the target too unless it is counts."""
    inputs = OPS[op].inputs(2, 3)
    for t in inputs[: len(inputs) - OPS[op].counts]:
        t.requires_grad_()
    with on(backend):
        assert torch.autograd.gradcheck(lambda *a: OPS[op].call(*a, reduction=reduction), inputs, fast_mode=INTERPRETED)
        assert torch.autograd.gradgradcheck(
            lambda *a: OPS[op].call(*a, reduction=reduction), inputs, fast_mode=INTERPRETED
        )


@pytest.mark.parametrize("subset", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("op", ["bce_with_logits", "gaussian_kl"])
@pytest.mark.parametrize("backend", TARGETS)
def test_gradients_for_a_subset(backend: str, op: str, subset: tuple[int, ...]) -> None:
    inputs = OPS[op].inputs(3, 5)
    leaves = [t.clone().requires_grad_(k in subset) for k, t in enumerate(inputs)]
    with on(backend):
        OPS[op].call(*leaves).backward()
    _, want = value_and_gradients(lambda *a: reduce(OPS[op].expected(*a), "batchmean"), inputs, 2)
    for k, leaf in enumerate(leaves):
        if k in subset:
            torch.testing.assert_close(leaf.grad, want[k])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["bce", "bce_with_logits", "mse"])
@pytest.mark.parametrize("backend", TARGETS)
def test_uint8_and_float32_targets(backend: str, op: str, dtype: torch.dtype) -> None:
    recon = OPS[op].inputs(5, 77)[0].to(dtype)
    pixels = torch.randint(0, 256, (5, 77), dtype=torch.uint8)
    for target in (pixels, pixels / 255):
        want = reduce(OPS[op].expected(recon.double(), pixels.double() / 255), "batchmean")
        with on(backend):
            got, (grad,) = value_and_gradients(OPS[op].call, [recon, target], 1)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", TARGETS)
def test_clipped_bce_is_finite_where_the_textbook_form_is_not(backend: str, dtype: torch.dtype) -> None:
    probs = torch.tensor([0.0, 1.0, 1e-45, 1 - 2.0**-24], dtype=torch.float64).to(dtype).repeat_interleave(3)
    target = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).repeat(4)
    with on(backend):
        for reduction in ("none", "sum"):
            loss, (grad,) = value_and_gradients(
                lambda y, x, r=reduction: fastvae.bce(y, x, reduction=r), [probs[:, None], target[:, None]], 1
            )
            assert loss.isfinite().all()
            assert grad.isfinite().all()
    clipped = (probs < 1e-8) | (1 - probs.double() < 1e-8)
    assert (grad[clipped, 0] == 0).all(), "no gradient where the probability is clipped"
    textbook = -target * probs.log() - (1 - target) * (1 - probs.clamp(1e-8, 1 - 1e-8)).log()
    assert not textbook.isfinite().all(), "these inputs must be ones the textbook form fails on"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", TARGETS)
def test_nan_in_gives_nan_out(backend: str, op: str) -> None:
    inputs = [t.float() for t in OPS[op].inputs(3, 50)]
    inputs[0][1, 7] = float("nan")
    with on(backend):
        by_example, grads = value_and_gradients(
            lambda *a: OPS[op].call(*a, reduction="example"), inputs, OPS[op].differentiable
        )
        total, total_grads = value_and_gradients(OPS[op].call, inputs, OPS[op].differentiable)
    assert by_example.isnan().tolist() == [False, True, False]
    assert total.isnan()
    for grad in (grads[0], total_grads[0]):
        assert grad[0].isfinite().all()
        assert grad[1, 7].isnan()
        assert grad[1, :7].isnan().all() if "scores" in op else grad[1, :7].isfinite().all()


@pytest.mark.parametrize("backend", TARGETS)
def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch's own sums depend on the number of threads; the promise is the kernels'")
    logits, target = (t.float() for t in OPS["bce_with_logits"].inputs(700, 784))
    mu, logvar = (t.float() for t in OPS["gaussian_kl"].inputs(7000, 64))
    threads, seen = torch.get_num_threads(), []
    with on(backend):
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                loss, grads = value_and_gradients(fastvae.bce_with_logits, [logits, target], 1)
                (z, kl), _ = fastvae.sample_with_kl(mu, logvar, seed=5), None
                seen.append((loss, *grads, z, kl))
        finally:
            torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_new_memory_is_not_a_number_here() -> None:
    """What conftest.py promises: without it an unwritten output would go unseen."""
    assert torch.empty(1000).isnan().all()
