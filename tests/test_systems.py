"""What each model of the lectures is for: its defining property, on small real data."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastvae.cli import main
from fastvae.errors import UserError
from fastvae.functional import reparameterize
from fastvae.models import AE, CVAE, MODELS, VAE, ContractiveAE, VAEDigits, build
from fastvae.models.contractive_ae import jacobian_norm, sigmoid_jacobian_norm
from fastvae.train import corrupt, data, measures
from fastvae.train.config import Config
from fastvae.train.loop import Trainer, load_model

LABELS = torch.tensor([3, 1, 4])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Small steps are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(folder: Path, model: str, **options: Any) -> Trainer:
    config = Config(**{"model": model, "data": "digits", "batch_size": 64, **options})
    config.check()
    folder.mkdir(exist_ok=True)
    trainer = Trainer(config, folder)
    trainer.save = lambda: None  # type: ignore[method-assign]  # only the weights matter here
    trainer.fit()
    trainer.model.eval()
    return trainer


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE that has never seen a 0, in a folder."""
    folder = tmp_path_factory.mktemp("runs")
    Trainer(Config(data="digits", latent=8, epochs=20, hold_out=0, batch_size=64), folder).fit()
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_one_interface(name: str) -> None:
    model = build(name, {"data_shape": (1, 8, 8), "latent": 4})
    y = LABELS if model.conditional else None
    x = torch.rand(3, 1, 8, 8)
    loss, reconstruction, rest = model.loss(x, y)
    assert model.loss(x, y)._fields == model.terms
    if name != "iwae":
        torch.testing.assert_close(loss, reconstruction + rest)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert model.sample(3, y).shape == model.reconstruct(x, y).shape == (3, 1, 8, 8)
    again = build(name, model.config)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval().reconstruct(x, y), model.reconstruct(x, y))
    with pytest.raises(ValueError, match=r"x must be \[B, 1, 8, 8\] for this model, got \[3, 63\]"):
        model.loss(torch.rand(3, 63), y)


@pytest.mark.parametrize("name", ["aevb", "vae-digits", "sparse-ae", "lstm-ae"])
def test_every_optimiser_and_preset_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": name, "latent": 4, "batch_size": 512}
    if name != "vae-digits":
        given["data"] = "digits"
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    Trainer(Config(**given, epochs=2), tmp_path / "whole").fit()
    Trainer(Config(**given, epochs=1), tmp_path / "parts").fit()
    Trainer(Config(**given, epochs=2), tmp_path / "parts", resume=True).fit()
    whole, parts = (load_model(tmp_path / folder)[0].state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_linear_spans_the_principal_subspace(tmp_path: Path) -> None:
    run = trained(tmp_path, "linear-ae", latent=10, learning_rate=1e-2, epochs=90)
    assert measures.subspace_angle(run.model, run.data.train) < 5


def test_the_halves_of_the_basic_autoencoder_are_models() -> None:
    model, x = AE((8, 8)), torch.rand(2, 8, 8)
    z = model.encoder(x.flatten(1))
    assert z.shape == (2, 3)
    torch.testing.assert_close(model.decoder(z).reshape(2, 8, 8), model.reconstruct(x))
    kinds = [type(layer) for layer in (*model.encoder, *model.decoder)]
    assert kinds == 4 * [nn.Linear, nn.Sigmoid]


@pytest.mark.parametrize(("how", "level"), [("gaussian", 0.4), ("masking", 0.4), ("salt-and-pepper", 0.3)])
def test_denoising_restores(how: str, level: float, tmp_path: Path) -> None:
    run = trained(tmp_path, "denoising-ae", corruption=how, denoise=level, epochs=15)
    torch.manual_seed(0)
    corrupted, restored = measures.errors(run.model, run.data.test, run.config)
    assert restored < 0.7 * corrupted


def test_the_corruptions() -> None:
    images = torch.full((200, 200), 102, dtype=torch.uint8)
    masked = corrupt.masking(images, 0.3)
    assert set(masked.unique().tolist()) == {0, 102}
    assert (masked == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    noise = corrupt.gaussian(images, 0.1) - 0.4
    assert noise.mean().item() == pytest.approx(0, abs=0.002)
    assert noise.std().item() == pytest.approx(0.1, abs=0.002)
    assert corrupt.binarised(images, "dynamic").float().mean().item() / 255 == pytest.approx(0.4, abs=0.01)
    assert corrupt.binarised(images, "fixed").unique().tolist() == [0]
    assert corrupt.salt_and_pepper(images / 255, 0.9).max() == 1


@pytest.mark.parametrize(("where", "sparsity"), [("latent", 0.02), ("all", 0.04)])
def test_sparse_is_sparser_at_like_error(where: str, sparsity: float, tmp_path: Path) -> None:
    share, error = {}, {}
    for weight in (0.0, sparsity):
        run = trained(tmp_path, "sparse-ae", latent=128, hidden=64, sparsity=weight, sparse=where, epochs=12)
        share[weight] = measures.active_share(measures.codes(run.model, run.data.test))
        error[weight] = run.history[-1]["test_reconstruction"]
    assert share[sparsity] < 0.7 * share[0.0]
    assert error[sparsity] < 1.1 * error[0.0]


def test_the_contractive_penalty() -> None:
    model = ContractiveAE((1, 3, 4), latent=5).double()
    x = torch.rand(7, 12, dtype=torch.float64)
    z = model.encoder(x)
    analytic = sigmoid_jacobian_norm(model.encoder[0], z)
    torch.testing.assert_close(analytic, jacobian_norm(model.encoder, x))
    each = [torch.autograd.functional.jacobian(model.encoder, row) for row in x]
    torch.testing.assert_close(analytic, torch.stack([(j**2).sum() for j in each]))
    # its gradient in the weights is a second derivative of the encoder
    weight = model.encoder[0].weight
    (by_formula,) = torch.autograd.grad(analytic.sum(), weight)
    (by_transform,) = torch.autograd.grad(jacobian_norm(model.encoder, x).sum(), weight)
    torch.testing.assert_close(by_formula, by_transform)
    assert by_formula.abs().sum() > 0
    deep = ContractiveAE((1, 3, 4), latent=5, hidden=6).double()
    deep.loss(x).penalty.backward()
    assert all(deep.encoder[k].weight.grad.abs().sum() > 0 for k in (0, 2))


def test_contraction_shrinks_the_jacobian(tmp_path: Path) -> None:
    norm, error = {}, {}
    for weight in (0.0, 1.0):
        run = trained(tmp_path, "contractive-ae", latent=32, contraction=weight, epochs=15)
        norm[weight] = measures.mean_jacobian_norm(run.model, run.data.test)
        error[weight] = run.history[-1]["test_reconstruction"]
    assert norm[1.0] < 0.7 * norm[0.0]
    assert error[1.0] < 1.1 * error[0.0]


@pytest.mark.parametrize(
    ("name", "epochs", "rate", "share"), [("sines", 40, 3e-3, 0.8), ("digits", 6, 1e-2, 0.7)]
)  # the sines are learned late, all at once
def test_one_vector_holds_a_sequence(name: str, epochs: int, rate: float, share: float, tmp_path: Path) -> None:
    run = trained(tmp_path, "lstm-ae", data=name, latent=32, epochs=epochs, learning_rate=rate)
    test = corrupt.unit(run.data.test.images)
    around_mean = ((test - corrupt.unit(run.data.train.images).mean(0)) ** 2).flatten(1).sum(1).mean().item()
    assert run.history[-1]["test_reconstruction"] < share * around_mean


@pytest.mark.parametrize(
    "options",
    [
        {"model": "vae", "samples": 3},
        {"model": "vae", "likelihood": "gaussian", "variance": "learned", "learning_rate": 5e-3},
        {"model": "aevb"},
        {"model": "conv", "batch_size": 256, "hidden": 16},
        {"model": "conv-vae", "batch_size": 256, "hidden": 16},
        {"model": "iwae"},
    ],
    ids=str,
)
def test_the_elbo_rises(options: dict[str, Any], tmp_path: Path) -> None:
    history = trained(tmp_path, **{"latent": 4, "epochs": 3, "batch_size": 64, **options}).history
    losses = [row["test_loss"] for row in history]
    assert losses[-1] < losses[0]


def numpy_vae(w: dict[str, np.ndarray], x: np.ndarray, noise: np.ndarray) -> tuple[float, float, dict[str, np.ndarray]]:
    """The lecture's VAE from scratch, by the chain rule: reconstruction, KL, and gradients, means over the batch.

    The lecture's ``get_reg_error`` is Σ mu² + σ² − log σ² − 1: it lacks the ½ that its own formula has. Here it is.
    """
    a = x @ w["encoder.weight"].T + w["encoder.bias"]
    h = np.maximum(a, 0)
    q = h @ w["posterior.weight"].T + w["posterior.bias"]
    mu, logvar = np.split(q, 2, axis=1)
    std = np.exp(logvar / 2)
    z = mu + std * noise
    b = z @ w["decoder.weight"].T + w["decoder.bias"]
    g = np.maximum(b, 0)
    y = g @ w["output.weight"].T + w["output.bias"]
    n = len(x)
    rec = np.sum((y - x) ** 2) / n
    reg = 0.5 * np.sum(mu**2 + np.exp(logvar) - logvar - 1) / n

    dy = 2 * (y - x) / n
    db = (dy @ w["output.weight"]) * (b > 0)
    dz = db @ w["decoder.weight"]
    dmu = dz + mu / n
    dlogvar = dz * noise * std / 2 + 0.5 * (np.exp(logvar) - 1) / n
    dq = np.concatenate([dmu, dlogvar], axis=1)
    da = (dq @ w["posterior.weight"]) * (a > 0)
    layers = {"output": (dy, g), "decoder": (db, z), "posterior": (dq, h), "encoder": (da, x)}
    gradients = {}
    for name, (delta, inputs) in layers.items():
        gradients[f"{name}.weight"], gradients[f"{name}.bias"] = delta.T @ inputs, delta.sum(0)
    return rec, reg, gradients


def test_the_numpy_vae_and_the_library_agree() -> None:
    model = VAEDigits().double()
    x = data.load("digits15").train.images[:32].double()
    q = model.encode(x)
    torch.manual_seed(5)
    _, noise = reparameterize(q.mu, q.logvar, return_noise=True)
    torch.manual_seed(5)  # the model draws the same
    out = model.loss(x)
    out.loss.backward()
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    rec, reg, gradients = numpy_vae(weights, x.flatten(1).numpy(), noise.numpy())
    # a few hundred float64 roundings of 1.1e-16 each
    assert out.reconstruction.item() == pytest.approx(rec, rel=1e-13)
    assert out.kl.item() == pytest.approx(reg, rel=1e-13)
    for name, value in model.named_parameters():
        np.testing.assert_allclose(value.grad.numpy(), gradients[name], rtol=1e-11, atol=1e-13, err_msg=name)


def test_samples_and_bounds_are_those_of_the_formulas() -> None:
    model, x = VAE((8, 8), latent=3, hidden=16).double(), torch.rand(5, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    log_w, nll = model.log_weights(x, samples=6)
    q = model.encode(x)
    torch.manual_seed(1)
    z = reparameterize(q.mu, q.logvar, samples=6)
    normal = torch.distributions.Normal
    log_p = torch.distributions.Bernoulli(
        logits=model.decode(z.flatten(0, 1)).unflatten(0, (6, 5)), validate_args=False
    )
    log_p = log_p.log_prob(x.flatten(1)).sum(-1)
    ratio = normal(0.0, 1.0).log_prob(z) - normal(q.mu, torch.exp(0.5 * q.logvar)).log_prob(z)
    torch.testing.assert_close(-nll, log_p)
    torch.testing.assert_close(log_w, log_p + ratio.sum(-1))
    torch.manual_seed(1)
    iwae = model.loss(x, samples=6, bound="iwae").loss
    torch.testing.assert_close(iwae, -(log_w.exp().mean(0).log()).mean())
    torch.manual_seed(1)
    torch.testing.assert_close(model.loss(x, samples=6).reconstruction, nll.mean())


def test_the_bound_tightens_with_samples(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(vae), "--samples", "50", "--binarise", "fixed"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    values = [float(line.split("±")[0].split()[-1]) for line in lines]
    assert [line.split()[0] for line in lines] == ["ELBO", "bound", "bound", "bound"]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_a_bound_of_known_weights() -> None:
    log_w = torch.log(torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64))
    one, two = measures.bounds(log_w)
    assert one.mean == pytest.approx((math.log(3) / 2 + math.log(2)) / 2)
    assert (two.samples, two.mean) == (2, pytest.approx(math.log(2)))


def test_a_style_is_kept_and_the_label_obeyed(tmp_path: Path) -> None:
    """A drawn digit is read as its label, and its code is nearest to the style it was drawn from."""
    from sklearn.linear_model import LogisticRegression

    run = trained(tmp_path, "cvae", latent=2, hidden=128, epochs=40)
    model = run.model
    assert isinstance(model, CVAE)
    side = torch.tensor([-1.2, 1.2])
    styles = torch.cartesian_prod(side, side)
    z, y = styles.repeat_interleave(10, 0), torch.arange(10).repeat(len(styles))
    with torch.no_grad():
        drawn = model.mean(model.decode(z, y))
        found = model.encode(drawn, y).mu
    nearest = torch.cdist(found, styles).argmin(1)
    assert (nearest == torch.arange(len(styles)).repeat_interleave(10)).float().mean() > 0.6, "one in four by chance"
    reader = LogisticRegression(max_iter=300).fit(measures.flat(run.data.train), run.data.train.labels.numpy())
    assert reader.score(drawn.flatten(1).numpy(), y.numpy()) > 0.9


def test_anomalies_are_found_better_than_by_pca(vae: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["anomaly", str(vae), "--picture", str(tmp_path / "roc.png")]) == 0
    model_auc, pca_auc = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:3])
    assert model_auc > 0.9
    assert model_auc > pca_auc
    assert (tmp_path / "roc.png").stat().st_size > 1000


def test_the_other_uses(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", str(vae), "--picture", str(tmp_path / "clusters.png")]) == 0
    assert float(capsys.readouterr().out.splitlines()[1].split()[-1]) > 0.3
    assert main(["probe", str(vae)]) == 0
    assert float(capsys.readouterr().out.splitlines()[1].split()[-1]) > 0.7
    assert main(["compress", str(vae)]) == 0
    out = capsys.readouterr().out
    assert "the code, 8 floats of 4 bytes                32.0 bytes" in out
    assert "at the rate of the ELBO" in out
    assert main(["interpolate", str(vae), "--from", "3", "--to", "8", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "walks.png").exists()
    assert (tmp_path / "arithmetic.png").exists()


def test_a_command_line_of_every_picture(tmp_path: Path) -> None:
    for model, extra in (("ae", "latent"), ("sparse-ae", "code_maps"), ("contractive-ae", "singular_values")):
        folder = tmp_path / model
        command = ["train", "--model", model, "--data", "digits", "--epochs", "1", "--batch-size", "512"]
        assert main([*command, "--output", str(folder)]) == 0
        assert (folder / f"{extra}.png").exists()
        assert (folder / "report.html").exists()
    assert main(["sample", str(tmp_path / "ae"), "--output", str(tmp_path / "s.png")]) == 0
    assert main(["evaluate", str(tmp_path / "ae")]) == 0


def test_a_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for label in "ab":
        (tmp_path / label).mkdir()
        for k in range(10):
            pixels = np.full((6, 5, 3), 10 * k + (100 if label == "b" else 0), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{k}.png")
    loaded = data.load(root=tmp_path)
    assert loaded.shape == (3, 6, 5)
    assert (len(loaded.train.images), len(loaded.test.images), loaded.classes) == (16, 4, 2)
    assert loaded.test.images[:, 0, 0, 0].tolist() == [40, 90, 140, 190]
    Image.new("RGB", (7, 6)).save(tmp_path / "b" / "x.png")
    with pytest.raises(UserError, match=r"must have images of one size: 0\.png is 6x5x3, x\.png is 6x7x3"):
        data.load(root=tmp_path)
    (tmp_path / "b" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"x\.png cannot be read"):
        data.load(root=tmp_path)


def test_faces_come_with_scikit_image() -> None:
    pytest.importorskip("skimage")
    faces = data.load("faces")
    assert faces.shape == (1, 25, 25)
    assert len(faces.train.images) + len(faces.test.images) == 100


def test_without_scikit_image_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"comes with the package scikit-image: pip install scikit-image"):
        data.load("faces")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "linear-ae", "--hidden", "5"], "--hidden goes with vae, cvae, "),
        (["--model", "vae", "--sparsity", "1"], "--sparsity goes with sparse-ae; got --model vae"),
        (["--model", "ae", "--beta", "2"], "--beta goes with a VAE; got --model ae, which has no q(z|x)"),
        (["--variance", "learned"], "--variance learned goes with --likelihood gaussian, got bernoulli_logits"),
        (["--bound", "iwae", "--beta", "2"], "--bound iwae excludes --beta"),
        (["--data", "digits15"], "--data digits15 goes up to 1.07: expected --likelihood "),
        (["--hold-out", "11"], "--hold-out must be one of several classes, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got 11"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--data", "digits", *options, "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (["evaluate", "RUN", "--data", "mnist5k"], "is a model of 1x8x8 images, got 1x28x28 ones"),
        (["evaluate", "RUN", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["probe", "NOWHERE"], "has no checkpoint.safetensors"),
        (["interpolate", "RUN", "--from", "3"], "--from and --to go together"),
        (["interpolate", "RUN", "--from", "3", "--to", "12"], "--to must be a class of the test images"),
        (["gallery", "--only", "gan"], "--only must be of linear-ae, ae, "),
    ],
    ids=str,
)
def test_bad_uses_are_one_line(
    use: list[str], message: str, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([{"RUN": str(vae), "NOWHERE": str(tmp_path)}.get(word, word) for word in use]) == 1
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1


def test_a_gallery_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.train import gallery

    names = [card.name for card in gallery.CARDS]
    assert len(set(names)) == len(names)
    parsed = {run for card in gallery.CARDS for run in card.runs.values()}
    assert {run.split()[1] for run in parsed} == set(MODELS) - {"conv"}, "every model has its card"
    card = next(card for card in gallery.CARDS if card.name == "cvae")
    card = card._replace(runs={"small": "--model cvae --data digits --latent 2 --hidden 16 --epochs 1"})
    monkeypatch.setattr(gallery, "CARDS", (card,))
    page = gallery.make(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert card.formula.partition("|")[0] in page
    assert "fastvae train --model cvae --data digits" in page
    assert "http" not in page
    for_docs = (tmp_path / "gallery.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((gallery/.*?\.webp)\)", for_docs)
    assert len(pictures) == 2
    assert all((tmp_path / picture).stat().st_size for picture in pictures)
    assert card.formula in for_docs
