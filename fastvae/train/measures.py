"""What trained models are measured by: bounds on log p(x), anomalies, clusters, probes, rates, and their purpose."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models import AutoEncoder, ContractiveAE, GaussianVAE, LinearAE, SparseAE
from ..models.contractive_ae import jacobian_norm
from .config import Config
from .corrupt import seen, unit
from .data import DISTRIBUTIONS, Data, Split, batches

TEST_BATCH = 1000
HELD = 1 << 24  # elements of decoder outputs at once
BITS = math.log(2)


def package(name: str) -> Any:
    """A module of scikit-learn or SciPy, or an error that says how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        of, _, _ = name.partition(".")
        of = DISTRIBUTIONS.get(of, of)
        raise UserError(f"this needs the package {of}: pip install {of}") from None


@torch.inference_mode()
def codes(model: AutoEncoder, split: Split) -> Tensor:
    """Codes, or means of q(z|x), of the images: ``[N, latent]``, float32 on the CPU."""
    of_batches = [
        model.encode(model.as_input(batch.images), batch.labels if model.conditional else None).mu
        for batch in batches(split, TEST_BATCH)
    ]
    return torch.cat(of_batches).float().cpu()


def flat(split: Split) -> np.ndarray:
    """The pixels in [0, 1], ``[N, D]``."""
    return unit(split.images).flatten(1).cpu().numpy()


def pca(train: Split, components: int) -> Any:
    """Scikit-learn's PCA of the training images, with as many components as there can be up to this number."""
    pixels = flat(train)
    return package("sklearn.decomposition").PCA(min(components, *pixels.shape), random_state=0).fit(pixels)


@torch.inference_mode()
def log_weights(model: GaussianVAE, split: Split, config: Config, samples: int) -> tuple[Tensor, Tensor]:
    """log w ``[S, N]`` and −log p(x|z) ``[S, N]``, float64, of inputs as the model was trained on them."""
    size = max(1, HELD // (samples * model.data_size))
    parts = []
    for batch in batches(split, size):
        x, target = seen(batch.images, config)
        y = batch.labels if model.conditional else None
        parts.append(torch.stack(model.log_weights(x, y, samples=samples, target=target)).double().cpu())
    log_w, nll = torch.cat(parts, 2)
    return log_w, nll


class Bound(NamedTuple):
    """A lower bound on log p(x) in nats per example, and the standard error of its mean over the examples."""

    samples: int
    mean: float
    error: float


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean, and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def bounds(log_w: Tensor) -> list[Bound]:
    """The importance-weighted bounds of 1 (the ELBO), 5, … samples, each the mean over groups of the log w ``[S, N]``.

    Each group of many is made of whole groups of few, so by Jensen's inequality the bounds cannot but rise.
    """
    total = len(log_w)
    counts = [1]
    counts += [k for k in (5, 10, 50, 100, 500, 1000, 5000) if total % k == 0 and k % counts[-1] == 0 and k < total]
    found = []
    for count in sorted({*counts, total}):
        groups = log_w.unflatten(0, (total // count, count))
        found.append(Bound(count, *mean_and_error((groups.logsumexp(1) - math.log(count)).mean(0))))
    return found


@torch.inference_mode()
def scores(model: AutoEncoder, split: Split, config: Config, samples: int = 16) -> Tensor:
    """How badly the model explains each image: its negative ELBO, or its reconstruction error, ``[N]``."""
    if isinstance(model, GaussianVAE):
        return -log_weights(model, split, config, samples)[0].mean(0)
    found = []
    for batch in batches(split, TEST_BATCH):
        x, target = seen(batch.images, config)
        y = batch.labels if model.conditional else None
        found.append(model.nll(model(x, y).recon, target).double().cpu())
    return torch.cat(found)


class Anomaly(NamedTuple):
    """Scores of the test images, which of them are of the class held out, and the areas under the ROC curves."""

    held_out: np.ndarray
    model_scores: np.ndarray
    pca_scores: np.ndarray
    model_auc: float
    pca_auc: float


def anomaly(model: AutoEncoder, data: Data, config: Config) -> Anomaly:
    """How well the model tells the class it has not seen from the rest, and PCA's error with as many components."""
    metrics = package("sklearn.metrics")
    unseen = data.test.labels.cpu().numpy() == config.hold_out
    by_model = scores(model, data.test, config).numpy()
    fitted, pixels = pca(data.train, model.latent), flat(data.test)
    by_pca = ((fitted.inverse_transform(fitted.transform(pixels)) - pixels) ** 2).sum(1)
    aucs = (float(metrics.roc_auc_score(unseen, found)) for found in (by_model, by_pca))
    return Anomaly(unseen, by_model, by_pca, *aucs)


def _representations(model: AutoEncoder, data: Data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The model's codes, PCA's of that width, and pixels: of the training and of the test images."""
    fitted, pixels = pca(data.train, model.latent), (flat(data.train), flat(data.test))
    return {
        "the model's code": (codes(model, data.train).numpy(), codes(model, data.test).numpy()),
        f"PCA, {fitted.n_components_} components": tuple(fitted.transform(part) for part in pixels),
        "pixels": pixels,
    }


def cluster(model: AutoEncoder, data: Data) -> tuple[dict[str, float], Tensor]:
    """The adjusted Rand index of k-means with the classes, by what it clusters, and the centres ``[K, latent]``."""
    k_means, metrics = package("sklearn.cluster").KMeans, package("sklearn.metrics")
    labels, found, centres = data.test.labels.cpu().numpy(), {}, None
    for name, (train, test) in _representations(model, data).items():
        fitted = k_means(data.classes, n_init=5, random_state=0).fit(train)
        found[name] = float(metrics.adjusted_rand_score(labels, fitted.predict(test)))
        centres = fitted.cluster_centers_ if centres is None else centres
    return found, torch.from_numpy(centres).float()


def probe(model: AutoEncoder, data: Data) -> dict[str, float]:
    """The accuracy on the test images of a logistic regression, by what it is given."""
    pipeline, scale = package("sklearn.pipeline").make_pipeline, package("sklearn.preprocessing").StandardScaler
    regression = package("sklearn.linear_model").LogisticRegression
    labels = [split.labels.cpu().numpy() for split in (data.train, data.test)]
    if len(np.unique(labels[0])) < 2:
        raise UserError(f"a probe needs data of at least two classes, got {data.name} of one")
    found = {}
    for name, (train, test) in _representations(model, data).items():
        classifier = pipeline(scale(), regression(max_iter=300)).fit(train, labels[0])
        found[name] = float(classifier.score(test, labels[1]))
    return found


def compression(model: AutoEncoder, data: Data, config: Config) -> list[tuple[str, float, str]]:
    """What, bytes an image, and what is lost, for the test images."""
    pixels = (unit(data.test.images) * 255).round().to(torch.uint8).flatten(1).cpu()
    raw = float(pixels.shape[1])
    packed = [len(zlib.compress(row.numpy().tobytes(), 9)) for row in pixels]
    rows = [("pixels", raw, "nothing"), ("pixels, zlib", float(np.mean(packed)), "nothing")]
    with torch.inference_mode():
        recon = [model.reconstruct(b.images, b.labels if model.conditional else None) for b in batches(data.test, 1000)]
    error = ((torch.cat(recon).cpu().flatten(1) - unit(data.test.images).cpu().flatten(1)) ** 2).mean().item()
    lost = f"squared error {error:.4f} a pixel"
    rows.append((f"the code, {model.latent} floats of 4 bytes", 4.0 * model.latent, lost))
    if isinstance(model, GaussianVAE):
        rows.append(("the code, at the rate of the KL", _kl(model, data) / BITS / 8, f"{lost} and more: z is a sample"))
        bits = np.packbits(pixels.numpy() >= 128, axis=1)
        zipped = [len(zlib.compress(row.tobytes(), 9)) for row in bits]
        rows += [
            ("binary pixels", float(bits.shape[1]), "shades of grey"),
            ("binary pixels, zlib", float(np.mean(zipped)), "shades of grey"),
        ]
        if "bernoulli" in model.likelihood and "continuous" not in model.likelihood:
            binary = Config(**{**config.__dict__, "binarise": "fixed", "denoise": 0.0})
            elbo = log_weights(model, data.test, binary, 4)[0].mean().item()
            rows.append(("binary pixels, at the rate of the ELBO", -elbo / BITS / 8, "shades of grey"))
    return rows


@torch.inference_mode()
def _kl(model: GaussianVAE, data: Data) -> float:
    total = 0.0
    for batch in batches(data.test, TEST_BATCH):
        total += model.loss(batch.images, batch.labels if model.conditional else None).kl.item() * len(batch.images)
    return total / len(data.test.images)


def subspace_angle(model: LinearAE, train: Split) -> float:
    """The largest angle between the span of the decoder's columns and that of the principal components, in degrees."""
    angles = package("scipy.linalg").subspace_angles
    directions = pca(train, model.latent).components_.T
    return float(np.degrees(angles(model.decoder.weight.detach().cpu().double().numpy(), directions)).max())


def active_share(z: Tensor) -> float:
    """Share of the elements of rectified codes that are not 0."""
    return (z > 0).float().mean().item()


def mean_jacobian_norm(model: AutoEncoder, split: Split, count: int = 200) -> float:
    """‖∂z/∂x‖, the Frobenius norm, averaged over the first images."""
    x = model.as_input(split.images[:count])
    return jacobian_norm(lambda one: model.encode(one).mu, x).sqrt().mean().item()


@torch.inference_mode()
def errors(model: AutoEncoder, split: Split, config: Config) -> tuple[float, float]:
    """The squared error per pixel of the corrupted images and of the restored ones."""
    x, clean = seen(split.images[:TEST_BATCH], config)
    y = split.labels[:TEST_BATCH] if model.conditional else None
    restored, clean = model.reconstruct(x, y), unit(clean)
    return ((unit(x) - clean) ** 2).mean().item(), ((restored - clean) ** 2).mean().item()


def findings(model: AutoEncoder, data: Data, config: Config) -> list[tuple[str, str]]:
    """Numbers that say whether the model does what it is for: value and label."""
    torch.manual_seed(config.seed)
    found = []
    if isinstance(model, LinearAE):
        angle = subspace_angle(model, data.train)
        found.append((f"{angle:.2f}°", "largest angle to the subspace of PCA"))
    if isinstance(model, SparseAE):
        found.append((f"{active_share(codes(model, data.test)):.1%}", "of the code's elements active"))
    if isinstance(model, ContractiveAE):
        found.append((f"{mean_jacobian_norm(model, data.test):.3f}", "‖∂z/∂x‖, test images"))
    if config.denoise:
        before, after = errors(model, data.test, config)
        found += [
            (f"{before:.4f}", "squared error a pixel, corrupted"),
            (f"{after:.4f}", "squared error a pixel, restored"),
        ]
    if isinstance(model, GaussianVAE) and (learned := model.learned()):
        found.append((f"{learned['logvar'].mul(0.5).exp().item():.3f}", "learned σ of a pixel"))
    return found
