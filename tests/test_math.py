"""exp, log, sin and cos of the CPU backends against float64, over all exponents: the errors they state."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import fastvae

from table import INSTRUCTION_SETS, instruction_set

Numbers = NDArray[np.float32]
Function = Callable[[Numbers], Numbers]


@functools.cache
def magnitudes() -> Numbers:
    """Of every exponent, subnormal ones too: the first and last mantissas, and a thousand between."""
    rng = np.random.default_rng(0)
    mantissas = [np.arange(8), (1 << 23) - 1 - np.arange(8), rng.integers(0, 1 << 23, 1000)]
    exponents = np.arange(255, dtype=np.uint32)[:, None] << 23
    return (exponents | np.concatenate(mantissas).astype(np.uint32)).view(np.float32).ravel()


def numbers(low: float, high: float) -> Numbers:
    """All of those in [low, high], and evenly spaced ones."""
    signed = np.concatenate(
        [magnitudes(), -magnitudes(), np.linspace(float(low), float(high), 100_000).astype(np.float32)]
    )
    return signed[(signed >= low) & (signed <= high)]


def ulps(got: Numbers, want: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors in units of the last place of the right result."""
    return np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)


def compiled(name: str) -> Function:
    """A function of the extension, by the loops in use."""
    from fastvae import _C

    def run(x: Numbers) -> Numbers:
        results = np.empty_like(x)
        _C.evaluate(name, x.ctypes.data, results.ctypes.data, len(x))
        return results

    return run


def jitted() -> Callable[[str], Function]:
    if not fastvae.backends()["numba"].available:
        pytest.skip(fastvae.backends()["numba"].reason)
    from numba import njit

    from fastvae.kernels.numba import math as own

    def function(name: str) -> Function:
        scalar = getattr(own, f"{name}32")

        @njit
        def run(x):
            results = np.empty_like(x)
            for k in range(len(x)):
                results[k] = scalar(x[k])
            return results

        return run

    return function


@pytest.fixture(params=[*INSTRUCTION_SETS, "numba"])
def function(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Function]]:
    """A function of a backend, by its name."""
    if request.param == "numba":
        yield jitted()
    else:
        with instruction_set(request.param):
            yield compiled


def test_exp(function: Callable[[str], Function]) -> None:
    x = numbers(-87, 88.7228)
    assert ulps(function("exp")(x), np.exp(x.astype(np.float64))).max() <= 2


def test_exp_beyond_float32(function: Callable[[str], Function]) -> None:
    x = np.array([88.73, 88.9, 89, 90, 200, 1e30, np.inf, -104, -200, -1e30, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(function("exp")(x), [np.inf] * 7 + [0] * 4 + [np.nan])
    x = np.linspace(-104, -87, 10_000).astype(np.float32)
    np.testing.assert_allclose(function("exp")(x), np.exp(x.astype(np.float64)), rtol=3e-7, atol=2.0**-148)


def test_exp_of_bounded(function: Callable[[str], Function]) -> None:
    x = numbers(-87, 88)
    assert ulps(function("exp_of_bounded")(x), np.exp(x.astype(np.float64))).max() <= 2
    assert np.isnan(function("exp_of_bounded")(np.array([np.nan], np.float32))).all()


def test_exp_negative(function: Callable[[str], Function]) -> None:
    x = numbers(-87, 0)
    assert ulps(function("exp_negative")(x), np.exp(x.astype(np.float64))).max() <= 2


def test_log_of_normal_numbers(function: Callable[[str], Function]) -> None:
    x = numbers(np.finfo(np.float32).tiny, np.finfo(np.float32).max)
    assert ulps(function("log_normal")(x), np.log(x.astype(np.float64))).max() <= 1


def test_log(function: Callable[[str], Function]) -> None:
    x = numbers(np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max)
    assert ulps(function("log")(x), np.log(x.astype(np.float64))).max() <= 2
    assert (function("log")(np.array([0, -0.0], np.float32)) < -100).all(), "which is where it is clamped"


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_reciprocal(instructions: str) -> None:
    x = numbers(1, 2)
    with instruction_set(instructions):
        assert ulps(compiled("reciprocal_above_one")(x), 1 / x.astype(np.float64)).max() <= 2


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_radius_and_angle_of_the_noise(instructions: str) -> None:
    u, angles = numbers(2.0**-33, 1), numbers(-math.pi / 2, math.pi / 2)
    with instruction_set(instructions):
        squared, sin, cos = compiled("squared_radius")(u), compiled("sin")(angles), compiled("cos")(angles)
    np.testing.assert_allclose(squared, -2 * np.log(u.astype(np.float64)), rtol=2.0**-22)
    np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), rtol=0, atol=2e-7)
    np.testing.assert_allclose(cos, np.cos(angles.astype(np.float64)), rtol=0, atol=2e-7)


def test_cos_and_sin_of_a_turn() -> None:
    jitted()
    from numba import njit

    from fastvae.kernels.numba.math import cos_sin_turn32

    @njit
    def run(words, cos, sin):
        for k in range(len(words)):
            cos[k], sin[k] = cos_sin_turn32(words[k])

    words = np.concatenate([np.arange(0, 1 << 32, 9973, dtype=np.uint32), magnitudes().view(np.uint32)])
    cos, sin = np.empty((2, len(words)), np.float32)
    run(words, cos, sin)
    angles = (words + 0.5) * (2 * math.pi / 2**32)
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=2e-7)
