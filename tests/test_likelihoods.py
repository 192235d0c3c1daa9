"""The table of likelihoods: nothing lists them again, and one that a backend lacks is an error that names both."""

from __future__ import annotations

import re

import pytest
import torch

import fastvae
from fastvae.kernels import likelihoods
from fastvae.kernels.likelihoods import LIKELIHOODS, WITH_TENSOR, bound


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_forgotten_likelihood_is_named(name: str) -> None:
    others = [other for other in LIKELIHOODS if other != name]
    with pytest.raises(ImportError, match=f"likelihood '{name}' has no function in backend 'fpga'"):
        bound("fpga", others, WITH_TENSOR)


@pytest.mark.parametrize("name", WITH_TENSOR)
def test_a_forgotten_derivative_is_named(name: str) -> None:
    others = [other for other in WITH_TENSOR if other != name]
    with pytest.raises(ImportError, match=f"likelihood '{name}' has no derivative in its number in backend 'fpga'"):
        bound("fpga", LIKELIHOODS, others)


def test_a_likelihood_that_is_not_in_the_table_is_named() -> None:
    with pytest.raises(ImportError, match="backend 'fpga' has a function for likelihood 'cauchy'"):
        bound("fpga", [*LIKELIHOODS, "cauchy"], WITH_TENSOR)


def test_codes_are_those_of_the_backend_whatever_the_order_of_the_table() -> None:
    """A row inserted in the middle of the table must not misnumber the functions of another list."""
    names = list(reversed(LIKELIHOODS))
    assert bound("fpga", names, WITH_TENSOR) == {name: code for code, name in enumerate(names)}


@pytest.mark.parametrize("backend", ["numba", "triton", "cpp"])
def test_every_backend_checks_what_it_has(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new row of the table without functions stops every backend at its import."""
    import importlib

    if backend == "triton":
        pytest.importorskip("triton")
        module = "fastvae.kernels.triton.likelihoods"
    else:
        if not fastvae.backends()[backend].available:
            pytest.skip(fastvae.backends()[backend].reason)
        module = "fastvae.kernels.numba.likelihoods" if backend == "numba" else "fastvae.kernels.compiled.primitives"
    loaded = importlib.import_module(module)
    monkeypatch.setitem(LIKELIHOODS, "cauchy", LIKELIHOODS["l1"])
    source = importlib.util.spec_from_file_location(module, loaded.__file__)
    assert source is not None
    with pytest.raises(ImportError, match=f"likelihood 'cauchy' has no function in backend '{backend}'"):
        source.loader.exec_module(importlib.util.module_from_spec(source))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", likelihoods.NAMES)
def test_the_documentation_names_every_likelihood_of_elbo_loss(name: str) -> None:
    assert re.search(rf'"{name}"', fastvae.elbo_loss.__doc__ or "")


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_derivatives_are_those_of_the_formula(name: str) -> None:
    row = LIKELIHOODS[name]
    y = (torch.rand(50, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    x = torch.rand(50, dtype=torch.float64).requires_grad_()
    number = likelihoods.DEFAULT_NUMBERS[name] or 0.7
    want = torch.autograd.grad(row.nll(y, x, number).sum(), (y, x))
    torch.testing.assert_close(row.derivative(y, x, number), want[0])
    torch.testing.assert_close(row.target_derivative(y, x, number), want[1])


@pytest.mark.parametrize("name", ["bernoulli_logits", "continuous_bernoulli_logits"])
def test_the_mean_is_where_the_expected_derivative_vanishes(name: str) -> None:
    y = torch.linspace(-8, 8, 101, dtype=torch.float64)
    row = LIKELIHOODS[name]
    derivative = row.derivative(y, row.mean(y), 0.0)
    torch.testing.assert_close(derivative, torch.zeros_like(y), rtol=0, atol=1e-9)
