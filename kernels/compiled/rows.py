"""What backend ``cpp`` fills of the terms of ``kernels/rows.py``: dense tensors to addresses, sizes and codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import address
from ..rows import RowTerms, RowWork
from ..work import Work
from . import native
from .primitives import TYPES


def _head(work: RowWork) -> tuple[int, float, int, int]:
    return TYPES[work.first.dtype], work.weight, address(work.upstream), address(work.values)


def _gradients(work: RowWork, count: int) -> list[int]:
    """Addresses; 0 for those there are not."""
    given = [] if work.gradients is None else [gradient.data_ptr() for gradient in work.gradients]
    return given + [0] * (count - len(given))


def logistic_mixture(_: RowTerms, work: RowWork) -> int:
    params, target = work.first, work.tensors[1]
    assert target is not None
    examples = params.shape[0]
    outside: int = native.logistic_mixture(
        *_head(work), TYPES[target.dtype], work.channels, work.options["channels_last"], work.components, examples,
        work.rows // examples, params.data_ptr(), target.data_ptr(), *_gradients(work, 1), torch.get_num_threads(),
    )  # fmt: skip
    return outside


def categorical_nll(_: RowTerms, work: RowWork) -> int:
    target = work.tensors[1]
    assert target is not None
    outside: int = native.categorical(
        *_head(work), work.rows, work.first.shape[-1], work.first.data_ptr(), target.data_ptr(), 0, 0.0, 0.0,
        *_gradients(work, 2), torch.get_num_threads(),
    )  # fmt: skip
    return outside


def categorical_kl(_: RowTerms, work: RowWork) -> int:
    balance, logits_p = work.options["balance"], work.tensors[1]
    of_q, of_p = (1 - balance, balance) if balance >= 0 else (1.0, 1.0)
    kind, weight, *places = _head(work)
    outside: int = native.categorical(
        kind, weight * of_q, *places, work.rows, work.first.shape[-1], work.first.data_ptr(), 0, address(logits_p),
        work.options["unimix"], weight * of_p, *_gradients(work, 2), torch.get_num_threads(),
    )  # fmt: skip
    return outside


def log_ratio(_: RowTerms, work: RowWork) -> int:
    z, mu = work.tensors[:2]
    assert z is not None
    assert mu is not None
    examples = mu.shape[:-1].numel()
    places = [*map(address, work.tensors), 0, 0][:5]  # an operator leaves out a prior that there is not
    native.log_ratio(
        *_head(work), work.term == "log_prob", work.rows // examples, examples, z.shape[-1], *places,
        *_gradients(work, 5), torch.get_num_threads(),
    )  # fmt: skip
    return 0


def logistic(work: Work, nll: Tensor | None, sums: Tensor | None, gradients: list[Tensor]) -> int:
    mean, target, _ = work.tensors
    of_mean, of_log_scale = [g.data_ptr() for g in gradients] or [0, 0]
    outside: int = native.logistic(
        TYPES[mean.dtype], TYPES[target.dtype], work.rows, work.cols, work.total, *work.places, work.weight,
        address(work.upstream), work.upstream_stride, work.by_element, address(nll), address(sums), of_mean,
        of_log_scale, torch.get_num_threads(),
    )  # fmt: skip
    return outside


def sum_rows(values: Tensor, rows: int) -> Tensor:
    """Added in pairs, by one thread."""
    sums = values.new_empty(rows)
    native.sum_rows(values.data_ptr(), rows, values.numel() // rows, sums.data_ptr())
    return sums


KERNELS = {
    "logistic_mixture": logistic_mixture,
    "categorical_nll": categorical_nll,
    "categorical_kl": categorical_kl,
    "log_prob": log_ratio,
    "log_ratio": log_ratio,
}
