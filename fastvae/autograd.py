"""One row per op: which primitive runs forward, how gradients come out, and the same as a differentiable expression.

``_traced`` and ``_direct`` make two ``torch.autograd.Function``s of a row: one as torch's tracers and transforms want
it, and one for eager mode (:func:`apply`). Where ``fastvae._autograd`` was built (``csrc/autograd``), it does a plain
call of a compiled backend in the place of the second, without Python; whatever it declines is done here.

Three rules hold for each of them:

* Under ``create_graph=True`` the backward is the reference expression, which torch can differentiate again.
* Under ``torch.func.vmap`` the op is the vmapped reference expression.
* A loss whose gradient was written by the forward hands that buffer over to the first backward, scaled in place by
  the upstream gradient (on the device: nothing to do where it is 1). Nobody else ever sees the buffer, so a second
  backward through the same graph computes its gradient afresh instead of finding one that was scaled before.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, registry
from .kernels import reference
from .kernels.layout import TOTAL_REDUCTIONS
from .kernels.reference import latent as reference_latent
from .kernels.reference import reconstruction as reference_reconstruction
from .kernels.reference import rows as reference_rows

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by the older vmap, which no mode and no transform announces

Gradients = tuple[Tensor | None, ...]


class Op(NamedTuple):
    """An op as data: ``primitive(*tensors, **options)`` computes it.

    Args:
        primitive: its name, for the forward.
        tensors: how many come first.
        options: names of what follows them.
        losses: outputs for the caller; the others are gradients, kept for the first backward.
        gradients: ``(ctx, primitives, again, saved, grads)`` → the gradients of the first tensors. ``again`` says that
            those will be differentiated or vmapped, and ``primitives`` are plain torch. ``saved`` is
            ``ctx.saved_tensors``, which may be asked for only once.
        expression: the forward, differentiable, without looking at the data.
        kept: whose gradients those are in the plainest call: where just those are kept, a backward needs no more.
        code: its place in csrc/autograd, if it is there.
    """

    primitive: str
    tensors: int
    options: tuple[str, ...]
    losses: int
    gradients: Callable[..., Gradients]
    expression: Callable[..., tuple[Tensor, ...]]
    kept: tuple[int, ...] = ()
    code: int = -1


def apply(op: Op, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of ``op`` for the caller, with their gradients.

    A Function with ``setup_context`` binds its arguments through ``inspect`` at every call: in plain eager mode one
    without spares a call 14 µs.
    """
    if torch.compiler.is_dynamo_compiling() or ops.transforms_active():
        absent = (None,) * (TENSORS - op.tensors), (None,) * (OPTIONS - len(op.options))
        return _TRACED[op.primitive].apply(*tensors, *absent[0], *options, *absent[1])
    if (ops.recorded_by_jit() or ops.dispatch_modes()) and ops.leaves_python():
        return portable(op, tensors, dict(zip(op.options, options, strict=True)))
    if NATIVE is not None and op.code >= 0:
        first = tensors[0]
        assert first is not None
        backend = registry.backend_for("cpu" if first.is_cpu else first.device.type)
        kernels = getattr(backend, "KERNELS", None)
        if kernels is not None:
            context = op, backend, registry.asked_for()
            outputs: tuple[Tensor, ...] | None = NATIVE.call(op.code, kernels, context, tensors, options)
            if outputs is not None:
                return outputs
    # a tensor may come out of a transform that has ended, or be a view that torch has yet to negate
    alive: list[Any] = []
    for tensor in tensors:
        if tensor is not None:
            tensor = _unwrap_if_dead(tensor)
            tensor = tensor.resolve_neg() if tensor.is_neg() else tensor
        alive.append(tensor)
    return _direct(op)(*alive, options)


def portable(op: Op, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The same as plain torch operations, which any runtime has and torch differentiates."""
    if "with_gradient" in options:
        options["with_gradient"] = False
    return op.expression(*tensors, **options)


@functools.cache
def _direct(op: Op) -> Callable[..., tuple[Tensor, ...]]:
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, options = args
        ctx.primitives, ctx.backend = ops.primitives(*tensors), registry.asked_for()
        ctx.options = dict(zip(op.options, options, strict=True))
        outputs = getattr(ctx.primitives, op.primitive)(*tensors, **ctx.options)
        ctx.set_materialize_grads(False)  # or torch would fill zeros, as many as the data, for a gradient's gradient
        ctx.save_for_backward(*tensors)
        ctx.gradient = outputs[op.losses :]
        return tuple(outputs[: op.losses])

    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        again = torch.is_grad_enabled() or ops.transforms_active()
        if not again and len(ctx.gradient) == len(op.kept) and _one_number(ctx, *grads):
            return _hand_over(op, ctx, grads[0])
        return *_gradients(op, ctx, grads), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    direct: Any = type(op.primitive, (torch.autograd.Function,), members)
    return super(torch.autograd.Function, direct).apply  # Function's own looks for what is not here


def _gradients(op: Op, ctx: Any, grads: Gradients) -> Gradients:
    """Those of an op's tensors, whatever came in."""
    # create_graph=True, or vmapped upstream gradients (of torch.func, or of is_grads_batched)
    again = torch.is_grad_enabled() or ops.transforms_active()
    alive: list[Tensor | None] = []
    for grad in grads:
        again = again or (grad is not None and _is_batched(grad))
        alive.append(grad if grad is None or again else grad.resolve_neg())
    if again:
        gradients = op.gradients(ctx, reference, True, ctx.saved_tensors, grads)
    elif ctx.primitives is not ops.OPERATORS and not ops.listened_to():
        gradients = op.gradients(ctx, ctx.primitives, False, ctx.saved_tensors, alive)
    else:
        with registry.use(ctx.backend):  # autograd has threads of its own, and backward may come after the block
            gradients = op.gradients(ctx, ops.OPERATORS, False, ctx.saved_tensors, alive)
    return *gradients, *(None,) * (op.tensors - len(gradients))


class _Context:
    """What a Function's ``ctx`` knows, of a node of csrc/autograd."""

    def __init__(
        self, context: tuple[Op, Any, str | None], options: tuple, needed: tuple, saved: Gradients, kept: Gradients
    ):
        op, self.primitives, self.backend = context
        self.options = dict(zip(op.options, options, strict=True))
        self.needs_input_grad, self.saved_tensors, self.gradient = needed, saved, kept


def _in_python(
    context: tuple[Op, Any, str | None],
    options: tuple,
    needed: tuple[bool, ...],
    saved: Gradients,
    kept: Gradients,
    grads: Gradients,
) -> tuple[Gradients, Gradients]:
    """The gradients that a node asks for, and what is kept from now on."""
    ctx = _Context(context, options, needed, saved, kept)
    return _gradients(context[0], ctx, grads), tuple(ctx.gradient)


def _native() -> tuple[Any, str]:
    """The compiled graph nodes; or None, and why."""
    try:
        from .kernels.compiled.primitives import CODES
    except ImportError:
        return None, "the compiled extension cannot be imported"
    if importlib.util.find_spec("fastvae._autograd") is None:
        return None, "no torch was found at install, or no compiler that knows C++20"
    try:
        from fastvae import _autograd
    except ImportError as error:
        return None, f"{error}; install fastvae again"
    _autograd.connect(CODES, _in_python, getattr(torch._C, "_cuda_getCurrentRawStream", int))
    return _autograd, ""


def _one_number(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> bool:
    """Whether all that came in is a number for the first output, on a CPU, and nobody wants the target's gradient."""
    if not ctx.gradient or upstream is None or upstream.dim() or not upstream.is_cpu or ctx.needs_input_grad[1]:
        return False
    for other in others:
        if other is not None:
            return False
    return not _is_batched(upstream) and ctx.primitives is not ops.OPERATORS and not ops.listened_to()


def _hand_over(op: Op, ctx: Any, upstream: Any) -> Gradients:
    """The kept gradients times ``upstream``, in their places: once, nobody else ever sees them."""
    gradients: list[Tensor | None] = [None] * (op.tensors + 1)
    kept, ctx.gradient = ctx.gradient, ()
    for place, gradient in zip(op.kept, kept, strict=True):
        gradients[place] = gradient
    if upstream.item() != 1:
        upstream = upstream.resolve_neg()
        for gradient in kept:
            ctx.primitives.rescale_(gradient, upstream)
    return tuple(gradients)


TENSORS, OPTIONS = 5, 9  # as many as any op has: all have one signature, with None for what an op lacks


def _traced(op: Op) -> type[torch.autograd.Function]:
    primitive, names, losses = getattr(ops.OPERATORS, op.primitive), op.options, op.losses
    expression, gradients_of, count = op.expression, op.gradients, op.tensors

    def options_of(args: tuple) -> dict[str, Any]:
        return dict(zip(names, args[TENSORS : TENSORS + len(names)], strict=True))

    # spelled out: where no gradient is wanted, torch.compile counts the arguments
    def forward(  # type: ignore[no-untyped-def]
        t0, t1, t2, t3, t4, o0, o1, o2, o3, o4, o5, o6, o7, o8
    ) -> tuple[Tensor, ...]:
        args = t0, t1, t2, t3, t4, o0, o1, o2, o3, o4, o5, o6, o7, o8
        return tuple(primitive(*args[:count], **options_of(args)))

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        gradient = output[losses:]
        ctx.mark_non_differentiable(*gradient)
        ctx.set_materialize_grads(False)
        ctx.options = options_of(inputs)
        if torch.compiler.is_dynamo_compiling():
            ctx.save_for_backward(*inputs[:count], *gradient)
        else:
            ctx.save_for_backward(*inputs[:count])
            ctx.gradient = list(gradient)

    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        """Where a Function is transformed; or traced, then in grad mode without being differentiated."""
        saved = ctx.saved_tensors
        again = not torch.compiler.is_dynamo_compiling() and (torch.is_grad_enabled() or _is_wrapped(saved[0]))
        primitives = reference if again else ops.OPERATORS
        gradients = gradients_of(ctx, primitives, again, saved, grads)
        return *gradients, *(None,) * (TENSORS + OPTIONS - len(gradients))

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        function = functools.partial(expression, **options_of(args))
        outputs = torch.vmap(function, in_dims[:count], randomness="same")(*args[:count])
        return outputs, tuple(0 for _ in outputs)

    members = {f.__name__: staticmethod(f) for f in (forward, setup_context, backward, vmap)}
    return type(op.primitive, (torch.autograd.Function,), members)


def _take_gradient(ctx: Any, primitives: Any, traced: Gradients, upstream: Tensor) -> list[Tensor]:
    """The kept gradients times ``upstream``, once; none if there are none (any more)."""
    if traced:
        return [(gradient * upstream).to(gradient.dtype) for gradient in traced if gradient is not None]
    if torch.compiler.is_dynamo_compiling():  # nothing is kept elsewhere, and torch 2.11 cannot trace the next line
        return []
    gradients, ctx.gradient = list(ctx.__dict__.get("gradient", ())), ()
    if gradients and upstream.dim():  # by example; mostly all of them alike: the mean of the batch, or the sum
        first = upstream[0]
        if not bool((upstream == first).all()):
            if len(gradients) > 1:  # what is learned for all is added up already
                return []
            gradients[0].mul_(upstream.reshape(-1, *(1,) * (gradients[0].dim() - 1)))
            return gradients
        upstream = first
    for gradient in gradients:
        primitives.rescale_(gradient, upstream)
    return gradients


def _term(ctx: Any) -> dict[str, Any]:
    """Options of a reconstruction's backward."""
    return {name: ctx.options[name] for name in ("likelihood", "parameter", "reduction")}


def _reconstruction_gradients(
    ctx: Any, primitives: Any, again: bool, grad_nll: Tensor | None, inputs: tuple[Any, ...], traced: Gradients
) -> Gradients:
    """Those of recon and target, and of the parameter, the logits of zero and the library if those are inputs, too."""
    if grad_nll is None:
        return (None,) * len(inputs)
    recon_needed, target_needed = ctx.needs_input_grad[:2]
    tensor_needed, zero_needed, library_needed = ctx.needs_input_grad[2:5] if len(inputs) > 2 else (False,) * 3
    needed: list[Tensor | None] = [None] * 5
    if recon_needed or tensor_needed or zero_needed or library_needed:
        gradients = [] if again else _take_gradient(ctx, primitives, traced, grad_nll)
        if not gradients:
            gradients = primitives.reconstruction_backward(grad_nll, *inputs, **_term(ctx))
        needed[0] = gradients[0] if recon_needed else None
        needed[2] = gradients[1].to(inputs[2].dtype) if tensor_needed else None
        needed[3] = gradients[2] if zero_needed else None
        needed[4] = gradients[-1] if library_needed else None
    if target_needed:
        needed[1] = reference_reconstruction.target_gradient(grad_nll, *inputs, **_term(ctx))  # too rare for a kernel
    return tuple(needed[: len(inputs)])


def _of_reconstruction(ctx: Any, primitives: Any, again: bool, saved: Gradients, grads: Gradients) -> Gradients:
    return _reconstruction_gradients(ctx, primitives, again, grads[0], saved[:5], saved[5:])


def _of_latent(ctx: Any, primitives: Any, again: bool, saved: Gradients, grads: Gradients) -> Gradients:
    """Noise is drawn again, never kept."""
    seed = saved[2]
    grad_z = grads[0] if seed is not None else None
    grad_kl = grads[-1] if ctx.options["reduction"] else None
    if grad_z is None and grad_kl is None:
        return ()
    of_mu, of_scale, *of_prior = primitives.latent_backward(grad_z, grad_kl, *saved, **ctx.options)
    gradients = (of_mu, of_scale, None, *of_prior)
    needed = ctx.needs_input_grad[: len(gradients)]  # torch 2.8 cannot trace a zip of two lengths
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))


def _of_elbo(ctx: Any, primitives: Any, again: bool, saved: Gradients, grads: Gradients) -> Gradients:
    grad_loss, grad_nll, grad_kl = grads[:3]
    recon, target, mu, scale, *traced = saved
    given = ctx.options
    beta = given["beta"]
    latent_options = {name: given[name] for name in ("log_scale", "low", "high", "free_bits", "reduction")}
    needed = ctx.needs_input_grad
    # the loss alone, one number, and all its gradients but the target's: one call, and one launch
    alone = grad_loss is not None and grad_nll is None and grad_kl is None and not grad_loss.dim()
    alone = alone and needed[0] and not needed[1] and any(needed[2:4])
    # nothing is kept elsewhere while compiled, and torch 2.11 cannot trace a look into __dict__
    kept = () if torch.compiler.is_dynamo_compiling() else ctx.__dict__.get("gradient", ())
    if kept:
        ctx.gradient = kept[:1]  # those of the KL are for the loss alone: see _hand_over
    if kept and alone and not again and primitives is not ops.OPERATORS:
        ctx.gradient = ()
        of_latent = primitives.elbo_backward(kept[0], grad_loss, mu, scale, beta=beta, **latent_options)
        return (kept[0], None, *of_latent)
    # while traced: those of β·KL, which are the KL's own if β is 1
    left: Any = traced[1:] if not again and (grad_kl is None or beta == 1) else []
    beside = grad_kl is not None
    weighted = grad_loss if grad_loss is None or beta == 1 else grad_loss * beta
    grad_nll, grad_kl = _sum(grad_loss, grad_nll), _sum(weighted, grad_kl)
    gradients = _reconstruction_gradients(ctx, primitives, again, grad_nll, (recon, target), tuple(traced[:1]))
    if grad_kl is None or not any(needed[2:4]):
        return gradients
    if left:
        upstream: Any = grad_kl if beside else grad_loss
        return (*gradients, *((gradient * upstream).to(gradient.dtype) for gradient in left))
    of_latent = primitives.latent_backward(None, grad_kl, mu, scale, None, None, None, samples=0, **latent_options)
    return (*gradients, *of_latent)


def _of_rows(ctx: Any, primitives: Any, again: bool, saved: Gradients, grads: Gradients) -> Gradients:
    (grad,) = grads[:1]
    if grad is None:
        return ()
    inputs, traced = saved[:5], saved[5:]
    options = {name: value for name, value in ctx.options.items() if name != "with_gradient"}
    places = reference_rows.differentiable(options["term"], inputs)
    gradients = [] if again else _take_gradient(ctx, primitives, traced, grad)
    if not gradients:
        gradients = primitives.rows_backward(grad, *inputs, **options)
    needed: list[Tensor | None] = [None] * 5
    for place, gradient in zip(places, gradients, strict=True):
        needed[place] = gradient if ctx.needs_input_grad[place] else None
    return tuple(needed)


def _rows_expression(*tensors: Tensor | None, with_gradient: bool, **options: Any) -> tuple[Tensor, ...]:
    value = reference_rows.rows_value(*tensors, **options)
    if not with_gradient:
        return (value,)
    return value, *reference.rows_backward(torch.ones_like(value), *tensors, **options)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def _reconstruction_expression(
    recon: Tensor, target: Tensor, *tensors: Tensor | None, with_gradient: bool, **options: Any
) -> tuple[Tensor, ...]:
    nll = reference_reconstruction.negative_log_likelihood(recon, target, *tensors, **options)
    if not with_gradient:
        return (nll,)
    return nll, *reference.reconstruction_backward(torch.ones_like(nll), recon, target, *tensors, **options)


def _latent_expression(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    mu, *others = tensors
    assert mu is not None
    return tuple(reference.latent_forward(mu, *others, **options))  # type: ignore[arg-type]


def _elbo_expression(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    scale: Tensor,
    *,
    log_scale: bool,
    low: float,
    high: float,
    beta: float,
    free_bits: float,
    **options: Any,
) -> tuple[Tensor, ...]:
    nll, *gradient = _reconstruction_expression(recon, target, **options)
    kl = reference_latent.gaussian_kl(mu, scale, None, None, log_scale, low, high, free_bits, options["reduction"])
    return (nll + beta * kl).to(nll.dtype), nll, kl, *gradient


RECONSTRUCTION = Op(  # (recon, target, parameter tensor, logits of zero, library)
    "reconstruction_forward",
    5,
    ("likelihood", "parameter", "reduction", "with_gradient"),
    1,
    _of_reconstruction,
    _reconstruction_expression,
    (0,),
    0,
)
LATENT = Op(  # (mu, scale, seed, prior_mu, prior_logvar) → z, kl, or both
    "latent_forward",
    5,
    ("log_scale", "low", "high", "samples", "free_bits", "reduction"),
    2,
    _of_latent,
    _latent_expression,
    code=1,
)
ELBO = Op(  # (recon, target, mu, scale) → loss, reconstruction, kl
    "elbo_forward",
    4,
    ("likelihood", "parameter", "log_scale", "low", "high", "beta", "free_bits", "reduction", "with_gradient"),
    3,
    _of_elbo,
    _elbo_expression,
    (0, 2, 3),
    2,
)
ROWS = Op(  # the tensors of a term of kernels/reference/rows.py
    "rows_forward",
    5,
    ("term", "channels", "channels_last", "unimix", "balance", "reduction", "with_gradient"),
    1,
    _of_rows,
    _rows_expression,
)
NATIVE, NATIVE_MISSING = _native()
_TRACED = {op.primitive: _traced(op) for op in (RECONSTRUCTION, LATENT, ELBO, ROWS)}


def register(op: Op) -> Op:
    """``op``, from now on one of those that :func:`apply` knows."""
    _TRACED[op.primitive] = _traced(op)
    return op


def one_pass(recon: Tensor, reduction: str, *tensors: Tensor | None) -> bool:
    """Whether the forward should write the gradient: it is wanted, and one number, or one an example, will scale it.

    Not in float16, where what a GradScaler multiplies by is there to keep the gradient from vanishing, and would come
    too late. By example only on CPUs, where looking at those numbers costs nothing, and where rounding twice does not
    count.
    """
    if reduction not in TOTAL_REDUCTIONS:
        exact = recon.dtype in (torch.float32, torch.float64)
        if reduction != "example" or not exact or not recon.is_cpu or ops.listened_to() or not len(recon):
            return False
    if recon.dtype == torch.float16 or not torch.is_grad_enabled():
        return False
    wanted = recon.requires_grad
    for tensor in tensors:  # not any(): each of those is two frames more of a small call
        if tensor is not None:
            if tensor.dtype == torch.float16:
                return False
            wanted = wanted or tensor.requires_grad
    return wanted
