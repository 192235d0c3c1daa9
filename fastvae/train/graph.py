"""A training step as one CUDA graph: recorded once, then launched whole, so that the host's time no longer counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: steps before the recording: what libraries set up at their first call must not be recorded
WARM_UP = 3


class GraphedStep:
    """Calls ``step`` with the indices of a batch: the first few times as it is, then by replaying a recording of it.

    Whatever ``step`` reads and writes besides must stay where it is between calls. A batch of another size than
    ``size`` is stepped as it is.

    Args:
        step: one whole training step on the examples of an int64 tensor of indices; it must not wait for the GPU.
        size: indices of a batch.
        device: a CUDA device.
        say: told in one line, once, if ``step`` cannot be recorded. Every step is then made as it is.
    """

    def __init__(
        self, step: Callable[[Tensor], None], size: int, device: torch.device, say: Callable[[str], None] = print
    ):
        self.step, self.say = step, say
        self.index = torch.zeros(size, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.left = WARM_UP

    def __call__(self, chosen: Tensor) -> None:
        """Make the step."""
        if len(chosen) != len(self.index) or self.left < 0:
            self.step(chosen)
            return
        self.index.copy_(chosen)
        if self.left:
            self.left -= 1
            self._aside()
            return
        if self.graph is None and not self._record():
            self.step(chosen)
            return
        self.graph.replay()  # type: ignore[union-attr]

    def _aside(self) -> None:
        """A step on another stream, as those that are recorded are."""
        stream = torch.cuda.Stream(self.index.device)
        stream.wait_stream(torch.cuda.current_stream(self.index.device))
        with torch.cuda.stream(stream):
            self.step(self.index)
        torch.cuda.current_stream(self.index.device).wait_stream(stream)

    def _record(self) -> bool:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.index.device), torch.cuda.graph(graph):
                self.step(self.index)
        except RuntimeError as error:
            self.left = -1
            self.say(f"no CUDA graph, each step is launched in parts: {str(error).strip().splitlines()[0]}")
            return False
        self.graph = graph
        return True
