"""Other libraries' models on the fused kernels: one module a library, which imports it only when it is called."""

import importlib
from types import ModuleType

from torch import nn

_MODULES = ("diffusers", "pythae", "scvi")


def __getattr__(name: str) -> ModuleType:
    """``fastvae.integrations.scvi`` without an import of its own."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def what_came(given: object) -> str:
    """How an error names what is no model that can be patched, and what to give instead where that is plain."""
    if isinstance(given, type):
        return f"the class {given.__name__}: give an instance of it"
    if hasattr(given, "_orig_mod"):
        return f"what torch.compile makes of {type(given._orig_mod).__name__}: patch the model, then compile it"
    name = type(given).__name__
    if isinstance(given, str):
        return f"the name {given!r}: load the model first"
    if isinstance(given, nn.Module) and isinstance(getattr(given, "module", None), nn.Module):
        return f"{name}, which wraps a {type(given.module).__name__}: patch the model, then wrap it"
    if hasattr(given, "model"):
        return f"{name}: patch its model"
    if hasattr(given, "parameters") and hasattr(given, "mode"):
        return f"the posterior {name}: give the model"
    return name
