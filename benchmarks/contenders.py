"""Who does a work: eager PyTorch in the forms people write, ``torch.compile`` of the first, every fastvae backend."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import backends, use_backend
from . import memory, training
from .ops import OPS, bytes_moved
from .timing import Call
from .works import TRAINING, Work

EAGER, COMPILE, GEMS, FLOOR = "eager", "torch.compile", "eager + FlagGems", "3-stream loop"
MAX_COPIES = 256


class Contender(NamedTuple):
    """``call`` does the work once. ``backend`` is set for those of fastvae; ``gems``: torch's kernels are FlagGems'."""

    call: Call
    backend: str | None = None
    gems: bool = False

    def context(self) -> contextlib.AbstractContextManager[None]:
        """What must be entered around its calls."""
        if self.gems:
            found: contextlib.AbstractContextManager[None] = importlib.import_module("flag_gems").use_gems()
            return found
        return contextlib.nullcontext() if self.backend is None else use_backend(self.backend)


def ours(backend: str, compiled: bool = False) -> str:
    """Name of the contender that is a backend of fastvae."""
    return f"fastvae {backend}" + (" + torch.compile" if compiled else "")


def serving(kind: str) -> list[str]:
    """Backends of fastvae that can run on this kind of device."""
    return [name for name, status in backends().items() if status.available and {kind, "any"} & set(status.devices)]


class UnavailableError(Exception):
    """This contender cannot run here; the message says why."""


class _Entry(NamedTuple):
    function: Callable[..., Any]
    backend: str | None = None
    compiled: bool = False
    gems: bool = False


def _entries(work: Work, kind: str) -> dict[str, _Entry]:
    if work.op == TRAINING:
        eager, own = {EAGER: training.eager_loss}, training.own_loss
    else:
        eager, own = OPS[work.op].eager, OPS[work.op].ours
    entries = {name: _Entry(form) for name, form in eager.items()}
    entries[COMPILE] = _Entry(eager[EAGER], compiled=True)
    if kind == "cuda" and importlib.util.find_spec("flag_gems"):
        entries[GEMS] = _Entry(eager[EAGER], gems=True)
    backends = serving(kind)
    entries |= {ours(name): _Entry(own, name) for name in backends}
    if work.op == TRAINING:
        entries |= {ours(name, compiled=True): _Entry(own, name, True) for name in backends if name != "torch"}
    return entries


def names(work: Work, kind: str) -> list[str]:
    """Everybody to be tried on ``work``, and last the floor where there is one."""
    return [*_entries(work, kind), *([FLOOR] if bytes_moved(work) else [])]


def contender(work: Work, device: str, name: str) -> Contender:
    """One of ``names``, after its first call.

    Raises:
        UnavailableError: it needs a compiler that is not there, or FlagGems cannot.
    """
    if name == FLOOR:
        return Contender(memory.three_stream(bytes_moved(work), device))
    entry = _entries(work, torch.device(device).type)[name]
    function = entry.function
    if entry.compiled:
        if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            raise UnavailableError("TORCH_COMPILE_DISABLE is set")
        function = torch.compile(function, fullgraph=True, dynamic=False)
    make = training.step if work.op == TRAINING else _op_call
    found = Contender(make(work, device, function), entry.backend, entry.gems)
    try:
        with found.context():
            found.call()
    except (RuntimeError, ImportError, OSError) as error:
        if not (entry.compiled or entry.gems):
            raise
        raise UnavailableError(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
    return found


def contenders(
    work: Work, device: str, wanted: Iterable[str] | None = None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Everybody (of ``wanted``) who can do ``work`` on ``device``, warm; and who cannot, with the reason."""
    torch._dynamo.reset()  # ``torch.compile`` gives up after eight versions of a function
    found, skipped = {}, {}
    for name in wanted or names(work, torch.device(device).type):
        try:
            found[name] = contender(work, device, name)
        except UnavailableError as reason:
            skipped[name] = str(reason)
    return found, skipped


class _Inputs(NamedTuple):
    tensors: list[Tensor]
    leaves: list[Tensor]
    upstream: tuple[Tensor | None, ...] | None


def _draw(work: Work, device: str, number: int) -> _Inputs:
    """Every contender gets the same numbers, from a seed."""
    op = OPS[work.op]
    generator = torch.Generator(device).manual_seed(number)
    tensors = op.inputs(work, generator)
    leaves = [tensors[k].requires_grad_(work.backward) for k in op.leaves]
    upstream: tuple[Tensor | None, ...] | None = None
    if op.returns_z:
        grad_z = torch.randn(tensors[0].shape, device=device, generator=generator).to(work.dtype)
        upstream = (grad_z, None) if work.op == "sample_with_kl" else (grad_z,)
    return _Inputs(tensors, leaves, upstream)


@functools.lru_cache(maxsize=1)
def _inputs(work: Work, device: str) -> list[_Inputs]:
    """One set on a CPU. On a GPU so many that a set has left the L2 cache when its turn comes again."""
    count = 1
    if torch.device(device).type == "cuda" and bytes_moved(work):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(MAX_COPIES, math.ceil(4 * cache / bytes_moved(work)) + 1)
    return [_draw(work, device, number) for number in range(count)]


def _op_call(work: Work, device: str, function: Callable[..., Any]) -> Call:
    rotation = itertools.cycle(_inputs(work, device))

    def forward() -> Any:
        return function(*next(rotation).tensors)

    def forward_and_backward() -> Any:
        inputs = next(rotation)
        return torch.autograd.grad(function(*inputs.tensors), inputs.leaves, inputs.upstream)

    return forward_and_backward if work.backward else forward
