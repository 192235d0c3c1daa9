"""Every mistake is one line on stderr, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvae.cli import main
from fastvae.errors import UserError
from fastvae.train import checkpoint, data
from fastvae.train.config import Config
from fastvae.train.lock import hold
from fastvae.train.loop import Trainer

SMALL: dict[str, Any] = {"data": "digits", "hidden": 8, "latent": 2, "epochs": 1, "batch_size": 512}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    Trainer(Config(**SMALL), folder).fit()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("fastvae: error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", 10**23], f"--seed must be at most {2**63 - 1}, got {10**23}"),
        (["--latent", 10**10], f"--latent {10**10} and --hidden 8 make a model too large"),
        (["--latent", 10**18], f"--latent {10**18} and --hidden 8 make a model too large"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
    ],
    ids=str,
)
def test_options(arguments: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, "train", *OPTIONS, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_backend_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvae.registry.asked_for", lambda: "bogus")
    assert "FASTVAE_BACKEND: backend must be one of" in error(capsys, "train", "--output", tmp_path / "out")


def rewrite(folder: Path, change: Callable[[checkpoint.Checkpoint], Any]) -> None:
    saved = checkpoint.load(folder)
    change(saved)
    checkpoint.save(folder, saved)


def flip(folder: Path) -> None:
    content = bytearray((folder / checkpoint.FILE).read_bytes())
    content[-5] ^= 1
    (folder / checkpoint.FILE).write_bytes(content)


def without_state(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.x": torch.zeros(1)}, folder / checkpoint.FILE, {"format": checkpoint.FORMAT})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no state": (without_state, "expected 'state' in its metadata, got format"),
    "flipped bit": (flip, "is damaged: expected SHA-256"),
    "shape": (
        lambda f: rewrite(f, lambda c: c.model.update({"output.bias": torch.zeros(3)})),
        "expected output.bias to be float32 [64], got float32 [3]",
    ),
    "dtype": (
        lambda f: rewrite(f, lambda c: c.model.update({"output.bias": torch.zeros(64, dtype=torch.float64)})),
        "expected output.bias to be float32 [64], got float64 [64]",
    ),
    "no optimiser": (
        lambda f: rewrite(f, lambda c: c.optimizer.clear()),
        "does not fit its optimiser after 1 epochs: expected 0.step to be float32 [], got absent",
    ),
    "no history": (
        lambda f: rewrite(f, lambda c: c.state.update(history=[])),
        "does not fit its optimiser after 0 epochs",
    ),
    "other data": (
        lambda f: rewrite(f, lambda c: c.state.update(data_sha256="0" * 64)),
        "is of a run on other data: expected training data of SHA-256 000000000000…",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[kind]
    damage(run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert message in error(capsys, "train", "--resume", "--epochs", 2, "--output", run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_checkpoint_of_before_the_checksums_loads(run: Path) -> None:
    from safetensors.torch import save_file

    saved = checkpoint.load(run)
    del saved.state["data_sha256"]
    tensors = {f"model.{k}": v for k, v in saved.model.items()}
    tensors |= {f"optimizer.{k}": v for k, v in saved.optimizer.items()}
    save_file(tensors, run / checkpoint.FILE, {"format": checkpoint.FORMAT, "state": json.dumps(saved.state)})
    assert Trainer(Config(**SMALL), run, resume=True).epoch == 1


def test_the_fingerprint_is_of_images_and_labels() -> None:
    split = data.Split(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1], dtype=torch.uint8))
    other = split._replace(labels=split.labels.flip(0))
    assert data.Data("a", split, split).fingerprint != data.Data("a", other, split).fingerprint


def test_the_data_root_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Config(data_root="x").data_root == str(tmp_path / "x")


@pytest.mark.skipif("sys.platform == 'win32'", reason="no fcntl")
def test_two_runs_in_one_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(run):
        assert "is in use by another run" in error(capsys, "train", "--resume", "--output", run)
        assert "is in use by another run" in error(capsys, "train", *OPTIONS, "--overwrite", "--output", run)
    with hold(run):
        pass


def test_the_table_of_metrics_is_made_again_on_resume(run: Path) -> None:
    whole = (run / "metrics.csv").read_bytes()
    (run / "metrics.csv").write_text("epoch\n")
    Trainer(Config(**SMALL), run, resume=True).fit()
    assert (run / "metrics.csv").read_bytes() == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_ends_the_run(value: float, tmp_path: Path) -> None:
    trainer = Trainer(Config(**SMALL), tmp_path)
    with torch.no_grad():
        trainer.model.output.bias.fill_(value)
    with pytest.raises(UserError, match=r"the loss became -?(nan|inf) in epoch 1"):
        trainer.fit()


def test_a_picture_that_cannot_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "samples.png").mkdir()
    before = (run / checkpoint.FILE).read_bytes()
    assert "samples.png cannot be written: Is a directory" in error(capsys, "train", "--resume", "--output", run)
    assert (run / checkpoint.FILE).read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    import subprocess

    folder = os.fsencode(tmp_path) + b"/run\xff"
    command = [sys.executable, "-m", "fastvae", "train", *OPTIONS, "--output", folder]
    result = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 1
    assert result.stderr.decode().strip().endswith("/run\\xff")
    assert result.stderr.count(b"\n") == 1, "before any training, and no traceback"
