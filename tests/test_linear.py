"""A linear layer and its loss in one: the two calls' values and gradients, in less memory, in every mode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae.benchmarks.memory import peak_extra_bytes
from fastvae.kernels.likelihoods import NAMES, OF_COUNTS

from table import BACKENDS, DEVICE

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("batchmean", "sum", "mean", "example")
TERMS = {
    "bernoulli_logits": fastvae.bce_with_logits,
    "bernoulli_probs": fastvae.bce,
    "continuous_bernoulli_logits": fastvae.continuous_bernoulli_with_logits,
    "gaussian": fastvae.gaussian_nll,
    "laplace": fastvae.laplace_nll,
    "mse": fastvae.mse,
    "l1": fastvae.l1,
    "poisson": fastvae.poisson_nll,
    "poisson_log_rate": fastvae.poisson_nll_with_log_rate,
}


def inputs(
    lead: tuple[int, ...] = (7,),
    features: int = 5,
    data: int = 9,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(sum(lead) + data)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    target = torch.rand((*lead, data), generator=generator).to(DEVICE, dtype)
    return draw(*lead, features), draw(data, features), draw(data) if bias else None, target


def two_calls(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    term = TERMS[options.pop("likelihood", "bernoulli_logits")]
    options.pop("chunk", None)
    return term(F.linear(hidden, weight, bias), target, **options)


def gradients(function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], **options: Any) -> list[Tensor]:
    """Value and gradients under an upstream gradient that is not 1; twice."""
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    value = function(*tensors, **options)
    upstream = torch.linspace(0.5, 2, value.numel(), device=value.device, dtype=value.dtype).view(value.shape)
    first = torch.autograd.grad(value, leaves, upstream, retain_graph=True)
    return [value, *first, *torch.autograd.grad(value, leaves, upstream)]


def double(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor.double() / 255
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def promise(tensors: tuple[Tensor | None, ...], **options: Any) -> None:
    """No further from float64 than twice as far as PyTorch's linear layer and the library's term, or rounding."""
    exact = gradients(two_calls, tuple(t if t is None else double(t) for t in tensors), **options)
    ours, theirs = gradients(fastvae.linear_bce, tensors, **options), gradients(two_calls, tensors, **options)
    eps = torch.finfo(ours[1].dtype).eps
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        assert got.shape == other.shape
        error, allowed = ((t.double() - want).abs().max() for t in (got, other))
        assert error <= 2 * allowed + 4 * eps * want.abs().max(), (error, allowed)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_two_calls(backend: str, dtype: torch.dtype, reduction: str, chunk: int | None) -> None:
    with fastvae.use_backend(backend):
        promise(inputs(dtype=dtype), reduction=reduction, chunk=chunk)


@pytest.mark.parametrize("likelihood", TERMS)
def test_every_likelihood(likelihood: str) -> None:
    hidden, weight, bias, target = inputs()
    if likelihood in OF_COUNTS:
        target = (4 * target).floor()
    if likelihood in ("bernoulli_probs", "poisson"):
        assert bias is not None
        hidden, weight, bias = hidden.detach().abs(), weight.detach().abs() / 40, bias.detach() * 0
        hidden, weight, bias = (t.requires_grad_() for t in (hidden, weight, bias))
    promise((hidden, weight, bias, target), likelihood=likelihood, chunk=3)


def test_a_likelihood_that_needs_a_number_is_refused() -> None:
    """The others are all above."""
    for likelihood in set(NAMES) - set(TERMS):
        with pytest.raises(ValueError, match="needs its dispersion"):
            fastvae.linear_bce(*inputs(), likelihood=likelihood)


@pytest.mark.parametrize("lead", [(1,), (64,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(("features", "data"), [(1, 1), (3, 784), (17, 33)])
def test_shapes_and_no_bias(lead: tuple[int, ...], features: int, data: int) -> None:
    promise(inputs(lead, features, data, bias=False), chunk=2)
    promise(inputs(lead, features, data), reduction="example", chunk=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_a_tile(backend: str) -> None:
    """130 examples, 131 outputs, 70 inputs: beyond the first tile in each; every kind of target."""
    hidden, weight, bias, target = inputs((130,), 70, 131, torch.bfloat16)
    with fastvae.use_backend(backend):
        for x in (target, (target * 255).to(torch.uint8), target.float()):
            promise((hidden, weight, bias, x), reduction="example")
            promise((hidden, weight, None, x.reshape(130, 131)))
        with torch.no_grad():
            value = fastvae.linear_bce(hidden, weight, bias, target)
        promise((hidden[:, ::2], weight[:, ::2], bias, target))
    torch.testing.assert_close(value, two_calls(hidden, weight, bias, target), rtol=1e-2, atol=0)


def test_uint8_and_layouts() -> None:
    hidden, weight, bias, target = inputs((6,))
    wide = torch.randn(6, 10, device=DEVICE).requires_grad_()
    promise(
        (wide, weight.detach().t().contiguous().t().repeat(1, 2).requires_grad_(), bias, (target * 255).byte()), chunk=4
    )
    strided = torch.randn(5, 6, device=DEVICE).t().requires_grad_()  # features are not next to each other
    promise((strided, weight, bias, target), chunk=4)
    promise((hidden, weight, bias, target[:1].expand(6, -1)), chunk=4)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_what_is_needed(which: int) -> None:
    tensors = [t if t is None else t.detach() for t in inputs()]
    leaf = tensors[which]
    assert leaf is not None
    leaf.requires_grad_()
    promise(tuple(tensors), chunk=3)


@pytest.mark.parametrize("reduction", ["batchmean", "example"])
def test_second_derivatives_and_batched_gradients(reduction: str) -> None:
    *leaves, target = inputs(dtype=torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        return fastvae.linear_bce(*leaves, target, reduction=reduction, chunk=3)

    assert torch.autograd.gradcheck(call, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_without_gradients_and_of_the_target() -> None:
    hidden, weight, bias, target = inputs()
    want = two_calls(hidden, weight, bias, target)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(fastvae.linear_bce(hidden, weight, bias, target, chunk=2), want)
    target.requires_grad_()
    promise((hidden, weight, bias, target), chunk=2)


def test_empty() -> None:
    hidden, weight, bias, target = inputs((0,))
    assert fastvae.linear_bce(hidden, weight, bias, target, reduction="sum") == 0
    assert fastvae.linear_bce(hidden, weight, bias, target, reduction="example").shape == (0,)


@pytest.mark.parametrize("reduction", ["batchmean", "example"])
def test_compiled_and_transformed(reduction: str) -> None:
    hidden, weight, bias, target = inputs()

    def call(hidden: Tensor) -> Tensor:
        return fastvae.linear_bce(hidden, weight, bias, target, reduction=reduction).sum()

    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), call(hidden))
    (want,) = torch.autograd.grad(call(hidden), hidden)
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), hidden)[0], want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden), call(hidden))
    torch.testing.assert_close(torch.func.grad(call)(hidden), want)
    each = torch.vmap(lambda h, x: fastvae.linear_bce(h[None], weight, bias, x[None]))(hidden, target)
    torch.testing.assert_close(each, two_calls(hidden, weight, bias, target, reduction="example"))


def test_under_autocast() -> None:
    hidden, weight, bias, target = inputs((32,), 40, 50)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = gradients(fastvae.linear_bce, (hidden, weight, bias, target), chunk=10)
        theirs = gradients(two_calls, (hidden, weight, bias, target))
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_backward_asks_the_backend_of_the_forward() -> None:
    tensors = inputs()
    with fastvae.use_backend("torch"):
        loss = fastvae.linear_bce(*tensors, reduction="example")
    loss.sum().backward()


def test_an_input_changed_in_place_is_seen() -> None:
    hidden, weight, bias, target = inputs()
    loss = fastvae.linear_bce(hidden * 1, weight, bias, target)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_divergence_is_seen() -> None:
    hidden, weight, bias, target = inputs()
    with torch.no_grad():
        hidden[3, 2] = float("nan")
    value, of_hidden, of_weight, *_ = gradients(fastvae.linear_bce, (hidden, weight, bias, target), chunk=2)
    assert value.isnan()
    assert of_weight.isnan().any()
    assert of_hidden[3].isnan().all()
    assert of_hidden[:3].isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="measures the CPU's allocator")
def test_memory_does_not_grow_with_the_data() -> None:
    tensors = inputs((4096,), 32, 784)
    leaves = [t for t in tensors[:3] if t is not None]
    kept = sum(t.nbytes for t in leaves)

    def peak(function: Callable[..., Tensor], **options: Any) -> int:
        return peak_extra_bytes(lambda: torch.autograd.grad(function(*tensors, **options), leaves), "cpu")

    chunk = 128 * 784 * 4
    assert peak(fastvae.linear_bce, chunk=128) < kept + 4 * chunk
    assert peak(two_calls) > kept + 8 * chunk, "or this test sees nothing"


def test_the_module_is_the_layer_it_replaces() -> None:
    hidden, _, _, target = inputs()
    layer = torch.nn.Linear(5, 9, device=DEVICE)
    end = fastvae.nn.LinearBCE(5, 9, reduction="sum", device=DEVICE)
    end.load_state_dict(layer.state_dict())
    shared = fastvae.nn.LinearBCE.of(layer, reduction="sum")
    want = fastvae.bce_with_logits(layer(hidden), target, reduction="sum")
    for module in (end, shared):
        torch.testing.assert_close(module(hidden, target), want)
        torch.testing.assert_close(module.recon(hidden), layer(hidden))
    assert shared.weight is layer.weight
    assert repr(end) == (
        "LinearBCE(in_features=5, out_features=9, bias=True, "
        "likelihood='bernoulli_logits', reduction='sum', chunk=None)"
    )


HIDDEN, WEIGHT, BIAS, TARGET = torch.zeros(4, 5), torch.zeros(9, 5), torch.zeros(9), torch.zeros(4, 9)
FEATURES = "hidden must have a batch dimension and one of features, [B, *, K], got [5]"
SHAPE = "target must have the shape of the layer's output, [4, 9], got [4, 2]"
ERRORS: list[tuple[tuple, dict[str, Any], type[Exception], str]] = [
    ((HIDDEN, WEIGHT[:, :3], BIAS, TARGET), {}, ValueError, "weight must be [M, 5], as hidden ends with that, got"),
    ((HIDDEN, WEIGHT, BIAS[:3], TARGET), {}, ValueError, "bias must be [9], as weight begins with that, got [3]"),
    ((HIDDEN, WEIGHT, BIAS, TARGET[:, :2]), {}, ValueError, SHAPE),
    ((HIDDEN[0], WEIGHT, BIAS, TARGET[0]), {}, ValueError, FEATURES),
    ((HIDDEN, WEIGHT.double(), BIAS, TARGET), {}, TypeError, "weight must have the dtype of hidden, float32, got"),
    ((HIDDEN, [1.0], BIAS, TARGET), {}, TypeError, "weight must be a tensor, got list"),
    ((HIDDEN, WEIGHT, BIAS.long(), TARGET), {}, TypeError, "bfloat16 or float16, got int64"),
    ((HIDDEN, WEIGHT.to("meta"), BIAS, TARGET), {}, ValueError, "weight must be on the device of hidden, cpu, got"),
    ((HIDDEN, WEIGHT, BIAS, TARGET), {"reduction": "none"}, ValueError, "got 'none': its result is as large"),
    ((HIDDEN, WEIGHT, BIAS, TARGET), {"likelihood": "bce"}, ValueError, "'negative_binomial', got 'bce'"),
    ((HIDDEN, WEIGHT, BIAS, TARGET), {"chunk": 0}, ValueError, "chunk must be at least 1 example, got 0"),
    ((HIDDEN, WEIGHT, BIAS, TARGET), {"chunk": 2.5}, TypeError, "chunk must be an int or None, got float"),
    ((HIDDEN, WEIGHT, BIAS, TARGET + 2), {}, ValueError, "target must lie in [0, 1]"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_errors_name_the_argument(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fastvae.linear_bce(*arguments, **options)


@pytest.mark.parametrize("layer", [torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid())])
def test_of_takes_a_linear_layer(layer: torch.nn.Module) -> None:
    with pytest.raises(TypeError, match=f"layer must be an nn.Linear, .* got {type(layer).__name__}"):
        fastvae.nn.LinearBCE.of(layer)
