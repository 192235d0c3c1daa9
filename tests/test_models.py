"""The reference models: one interface, typed outputs, gradients, clear errors."""

from __future__ import annotations

import pytest
import torch

import fastvae
from fastvae.kernels.likelihoods import OF_IMAGES
from fastvae.models import CVAE, VAE, ConvVAE, Model, build

LABELS = torch.tensor([3, 1, 4])


def make(name: str, shape: tuple[int, ...] = (1, 8, 9), likelihood: str = "bernoulli_logits") -> Model:
    return build(name, {"data_shape": shape, "latent": 4, "hidden": 16, "likelihood": likelihood})


@pytest.mark.parametrize("name", ["vae", "cvae", "conv"])
@pytest.mark.parametrize("likelihood", OF_IMAGES)
def test_interface(name: str, likelihood: str) -> None:
    model = make(name, likelihood=likelihood)
    y = LABELS if model.conditional else None
    x = torch.rand(3, 1, 8, 9)
    out = model(x, y)
    assert out.z.shape == out.mu.shape == (3, 4)
    assert (out.logvar is None) != (out.std is None)
    loss = model.loss(x, y, beta=0.5, free_bits=0.01)
    torch.testing.assert_close(loss.loss, loss.reconstruction + 0.5 * loss.kl)
    loss.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(3, y).shape == model.reconstruct(x, y).shape == (3, 1, 8, 9)
    if "bernoulli" in likelihood:
        assert 0 <= model.sample(3, y).min() <= model.sample(3, y).max() <= 1


@pytest.mark.parametrize("name", ["vae", "cvae"])
@pytest.mark.parametrize("shape", [(64,), (8, 8), (3, 4, 5)], ids=str)
def test_any_data_shape(name: str, shape: tuple[int, ...]) -> None:
    model = make(name, shape)
    y = LABELS if model.conditional else None
    assert model.reconstruct(torch.rand(3, *shape), y).shape == (3, *shape)
    assert model.loss(torch.randint(0, 256, (3, *shape), dtype=torch.uint8), y).loss.isfinite()


def test_uint8_means_x_over_255() -> None:
    model = VAE((4, 4), latent=2, hidden=8)
    pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    a = model.loss(pixels).loss
    torch.manual_seed(0)
    torch.testing.assert_close(a, model.loss(pixels / 255).loss)


def test_defaults_are_the_tutorials() -> None:
    sizes = [tuple(p.shape) for p in VAE().parameters() if p.dim() == 2]
    assert sizes == [(400, 784), (40, 400), (400, 20), (784, 400)]


def test_cvae_depends_on_the_label_and_denoises() -> None:
    model = CVAE((8, 8), latent=2, hidden=16, dropout=0.0).eval()
    z = torch.zeros(2, 2)
    images = model.decode(z, torch.tensor([0, 1]))
    assert not torch.allclose(images[0], images[1])
    noisy, clean = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    torch.manual_seed(0)
    loss = model.loss(noisy, LABELS, target=clean)
    torch.manual_seed(0)
    out = model(noisy, LABELS)
    torch.testing.assert_close(loss.reconstruction, fastvae.bce_with_logits(out.recon, clean.flatten(1)))


@pytest.mark.parametrize("size", [(4, 4), (7, 5), (28, 28), (33, 18)], ids=str)
def test_conv_keeps_any_size(size: tuple[int, int]) -> None:
    model = ConvVAE((3, *size), latent=2, hidden=8)
    assert model.reconstruct(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_mean_of_the_continuous_bernoulli() -> None:
    model = make("vae", likelihood="continuous_bernoulli_logits")
    logits = torch.linspace(-9, 9, 72)[None]
    want = torch.distributions.ContinuousBernoulli(logits=logits).mean
    torch.testing.assert_close(model.mean(logits).flatten(1), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VAE(likelihood="poisson"), "likelihood must be one of"),
        (lambda: VAE(latent=0), "latent must be at least 1, got 0"),
        (lambda: CVAE(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: ConvVAE((28, 28)), "data_shape must be"),
        (lambda: CVAE()(torch.rand(2, 784)), "y must be given: this model is conditional"),
        (lambda: CVAE()(torch.rand(2, 784), torch.tensor([1])), r"y must have one label an example, \[2\], got \[1\]"),
        (lambda: build("gan", {}), "model must be one of 'vae', 'cvae', 'conv', .*, got 'gan'"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
