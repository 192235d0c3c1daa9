"""The compiled graph nodes, ``csrc/autograd``: in the place of a Python Function, and never to be told from one.

The op table, the edges and the tests of autograd run on them wherever ``cpp`` or the emulated ``cuda`` serves a call.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae import autograd

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    autograd.NATIVE is None, reason="the graph nodes were not built: no C++ compiler, or another torch, at install"
)
NAMES = {"elbo_forwardBackward", "reconstruction_forwardBackward", "latent_forwardBackward"}

torch.manual_seed(0)
RECON, TARGET = torch.randn(6, 3, 7), torch.rand(6, 3, 7)
MU, LOGVAR = torch.randn(6, 5), torch.randn(6, 5)


@pytest.fixture(autouse=True)
def on_cpp() -> Iterator[None]:
    with fastvae.use_backend("cpp"):
        yield


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was plain."""
    seen: list[bool] = []

    class Watched:
        @staticmethod
        def call(*args: Any) -> Any:
            outputs = autograd_module.call(*args)
            seen.append(outputs is not None)
            return outputs

    autograd_module = autograd.NATIVE
    monkeypatch.setattr(autograd, "NATIVE", Watched)
    return seen


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    recon, mu, logvar = (t.clone().requires_grad_() for t in (RECON, MU, LOGVAR))
    return recon, mu, logvar


def elbo(recon: Tensor, mu: Tensor, logvar: Tensor, **options: Any) -> Any:
    return fastvae.elbo_loss(recon, TARGET, mu, logvar, **options)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "elbo": lambda r, m, s: elbo(r, m, s).loss,
    "scaled": lambda r, m, s: elbo(r, m, s, beta=0.3).loss * 7,
    "clamped": lambda r, m, s: elbo(r, m, s, logvar_clamp=(-0.5, 0.5), free_bits=0.1).loss,
    "parts": lambda r, m, s: (out := elbo(r, m, s)).reconstruction + 2 * out.kl,
    "one part": lambda r, m, s: elbo(r, m, s).kl,
    "each": lambda r, m, s: elbo(r, m, s, reduction="example").loss.square().sum(),
    "mean": lambda r, m, s: fastvae.bce_with_logits(r, TARGET, reduction="mean"),
    "elementwise": lambda r, m, s: (fastvae.bce_with_logits(r, TARGET, reduction="none") * TARGET).sum(),
    "probabilities": lambda r, m, s: fastvae.bce(r.sigmoid(), TARGET) * 3,
    "sample": lambda r, m, s: fastvae.reparameterize(m, s, seed=1).square().sum(),
    "samples": lambda r, m, s: fastvae.reparameterize(m, s, seed=1, samples=3).square().sum(),
    "kl": lambda r, m, s: fastvae.gaussian_kl(m, s),
    "prior": lambda r, m, s: fastvae.gaussian_kl(m, s, prior_mu=m.detach() * 2 + s, prior_logvar=s * 0.5),
    "both": lambda r, m, s: (out := fastvae.sample_with_kl(m, s, seed=1))[0].sum() + out[1],
    "sample alone": lambda r, m, s: fastvae.sample_with_kl(m, s, seed=1)[0].sum(),
    "a half": lambda r, m, s: fastvae.gaussian_kl(*torch.cat([m, s], 1).chunk(2, 1)),
}


def with_and_without(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor | None]]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    got = run()
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "NATIVE", None)
        return got, run()


def same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_as_a_function_of_python(
    monkeypatch: pytest.MonkeyPatch, native: list[bool], name: str, dtype: torch.dtype
) -> None:
    def run() -> list[Tensor | None]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (RECON, MU, LOGVAR)]
        loss = LOSSES[name](*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True)]

    got, want = with_and_without(monkeypatch, run)
    same(got, want)
    assert native == [True] * len(native)
    assert native


@pytest.mark.parametrize("name", LOSSES)
def test_second_backwards_and_second_derivatives(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The handed-over gradient is gone, and what comes after it is computed; a graph of it is the reference's."""

    def run() -> list[Tensor | None]:
        inputs = leaves()
        loss = LOSSES[name](*inputs)
        twice = [torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) for _ in range(2)]
        first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        total = sum((g.square().sum() for g in first if g is not None), torch.zeros(()))
        second = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else []
        return [*twice[0], *twice[1], *(g if g is None else g.detach() for g in first), *second]

    same(*with_and_without(monkeypatch, run))


def test_a_freed_graph_says_so() -> None:
    for loss in LOSSES.values():
        inputs = leaves()
        value = loss(*inputs)
        value.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            value.backward()


def test_what_was_changed_in_place_is_refused_where_it_is_looked_at() -> None:
    _, mu, logvar = leaves()
    kl = fastvae.gaussian_kl(mu * 1, (shifted := logvar * 1))
    shifted.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()


def test_gradients_of_some() -> None:
    recon, mu, logvar = leaves()
    whole = torch.autograd.grad(elbo(recon, mu, logvar).loss, (recon, mu, logvar))
    for k, leaf in enumerate((recon, mu, logvar)):
        (alone,) = torch.autograd.grad(elbo(recon, mu, logvar).loss, leaf)
        assert torch.equal(alone, whole[k])
    fixed = elbo(recon.detach(), mu, logvar.detach()).loss
    assert torch.equal(torch.autograd.grad(fixed, mu)[0], whole[1])
    target = TARGET.clone().requires_grad_()
    loss = fastvae.elbo_loss(recon, target, mu, logvar).loss
    assert torch.autograd.grad(loss, (target, recon))[0].isfinite().all()


def test_without_gradients_there_is_no_node(native: list[bool]) -> None:
    assert elbo(RECON, MU, LOGVAR).loss.grad_fn is None
    with torch.no_grad():
        assert not elbo(*leaves()).loss.requires_grad
    with torch.inference_mode():
        assert elbo(*leaves()).loss.is_inference()
    assert native == [True] * 3


def test_parameters_are_plain(native: list[bool]) -> None:
    mu = torch.nn.Parameter(MU.clone())
    fastvae.gaussian_kl(mu, LOGVAR).backward()
    assert native == [True]
    assert mu.grad is not None


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "recon",
    [
        RECON.as_subclass(Subclass),
        torch.empty(0, 3, 7),
        RECON.transpose(1, 2).contiguous().transpose(1, 2),
        torch.complex(RECON, -RECON).conj().imag,
    ],
    ids=["a subclass", "nothing", "gaps in a row", "a negative view"],
)
def test_what_is_not_plain_is_for_python(native: list[bool], recon: Tensor) -> None:
    got = fastvae.mse(recon, TARGET[: len(recon)], reduction="example")
    want = (torch.empty_like(RECON[: len(recon)]).copy_(recon) - TARGET[: len(recon)]).square().flatten(1).sum(1)
    torch.testing.assert_close(got.as_subclass(Tensor), want)
    assert native == [False]


def test_a_transform_that_has_ended() -> None:
    kept: list[Tensor] = []

    def keep(mu: Tensor) -> Tensor:
        kept.append(mu)
        return mu.sum()

    torch.func.grad(keep)(MU)
    assert torch.equal(fastvae.gaussian_kl(kept[0], LOGVAR), fastvae.gaussian_kl(MU, LOGVAR))


def test_forward_mode_says_what_it_says_in_python() -> None:
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="jvp"),
    ):
        fastvae.gaussian_kl(torch.autograd.forward_ad.make_dual(MU, MU), LOGVAR)


def test_a_wrong_target_is_an_error_of_python() -> None:
    with pytest.raises(ValueError, match="target"):
        fastvae.bce(RECON.sigmoid(), TARGET + 3)


def test_batched_upstream_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor | None]:
        recon, mu, logvar = leaves()
        loss = elbo(recon, mu, logvar).loss
        return list(torch.autograd.grad(loss, (recon, mu), torch.tensor([1.0, 2.0, 3.0]), is_grads_batched=True))

    same(*with_and_without(monkeypatch, run))


def test_hooks_checkpoints_and_anomalies(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor | None]:
        seen: list[int] = []
        found: list[Tensor | None] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(1) or t.clone(), lambda t: t):
            inputs = leaves()
            loss = elbo(*inputs).loss * 2
            found += torch.autograd.grad(loss, inputs)
        found.append(torch.tensor(len(seen)))
        for reentrant in (False, True):
            inputs = leaves()
            checkpoint(lambda *t: elbo(*t).loss, *inputs, use_reentrant=reentrant).backward()
            found += [leaf.grad for leaf in inputs]
        with torch.autograd.detect_anomaly(check_nan=True):
            inputs = leaves()
            found += torch.autograd.grad(elbo(*inputs).loss, inputs)
        return found

    with pytest.warns(UserWarning, match="Anomaly"):
        same(*with_and_without(monkeypatch, run))


def test_compiled_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was recorded in eager mode, its backward compiled: twice, as the second finds the first's."""

    def run(upstream: float) -> list[Tensor | None]:
        inputs = leaves()
        for loss in LOSSES.values():
            (loss(*(leaf * 1 for leaf in inputs)) * upstream).backward()
        return [leaf.grad for leaf in inputs]

    want = [run(upstream) for upstream in (1.0, 3.0)]
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        got = [run(upstream) for upstream in (1.0, 3.0)]
    for a, b in zip(got, want, strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other)


def test_the_names_of_nodes() -> None:
    recon, mu, logvar = leaves()
    found = {
        f.name()  # type: ignore[union-attr]
        for f in (
            elbo(recon, mu, logvar).kl.grad_fn,
            fastvae.mse(recon, TARGET).grad_fn,
            fastvae.reparameterize(mu, logvar).grad_fn,
        )
    }
    assert found == NAMES


def test_nothing_is_kept_once_a_graph_is_gone() -> None:
    """What a node tells Python, and the options: counted, whether its backward was plain, Python's or never ran."""
    start = sys.getrefcount(autograd.ELBO)
    alive = [elbo(*leaves()) for _ in range(10)]
    counted = sys.getrefcount(autograd.ELBO)  # not within an assert: pytest holds one more there
    assert counted > start + 9
    for out in alive[:3]:
        out.loss.backward()
    for out in alive[3:6]:
        out.reconstruction.backward()
    del alive, out
    gc.collect()
    counted = sys.getrefcount(autograd.ELBO)
    assert counted == start


def test_threads_at_once() -> None:
    wide = [torch.randn(64, 300) for _ in range(2)]
    want = fastvae.bce_with_logits(wide[0], wide[1].sigmoid())
    failed: list[object] = []

    def work() -> None:
        for _ in range(50):
            recon = wide[0].clone().requires_grad_()
            loss = fastvae.bce_with_logits(recon, wide[1].sigmoid())
            loss.backward()
            if not torch.equal(loss.detach(), want):
                failed.append(loss)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_another_torch_is_refused() -> None:
    """Before anything of it is read: by its name alone."""
    found = importlib.util.find_spec("fastvae._autograd")
    assert found is not None
    code = (
        "import torch; torch.__version__ = '1.0.0+elsewhere'\n"
        "try: import fastvae._autograd\n"
        "except ImportError as error: print(error)\n"
        "from fastvae import autograd, gaussian_kl; print(autograd.NATIVE, autograd.NATIVE_MISSING)\n"
        "print(gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3)).item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ
    )
    said = done.stdout.splitlines()
    assert said[0] == f"built for torch {torch.__version__}, this is torch 1.0.0+elsewhere"
    assert said[1:] == [f"None {said[0]}; install fastvae again", "1.5"]
