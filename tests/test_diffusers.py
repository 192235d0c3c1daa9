"""diffusers' autoencoders, patched: the same losses, gradients and samples, and nothing else changed."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvae.integrations import diffusers as integration

Ours = integration.DiagonalGaussianDistribution
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # diffusers' are not ours
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def theirs(parameters: Tensor, deterministic: bool = False) -> Any:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(parameters, deterministic)


def image_model() -> tuple[nn.Module, Tensor]:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, **blocks)
    return model, torch.randn(2, 3, 16, 16)


def video_model() -> tuple[nn.Module, Tensor]:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    return diffusers.AutoencoderKLHunyuanVideo(**sizes), torch.randn(1, 3, 5, 16, 16)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"images": image_model, "videos": video_model}


def outcome(model: Any, x: Tensor, generator: Any = None) -> tuple[Tensor, ...]:
    """The loss of one seed, and every gradient."""
    torch.manual_seed(5)
    posterior = model.encode(x).latent_dist
    z = posterior.sample(generator)
    loss = (model.decode(z).sample - x).square().mean() + 0.1 * posterior.kl().mean()
    loss = loss + 0.01 * posterior.nll(z.detach()).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), *(g for g in gradients if g is not None)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(2)]


def test_it_is_of_use_without_diffusers() -> None:
    code = (
        "import sys, torch; from fastvae.integrations.diffusers import DiagonalGaussianDistribution as D; "
        "D(torch.zeros(2, 8, 4, 4)).sample(); assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (2, 6, 4, 3, 5)], ids=["image", "video"])
def test_every_method_and_attribute(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameters = 3 * torch.randn(shape)
    parameters[:, 4] *= 20  # beyond both bounds of logvar
    expected = theirs(parameters.double().requires_grad_())
    eager, found = theirs(parameters.to(dtype)), Ours(parameters.to(dtype).requires_grad_())
    exact = expected.parameters.to(dtype).double()
    other = torch.randn(shape).to(dtype)  # one of which all dtypes have the digits

    def values(p: Any, make: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        x, second = other[:, :3].to(p.mean.dtype), make(other.to(p.mean.dtype))
        named = {name: getattr(p, name) for name in ("mean", "logvar", "std", "var")}
        calls = {"kl": p.kl(), "kl(other)": p.kl(second), "nll": p.nll(x), "nll(dims)": p.nll(x, [1, 2])}
        return {**named, **calls, "mode": p.mode()}

    assert found.sample().dtype == dtype
    truth, ours, own = values(theirs(exact), theirs), values(found, Ours), values(eager, theirs)
    for name, value in truth.items():
        assert ours[name].shape == value.shape, name
        scale = value.abs().max()
        error, of_eager = ((v[name].double() - value).abs().nan_to_num(math.inf).max() for v in (ours, own))
        assert error <= 2 * of_eager + 1e-6 * scale, f"{name}: {error} and {of_eager}"
    if dtype == torch.float64:
        for name in ("kl", "kl(other)", "nll"):
            gradients = [
                torch.autograd.grad(values(p, make)[name].sum(), p.parameters, retain_graph=True)[0]
                for p, make in ((found, Ours), (expected, theirs))
            ]
            torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_samples_of_one_seed(name: str) -> None:
    (model, x), (other, _) = MODELS[name](), MODELS[name]()
    want = outcome(model, x)
    integration.patch(model)
    assert type(model.encode(x).latent_dist) is Ours
    assert type(model.encode(x, return_dict=False)[0]) is Ours
    assert type(other.encode(x).latent_dist) is not Ours
    for got, expected in zip(outcome(model, x), want, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    each = generators()[: len(x)]
    torch.testing.assert_close(outcome(model, x, each)[0], outcome(other, x, generators()[: len(x)])[0], **CLOSE)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(outcome(model.train(), x)[0], want[0], **CLOSE)
    half = copy.deepcopy(model).eval().bfloat16()
    assert half(x.bfloat16(), sample_posterior=True).sample.dtype == torch.bfloat16


def test_noise_of_the_kernel_has_the_same_statistics() -> None:
    parameters = torch.stack([torch.full((1, 256, 256), 0.5), torch.full((1, 256, 256), -1.0)], 1)
    posterior = Ours(parameters, noise="fastvae")
    z, std = posterior.sample(torch.Generator().manual_seed(0)), torch.tensor(-0.5).exp()
    assert abs(z.mean() - 0.5) < 5 * std / 256
    assert abs(z.std() / std - 1) < 5 / (256 * 2**0.5)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(posterior.sample(), posterior.sample())


def test_sliced_tiled_and_compiled() -> None:
    (model, x), (other, _) = image_model(), image_model()
    integration.patch(model)
    x = torch.cat([x, x])[:, :, :, :12]

    def run(each: Any) -> Tensor:
        torch.manual_seed(2)
        return each(x, sample_posterior=True).sample

    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager")), run(other), **CLOSE)
    for each in (model, other):
        each.enable_slicing()
        each.enable_tiling()
        each.tile_sample_min_size = each.tile_latent_min_size = 8
    torch.testing.assert_close(run(model), run(other), **CLOSE)


def test_copies_are_patched_by_themselves_and_unpatch_restores() -> None:
    model, x = image_model()
    compiled = torch.compile(model)
    before = dict(vars(model))
    integration.unpatch(model)
    for noise in ("torch", "fastvae", "torch"):
        integration.patch(model, noise=noise)
        assert model.encode.noise == noise
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.encode.model is twin
    integration.unpatch(compiled)
    integration.unpatch(model)
    assert vars(model) == before
    model.encode = replaced = lambda *args, **kwargs: type(model).encode(model, *args, **kwargs)
    integration.patch(model)
    assert type(model.encode(x).latent_dist) is Ours
    integration.unpatch(model)
    assert model.encode is replaced


def test_deterministic() -> None:
    parameters = torch.randn(2, 6, 3, 5)
    for make in (theirs, Ours):
        posterior = make(parameters, True)
        assert posterior.kl().tolist() == posterior.nll(parameters).tolist() == [0.0]
        assert torch.equal(posterior.sample(), parameters[:, :3])
        assert not posterior.std.any()


def test_errors() -> None:
    with pytest.raises(TypeError, match="parameters must be a floating-point tensor, got list"):
        Ours([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parameters must be \[B, 2·C, ...\], got \[2, 3, 4, 4\]"):
        Ours(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="noise must be one of 'torch', 'fastvae', got 'own'"):
        Ours(torch.zeros(2, 4, 4, 4), noise="own")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    for wrong in (diffusers.VQModel(norm_num_groups=1, block_out_channels=(4,)), nn.Linear(2, 2), None):
        for call in (integration.patch, integration.unpatch):
            with pytest.raises(TypeError, match=f"autoencoder of diffusers that encodes .*got {type(wrong).__name__}"):
                call(wrong)
    with pytest.raises(TypeError, match=r"got the class AutoencoderKL: give an instance of it$"):
        integration.patch(diffusers.AutoencoderKL)
