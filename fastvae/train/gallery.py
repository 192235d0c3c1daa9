"""Every model, trained briefly, on one page: what ``fastvae gallery`` writes.

A card is a system: the sentence, the formula, the claim it shows, its runs, and what is drawn of them.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..models import AutoEncoder, GaussianVAE
from . import measures, plots, report
from .config import Config, add_options, given
from .data import Data
from .loop import Trainer

LATENTS = (2, 3, 5, 10, 20)
WIDTH, QUALITY = 720, 70  # of the pictures for a docs page, WebP


class Trained(NamedTuple):
    """A run of the gallery: how it was asked for, and what came of it."""

    command: str
    config: Config
    model: AutoEncoder
    data: Data
    history: list[dict[str, float]]


Runs = dict[str, Trained]
#: pictures by their captions, and a table: rows of a name and its values, the first the heading
Drawn = tuple[dict[str, Any], list[tuple[str, ...]]]


class Card(NamedTuple):
    """One system of the page; ``runs`` are the options of ``fastvae train`` by a name."""

    name: str
    title: str
    sentence: str
    formula: str
    claim: str
    runs: dict[str, str]
    draw: Callable[[Runs], Drawn]
    uses: tuple[str, ...] = ()  # commands on the first run
    beside: str = ""  # what others found, and how theirs differs


def _loss(run: Trained) -> str:
    return f"{run.history[-1]['test_loss']:.2f}"


def _images(run: Trained, count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    test = run.data.test
    chosen = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(0))[:count]
    return test.images[chosen], test.labels[chosen]


def _reconstructed(run: Trained) -> Any:
    from .corrupt import corrupted

    torch.manual_seed(0)
    images, labels = _images(run, 10)
    inputs = corrupted(images, run.config.corruption, run.config.denoise)
    y = labels if run.model.conditional else None
    return plots.reconstructions(run.model, inputs, y, images if run.config.denoise else None)


def _numbers(runs: Runs) -> list[tuple[str, ...]]:
    """The last test loss of each run, and what the model is measured by."""
    rows: list[tuple[str, ...]] = [("run", "test loss", "measured")]
    for name, run in runs.items():
        found = measures.findings(run.model, run.data, run.config)
        rows.append((name, _loss(run), "; ".join(f"{value} {label}" for value, label in found) or "–"))
    return rows


def _linear(runs: Runs) -> Drawn:
    (run,) = runs.values()
    return {"versus_pca": plots.versus_pca(run.model, run.data.train, _images(run, 10)[0])}, _numbers(runs)


def _basic(runs: Runs) -> Drawn:
    (run,) = runs.values()
    pictures, rows = _linear(runs)
    z, pixels = measures.codes(run.model, run.data.test), measures.flat(run.data.test)
    fitted = measures.pca(run.data.train, run.model.latent)
    with torch.inference_mode():
        recon = run.model.reconstruct(run.data.test.images).flatten(1).numpy()
    by_model, by_pca = (
        ((part - pixels) ** 2).mean() for part in (recon, fitted.inverse_transform(fitted.transform(pixels)))
    )
    rows = [
        ("squared error a pixel, test", "autoencoder", "PCA"),
        ("3 numbers an image", f"{by_model:.4f}", f"{by_pca:.4f}"),
    ]
    test = run.data.test
    return {"latent": plots.latent_3d(run.model, test.images, test.labels, z), **pictures}, rows


def _plain(runs: Runs) -> Drawn:
    return {f"{name}: reconstructions": _reconstructed(run) for name, run in runs.items()}, _numbers(runs)


def _sparse(runs: Runs) -> Drawn:
    pictures = {f"{name}: code_maps": plots.code_maps(run.model, _images(run, 10)[0]) for name, run in runs.items()}
    rows: list[tuple[str, ...]] = [("run", "test reconstruction", "of the code's elements active")]
    for name, run in runs.items():
        share = measures.active_share(measures.codes(run.model, run.data.test))
        rows.append((name, f"{run.history[-1]['test_reconstruction']:.2f}", f"{share:.1%}"))
    return pictures, rows


def _contractive(runs: Runs) -> Drawn:
    images = next(iter(runs.values())).data.test.images[:50]
    figure = plots.singular_values({name: run.model for name, run in runs.items()}, images)
    rows: list[tuple[str, ...]] = [("run", "test reconstruction", "‖∂z/∂x‖")]
    for name, run in runs.items():
        norm = measures.mean_jacobian_norm(run.model, run.data.test)
        rows.append((name, f"{run.history[-1]['test_reconstruction']:.2f}", f"{norm:.3f}"))
    return {"singular_values": figure}, rows


def _latents(runs: Runs) -> Drawn:
    latent = len({run.model.latent for run in runs.values()}) > 1
    named = {f"latent {name}" if latent else name: run.model for name, run in runs.items()}
    pictures = {"samples": plots.sample_grids(named, 0)}
    rows: list[tuple[str, ...]] = [("latent" if latent else "run", "test ELBO, nats", "E[log p(x|z)]", "−KL")]
    for name, run in runs.items():
        last = run.history[-1]
        rows.append((name, *(f"{-last[f'test_{term}']:.2f}" for term in ("loss", "reconstruction", "kl"))))
    return pictures, rows


def _curves(runs: Runs) -> Drawn:
    pictures = {}
    for name, run in runs.items():
        of = f"{name}: " if len(runs) > 1 else ""
        pictures[f"{of}loss_curves"] = plots.loss_curves(run.history)
        pictures[f"{of}samples"] = plots.samples(run.model, 0)
    return pictures, _numbers(runs)


def _conditional(runs: Runs) -> Drawn:
    pictures = {}
    for name, run in runs.items():
        if run.config.denoise:
            pictures[f"{name}: reconstructions"] = _reconstructed(run)
        else:
            pictures[f"{name}: styles"] = plots.styles(run.model, 0)
            pictures[f"{name}: analogies"] = plots.analogies(run.model, *_images(run, 10))
    return pictures, _numbers(runs)


def _bounds(runs: Runs) -> Drawn:
    pictures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for name, run in runs.items():
        assert isinstance(run.model, GaussianVAE)
        torch.manual_seed(0)
        found = measures.bounds(measures.log_weights(run.model, run.data.test, run.config, 50)[0])
        rows = rows or [("trained by", *("ELBO" if b.samples == 1 else f"K = {b.samples}" for b in found))]
        rows.append((name, *(f"{b.mean:.2f} ± {b.error:.2f}" for b in found)))
        pictures.setdefault("bound_curve", plots.bound_curve(found))
    return pictures, rows


def _manifolds(runs: Runs) -> Drawn:
    return {f"{name}: manifold": plots.manifold(run.model) for name, run in runs.items()}, _numbers(runs)


def _anomaly(runs: Runs) -> Drawn:
    rows: list[tuple[str, ...]] = [("held out", "ROC AUC, −ELBO", "ROC AUC, PCA's error")]
    pictures: dict[str, Any] = {}
    for run in runs.values():
        torch.manual_seed(0)
        found, label = measures.anomaly(run.model, run.data, run.config), run.config.hold_out
        rows.append((str(label), f"{found.model_auc:.3f}", f"{found.pca_auc:.3f}"))
        pictures = pictures or {"roc": plots.roc(found, int(label or 0), "VAE")}
    return pictures, rows


def _codes(runs: Runs) -> Drawn:
    (run,) = runs.values()
    found, centres = measures.cluster(run.model, run.data)
    accuracies = measures.probe(run.model, run.data)
    with torch.inference_mode():
        images = run.model.mean(run.model.decode(centres))
    rows: list[tuple[str, ...]] = [("given", "k-means, adjusted Rand index", "logistic regression, accuracy")]
    rows += [(name, f"{found[name]:.3f}", f"{accuracies[name]:.3f}") for name in found]
    return {"clusters": plots.show(plots.tile(images, len(images)), "Centres of the clusters, decoded")}, rows


def _walks(runs: Runs) -> Drawn:
    (run,) = runs.values()
    train, test = run.data.train, run.data.test
    z = measures.codes(run.model, train)
    means = {label: z[train.labels == label].mean(0) for label in range(run.data.classes)}
    images, labels = _images(run, 10)
    pairs = [(7, 1), (3, 8), (4, 9)]
    figures = {
        "walks": plots.walks(run.model, images, labels),
        "arithmetic": plots.arithmetic(run.model, test, pairs, means),
    }
    return figures, []


def _bytes(runs: Runs) -> Drawn:
    (run,) = runs.values()
    torch.manual_seed(0)
    rows: list[tuple[str, ...]] = [("what is kept", "bytes an image", "what is lost")]
    rows += [(name, f"{size:.1f}", lost) for name, size, lost in measures.compression(run.model, run.data, run.config)]
    return {"reconstructions": _reconstructed(run)}, rows


_VAE = "--model vae --epochs 30"
CARDS = (
    Card(
        "linear-ae", "Linear autoencoder", "784–20–784 without an activation, squared error, Adam.",
        "‖x − V(Wx + b) − c‖²",
        "A linear autoencoder finds the subspace of the first principal components.",
        {"linear-ae": "--model linear-ae"}, _linear,
    ),
    Card(
        "ae", "Basic autoencoder", "784–128–3–128–784 with sigmoids, cross-entropy, batches of 32.",
        "−Σ x·log y + (1 − x)·log(1 − y), y = g(f(x))",
        "Its code approximates PCA of the same width, and bends where PCA cannot.",
        {"ae": "--model ae --learning-rate 2e-3 --epochs 60"}, _basic,
    ),
    Card(
        "conv-ae", "Convolutional autoencoder", "Two strided convolutions down to 20 numbers, two up.",
        "−Σ x·log y + (1 − x)·log(1 − y)",
        "Weights shared over the image: fewer parameters than a dense layer, and a sharper image.",
        {"conv-ae": "--model conv-ae --epochs 10"}, _plain,
    ),
    Card(
        "denoising-ae", "Denoising autoencoder", "A corrupted image in, the clean one as the target.",
        "−log p(x | z = f(x̃)), x̃ ~ C(x̃ | x)",
        "To restore the image, the code must know what digits look like; copying would not do.",
        {
            "gaussian": "--model denoising-ae --epochs 15",
            "masking": "--model denoising-ae --corruption masking --epochs 15",
            "salt-and-pepper": "--model denoising-ae --corruption salt-and-pepper --epochs 15",
        }, _plain,
    ),
    Card(
        "sparse-ae", "Sparse autoencoder", "More code than image, 784–1024–784, and an L1 penalty on what is active.",
        "−log p(x | z) + λ Σ |z|, or of all activations",
        "Few elements at a time explain an image, at nearly the plain autoencoder's error.",
        {
            "plain": "--model sparse-ae --sparsity 0 --epochs 8",
            "L1 on the code": "--model sparse-ae --epochs 8",
            "L1 on all activations": "--model sparse-ae --sparse all --sparsity 0.03 --epochs 8",
        }, _sparse,
    ),
    Card(
        "contractive-ae", "Contractive autoencoder", "One sigmoid layer each way; the penalty is analytic there.",
        "−log p(x | z) + λ ‖∂z/∂x‖²",
        "The code ignores most directions of the image, and follows a few.",
        {
            "plain": "--model contractive-ae --contraction 0 --epochs 10",
            "contractive": "--model contractive-ae --contraction 2 --epochs 10",
        }, _contractive,
    ),
    Card(
        "lstm-ae", "LSTM autoencoder", "An LSTM reads a sequence into one vector; another writes it from that vector.",
        "Σₜ ‖xₜ − yₜ‖²",
        "One vector holds a sequence: a sine, or a digit read row by row.",
        {
            "sines": "--model lstm-ae --data sines --latent 32 --learning-rate 3e-3 --epochs 120",
            "digits, row by row": "--model lstm-ae --data digits --latent 32 --learning-rate 1e-2 --epochs 30",
        }, _plain,
    ),
    Card(
        "vae", "VAE, by the size of its latent", "784–400–z–400–784: random samples of each size.",
        "−E[log p(x|z)] + KL(q(z|x) ‖ N(0, I))",
        "More latent elements help up to about ten; then the KL switches off what is not needed.",
        {f"{latent}": f"{_VAE} --latent {latent}" for latent in LATENTS}, _latents,
    ),
    Card(
        "aevb", "As the AEVB paper trained it", "500 tanh units, batches of 100, one sample of z each, Adagrad.",
        "−E[log p(x|z)] + KL(q(z|x) ‖ N(0, I)), L = 1",
        "One sample an example is enough, if batches are large.",
        {"aevb": "--model aevb --learning-rate 1e-2 --epochs 40"}, _curves,
        beside="After 40 epochs the KL is still 26 nats: codes lie far apart, and samples that fall between them are "
        "dark. The paper trains for 100 million samples, 600 times as long.",
    ),
    Card(
        "vae-digits", "The VAE from scratch, on 8×8 digits", "64–16–2, ReLU, squared error, SGD at 1e-3, 201 epochs.",
        "Σ (x − y)² + ½ Σ (mu² + σ² − log σ² − 1)",
        "What two elements explain of a digit is worth less than their KL: the code is given up, and every sample is "
        "the mean. With a smaller weight of the KL it is used.",
        {
            "as in the lecture": "--model vae-digits",
            "β = 0.1": "--model vae-digits --beta 0.1 --learning-rate 1e-2",
        }, _curves,
        beside="The lecture's `get_reg_error` leaves out the ½ of its own formula: its KL is twice the one here.",
    ),
    Card(
        "conv-vae", "VAE with σ and clipped cross-entropy", "Noise in, clean image out; σ from a softplus; dropout.",
        "−Σ x·log y + (1 − x)·log(1 − y), y in [1e-8, 1 − 1e-8]; ½ Σ mu² + σ² − log(1e-8 + σ²) − 1",
        "The clip keeps the loss finite, and the same network denoises.",
        {"conv-vae": "--model conv-vae --epochs 12"}, _plain,
    ),
    Card(
        "cvae", "Conditional VAE", "The label is an input of encoder and decoder; |z| = 2.",
        "−E[log p(x|z, y)] + KL(q(z|x, y) ‖ N(0, I))",
        "z is left with the style: one z drawn as every label is one hand, and a test image gives its style away.",
        {
            "|z| = 2": "--model cvae --latent 2 --epochs 40",
            "denoising": "--model cvae --denoise 0.3 --epochs 15",
        }, _conditional,
    ),
    Card(
        "beta-vae", "β-VAE and free bits", "The same VAE with another weight of the KL, or with a floor under it.",
        "−E[log p(x|z)] + β·KL, or Σ max(λ, KLⱼ)",
        "β trades the rate of the code for its distortion; free bits keep every element in use.",
        {
            "β = 4": "--model vae --beta 4 --epochs 15",
            "β = 1": "--model vae --epochs 15",
            "free bits 0.5": "--model vae --free-bits 0.5 --epochs 15",
        }, _latents,
    ),
    Card(
        "iwae", "Importance-weighted bound", "784–200–200–50, tanh, on pixels drawn anew as 0 and 1 at each step.",
        "log mean over K of p(x|z)·p(z)/q(z|x) ≥ ELBO",
        "With more samples the bound rises towards log p(x), and training by it makes a better model.",
        {
            "ELBO": "--model iwae --bound elbo --samples 1 --epochs 60",
            "K = 5": "--model iwae --epochs 60",
        }, _bounds, ("evaluate --samples 50",),
        beside="Burda, Grosse and Salakhutdinov (arXiv:1509.00519, table 1) report −86.76 for this network trained by "
        "the ELBO and −85.54 with K = 5, by 5,000 samples, on 60,000 digits for 3,280 epochs. "
        "Here: 4,000 digits, 60 epochs; pixels drawn as 0 and 1 at each step, for the test once.",
    ),
    Card(
        "manifold", "Manifolds by the inverse CDF", "The unit square through the Gaussian's inverse CDF, decoded.",
        "z = (Φ⁻¹(u₁), Φ⁻¹(u₂))",
        "Two elements order digits, and faces, so that neighbours look alike. Faces: Gaussian decoder, learned σ.",
        {
            "digits": f"{_VAE} --latent 2",
            "faces": "--model vae --data faces --latent 2 --likelihood gaussian --variance learned --batch-size 20 "
            "--learning-rate 5e-3 --epochs 200",
        }, _manifolds,
    ),
    Card(
        "anomaly", "Anomaly detection", "A VAE that has never seen one of the digits; test images by their ELBO.",
        "score(x) = −ELBO(x)",
        "What a model has not learned it explains badly.",
        {f"without {label}": f"{_VAE} --hold-out {label}" for label in (2, 0, 8)}, _anomaly, ("anomaly",),
    ),
    Card(
        "codes", "Clusters, and features for a classifier", "k-means and logistic regression on z, PCA's and pixels.",
        "z = E[q(z|x)]",
        "Classes lie apart in the latent though no label was seen.",
        {"vae": f"{_VAE} --latent 10"}, _codes, ("cluster", "probe"),
    ),
    Card(
        "walks", "Walks and arithmetic", "Lines between codes; and z − ā + b̄, with the mean codes of two classes.",
        "decode(z₁ + t·(z₂ − z₁))",
        "Between two images the decoder finds images; differences of means are directions.",
        {"vae": f"{_VAE} --latent 10"}, _walks, ("interpolate",),
    ),
    Card(
        "compression", "Compression", "Twenty floats, or the ELBO's rate by bits-back coding.",
        "−ELBO / (8 log 2) bytes",
        "The ELBO is a length of code: what a VAE explains, it compresses.",
        {"vae": _VAE}, _bytes, ("compress",),
    ),
)  # fmt: skip


def make(folder: Path, only: list[str] | None = None) -> Path:
    """Train what the cards ask for, and write pictures and ``index.html`` into ``folder``; returns the page's path.

    Beside them are ``gallery.md`` and ``gallery/``, the same for a docs site with smaller pictures.
    """
    names = [card.name for card in CARDS]
    if unknown := set(only or ()) - set(names):
        raise UserError(f"--only must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    chosen = [card for card in CARDS if not only or card.name in only]
    start, cards = time.perf_counter(), []
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    done: dict[str, Trained] = {}
    for place, card in enumerate(chosen):
        print(f"{place + 1}/{len(chosen)} {card.title}", file=sys.stderr)
        runs = {name: _train(options, folder, done) for name, options in card.runs.items()}
        figures, rows = card.draw(runs)
        pictures = []
        for caption, figure in figures.items():
            name, _, kind = caption.rpartition(": ")
            words = re.findall(r"[a-z0-9]+", f"{card.name} {caption}".lower().replace("β", "beta"))
            path = plots.save(figure, folder / f"{'-'.join(words)}.png")
            small = _small(path, folder / "gallery" / f"{path.stem}.webp")
            pictures.append(
                {
                    **report.embed(_few_colours(path), kind),
                    "of": name if len(runs) > 1 else "",
                    "small": small.relative_to(folder).as_posix(),
                }
            )
        commands = [run.command for run in runs.values()]
        used = [f"fastvae {use.partition(' ')[0]} FOLDER {use.partition(' ')[2]}".strip() for use in card.uses]
        cards.append({"card": card, "pictures": pictures, "rows": rows, "commands": [*commands, *used]})
    given = {"cards": cards, "minutes": (time.perf_counter() - start) / 60, "environment": report_environment()}
    for template, name in (("gallery.md", "gallery.md"), ("gallery.html", "index.html")):
        page = report.write_page(folder / name, report.PAGES.get_template(template).render(given))
    return page


def _small(path: Path, small: Path) -> Path:
    """The picture at ``path`` as a WebP no wider than a docs page."""
    from PIL import Image

    with Image.open(path) as picture:
        wide = picture.convert("RGB")
        wide.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
        wide.save(small, quality=QUALITY, method=6)
    return small


def _few_colours(path: Path) -> Path:
    """The same picture with a palette: a third of the bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        # as many greys as an eye tells apart, or the colours of the classes and their shades
        picture.convert("RGB").quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def report_environment() -> str:
    """Where the numbers come from, in a line."""
    from .loop import environment

    return ", ".join(f"{name} {value}" for name, value in environment(torch.device("cpu")).items())


def _train(options: str, folder: Path, done: dict[str, Trained]) -> Trained:
    """What ``fastvae train`` with these options gives; those that two cards share are trained once."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = Config(**given(parser.parse_args(options.split())))
    if (key := repr(config)) not in done:
        config.check()
        run = folder / "runs" / f"{len(done):02}"
        run.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, run)
        trainer.fit(say=lambda line: None)
        trainer.model.eval()
        done[key] = Trained(f"fastvae train {options}", config, trainer.model, trainer.data, trainer.history)
    return done[key]
