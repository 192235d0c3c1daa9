"""What a GPU does and Triton's interpreter does not: ``mend`` rounds as the GPU does; ``perturb`` puts every result of
the special-function units off by up to what NVIDIA documents.

PTX manual: ex2 and lg2 2⁻²² relative (lg2 absolute from ½ to 2), sqrt 2⁻²³, sin and cos 2⁻²⁰·⁵ absolute; div.full
2 ulp. tl.exp is ex2 of a product that has been rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def off(x: np.ndarray, bound: np.ndarray | float) -> np.ndarray:
    """``x`` plus something in ±bound that looks random and is the same for the same bits."""
    bits = x.view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    uniform = (bits >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1
    return np.where(np.isfinite(x) & (x != 0), x + uniform * bound, x).astype(np.float32)


def mend() -> None:
    """Replace the interpreter's fma, which rounds twice, and its bfloat16, which truncates and has no subnormals.

    And its dot of bfloat16.
    """
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    convert = interpreter._convert_float

    def convert_as_torch(data: np.ndarray, source: Any, target: Any, rounding_mode: object) -> np.ndarray:
        if (source.name, target.name) == ("bf16", "fp32"):
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if (source.name, target.name) == ("fp32", "bf16"):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding_mode)

    def fma(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        wide = [arg.data.astype(np.float64) for arg in (x, y, z)]  # a product of float32 is exact there
        with np.errstate(all="ignore"):
            return TensorHandle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)

    def dot(
        _: InterpreterBuilder, a: TensorHandle, b: TensorHandle, sums: TensorHandle, *__: object
    ) -> TensorHandle:  # of bfloat16 it would multiply the bits
        wide = [
            convert_as_torch(t.data, t.dtype.scalar, tl.float32, None) if t.dtype.scalar == tl.bfloat16 else t.data
            for t in (a, b)
        ]
        return TensorHandle(np.matmul(*wide, dtype=np.float32) + sums.data, sums.dtype.scalar)

    InterpreterBuilder.create_fma = fma
    InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert_as_torch


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
