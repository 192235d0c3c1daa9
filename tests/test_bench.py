"""The benchmarks measure what they say: the same work for everybody, the bytes, the memory, and what is published."""

from __future__ import annotations

import contextlib
import doctest
import importlib.machinery
import json
import os
import platform
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvae.benchmarks import (
    bars,
    cases,
    contenders,
    hardware,
    memory,
    ops,
    publish,
    run,
    startup,
    suite,
    table,
    timing,
    training,
    works,
)
from fastvae.benchmarks.command import as_json
from fastvae.benchmarks.works import BF16, TRAINING, U8, Work
from fastvae.cli import main
from fastvae.errors import UserError
from fastvae.registry import backend_name

ROOT = Path(__file__).parent.parent
SMALL = Work("elbo_loss", (16, 24), latent=4)
FAST = contenders.ours(backend_name("cpu"))


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")} | environment,
    )


@pytest.mark.parametrize("op", ops.OPS)
def test_contenders_compute_the_same(op: str) -> None:
    work = Work(op, (16, 24), latent=4)
    inputs = ops.OPS[op].inputs(work, torch.Generator().manual_seed(0))
    leaves = [inputs[k].requires_grad_() for k in ops.OPS[op].leaves]

    def results(function: Any) -> list[torch.Tensor]:
        value = function(*inputs)
        if ops.OPS[op].returns_z:
            # noise differs: what is left is that z − mu goes with σ, and the KL
            z, *kl = value if isinstance(value, tuple) else (value,)
            gradient = torch.autograd.grad(z.sum(), leaves, retain_graph=True)
            torch.testing.assert_close(gradient[1], 0.5 * (z - inputs[0]), rtol=1e-4, atol=1e-5)
            return [gradient[0], *(kl and [kl[0], *torch.autograd.grad(kl[0], leaves)])]
        return [value, *torch.autograd.grad(value, leaves)]

    want = results(ops.OPS[op].ours)
    for form in ops.OPS[op].eager.values():
        for value, expected in zip(results(form), want, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_bytes_that_must_move() -> None:
    data, latent = 16 * 24, 16 * 4
    assert ops.bytes_moved(Work("bce", (16, 24))) == 3 * 4 * data
    assert ops.bytes_moved(Work("bce", (16, 24), backward=False)) == 2 * 4 * data
    assert ops.bytes_moved(Work("bce_with_logits", (16, 24), BF16, U8)) == (2 + 1 + 2) * data
    assert ops.bytes_moved(Work("gaussian_kl", (16, 4))) == 4 * 4 * latent
    assert ops.bytes_moved(Work("sample_with_kl", (16, 4))) == 6 * 4 * latent
    assert ops.bytes_moved(Work("reparameterize", (16, 4), backward=False)) == 3 * 4 * latent
    assert ops.bytes_moved(Work("negative_binomial_nll", (16, 24))) == 4 * (3 * data + 2 * 24)
    inflated = Work("zero_inflated_negative_binomial_nll", (16, 24))
    assert ops.bytes_moved(inflated) == 4 * (5 * data + 2 * 24)
    assert ops.gradient_bytes(inflated) == 4 * (2 * data + 24)
    assert ops.bytes_moved(SMALL) == 4 * (3 * data + 4 * latent)
    assert ops.gradient_bytes(SMALL) == 4 * (data + 2 * latent)
    assert ops.gradient_bytes(Work("sample_with_kl", (16, 4))) == 4 * 2 * latent


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_two_works_share_a_title(kind: str) -> None:
    titles = [work.title for work in works.full(kind)]
    assert len(titles) == len(set(titles))
    assert {work.title for work in works.short(kind)} <= set(titles)


def test_peak_memory_is_that_of_the_worst_moment(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1 << 20)
        second = torch.empty(1 << 20)
        del first, second
        return torch.empty(100)

    assert memory.peak_extra_bytes(call, "cpu") == 2 * 4 << 20
    assert memory.peak_extra_bytes(lambda: None, "cpu") == 0
    assert capfd.readouterr().err == "", "the profiler is quiet"


def test_flaggems_is_a_contender_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def use_gems() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    assert contenders.GEMS not in contenders.names(SMALL, "cuda")
    module: Any = types.ModuleType("flag_gems")
    module.__spec__, module.use_gems = importlib.machinery.ModuleSpec("flag_gems", None), use_gems
    monkeypatch.setitem(sys.modules, "flag_gems", module)
    assert contenders.GEMS in contenders.names(SMALL, "cuda")
    assert contenders.GEMS not in contenders.names(SMALL, "cpu")
    with contenders.Contender(lambda: None, gems=True).context():
        entered.append("called")
    assert entered == ["in", "called", "out"]


def test_contenders_take_turns_in_their_context() -> None:
    calls: list[str] = []
    active: list[str] = []

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        active.append(name)
        yield
        active.pop()

    def contender(name: str) -> Any:
        def call() -> None:
            assert active == [name]
            if calls[-1:] != [name]:
                calls.append(name)

        return call

    times = timing.interleaved({n: contender(n) for n in "abc"}, "cpu", budget=0, context=context)
    assert calls == list("abc") * (1 + timing.MIN_ROUNDS), "once to find how many calls are a burst, then in rounds"
    assert all(len(t) == timing.MIN_ROUNDS and min(t) > 0 for t in times.values())


def test_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: events that read a clock which moves 3 ms a call."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            self.known = True

        def elapsed_time(self, end: Event) -> float:
            assert end.known, "asked before the device was there"
            return end.at - self.at

    def call() -> None:
        now[0] += 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.burst(call, 5, "cuda") == pytest.approx(3e-3)


@pytest.mark.parametrize(("host", "want"), [(0.2, 3e-3), (8.0, 3e-3), (60.0, None)])
def test_clock_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, host: float, want: float | None) -> None:
    """A GPU that takes 3 ms a call, of a host that takes ``host`` ms; the GPU sleeps for 20 ms while work is queued."""
    times = {"host": 0.0, "device": 0.0}

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = times["device"] = max(times["device"], times["host"])

        def query(self) -> bool:
            return times["host"] >= self.at

        def synchronize(self) -> None:
            times["host"] = max(times["host"], self.at)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def call() -> None:
        times["host"] += host
        times["device"] = max(times["device"], times["host"]) + 3.0

    def sleep(clocks: int) -> None:
        times["device"] = max(times["device"], times["host"]) + clocks / 2e6

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: times.update(host=max(times.values())))
    found = timing.device_seconds(call)
    assert found == (want if want is None else pytest.approx(want))


def test_who_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    measured = suite.measure(SMALL, "cpu", copy_speed=1e9, budget=0)
    rows = measured["contenders"]
    skipped = {name: row["skipped"] for name, row in rows.items() if "skipped" in row}
    assert skipped == {"torch.compile": "no C++ compiler"}
    assert rows.keys() == set(contenders.names(SMALL, "cpu"))
    for row in rows.values():
        if "skipped" not in row:
            assert row["gb_per_s"] == pytest.approx(measured["bytes"] / row["median_s"] / 1e9, rel=0.1, abs=1e-3)


def test_origin_names_no_host() -> None:
    origin = hardware.origin("cpu")
    assert origin["hardware"]["name"]
    assert platform.node() not in json.dumps(origin)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What ``fastvae bench`` prints and saves."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    run = python("-m", "fastvae", "bench", "--only", "elbo_loss", "--output", path, TORCH_COMPILE_DISABLE="1")
    assert run.returncode == 0, run.stderr
    return run.stdout, path


def test_command(measured: tuple[str, Path]) -> None:
    stdout, path = measured
    results = publish.load(path)
    assert "elbo_loss · 128×784, latent 20 · float32 · forward + backward" in stdout
    assert "torch.compile was skipped: TORCH_COMPILE_DISABLE is set" in stdout
    assert str(path) in stdout
    (work,) = results["works"]
    rows = work["contenders"]
    assert {"eager", "eager, probabilities", "torch.compile", FAST, "3-stream loop"} <= rows.keys()
    assert results["default"] == FAST
    assert rows[FAST]["median_s"] > 0
    assert rows[FAST]["peak_extra_bytes"] >= 128 * 784 * 4, "the gradient at least"
    assert results["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "no/such/folder.json"], "no/such/folder.json cannot be written: No such file or directory"),
        (["--output", "."], ". cannot be written: Is a directory"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--only", "dropout"], "--only 'dropout' matches no work; there are bce"),
    ],
)
def test_command_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "run", lambda *_, **__: pytest.fail("measured before checking"))
    assert main(["bench", *arguments]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"fastvae: error: {message}"), stderr
    assert stderr.count("\n") == 1, stderr


def test_pytest_benchmark_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    work = Work("elbo_loss", (128, 784), latent=20, backward=False)
    chosen = [f"benchmarks/test_ops.py::test_op[{cases.case_id('cpu', work, name)}]" for name in (FAST, "eager")]
    done = python("-m", "pytest", *chosen, "--benchmark-only", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout
    report = json.loads(path.read_text())
    assert "node" not in report["machine_info"]
    assert sorted(row["name"] for row in report["benchmarks"]) == ["eager", FAST]
    for row in report["benchmarks"]:
        assert row["group"] == f"cpu · {work.title}"
        assert row["extra_info"]["work"] == work.title
        assert row["extra_info"]["peak_extra_bytes"] > 0
        assert row["stats"]["median"] == pytest.approx(row["extra_info"]["median_s"])
    assert len({row["stats"]["rounds"] for row in report["benchmarks"]}) == 1, "they took turns"


@pytest.mark.parametrize("arguments", [[], ["--benchmark-only"]])
def test_pytest_collects_tests_or_benchmarks(arguments: list[str]) -> None:
    done = python("-m", "pytest", "--collect-only", "-qq", *arguments)
    assert done.returncode == 0, done.stdout
    files = re.findall(r"^(\S+\.py): \d+$", done.stdout, re.MULTILINE)
    assert {Path(file).parts[0] for file in files} == ({"benchmarks"} if arguments else {"fastvae", "tests"})


def test_what_belongs_into_the_repository_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.checkout() == ROOT
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "fastvae" / "benchmarks" / "hardware.py"))
    with pytest.raises(UserError, match="expected to run from a clone"):
        run.main()


def test_examples_of_the_short_table() -> None:
    assert doctest.testmod(table) == (0, 2)


def made_up(seconds: dict[str, float]) -> dict[str, Any]:
    """Results in which every work of the bars takes ``seconds``, by contender."""
    measured = []
    for work, *_ in bars.SPEED:
        rows = {name: suite.timed([value] * 3, work, copy_speed=40e9) for name, value in seconds.items()}
        for row in rows.values():
            row["peak_extra_bytes"] = 0
        measured.append(suite.description(work) | {"contenders": rows})
    return {
        "schema": suite.SCHEMA,
        **hardware.origin("cpu"),
        "hardware": {"device": "cpu", "name": "Abacus 9"},
        "default": FAST,
        "threads": 2,
        "others": 0.1,
        "bandwidth": {"copy": 40.0, "three_stream": 42.0},
        "works": measured,
    }


def test_bars_can_be_missed() -> None:
    def verdicts(eager: float, compiled: float, floor: float) -> list[bool | None]:
        results = made_up({"eager": eager, "torch.compile": compiled, FAST: 1.0, "3-stream loop": floor})
        return [bar.passed for bar in bars.speed(results)]

    assert False not in verdicts(12.0, 8.0, 0.4)
    assert verdicts(11.9, 8.0, 0.4).count(False) == 1
    assert verdicts(12.0, 7.9, 0.4).count(False) == 1
    assert verdicts(12.0, 8.0, 0.39).count(False) == 1
    missing = [bar.passed for bar in bars.speed(made_up({FAST: 1.0}))]
    floors = sum(floor is not None for *_, floor in bars.SPEED)
    assert missing.count(False) == 2 * len(bars.SPEED) + floors, "a bar that was not measured is not met"
    assert True not in missing


def test_memory_bar() -> None:
    results = made_up({FAST: 1.0})
    gradient = ops.gradient_bytes(bars.LOGITS)
    rows = {work["work"]: work["contenders"][FAST] for work in results["works"]}
    rows[bars.LOGITS.title]["peak_extra_bytes"] = gradient + 65_536
    assert all(bar.passed for bar in bars.memory(results))
    rows[bars.LOGITS.title]["peak_extra_bytes"] = 2 * gradient
    assert [bar.passed for bar in bars.memory(results)].count(False) == 1


def test_published_table_is_the_results(tmp_path: Path) -> None:
    source, readme = tmp_path / "abacus.json", tmp_path / "README.md"
    before, after = "# Title\n\n<!-- benchmarks cpu -->", "<!-- /benchmarks cpu -->\n\nThe end.\n"
    readme.write_text(f"{before}\nold\n{after}", encoding="utf-8")
    for eager in (0.030, 0.060):
        results = made_up({"eager": eager, "torch.compile": 0.020, FAST: 0.010})
        source.write_text(suite_json(results), encoding="utf-8")
        written = publish.main(source, readme=readme, pictures=tmp_path)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(before)
    assert text.endswith(after)
    lines = text[len(before) : -len(after)].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert cells[2][1:] == ["60.0 ms", "20.0 ms", "10.0 ms", "6.0×", "2.0×", "7.7, 19%"], "8192·784·12 B in 10 ms"
    assert len(cells) == 2 + len(works.short("cpu"))
    assert "old" not in text
    for part in ("Abacus 9", "abacus.json", results["date"], f"torch {torch.__version__}"):
        assert part in lines[-3]
    assert lines[-1].endswith("(roofline-abacus-9.png)")
    assert (tmp_path / "roofline-abacus-9.png").read_bytes().startswith(b"\x89PNG")
    assert written == [readme, tmp_path / "roofline-abacus-9.png"]


def suite_json(results: dict[str, Any]) -> str:
    text = as_json(results)
    assert json.loads(text) == results
    return text


def test_publish_errors(tmp_path: Path) -> None:
    readme, bad = tmp_path / "README.md", tmp_path / "bad.json"
    readme.write_text("no comments")
    bad.write_text("{}")
    with pytest.raises(UserError, match="is not a results file of schema"):
        publish.main(bad, readme=readme, pictures=tmp_path)
    bad.write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        publish.main(bad, readme=readme, pictures=tmp_path)
    bad.write_text(suite_json(made_up({FAST: 1.0})))
    with pytest.raises(UserError, match="expected one pair of comments <!-- benchmarks cpu -->"):
        publish.main(bad, readme=readme, pictures=tmp_path)
    assert readme.read_text() == "no comments"


def test_a_busy_machine_is_published_with_a_remark_only(tmp_path: Path) -> None:
    readme, source = tmp_path / "README.md", tmp_path / "busy.json"
    readme.write_text("<!-- benchmarks cpu -->\n<!-- /benchmarks cpu -->")
    source.write_text(suite_json(made_up({FAST: 1.0}) | {"others": 0.7}), encoding="utf-8")
    with pytest.raises(UserError, match=r"others kept 0\.7 cores busy"):
        publish.main(source, readme=readme, pictures=tmp_path)
    publish.main(source, readme=readme, pictures=tmp_path, busy=True)
    assert "0.7 cores busy with something else" in readme.read_text(encoding="utf-8")


def test_our_own_work_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[tuple[float, float, float] | None] = [(100.0, 50.0, 7.0), (110.0, 65.0, 17.0)]
    monkeypatch.setattr(hardware, "_clocks", lambda: readings.pop(0))
    assert hardware.Others().cores() == 0.5, "15 s of work in 10 s, 10 of them ours"
    readings += [None, (1.0, 1.0, 1.0)]
    assert hardware.Others().cores() is None, "the system does not say"


@pytest.mark.skipif("not sys.platform.startswith('linux')", reason="read from /proc/stat")
def test_clocks_of_linux() -> None:
    clocks = hardware._clocks()
    assert clocks is not None
    _, busy, own = clocks
    assert 0 < own <= busy, "of all processes since the machine started, and of this one"


def test_readme_has_a_place_for_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for device in ("cpu", "cuda"):
        publish.insert(text, f"benchmarks {device}", [])


def test_results_in_the_repository_can_be_published() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        results = publish.load(path)
        assert len(list(publish.markdown(results, path.name))) > 4
        assert platform.node() not in path.read_text(encoding="utf-8")


def test_a_process_reports_its_own_time() -> None:
    assert startup.seconds("print(1.5)") == 1.5
    assert "fastvae" in startup.IMPORT


@pytest.mark.parametrize(
    ("row", "expected"), [({"eager": 3.0, FAST: 1.5}, 2.0), ({"eager": 3.0}, None), ({FAST: 1.0}, None)]
)
def test_ratio(row: dict[str, float], expected: float | None) -> None:
    assert table.ratio({name: {"median_s": value} for name, value in row.items()}, "eager", FAST) == expected


def test_a_training_step_trains_and_is_the_same_for_all() -> None:
    work = Work(TRAINING, (32, 24), latent=4)
    losses: dict[str, list[float]] = {}
    for name, loss in (("eager", training.eager_loss), ("own", training.own_loss)):
        seen = losses[name] = []
        weights: list[torch.Tensor] = []

        def watched(
            model: Any, x: torch.Tensor, loss: Any = loss, seen: list[float] = seen, weights: list = weights
        ) -> torch.Tensor:
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            value = loss(model, x)
            seen.append(value.item())
            return value

        call = training.step(work, "cpu", watched)
        for _ in range(5):
            call()
        moved = (weights[-1] - weights[0]).abs()
        assert 1e-3 < moved.max() < 5e-3, "four steps of Adam at 1e-3"
    for a, b in zip(*losses.values(), strict=True):
        assert a == pytest.approx(b, rel=0.05), "the noise alone differs"
