"""Training steps on counts of genes: ``python -m fastvae.benchmarks.scvi_step``, 3 minutes.

The module of ``scvi.model.SCVI`` with its defaults, its own and patched, if scvi-tools is installed; and a plain model
of its kind (:class:`Model`), with losses as eager PyTorch has them, with all of it compiled, and with the fused ones.
One minibatch, and the Adam of scvi-tools' training plan: forward, loss, backward, step. Modules of the same weights
take turns. Counts are synthetic, 9 of 10 are 0. Losses are compared before they are timed. The exit code is 1 where a
bar is missed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..integrations.scvi import patch
from . import eager
from .hardware import Others, cpu_name, installed
from .table import aligned, duration, times
from .timing import interleaved, median

CELLS = 128
WORKS = (("zinb", 10_000), ("nb", 10_000), ("zinb", 2_000), ("nb", 2_000))
BARS = {("zinb", 10_000): 2.2}
COMPILED_BARS = {("zinb", 10_000): 1.4}
CLOSE = 1e-4  # relative, of the losses of two modules with the same noise


def counts(cells: int, genes: int) -> Tensor:
    """Counts of cells of different depth and genes of different means: about 9 of 10 are 0."""
    torch.manual_seed(0)
    gene = torch.distributions.Gamma(0.3, 1.2).sample((genes,))
    depth = torch.distributions.Gamma(2.0, 2.0).sample((cells, 1))
    return torch.poisson(torch.distributions.Gamma(1.0, 1.0).sample((cells, genes)) * gene * depth)


class Model(nn.Module):
    """What scVI is at heart: two perceptrons, shares of the genes by softmax, a dispersion per gene; its loss."""

    def __init__(self, genes: int, likelihood: str, fused: bool):
        super().__init__()
        self.inflated, self.fused = likelihood == "zinb", fused
        layer = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b, 0.001, 0.01), nn.ReLU())  # noqa: E731
        self.encoder, self.decoder = layer(genes, 128), layer(10, 128)
        self.mu, self.logvar = nn.Linear(128, 10), nn.Linear(128, 10)
        self.scores, self.zero_logits = nn.Linear(128, genes), nn.Linear(128, genes)
        self.log_theta = nn.Parameter(torch.zeros(genes))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x.log1p())
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        if not self.fused:
            decoded = self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))
            mean = x.sum(1, keepdim=True) * self.scores(decoded).softmax(1)
            theta = self.log_theta.exp()
            if self.inflated:
                nll = eager.zero_inflated_negative_binomial_nll(mean, theta, self.zero_logits(decoded), x)
            else:
                nll = eager.negative_binomial_nll(mean, theta, x)
            return nll + eager.gaussian_kl(mu, logvar)
        z, kl = functional.sample_with_kl(mu, logvar)
        decoded, library, theta = self.decoder(z), x.sum(1), self.log_theta.exp()
        scores = self.scores(decoded)
        if self.inflated:
            return kl + functional.zero_inflated_negative_binomial_nll_from_scores(
                scores, library, x, dispersion=theta, zero_logits=self.zero_logits(decoded)
            )
        return kl + functional.negative_binomial_nll_from_scores(scores, library, x, dispersion=theta)


def measure_model(likelihood: str, genes: int, budget: float) -> dict[str, float]:
    """Median seconds of a step of :class:`Model`: ``"eager"``, ``"compile"``, ``"fastvae"``."""
    x = counts(CELLS, genes)
    models = {name: Model(genes, likelihood, name == "fastvae") for name in ("eager", "compile", "fastvae")}
    start = {name: value.clone() for name, value in models["eager"].state_dict().items()}
    losses, calls = {}, {}
    for name, model in models.items():
        model.load_state_dict(start)
        run = torch.compile(model, fullgraph=True) if name == "compile" else model
        with torch.no_grad():  # no noise: the models draw theirs by different functions
            model.logvar.bias.fill_(-60.0)
            losses[name] = run(x)
            model.logvar.bias.fill_(0.0)
        calls[name] = training(model, functools.partial(run, x))
        calls[name]()
    for name in ("compile", "fastvae"):
        torch.testing.assert_close(losses[name], losses["eager"], rtol=CLOSE, atol=0.0)
    return medians(calls, budget)


def medians(calls: dict[str, Callable[[], Tensor]], budget: float) -> dict[str, float]:
    """Median seconds of each call; they take turns for about ``budget`` seconds."""
    return {name: median(seconds) for name, seconds in interleaved(calls, "cpu", budget=budget).items()}


def step(module: Any, x: Tensor) -> Callable[[], Tensor]:
    """A call that trains a module of scvi-tools on one minibatch and gives the loss."""
    nothing = torch.zeros(len(x), 1, dtype=torch.int64)
    tensors = {"X": x, "batch": nothing, "labels": nothing}
    return training(module, lambda: module(tensors, loss_kwargs={"kl_weight": 1.0})[2].loss)


def training(module: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call that takes one step and gives the loss."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)  # of scvi-tools' plan

    def call() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def measure(likelihood: str, genes: int, budget: float) -> dict[str, float]:
    """Median seconds of a step of scvi-tools' module: ``"own"``, ``"patched"``."""
    from scvi.module import VAE

    x = counts(CELLS, genes)
    own, patched = (VAE(genes, n_batch=1, gene_likelihood=likelihood) for _ in range(2))
    patched.load_state_dict(own.state_dict())
    patch(patched)
    calls = {"own": step(own, x), "patched": step(patched, x)}
    losses = []
    for call in calls.values():
        torch.manual_seed(0)
        losses.append(call())
    torch.testing.assert_close(losses[1], losses[0], rtol=CLOSE, atol=0.0)
    return medians(calls, budget)


def main() -> int:
    """Print the table; an argument is the seconds a work (25)."""
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 25.0
    others, missed = Others(), False
    table: list[tuple[str, ...]] = [("training step", "against", "theirs", "ours", "ratio", "bar")]

    def row(of: str, against: str, theirs: float, ours: float, bar: float | None) -> None:
        nonlocal missed
        missed |= bar is not None and theirs / ours < bar
        verdict = "–" if bar is None else f"≥ {times(bar)}: {'pass' if theirs / ours >= bar else 'MISS'}"
        table.append((of, against, duration(theirs), duration(ours), f"{theirs / ours:.2f}×", verdict))

    for likelihood, genes in WORKS:
        sizes = f"{likelihood}, {CELLS}×{genes:,}"
        if installed("scvi-tools"):
            found = measure(likelihood, genes, budget)
            row(f"SCVI, {sizes}", "scvi-tools", found["own"], found["patched"], BARS.get((likelihood, genes)))
        found = measure_model(likelihood, genes, budget)
        for against, bar in (("eager", None), ("compile", COMPILED_BARS.get((likelihood, genes)))):
            row(f"plain model, {sizes}", against, found[against], found["fastvae"], bar)
    print(*aligned(table), sep="\n")
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, others kept {others.cores() or 0:.1f} cores busy; "
        f"torch {torch.__version__}, scvi-tools {installed('scvi-tools') or 'not installed: no step of its own'}"
    )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
