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
    "reconstructions": "Test images the model has not been trained on, and what it makes of the mean of q(z|x).",
    "samples": "Images decoded from z drawn from the prior N(0, I).",
    "latent": "Where the encoder puts the test images; colours are the classes.",
    "manifold": "Images decoded on a grid over the latent plane, spaced so that each has the same prior probability.",
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


def embed(path: Path) -> dict[str, str]:
    """The PNG at ``path`` as it goes into the page: its source is a ``data:`` address that needs no file."""
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"name": path.stem.replace("_", " "), "caption": CAPTIONS[path.stem], "source": source}


def heading(config: dict[str, Any]) -> str:
    """What was trained, in a few words.

    >>> heading({"model": "cvae", "latent": 20})
    'Conditional VAE, 20 latent elements'
    """
    return f"{MODELS[config['model']].title}, {config['latent']} latent elements"


def write(folder: Path, state: dict[str, Any], pictures: list[Path], parameters: int) -> Path:
    """Write ``report.html`` for the run whose checkpoint holds ``state``; returns its path."""
    config, history = state["config"], state["history"]
    last = history[-1]
    content = PAGES.get_template("report.html").render(
        heading=heading(config),
        data=state["data"],
        epochs=len(history),
        parameters=parameters,
        numbers=[
            (f"{last['test_loss']:.2f}", "test negative ELBO, nats per example"),
            (f"{last['test_reconstruction']:.2f}", "of it reconstruction"),
            (f"{last['test_kl']:.2f}", "of it KL divergence"),
            (f"{last['examples_per_second']:,.0f}", "training examples a second, last epoch"),
        ],
        pictures=[embed(path) for path in pictures],
        options={name.replace("_", " "): value for name, value in config.items() if value is not None},
        environment=state["environment"],
    )
    return _write(folder / "report.html", content)


def write_index(folder: Path, runs: list[tuple[str, dict[str, Any]]]) -> Path:
    """Write ``index.html``, which shows and links the reports of several runs in sub-folders."""
    cards = []
    for name, state in runs:
        paths = [folder / name / f"{picture}.png" for picture in ("manifold", "styles", "samples")]
        picture = embed(next(path for path in paths if path.exists()))
        cards.append((name, heading(state["config"]), state["history"][-1], picture))
    content = PAGES.get_template("index.html").render(data=runs[0][1]["data"], runs=cards)
    return _write(folder / "index.html", content)


def _write(path: Path, content: str) -> Path:
    write_atomically(path, content.encode(errors="replace"))
    return path
