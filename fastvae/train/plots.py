"""The pictures of a run. Each function draws one figure and returns it; ``draw_all`` writes those that apply."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from torch import Tensor

from ..models import AutoEncoder
from .checkpoint import write_atomically
from .corrupt import corrupted, unit
from .data import Data

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
    scale = max(1, round(700 / width))
    extra = 0.45 + (0.25 if column_labels else 0)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width * scale / 100, height * scale / 100 + extra))
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
    """The negative ELBO and its terms by epoch, training and test."""
    epochs = [row["epoch"] for row in history]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
        terms = (("loss", "negative ELBO"), ("reconstruction", "reconstruction"), ("kl", "KL divergence"))
        for axis, (term, title) in zip(axes, terms, strict=True):
            for split, colour in (("train", TRAIN), ("test", TEST)):
                values = [row[f"{split}_{term}"] for row in history]
                axis.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=split)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, min_n_ticks=1))
        axes[0].set_ylabel("nats per example")
        axes[0].legend(frameon=False)
    return figure


def reconstructions(model: AutoEncoder, inputs: Tensor, labels: Tensor | None) -> Figure:
    """Inputs, uint8, above the reconstructions from the mean of q(z|x)."""
    recon = model.reconstruct(inputs, labels).cpu()
    columns = min(SHOWN, len(recon))
    pairs = zip(unit(inputs.cpu()).split(columns), recon.split(columns), strict=True)
    rows = [part for pair in pairs for part in pair if len(part) == columns]
    names = ("input", "output") * (len(rows) // 2)
    return show(tile(torch.cat(rows), columns), "Test images and their reconstructions", names)


def samples(model: AutoEncoder, seed: int) -> Figure:
    """Images decoded from the prior; for a conditional model, ten rows of all classes."""
    torch.manual_seed(seed)
    y = None
    if model.conditional:
        y = torch.arange(SHOWN, device=_device(model)).remainder(_classes(model)).repeat(SHOWN)
    return show(tile(model.sample(SHOWN * SHOWN, y).cpu(), SHOWN), "Samples from the prior")


def latent(model: AutoEncoder, images: Tensor, labels: Tensor) -> Figure:
    """Means of q(z|x) of the test images by class; with more than two elements, along their two widest directions."""
    images, labels = images[:SCATTER], labels[:SCATTER]
    with torch.inference_mode():
        mu = model.encode(model.as_input(images), labels if model.conditional else None).mu.float().cpu()
    x_label, y_label, title = "z₁", "z₂", "Latent means by class"
    if mu.shape[1] == 1:
        mu = torch.stack([mu[:, 0], torch.zeros(len(mu))], dim=1)
    elif mu.shape[1] > 2:
        centred = mu - mu.mean(dim=0)
        _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
        share = (spread[:2] ** 2 / (spread**2).sum()).tolist()
        mu = centred @ directions[:2].T
        x_label, y_label = (f"principal component {k + 1} ({share[k]:.0%} of the variance)" for k in range(2))
        title = f"Latent means by class, {model.latent} elements projected to two"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 6))
        for label in labels.unique().tolist():
            chosen = (labels == label).cpu()
            colour = CLASS_COLOURS[label % len(CLASS_COLOURS)]
            axes.scatter(mu[chosen, 0], mu[chosen, 1], s=7, alpha=0.7, linewidths=0, color=colour, label=str(label))
        axes.set(title=title, xlabel=x_label, ylabel=y_label, aspect="equal")
        axes.legend(title="class", frameon=False, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def manifold(model: AutoEncoder) -> Figure:
    """Images decoded on a grid of equal prior probability: the unit square through the inverse Gaussian CDF."""
    side = (torch.arange(MANIFOLD) + 0.5) / MANIFOLD
    z = torch.special.ndtri(side)
    grid = torch.stack(torch.meshgrid(-z, z, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
    with torch.inference_mode():
        images = model.mean(model.decode(grid.to(_device(model)))).cpu()
    return show(tile(images, MANIFOLD), "Manifold: z₁ to the right, z₂ upwards, steps of equal probability")


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
    labels = test.labels if model.conditional else None
    torch.manual_seed(config["seed"])
    chosen = torch.randperm(len(test.images))[: SHOWN * 2]
    inputs = corrupted(test.images[chosen], config["corruption"], config["denoise"])
    figures = {
        "loss_curves": loss_curves(history),
        "reconstructions": reconstructions(model, inputs, None if labels is None else labels[chosen]),
        "samples": samples(model, config["seed"]),
        "latent": latent(model, test.images, test.labels),
    }
    if model.conditional:
        figures["styles"] = styles(model, config["seed"])
    elif model.latent == 2:
        figures["manifold"] = manifold(model)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        plt.close(figure)
        write_atomically(paths[-1], content.getvalue())
    return paths
