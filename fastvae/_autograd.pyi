# The compiled graph nodes, csrc/autograd/module.cpp.
from collections.abc import Callable
from typing import Any

def call(
    op: int, kernels: object, context: tuple[Any, ...], tensors: tuple[Any, ...], options: tuple[Any, ...]
) -> tuple[Any, ...] | None: ...
def connect(codes: dict[str, int], backward: Callable[..., Any], stream_of: Callable[[int], int]) -> None: ...
