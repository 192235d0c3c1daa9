"""Training a reference model: the loop, its bookkeeping, and nothing a user's own loop could not do with the ops.

Everything random in an epoch follows from (seed, epoch): a run resumed after any epoch continues to the same bits.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.likelihoods import LIKELIHOODS, OF_IMAGES, Domain
from ..models import MODELS, AutoEncoder, GaussianVAE, build
from ..registry import backend_name
from . import checkpoint, distributed
from .config import OPTIMIZERS, PRECISIONS, Config
from .corrupt import salt_and_pepper, seen
from .data import Data, Split, batches, load
from .distributed import Parts, World
from .graph import GraphedStep

TEST_BATCH = 1000
Progress = Callable[[int, int, dict[str, float]], None]
Say = Callable[[str], None]
__all__ = ["Trainer", "environment", "load_data", "load_model", "make_model", "resumed_config", "salt_and_pepper"]


def load_data(config: Config) -> Data:
    """The images of ``config``, those it holds out left out of the training."""
    data = load(config.data, config.data_root)
    return data if config.hold_out is None else data.without(config.hold_out)


def make_model(config: Config, data: Data, device: torch.device | str = "cpu") -> AutoEncoder:
    """The model of ``config`` for images of ``data`` on ``device``, initialised from its seed.

    Raises:
        UserError: the memory of the device cannot hold it.
    """
    takes = inspect.signature(MODELS[config.model]).parameters
    options: dict[str, Any] = {name: getattr(config, name) for name in takes if hasattr(config, name)}
    options["data_shape"] = data.shape
    if "classes" in takes:
        options["classes"] = data.classes
    _check_data(config, data)
    asked = f"--latent {config.latent} and --hidden {config.hidden} make a model too large"
    memory = _memory(torch.device(device))
    try:
        with torch.device("meta"):
            size = sum(p.nbytes for p in build(config.model, options).parameters())
        if 4 * size > memory:  # weights, gradients and Adam's two moments
            raise UserError(f"{asked}: expected at most {memory / 1e9:,.0f} GB of memory, got {4 * size / 1e9:,.0f} GB")
        torch.manual_seed(config.seed)
        return build(config.model, options).to(device)
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:
        raise UserError(f"{asked}: {str(error).splitlines()[0]}") from None


def _check_data(config: Config, data: Data) -> None:
    """A likelihood of [0, 1] is not for data beyond."""
    highest = 0.0 if data.train.images.dtype == torch.uint8 else float(data.train.images.max())
    domain = LIKELIHOODS[config.likelihood].target_domain
    if domain is Domain.UNIT and highest > 1:
        others = ", ".join(name for name in OF_IMAGES if LIKELIHOODS[name].target_domain is not Domain.UNIT)
        raise UserError(
            f"--data {config.data} goes up to {highest:.3g}: expected --likelihood {others}, got {config.likelihood}"
        )


def _memory(device: torch.device) -> float:
    """Bytes of memory of ``device``, or infinity where nothing tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


class Trainer:
    """One run: a model, its data and its folder. ``fit`` trains to the end; a new Trainer can resume it.

    With ``graph`` a step is a CUDA graph, where it can be one. Each process of a ``world`` has its own Trainer.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        device: str = "cpu",
        *,
        resume: bool = False,
        graph: bool = False,
        world: World = World(),  # noqa: B008  (frozen)
    ):
        self.config, self.folder, self.device, self.world = config, folder, torch.device(device), world
        self.data = distributed.load_shared(lambda: load_data(config), world)
        # several processes share one copy, which stays where it is
        where = self.device if world.size == 1 else torch.device("cpu")
        self.train, self.test = self.data.train.to(where), self.data.test.to(where)
        self.model = make_model(config, self.data, device)
        self.loss_of = distributed.spread(self.model, world, self.device)
        self.parts = Parts(world, config.parts, self.device, self.loss_of)
        self.graph, self.ungraphed = graph, self._why_not_graphed() if graph else ""
        recorded = self.graph and not self.ungraphed
        # a recorded step counts its steps on the GPU; one kernel updates all parameters
        adam: dict[str, Any] = {"capturable": recorded, "fused": recorded or None} if config.optimizer == "adam" else {}
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[config.optimizer](
            self.model.parameters(), lr=config.learning_rate, **adam
        )
        self.terms = self.model.terms
        each = [f"{split}_{term}" for split in ("train", "test") for term in self.terms]
        self.columns = ("epoch", *each, "beta", "examples_per_second")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.beta = torch.zeros((), device=self.device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.history: list[dict[str, float]] = []
        if resume:
            self._restore(distributed.read(world, folder, self.model))

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.history)

    @cached_property
    def fingerprint(self) -> str:
        """Of the data, computed once."""
        return self.data.fingerprint

    def _why_not_graphed(self) -> str:
        if self.device.type != "cuda":
            return f"no CUDA graph on {self.device}, each step is launched in parts"
        if self.config.optimizer == "adagrad":
            return "no CUDA graph with --optimizer adagrad, which counts its steps on the CPU: launched in parts"
        if self.config.precision == "fp16":
            return "no CUDA graph with --precision fp16, whose scaler waits for the GPU: each step is launched in parts"
        if self.world.size > 1 or self.config.parts > 1:
            return "no CUDA graph of a batch in several parts: each step is launched in parts"
        return ""

    def fit(self, progress: Progress = lambda *_: None, say: Say = print) -> None:
        """Train until ``config.epochs`` are complete, with a checkpoint after each.

        ``progress(epoch, examples, numbers)`` is called about ten times a second; ``say(line)`` where a step cannot be
        the graph that was asked for.
        """
        step: Callable[[Tensor], None] = self._step
        if self.ungraphed:
            say(self.ungraphed)
        elif self.graph:
            step = GraphedStep(step, min(self.config.batch_size, len(self.train.images)), self.device, say)
        if self.history:
            if self.world.first:
                self._write_metrics()  # a kill between the checkpoint and this file lost its last row
        else:
            self.save()
        for epoch in range(self.epoch, self.config.epochs):
            train, rate = self._train_epoch(epoch, step, progress)
            test = self.evaluate()
            row = (epoch + 1, *train.values(), *test.values(), self._beta(epoch, 1.0), rate)
            self.history.append(dict(zip(self.columns, row, strict=True)))
            self.save()

    def _beta(self, epoch: int, part: float) -> float:
        warmup = self.config.beta_warmup
        return self.config.beta * min(1.0, (epoch + part) / warmup) if warmup else self.config.beta

    def _loss(self, batch: Split, beta: float | Tensor = 1.0, **options: Any) -> Any:
        y = batch.labels if self.model.conditional else None
        noisy, target = seen(batch.images, self.config)
        dtype = PRECISIONS[self.config.precision]
        # a graph must not keep the copies of weights that autocast caches
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=not self.graph):
            return self.loss_of(noisy, y, target=target, beta=beta, **options)

    def _step(self, index: Tensor) -> None:
        """One step on the examples ``index``; adds what the loss and its terms came to, to ``sums``."""
        self.optimizer.zero_grad(set_to_none=True)
        weight = self.beta if self.config.beta_warmup else self.config.beta
        config, options = self.config, {}
        if isinstance(self.model, GaussianVAE):
            options = {"free_bits": config.free_bits, "samples": config.samples, "bound": config.bound}
        for rows, share, factor in self.parts.of(index):
            batch = Split(self.train.images[rows], self.train.labels[rows]).to(self.device)
            out = self._loss(batch, weight, **options)
            self.scaler.scale(out.loss if factor == 1 else out.loss * factor).backward()
            self._add(out, share * len(index), self.sums)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @staticmethod
    def _add(out: Any, count: float, sums: Tensor) -> None:
        """Add the loss and its terms of ``count`` examples, and that number, to ``sums``."""
        sums[:3] += torch.stack([t.detach() for t in out]) * count
        sums[3] += count

    def _train_epoch(
        self, epoch: int, step: Callable[[Tensor], None], progress: Progress
    ) -> tuple[dict[str, float], float]:
        self.parts.seed(lambda stream: _mix(self.config.seed, epoch, stream))
        count, total = 0, len(self.train.images)
        generator = torch.Generator("cpu").manual_seed(_mix(self.config.seed, epoch, 1))
        order = torch.randperm(total, generator=generator, device="cpu").to(self.train.images.device)
        self.model.train()
        sums = self.sums.zero_()
        start = shown = time.perf_counter()
        for chosen in order.split(self.config.batch_size):
            self.beta.fill_(self._beta(epoch, count / total))
            step(chosen)
            count += len(chosen)
            now = time.perf_counter()
            if now - shown > 0.1 or count == total:
                shown = now
                progress(epoch + 1, count, self._named(sums))
        numbers = self._named(self.world.add(sums))
        if not all(map(math.isfinite, numbers.values())):
            raise UserError(
                f"the loss became {numbers['loss']} in epoch {epoch + 1}; the checkpoint of epoch {epoch} is whole. "
                "Try a smaller --learning-rate or --precision fp32"
            )
        return numbers, count / (time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss of the test set and its terms, per example: of a VAE the negative ELBO, β = 1, one sample of z."""
        self.model.eval()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            sums = torch.zeros(4, dtype=torch.float64, device=self.device)
            parts = list(batches(self.test, TEST_BATCH))
            for number, counts in self.world.turns(len(parts)):
                torch.manual_seed(_mix(self.config.seed, number, 2))
                out = self._loss(parts[number].to(self.device))
                if counts:
                    self._add(out, len(parts[number].images), sums)
        return self._named(self.world.add(sums))

    def _named(self, sums: Tensor) -> dict[str, float]:
        return dict(zip(self.terms, (sums[:3] / sums[3]).tolist(), strict=True))

    def save(self) -> None:
        """Write the checkpoint, then ``metrics.csv`` and ``config.json`` for people; each atomically."""
        state = {
            "config": asdict(self.config),
            "model_config": self.model.config,
            "history": self.history,
            "scaler": self.scaler.state_dict(),
            "data": self.data.name,
            "data_sha256": self.fingerprint,
            "environment": environment(self.device),
        }
        distributed.save(self.world, self.folder, self.model, self.optimizer, state)
        if not self.world.first:
            return
        self._write_metrics()
        checkpoint.write_atomically(
            self.folder / "config.json", (json.dumps(asdict(self.config), indent=2) + "\n").encode()
        )

    def _write_metrics(self) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        checkpoint.write_atomically(self.folder / "metrics.csv", table.getvalue().encode())

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        path, history = self.folder / checkpoint.FILE, saved.state["history"]
        data = saved.state.get("data_sha256", self.fingerprint)  # older files do not say
        if data != self.fingerprint:
            raise UserError(
                f"{path} is of a run on other data: expected training data of SHA-256 {data[:12]}…, "
                f"got {self.fingerprint[:12]}…"
            )
        if saved.state["model_config"] != self.model.config:
            raise UserError(
                f"{path} is of another model: expected {self.model.config}, got {saved.state['model_config']}"
            )
        checkpoint.check_tensors(path, "model", self.model.state_dict(), saved.model)
        # float16 may have skipped every step so far; before the first epoch there is none
        stepped = bool(history) and (bool(saved.optimizer) or not self.scaler.is_enabled())
        expected = checkpoint.optimizer_tensors(self.optimizer)
        if stepped:
            expected = checkpoint.stepped_tensors(self.config.optimizer, list(self.model.parameters()))
        checkpoint.check_tensors(path, f"optimiser after {len(history)} epochs", expected, saved.optimizer)
        self.model.load_state_dict(saved.model)
        checkpoint.restore_optimizer(self.optimizer, saved.optimizer)
        try:
            self.scaler.load_state_dict(saved.state["scaler"])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path} is damaged: its scaler cannot be restored: {error}") from None
        if history and set(history[-1]) != set(self.columns):
            raise UserError(
                f"{path} is damaged: expected {', '.join(self.columns)} in its history, got {', '.join(history[-1])}"
            )
        self.history = history


def _mix(seed: int, epoch: int, stream: int) -> int:
    """A 63-bit seed for one use in one epoch: Philox, which is at hand, of the three numbers."""
    from ..random import philox4x32

    low, high, *_ = philox4x32(seed % (1 << 64), epoch + (stream << 64))
    return (high << 31 | low >> 1) & (1 << 63) - 1


def environment(device: torch.device) -> dict[str, str]:
    """Where a run's numbers come from."""
    from .. import __version__

    cpu = f"{torch.get_num_threads()} threads, {platform.machine()}"
    return {
        "fastvae": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {cpu}",
        "backend": backend_name(device.type),
    }


def resumed_config(folder: Path, given: dict[str, Any]) -> Config:
    """The configuration of the run in ``folder``, with more epochs or other parts if asked for.

    Raises:
        UserError: an option in ``given`` contradicts the run.
    """
    saved, asked = _config(folder, checkpoint.load(folder, shards=False).state["config"]), Config(**given)
    for name in given:
        if name in ("epochs", "parts"):
            setattr(saved, name, getattr(asked, name))
        elif getattr(saved, name) != getattr(asked, name):
            raise UserError(
                f"{folder / checkpoint.FILE} is of another run: "
                f"its --{name.replace('_', '-')} is {getattr(saved, name)}, got {getattr(asked, name)}"
            )
    return saved


def _config(folder: Path, saved: dict[str, Any]) -> Config:
    saved = {"parts": 1, **saved}  # older files do not say
    missing = [f.name for f in fields(Config) if f.name not in saved and not f.metadata.get("later")]
    if missing:
        raise UserError(f"{folder / checkpoint.FILE} is damaged: its configuration has no {missing[0]}")
    return Config(**{f.name: saved[f.name] for f in fields(Config) if f.name in saved})


def load_model(folder: Path, device: str = "cpu") -> tuple[AutoEncoder, dict[str, Any]]:
    """The trained model in ``folder``, in ``eval`` mode, and the state of its checkpoint."""
    saved = checkpoint.load(folder)
    path = folder / checkpoint.FILE
    if not saved.state["history"]:
        raise UserError(f"{path} holds no trained model: expected at least one complete epoch, got 0")
    try:
        model = build(_config(folder, saved.state["config"]).model, saved.state["model_config"])
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: its model cannot be built: {str(error).splitlines()[0]}") from None
    checkpoint.check_tensors(path, "model", model.state_dict(), saved.model)
    model.load_state_dict(saved.model)
    return model.to(device).eval(), saved.state
