"""The six primitives, once for every backend: outputs, rows, priors, upstream gradients, empty input, range errors.

A backend is a subclass of :class:`Primitives`. What it is given to fill is never empty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_domains
from .layout import (
    ALL,
    BLOCK,
    TOTAL_REDUCTIONS,
    accumulator,
    as_rows,
    empty_like,
    keeps_kl_gradients,
    reduction_weight,
    upstream_by_row,
)
from .parameters import Parameter, by_row, gradient_dtype, ordered_sum

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACCUMULATORS = {dtype: accumulator(dtype) for dtype in FLOATS}
TOTALS = frozenset(TOTAL_REDUCTIONS)
NO_PRIOR = [0, 0, 0, 0]
PIECES = 64  # sums over the batch: so many partial ones at most, however many threads there are
LEAST_ROWS = 8  # that a partial sum is of: all of them are an eighth of the data, in float64


class Work:
    """Tensors of one shape as ``rows`` rows of ``cols`` elements, and an upstream gradient if there is one.

    Rows are the examples; or blocks of ``block`` elements where all tensors are dense and nobody asks whose example an
    element is. ``total`` counts all elements, so the last block may be shorter. With ``block`` 0 the kernels do this
    themselves, and weigh their sums: else by ``weight``. ``places`` are address and stride of each tensor.
    ``upstream`` is one number a row (stride 0: one for all), or rows ``by_element``.
    """

    __slots__ = (
        "by_element", "by_example", "cols", "places", "reduction", "rows", "tensors", "total", "upstream",
        "upstream_stride", "weight",
    )  # fmt: skip

    def __init__(
        self,
        tensors: list[Tensor],
        reduction: str,
        block: int,
        upstream: Tensor | None = None,
        by_example: bool = False,
    ):
        like = tensors[0]
        rows, total = like.shape[0], like.numel()
        cols = total // rows if rows else 0
        places: list[int] = []
        dense, upstream_stride, by_element = True, 0, False
        for tensor in tensors:
            stride = cols
            if not tensor.is_contiguous():
                placed, stride = as_rows(tensor)
                tensors[len(places) // 2] = tensor = placed  # may be a copy: keep it while its address is in use
                dense = dense and stride == cols
            places.append(tensor.data_ptr())
            places.append(stride)
        if upstream is None:
            by_example = by_example or reduction == "example"
        elif reduction not in TOTALS or upstream.dtype != ACCUMULATORS[like.dtype]:
            each_row = upstream_by_row(upstream, reduction, like)
            if each_row is None:
                upstream, upstream_stride = as_rows(upstream.to(like.dtype))
                by_element, dense = True, dense and upstream_stride == cols
            else:
                upstream, upstream_stride = each_row
                by_example = by_example or upstream_stride != 0
        if block and total and dense and not by_example:
            cols = min(block, total)
            rows = -(-total // cols)
            places[1::2] = [cols] * len(tensors)
            upstream_stride = cols if by_element else upstream_stride
        self.tensors = tensors
        self.places = places
        self.reduction = reduction
        self.rows = rows
        self.cols = cols
        self.total = total
        self.upstream = upstream
        self.upstream_stride = upstream_stride
        self.by_element = by_element
        self.by_example = by_example
        count = total if reduction == "mean" else like.shape[0] if block and reduction == "batchmean" else 1
        self.weight = (1 / count if count else math.nan) if block else 1.0

    @property
    def like(self) -> Tensor:
        """The first tensor."""
        return self.tensors[0]

    @property
    def strides(self) -> list[int]:
        """From row to row of each tensor."""
        return self.places[1::2]


class Reconstruction(Work):
    """recon and target; ``grad`` is the gradient in recon to write, or None."""

    __slots__ = ("grad", "likelihood", "parameter")
    likelihood: str
    parameter: float
    grad: Tensor | None


class WithTensor(Reconstruction):
    """A term whose parameter is a ``tensor``. To fill are those ``buffers`` that are not None.

    ``piece`` rows share a row of ``columns``. A backend may set ``sums`` and ``parameter_sums`` afresh, with several
    parts a row. ``zero_logits``, and its gradient, are by element; without it the term is not inflated. With
    ``library``, one number per row, recon are scores, y is library · softmax(scores) over the row, and ``flow`` is
    Σ y·∂nll/∂y of each row.
    """

    __slots__ = (
        "columns", "flow", "grad_parameter", "grad_zero_logits", "library", "nll", "on_host", "parameter_sums",
        "piece", "pieces", "sums", "tensor", "zero_logits",
    )  # fmt: skip

    def __init__(
        self,
        recon: Tensor,
        target: Tensor,
        parameter_tensor: Tensor,
        zero_logits: Tensor | None,
        library: Tensor | None,
        likelihood: str,
        reduction: str,
        on_host: bool,
        upstream: Tensor | None = None,
    ):
        self.likelihood, self.on_host, self.tensor = likelihood, on_host, Parameter(parameter_tensor, recon)
        kind = self.tensor.kind
        elements = [self.tensor.value] if kind == "element" else []
        by_example = kind == "column" or (kind == "row" and self.tensor.stride == 1) or library is not None
        tensors = [recon, target, *elements, *([] if zero_logits is None else [zero_logits])]
        super().__init__(tensors, reduction, BLOCK if on_host else ALL, upstream, by_example)
        if elements:
            self.tensor.value, self.tensor.stride = self.tensors[2], self.places[5]
        self.zero_logits = None if zero_logits is None else self.tensors[-1]
        self.piece = max(LEAST_ROWS, -(-self.rows // PIECES)) if kind == "column" else 1
        self.pieces = -(-self.rows // self.piece)
        self.nll: Tensor | None = None
        self.sums: Tensor | None = None
        self.grad: Tensor | None = None
        self.grad_parameter: Tensor | None = None
        self.parameter_sums: Tensor | None = None
        self.columns: Tensor | None = None
        self.grad_zero_logits: Tensor | None = None
        self.library = library
        self.flow: Tensor | None = None

    @property
    def buffers(self) -> tuple[Tensor | None, ...]:
        return (
            self.nll, self.sums, self.grad, self.grad_parameter, self.parameter_sums, self.columns,
            self.grad_zero_logits, self.library, self.flow,
        )  # fmt: skip

    @property
    def zero_logits_stride(self) -> int:
        """From row to row of ``zero_logits``, if there are any."""
        return self.places[-1]

    def row_sums(self) -> Tensor:
        """A buffer for one number a row."""
        return torch.empty(self.rows, dtype=torch.float64, device=self.like.device)

    def want_gradients(self) -> None:
        """Buffers for both gradients; on a GPU those by column come out by element, for torch to add up."""
        self.grad = empty_like(self.like)
        if self.tensor.kind == "row":
            self.parameter_sums = self.row_sums()
        elif self.tensor.kind == "column" and self.on_host:
            self.columns = torch.zeros((self.pieces, self.cols), dtype=torch.float64, device=self.like.device)
        else:
            self.grad_parameter = self.grad.new_empty(self.grad.shape, dtype=ACCUMULATORS[self.grad.dtype])
        if self.zero_logits is not None:
            self.grad_zero_logits = self.grad.new_empty(self.grad.shape, dtype=ACCUMULATORS[self.grad.dtype])
        if self.library is not None:
            self.flow = self.row_sums()

    def gradients(self) -> list[Tensor]:
        """All, once they are filled."""
        parts = self.columns
        if self.parameter_sums is not None:
            parts = by_row(self.parameter_sums)
        elif self.grad_parameter is not None:
            parts = self.grad_parameter
            if self.tensor.kind == "column":
                parts = parts.sum(0, keepdim=True, dtype=torch.float64)
        assert self.grad is not None
        assert parts is not None
        gradients = [self.grad, self.tensor.gradient(parts, self.like.shape)]
        if self.grad_zero_logits is not None:
            gradients.append(self.grad_zero_logits)
        if self.library is not None and self.flow is not None:
            gradients.append((by_row(self.flow) / self.library).to(self.library.dtype))
        return gradients

    def loss(self) -> Tensor:
        """The reduced loss, once ``sums`` are filled."""
        assert self.sums is not None
        sums = by_row(self.sums)
        if self.reduction in TOTALS:
            sums = ordered_sum(sums) * self.weight
        return sums.to(ACCUMULATORS[self.like.dtype])


class Latent(Work):
    """mu and scale, and mean and logvar of the prior if there is one: else their ``places`` are zeros.

    z has ``samples`` samples, whose noise comes from ``seed``. logvar is clamped to [``low``, ``high``].
    ``gradients`` are those of β·KL which ``fill_elbo`` is to write, none or two.
    """

    __slots__ = ("free_bits", "gradients", "high", "log_scale", "low", "samples", "seed")
    gradients: list[Tensor]
    seed: Tensor | None
    log_scale: bool
    low: float
    high: float
    samples: int
    free_bits: float

    @property
    def prior(self) -> bool:
        return len(self.tensors) > 2

    @property
    def clamp(self) -> bool:
        """Whether there is a bound."""
        return self.low > -math.inf or self.high < math.inf


class Primitives:
    """The functions of ``kernels/__init__.py``, on what a backend's ``fill_…`` do.

    ``block`` is what rows of dense tensors become: 0 leaves them to the kernels. Losses are filled reduced and
    weighted. Buffers that may be None are not asked for then.
    """

    on_host = True
    keeps_kl_gradients = False  # whether ``fill_elbo`` can write them
    block = BLOCK
    empty_like = staticmethod(empty_like)

    def __init__(self) -> None:
        self.scalars: dict[torch.dtype, Tensor] = {}

    def fill_reconstruction(self, work: Reconstruction, loss: Tensor) -> int | None:
        """The loss, and ``work.grad``; returns whether a value was seen outside its domain."""
        raise NotImplementedError

    def fill_reconstruction_gradient(self, work: Reconstruction) -> None:
        """``work.grad`` for ``work.upstream``."""
        raise NotImplementedError

    def fill_with_tensor(self, work: WithTensor) -> int | None:
        """``work.buffers``; gradients are those for ``work.upstream``, or for 1. Returns as ``fill_reconstruction``."""
        raise NotImplementedError

    def fill_latent(self, work: Latent, z: Tensor | None, kl: Tensor | None) -> None:
        """What there is of z and kl."""
        raise NotImplementedError

    def fill_latent_gradients(self, work: Latent, grad_z: Tensor | None, gradients: list[Tensor]) -> None:
        """A gradient in each tensor of ``work``, from those of z and of kl (``work.upstream``): either may be None."""
        raise NotImplementedError

    def fill_elbo(self, data: Reconstruction, latent: Latent, beta: float, losses: list[Tensor]) -> int | None:
        """``[loss, nll, kl]``, else as ``fill_reconstruction``; ``latent.places`` are those of mu and scale alone."""
        raise NotImplementedError

    def fill_elbo_gradients(
        self, work: Latent, gradient: Tensor, upstream: Tensor, beta: float, gradients: list[Tensor]
    ) -> None:
        """``gradient`` times ``upstream``, and the ``gradients`` of β·KL; ``work.places`` as for all of the latent."""
        self.rescale_(gradient, upstream)
        work.weight *= beta
        self.fill_latent_gradients(work, None, gradients)

    def rescale_(self, gradient: Tensor, upstream: Tensor) -> Tensor:
        raise NotImplementedError

    def loss_like(self, tensor: Tensor, reduction: str) -> Tensor:
        """An output for a loss over ``tensor``."""
        if reduction == "none":
            return self.empty_like(tensor)
        dtype = ACCUMULATORS[tensor.dtype]
        if reduction == "example":
            return tensor.new_empty(tensor.shape[:1], dtype=dtype)
        if not tensor.is_cpu:  # a CUDA graph being captured would own a tensor kept for later
            return tensor.new_empty((), dtype=dtype)
        like = self.scalars.get(dtype)  # twice as fast as spelling out shape, dtype and device
        if like is None:
            like = self.scalars[dtype] = tensor.new_empty((), dtype=dtype)
        return torch.empty_like(like)

    def reconstruction_forward(
        self,
        recon: Tensor,
        target: Tensor,
        parameter_tensor: Tensor | None = None,
        zero_logits: Tensor | None = None,
        library: Tensor | None = None,
        *,
        likelihood: str,
        parameter: float,
        reduction: str,
        with_gradient: bool,
    ) -> list[Tensor]:
        if not recon.numel():
            loss = self.loss_like(recon, reduction).fill_(0.0 * reduction_weight(reduction, recon))
            given = parameter_tensor, zero_logits, library
            return [loss, *(self._no_gradients(recon, *given) if with_gradient else [])]
        if parameter_tensor is None:
            loss, work = self.loss_like(recon, reduction), Reconstruction([recon, target], reduction, self.block)
            work.likelihood, work.parameter = likelihood, parameter
            work.grad = self.empty_like(recon) if with_gradient else None
            if self.fill_reconstruction(work, loss):
                check_domains(likelihood, recon, target)
            return [loss] if work.grad is None else [loss, work.grad]
        own = WithTensor(
            recon, target, parameter_tensor, zero_logits, library, likelihood, reduction, self.on_host
        )  # fmt: skip
        if reduction == "none":
            own.nll = self.empty_like(recon)
        else:
            own.sums = own.row_sums()
        if with_gradient:
            own.want_gradients()
        if self.fill_with_tensor(own):
            check_domains(likelihood, recon if library is None else recon.new_zeros(()), target)
        return [own.loss() if own.nll is None else own.nll, *(own.gradients() if with_gradient else [])]

    def reconstruction_backward(
        self,
        grad_nll: Tensor,
        recon: Tensor,
        target: Tensor,
        parameter_tensor: Tensor | None = None,
        zero_logits: Tensor | None = None,
        library: Tensor | None = None,
        *,
        likelihood: str,
        parameter: float,
        reduction: str,
    ) -> list[Tensor]:
        if not recon.numel():
            return self._no_gradients(recon, parameter_tensor, zero_logits, library)
        if parameter_tensor is None:
            work = Reconstruction([recon, target], reduction, self.block, grad_nll)
            work.likelihood, work.parameter, work.grad = likelihood, parameter, self.empty_like(recon)
            self.fill_reconstruction_gradient(work)
            return [work.grad]
        own = WithTensor(
            recon, target, parameter_tensor, zero_logits, library, likelihood, reduction, self.on_host, grad_nll
        )  # fmt: skip
        own.want_gradients()
        self.fill_with_tensor(own)
        return own.gradients()

    def _no_gradients(
        self, recon: Tensor, parameter_tensor: Tensor | None, zero_logits: Tensor | None, library: Tensor | None
    ) -> list[Tensor]:
        if parameter_tensor is None:
            return [self.empty_like(recon)]
        dtype = gradient_dtype(parameter_tensor, recon.shape, ACCUMULATORS[recon.dtype])
        others = [torch.zeros_like(tensor) for tensor in (zero_logits, library) if tensor is not None]
        return [self.empty_like(recon), torch.zeros_like(parameter_tensor, dtype=dtype), *others]

    def latent_forward(
        self,
        mu: Tensor,
        scale: Tensor,
        seed: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        *,
        log_scale: bool,
        low: float,
        high: float,
        samples: int,
        free_bits: float,
        reduction: str,
    ) -> list[Tensor]:
        z = None if seed is None else self.empty_like(mu, samples)
        kl = self.loss_like(mu, reduction) if reduction else None
        if mu.numel():
            priors = [] if prior_mu is None or prior_logvar is None else [prior_mu, prior_logvar]
            work = Latent([mu, scale, *priors], reduction, self.block)
            if not priors:
                work.places += NO_PRIOR
            work.seed, work.log_scale, work.samples, work.free_bits = seed, log_scale, samples or 1, free_bits
            work.low, work.high = low, high
            self.fill_latent(work, z, kl)
        elif kl is not None:
            kl.fill_(0.0 * reduction_weight(reduction, mu))
        return [t for t in (z, kl) if t is not None]

    def latent_backward(
        self,
        grad_z: Tensor | None,
        grad_kl: Tensor | None,
        mu: Tensor,
        scale: Tensor,
        seed: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        *,
        log_scale: bool,
        low: float,
        high: float,
        samples: int,
        free_bits: float,
        reduction: str,
    ) -> list[Tensor]:
        tensors, gradients = [mu, scale], [self.empty_like(mu), self.empty_like(scale)]
        unused: list[Tensor] = []
        if prior_mu is not None and prior_logvar is not None:
            if grad_kl is None:  # z does not depend on the prior
                unused = [torch.zeros_like(g) for g in gradients]
            else:
                tensors += prior_mu, prior_logvar
                gradients += self.empty_like(prior_mu), self.empty_like(prior_logvar)
        if mu.numel():
            grad_z = grad_z.contiguous() if grad_z is not None and seed is not None else None
            work = Latent(tensors, "" if grad_kl is None else reduction, self.block, grad_kl)
            if len(tensors) == 2:
                work.places += NO_PRIOR
            work.seed, work.log_scale, work.samples, work.free_bits = seed, log_scale, samples or 1, free_bits
            work.low, work.high = low, high
            self.fill_latent_gradients(work, grad_z, gradients)
        return gradients + unused

    def elbo_backward(
        self,
        gradient: Tensor,
        upstream: Tensor,
        mu: Tensor,
        scale: Tensor,
        *,
        log_scale: bool,
        low: float,
        high: float,
        beta: float,
        free_bits: float,
        reduction: str,
    ) -> list[Tensor]:
        gradients = [self.empty_like(mu), self.empty_like(scale)]
        if not mu.numel():
            self.rescale_(gradient, upstream)
            return gradients
        some = gradient.numel() > 0
        work = Latent([mu, scale], reduction, self.block, upstream if some else beta * upstream)
        work.places += NO_PRIOR
        work.seed, work.log_scale, work.samples, work.free_bits = None, log_scale, 1, free_bits
        work.low, work.high = low, high
        if some:
            self.fill_elbo_gradients(work, gradient, upstream, beta, gradients)
        else:
            self.fill_latent_gradients(work, None, gradients)
        return gradients

    def elbo_forward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor,
        scale: Tensor,
        *,
        likelihood: str,
        parameter: float,
        log_scale: bool,
        low: float,
        high: float,
        beta: float,
        free_bits: float,
        reduction: str,
        with_gradient: bool,
    ) -> list[Tensor]:
        data = Reconstruction([recon, target], reduction, self.block)
        latent = Latent([mu, scale], reduction, self.block)
        if not data.total or not latent.total:
            nll, *gradient = self.reconstruction_forward(
                recon, target, likelihood=likelihood, parameter=parameter, reduction=reduction,
                with_gradient=with_gradient,
            )  # fmt: skip
            (kl,) = self.latent_forward(
                mu, scale, None, None, None, log_scale=log_scale, low=low, high=high, samples=0, free_bits=free_bits,
                reduction=reduction,
            )  # fmt: skip
            return [(nll + beta * kl).to(nll.dtype), nll, kl, *gradient]
        loss = self.loss_like(recon, reduction)
        kl = torch.empty_like(loss) if mu.dtype == recon.dtype else self.loss_like(mu, reduction)
        losses = [loss, torch.empty_like(loss), kl]
        data.likelihood, data.parameter = likelihood, parameter
        data.grad = self.empty_like(recon) if with_gradient else None
        latent.seed, latent.log_scale, latent.samples, latent.free_bits = None, log_scale, 1, free_bits
        latent.low, latent.high = low, high
        latent.gradients = []
        if with_gradient and self.keeps_kl_gradients and keeps_kl_gradients(recon, mu, reduction):
            latent.gradients = [self.empty_like(mu), self.empty_like(scale)]
        if self.fill_elbo(data, latent, beta, losses):
            check_domains(likelihood, recon, target)
        if data.grad is not None:
            losses.append(data.grad)
        return losses + latent.gradients
