"""What a long life asks of a process: kills, many steps, forks, threads and Ctrl-Cs. Linux.

``python tests/soak.py`` (``make soak``) runs every bar with its full count, each in a process of its own, prints a
table and ends with 1 if one is missed. ``python tests/soak.py interrupts numba 10`` runs one of them, with ten.
``test_process.py`` runs each with a small count.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import fastvae

LARGEST_GROWTH = 5e6  # bytes
HANG = 3600  # seconds after which a bar with its full count is taken to hang
SOON = 120  # and with a small one
EPOCHS = 12
ORDERS = list(itertools.permutations(("op", "torch", "workers", "fork")))


def resumes(backend: str, count: int) -> str:
    """A training killed at any moment resumes to the bits of one that was not."""
    from fastvae.train import checkpoint
    from fastvae.train.config import Config
    from fastvae.train.loop import Trainer

    from test_training import CHANGES, same, write_tiny_data

    for name in ("safetensors.torch", "torch._dynamo"):  # what a first step imports, once for all
        importlib.import_module(name)

    def train(folder: Path, changes: dict, resume: bool) -> None:
        torch.set_num_threads(1)  # the steps are tiny
        config = Config(data_root=str(data), hidden=8, latent=2, epochs=EPOCHS, batch_size=16, **changes)
        Trainer(config, folder, resume=resume).fit()

    # a fork of this process, which has imported everything and run nothing
    context = multiprocessing.get_context("fork")

    def start(folder: Path, changes: dict, resume: bool = False) -> multiprocessing.process.BaseProcess:
        folder.mkdir(exist_ok=True)
        process = context.Process(target=train, args=(folder, changes, resume))
        process.start()
        while not (folder / checkpoint.FILE).exists() and process.is_alive():
            time.sleep(0.001)
        return process

    chance, killed_after, within_a_write = random.Random(0), [], 0
    with tempfile.TemporaryDirectory() as top_name:
        top = Path(top_name)
        data = write_tiny_data(top / "data")
        wholes = []
        for k, changes in enumerate(CHANGES):
            whole, since = top / f"whole {k}", time.monotonic()
            start(whole, changes).join()
            wholes.append((changes, whole, time.monotonic() - since))
        for folder in (top / str(k) for k in itertools.count()):
            if len(killed_after) == count:
                break
            changes, whole, seconds = wholes[len(killed_after) % len(wholes)]
            process = start(folder, changes)
            time.sleep(chance.uniform(0, seconds))
            process.kill()
            process.join()
            done = len(checkpoint.load(folder).state["history"])
            if done == EPOCHS:  # too late
                continue
            assert process.exitcode == -signal.SIGKILL, f"the run ended with {process.exitcode}"
            within_a_write += any(path.name.startswith(".") for path in folder.iterdir())
            killed_after.append(done)
            process = start(folder, changes, resume=True)
            process.join(60)
            assert process.exitcode == 0, f"the resumed run ended with {process.exitcode}"
            same(whole, folder)
    when = (
        f"killed after {min(killed_after)} to {max(killed_after)} of {EPOCHS} epochs, {within_a_write} within a write"
    )
    return f"{len(killed_after)} of {count} bit-equal; {when}"


def steps(backend: str, count: int) -> str:
    """Training steps leave the memory of the process as it was."""
    torch.set_num_threads(1)  # the steps are tiny
    model = fastvae.models.VAE(latent=4, hidden=32, data_shape=(1, 8, 8))
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.randint(256, (128, 1, 8, 8), dtype=torch.uint8)
    before = largest = 0
    for k in range(-1000, count):  # the first thousand make what is made once, for each size of batch
        optimizer.zero_grad()
        model.loss(images[: 1 + k * 37 % len(images)]).loss.backward()
        optimizer.step()
        if k % 100 == 99:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            largest = max(largest, pages * os.sysconf("SC_PAGE_SIZE"))
            before = largest if k < 0 else before
    growth = largest - before
    assert growth < LARGEST_GROWTH, f"{growth / 1e6:.2f} MB more"
    return f"{growth / 1e6:.2f} MB more after {count:,} steps"


def in_this_order(backend: str, number: int) -> str:
    """An op, a parallel region of torch, four forked workers and a plain fork, after which both sides go on."""
    torch.set_num_threads(2)
    zeros, big = torch.zeros(256, 4096), torch.ones(2000, 1000)
    drawn, child = [], None

    def draw(k: int) -> Tensor:
        return fastvae.reparameterize(zeros, zeros, seed=k)

    for event in ORDERS[number]:
        if event == "op":
            drawn.append(draw(0))
        elif event == "torch" and child != 0:  # torch's own threads are gone in the child of a fork: it would hang
            assert (big + 1).sum() == 2 * big.numel()
        elif event == "workers":
            loader = torch.utils.data.DataLoader(
                range(8), None, collate_fn=draw, num_workers=4, multiprocessing_context="fork"
            )
            first, *_ = loader
            drawn.append(first)
        elif event == "fork" and backend != "torch":
            child = os.fork()
            signal.alarm(60 if child == 0 else 0)
    drawn.append(draw(0))
    equal = all((a.numpy() == drawn[0].numpy()).all() for a in drawn)
    if child == 0:
        os._exit(0 if equal else 1)
    assert equal, "not the same noise"
    assert child is None or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed"
    return " ".join(ORDERS[number])


def forks(backend: str, count: int) -> str:
    """The first ``count`` orders, each in a new process."""
    for number in range(count):
        well, seen = trial("in_this_order", backend, number, SOON)
        assert well, f"{ORDERS[number]}: {seen}"
    return f"{count} of {len(ORDERS)} orders of an op, torch, 4 workers and a fork"


def threads(backend: str, count: int) -> str:
    """Eight Python threads at once get what one gets."""
    inputs = [(torch.randn(200, 784), torch.rand(200, 784)) for _ in range(8)]

    def call(k: int) -> tuple[Tensor, ...]:
        y = inputs[k][0].detach().requires_grad_()
        loss = fastvae.bce_with_logits(y, inputs[k][1])
        return loss.detach(), *torch.autograd.grad(loss, y), fastvae.reparameterize(*inputs[k], seed=k)

    wants = [call(k) for k in range(8)]
    done, wrong = [0] * 8, [0] * 8

    def work(k: int) -> None:
        with fastvae.use_backend(backend):
            for _ in range(count):
                wrong[k] += not all(map(torch.equal, call(k), wants[k]))
                done[k] += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert done == [count] * 8, f"calls that ended: {done}"
    assert not sum(wrong), f"{sum(wrong)} calls gave other bits"
    return f"8 threads × {count:,} calls, the same bits"


def interrupts(backend: str, count: int) -> str:
    """Ctrl-C ends a call, and the next is right. Numba's threads still write then: the outputs must outlive them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    torch.set_num_threads(8)  # more than run at once: some still write when the first has been interrupted
    y, x = torch.randn(4096, 2100), torch.rand(4096, 2100)  # an output above 32 MiB is unmapped when it is freed
    work = functools.partial(fastvae.bce_with_logits, y, x, reduction="none")
    want, ready, chance = work(), threading.Semaphore(0), random.Random(0)

    def interrupt() -> None:
        for _ in range(count):
            ready.acquire()
            time.sleep(chance.uniform(0.01, 0.03))
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    for _ in range(count):
        try:
            ready.release()
            while True:
                work()
        except KeyboardInterrupt:
            pass
    assert torch.equal(work(), want), "the call after the last Ctrl-C gave other bits"
    return f"{count} Ctrl-Cs, the next call right"


def trial(bar: str, backend: str, count: int, seconds: float) -> tuple[bool, str]:
    """Whether a bar is met, in a process of its own, and what was seen: a crash too, and no end after ``seconds``."""
    command = [sys.executable, __file__, bar, backend, str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"hangs: no end after {seconds} s"
    if done.returncode != 0:
        return False, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return True, done.stdout.strip()


BARS: list[tuple[Callable[[str, int], str], tuple[str, ...], int]] = [
    (resumes, ("cpp",), 100),
    (steps, ("torch", "numba", "cpp"), 10_000),
    (forks, ("numba", "cpp"), len(ORDERS)),
    (threads, ("torch", "numba", "cpp"), 1000),
    (interrupts, ("torch", "numba", "cpp"), 60),
]


def main() -> int:
    """Runs every bar, or the one named."""
    if sys.argv[1:]:
        name, backend, count = sys.argv[1:]
        with fastvae.use_backend(backend):
            print(globals()[name](backend, int(count)))
        return 0
    missed, start = 0, time.monotonic()
    for function, backends, count in BARS:
        for backend in backends:
            since = time.monotonic()
            well, seen = trial(function.__name__, backend, count, HANG)
            missed += not well
            seconds, verdict = time.monotonic() - since, "met" if well else "MISSED"
            print(f"{function.__name__:10} {backend:6} {seconds:4.0f} s  {verdict:6}  {seen}", flush=True)
    print(f"{missed} missed, {(time.monotonic() - start) / 60:.1f} minutes")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
