"""Programs that leave Python: what to do where the operators of this library cannot come along.

| you call | what it holds | runs |
| --- | --- | --- |
| ``torch.export.export``, AOTInductor | the operators ``fastvae::…`` | where this library is imported |
| ``torch.onnx.export(model, …, dynamo=True)`` | ONNX's own operators | without it, in onnxruntime for instance |
| ``torch.jit.trace(model, …)`` | operations of torch, with their gradients | without it, in C++ for instance |
| ``torch.fx.symbolic_trace`` | a call of ``fastvae.…`` | where this library is imported |

Nothing is to be done for any of them. A program that was exported already is made free of the operators by
:func:`decompositions`. Values and gradients are those of the kernels to rounding. Noise that has a ``seed=`` is the
same noise everywhere; else the seed is drawn by the runtime. Data are not looked at: nothing raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from . import autograd, ops
from .kernels import reference


def decompositions() -> dict[Any, Callable[..., list[Tensor]]]:
    """Every operator as operations of torch: for ``torch.export.ExportedProgram.run_decompositions``.

    >>> import torch, fastvae
    >>> class Loss(torch.nn.Module):
    ...     def forward(self, mu, logvar):
    ...         return fastvae.gaussian_kl(mu, logvar)
    >>> program = torch.export.export(Loss(), (torch.ones(4, 2), torch.zeros(4, 2)))
    >>> "fastvae" in str(program.graph), "fastvae" in str(program.run_decompositions(decompositions()).graph)
    (True, False)
    """
    table: dict[Any, Callable[..., list[Tensor]]] = {}
    for op in (autograd.LATENT, autograd.RECONSTRUCTION, autograd.ELBO):
        table[ops.BY_NAME[op.primitive]] = _of_operator(op.expression)
    for name, operator in ops.BY_NAME.items():
        if name != "rescale_" and operator not in table:
            table[operator] = _of_operator(getattr(reference, name))
    return table


def _of_operator(expression: Callable[..., Iterable[Tensor]]) -> Callable[..., list[Tensor]]:
    def call(*tensors: Any, **options: Any) -> list[Tensor]:
        return list(expression(*tensors, **(ops.unbounded(options) if "low" in options else options)))

    return call
