"""Several processes that train one model: ``torchrun --nproc-per-node=N -m fastvae train …``.

A batch is computed in *parts*, each with random numbers of its own, and a process takes one part or several. So the
number of processes is no part of the result: 8 parts give the same numbers, to rounding, on 8 processes, on 2 and on 1.

Bytes on the wire, for P bytes of float32 weights and N processes: DDP sends and receives 2P(N-1)/N a process and step
(the gradients, in a ring), FSDP2 3P(N-1)/N (weights for the forward, weights for the backward, gradients), each
whatever the batch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError
from . import checkpoint
from .config import Config
from .data import Data, Split

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 50  # seconds without a word from another process
SHARDS = "shards"  # in a checkpoint's state: the folder of its tensors
ALIGNED = 64  # bytes: where a tensor of the shared file begins
LOST = re.compile("gloo|nccl|TCPStore|ProcessGroup|Connection (closed|reset)", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them; ``World()`` is a process by itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: int = 0
    #: weights, gradients and optimiser state are sharded over the processes (FSDP2)
    fsdp: bool = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is wrong for one process inside the ``with`` block ends all of them, and one says it."""
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = error
        found = self.gather(mistake and str(mistake))
        first = next((rank for rank, text in enumerate(found) if text), None)
        if mistake is not None and self.rank == first:
            raise mistake
        if first is not None:
            raise SystemExit(1)

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """``value`` of the first process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def add(self, sums: Tensor) -> Tensor:
        """``sums`` of all processes, in place."""
        if self.size > 1:
            dist.all_reduce(sums)
        return sums

    def turns(self, count: int) -> Iterator[tuple[int, bool]]:
        """Which of ``count`` items this process looks at, and whether it counts.

        As many for each process, since FSDP's forward takes all of them: the last item is looked at again.

        >>> [list(World(rank, 2).turns(3)) for rank in range(2)]
        [[(0, True), (2, True)], [(1, True), (2, False)]]
        """
        for start in range(self.rank, -(-count // self.size) * self.size, self.size):
            yield min(start, count - 1), start < count


# --- starting and ending


def launched() -> bool:
    """Whether torchrun, or another launcher with its variables, started this process."""
    return any(name in os.environ for name in VARIABLES[:2])


@contextlib.contextmanager
def join(device: str, *, fsdp: bool, timeout: float = TIMEOUT) -> Iterator[World]:
    """Meet the other processes, which train on ``device``; yields the :class:`World`.

    Raises:
        UserError: a launcher's variable is missing or wrong, a process is, or one is lost on the way.
    """
    if not launched():
        if fsdp:
            raise UserError("--fsdp goes with several processes: torchrun --nproc-per-node=N -m fastvae train --fsdp")
        yield World()
        return
    if not timeout > 0:
        raise UserError(f"--timeout must be > 0 seconds, got {timeout:g}")
    world, where = _world(fsdp), "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and device.startswith(("auto", "cuda")) else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {world.rank} waited {timeout:g} s for the {world.size} processes that WORLD_SIZE says, at {where}: "
            f"expected all of them, got fewer ({_first_line(error)})"
        ) from None
    with _losses_named(world, timeout):
        yield world
        dist.destroy_process_group()


class LostProcessError(UserError):
    """Another process of the run is gone."""


@contextlib.contextmanager
def _losses_named(world: World, timeout: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which ends the others for the same reason
        raise LostProcessError(
            f"rank {world.rank} of {world.size} lost another process: it has ended, or not answered for {timeout:g} s "
            f"({_first_line(error)}); the last checkpoint is whole: start again with --resume"
        ) from None


def _first_line(error: BaseException) -> str:
    """The end of a library's message that a person can use.

    >>> _first_line(RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4242. This…"))
    'Connection closed by peer [::1]:4242'
    """
    line = re.sub(r"^(\[[^\]]*\]\s*)+", "", str(error).strip().splitlines()[0])
    return line.split(". ")[0].removesuffix(".")


def _world(fsdp: bool) -> World:
    """What the launcher's variables say."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(f"a launcher sets {', '.join(VARIABLES)}: expected all of them, got no {', '.join(missing)}")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        text = os.environ.get(name, os.environ["RANK"] if name == "LOCAL_RANK" else "0")
        if not text.isdecimal():
            raise UserError(f"{name} must be a number, got {text!r}")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= size:
        raise UserError(f"RANK must be below WORLD_SIZE, {size}, got {rank}")
    return World(rank, size, numbers["LOCAL_RANK"], numbers["GROUP_RANK"], fsdp)


def own_device(name: str, world: World) -> str:
    """The GPU of this process, where ``name`` asks for GPUs and there are several processes."""
    if world.size == 1 or not torch.cuda.is_available() or not name.startswith(("auto", "cuda")):
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} is one GPU for {world.size} processes: expected cuda, which is one for each")
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise UserError(f"--device cuda: expected a GPU for each process of this machine, got {count} GPUs")
    torch.cuda.set_device(world.local_rank)
    return f"cuda:{world.local_rank}"


def first_to_say(what: BaseException) -> bool:
    """Whether no other process has said so: what goes wrong for all is one line, not one for each."""
    message = type(what).__name__ if isinstance(what, LostProcessError | KeyboardInterrupt) else str(what)
    if not (dist.is_available() and dist.is_initialized()):
        return True
    with contextlib.suppress(RuntimeError):  # whoever held the store is gone
        return dist.distributed_c10d._get_default_store().add(f"fastvae said {message}", 1) == 1
    return True


def end(code: int) -> NoReturn:
    """End this process now.

    Gloo's threads outlive their group; one that still has a tensor to drop when Python ends aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- the parts of a batch


class Piece(NamedTuple):
    """Some rows of a batch, what share of it they are, and what their mean loss is to be multiplied by."""

    rows: Tensor
    share: float
    factor: float


def parts_of(config: Config, world: World, asked: bool) -> int:
    """In how many parts a batch of ``config`` is computed: as ``asked``, or as before where the processes divide that.

    Raises:
        UserError: the processes do not divide the parts, or the parts not the batch.

    >>> parts_of(Config(parts=8), World(size=2), asked=False)
    8
    >>> parts_of(Config(), World(size=2), asked=False)
    2
    """
    parts, size = config.parts, world.size
    if parts % size:
        if asked:
            raise UserError(f"--parts must be a multiple of the number of processes, {size}, got {parts}")
        parts = size
    if config.batch_size % parts:
        what = "processes" if parts == size else "parts it is computed in"
        raise UserError(f"--batch-size must be a multiple of the number of {what}, {parts}, got {config.batch_size}")
    return parts


class Parts:
    """This process's parts of each batch, each with its own stream of random numbers."""

    def __init__(self, world: World, count: int, device: torch.device, module: nn.Module | None = None):
        each = count // world.size
        self.world, self.count, self.device, self.module = world, count, device, module
        self.mine = range(world.rank * each, (world.rank + 1) * each)
        self.states: dict[int, list[Tensor]] = {}

    def seed(self, of_stream: Any) -> None:
        """Start the streams: ``of_stream(k)`` is the seed of stream k; 1 and 2 are not for parts."""
        for part in self.mine:
            torch.manual_seed(of_stream(part and part + 2))
            self.states[part] = self._state()

    def of(self, index: Tensor) -> Iterator[Piece]:
        """The pieces of the batch ``index``, in turn; gradients are exchanged with the last."""
        rows = index.tensor_split(self.count)
        filled = [part for part in self.mine if len(rows[part])]
        for part in filled:
            share = len(rows[part]) / len(index)
            with self._stream(part), self._exchange(part == filled[-1]):
                yield Piece(rows[part], share, share * self.world.size)
        if not filled:  # the others wait for gradients, if only zeros
            yield Piece(index[:1], 0.0, 0.0)

    @contextlib.contextmanager
    def _stream(self, part: int) -> Iterator[None]:
        if len(self.mine) == 1:
            yield
            return
        state = self.states[part]
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)
        yield
        self.states[part] = self._state()

    def _state(self) -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            return self.module.no_sync()
        if self.world.fsdp and self.module is not None:
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()


# --- the model


class LossOf(nn.Module):
    """A model's loss as a ``forward``, which is what DDP and FSDP watch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As ``model.loss``."""
        loss: Any = self.model.loss
        return loss(*inputs, **options)


def spread(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The loss of ``model``, whose gradients are the mean over all processes."""
    loss_of = LossOf(model)
    if world.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world.size,))
        for layer in model.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(loss_of, mesh=mesh)
        return loss_of
    if world.size > 1:
        return nn.parallel.DistributedDataParallel(loss_of, device_ids=[device] if device.type == "cuda" else None)
    return loss_of


# --- the data


class Shared(NamedTuple):
    """What the process that reads tells the others: of which machine, and in which file lies what."""

    node: int
    path: str
    name: str
    tensors: list[tuple[torch.dtype, list[int]]]
    fingerprint: str


def load_shared(load: Callable[[], Data], world: World) -> Data:
    """What ``load`` reads, called by one process of each machine, and mapped into the memory of the others.

    Raises:
        UserError: it cannot be read, or machines have different data.
    """
    if world.size == 1:
        return load()
    written = None
    with world.together():
        if world.local_rank == 0:
            written = _write(load(), world.node)
    try:
        with world.together():
            of_node = {shared.node: shared for shared in world.gather(written) if shared is not None}
            prints = sorted({shared.fingerprint for shared in of_node.values()})
            if len(prints) > 1:
                raise UserError(
                    "the machines have different data: expected training data of one SHA-256, "
                    f"got {' and '.join(f'{text[:12]}…' for text in prints)}"
                )
            if world.node not in of_node:
                raise UserError(f"rank {world.rank}: expected a process of LOCAL_RANK 0 on its machine, got none")
            return _map(of_node[world.node])  # all of them have, when the block ends
    finally:
        if written is not None:
            os.unlink(written.path)
    raise AssertionError


def _write(data: Data, node: int) -> Shared:
    """The bytes of ``data`` in a file for the other processes of this machine."""
    tensors = [tensor.contiguous() for split in (data.train, data.test) for tensor in split]
    try:
        with tempfile.NamedTemporaryFile(prefix="fastvae.", delete=False) as file:
            for tensor in tensors:
                file.write(tensor.numpy().data)
                file.write(bytes(-tensor.nbytes % ALIGNED))
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()} cannot take the data that processes share: {error.strerror or error}; "
            "TMPDIR names another folder"
        ) from None
    return Shared(node, file.name, data.name, [(t.dtype, list(t.shape)) for t in tensors], data.fingerprint)


def _map(shared: Shared) -> Data:
    """What :func:`_write` wrote, as memory that the processes of this machine share."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shared.tensors]
    held = [size + -size % ALIGNED for size in sizes]
    try:
        everything = torch.from_file(shared.path, shared=True, size=sum(held), dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(f"{shared.path} cannot be mapped: {_first_line(error)}") from None
    train_images, train_labels, test_images, test_labels = (
        part[:size].view(dtype).view(shape)
        for part, size, (dtype, shape) in zip(everything.split(held), sizes, shared.tensors, strict=True)
    )
    return Data(shared.name, Split(train_images, train_labels), Split(test_images, test_labels))


# --- checkpoints: one file by the first process, or with FSDP a folder of shards that the file names


def save(world: World, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint; whatever happens on the way, the last one stays whole."""
    shards = f"{SHARDS}-{len(state['history']):06d}" if world.fsdp else None
    tensors = checkpoint.optimizer_tensors(optimizer)
    if shards is not None:
        import torch.distributed.checkpoint as dcp

        if world.first:
            shutil.rmtree(folder / shards, ignore_errors=True)  # of a run that ended in the middle of it
        world.gather(None)
        with _dcp_errors(folder / shards, "written"):
            dcp.save(_named(model.state_dict(), tensors), checkpoint_id=folder / shards)
    if world.first:
        saved = ({}, {}, {**state, SHARDS: shards}) if shards else (model.state_dict(), tensors, state)
        checkpoint.save(folder, checkpoint.Checkpoint(*saved))
        for old in folder.glob(f"{SHARDS}-*"):
            if old.name != shards:
                shutil.rmtree(old, ignore_errors=True)


def read(world: World, folder: Path, model: nn.Module) -> checkpoint.Checkpoint:
    """The checkpoint in ``folder``, of any number of processes, sharded as ``model`` is. The first reads the file."""
    saved = None
    with world.together():
        if world.first:
            saved = checkpoint.load(folder, shards=not world.fsdp)
    saved = world.from_first(saved)
    assert saved is not None
    if not world.fsdp:
        return saved
    if SHARDS not in saved.state:
        full = _named(saved.model, saved.optimizer)
        return _grouped({name: _shard(value, _like(name, value, model)) for name, value in full.items()}, saved.state)
    with world.together():
        return _grouped(read_shards(folder / saved.state[SHARDS], model), saved.state)
    raise AssertionError


def read_shards(path: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors of the shards in ``path``: whole, by this process alone, or sharded as ``model`` is, by all together.

    What is there but not in ``model``, or of another shape, is read whole.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    tensors: dict[str, Tensor] = {}
    with _dcp_errors(path, "read"):
        for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                tensors[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
                like = None if model is None else _like(name, tensors[name], model)
                tensors[name] = tensors[name] if like is None else torch.zeros_like(like, dtype=tensors[name].dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in a single process", UserWarning)  # which is what is asked for
            dcp.load(tensors, checkpoint_id=path, no_dist=model is None)
    return tensors


def _like(name: str, value: Tensor, model: nn.Module) -> Tensor | None:
    """The parameter of ``model`` that the tensor ``name`` of a checkpoint is, or is the optimiser's state of."""
    group, _, rest = name.partition(".")
    if group == "model":
        like = model.state_dict().get(rest)
    else:
        index, parameters = rest.partition(".")[0], list(model.parameters())
        like = parameters[int(index)].detach() if index.isdecimal() and int(index) < len(parameters) else None
    return like if like is not None and like.shape == value.shape else None


@contextlib.contextmanager
def _dcp_errors(path: Path, what: str) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise UserError(f"{path} cannot be {what}: {causes[0] if causes else error}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be {what}: {getattr(error, 'strerror', None) or error}") from None


def _named(model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{n}": t for n, t in model.items()} | {f"optimizer.{n}": t for n, t in optimizer.items()}


def _grouped(tensors: dict[str, Tensor], state: dict[str, Any]) -> checkpoint.Checkpoint:
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = value
    return checkpoint.Checkpoint(groups["model"], groups["optimizer"], state)


def _shard(value: Tensor, like: Tensor | None) -> Tensor:
    """``value``, which all processes have, as a DTensor where ``like`` is one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
