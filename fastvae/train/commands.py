"""What one does with a trained model: each function is one command of ``fastvae``, given its parsed options."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..models import AutoEncoder, GaussianVAE
from . import measures, plots
from .checkpoint import FILE
from .config import Config
from .data import Data
from .loop import load_data, load_model


class Run(NamedTuple):
    """A trained model, what it was trained with, and the data to use it on."""

    model: AutoEncoder
    config: Config
    data: Data


def open_run(options: Namespace) -> Run:
    """The run in ``options.folder``, on its own data or those of ``--data`` or ``--data-root``."""
    model, state = load_model(options.folder)
    config = Config(**{name: value for name, value in state["config"].items() if name in Config.__dataclass_fields__})
    if options.data or options.data_root:
        config = replace(config, data=options.data or config.data, data_root=options.data_root)
    config.check()
    torch.manual_seed(config.seed)
    data = load_data(config)
    if data.shape != model.data_shape:
        expected, got = ("x".join(map(str, shape)) for shape in (model.data_shape, data.shape))
        raise UserError(f"{options.folder / FILE} is a model of {expected} images, got {got} ones: {data.name}")
    if model.conditional and data.classes > model.config["classes"]:
        raise UserError(
            f"{options.folder / FILE} is a model of {model.config['classes']} classes, got label {data.classes - 1}"
        )
    return Run(model, config, data)


def _table(rows: dict[str, float], form: str = "{:.3f}") -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {form.format(value)}")


def evaluate(options: Namespace) -> None:
    """``fastvae evaluate``: the ELBO, its terms, and the importance-weighted bound, of the test set."""
    if options.samples < 1:
        raise UserError(f"--samples must be at least 1, got {options.samples}")
    model, config, data = open_run(options)
    if options.binarise:
        config = replace(config, binarise=options.binarise)
    size = f"{len(data.test.images):,} test examples of {data.name}, pixels {config.binarise}"
    print(f"{model.title}: {size}")
    if not isinstance(model, GaussianVAE):
        error, spread = measures.mean_and_error(measures.scores(model, data.test, config))
        print(f"reconstruction ({model.likelihood})  {error:.3f} ± {spread:.3f} per example; no q(z|x), so no bound")
        return
    log_w, nll = measures.log_weights(model, data.test, config, options.samples)
    found = measures.bounds(log_w)
    elbo, *rest = found
    reconstruction, _ = measures.mean_and_error(nll.mean(0))
    print(f"ELBO                       {elbo.mean:9.3f} ± {elbo.error:.3f} nats per example")
    print(f"  E[log p(x|z)]            {-reconstruction:9.3f}")
    print(f"  -KL(q(z|x) || p(z))      {elbo.mean + reconstruction:9.3f}")
    for bound in rest:
        print(f"bound of {bound.samples:5,} samples      {bound.mean:9.3f} ± {bound.error:.3f}")
    if options.picture:
        print(plots.save(plots.bound_curve(found), options.picture))


def anomaly(options: Namespace) -> None:
    """``fastvae anomaly``: the area under the ROC curve for the class that was held out of the training."""
    model, config, data = open_run(options)
    if config.hold_out is None:
        raise UserError(
            f"{options.folder} was trained on every class: expected a run of fastvae train --hold-out LABEL"
        )
    found = measures.anomaly(model, data, config)
    score = "-ELBO" if isinstance(model, GaussianVAE) else "reconstruction error"
    print(
        f"{data.name}: {found.held_out.sum()} test images of class {config.hold_out}, {(~found.held_out).sum()} others"
    )
    _table({f"ROC AUC, {score}": found.model_auc, f"ROC AUC, PCA of {model.latent} components": found.pca_auc})
    if options.picture:
        print(plots.save(plots.roc(found, config.hold_out, model.title), options.picture))


def cluster(options: Namespace) -> None:
    """``fastvae cluster``: k-means in the latent, against the labels."""
    model, _, data = open_run(options)
    found, centres = measures.cluster(model, data)
    print(f"{data.name}: adjusted Rand index of k-means, {data.classes} clusters, with the labels of the test images")
    _table(found)
    if options.picture and not model.conditional:
        with torch.inference_mode():
            images = model.mean(model.decode(centres)).cpu()
        print(
            plots.save(plots.show(plots.tile(images, len(images)), "Centres of the clusters, decoded"), options.picture)
        )


def probe(options: Namespace) -> None:
    """``fastvae probe``: how well a linear classifier reads the label off the code."""
    model, _, data = open_run(options)
    print(f"{data.name}: test accuracy of logistic regression")
    _table(measures.probe(model, data))


def compress(options: Namespace) -> None:
    """``fastvae compress``: bytes an image, and what is lost."""
    model, config, data = open_run(options)
    print(f"{data.name}, {len(data.test.images):,} test images")
    for name, size, lost in measures.compression(model, data, config):
        print(f"{name:40} {size:8.1f} bytes, lost: {lost}")


def interpolate(options: Namespace) -> None:
    """``fastvae interpolate``: walks between codes, and arithmetic with them, as pictures."""
    model, _, data = open_run(options)
    test, (start, end) = data.test, (options.start, options.end)
    if (start is None) != (end is None):
        raise UserError("--from and --to go together, got one of them")
    order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(options.seed))
    chosen = order[:10]
    if start is not None:
        ends = [order[test.labels[order] == label][:5] for label in (start, end)]
        for name, label, of_class in zip(("--from", "--to"), (start, end), ends, strict=True):
            if not len(of_class):
                labels = ", ".join(map(str, test.labels.unique().tolist()))
                raise UserError(f"{name} must be a class of the test images, {labels}, got {label}")
        count = min(map(len, ends))
        chosen = torch.stack([part[:count] for part in ends], 1).flatten()
    chosen = chosen[: len(chosen) // 2 * 2]
    pictures: dict[str, Any] = {"walks": plots.walks(model, test.images[chosen], test.labels[chosen])}
    classes = data.train.labels.unique().tolist()
    if not model.conditional and len(classes) > 1:
        z = measures.codes(model, data.train)
        means = {label: z[data.train.labels == label].mean(0) for label in classes}
        pairs = [(start, end)] if start is not None else [(a, b) for a in classes[-3:] for b in classes[:2]]
        if all(label in means for pair in pairs for label in pair):
            pictures["arithmetic"] = plots.arithmetic(model, test, pairs, means)
    for name, figure in pictures.items():
        print(plots.save(figure, options.output / f"{name}.png"))
