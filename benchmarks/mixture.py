"""Discretised mixtures and their kin, time and memory: ``python -m fastvae.benchmarks.mixture``, on an idle machine.

Forward + backward of each term against what people write, eager and compiled, in turns; and the most bytes each keeps
beside its inputs. Losses are compared before they are timed. The exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional  # noqa: F401  (the operators)
from ..discrete import categorical_kl, categorical_nll, discretized_logistic_mixture_nll, discretized_logistic_nll
from ..importance import log_q_minus_log_p
from .hardware import Others, cpu_name
from .memory import peak_extra_bytes
from .table import aligned, duration, times
from .timing import interleaved, median

CLOSE = 1e-4  # relative, of two losses


def at_least(tensor: Tensor, constant: float) -> Tensor:
    return torch.max(tensor, torch.ones_like(tensor) * constant)


def log_probs_of_levels(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """As VDVAE's ``vae_helpers.py`` translates PixelCNN++'s; x in [−1, 1]."""
    log_scale = at_least(log_scale, -7.0)
    centred, inverse = x - mean, torch.exp(-log_scale)
    plus, minus = inverse * (centred + 1.0 / 255.0), inverse * (centred - 1.0 / 255.0)
    log_cdf_plus, log_one_minus_cdf_min = plus - F.softplus(plus), -F.softplus(minus)
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    middle = inverse * centred
    log_pdf = middle - log_scale - 2.0 * F.softplus(middle)
    inside = torch.where(delta > 1e-5, torch.log(at_least(delta, 1e-12)), log_pdf - math.log(127.5))
    return torch.where(x < -0.999, log_cdf_plus, torch.where(x > 0.999, log_one_minus_cdf_min, inside))


def mixture_in_eager(params: Tensor, target: Tensor) -> Tensor:
    """``discretized_mix_logistic_loss`` of VDVAE, nats per example."""
    size, count = list(target.shape), params.shape[-1] // 10
    logits, rest = params[..., :count], params[..., count:].reshape([*size, 3 * count])
    means, log_scales = rest[..., :count], rest[..., count : 2 * count]
    coefficients = torch.tanh(rest[..., 2 * count :])
    x = (target.to(params.dtype) / 127.5 - 1).reshape([*size, 1]) + torch.zeros([*size, count], device=params.device)
    green = means[..., 1, :] + coefficients[..., 0, :] * x[..., 0, :]
    blue = means[..., 2, :] + coefficients[..., 1, :] * x[..., 0, :] + coefficients[..., 2, :] * x[..., 1, :]
    means = torch.cat([mean.unsqueeze(-2) for mean in (means[..., 0, :], green, blue)], dim=-2)
    log_probs = log_probs_of_levels(x, means, log_scales).sum(-2) + F.log_softmax(logits, dim=-1)
    return -torch.logsumexp(log_probs, -1).sum() / len(params)


def logistic_in_eager(mean: Tensor, log_scale: Tensor, target: Tensor) -> Tensor:
    return -log_probs_of_levels(target.to(mean.dtype) / 127.5 - 1, mean, log_scale).sum() / len(mean)


def categorical_nll_in_eager(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum") / len(logits)


def categorical_kl_in_eager(logits_q: Tensor, logits_p: Tensor) -> Tensor:
    q, p = (torch.distributions.Categorical(logits=t, validate_args=False) for t in (logits_q, logits_p))
    return torch.distributions.kl_divergence(q, p).sum() / len(logits_q)


def log_ratio_in_eager(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp(), validate_args=False)
    p = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    return (q.log_prob(z) - p.log_prob(z)).sum(-1).mean()


class Work(NamedTuple):
    """``eager`` and ``ours`` of ``tensors``, the first ``differentiable`` of which get a gradient; bars are ratios."""

    name: str
    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    tensors: list[Tensor]
    differentiable: int
    eager_bar: float = 0.0
    compile_bar: float = 0.0
    memory_bar: float = 0.0


def works() -> list[Work]:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (32, 32, 32, 3), dtype=torch.uint8)
    params = torch.randn(32, 32, 32, 100)
    return [
        Work(
            "mixture [32, 32, 32, 100]", mixture_in_eager, discretized_logistic_mixture_nll, [params, pixels], 1,
            20.0, 6.0, 8.0,
        ),
        Work(
            "mixture [32, 100, 32, 32]",
            lambda p, x: mixture_in_eager(p.movedim(1, -1), x.movedim(1, -1)),
            discretized_logistic_mixture_nll,
            [params.movedim(-1, 1).contiguous(), pixels.movedim(-1, 1).contiguous()], 1,
        ),
        Work(
            "logistic [128, 3, 32, 32]", logistic_in_eager,
            lambda mean, scale, x: discretized_logistic_nll(mean, x, log_scale=scale),
            [*torch.randn(2, 128, 3, 32, 32), torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)], 2,
        ),
        Work(
            "categorical_nll [32, 64, 1000]", categorical_nll_in_eager, categorical_nll,
            [torch.randn(32, 64, 1000), torch.randint(0, 1000, (32, 64))], 1,
        ),
        Work(
            "categorical_kl [1024, 32, 32]", categorical_kl_in_eager, categorical_kl,
            list(torch.randn(2, 1024, 32, 32)), 2,
        ),
        Work(
            "log_q_minus_log_p [16, 1024, 64]", log_ratio_in_eager,
            lambda z, mu, logvar: log_q_minus_log_p(z, mu, logvar, samples=16).mean(),
            [torch.randn(16, 1024, 64), *torch.randn(2, 1024, 64)], 3,
        ),
    ]  # fmt: skip


def step(loss: Callable[..., Tensor], work: Work) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    leaves = [t.requires_grad_(k < work.differentiable) for k, t in enumerate(work.tensors)]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves[: work.differentiable])


def measure(work: Work, budget: float) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds and peak bytes of ``"eager"``, ``"compile"``, ``"fastvae"``."""
    torch._dynamo.reset()
    calls = {
        "eager": partial(step, work.eager, work),
        "compile": partial(step, torch.compile(work.eager), work),
        "fastvae": partial(step, work.ours, work),
    }
    want = calls["eager"]()[0]
    for call in calls.values():
        torch.testing.assert_close(call()[0], want, rtol=CLOSE, atol=0.0)
    seconds = {name: median(s) for name, s in interleaved(calls, "cpu", budget=budget).items()}
    return seconds, {name: peak_extra_bytes(call, "cpu") for name, call in calls.items()}


def main() -> int:
    """Print the tables; an argument is the seconds a work (20), a second one the part of a name to measure only."""
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    others, missed = Others(), False
    table: list[tuple[str, ...]] = [("forward + backward", "against", "theirs", "fastvae", "ratio", "bar")]

    def row(of: str, against: str, theirs: Any, ours: Any, ratio: float, bar: float) -> None:
        nonlocal missed
        missed |= ratio < bar
        verdict = f"≥ {times(bar)}: {'pass' if ratio >= bar else 'MISS'}" if bar else "–"
        table.append((of, against, theirs, ours, f"{ratio:.1f}×", verdict))

    for work in works():
        if only not in work.name:
            continue
        seconds, peaks = measure(work, budget)
        for against, bar in (("eager", work.eager_bar), ("compile", work.compile_bar)):
            ratio = seconds[against] / seconds["fastvae"]
            row(work.name, against, duration(seconds[against]), duration(seconds["fastvae"]), ratio, bar)
        for against, bar in (("eager", work.memory_bar), ("compile", 0.0)):
            theirs, ours = peaks[against], max(1, peaks["fastvae"])
            row(work.name, f"{against}, MB", f"{theirs / 1e6:.1f}", f"{ours / 1e6:.1f}", theirs / ours, bar)
    print(*aligned(table), sep="\n")
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, others kept {others.cores() or 0:.1f} cores busy")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
