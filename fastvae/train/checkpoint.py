"""A training run on disk: one safetensors file with weights, optimiser state and, as metadata, everything else.

One file, written beside the old one and moved over it, so that whatever happens there is a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

FILE = "checkpoint.safetensors"
FORMAT = "fastvae training checkpoint 1"
STATE = {"config": dict, "model_config": dict, "history": list, "scaler": dict, "data": str, "environment": dict}


class Checkpoint(NamedTuple):
    """``model`` and ``optimizer`` tensors by name, and ``state``: JSON (configuration, epoch, history, scalers)."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``; a crash leaves the old file or the new one."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` into ``folder``."""
    from safetensors.torch import save as to_bytes

    tensors = {f"model.{name}": value for name, value in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    state = json.dumps(checkpoint.state)
    metadata = {"format": FORMAT, "state": state, "sha256": _digest(tensors, state)}
    write_atomically(folder / FILE, to_bytes(tensors, metadata))


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    """SHA-256 of the state and of every tensor with its name, dtype and shape."""
    digest = hashlib.sha256(state.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(folder: Path, shards: bool = True) -> Checkpoint:
    """Read the checkpoint in ``folder``; where its tensors are in shards, those only if asked for.

    Raises:
        UserError: there is none, or it is damaged or of another program.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE}: it is not the output folder of a training run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a {FORMAT!r} file: it says {metadata.get('format')!r}")
    if "state" not in metadata:
        raise UserError(f"{path} is damaged: expected 'state' in its metadata, got {', '.join(sorted(metadata))}")
    # files of before the checksum have none
    if metadata.get("sha256", digest := _digest(tensors, metadata["state"])) != digest:
        raise UserError(f"{path} is damaged: expected SHA-256 {metadata['sha256'][:12]}…, got {digest[:12]}…")
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        if group not in groups:
            raise UserError(f"{path} is damaged: expected tensors of {' and '.join(groups)}, got {name}")
        groups[group][rest] = value
    state = _state(path, metadata["state"])
    if shards and "shards" in state:
        from .distributed import read_shards

        for name, value in read_shards(folder / state["shards"]).items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
    return Checkpoint(groups["model"], groups["optimizer"], state)


def _state(path: Path, text: str) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged: its state is not JSON: {error}") from None
    for name, kind in STATE.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{path} is damaged: its state has no {name} of type {kind.__name__}")
    epochs = [row.get("epoch") if isinstance(row, dict) else None for row in state["history"]]
    if epochs != list(range(1, len(epochs) + 1)):
        raise UserError(f"{path} is damaged: expected epochs 1 to {len(epochs)} in its history, got {epochs}")
    return dict(state)


def check_tensors(path: Path, what: str, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Raise a :class:`UserError` for the first tensor that is missing, unknown or of another dtype or shape."""
    for name in [*expected, *sorted(got.keys() - expected.keys())]:
        wanted, found = (_kind(tensors.get(name)) for tensors in (expected, got))
        if wanted != found:
            raise UserError(f"{path} does not fit its {what}: expected {name} to be {wanted}, got {found}")


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: ``"3.exp_avg"`` for its fourth parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def stepped_tensors(optimizer: str, parameters: list[Tensor]) -> dict[str, Tensor]:
    """What :func:`optimizer_tensors` gives after a step: names, dtypes and shapes."""
    like_weights = {"adam": ("exp_avg", "exp_avg_sq"), "adagrad": ("sum",), "sgd": ()}[optimizer]
    expected: dict[str, Tensor] = {}
    for index, value in enumerate(parameters):
        if like_weights:
            expected[f"{index}.step"] = torch.zeros(())
        expected |= {f"{index}.{name}": value for name in like_weights}
    return expected


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
