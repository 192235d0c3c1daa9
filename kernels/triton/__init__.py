"""Backend ``triton``: fused GPU kernels for NVIDIA and AMD, from one source. This file turns a ``Work`` into launches.

With ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..layout import ALL, cols
from ..likelihoods import OF_COUNTS
from ..parameters import by_row
from ..rows import RowTerms
from ..work import ACCUMULATORS, Latent, Primitives, Reconstruction, WithTensor, Work
from . import elbo, latent, reconstruction, reduce, rows
from .launch import INTERPRETED, TILE, Launch, plan, run
from .linear import linear_forward  # noqa: F401
from .pairs import (  # noqa: F401
    aggregate_posterior_backward,
    aggregate_posterior_forward,
    mixture_backward,
    mixture_forward,
    mmd_backward,
    mmd_forward,
)

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
UNAVAILABLE = "" if INTERPRETED or torch.cuda.is_available() else "torch sees no CUDA device"
MANY, PIECES = 1 << 14, 2048  # partial sums that one program may add up; and, where they are more, sums of those
RESCALING = 2048  # programs at most: where the loss is not scaled, each reads one number and is done
FLOAT32_MIN = 1.1754943508222875e-38


def _parameter(work: Reconstruction) -> float:
    """An eps that float32 would flush to 0 is the smallest normal number there."""
    clipped = work.likelihood == "bernoulli_probs" and work.like.dtype != torch.float64
    return max(work.parameter, FLOAT32_MIN) if clipped else work.parameter


def _partials(work: Work, tiles: Launch, loss: Tensor | None = None) -> Tensor:
    """A buffer for the sums: ``loss`` itself where that is one sum a row."""
    if loss is not None and work.reduction == "example" and tiles.chunks == 1:
        return loss
    return torch.empty((work.rows, tiles.chunks), dtype=ACCUMULATORS[work.like.dtype], device=work.like.device)


def _folded(partials: Tensor) -> Tensor:
    """Those of one loss, as few as one program adds up in the time of a launch: rows with gaps leave a sum each."""
    count = partials.numel()
    piece = max(MANY // 4, -(-count // PIECES))
    few = partials.new_empty(-(-count // piece), dtype=torch.float64)
    run(reduce.fold, few.numel(), partials, partials, few, count, piece)
    return few


def _finish(partials: Tensor, work: Work, loss: Tensor) -> None:
    """Partial sums to the loss, unless they are the loss already."""
    if partials is not loss:
        if partials.numel() > MANY and not loss.dim():
            partials = _folded(partials)
        run(reduce.finish, loss.numel(), loss, partials, loss, work.weight, partials.numel() // loss.numel())


def _rescaling(count: int) -> tuple[int, int]:
    """Steps of a program, and programs."""
    steps = max(1, -(-count // (TILE * RESCALING)))
    return steps, -(-count // (TILE * steps))


def _latent_plan(work: Latent, with_z: bool) -> tuple[Launch, dict[str, Any]]:
    """Examples as rows; or all elements as one row, with a division to find each where examples are strided."""
    divide = work.rows > 1 and not work.by_example
    if divide:
        work.rows, work.cols = 1, work.total
    tiles, sample = plan(work.rows, work.cols, work.like.dtype), (2 if work.samples > 1 else 1) if with_z else 0
    return tiles, {
        "LOG_SCALE": work.log_scale,
        "PRIOR": work.prior,
        "SAMPLE": sample,
        "FREE_BITS": work.free_bits > 0,
        "CLAMP": work.clamp,
        "DIVIDE": divide,
        "QUADS": (work.rows == 1 and sample < 2) or work.cols % 4 == 0,
        "ROWS": tiles.rows,
        "BLOCK": tiles.block,
        "num_warps": tiles.warps,
    }


@functools.cache
def _elbo_plan(
    rows: int, cols: int, dtype: torch.dtype, latent_rows: int, latent_cols: int, latent_dtype: torch.dtype,
    **constants: Any,
) -> tuple[Launch, Launch, dict[str, Any]]:  # fmt: skip
    """Of the forward. Looked up: it is as much Python as the rest of a small call."""
    tiles, latent_tiles = plan(rows, cols, dtype), plan(latent_rows, latent_cols, latent_dtype)
    constants |= {"ROWS": tiles.rows, "BLOCK": tiles.block, "num_warps": tiles.warps}
    return tiles, latent_tiles, constants | {"LATENT_ROWS": latent_tiles.rows, "LATENT_BLOCK": latent_tiles.block}


class Triton(RowTerms, Primitives):
    """A kernel leaves partial sums, ``chunks`` a row, of which ``reduce`` makes the loss.

    Where a pointer is not read nor written, the first input stands.
    """

    on_host = False
    block = ALL
    row_kernels = rows.KERNELS
    logistic_kernel = True

    def fill_logistic(self, work: Work, nll: Tensor | None, sums: Tensor | None, gradients: list[Tensor]) -> int:
        return rows.fill_logistic(work, nll, sums, gradients)

    def fill_reconstruction(self, work: Reconstruction, loss: Tensor) -> None:
        recon, parameter = work.like, _parameter(work)
        tiles = plan(work.rows, work.cols, recon.dtype)
        common = {"LIKELIHOOD": work.likelihood, "ROWS": tiles.rows, "BLOCK": tiles.block, "num_warps": tiles.warps}
        sizes = (work.rows, work.cols, *work.strides, tiles.steps, tiles.chunks)
        if work.reduction == "none":
            args = (*work.tensors, loss, parameter, *sizes)
            return run(reconstruction.forward_elements, tiles.programs, recon, *args, **common)
        partials, with_gradient = _partials(work, tiles, loss), work.grad is not None
        args = (*work.tensors, work.grad if with_gradient else recon, partials, parameter, work.weight, *sizes)
        run(reconstruction.forward, tiles.programs, recon, *args, **common, WITH_GRADIENT=with_gradient)
        return _finish(partials, work, loss)

    def fill_reconstruction_gradient(self, work: Reconstruction) -> None:
        tiles = plan(work.rows, work.cols, work.like.dtype)
        run(
            reconstruction.backward, tiles.programs, work.like, work.upstream, *work.tensors, work.grad,
            _parameter(work), work.weight, work.rows, work.cols, work.upstream_stride, *work.strides, tiles.steps,
            tiles.chunks, LIKELIHOOD=work.likelihood, BY_ELEMENT=work.by_element, ROWS=tiles.rows, BLOCK=tiles.block,
            num_warps=tiles.warps,
        )  # fmt: skip

    def fill_with_tensor(self, work: WithTensor) -> None:
        recon, counts = work.like, work.likelihood in OF_COUNTS
        # counts take 160 registers and more with half the elements a thread, and with all of them would spill
        tiles = plan(work.rows, work.cols, ACCUMULATORS[recon.dtype] if counts else recon.dtype)
        warps = tiles.warps * (2 if counts else 1)
        work.sums = None if work.sums is None else _partials(work, tiles)
        work.parameter_sums = None if work.parameter_sums is None else _partials(work, tiles)
        work.flow = None if work.flow is None else _partials(work, tiles)
        softmax, library = None, work.library
        if library is not None:
            softmax = library.new_empty((2, work.rows))
            args = recon, library, softmax, work.rows, work.cols, work.strides[0]
            run(reconstruction.softmax_rows, work.rows, recon, *args, BLOCK=TILE)
        outputs = (
            work.nll, work.sums, work.grad, work.grad_parameter, work.parameter_sums, work.grad_zero_logits, work.flow,
        )  # fmt: skip
        run(
            reconstruction.with_tensor, tiles.programs, recon, *work.tensors[:2], work.tensor.value,
            *(recon if t is None else t for t in (work.zero_logits, softmax, work.upstream, *outputs)), work.weight,
            work.rows, work.cols, *work.strides[:2], work.tensor.stride, work.zero_logits_stride, work.upstream_stride,
            tiles.steps, tiles.chunks, LIKELIHOOD=work.likelihood, BY_ROW=work.tensor.kind == "row",
            INFLATED=work.zero_logits is not None, SCORES=library is not None, GRADIENT=work.grad is not None,
            LOSS="elements" if work.nll is not None else "sum" if work.sums is not None else "",
            UPSTREAM="" if work.upstream is None else "elements" if work.by_element else "rows",
            ROWS=tiles.rows, BLOCK=tiles.block, num_warps=warps,
        )  # fmt: skip
        if softmax is not None and library is not None and work.flow is not None:
            share = (by_row(work.flow) * softmax[1] / library).to(library.dtype)
            sizes = work.rows, work.cols, work.strides[0], tiles.steps, tiles.chunks
            run(
                reconstruction.less_mean_flow, tiles.programs, recon, recon, softmax, share, work.grad, *sizes,
                ROWS=tiles.rows, BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip

    def rescale_(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        if count := gradient.numel():
            steps, programs = _rescaling(count)
            run(reconstruction.rescale, programs, gradient, gradient, upstream, count, steps, BLOCK=TILE)
        return gradient

    def fill_latent(self, work: Latent, z: Tensor | None, kl: Tensor | None) -> None:
        mu, by_element = work.like, work.reduction == "none"
        tiles, constants = _latent_plan(work, z is not None)
        out = kl if kl is None or by_element else _partials(work, tiles, kl)
        run(
            latent.forward, tiles.programs, mu, *[*work.tensors, mu, mu][:4],
            *(mu if t is None else t for t in (work.seed, z, out)), work.free_bits, work.low, work.high, work.rows,
            work.cols, cols(mu), *work.strides, work.samples, tiles.steps, tiles.chunks, **constants,
            KL="" if kl is None else "elements" if by_element else "sum",
        )  # fmt: skip
        if kl is not None and out is not None:
            _finish(out, work, kl)

    def fill_latent_gradients(self, work: Latent, grad_z: Tensor | None, gradients: list[Tensor]) -> None:
        mu, upstream = work.like, work.upstream
        if upstream is not None and work.by_element:
            upstream = upstream.contiguous()
        tiles, constants = _latent_plan(work, grad_z is not None)
        run(
            latent.backward, tiles.programs, mu, *(mu if t is None else t for t in (grad_z, upstream)),
            *[*work.tensors, mu, mu][:4], mu if work.seed is None else work.seed, *[*gradients, mu, mu][:4],
            work.free_bits, work.low, work.high, work.weight, work.rows, work.cols, cols(mu),
            work.upstream_stride, *work.strides, work.samples, tiles.steps, tiles.chunks, **constants,
            KL="" if upstream is None else "elements" if work.by_element else "rows",
        )  # fmt: skip

    def fill_elbo_gradients(
        self, work: Latent, gradient: Tensor, upstream: Tensor, beta: float, gradients: list[Tensor]
    ) -> None:
        mu, scale = work.tensors
        steps, programs = _rescaling(gradient.numel())
        tiles, constants = _latent_plan(work, with_z=False)
        run(
            elbo.backward, programs + tiles.programs, mu, gradient, upstream, gradient.numel(), steps, programs,
            work.upstream, mu, scale, *gradients, work.free_bits, work.low, work.high, work.weight * beta, work.rows,
            work.cols, cols(mu), *work.strides[:2], tiles.steps, tiles.chunks,
            **{name: constants[name] for name in ("LOG_SCALE", "FREE_BITS", "CLAMP", "DIVIDE")}, BLOCK=TILE,
            LATENT_ROWS=tiles.rows, LATENT_BLOCK=tiles.block, num_warps=tiles.warps,
        )  # fmt: skip

    def fill_elbo(self, data: Reconstruction, latent: Latent, beta: float, losses: list[Tensor]) -> None:
        (recon, target), (mu, scale), grad = data.tensors, latent.tensors, data.grad
        inner, divide = latent.cols, latent.rows > 1 and not latent.by_example
        if divide:  # as in _latent_plan
            latent.rows, latent.cols = 1, latent.total
        free_bits, low, high = latent.free_bits, latent.low, latent.high
        tiles, latent_tiles, constants = _elbo_plan(
            data.rows, data.cols, recon.dtype, latent.rows, latent.cols, mu.dtype, LIKELIHOOD=data.likelihood,
            WITH_GRADIENT=grad is not None, LOG_SCALE=latent.log_scale, FREE_BITS=free_bits > 0,
            CLAMP=low > -math.inf or high < math.inf, DIVIDE=divide,
        )  # fmt: skip
        nll_sums = recon.new_empty(data.rows * tiles.chunks, dtype=ACCUMULATORS[recon.dtype])
        kl_sums = mu.new_empty(latent.rows * latent_tiles.chunks, dtype=ACCUMULATORS[mu.dtype])
        run(
            elbo.forward, tiles.programs + latent_tiles.programs, recon, recon, target, recon if grad is None else grad,
            nll_sums, _parameter(data) if data.parameter else 0.0, data.weight, data.rows, data.cols, data.places[1],
            data.places[3], tiles.steps, tiles.chunks, tiles.programs, mu, scale, kl_sums, free_bits, low, high,
            latent.rows, latent.cols, inner, latent.places[1], latent.places[3], latent_tiles.steps,
            latent_tiles.chunks, **constants,
        )  # fmt: skip
        count = losses[0].numel()
        if max(nll_sums.numel(), kl_sums.numel()) > MANY and not losses[0].dim():
            nll_sums, kl_sums = _folded(nll_sums), _folded(kl_sums)
        run(
            reduce.finish_elbo, count, recon, nll_sums, kl_sums, *losses, data.weight, latent.weight, beta,
            nll_sums.numel() // count, kl_sums.numel() // count,
        )  # fmt: skip


_primitives = Triton()

elbo_backward = _primitives.elbo_backward
elbo_forward = _primitives.elbo_forward
latent_backward = _primitives.latent_backward
latent_forward = _primitives.latent_forward
reconstruction_backward = _primitives.reconstruction_backward
reconstruction_forward = _primitives.reconstruction_forward
rescale_ = _primitives.rescale_
rows_backward = _primitives.rows_backward
rows_forward = _primitives.rows_forward
