"""The noise is standard normal and independent: p-values of statistics whose law is known, for fixed seeds.

Each of 64 p-values must be above 1e-4. The seeds are fixed, so a test passes always or never; and each statistic is
shown a noise that is broken a little, which it must reject. One backend draws: test_noise.py says that all agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvae

from table import BACKENDS, INTERPRETED

LEVEL = 1e-4
COUNT = 1 << 20
TAIL_FROM, TAIL_DRAWS = 4.0, 1 << 27  # beyond 5.5 σ, 5.1 of the draws are expected


@functools.cache
def draw(seed: int) -> Tensor:
    zeros = torch.zeros(1, COUNT)
    return fastvae.reparameterize(zeros, zeros, seed=seed)[0]


def two_sided(z: float) -> float:
    """P(|Z| ≥ |z|) for a standard normal Z."""
    return math.erfc(abs(z) / math.sqrt(2))


def moments(x: Tensor) -> list[float]:
    """Of the mean of xᵏ, k to 6: E xᵏ is (k − 1)!! for even k and 0 for odd, its variance E x²ᵏ − (E xᵏ)²."""

    def expected(k: int) -> int:
        return 0 if k % 2 else math.prod(range(1, k, 2))

    values, power = [], torch.ones(len(x), dtype=torch.float64)
    for k in range(1, 7):
        power = power * x
        error = power.mean().item() - expected(k)
        values.append(two_sided(error / math.sqrt((expected(2 * k) - expected(k) ** 2) / len(x))))
    return values


def kolmogorov_smirnov(x: Tensor) -> list[float]:
    """Of the largest distance D of the empirical from the normal distribution: 2·Σ (−1)ʲ⁻¹·exp(−2j²·n·D²)."""
    n = len(x)
    probability = torch.special.ndtr(x.double().sort().values)
    rank = torch.arange(n, dtype=torch.float64)
    distance = max(((rank + 1) / n - probability).max().item(), (probability - rank / n).max().item())
    return [2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * n * distance**2) for j in range(1, 101))]


def correlations(x: Tensor, y: Tensor) -> list[float]:
    """Of the correlation of x and y, and of their squares: of the lengths, which a pair of Box–Muller shares."""
    products = x * y, (x * x - 1) * (y * y - 1) / 2
    return [two_sided(product.mean(dtype=torch.float64).item() * math.sqrt(len(x))) for product in products]


def serial(x: Tensor) -> list[float]:
    """Between neighbours: in a pair, of two pairs, of two counters, of two registers and of two tiles."""
    return [p for lag in (1, 2, 3, 4, 8, 16, 32, 256, 4096) for p in correlations(x, x.roll(lag))]


def poisson(count: int, mean: float) -> float:
    """Two-sided: twice the smaller tail of a Poisson count; a normal one, of which there are many."""
    if mean > 200:
        return two_sided((count - mean) / math.sqrt(mean))
    below = math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count + 1))
    at = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
    return min(1.0, 2 * min(below, 1 - below + at))


def tails(x: Tensor) -> list[float]:
    """Of how many of ``TAIL_DRAWS`` lie beyond t, below −t, and either; ``x`` holds those beyond ``TAIL_FROM``."""
    values = []
    for t in (4.0, 4.5, 5.0, 5.25, 5.5):
        one_side = TAIL_DRAWS * math.erfc(t / math.sqrt(2)) / 2
        above, below = int((x > t).sum()), int((x < -t).sum())
        values += [poisson(above, one_side), poisson(below, one_side), poisson(above + below, 2 * one_side)]
    return values


@pytest.fixture(scope="module")
def far() -> Tensor:
    """The draws beyond ``TAIL_FROM``."""
    if INTERPRETED or not {"cpp", "numba", "triton", "cuda"} & set(BACKENDS):
        pytest.skip("no backend here draws 2²⁷ numbers in seconds")
    mu, std, found = torch.zeros(1, COUNT), torch.ones(1, COUNT), []
    for seed in range(TAIL_DRAWS // COUNT):
        x = fastvae.reparameterize(mu, std=std, seed=seed)
        found.append(x[x.abs() > TAIL_FROM])
    return torch.cat(found)


@pytest.mark.parametrize("statistic", [moments, kolmogorov_smirnov, serial])
def test_it_is_normal_and_serially_independent(statistic: Callable[[Tensor], list[float]]) -> None:
    assert min(statistic(draw(123))) > LEVEL


@pytest.mark.parametrize("other", [124, 123 + (1 << 32), 123 ^ (1 << 63), -123])
def test_seeds_are_independent(other: int) -> None:
    assert min(p for lag in (0, 1, 4) for p in correlations(draw(123), draw(other).roll(lag))) > LEVEL


def test_tails_to_five_and_a_half_sigma(far: Tensor) -> None:
    assert min(tails(far)) > LEVEL


@pytest.mark.parametrize(
    ("statistic", "break_noise"),
    [
        (moments, lambda x: x + 0.005),
        (moments, lambda x: x * 1.004),
        (moments, lambda x: x.clamp(-3.5, 3.5)),
        (kolmogorov_smirnov, lambda x: x + 0.005),
        (kolmogorov_smirnov, lambda x: (x * 100).round() / 100),
        (kolmogorov_smirnov, lambda x: torch.where(x.abs() < 0.02, -x.abs(), x)),
        (serial, lambda x: (x + 0.005 * x.roll(1)) / math.sqrt(1 + 0.005**2)),
        (serial, lambda x: x * torch.where(x.roll(4096).abs() > 1, 1.01, 0.99)),
        (lambda x: correlations(x, draw(124)), lambda x: x + 0.01 * draw(124)),
    ],
)
def test_a_broken_noise_is_rejected(
    statistic: Callable[[Tensor], list[float]], break_noise: Callable[[Tensor], Tensor]
) -> None:
    x = draw(123)
    assert min(statistic(x)) > LEVEL
    assert min(statistic(break_noise(x))) < LEVEL


@pytest.mark.parametrize(
    "break_noise",
    [
        lambda x: x.clamp(-5.2, 5.2),
        lambda x: x[x < 5.2],
        lambda x: x * 1.01,
    ],
)
def test_a_broken_tail_is_rejected(far: Tensor, break_noise: Callable[[Tensor], Tensor]) -> None:
    assert min(tails(break_noise(far))) < LEVEL
