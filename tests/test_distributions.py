"""``fastvae.distributions`` against ``torch.distributions``: values, gradients, shapes, errors, who computes a KL."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributions
from torch.distributions import kl_divergence

from fastvae import distributions as ours
from fastvae import reparameterize

CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 2e-5, "atol": 2e-6}}
DTYPES = [torch.float64, torch.float32]
SHAPES = [(3, 5), (4,), (2, 3, 4), ()]


@pytest.fixture(autouse=True)
def validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are validated, although ``torch.compile`` turns that off in a process that has compiled anything."""
    monkeypatch.setattr(distributions.Distribution, "_validate_args", True)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def binary(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape).round().to(dtype)


def same(make: Callable[[Any], Tensor], leaves: list[Tensor], dtype: torch.dtype) -> None:
    """``make(module)`` has one value, one shape, one dtype and one gradient in ``leaves``, whichever the module."""
    values = [make(module) for module in (ours, distributions)]
    torch.testing.assert_close(*values, **CLOSE[dtype])
    upstream = torch.randn_like(values[0])
    gradients = [torch.autograd.grad(value, leaves, upstream, retain_graph=True) for value in values]
    torch.testing.assert_close(*gradients, **CLOSE[dtype])


def normal(module: Any, loc: Tensor, logvar: Tensor, **options: Any) -> Any:
    if module is ours:
        return module.Normal(loc, logvar=logvar, **options)
    return module.Normal(loc, (0.5 * logvar).exp(), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("samples", [(), (6,), (2, 3)], ids=str)
def test_densities(shape: tuple[int, ...], samples: tuple[int, ...], dtype: torch.dtype) -> None:
    """Elementwise and over every number of axes, for one value and for several."""
    loc, logvar, z = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(*samples, *shape, dtype=dtype)
    std, x = (0.5 * logvar).exp().detach().requires_grad_(), binary(*samples, *shape, dtype=dtype)
    same(lambda d: normal(d, loc, logvar).log_prob(z), [loc, logvar, z], dtype)
    same(lambda d: d.Normal(loc, std).log_prob(z), [loc, std, z], dtype)
    same(lambda d: d.Bernoulli(logits=loc).log_prob(x), [loc], dtype)
    for events in range(len(shape) + 1):
        same(lambda d, n=events: d.Independent(normal(d, loc, logvar), n).log_prob(z), [loc, logvar, z], dtype)
        same(lambda d, n=events: d.Independent(d.Bernoulli(logits=loc), n).log_prob(x), [loc], dtype)
        same(lambda d, n=events: d.Independent(distributions.Laplace(loc, std), n).log_prob(z), [loc, std, z], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divergences(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    loc, logvar, mean, spread = (randn(*shape, dtype=dtype) for _ in range(4))
    four = [loc, logvar, mean, spread]
    same(lambda d: kl_divergence(normal(d, loc, logvar), normal(d, mean, spread)), four, dtype)
    same(lambda d: kl_divergence(normal(d, loc, logvar), normal(distributions, mean, spread)), four, dtype)
    same(lambda d: kl_divergence(normal(distributions, loc, logvar), normal(d, mean, spread)), four, dtype)
    same(lambda d: kl_divergence(normal(d, loc, logvar), d.Normal(0.0, 1.0)), [loc, logvar], dtype)
    same(lambda d: kl_divergence(normal(d, loc, logvar), d.Normal(0.5, 2.0)), [loc, logvar], dtype)
    same(lambda d: kl_divergence(d.Bernoulli(logits=loc), d.Bernoulli(logits=mean)), [loc, mean], dtype)
    for events in range(len(shape) + 1):

        def kl(d: Any, q: Any, p: Any, n: int = events) -> Tensor:
            return kl_divergence(d.Independent(q, n), d.Independent(p, n))

        same(lambda d: kl(d, normal(d, loc, logvar), normal(d, mean, spread)), four, dtype)
        same(lambda d: kl(d, normal(d, loc, logvar), d.Normal(0.0, 1.0).expand(shape)), [loc, logvar], dtype)
        same(
            lambda d: kl(d, distributions.Laplace(loc, logvar.exp()), distributions.Laplace(mean, spread.exp())),
            four,
            dtype,
        )


def test_shapes_that_broadcast() -> None:
    loc, logvar, row, dtype = randn(3, 5), randn(3, 5), randn(5), torch.float64
    one = randn(3, 1)
    same(lambda d: normal(d, one, row).log_prob(loc), [one, row, loc], dtype)
    same(lambda d: normal(d, row, logvar).log_prob(one), [row, logvar, one], dtype)
    same(lambda d: d.Independent(normal(d, row, row), 1).log_prob(one), [row, one], dtype)
    same(lambda d: d.Independent(normal(d, loc, logvar), 1).log_prob(row), [loc, logvar, row], dtype)
    x = binary(3, 1)
    same(lambda d: d.Independent(d.Bernoulli(logits=row), 1).log_prob(x), [row], dtype)
    for q, p in (((loc, logvar), (row, row)), ((row, row), (loc, logvar)), ((one, one), (row, row))):
        leaves = list({id(t): t for t in (*q, *p)}.values())
        same(lambda d, q=q, p=p: kl_divergence(normal(d, *q), normal(d, *p)), leaves, dtype)
        same(lambda d, q=q: kl_divergence(normal(d, *q), d.Normal(0.0, 1.0).expand([2, 3, 5])), list(set(q)), dtype)
    same(
        lambda d: kl_divergence(d.Independent(normal(d, loc, logvar), 1), d.Independent(normal(d, row, row), 1)),
        [loc, logvar, row],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype: torch.dtype) -> None:
    loc, logvar = randn(3, 5, dtype=dtype), randn(3, 5, dtype=dtype)
    std = (0.5 * logvar).exp().detach()
    by_logvar, by_std = ours.Normal(loc, logvar=logvar), ours.Normal(loc, std)
    by_std.log_prob(loc)  # what it keeps changes no sample
    for shape, count in (((), None), ((4,), 4), ((2, 3), 6)):
        torch.manual_seed(1)
        want = reparameterize(loc, logvar, samples=count).reshape(*shape, 3, 5)
        for draw in (by_logvar.rsample, by_logvar.sample, ours.Independent(by_logvar, 1).rsample):
            torch.manual_seed(1)
            assert torch.equal(draw(torch.Size(shape)), want)
        torch.manual_seed(1)
        torch.testing.assert_close(by_std.rsample(torch.Size(shape)), want)
        assert by_std.rsample(torch.Size(shape)).requires_grad
        assert not by_std.sample(torch.Size(shape)).requires_grad
    assert ours.Normal(0.0, 1.0).rsample((7,)).shape == (7,)
    assert ours.Normal(loc, std).rsample((0, 2)).shape == (0, 2, 3, 5)
    assert ours.Normal(loc[:0], std[:0]).rsample((2,)).shape == (2, 0, 5)
    z = ours.Normal(0.0, 1.0).expand([100, 1000]).rsample()
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.01


def test_gradients_of_gradients() -> None:
    loc, logvar, z, x = randn(2, 3), randn(2, 3), randn(2, 3), binary(2, 3)

    def terms(loc: Tensor, logvar: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        q = ours.Normal(loc, logvar=logvar)
        event, p = ours.Independent(q, 1), ours.Independent(ours.Normal(0.0, 1.0).expand([3]), 1)
        torch.manual_seed(0)
        likelihood = ours.Independent(ours.Bernoulli(logits=loc), 1)
        return q.log_prob(z), event.log_prob(z), q.rsample(), kl_divergence(event, p), likelihood.log_prob(x)

    torch.autograd.gradcheck(terms, (loc, logvar, z))
    torch.autograd.gradgradcheck(terms, (loc, logvar, z))


def test_moments_and_entropy() -> None:
    loc, logvar, dtype = randn(3, 5), randn(3, 5), torch.float64
    for name in ("mean", "mode", "stddev", "variance", "scale"):
        same(lambda d, name=name: getattr(normal(d, loc, logvar), name) + 0 * logvar + 0 * loc, [loc, logvar], dtype)
    same(lambda d: normal(d, loc, logvar).entropy(), [logvar], dtype)
    same(lambda d: d.Normal(loc, logvar.exp()).entropy(), [logvar], dtype)
    same(lambda d: d.Bernoulli(logits=loc).entropy(), [loc], dtype)
    assert torch.equal(*(d.Bernoulli(logits=loc).enumerate_support() for d in (ours, distributions)))


def test_expand_keeps_the_class_and_what_was_given() -> None:
    loc, logvar, dtype = randn(5), randn(5), torch.float64
    wide = ours.Normal(loc, logvar=logvar).expand([3, 5])
    assert type(wide) is ours.Normal
    assert "scale" not in vars(wide)
    same(lambda d: normal(d, loc, logvar).expand([3, 5]).log_prob(torch.ones(3, 5, dtype=dtype)), [loc, logvar], dtype)
    same(lambda d: d.Independent(normal(d, loc, logvar), 1).expand([3]).log_prob(loc.detach()), [loc, logvar], dtype)
    assert type(ours.Independent(wide, 1).expand([2, 3]).base_dist) is ours.Normal
    coin = ours.Bernoulli(logits=loc, validate_args=False).expand([3, 5])
    assert type(coin) is ours.Bernoulli
    assert not coin._validate_args
    same(lambda d: d.Bernoulli(logits=loc).expand([3, 5]).log_prob(binary(3, 5).new_ones(3, 5)), [loc], dtype)
    assert type(ours.Bernoulli(torch.rand(5)).expand([3, 5])) is ours.Bernoulli


BAD_PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "loc": lambda d: d.Normal(torch.tensor([0.0, math.nan]), torch.ones(2)),
    "scale": lambda d: d.Normal(torch.zeros(2), torch.tensor([1.0, 0.0])),
    "NaN scale": lambda d: d.Normal(torch.zeros(2), torch.tensor([1.0, math.nan])),
    "logits": lambda d: d.Bernoulli(logits=torch.tensor([0.0, math.nan])),
    "probs": lambda d: d.Bernoulli(torch.tensor([0.0, 1.5])),
    "shapes": lambda d: d.Normal(torch.zeros(2), torch.ones(3)),
    "type": lambda d: d.Normal([0.0], 1.0),
    "axes": lambda d: d.Independent(d.Normal(torch.zeros(2), torch.ones(2)), 2),
    "no tensor": lambda d: d.Normal(torch.zeros(2), torch.ones(2)).log_prob([0.0, 1.0]),
    "value": lambda d: d.Normal(torch.zeros(2), torch.ones(2)).log_prob(torch.tensor([0.0, math.nan])),
    "shape of value": lambda d: d.Normal(torch.zeros(2), torch.ones(2)).log_prob(torch.zeros(3)),
    **{
        f"binary {bad}": lambda d, bad=bad: d.Bernoulli(logits=torch.zeros(2)).log_prob(torch.tensor([0.0, bad]))
        for bad in (0.5, 2.0, -1.0, math.inf, math.nan, 1e-30)
    },
    "bytes": lambda d: d.Bernoulli(logits=torch.zeros(2)).log_prob(torch.ones(2, dtype=torch.uint8)),
    "event": lambda d: d.Independent(d.Bernoulli(logits=torch.zeros(2)), 1).log_prob(torch.tensor([0.0, 0.5])),
    "event of reals": lambda d: d.Independent(d.Normal(torch.zeros(2), 1.0), 1).log_prob(torch.tensor([0.0, math.nan])),
    "axes of a KL": lambda d: kl_divergence(
        d.Independent(d.Normal(torch.zeros(2), 1.0), 1), d.Independent(d.Normal(torch.zeros(2), 1.0), 0)
    ),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_errors_are_those_of_torch(name: str) -> None:
    raised = []
    for module in (ours, distributions):
        with pytest.raises(Exception) as caught:  # noqa: PT011  (its type and text are what is compared)
            BAD_PARAMETERS[name](module)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def test_errors_of_our_own() -> None:
    for given, came in (({}, "neither"), ({"scale": 1.0, "logvar": 0.0}, "both")):
        with pytest.raises(ValueError, match=f"exactly one of scale and logvar must be given, got {came}"):
            ours.Normal(torch.zeros(2), **given)
    with pytest.raises(ValueError, match=r"Expected parameter logvar .* Real"):
        ours.Normal(torch.zeros(2), logvar=torch.tensor([0.0, math.nan]))


def test_infinite_and_wrong_values_of_those_who_do_not_validate() -> None:
    wrong = torch.tensor([[0.5, 2.0, -1.0, math.inf, math.nan]])
    extreme = torch.tensor([[math.inf, -math.inf]])
    found, want = (
        [
            d.Bernoulli(logits=torch.ones(1, 5), validate_args=False).log_prob(wrong),
            d.Independent(d.Bernoulli(logits=torch.ones(1, 5), validate_args=False), 1).log_prob(wrong),
            d.Normal(torch.zeros(1, 2), torch.ones(1, 2)).log_prob(extreme),
            d.Normal(extreme, torch.ones(1, 2)).loc,
        ]
        for d in (ours, distributions)
    )
    torch.testing.assert_close(found, want, equal_nan=True)
    assert ours.Bernoulli(logits=extreme)._validate_args


def test_no_kl_is_ambiguous_and_ours_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    loc, logvar = randn(3, 5), randn(3, 5)
    mine, plain = normal(ours, loc, logvar), normal(distributions, loc, logvar)

    class Mine(ours.Normal):
        pass

    derived = Mine(loc, logvar=logvar)
    calls = []
    own = ours.gaussian_kl
    monkeypatch.setattr(ours, "gaussian_kl", lambda *args, **options: calls.append(1) or own(*args, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for q in (mine, plain, derived):
            for p in (mine, plain, derived):
                before = len(calls)
                kl_divergence(q, p)
                assert (len(calls) > before) == (q is not plain)
                for module in (ours, distributions):
                    kl_divergence(ours.Independent(q, 1), module.Independent(p, 1))
                    kl_divergence(module.Independent(q, 1), ours.Independent(p, 1))


def test_a_subclass_with_a_density_of_its_own() -> None:
    class Changed(ours.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) + 1

    loc = torch.zeros(3, 5)
    plain, changed = (ours.Independent(each(loc, loc + 1), 1).log_prob(loc) for each in (ours.Normal, Changed))
    torch.testing.assert_close(changed, plain + 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Elementwise in it, but in float32 under autocast, and summed in float32."""
    loc, logvar = torch.randn(3, 784).to(dtype), torch.randn(3, 784).to(dtype)
    x = binary(3, 784, dtype=dtype)
    for cast in (False, True):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=cast):
            for values in ("log_prob", "kl", "coin"):
                found, want = [], []
                for module, out in ((ours, found), (distributions, want)):
                    if values == "coin":
                        base, value = module.Bernoulli(logits=loc), x
                    else:
                        base, value = normal(module, loc, logvar), loc + 1
                    event = module.Independent(base, 1)
                    if values == "kl":
                        p = normal(module, logvar, logvar)
                        out += [kl_divergence(base, p), kl_divergence(event, module.Independent(p, 1))]
                    else:
                        out += [base.log_prob(value), event.log_prob(value)]
                assert found[1].dtype == torch.float32
                assert found[0].dtype == (torch.float32 if cast else dtype)
                for got, expected in zip(found, want, strict=True):
                    torch.testing.assert_close(got.float(), expected.float(), rtol=3e-2, atol=3e-2)


def losses(loc: Tensor, logvar: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    q = ours.Independent(ours.Normal(loc, logvar=logvar, validate_args=False), 1, validate_args=False)
    p = ours.Independent(ours.Normal(0.0, 1.0, validate_args=False).expand([loc.shape[-1]]), 1, validate_args=False)
    coin = ours.Independent(ours.Bernoulli(logits=loc, validate_args=False), 1, validate_args=False)
    return kl_divergence(q, p), q.log_prob(x), coin.log_prob(x), q.base_dist.log_prob(x), q.rsample()


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    loc, logvar, x = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True), binary(3, 5).float()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    found, want = compiled(loc, logvar, x), losses(loc, logvar, x)
    torch.testing.assert_close(found[:4], want[:4])
    assert found[4].shape == (3, 5)
    gradients = [torch.autograd.grad(sum(t.sum() for t in terms[:4]), [loc, logvar]) for terms in (found, want)]
    torch.testing.assert_close(*gradients)


def test_vmapped_and_under_forward_mode() -> None:
    loc, logvar, x = torch.randn(4, 3, 5), torch.randn(4, 3, 5), binary(4, 3, 5).float()
    found = torch.vmap(losses, randomness="different")(loc, logvar, x)
    want = [torch.stack(each) for each in zip(*map(losses, loc, logvar, x), strict=True)]
    torch.testing.assert_close(list(found[:4]), want[:4])
    assert found[4].shape == (4, 3, 5)

    def log_prob(loc: Tensor) -> Tensor:
        return ours.Independent(ours.Normal(loc, logvar=logvar), 1).log_prob(x)

    _, forward = torch.func.jvp(log_prob, (loc,), (torch.ones_like(loc),))
    torch.testing.assert_close(forward, torch.func.vjp(log_prob, loc)[1](torch.ones(4, 3))[0].sum(-1))
