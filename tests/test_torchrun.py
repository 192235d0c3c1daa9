"""``fastvae train`` by two processes: the run of one, resumed by any number, and what a lost process leaves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastvae import functional
from fastvae.errors import UserError
from fastvae.train import checkpoint, data, distributed, loop
from fastvae.train.config import Config
from fastvae.train.distributed import Parts, World
from fastvae.train.loop import Trainer, _mix, load_model

WORLD = 2
SMALL = ["--data", "digits", "--hidden", "32", "--latent", "2"]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and sys.platform.startswith("linux")), reason="no gloo"
)


def config(**changes: Any) -> Config:
    """Five epochs are 60 steps of 128 examples, the last of each epoch of 32."""
    return Config(**{"data": "digits", "hidden": 32, "latent": 2, "epochs": 5, "parts": WORLD, **changes})


def train(folder: Path, world: World = World(), resume: bool = False, **changes: Any) -> Trainer:  # noqa: B008
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config(**changes), folder, resume=resume, world=world)
    trainer.fit(say=lambda line: None)
    return trainer


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def as_rank(rank: int, port: str) -> dict[str, str]:
    """The variables of a launcher."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
    }  # fmt: skip


CVAE: dict[str, Any] = {"model": "cvae", "denoise": 0.2, "epochs": 1, "batch_size": 130}  # odd halves, dropout


def work(rank: int, folder: Path, port: str) -> None:
    """What one of the two processes does; the test process did what is resumed, and looks at what is left."""
    os.environ.update(as_rank(rank, port))
    torch.set_num_threads(1)
    read_here = []
    load, loop.load = loop.load, lambda *of: read_here.append(of) or load(*of)
    with distributed.join("cpu", fsdp=False) as world:
        sharded = replace(world, fsdp=True)
        assert world == World(rank, WORLD, rank)
        train(folder / "ddp", world)
        assert bool(read_here) == (rank == 0), "one process reads the data"
        train(folder / "cvae", world, **CVAE)
        train(folder / "begun by one, ddp", world, resume=True)
        train(folder / "fsdp", sharded, epochs=2)
        train(folder / "fsdp", sharded, resume=True, epochs=3)
        train(folder / "begun by one, fsdp", sharded, resume=True)
        train(folder / "fp16 fsdp", sharded, epochs=1, precision="fp16")
        try:
            with world.together():
                if rank == 1:
                    raise UserError("wrong with the second only")
        except (UserError, SystemExit) as ended:
            (folder / f"ended{rank}").write_text(repr(ended))
        said = [distributed.first_to_say(UserError("wrong with all"))]
        assert sorted(world.gather(said)) == [[False], [True]], "one of them says it"
    distributed.end(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "begun by one, ddp", epochs=2)
    shutil.copytree(folder / "begun by one, ddp", folder / "begun by one, fsdp")
    torch.multiprocessing.spawn(work, (folder, free_port()), nprocs=WORLD)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, which computes a batch in two parts."""
    folder = tmp_path_factory.mktemp("one")
    train(folder)
    return folder


def assert_same_run(got: Path, want: Path) -> None:
    """To 1e-6: the processes add up gradients in another order, float32 keeps seven digits."""
    a, b = checkpoint.load(got), checkpoint.load(want)
    assert a.model.keys() == b.model.keys()
    for name, value in (a.model | a.optimizer).items():
        other = (b.model | b.optimizer)[name]
        assert (value - other).norm() <= 1e-6 * other.norm(), name
    for row, other in zip(a.state["history"], b.state["history"], strict=True):
        speed = {"examples_per_second": 0}
        assert {**row, **speed} == pytest.approx({**other, **speed}, rel=1e-6)


@pytest.mark.parametrize("name", ["ddp", "begun by one, ddp", "begun by one, fsdp"])
def test_two_processes_train_as_one(runs: Path, one: Path, name: str) -> None:
    assert_same_run(runs / name, one)


def test_dropout_noise_on_inputs_and_odd_parts_too(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, **CVAE)
    assert_same_run(runs / "cvae", tmp_path)


def test_shards_of_two_are_resumed_by_one(runs: Path, one: Path) -> None:
    assert [p.name for p in (runs / "fsdp").glob("shards-*")] == ["shards-000003"], "the one that is named, no other"
    model, state = load_model(runs / "fsdp")
    assert len(state["history"]) == 3
    assert all(p.isfinite().all() for p in model.parameters())
    train(runs / "fsdp", resume=True)
    assert_same_run(runs / "fsdp", one)
    assert not list((runs / "fsdp").glob("shards-*"))


def test_float16_is_scaled_by_all_alike(runs: Path) -> None:
    (last,) = checkpoint.load(runs / "fp16 fsdp").state["history"]
    assert last["test_loss"] < 70, "before training it is 45 for the reconstruction alone, and 64·log 2"


def test_what_is_wrong_for_one_ends_all(runs: Path) -> None:
    assert (runs / "ended1").read_text() == "UserError('wrong with the second only')"
    assert (runs / "ended0").read_text() == "SystemExit(1)"


def test_parts_are_the_whole_batch_with_the_noise_of_each(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process takes each batch at once; only where its noise comes from is told to it."""
    streams: list[torch.Generator] = []

    def seed(_: Parts, of_stream: Callable[[int], int]) -> None:
        streams[:] = [torch.Generator().manual_seed(of_stream(stream)) for stream in (0, 3)]

    def of_halves(mu: torch.Tensor, logvar: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return draw(mu, logvar, **options)
        halves = zip(mu.tensor_split(2), logvar.tensor_split(2), streams, strict=True)
        return torch.cat([draw(m, v, generator=stream) for m, v, stream in halves])

    draw = functional.reparameterize
    monkeypatch.setattr(functional, "reparameterize", of_halves)
    monkeypatch.setattr(Parts, "seed", seed)
    train(tmp_path, parts=1)
    assert_same_run(tmp_path, one)


def test_parts_have_noise_of_their_own() -> None:
    drawn = []
    for world, part in ((World(0, 2), 0), (World(1, 2), 1), (World(), None)):
        parts = Parts(world, 2, torch.device("cpu"))
        parts.seed(lambda stream: _mix(0, 0, stream))
        z = [functional.reparameterize(torch.zeros(64, 64), torch.zeros(64, 64)) for _ in parts.of(torch.arange(128))]
        drawn += z if part is None else [z[0]]
    first, second = drawn[:2]
    assert torch.equal(first, drawn[2]) and torch.equal(second, drawn[3]), "whatever process computes them"  # noqa: PT018
    assert (first * second).mean().abs() < 5 / 64, "five standard errors"


@pytest.mark.parametrize(
    ("world", "asked", "changes", "message"),
    [
        (3, False, {}, "--batch-size must be a multiple of the number of processes, 3, got 128"),
        (2, True, {"parts": 3}, "--parts must be a multiple of the number of processes, 2, got 3"),
        (1, True, {"parts": 3}, "--batch-size must be a multiple of the number of parts it is computed in, 3, got 128"),
    ],
)
def test_what_does_not_divide_is_named(world: int, asked: bool, changes: dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        distributed.parts_of(config(**changes), World(size=world), asked)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": ""}, "expected all of them, got no MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE, 2, got 2"),
        ({}, "rank 0 waited 1 s for the 2 processes that WORLD_SIZE says, at 127.0.0.1:"),
    ],
)
def test_a_missing_process_or_variable_is_named(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (as_rank(0, free_port()) | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised, distributed.join("cpu", fsdp=False, timeout=1):
        pass
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_machines_with_different_data_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(_: World, value: Any) -> list[Any]:
        return [value, value and value._replace(node=1, fingerprint="0" * 64)]

    monkeypatch.setattr(World, "gather", gather)
    monkeypatch.setattr(World, "together", lambda _: contextlib.nullcontext())
    with pytest.raises(UserError, match=r"the machines have different data: .* one SHA-256, got 000000000000… and"):
        distributed.load_shared(lambda: data.load("digits"), World(0, 2))


def test_mapped_data_are_the_data() -> None:
    whole = data.load("digits")
    whole = whole._replace(test=whole.test._replace(images=whole.test.images / 255))  # of another dtype
    shared = distributed._write(whole, 0)
    try:
        mapped = distributed._map(shared)
    finally:
        os.unlink(shared.path)
    assert mapped.fingerprint == whole.fingerprint
    assert torch.equal(mapped.test.images, whole.test.images)
    assert torch.equal(mapped.test.labels, whole.test.labels)


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    """``kill -9`` of the second process: the first ends with a line, and its checkpoint is whole."""
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "fastvae", "train"]
    command = [*launch, *SMALL, "--epochs", "5000", "--output", str(folder)]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
            time.sleep(0.02)
        second = next(
            pid for pid in children(launcher.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        os.kill(second, signal.SIGKILL)
        _, stderr = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    said = "lost another process", "another process has ended"
    lines = [line for line in stderr.splitlines() if any(text in line for text in said)]
    assert len(lines) == 1, stderr
    assert "--resume" in stderr
    done = len(checkpoint.load(folder).state["history"])
    assert done >= 2
    Trainer(Config(**{**checkpoint.load(folder).state["config"], "epochs": done + 1}), folder, resume=True).fit()
    assert len(checkpoint.load(folder).state["history"]) == done + 1
