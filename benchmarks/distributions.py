"""A small VAE's loss by ``torch.distributions`` and ours: ``python -m fastvae.benchmarks.distributions``, 20 seconds.

128 examples of 784 bits, 20 latents, float32: draw z, the KL to N(0, I), the Bernoulli's log-probability, backward; no
networks. Contenders take turns.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from .. import distributions, functional
from .hardware import Others, cpu_name
from .table import aligned, duration, times
from .timing import interleaved, median

BATCH, LATENT, DATA = 128, 20, 784
PLAIN = "fastvae's functions"


def by_distributions(module: Any, validate: bool, x: Tensor, mu: Tensor, logvar: Tensor, logits: Tensor) -> Tensor:
    """The loss as it is written with ``torch.distributions``; ``module`` is theirs or ours."""
    options = {"validate_args": validate}
    if module is distributions:
        q = module.Normal(mu, logvar=logvar, **options)
    else:
        q = module.Normal(mu, torch.exp(0.5 * logvar), **options)
    p = module.Independent(module.Normal(0.0, 1.0, **options).expand([LATENT]), 1, **options)
    q, bits = (module.Independent(base, 1, **options) for base in (q, module.Bernoulli(logits=logits, **options)))
    return (kl_divergence(q, p) - bits.log_prob(x)).mean() + 0.001 * q.rsample().sum()


def by_functions(x: Tensor, mu: Tensor, logvar: Tensor, logits: Tensor) -> Tensor:
    """The same of three functions."""
    kl = functional.gaussian_kl(mu, logvar, reduction="example")
    nll = functional.bce_with_logits(logits, x, reduction="example")
    return (kl + nll).mean() + 0.001 * functional.reparameterize(mu, logvar).sum()


def measure(budget: float) -> dict[str, float]:
    """Median seconds of forward and backward by contender."""
    x = torch.rand(BATCH, DATA).round()
    leaves = [torch.randn(BATCH, size, requires_grad=True) for size in (LATENT, LATENT, DATA)]
    losses: dict[str, Any] = {PLAIN: by_functions}
    for name, module in (("torch.distributions", torch.distributions), ("fastvae.distributions", distributions)):
        for validate, how in ((True, ""), (False, ", validate_args=False")):
            losses[name + how] = functools.partial(by_distributions, module, validate)

    def call(loss: Any) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value: Tensor = loss(x, *leaves)
        value.backward()
        return value

    calls = {name: functools.partial(call, loss) for name, loss in losses.items()}
    return {name: median(seconds) for name, seconds in interleaved(calls, "cpu", budget=budget).items()}


def main() -> int:
    """Print the table; an argument is the seconds (20)."""
    others = Others()
    found = measure(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
    table: list[tuple[str, ...]] = [("forward + backward", "time", "against the functions")]
    table += [(name, duration(seconds), times(seconds / found[PLAIN])) for name, seconds in found.items()]
    print(*aligned(table), sep="\n")
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, others kept {others.cores() or 0:.1f} cores busy; "
        f"torch {torch.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
