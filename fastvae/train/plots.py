"""The pictures of a run. Each function draws one figure and returns it; ``draw_all`` writes those that apply."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from torch import Tensor

from ..models import AE, AutoEncoder, ContractiveAE, GaussianVAE, LinearAE, SparseAE
from ..models.contractive_ae import jacobian
from . import measures
from .checkpoint import write_atomically
from .corrupt import corrupted, unit
from .data import Data, Split

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1f2933", "#d5dbe1"
# Okabe & Ito's colours, and two more: told apart with every kind of colour vision
CLASS_COLOURS = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#8c8c8c", "#6a3d9a",
)  # fmt: skip
TRAIN, TEST = "#56b4e9", "#0072b2"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "figure.constrained_layout.use": True,
}
SHOWN = 10  # images a row
DPI = 130
ABOVE = 40  # screen pixels of a title
MANIFOLD = 20  # images a side
SCATTER = 5000  # points at most


def tile(images: Tensor, columns: int) -> Tensor:
    """``[N, C, H, W]`` as one picture ``[rows·H, columns·W]`` (or with 3 channels last), one white pixel between."""
    white = 0.0 if images.shape[1] == 1 else 1.0  # one channel is drawn as ink on paper
    images = torch.nn.functional.pad(images.float().clamp(0, 1), (0, 1, 0, 1), value=white)
    rows = math.ceil(len(images) / columns)
    blank = torch.full((rows * columns - len(images), *images.shape[1:]), white)
    grid = torch.cat([images, blank]).unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    picture = grid.flatten(3, 4).flatten(1, 2)[:, :-1, :-1]
    return picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)


def show(picture: Tensor, title: str, row_labels: tuple[str, ...] = (), column_labels: tuple[str, ...] = ()) -> Figure:
    """A picture without axes, at a whole number of screen pixels per image pixel."""
    height, width = picture.shape[:2]
    scale = max(1, round(760 / width))
    left, below = 8 + 11 * max(map(len, row_labels), default=0), 36 if column_labels else 8
    # the title is wider than a small picture
    whole = max(width * scale + left + 8, left + 12 * len(title)), height * scale + ABOVE + below
    with plt.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        figure = plt.figure(figsize=(whole[0] / DPI, whole[1] / DPI), dpi=DPI)
        size = (width * scale / whole[0], height * scale / whole[1])
        axes = figure.add_axes((left / whole[0], below / whole[1], *size))
        axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        axes.set_title(title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        rows, columns = len(row_labels), len(column_labels)
        axes.set_yticks([height * (k + 0.5) / rows for k in range(rows)], row_labels)
        axes.set_xticks([width * (k + 0.5) / columns for k in range(columns)], column_labels)
    return figure


def loss_curves(history: list[dict[str, float]]) -> Figure:
    """The loss and its terms by epoch, training and test; without a penalty that is always 0."""
    epochs = [row["epoch"] for row in history]
    terms = {"loss": "loss", "reconstruction": "reconstruction", "kl": "KL divergence", "penalty": "penalty"}
    terms = {term: title for term, title in terms.items() if any(row.get(f"test_{term}") for row in history)}
    if "kl" in terms:
        terms["loss"] = "negative ELBO"
    if list(terms) == ["loss", "reconstruction"]:
        del terms["loss"]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(terms), figsize=(1 + 3 * len(terms), 3.2), squeeze=False)
        for axis, (term, title) in zip(grid[0], terms.items(), strict=True):
            for split, colour in (("train", TRAIN), ("test", TEST)):
                values = [row[f"{split}_{term}"] for row in history]
                mark = "o" if len(epochs) <= 50 else ""
                axis.plot(epochs, values, color=colour, linewidth=1.8, marker=mark, markersize=3, label=split)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
        grid[0][0].set_ylabel("nats per example" if "kl" in terms else "per example")
        grid[0][0].legend(frameon=False)
    return figure


def series(rows: dict[str, Tensor], title: str, columns: int = 4) -> Figure:
    """Curves: ``[N, 1, T, 1]`` of each name, drawn over each other."""
    count = min(len(next(iter(rows.values()))), 2 * columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, columns, figsize=(9, 3.6), sharex=True, sharey=True)
        for k, axis in enumerate(grid.flat[:count]):
            for colour, width, (name, values) in zip((FAINT, TEST), (5, 1.6), rows.items(), strict=False):
                axis.plot(values[k].flatten(), color=colour, linewidth=width, label=name)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        if len(rows) > 1:
            grid[0, 0].legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def stacked(rows: dict[str, Tensor], title: str) -> Figure:
    """Images ``[N, C, H, W]`` of each name, one row each, the same image below itself."""
    columns = min(SHOWN, len(next(iter(rows.values()))))
    lines = [part[k : k + columns] for k in range(0, 2 * columns, columns) for part in rows.values()]
    lines = [line for line in lines if len(line) == columns]
    return show(tile(torch.cat(lines), columns), title, tuple(rows) * (len(lines) // len(rows)))


def reconstructions(model: AutoEncoder, inputs: Tensor, labels: Tensor | None, clean: Tensor | None = None) -> Figure:
    """Inputs above the reconstructions from the mean of q(z|x), and the clean images above those of a denoiser."""
    rows = {"input": unit(inputs.cpu()), "output": model.reconstruct(inputs, labels).float().cpu()}
    title = f"Test {'series' if inputs.shape[-1] == 1 else 'images'} and their reconstructions"
    if clean is not None:
        rows = {"clean": unit(clean.cpu()), "corrupted": rows["input"], "restored": rows["output"]}
        title = "Test images, corrupted and restored"
    return series(rows, title) if inputs.shape[-1] == 1 else stacked(rows, title)


def samples(model: AutoEncoder, seed: int) -> Figure:
    """Images decoded from the prior; for a conditional model, ten rows of all classes."""
    torch.manual_seed(seed)
    y = None
    if model.conditional:
        y = torch.arange(SHOWN, device=_device(model)).remainder(_classes(model)).repeat(SHOWN)
    images = model.sample(SHOWN * SHOWN, y).float().cpu()
    prior = isinstance(model, GaussianVAE)
    title = "Samples from the prior" if prior else "Samples from a Gaussian fitted to the codes"
    return series({"sample": images}, title) if images.shape[-1] == 1 else show(tile(images, SHOWN), title)


def sample_grids(models: dict[str, AutoEncoder], seed: int) -> Figure:
    """Eight by eight images decoded from the prior of each model, side by side."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(models), figsize=(10, 10 / len(models) + 0.4), squeeze=False)
        figure.set_layout_engine("constrained", w_pad=0.08)
        for axis, (name, model) in zip(grid[0], models.items(), strict=True):
            torch.manual_seed(seed)
            axis.imshow(tile(model.sample(64).float().cpu(), 8), cmap="gray_r", vmin=0, vmax=1)
            axis.set(title=name, xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
    return figure


def latent(model: AutoEncoder, images: Tensor, labels: Tensor) -> Figure:
    """Means of q(z|x) of the test images by class; with more than three elements, along their two widest directions."""
    images, labels = images[:SCATTER], labels[:SCATTER]
    mu = measures.codes(model, Split(images, labels))
    if mu.shape[1] == 3:
        return latent_3d(model, images, labels, mu)
    what = "Latent means" if isinstance(model, GaussianVAE) else "Codes"
    x_label, y_label, title = "z₁", "z₂", f"{what} by class"
    if mu.shape[1] == 1:
        mu = torch.stack([mu[:, 0], torch.zeros(len(mu))], dim=1)
    elif mu.shape[1] > 2:
        centred = mu - mu.mean(dim=0)
        _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
        share = (spread[:2] ** 2 / (spread**2).sum()).tolist()
        mu = centred @ directions[:2].T
        x_label, y_label = (f"principal component {k + 1} ({share[k]:.0%} of the variance)" for k in range(2))
        title = f"{what} by class, {model.latent} elements projected to two"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 6))
        for label in labels.unique().tolist():
            chosen = (labels == label).cpu()
            colour = CLASS_COLOURS[label % len(CLASS_COLOURS)]
            axes.scatter(mu[chosen, 0], mu[chosen, 1], s=10, alpha=0.7, linewidths=0, color=colour, label=str(label))
        axes.set(title=title, xlabel=x_label, ylabel=y_label, aspect="equal")
        axes.legend(title="class", frameon=False, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def latent_3d(model: AutoEncoder, images: Tensor, labels: Tensor, mu: Tensor) -> Figure:
    """Codes of three elements in space, and beside them three principal components of the same images."""
    pixels = measures.flat(Split(images, labels))
    components = measures.pca(Split(images, labels), 3).transform(pixels)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 5))
        for k, (title, points) in enumerate(
            ((f"{model.title}, z of 3", mu.numpy()), ("PCA, 3 components", components))
        ):
            axes = figure.add_subplot(1, 2, k + 1, projection="3d")
            for label in labels.unique().tolist():
                colour, chosen = CLASS_COLOURS[label % len(CLASS_COLOURS)], (labels == label).cpu().numpy()
                axes.scatter(*points[chosen].T, s=14, alpha=0.7, linewidths=0, color=colour, label=str(label))
            axes.set_title(title)
            axes.tick_params(labelsize=7)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, title="class", frameon=False, markerscale=3, loc="outside right upper")
    return figure


def versus_pca(model: AutoEncoder, train: Split, images: Tensor) -> Figure:
    """Images, the model's reconstructions, and PCA's from as many numbers."""
    fitted = measures.pca(train, model.latent)
    by_pca = fitted.inverse_transform(fitted.transform(measures.flat(Split(images, images))))
    rows = {
        "input": unit(images.cpu()),
        "model": model.reconstruct(images).float().cpu(),
        "PCA": torch.from_numpy(by_pca).reshape(images.shape),
    }
    return stacked(rows, f"Test images from {model.latent} numbers: the model's, and PCA's")


def code_maps(model: AutoEncoder, images: Tensor) -> Figure:
    """Images and their codes, each a square of pixels, white where an element is 0."""
    images = images[:SHOWN]
    z = measures.codes(model, Split(images, torch.zeros(len(images))))
    side = math.ceil(math.sqrt(z.shape[1]))
    maps = torch.nn.functional.pad(z / z.amax(1, keepdim=True).clamp(min=1e-12), (0, side * side - z.shape[1]))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, len(images), figsize=(10, 2.5), squeeze=False)
        for row, pictures in zip(grid, (unit(images.cpu())[:, 0], maps.reshape(-1, side, side)), strict=True):
            for axis, picture in zip(row, pictures, strict=True):
                axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
                axis.spines[:].set_visible(False)
        share = f"{measures.active_share(z):.0%} of the {z.shape[1]} elements are active"
        figure.suptitle(f"Images and their codes: {share}", x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _jacobian(model: AutoEncoder, images: Tensor) -> Tensor:
    return jacobian(lambda one: model.encode(one).mu, model.as_input(images)).detach()


def singular_values(models: dict[str, AutoEncoder], images: Tensor) -> Figure:
    """Singular values of ∂z/∂x in falling order, the mean over the images, for each model."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.6))
        for (name, model), colour in zip(models.items(), (TEST, TRAIN), strict=False):
            spectrum = torch.linalg.svdvals(_jacobian(model, images).flatten(2)).mean(0)
            axes.plot(torch.arange(len(spectrum)) + 1, spectrum, color=colour, linewidth=1.8, label=name)
        axes.set(title="Singular values of ∂z/∂x, mean over test images", xlabel="direction", yscale="log")
        if len(models) > 1:
            axes.legend(frameon=False)
    return figure


def manifold(model: AutoEncoder) -> Figure:
    """Images decoded on a grid of equal prior probability: the unit square through the inverse Gaussian CDF."""
    side = (torch.arange(MANIFOLD) + 0.5) / MANIFOLD
    z = torch.special.ndtri(side)
    grid = torch.stack(torch.meshgrid(-z, z, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
    with torch.inference_mode():
        images = model.mean(model.decode(grid.to(_device(model)))).cpu()
    return show(tile(images, MANIFOLD), "Manifold: z₁ to the right, z₂ upwards")


def styles(model: AutoEncoder, seed: int) -> Figure:
    """Ten styles z, one a row, each drawn as every class."""
    classes = _classes(model)
    torch.manual_seed(seed)
    z = torch.randn(SHOWN, model.latent).repeat_interleave(classes, 0).to(_device(model))
    y = torch.arange(classes, device=z.device).repeat(SHOWN)
    with torch.inference_mode():
        images = model.mean(model.decode(z, y)).cpu()
    names = tuple(str(k) for k in range(classes))
    return show(tile(images, classes), "One style a row, drawn as every class", column_labels=names)


def analogies(model: AutoEncoder, images: Tensor, labels: Tensor) -> Figure:
    """The style of a test image, the mean of q(z|x, y), drawn as every class: the image first, one a row."""
    images, labels, classes = images[:SHOWN], labels[:SHOWN], _classes(model)
    with torch.inference_mode():
        z = model.encode(model.as_input(images), labels).mu.repeat_interleave(classes, 0)
        drawn = model.mean(model.decode(z, torch.arange(classes, device=z.device).repeat(len(images)))).cpu()
    rows = torch.cat([unit(images.cpu())[:, None], drawn.unflatten(0, (len(images), classes))], 1)
    names = ("input", *(str(k) for k in range(classes)))
    return show(tile(rows.flatten(0, 1), classes + 1), "The style of a test image, as every class", column_labels=names)


def walks(model: AutoEncoder, images: Tensor, labels: Tensor) -> Figure:
    """Straight lines between the codes of pairs of images, ``[2·N, …]``, decoded; the images at both ends."""
    y = labels if model.conditional else None
    steps = torch.linspace(0, 1, SHOWN - 2, device=images.device)[:, None]
    rows = []
    with torch.inference_mode():
        z = model.encode(model.as_input(images), y).mu
        for k in range(0, len(images), 2):
            label = None if y is None else y[k].repeat(len(steps))
            between = model.mean(model.decode(torch.lerp(z[k], z[k + 1], steps), label))
            rows += [unit(images[k : k + 1]), between, unit(images[k + 1 : k + 2])]
    names = ("image", *(f"{step:.0%}" for step in steps.flatten().tolist()), "image")
    return show(tile(torch.cat(rows).cpu(), SHOWN), "Walks between the codes of two test images", column_labels=names)


def arithmetic(model: AutoEncoder, test: Split, pairs: list[tuple[int, int]], means: dict[int, Tensor]) -> Figure:
    """z of an image of a − ā + b̄, the mean codes of the classes, decoded: three images for each pair ``(a, b)``."""
    rows: list[Tensor] = []
    with torch.inference_mode():
        for a, b in pairs:
            images = test.images[test.labels == a][:3]
            z = model.encode(model.as_input(images)).mu
            moved = model.mean(model.decode(z - means[a] + means[b]))
            minus, plus = (model.mean(model.decode(means[k][None])).expand_as(moved) for k in (a, b))
            rows.append(torch.stack((unit(images), minus, plus, moved), 1).flatten(0, 1))
    names = ("x", "−ā", "+b̄", "=")
    count = min(len(part) for part in rows)
    picture = torch.cat([part[:count] for part in rows]).cpu()
    return show(tile(picture, count), "Arithmetic with codes", column_labels=names * (count // 4))


def roc(found: measures.Anomaly, held_out: int, name: str) -> Figure:
    """The ROC curves of the model's score and of PCA's error for the class that was held out."""
    curve = measures.package("sklearn.metrics").roc_curve
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5, 4.6))
        rows = ((name, found.model_scores, found.model_auc, TEST), ("PCA", found.pca_scores, found.pca_auc, TRAIN))
        for label, values, auc, colour in rows:
            false, true, _ = curve(found.held_out, values)
            axes.plot(false, true, color=colour, linewidth=1.8, label=f"{label}: AUC {auc:.3f}")
        axes.plot([0, 1], [0, 1], color=FAINT)
        axes.set(title=f"Finding class {held_out}, never seen", xlabel="false positives", ylabel="true positives")
        axes.set_aspect("equal")
        axes.legend(frameon=False, loc="lower right")
    return figure


def bound_curve(found: list[measures.Bound]) -> Figure:
    """The importance-weighted bound by the number of samples, with its standard error."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.4))
        samples, means, errors = zip(*found, strict=True)
        axes.errorbar(samples, means, errors, color=TEST, linewidth=1.8, marker="o", capsize=3)
        axes.set(title="Importance-weighted bound on log p(x)", xlabel="samples K (K = 1: the ELBO)", xscale="log")
        axes.set_xticks(samples, [str(k) for k in samples], minor=False)
        axes.minorticks_off()
        axes.set_ylabel("nats per example")
    return figure


def _device(model: AutoEncoder) -> torch.device:
    return next(model.parameters()).device


def _classes(model: AutoEncoder) -> int:
    return int(model.config["classes"])


def draw_all(
    folder: Path, model: AutoEncoder, data: Data, history: list[dict[str, float]], config: dict[str, Any]
) -> list[Path]:
    """Write the pictures that apply to this run into ``folder``; returns their paths in the order of a report."""
    model.eval()
    test = data.test.to(_device(model))
    torch.manual_seed(config["seed"])
    chosen = torch.randperm(len(test.images))[: SHOWN * 2]
    images, labels = test.images[chosen], test.labels[chosen]
    inputs = corrupted(images, config["corruption"], config["denoise"])
    y, clean = labels if model.conditional else None, images if config["denoise"] else None
    figures = {
        "loss_curves": loss_curves(history),
        "reconstructions": reconstructions(model, inputs, y, clean),
        "samples": samples(model, config["seed"]),
        "latent": latent(model, test.images, test.labels),
    }
    if type(model) in (LinearAE, AE):
        figures["versus_pca"] = versus_pca(model, data.train, images)
    if isinstance(model, SparseAE):
        figures["code_maps"] = code_maps(model, images)
    if isinstance(model, ContractiveAE):
        figures["singular_values"] = singular_values({"model": model}, images)
    if model.conditional:
        figures["styles"] = styles(model, config["seed"])
        figures["analogies"] = analogies(model, images, labels)
    elif model.latent == 2 and isinstance(model, GaussianVAE):
        figures["manifold"] = manifold(model)
    paths = []
    for name, figure in figures.items():
        paths.append(save(figure, folder / f"{name}.png"))
    return paths


def save(figure: Figure, path: Path, dpi: int = DPI) -> Path:
    """Write the figure as a PNG, and close it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, content.getvalue())
    return path
