"""pythae's VAEs, patched: the same losses and gradients, and nothing else changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvae.integrations import pythae as integration

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "BetaTCVAE": [{}, {"use_mss": False}],
    "VAMP": [{"linear_scheduling_steps": 3}],
    "INFOVAE_MMD": [{"kernel_choice": "imq"}, {"kernel_choice": "rbf"}],
    "DisentangledBetaVAE": [{"C": 3.0, "warmup_epoch": 4}],
    "BetaVAE": [{"beta": 2.5}],
}
CASES = [(name, more) for name in integration._LOSSES for more in OPTIONS.get(name, [{}])]


@pytest.fixture(autouse=True)
def pythae(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("pythae.models", reason="pythae is not installed")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # pythae's are not ours
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def model_of(pythae: Any, name: str, **options: Any) -> Any:
    config = getattr(pythae, f"{name}Config", None) or getattr(pythae, f"{name}_Config")
    torch.manual_seed(0)
    return getattr(pythae, name)(config(input_dim=(1, 6, 6), latent_dim=4, **options))


def outcome(model: Any) -> dict[str, Tensor]:
    """What one seed gives: every loss and every gradient."""
    torch.manual_seed(3)
    model.zero_grad()
    output = model({"data": torch.rand(7, 1, 6, 6)}, epoch=2, dataset_size=70)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {key: output[key].detach() for key in output if "loss" in key}


@pytest.mark.parametrize("reconstruction", ["mse", "bce"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, pythae: Any, name: str, options: dict[str, Any], reconstruction: str
) -> None:
    model = model_of(pythae, name, reconstruction_loss=reconstruction, **options)
    want = outcome(model)
    integration.patch(model)
    for term in ("mse_loss", "binary_cross_entropy"):
        monkeypatch.setattr(torch.nn.functional, term, None)
    found = outcome(model)
    assert found.keys() == want.keys()
    for key, value in want.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=1e-6 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_only_the_instance_is_patched_and_copies_are_by_themselves(pythae: Any) -> None:
    own, model, other = pythae.VAE.loss_function, model_of(pythae, "VAE"), model_of(pythae, "VAE")
    before = dict(vars(model))
    integration.unpatch(model)
    integration.patch(model)
    once = model.loss_function
    integration.patch(model)
    assert model.loss_function is once
    assert pythae.VAE.loss_function is own
    assert "loss_function" not in vars(other)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.loss_function.model is twin
    integration.unpatch(model)
    integration.unpatch(model)
    assert vars(model) == before


def test_a_subclass_that_keeps_the_loss(pythae: Any) -> None:
    class Kept(pythae.VAE):
        pass

    class Changed(pythae.VAE):
        def loss_function(self, *args: Any) -> Any:
            return super().loss_function(*args)

    config = pythae.VAEConfig(input_dim=(1, 6, 6), latent_dim=4)
    integration.patch(Kept(config))
    with pytest.raises(TypeError, match="got Changed with its own"):
        integration.patch(Changed(config))


def test_errors(pythae: Any) -> None:
    for wrong in (nn.Linear(2, 2), None):
        for call in (integration.patch, integration.unpatch):
            with pytest.raises(TypeError, match=f"must be a VAE of pythae, got {type(wrong).__name__}"):
                call(wrong)
    with pytest.raises(TypeError, match=r"VAE of pythae, got the class VAE: give an instance of it$"):
        integration.patch(pythae.VAE)
    with pytest.raises(TypeError, match=r"got what torch.compile makes of VAE: patch the model, then compile it$"):
        integration.patch(torch.compile(model_of(pythae, "VAE")))
    with pytest.raises(TypeError, match=r"must have the loss of one of VAE, BetaVAE.* got AE with its own"):
        integration.patch(pythae.AE(pythae.AEConfig(input_dim=(1, 6, 6))))
