"""Fuzzing: random calls of every op on every backend against float64 formulas (formulas.py), forward and backward.

A case is one call on one backend. Plain ``pytest`` runs a few hundred, the same each time; ``make fuzz`` 200,000, the
emulated CUDA and the interpreted Triton kernels among them: ``FASTVAE_FUZZ`` says how many, ``FASTVAE_FUZZ_ON`` on
which backends. How many ran is said at the end.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from fastvae.kernels.likelihoods import DEFAULT_NUMBERS
from fastvae.kernels.reference.noise import noise

import formulas
from fuzz import BROADCAST, LAYOUTS, PARAMETERS, RECONSTRUCTIONS, TARGETS, Case, Trial
from table import INTERPRETED, REDUCTIONS

CASES = int(os.environ.get("FASTVAE_FUZZ", "0"))
FAST = 150  # examples of a plain run
CHUNK = 1000  # examples hypothesis remembers at once
#: cases run, by backend
RAN: collections.Counter[str] = collections.Counter()

dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))
layouts = st.one_of(st.just("contiguous"), st.sampled_from(tuple(LAYOUTS)))
sizes = st.sampled_from((1, 2, 3, 5, 8, 0))
images = st.tuples(*[st.sampled_from((1, 2, 3, 5))] * 4)
# around the blocks and the spans of threads
edges = ((1, 17), (33, 3), (2, 768), (1, 769), (3, 300))
large = ((1, 4097), (3, 4096), (4099, 2), (5, 1, 1025), (9, 2500))
shapes = st.one_of(
    *[st.lists(sizes, min_size=1, max_size=3).map(tuple)] * 8,
    *[st.tuples(sizes, st.integers(1, 40))] * 8,
    *[images] * 8,
    *[st.sampled_from(edges)] * 4,
    st.sampled_from(edges if INTERPRETED else large),
)
numbers = {
    "eps": st.sampled_from((1e-8, 1e-12, 1e-4, 0.1, 0.4999, 1e-30)),
    "var": st.sampled_from((1.0, 0.7, 1e-6, 100.0, 1e-30, 1e30)),
    "scale": st.sampled_from((1.0, 0.3, 1e-6, 100.0, 1e-30, 1e30)),
    "dispersion": st.sampled_from((1.0, 0.3, 1e-6, 7.9, 8.0, 100.0, 1e7, 1e25)),
    "zero_logits": st.sampled_from((0.0, -1.5, 2.1, 1e-30, -20.0, 20.0, -1e4, 1e4)),
}
clamps = st.sampled_from((None, None, (-30.0, 20.0), (-0.5, 0.7), (-math.inf, 1.0), (-1.0, math.inf), (0.0, 0.0)))
free_bits = st.sampled_from((0.0, 0.0, 0.4, 2.0, 1e-6, 1e4))
common = {
    "layouts": st.tuples(*[layouts] * 4),
    "values": st.tuples(*[st.integers(0, 3)] * 4),
    "specials": st.sampled_from((0, 0, 1, 4)),
    "upstream": st.sampled_from(
        ("one", "number", "element", "example", "zero", "transposed", "strided", "negated", "scaled", "tiny")
    ),
    "backward": st.sampled_from(("once", "once", "again", "batched")),
    "wanted": st.sampled_from((15, 15, 1, 2, 5, 13)),
    "seed": st.integers(0, 2**40),
}


@st.composite
def mixed(draw: st.DrawFn, count: int, target: bool) -> tuple[torch.dtype, ...]:
    """One dtype for all, or others: of the target, often; of the rest, seldom."""
    first = draw(dtypes)
    chosen = [first] * count
    if target:
        chosen[1] = draw(st.sampled_from((first, torch.uint8, torch.float32, first, torch.bfloat16, torch.float64)))
    if count > 2 or not target:
        start = 2 if target else 1
        if draw(st.sampled_from((False, False, True))):
            for k in range(start, count):
                chosen[k] = draw(dtypes)
    return tuple(chosen)


@st.composite
def reconstruction(draw: st.DrawFn) -> Case:
    op = draw(st.sampled_from(tuple(RECONSTRUCTIONS)))
    likelihood, name = RECONSTRUCTIONS[op]
    fields = {key: draw(value) for key, value in common.items()}
    return Case(
        op,
        likelihood,
        draw(numbers[name]) if name else 0.0,
        draw(shapes),
        dtypes=draw(mixed(2, True)),
        reduction=draw(st.sampled_from(REDUCTIONS)),
        outside=draw(st.sampled_from((False,) * 15 + (True,))),
        **fields,
    )


@st.composite
def latent(draw: st.DrawFn) -> Case:
    op = draw(st.sampled_from(("gaussian_kl", "sample_with_kl", "reparameterize")))
    kl = op != "reparameterize"
    prior = draw(st.sampled_from(("", "", "full", "batch", "features", "lower", "number", "mixed"))) if kl else ""
    fields = {key: draw(value) for key, value in common.items()}
    std = draw(st.booleans())
    return Case(
        op,
        shape=draw(shapes),
        dtypes=draw(mixed(4, False)),
        reduction=draw(st.sampled_from(REDUCTIONS)) if kl else "none",
        std=std,
        clamp=None if std else draw(clamps),
        prior=prior,
        free_bits=draw(free_bits) if kl else 0.0,
        samples=None if op == "gaussian_kl" else draw(st.sampled_from((None, 1, 2, 5))),
        used=draw(st.sampled_from((3, 1, 2))),
        **fields,
    )


@st.composite
def elbo(draw: st.DrawFn) -> Case:
    plain = draw(st.sampled_from((True, True, True, False)))
    likelihoods = tuple(name for name in (*formulas.NLL, *formulas.COUNTS) if name != "bernoulli_probs_log_clamped")
    likelihood = draw(st.sampled_from(likelihoods)) if plain else "bernoulli_probs_log_clamped"
    fields = {key: draw(value) for key, value in common.items()}
    std = plain and draw(st.booleans())
    return Case(
        "elbo_loss" if plain else "vae_loss",
        likelihood,
        DEFAULT_NUMBERS[likelihood] or draw(numbers["dispersion"]),
        draw(shapes),
        draw(st.sampled_from(((2,), (20,), (0,), (), (3, 5)))),
        dtypes=draw(mixed(4, True)),
        reduction=draw(st.sampled_from(("batchmean", "sum", "example"))) if plain else "sum",
        std=std,
        clamp=draw(clamps) if plain and not std else None,
        free_bits=draw(free_bits) if plain else 0.0,
        beta=draw(st.sampled_from((1.0, 0.0, 0.25, 4.0))) if plain else 1.0,
        beta_tensor=draw(st.booleans()) if plain else False,
        used=draw(st.sampled_from((1, 7, 2, 4, 6))),
        outside=draw(st.sampled_from((False,) * 15 + (True,))),
        **fields,
    )


@st.composite
def parameter(draw: st.DrawFn) -> Case:
    """A reconstruction term or an ELBO whose likelihood has a tensor for its parameter: the last of the tensors."""
    case, name = draw(st.one_of(reconstruction(), elbo())), draw(st.sampled_from(tuple(PARAMETERS)))
    function, likelihood, _ = PARAMETERS[name]
    last = len(case.dtypes)
    return dataclasses.replace(
        case,
        op=function if case.op in RECONSTRUCTIONS else "elbo_loss",
        likelihood=likelihood,
        parameter=name,
        broadcast=draw(st.sampled_from(tuple(BROADCAST))),
        dtypes=(*case.dtypes, draw(st.one_of(st.just(case.dtypes[0]), dtypes))),
        layouts=(*case.layouts[:last], draw(layouts)),
        values=(*case.values[:last], draw(st.integers(0, 3))),
        wanted=draw(st.sampled_from((63, 63, 1, 2, 1 << last, 1 | 1 << last))),
    )


@st.composite
def zero_inflated(draw: st.DrawFn) -> Case:
    """A zero-inflated negative binomial, alone or in an ELBO; its dispersion and zero_logits are numbers or tensors."""
    case, learned = draw(st.one_of(reconstruction(), elbo())), draw(st.sampled_from((True, True, False)))
    inflated = draw(st.sampled_from(("number", *BROADCAST)))
    last, more = len(case.dtypes), learned + (inflated in BROADCAST)
    own = st.one_of(st.just(case.dtypes[0]), dtypes)
    return dataclasses.replace(
        case,
        op="negative_binomial_nll" if case.op in RECONSTRUCTIONS else "elbo_loss",
        likelihood="negative_binomial",
        number=draw(numbers["dispersion"]),
        parameter="dispersion" if learned else "",
        broadcast=draw(st.sampled_from(tuple(BROADCAST))),
        inflated=inflated,
        zero_logits=draw(numbers["zero_logits"]),
        dtypes=(*case.dtypes, *draw(st.tuples(*[own] * more))),
        layouts=(*case.layouts[:last], *draw(st.tuples(*[layouts] * more))),
        values=(*case.values[:last], *draw(st.tuples(*[st.integers(0, 3)] * more))),
        wanted=draw(st.one_of(st.just(63), st.integers(1, (1 << last + more) - 1))),
    )


FAMILIES = {
    "reconstruction": (reconstruction, 0.3),
    "latent": (latent, 0.3),
    "elbo": (elbo, 0.15),
    "parameter": (parameter, 0.15),
    "zero-inflated": (zero_inflated, 0.1),
}


def plan() -> list[tuple[str, int, int]]:
    """(family, chunk, examples): in all, as many cases as were asked for."""
    chunks = []
    for family, (_, share) in FAMILIES.items():
        examples = -(-int(CASES * share) // len(TARGETS)) if CASES else int(FAST * share)
        chunks += [(family, k, min(CHUNK, examples - first)) for k, first in enumerate(range(0, examples, CHUNK))]
    return chunks


@pytest.mark.parametrize(("family", "chunk", "examples"), plan())
def test_fuzz(family: str, chunk: int, examples: int) -> None:
    @seed(chunk)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(FAMILIES[family][0]())
    def check(case: Case) -> None:
        trial = Trial(case)
        for target in TARGETS:
            RAN[target] += 1
            note(f"on {target}")
            trial.run(target)

    check()


def test_the_formulas_draw_the_noise_of_the_contract() -> None:
    """Element 4734 of this seed has a radius from the word 12,548: what is added to a small word is seen."""
    shape, seed = torch.Size((5000,)), 4_591_344_555
    torch.testing.assert_close(
        noise(torch.tensor(seed), shape).double(), formulas.epsilon(seed, shape), rtol=0, atol=formulas.NOISE_ON_CPU
    )


@pytest.mark.parametrize("prior_logvar", [80.67, 200.0])
def test_the_formulas_allow_what_eager_loses_where_the_square_of_std_overflows(prior_logvar: float) -> None:
    """1/σ, and no more."""
    trial = Trial(Case("gaussian_kl", shape=(2, 9), std=True, prior="full", reduction="none"))
    trial.inputs = [torch.full((2, 9), value) for value in (0.0, 1e20, 0.0, prior_logvar)]
    trial.before = [t.clone() for t in trial.inputs]
    for target in TARGETS:
        trial.run(target)
    upstream = torch.ones(2, 9)
    want, eager = (oracle.gradients([upstream])[1] for oracle in trial.oracle(formulas.NOISE_ON_CPU))
    assert want is not None
    assert eager is not None
    assert 0.99e-20 < (eager.value - want.value).max() < 1.01e-20 + 1e-7 * eager.value.max()
    assert (want.slack < 1.01e-20 + 1e-6 * want.value.abs()).all()
