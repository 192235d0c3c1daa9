"""Other libraries' models on the fused kernels: what they compute, and what they must not change."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvae.integrations import scvi as integration
from fastvae.integrations import what_came

CELLS, GENES, BATCHES, LABELS = 40, 60, 2, 3
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
COUNTS = {"nb": "NegativeBinomial", "zinb": "ZeroInflatedNegativeBinomial", "poisson": "Poisson"}
#: relative, in float64: torch's Poisson has no ε beside the rate
CLOSE = {"nb": 1e-9, "zinb": 1e-9, "poisson": 1e-5}
CLOSE_FLOAT32 = 2e-5


@pytest.fixture
def scvi(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("scvi", reason="scvi-tools is not installed")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # scvi-tools' are not ours
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small work; where the machine is busy, threads wait for one another
    yield module
    torch.set_num_threads(threads)


def counts(cells: int, genes: int) -> Tensor:
    """Most are 0, some are large, each cell has some."""
    rate = torch.distributions.Gamma(0.3, 0.3).sample((genes,))
    x = torch.poisson(rate * torch.distributions.Gamma(2.0, 2.0).sample((cells, 1)))
    x[:, 0] += 1
    return x


def minibatch(x: Tensor) -> dict[str, Tensor]:
    cells = torch.arange(len(x))[:, None]
    return {"X": x, "batch": cells % BATCHES, "labels": cells % LABELS}


def in_float64(module: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    return module.double(), tensors | {"X": tensors["X"].double()}


def module_of(scvi: Any, likelihood: str, dispersion: str = "gene", kind: str = "VAE", **options: Any) -> Any:
    sizes = {"n_input": GENES, "n_batch": BATCHES, "n_labels": LABELS, "n_hidden": 16}
    return getattr(scvi.module, kind)(**sizes, gene_likelihood=likelihood, dispersion=dispersion, **options)


def outcome(module: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Losses and gradients, of one noise."""
    torch.manual_seed(1)
    loss = module(tensors, loss_kwargs={"kl_weight": 0.7}, **options)[2]
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss.loss, list(named.values()), allow_unused=True)
    found = dict(zip(named, gradients, strict=True))
    found |= {"loss": loss.loss, "nll": loss.reconstruction_loss["reconstruction_loss"], **loss.kl_local}
    return {name: value.detach() for name, value in found.items() if value is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())  # what batch norm undoes has gradients of 0
        torch.testing.assert_close(
            found[name], value, rtol=relative, atol=relative * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def forbid(monkeypatch: pytest.MonkeyPatch, scvi: Any, likelihood: str) -> None:
    def log_prob(*_: Any) -> None:
        raise AssertionError("scvi-tools' own log_prob was called")

    monkeypatch.setattr(getattr(scvi.distributions, COUNTS[likelihood]), "log_prob", log_prob)


def test_the_line_of_the_recipes_needs_no_import_of_its_own() -> None:
    for name in ("scvi", "diffusers", "pythae"):
        code = f"import fastvae; print(fastvae.integrations.{name}.patch.__module__)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == f"fastvae.integrations.{name}"


def test_errors_say_what_to_give_instead() -> None:
    class Pipeline:
        model = 1

    wrapped = torch.nn.DataParallel(torch.nn.Linear(1, 1))
    for given, said in (
        ("a/name", "the name 'a/name': load the model first"),
        (torch.nn.Linear, "the class Linear: give an instance of it"),
        (wrapped, "DataParallel, which wraps a Linear: patch the model, then wrap it"),
        (Pipeline(), "Pipeline: patch its model"),
        (3, "int"),
    ):
        assert what_came(given) == said


def test_importing_it_does_not_import_scvi() -> None:
    code = "import sys, fastvae.integrations.scvi; assert 'scvi' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", COUNTS)
def test_losses_and_gradients(monkeypatch: pytest.MonkeyPatch, scvi: Any, likelihood: str, dispersion: str) -> None:
    module, tensors, close = module_of(scvi, likelihood, dispersion), minibatch(counts(CELLS, GENES)), CLOSE_FLOAT32
    if dispersion in ("gene", "gene-cell"):  # the others are products with a float32 matrix
        (module, tensors), close = in_float64(module, tensors), CLOSE[likelihood]
    expected = outcome(module, tensors)
    assert "px_r" in expected or dispersion == "gene-cell" or likelihood == "poisson"
    forbid(monkeypatch, scvi, likelihood)
    with integration.fused(module):
        assert_close(outcome(module, tensors), expected, close)
        module.eval()
        outcome(module, tensors)
        with torch.inference_mode():
            module(tensors)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_a_dispersion_per_gene_has_a_gradient_per_gene(
    monkeypatch: pytest.MonkeyPatch, scvi: Any, likelihood: str
) -> None:
    shapes: list[tuple[int, ...]] = []
    name = {"nb": "negative_binomial_nll", "zinb": "zero_inflated_negative_binomial_nll"}[likelihood]
    kernel = getattr(integration, name)

    def recorded(mean: Tensor, x: Tensor, *, dispersion: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(dispersion.shape))
        return kernel(mean, x, dispersion=dispersion, **options)

    monkeypatch.setattr(integration, name, recorded)
    tensors = minibatch(counts(CELLS, GENES))
    for dispersion in ("gene", "gene-batch"):
        module = module_of(scvi, likelihood, dispersion)
        integration.patch(module)
        outcome(module, tensors)
        with torch.inference_mode():
            module(tensors)
    assert shapes == [(GENES,), (GENES,), (CELLS, GENES), (CELLS, GENES)]


def test_other_modules_with_the_same_loss(monkeypatch: pytest.MonkeyPatch, scvi: Any) -> None:
    tensors = minibatch(counts(CELLS, GENES))
    libraries = {"library_log_means": np.full((1, BATCHES), 3.0), "library_log_vars": np.ones((1, BATCHES))}
    given: dict[str, dict[str, Any]] = {
        "LDVAE": {"n_layers_encoder": 1, **libraries},
        "SCANVAE": {},
        "VAE": {"use_observed_lib_size": False, **libraries},
    }
    modules = [module_of(scvi, "nb", kind=kind, **options) for kind, options in given.items()]
    expected = [outcome(module, tensors) for module in modules]
    forbid(monkeypatch, scvi, "nb")
    for module, own in zip(modules, expected, strict=True):
        with integration.fused(module):
            assert_close(outcome(module, tensors), own, CLOSE_FLOAT32)


@pytest.mark.filterwarnings("ignore:The value argument must be within the support")
@pytest.mark.parametrize("likelihood", [*COUNTS, "normal"])
def test_what_is_left_to_scvi_is_the_same_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, scvi: Any, likelihood: str
) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # torch's Poisson would raise
    module, tensors = module_of(scvi, likelihood), minibatch(counts(CELLS, GENES))
    normalised = tensors | {"X": tensors["X"] * 0.3}
    for data, options in ((normalised, {}), (tensors, {"inference_kwargs": {"n_samples": 2}})):
        expected = outcome(module, data, **options)
        with integration.fused(module):
            assert_close(outcome(module, data, **options), expected, 0.0)


def test_what_is_no_count_is_warned_of(scvi: Any) -> None:
    module, tensors = module_of(scvi, "zinb"), minibatch(counts(CELLS, GENES))
    integration.patch(module)
    tensors["X"][3, 5] = 0.5
    with pytest.warns(UserWarning, match="within the support"):
        module(tensors)


def model_of(scvi: Any, x: Tensor) -> Any:
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(x.numpy())
    adata.obs["batch"] = [str(k % BATCHES) for k in range(len(x))]
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 0
    return scvi.model.SCVI(adata, gene_likelihood="zinb", n_hidden=32)


def results(model: Any) -> dict[str, Tensor]:
    """What a user asks of a trained model, of one noise."""
    torch.manual_seed(2)
    found = {
        "elbo": model.get_elbo(),
        "marginal": model.get_marginal_ll(n_mc_samples=2, n_mc_samples_per_pass=2),
        "marginal one by one": model.get_marginal_ll(n_mc_samples=2),
        "expression": model.get_normalized_expression(return_numpy=True),
        "samples": model.module.sample(minibatch(counts(20, model.module.n_input)), n_samples=2),
        **model.get_likelihood_parameters(),
    }
    return {name: torch.as_tensor(np.asarray(value)).double() for name, value in found.items()}


def test_training_saving_and_what_a_model_is_asked(scvi: Any, tmp_path: Path) -> None:
    x = counts(1000, 200)
    plain, patched = model_of(scvi, x), model_of(scvi, x)
    integration.patch(patched)
    curves = []
    for model in (plain, patched):
        scvi.settings.seed = 0
        model.train(
            max_epochs=5, accelerator="cpu", enable_progress_bar=False, train_size=0.8, check_val_every_n_epoch=1
        )
        curves.append(
            torch.tensor(np.stack([model.history[f"elbo_{k}"].to_numpy(float) for k in ("train", "validation")]))
        )
    assert curves[0].isfinite().all()
    assert curves[0][0, -1] < curves[0][0, 0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)

    patched.module.load_state_dict(plain.module.state_dict())
    expected = results(plain)
    assert_close(results(patched), expected, 1e-5)

    patched.save(str(tmp_path / "model"))
    loaded = scvi.model.SCVI.load(str(tmp_path / "model"), adata=patched.adata, accelerator="cpu")
    assert "loss" not in vars(loaded.module)
    assert_close(results(loaded), expected, 1e-5)
    integration.patch(loaded)
    assert_close(results(loaded), expected, 1e-5)


@pytest.mark.parametrize("likelihood", COUNTS)
def test_the_training_curve_is_that_of_its_own_loss(scvi: Any, likelihood: str) -> None:
    """Five epochs with the noise of one seed: each step starts where the last one ended, so differences would grow."""
    anndata = pytest.importorskip("anndata")
    torch.manual_seed(0)
    x = counts(1000, 200).numpy()

    def curve(patched: bool) -> np.ndarray:
        adata = anndata.AnnData(x)
        scvi.model.SCVI.setup_anndata(adata)
        scvi.settings.seed = 0
        model = scvi.model.SCVI(adata, gene_likelihood=likelihood)
        if patched:
            integration.patch(model)
        model.train(max_epochs=5, accelerator="cpu", enable_progress_bar=False)
        return model.history["elbo_train"].to_numpy(float).ravel()

    own, fused = curve(False), curve(True)
    assert own[-1] < own[0]
    np.testing.assert_allclose(fused, own, rtol=1e-5)


def test_only_the_instance_is_patched_and_unpatch_restores_it(scvi: Any) -> None:
    own, module, other = scvi.module.VAE.loss, module_of(scvi, "nb"), module_of(scvi, "nb")
    before = dict(vars(module))
    integration.unpatch(module)
    integration.patch(module)
    once = module.loss
    integration.patch(module)
    assert module.loss is once
    assert scvi.module.VAE.loss is own
    assert vars(other).keys() == before.keys()
    integration.unpatch(module)
    integration.unpatch(module)
    assert vars(module) == before


def test_the_block_ends_as_it_began(scvi: Any) -> None:
    module = module_of(scvi, "nb")
    with pytest.raises(KeyError), integration.fused(module):
        raise KeyError
    assert "loss" not in vars(module)
    integration.patch(module)
    with integration.fused(module):
        pass
    assert "loss" in vars(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_patched_by_itself(monkeypatch: pytest.MonkeyPatch, scvi: Any, copied: Any) -> None:
    module, tensors = in_float64(module_of(scvi, "zinb"), minibatch(counts(CELLS, GENES)))
    expected = outcome(module, tensors)
    integration.patch(module)
    twin = copied(module)
    forbid(monkeypatch, scvi, "zinb")
    integration.unpatch(module)
    for parameter in module.parameters():
        parameter.data.zero_()
    assert twin.loss.module is twin
    assert_close(outcome(twin, tensors), expected, CLOSE["zinb"])


def test_errors(scvi: Any) -> None:
    for wrong in (torch.nn.Linear(2, 2), None, scvi.module.PEAKVAE(GENES)):
        for call in (integration.patch, integration.unpatch, lambda module: integration.fused(module).__enter__()):
            with pytest.raises(TypeError, match=f"scvi.module.VAE, or a model.*got {type(wrong).__name__}"):
                call(wrong)
    with pytest.raises(TypeError, match=r"got the class SCVI: give an instance of it$"):
        integration.patch(scvi.model.SCVI)
    with pytest.raises(TypeError, match=r"got what torch.compile makes of VAE: patch the model, then compile it$"):
        integration.patch(torch.compile(module_of(scvi, "nb")))
    with pytest.raises(TypeError, match="got AutoZIVAE with its own"):
        integration.patch(scvi.module.AutoZIVAE(GENES))
