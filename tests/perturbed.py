"""The special-function units of a GPU, in Triton's interpreter: every result off by up to what NVIDIA documents.

PTX manual: ex2 and lg2 2⁻²² relative (lg2 absolute from ½ to 2), sqrt 2⁻²³, sin and cos 2⁻²⁰·⁵ absolute; div.full
2 ulp. tl.exp is ex2 of a product that has been rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def off(x: np.ndarray, bound: np.ndarray | float) -> np.ndarray:
    """``x`` plus something in ±bound that looks random and is the same for the same bits."""
    bits = x.view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    uniform = (bits >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1
    return np.where(np.isfinite(x) & (x != 0), x + uniform * bound, x).astype(np.float32)


def perturb() -> None:
    """Replace the interpreter's functions."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def one(
        function: Callable[..., np.ndarray], bound: Callable[..., np.ndarray | float]
    ) -> Callable[..., TensorHandle]:
        def call(_: InterpreterBuilder, *args: TensorHandle) -> TensorHandle:
            with np.errstate(all="ignore"):
                value = function(*(arg.data for arg in args))
                if value.dtype == np.float32:
                    value = off(value, bound(value, *(arg.data for arg in args)))
            return TensorHandle(value, args[0].dtype.scalar)

        return call

    def of_log2(value: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.where((x >= 0.5) & (x <= 2), 1, abs(value.astype(np.float64))) * 2.0**-22

    for name, function, bound in (
        ("exp2", np.exp2, lambda value, x: abs(value.astype(np.float64)) * 2.0**-22),
        ("exp", np.exp, lambda value, x: abs(value.astype(np.float64)) * (2.0**-22 + abs(x) * 2.0**-24)),
        ("log2", np.log2, of_log2),
        ("sqrt", np.sqrt, lambda value, x: value.astype(np.float64) * 2.0**-23),
        ("sin", np.sin, lambda value, x: 2.0**-20.5),
        ("cos", np.cos, lambda value, x: 2.0**-20.5),
        ("fdiv", np.divide, lambda value, x, y: abs(value.astype(np.float64)) * 2.0**-23),
    ):
        setattr(InterpreterBuilder, f"create_{name}", one(function, bound))
