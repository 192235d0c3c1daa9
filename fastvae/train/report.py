"""A run as one self-contained HTML page: its numbers, its pictures, its configuration.

The pages are the Jinja templates in ``templates/``; here is what they are given.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, NamedTuple

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


class Picture(NamedTuple):
    """A picture inside the page: ``source`` is a ``data:`` address that needs no file."""

    name: str
    caption: str
    source: str


def embed(path: Path) -> Picture:
    """The PNG at ``path`` as it goes into the page."""
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return Picture(path.stem.replace("_", " "), CAPTIONS[path.stem], source)


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
        picture = folder / name / ("styles.png" if state["config"]["model"] == "cvae" else "samples.png")
        if (folder / name / "manifold.png").exists():
            picture = folder / name / "manifold.png"
        cards.append(
            {
                "folder": name,
                "heading": heading(state["config"]),
                "loss": state["history"][-1]["test_loss"],
                "epochs": len(state["history"]),
                "picture": embed(picture),
            }
        )
    content = PAGES.get_template("index.html").render(data=runs[0][1]["data"], runs=cards)
    return _write(folder / "index.html", content)


def _write(path: Path, content: str) -> Path:
    write_atomically(path, content.encode(errors="replace"))
    return path
