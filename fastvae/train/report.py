"""A run as one self-contained HTML page: its numbers, its pictures, its configuration.

The pages are the Jinja templates in ``templates/``; here is what they are given.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..models import MODELS
from .checkpoint import write_atomically

CAPTIONS = {
    "loss_curves": "Negative ELBO and its two terms, in nats per example. Training values are averages over the epoch.",
    "reconstructions": "Test images the model has not been trained on, and what it makes of their codes.",
    "samples": "What the decoder alone makes of random codes.",
    "latent": "Where the encoder puts the test images; colours are the classes.",
    "manifold": "Images decoded on a grid over the latent plane, spaced so that each has the same prior probability.",
    "versus_pca": "The same test images from as many numbers: by the model, and by principal components.",
    "code_maps": "The elements of the code as a square, darker where they are larger, white where they are 0.",
    "singular_values": "How far the code moves with the image, by direction: few large values are a tangent plane.",
    "analogies": "Each row is the style of one test image, the first: the encoder's mean, decoded with every label.",
    "styles": "Each row is one z: what the digit's label does not say (slant, weight, width) stays, the label changes.",
}
PAGES = Environment(
    loader=PackageLoader("fastvae.train"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def embed(path: Path, kind: str = "") -> dict[str, str]:
    """The PNG at ``path`` as it goes into the page: its source is a ``data:`` address that needs no file."""
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    kind = kind or path.stem
    return {"name": kind.replace("_", " "), "caption": CAPTIONS.get(kind, ""), "source": source}


def heading(config: dict[str, Any]) -> str:
    """What was trained, in a few words.

    >>> heading({"model": "cvae", "latent": 20})
    'Conditional VAE, 20 latent elements'
    """
    return f"{MODELS[config['model']].title}, {config['latent']} latent elements"


def headlines(last: dict[str, float]) -> list[tuple[str, str]]:
    """The last row of a history as numbers with their labels."""
    if "test_kl" in last:
        kinds = {"loss": "test negative ELBO, nats per example", "kl": "of it KL divergence"}
    else:
        kinds = {"loss": "test loss per example", "penalty": "of it penalty"}
    kinds = {"loss": kinds.pop("loss"), "reconstruction": "of it reconstruction", **kinds}
    return [(f"{last[f'test_{term}']:.2f}", label) for term, label in kinds.items()]


def write(
    folder: Path,
    state: dict[str, Any],
    pictures: list[Path],
    parameters: int,
    findings: list[tuple[str, str]],
) -> Path:
    """Write ``report.html`` for the run whose checkpoint holds ``state``; returns its path."""
    config, history = state["config"], state["history"]
    last = history[-1]
    content = PAGES.get_template("report.html").render(
        heading=heading(config),
        data=state["data"],
        epochs=len(history),
        parameters=parameters,
        numbers=[
            *headlines(last),
            *findings,
            (f"{last['examples_per_second']:,.0f}", "training examples a second, last epoch"),
        ],
        pictures=[embed(path) for path in pictures],
        options={name.replace("_", " "): value for name, value in config.items() if value is not None},
        environment=state["environment"],
    )
    return write_page(folder / "report.html", content)


def write_index(folder: Path, runs: list[tuple[str, dict[str, Any]]]) -> Path:
    """Write ``index.html``, which shows and links the reports of several runs in sub-folders."""
    cards = []
    for name, state in runs:
        paths = [folder / name / f"{picture}.png" for picture in ("manifold", "styles", "samples")]
        picture = embed(next(path for path in paths if path.exists()))
        cards.append((name, heading(state["config"]), state["history"][-1], picture))
    content = PAGES.get_template("index.html").render(data=runs[0][1]["data"], runs=cards)
    return write_page(folder / "index.html", content)


def write_page(path: Path, content: str) -> Path:
    """Write the page, replacing an old one."""
    write_atomically(path, content.encode(errors="replace"))
    return path
