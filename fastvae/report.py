"""A run as one self-contained HTML page: its numbers, its pictures, its configuration."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically

CAPTIONS = {
    "loss_curves": "Negative ELBO and its two terms, in nats per example. Training values are averages over the epoch.",
    "reconstructions": "Test images the model has not been trained on, and what it makes of the mean of q(z|x).",
    "samples": "Images decoded from z drawn from the prior N(0, I).",
    "latent": "Where the encoder puts the test images; colours are the classes.",
    "manifold": "Images decoded on a grid over the latent plane, spaced so that each has the same prior probability.",
    "styles": "Each row is one z: what the digit's label does not say (slant, weight, width) stays, the label changes.",
}

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #d5dbe1; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0; color: var(--soft); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 16px; margin: 28px 0; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px; }
.numbers strong { display: block; font-size: 28px; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; }
section { margin: 20px 0; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 16px auto 0; }
table { width: 100%; border-collapse: collapse; margin-top: 10px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 0; border-top: 1px solid var(--line); font-weight: normal;
  vertical-align: top; }
th { color: var(--soft); width: 40%; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 20px; }
a { color: var(--accent); }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def embed(picture: Path) -> str:
    """``picture`` as an image element that needs no file."""
    name = picture.stem.replace("_", " ")
    content = base64.b64encode(picture.read_bytes()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{content}">'


def table(rows: dict[str, Any]) -> str:
    """Names and values."""
    cells = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"


def number(value: str, label: str) -> str:
    """One figure and what it is."""
    return f'<div class="card"><strong>{html.escape(value)}</strong><p>{html.escape(label)}</p></div>'


def heading(config: dict[str, Any]) -> str:
    """What was trained, in a few words."""
    names = {"vae": "VAE", "cvae": "Conditional VAE", "conv": "Convolutional VAE"}
    return f"{names[config['model']]}, {config['latent']} latent elements"


def write(folder: Path, state: dict[str, Any], pictures: list[Path], parameters: int) -> Path:
    """Write ``report.html`` for the run whose checkpoint holds ``state``; returns its path."""
    config, history, environment = state["config"], state["history"], state["environment"]
    last = history[-1]
    numbers = [
        number(f"{last['test_loss']:.2f}", "test negative ELBO, nats per example"),
        number(f"{last['test_reconstruction']:.2f}", "of it reconstruction"),
        number(f"{last['test_kl']:.2f}", "of it KL divergence"),
        number(f"{last['examples_per_second']:,.0f}", "training examples a second, last epoch"),
    ]
    figures = [
        f'<section class="card"><h2>{html.escape(p.stem.replace("_", " ").capitalize())}</h2>'
        f"<p>{html.escape(CAPTIONS[p.stem])}</p><figure>{embed(p)}</figure></section>"
        for p in pictures
    ]
    options = {name.replace("_", " "): value for name, value in config.items() if value is not None}
    body = "\n".join(
        [
            f"<h1>{html.escape(heading(config))}</h1>",
            f"<p>{html.escape(state['data'])} · {len(history)} epochs · {parameters:,} parameters</p>",
            f'<div class="numbers">{"".join(numbers)}</div>',
            *figures,
            '<div class="columns">',
            f'<section class="card"><h2>Configuration</h2>{table(options)}</section>',
            f'<section class="card"><h2>Environment</h2>{table(environment)}</section>',
            "</div>",
        ]
    )
    path = folder / "report.html"
    write_atomically(path, page(f"fastvae: {heading(config)}", body).encode())
    return path


def write_index(folder: Path, runs: list[tuple[str, dict[str, Any]]]) -> Path:
    """Write ``index.html``, which shows and links the reports of several runs in sub-folders."""
    cards = []
    for name, state in runs:
        last = state["history"][-1]
        picture = folder / name / ("styles.png" if state["config"]["model"] == "cvae" else "samples.png")
        if (folder / name / "manifold.png").exists():
            picture = folder / name / "manifold.png"
        cards.append(
            f'<section class="card"><h2><a href="{html.escape(name)}/report.html">'
            f"{html.escape(heading(state['config']))}</a></h2><p>{last['test_loss']:.2f} nats per test example "
            f"after {len(state['history'])} epochs</p>"
            f"<figure>{embed(picture)}</figure></section>"
        )
    body = (
        f"<h1>Trained with fastvae</h1><p>{html.escape(runs[0][1]['data'])}</p>"
        f'<div class="columns" style="margin-top: 24px">{"".join(cards)}</div>'
    )
    path = folder / "index.html"
    write_atomically(path, page("Trained with fastvae", body).encode())
    return path
