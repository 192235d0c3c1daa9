"""The second stage of every reduction: partial sums to losses, in one fixed order and in float64.

Two stages instead of atomics: the same inputs give the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)


@triton.jit
def total(partials_ptr, first, count):
    """Σ of ``count`` partials from ``first`` on."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + first + at, at < count, other=0).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["count", "piece"])
def fold(partials_ptr, out_ptr, count, piece):
    """``out[p] = Σ partials[p · piece : (p + 1) · piece]`` for program p: many partials become few."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * piece
    tl.store(out_ptr + program, total(partials_ptr, first, tl.minimum(count - first, piece)))


@triton.jit(do_not_specialize=["count"])
def finish(partials_ptr, loss_ptr, weight: tl.float64, count):
    """``loss[p] = weight · Σ partials[p, :count]`` for program p."""
    program = tl.program_id(0)
    weight = tl.full((), weight, tl.float64)
    loss = total(partials_ptr, program.to(tl.int64) * count, count) * weight
    tl.store(loss_ptr + program, loss.to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["nll_count", "kl_count"])
def finish_elbo(
    nll_partials_ptr, kl_partials_ptr, loss_ptr, nll_ptr, kl_ptr, nll_weight: tl.float64, kl_weight: tl.float64,
    beta: tl.float64, nll_count, kl_count,
):  # fmt: skip
    """The same for both terms, and ``loss = nll + beta · kl``."""
    program = tl.program_id(0)
    nll_weight, kl_weight = tl.full((), nll_weight, tl.float64), tl.full((), kl_weight, tl.float64)
    nll = total(nll_partials_ptr, program.to(tl.int64) * nll_count, nll_count) * nll_weight
    kl = total(kl_partials_ptr, program.to(tl.int64) * kl_count, kl_count) * kl_weight
    loss = nll + tl.full((), beta, tl.float64) * kl
    tl.store(nll_ptr + program, nll.to(nll_ptr.dtype.element_ty))
    tl.store(kl_ptr + program, kl.to(kl_ptr.dtype.element_ty))
    tl.store(loss_ptr + program, loss.to(loss_ptr.dtype.element_ty))
