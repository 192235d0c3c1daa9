"""Data, checkpoints, resumption to the same bits, and the command line run as a process."""

from __future__ import annotations

import csv
import gzip
import json
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvae.errors import UserError
from fastvae.train import checkpoint, data
from fastvae.train.config import Config
from fastvae.train.loop import Trainer, load_model, salt_and_pepper

SMALL = ["--data", "digits", "--hidden", "32", "--latent", "2"]


def fastvae(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastvae", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd)


def write_idx(path: Path, values: torch.Tensor, magic: int | None = None) -> None:
    header = struct.pack(f">{1 + values.dim()}I", magic or 0x800 + values.dim(), *values.shape)
    content = header + values.numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_tiny_data(folder: Path) -> Path:
    folder.mkdir()
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = torch.randint(0, 256, (count, 6, 5), dtype=torch.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", torch.arange(count, dtype=torch.uint8) % 3)
    return folder


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    return write_tiny_data(tmp_path / "idx")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "vae"
    result = fastvae("train", *SMALL, "--epochs", 3, "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder


def config(**changes: object) -> Config:
    return Config(**{"data": "digits", "hidden": 32, "latent": 2, "epochs": 3, **changes})


@pytest.mark.parametrize(("name", "shape", "count"), [("mnist5k", (1, 28, 28), 5000), ("digits", (1, 8, 8), 1797)])
def test_packaged_data(name: str, shape: tuple[int, ...], count: int) -> None:
    loaded = data.load(name)
    assert loaded.shape == shape
    assert loaded.classes == 10
    assert len(loaded.train.images) + len(loaded.test.images) == count
    assert loaded.train.images.dtype == torch.uint8
    assert loaded.train.images.max() == 255
    per_class = loaded.test.labels.bincount()
    assert per_class.max() - per_class.min() <= 2, "every class has its share in the test set"


def test_idx_files(idx: Path) -> None:
    loaded = data.load(root=idx)
    assert loaded.shape == (1, 6, 5)
    assert loaded.classes == 3
    assert len(loaded.train.images) == 60


def damage(idx: Path, kind: str) -> Path:
    images = idx / "train-images-idx3-ubyte.gz"
    if kind == "no folder":
        return idx / "nowhere"
    if kind == "no file":
        images.unlink()
    elif kind == "truncated gzip":
        images.write_bytes(images.read_bytes()[:-40])
    elif kind == "not gzip":
        images.write_bytes(b"hello")
    elif kind == "truncated":
        labels = idx / "t10k-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:-3])
    elif kind == "short header":
        (idx / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0")
    elif kind == "half a header":
        images.write_bytes(gzip.compress(struct.pack(">2I", 0x803, 60) + b"\0"))
    elif kind == "no images":
        write_idx(images, torch.zeros(0, 6, 5, dtype=torch.uint8))
    elif kind == "no pixels":
        write_idx(images, torch.zeros(60, 0, 0, dtype=torch.uint8))
    elif kind == "sizes that wrap":
        images.unlink()
        (idx / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 1 << 31, 1 << 31, 4) + bytes(8))
    elif kind == "zipped sizes that wrap":
        images.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 1 << 31, 1 << 31, 4) + bytes(8)))
    elif kind == "gzip bomb":
        images.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 60, 6, 5) + bytes(1 << 26)))
    elif kind == "wrong magic":
        write_idx(images, torch.zeros(60, 6, 5, dtype=torch.uint8), magic=0x0D03)
    elif kind == "counts":
        write_idx(idx / "train-labels-idx1-ubyte", torch.zeros(59, dtype=torch.uint8))
    elif kind == "sizes":
        write_idx(images, torch.zeros(60, 7, 5, dtype=torch.uint8))
    return idx


BAD_FILES = {
    "no folder": "is not a folder",
    "no file": "has no train-images-idx3-ubyte",
    "truncated gzip": "cannot be read",
    "not gzip": "cannot be read",
    "truncated": "is damaged: its header promises 20 bytes, got 17",
    "short header": "is truncated: expected a header of 8 bytes, got 2",
    "half a header": "is truncated: expected a header of 16 bytes, got 9",
    "no images": "is empty: expected sizes of at least 1, got 0 x 6 x 5",
    "no pixels": "is empty: expected sizes of at least 1, got 60 x 0 x 0",
    "sizes that wrap": f"promises {2**64:,} bytes, got 8",
    "zipped sizes that wrap": f"promises {2**64:,} bytes, got a gzip file of",
    "gzip bomb": "promises 1,800 bytes, got more",
    "wrong magic": "expected magic 0x803, got 0xd03",
    "counts": "60 train images but 59 labels",
    "sizes": "training images are [7, 5], test images [6, 5]",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(idx: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError) as raised:
        data.load(root=damage(idx, kind))
    assert BAD_FILES[kind] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_more_is_decompressed_than_the_header_promises(idx: Path) -> None:
    damage(idx, "gzip bomb")
    tracemalloc.start()
    with pytest.raises(UserError, match="got more"):
        data.load(root=idx)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 23, "of the 64 MiB"


def test_batches_are_in_order() -> None:
    split = data.Split(torch.arange(10)[:, None], torch.arange(10))
    assert [b.labels.tolist() for b in data.batches(split, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_an_epoch_steps_on_every_example_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = Trainer(config(epochs=2), tmp_path), []
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda chosen: (seen.append(chosen), step(chosen)))
    trainer.fit()
    size = len(trainer.train.images)
    first, second = torch.cat(seen).split(size)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(size))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(size))


def test_salt_and_pepper() -> None:
    images = torch.full((100, 100), 100, dtype=torch.uint8)
    noisy = salt_and_pepper(images, 0.3)
    for value, share in ((0, 0.15), (255, 0.15), (100, 0.7)):
        assert abs((noisy == value).float().mean().item() - share) < 0.03


def test_files_of_a_run(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    pictures = {f"{n}.png" for n in ("loss_curves", "reconstructions", "samples", "latent", "manifold")}
    assert names == pictures | {"checkpoint.safetensors", "metrics.csv", "config.json", "report.html"}
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["test_loss"]) < float(rows[0]["test_loss"])
    for row in rows:
        assert float(row["test_loss"]) == pytest.approx(
            float(row["test_reconstruction"]) + float(row["test_kl"]), rel=1e-5
        )
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page, "self-contained"
    assert f"{float(rows[-1]['test_loss']):.2f}" in page
    assert json.loads((run / "config.json").read_text())["latent"] == 2


def same(a: Path, b: Path) -> None:
    x, y = checkpoint.load(a), checkpoint.load(b)
    assert x.model.keys() == y.model.keys()
    assert all(torch.equal(x.model[name], y.model[name]) for name in x.model)
    assert all(torch.equal(x.optimizer[name], y.optimizer[name]) for name in x.optimizer)
    for row, other in zip(x.state["history"], y.state["history"], strict=True):
        assert {**row, "examples_per_second": 0} == {**other, "examples_per_second": 0}


CHANGES: list[dict] = [{}, {"model": "cvae", "denoise": 0.2}, {"beta_warmup": 2, "precision": "bf16"}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_resumed_is_the_same_to_the_bit(tmp_path: Path, changes: dict) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    Trainer(config(**changes), whole).fit()
    Trainer(config(**changes, epochs=1), parts).fit()
    Trainer(config(**changes), parts, resume=True).fit()
    same(whole, parts)


def fit(folder: Path, resume: bool = False, **changes: Any) -> Trainer:
    """Train on the GPU, each step a graph."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    trainer = Trainer(config(**changes), folder, "cuda", resume=resume, graph=True)
    trainer.fit(say=said.append)
    assert not said
    return trainer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_graphed_run_resumed_is_the_same_to_the_bit(tmp_path: Path, changes: dict) -> None:
    fit(tmp_path / "whole", **changes)
    fit(tmp_path / "parts", **changes, epochs=1)
    fit(tmp_path / "parts", resume=True, **changes)
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_graph_makes_the_steps_it_recorded(tmp_path: Path, changes: dict) -> None:
    graphed = fit(tmp_path / "graph", **changes).history[-1]
    (tmp_path / "parts").mkdir()
    parts = Trainer(config(**changes), tmp_path / "parts", "cuda")
    parts.fit()
    # Adam's bias corrections are float32 on the GPU, and float64 otherwise
    tolerance = 5e-2 if changes.get("precision") else 5e-3
    for name in ("train_loss", "test_loss"):
        assert graphed[name] == pytest.approx(parts.history[-1][name], rel=tolerance)


@pytest.mark.parametrize(("precision", "on"), [("fp32", "on cpu"), ("fp16", "on cpu")])
def test_where_there_is_no_graph_it_says_so_and_goes_on(tmp_path: Path, precision: str, on: str) -> None:
    said: list[str] = []
    trainer = Trainer(config(epochs=1, precision=precision), tmp_path, graph=True)
    trainer.fit(say=said.append)
    assert said == [f"no CUDA graph {on}, each step is launched in parts"]
    assert trainer.epoch == 1


def test_the_example_of_a_graphed_loop_learns() -> None:
    example = Path(__file__).parent.parent / "examples" / "graphed_training.py"
    run = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    nats = [float(line.split()[-2]) for line in run.stdout.splitlines()]
    assert len(nats) == 10
    assert nats[-1] < 0.75 * nats[0]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        Trainer(config(seed=seed, epochs=1), tmp_path / str(seed)).fit()
    with pytest.raises(AssertionError):
        same(tmp_path / "0", tmp_path / "1")


def test_beta_warmup_and_float16(tmp_path: Path) -> None:
    trainer = Trainer(config(beta=2.0, beta_warmup=4, precision="fp16", epochs=2), tmp_path)
    trainer.fit()
    assert [row["beta"] for row in trainer.history] == [0.5, 1.0]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_failed_write_leaves_the_old_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / checkpoint.FILE).read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        checkpoint.save(run, checkpoint.load(run))
    assert (run / checkpoint.FILE).read_bytes() == before
    assert not [p for p in run.iterdir() if p.name.startswith(".")], "nothing is left lying about"


def heed_interrupts() -> None:
    """Where a shell runs the tests in the background, it has made them, and what they start, ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_then_resumed(run: Path, tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fastvae", "train", *SMALL, "--epochs", "500", "--output", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fastvae train --resume --output {folder}" in stderr
    assert "Traceback" not in stderr
    done = len(checkpoint.load(folder).state["history"])
    assert done >= 2
    result = fastvae("train", "--resume", "--output", folder, "--epochs", done + 1)
    assert result.returncode == 0, result.stderr
    resumed, reference = (checkpoint.load(f).state["history"] for f in (folder, run))
    assert len(resumed) == done + 1
    assert resumed[0]["test_loss"] == reference[0]["test_loss"]


def cli_errors(run: Path, tmp_path: Path) -> list[tuple[list[object], str]]:
    locked = tmp_path / "a file"
    locked.write_text("")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / checkpoint.FILE).write_bytes(b"not safetensors")
    out = tmp_path / "out"
    return [
        (["train", "--output", run], "already holds a run: continue it with --resume, replace it with --overwrite"),
        (["train", "--resume", "--output", out], "has no checkpoint.safetensors"),
        (["train", "--resume", "--output", run, "--model", "cvae"], "is of another run: its --model is vae, got cvae"),
        (["train", "--resume", "--output", run, "--latent", 3], "is of another run: its --latent is 2, got 3"),
        (["train", "--resume", "--output", foreign], "cannot be read"),
        (["train", "--data-root", tmp_path / "nowhere", "--output", out], "is not a folder"),
        (["train", "--data", "digits", "--output", locked / "x"], "cannot be made"),
        (["train", "--device", "cuda", "--output", out], "--device cuda cannot be used"),
        (["train", "--backend", "tpu", "--output", out], "backend must be one of"),
        (["train", "--epochs", 0, "--output", out], "--epochs must be at least 1, got 0"),
        (["train", "--latent", -1, "--output", out], "--latent must be at least 1, got -1"),
        (["train", "--beta", -0.5, "--output", out], "--beta must be a number >= 0, got -0.5"),
        (["train", "--learning-rate", "nan", "--output", out], "--learning-rate must be > 0, got nan"),
        (["sample", tmp_path / "nowhere"], "has no checkpoint.safetensors"),
        (["sample", run, "--classes", 3, "--output", out], "--classes goes with a CVAE"),
        (["sample", run, "--count", 0, "--output", out], "--count must be at least 1, got 0"),
        (["sample", run, "--output", tmp_path / "no" / "where.png"], "cannot be written"),
    ]


@pytest.mark.skipif("sys.platform == 'win32'", reason="paths of POSIX")
def test_command_line_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastvae.cli import main

    before = {p.name: p.read_bytes() for p in run.iterdir()}
    for arguments, message in cli_errors(run, tmp_path):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        assert main([str(a) for a in arguments]) == 1, arguments
        stderr = capsys.readouterr().err
        assert stderr.startswith("fastvae: error: "), stderr
        assert message in stderr
        assert stderr.count("\n") == 1, stderr
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before, "nothing is overwritten"
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_a_usage_error_is_exit_code_2() -> None:
    result = fastvae("train", "--model", "gan")
    assert result.returncode == 2
    assert "invalid choice: 'gan'" in result.stderr


def test_sample_and_info(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    result = fastvae("sample", run, "--count", 7, "--output", picture)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    info = fastvae("info")
    assert info.returncode == 0, info.stderr
    assert "numba" in info.stdout
    assert "default on cpu" in info.stdout
    assert "graph nodes of cpp and cuda: " in info.stdout


def test_load_model_gives_what_was_trained(run: Path) -> None:
    model, state = load_model(run)
    assert not model.training
    trainer = Trainer(Config(**state["config"]), run, resume=True)
    assert trainer.evaluate() == {
        name: state["history"][-1][f"test_{name}"] for name in ("loss", "reconstruction", "kl")
    }, "evaluation is a function of the weights and the seed"


def test_overwrite_starts_again(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert fastvae("train", *SMALL, "--epochs", 1, "--output", folder).returncode == 0
    result = fastvae("train", *SMALL, "--epochs", 1, "--model", "cvae", "--output", folder, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert checkpoint.load(folder).state["config"]["model"] == "cvae"
    assert (folder / "styles.png").exists()
