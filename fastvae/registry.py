"""Which implementation of the kernel primitives serves a tensor, and why the others do not.

Nothing is imported until a tensor of its kind shows up, or until somebody asks with ``backends()``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """One implementation: where it lives, which device types it serves, what it needs."""

    module: str
    devices: tuple[str, ...]  # empty: every device
    needs: str


class BackendStatus(NamedTuple):
    """What ``backends()`` tells about one backend; ``reason`` says why it is not available, else is empty."""

    devices: tuple[str, ...]
    available: bool
    reason: str


BACKENDS: dict[str, Backend] = {
    "torch": Backend("fastvae.kernels.reference", (), "torch"),
    "numba": Backend("fastvae.kernels.numba", ("cpu",), "numba"),
    "triton": Backend("fastvae.kernels.triton", ("cuda",), "triton"),
    "cpp": Backend("fastvae.kernels.compiled.cpp", ("cpu",), "the compiled extension"),
    "cuda": Backend("fastvae.kernels.compiled.cuda", ("cuda",), "the compiled extension"),
}

DEFAULTS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "numba"),
    "cuda": ("cuda", "triton"),
}

_forced: ContextVar[str | None] = ContextVar("fastvae_backend", default=os.environ.get("FASTVAE_BACKEND") or None)


@functools.cache
def load(name: str) -> ModuleType | str:
    """The module of backend ``name``, or why it cannot be had."""
    try:
        module = importlib.import_module(BACKENDS[name].module)
    except ImportError as error:
        return f"{BACKENDS[name].needs} cannot be imported: {error}"
    return getattr(module, "UNAVAILABLE", "") or module


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with the device types it serves and, if it cannot run here, why.

    >>> import fastvae
    >>> fastvae.backends()["torch"].available
    True
    """
    loaded = {name: load(name) for name in BACKENDS}
    return {
        name: BackendStatus(_devices(name) or ("any",), isinstance(loaded[name], ModuleType), _reason(loaded[name]))
        for name in BACKENDS
    }


def _devices(name: str) -> tuple[str, ...]:
    """Device types it serves: the module may know better than the table (Triton's interpreter serves CPUs)."""
    devices: tuple[str, ...] = getattr(load(name), "DEVICES", BACKENDS[name].devices)
    return devices


def _reason(loaded: ModuleType | str) -> str:
    return loaded if isinstance(loaded, str) else ""


class use_backend(contextlib.ContextDecorator):  # noqa: N801  (called like torch.set_grad_enabled)
    """Run every op from here on, in this thread, on one backend; in a ``with`` block, until it ends.

    Args:
        name: ``"torch"``, ``"numba"``, …: a key of :func:`backends`. For a whole process, set ``FASTVAE_BACKEND``: what
            activation checkpointing recomputes on a GPU runs in a thread of autograd's own.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it cannot run on this machine; or, from an op, it does not serve the device.

    >>> import torch, fastvae
    >>> with fastvae.use_backend("torch"):
    ...     fastvae.gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
    tensor(1.5000)
    """

    def __init__(self, name: str):
        module = load(_known(name))
        if isinstance(module, str):
            raise RuntimeError(f"backend {name!r} is not available: {module}")
        self.name, self.previous = name, _forced.get()
        _forced.set(name)

    def __enter__(self) -> None:
        _forced.set(self.name)

    def __exit__(self, *_: object) -> None:
        _forced.set(self.previous)

    def __call__(self, function: Any) -> Any:
        """As a decorator: only inside ``function``."""
        _forced.set(self.previous)
        return super().__call__(function)

    def _recreate_cm(self) -> use_backend:
        return use_backend(self.name)


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """``use_backend`` for a name that was checked; None for each device's default."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


#: ``asked_for()`` is the backend ``use_backend`` or ``FASTVAE_BACKEND`` names, in this thread, or None
asked_for = _forced.get


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def backend_name(device_type: str) -> str:
    """Name of the backend that serves tensors of ``device_type`` now."""
    return _forced.get() or _default(device_type)


@functools.cache
def _default(device_type: str) -> str:
    names = (name for name in DEFAULTS.get(device_type, ()) if isinstance(load(name), ModuleType))
    return next(names, "torch")


def backend_for(device_type: str) -> ModuleType:
    """The module whose primitives serve tensors of ``device_type`` now.

    Raises:
        RuntimeError: the backend asked for by ``use_backend`` or ``FASTVAE_BACKEND`` cannot.
    """
    return _serving(_forced.get(), device_type)


@functools.cache
def _serving(forced: str | None, device_type: str) -> ModuleType:
    name = forced or _default(device_type)
    module = load(_known(name))
    if isinstance(module, str):
        raise RuntimeError(f"backend {name!r} is not available: {module}")
    devices = _devices(name)
    if devices and device_type not in devices:
        raise RuntimeError(f"backend {name!r} serves tensors on {', '.join(devices)}, got one on {device_type}")
    return module
