"""The command line: ``train``, ``demo``, ``gallery``, ``sample``, what ``train/commands.py`` has, ``bench``, ``info``.

An error is one line on stderr and an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .train.config import Config
    from .train.distributed import World
    from .train.loop import Trainer
INTERRUPTED = 130
DEVICE_HELP = "cpu, cuda, cuda:1, … (default: cuda where there is one)"


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    from .train.config import add_options

    root = argparse.ArgumentParser(prog="fastvae", description="Train VAEs with fused sampling and loss kernels.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model and write a report")
    add_options(train)
    train.add_argument("--device", default="auto", help=DEVICE_HELP)
    train.add_argument("--graph", action="store_true", help="launch each step as one CUDA graph")
    train.add_argument("--backend", help="kernel backend (default: the best for the device; see fastvae info)")
    train.add_argument(
        "--output", type=Path, default=Path("runs/train"), metavar="FOLDER", help="(default: runs/train)"
    )
    train.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model over the processes (FSDP2)")
    train.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="under torchrun: end where another process is silent (default: 50)",
    )
    train.add_argument("--resume", action="store_true", help="continue the run in --output")
    train.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    train.set_defaults(run=run_train)

    demo = commands.add_parser("demo", help="train a VAE, a CVAE and a 2-D VAE on digits, with one page of results")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="(default: runs/demo)")
    demo.add_argument("--epochs", type=int, default=30, help="passes over the data for each model (default: 30)")
    demo.add_argument("--device", default="auto", help=argparse.SUPPRESS)
    demo.set_defaults(run=run_demo)

    gallery = commands.add_parser("gallery", help="train every model briefly, and show them on one page")
    gallery.add_argument(
        "--output", type=Path, default=Path("runs/gallery"), metavar="FOLDER", help="(default: runs/gallery)"
    )
    gallery.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cards of the page alone")
    gallery.set_defaults(run=run_gallery)

    sample = commands.add_parser("sample", aliases=["generate"], help="draw images from a trained model")
    sample.add_argument("folder", type=Path, help="output folder of fastvae train")
    sample.add_argument("--count", type=int, default=64, help="images (default: 64)")
    sample.add_argument("--classes", type=int, nargs="+", metavar="LABEL", help="of these classes in turn (CVAE)")
    sample.add_argument("--seed", type=int, default=0, help="(default: 0)")
    sample.add_argument(
        "--output", type=Path, default=Path("samples.png"), metavar="FILE", help="(default: samples.png)"
    )
    sample.set_defaults(run=run_sample)

    _add_uses(commands)

    bench = commands.add_parser("bench", help="time the ops on this machine against eager PyTorch and torch.compile")
    bench.add_argument("--output", type=Path, metavar="FILE.json", help="save every number here")
    bench.add_argument("--device", default="auto", help=DEVICE_HELP)
    bench.add_argument("--full", action="store_true", help="every op, shape, dtype and direction: 10 minutes and more")
    bench.add_argument("--only", default="", metavar="TEXT", help="works with this in their name, such as elbo_loss")
    bench.set_defaults(run=run_bench)

    info = commands.add_parser("info", help="versions, devices, backends, and why a backend is missing")
    info.set_defaults(run=run_info)
    return root


def _add_uses(commands: Any) -> None:
    """What one does with a trained model."""
    from .train.corrupt import BINARISATIONS
    from .train.data import SOURCES

    helps = {
        "evaluate": "the ELBO and the importance-weighted bound of a trained model",
        "anomaly": "ROC of a class that was held out of the training",
        "cluster": "k-means in the latent, against the labels",
        "probe": "a linear classifier on the codes",
        "compress": "bytes an image, and what is lost",
        "interpolate": "walks between codes, and arithmetic with them",
    }
    for name, text in helps.items():
        use = commands.add_parser(name, help=text)
        use.add_argument("folder", type=Path, help="output folder of fastvae train")
        use.add_argument("--data", choices=SOURCES, help="(default: those of the training)")
        use.add_argument("--data-root", metavar="FOLDER", help="folder of IDX files or of images, instead of --data")
        use.set_defaults(run=run_use, use=name)
        if name in ("evaluate", "anomaly", "cluster"):
            use.add_argument("--picture", type=Path, metavar="FILE.png", help="draw it here")
        if name == "evaluate":
            use.add_argument("--samples", type=int, default=50, metavar="K", help="of z for each example (default: 50)")
            use.add_argument("--binarise", choices=BINARISATIONS, help="(default: as in the training)")
        if name == "interpolate":
            use.add_argument("--from", type=int, dest="start", metavar="LABEL", help="walk from images of this class")
            use.add_argument("--to", type=int, dest="end", metavar="LABEL", help="to images of this one")
            use.add_argument("--seed", type=int, default=0, help="which images (default: 0)")
            use.add_argument("--output", type=Path, default=Path(), metavar="FOLDER", help="(default: here)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.run is run_train:
        from .train.distributed import end, launched

        if launched():
            end(_run(options))
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    try:
        if options.run is not run_info:
            _backend(None)
        options.run(options)
    except UserError as error:
        if _first_to_say(error):
            print(f"fastvae: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        if _first_to_say(error):
            print("fastvae: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _first_to_say(what: BaseException) -> bool:
    distributed = sys.modules.get("fastvae.train.distributed")
    return distributed is None or distributed.first_to_say(what)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":  # it can be made, and holds nothing
            raise UserError(f"--device must be cpu or cuda, got {name}")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used, expected cpu, cuda or cuda:N: {str(error).splitlines()[0]}"
        ) from None
    return name


def _prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make ``folder``; refuse to write over a run that is there."""
    from .train.checkpoint import FILE

    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(folder).decode(errors="backslashreplace")
        raise UserError(f"--output must be a UTF-8 path, which safetensors needs, got {shown}") from None
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if (folder / FILE).exists() and not (resume or overwrite):
        raise UserError(f"{folder} already holds a run: continue it with --resume, replace it with --overwrite")
    if resume:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to")


def run_train(options: argparse.Namespace) -> None:
    """``fastvae train``, by one process or by one of those that torchrun started."""
    from .train import distributed
    from .train.config import Config, given
    from .train.lock import hold
    from .train.loop import resumed_config

    asked = given(options)
    timeout = distributed.TIMEOUT if options.timeout is None else options.timeout
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(distributed.join(options.device, fsdp=options.fsdp, timeout=timeout))
        with world.together():
            config = Config(**asked)
            if options.resume and world.first:
                _prepare_folder(options.output, resume=True, overwrite=options.overwrite)
                stack.enter_context(hold(options.output))
                config = resumed_config(options.output, asked)
        with world.together():
            config = world.from_first(config)
            config.check()
            config.parts = distributed.parts_of(config, world, "parts" in asked)
            device = _device(distributed.own_device(options.device, world))
            stack.enter_context(_backend(options.backend, device))
        train(
            config, options.output, device,
            resume=options.resume, overwrite=options.overwrite, graph=options.graph, world=world,
        )  # fmt: skip


def _backend(name: str | None, device: str | None = None) -> contextlib.AbstractContextManager[None]:
    """The backend of ``--backend``, else of ``FASTVAE_BACKEND``, after a look whether it serves ``device``."""
    from .registry import asked_for, backend_for, use_backend

    wanted = name or asked_for()
    if wanted is None:
        return contextlib.nullcontext()
    try:
        with use_backend(wanted):
            if device is not None:
                backend_for(device.partition(":")[0])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{'--backend' if name else 'FASTVAE_BACKEND'}: {error}") from None
    return use_backend(wanted)


def train(
    config: Config,
    folder: Path,
    device: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    graph: bool = False,
    world: World | None = None,
) -> dict[str, Any]:
    """Train, draw, report; returns the state of the last checkpoint. A resumed run's folder is locked already."""
    from .train.distributed import World
    from .train.lock import hold
    from .train.loop import Trainer

    world = world or World()
    with contextlib.ExitStack() as stack:
        with world.together():
            # all that can be wrong with data and model shows before a folder is made
            trainer = Trainer(config, folder, device, resume=resume, graph=graph, world=world)
            if world.first and not resume:
                _prepare_folder(folder, resume=False, overwrite=overwrite)
                stack.enter_context(hold(folder))
                _prepare_folder(folder, resume=False, overwrite=overwrite)  # another run may just have ended
        return _finish(trainer)


def _finish(trainer: Trainer) -> dict[str, Any]:
    from .train import measures, plots, report
    from .train.loop import load_model

    config, folder = trainer.config, trainer.folder
    if trainer.epoch >= config.epochs and trainer.world.first:
        print(f"{folder} already has its {config.epochs} epochs; give more with --epochs")
    try:
        _fit(trainer)
    except KeyboardInterrupt as interrupt:
        launcher, why = "fastvae", "interrupted"
        if trainer.world.size > 1:
            launcher, why = "torchrun … -m fastvae", "interrupted, by hand or since another process has ended"
        if _first_to_say(interrupt):
            print(
                f"{why}: the checkpoint of epoch {trainer.epoch} is in {folder}; "
                f"continue with\n  {launcher} train --resume --output {folder}",
                file=sys.stderr,
            )
        raise
    if not trainer.world.first:
        return {}
    model, state = load_model(folder, str(trainer.device))
    pictures = plots.draw_all(folder, model, trainer.data, state["history"], state["config"])
    found = measures.findings(model, trainer.data, config)
    path = report.write(folder, state, pictures, sum(p.numel() for p in model.parameters()), found)
    last = state["history"][-1]
    (loss, reconstruction, rest), name = (last[f"test_{term}"] for term in trainer.terms), "penalty"
    kind = f"test loss {loss:.2f}"
    if "test_kl" in last:
        kind, name = f"test negative ELBO {loss:.2f} nats", "KL"
    print(f"{kind} (reconstruction {reconstruction:.2f} + {name} {rest:.2f}); report: {path}")
    for value, label in found:
        print(f"{value} {label}")
    return state


def _fit(trainer: Trainer) -> None:
    """Train under a progress bar over the examples of all epochs: the ELBO, its terms and examples a second."""
    from tqdm import tqdm

    config, size = trainer.config, len(trainer.train.images)
    hidden = None if trainer.world.first else True
    with tqdm(total=config.epochs * size, unit="ex", unit_scale=True, disable=hidden, mininterval=0.2) as bar:

        def progress(epoch: int, examples: int, numbers: dict[str, float]) -> None:
            bar.set_description(f"{config.model} epoch {epoch}/{config.epochs}", refresh=False)
            loss, reconstruction, rest = numbers.values()
            vae = "kl" in numbers
            terms = f"{'ELBO' if vae else 'loss'} {-loss if vae else loss:.2f} = "
            terms += f"{'-' if vae else ''}({reconstruction:.2f} + {rest:.2f})"
            bar.set_postfix_str(terms, refresh=False)
            bar.update((epoch - 1) * size + examples - bar.n)

        def say(line: str) -> None:
            if trainer.world.first:
                tqdm.write(f"fastvae: {line}", file=sys.stderr)

        trainer.fit(progress, say=say)


def run_demo(options: argparse.Namespace) -> None:
    """``fastvae demo``: three models, each with its report, and a page that links them."""
    from .train import report
    from .train.config import Config

    device = _device(options.device)
    common = {"epochs": options.epochs, "learning_rate": 1e-3, "batch_size": 64}
    configs = {
        "vae": Config(model="vae", **common),
        "cvae": Config(model="cvae", **common),
        "vae-2d": Config(model="vae", latent=2, **common),
    }
    for config in configs.values():
        config.check()
    runs = []
    for name, config in configs.items():
        runs.append((name, train(config, options.output / name, device, overwrite=True)))
    print(f"open {report.write_index(options.output, runs)}")


def run_gallery(options: argparse.Namespace) -> None:
    """``fastvae gallery``."""
    from .train import gallery

    print(f"open {gallery.make(options.output, options.only)}")


def run_use(options: argparse.Namespace) -> None:
    """``fastvae evaluate`` and the others of ``train/commands.py``."""
    from .train import commands

    getattr(commands, options.use)(options)


def run_sample(options: argparse.Namespace) -> None:
    """``fastvae sample``: a grid of images from a checkpoint."""
    import math

    import torch

    from .train import plots
    from .train.loop import load_model

    if options.count < 1:
        raise UserError(f"--count must be at least 1, got {options.count}")
    if not 0 <= options.seed < 1 << 63:
        raise UserError(f"--seed must be from 0 to {(1 << 63) - 1}, got {options.seed}")
    model, _ = load_model(options.folder)
    y = None
    if model.conditional:
        classes = model.config["classes"]
        wanted = options.classes or list(range(classes))
        if not all(0 <= label < classes for label in wanted):
            raise UserError(f"--classes must be from 0 to {classes - 1}, got {' '.join(map(str, wanted))}")
        y = torch.tensor(wanted).repeat(math.ceil(options.count / len(wanted)))[: options.count]
    elif options.classes:
        raise UserError(f"--classes goes with a CVAE; {options.folder} holds a model without labels")
    torch.manual_seed(options.seed)
    columns = len(options.classes) if options.classes else math.ceil(math.sqrt(options.count))
    name = os.fsencode(options.folder.name).decode(errors="replace")
    figure = plots.show(plots.tile(model.sample(options.count, y), columns), f"Samples from {name}")
    try:
        figure.savefig(options.output, dpi=plots.DPI)
    except (OSError, ValueError) as error:
        raise UserError(f"{options.output} cannot be written: {error}") from None
    print(options.output)


def run_bench(options: argparse.Namespace) -> None:
    """``fastvae bench``."""
    from .benchmarks import command

    command.run(options, _device(options.device))


def run_info(_: argparse.Namespace) -> None:
    """``fastvae info``."""
    import platform

    import torch

    from . import __version__, autograd
    from .benchmarks.hardware import installed
    from .registry import backend_name, backends

    lines: list[tuple[str, str]] = [
        ("fastvae", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("threads", str(torch.get_num_threads())),
    ]
    lines += [(name, installed(name) or "not installed") for name in ("numba", "triton", "numpy")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines += [(f"cuda:{k}", torch.cuda.get_device_name(k)) for k in range(count)] or [("cuda", "no device")]
    for name, value in lines:
        print(f"{name:10} {value}")
    print("\nbackend    serves       status")
    for name, status in backends().items():
        default = [d for d in ("cpu", "cuda") if backend_name(d) == name and (d == "cpu" or count)]
        note = f"available{', default on ' + ' and '.join(default) if default else ''}"
        print(f"{name:10} {', '.join(status.devices):12} {note if status.available else 'missing: ' + status.reason}")
    nodes = "graph nodes of cpp and cuda: compiled"
    if autograd.NATIVE is None:
        nodes = f"graph nodes of cpp and cuda: missing, so a call takes some 40 µs more: {autograd.NATIVE_MISSING}"
    print(f"\n{nodes}")
