"""Train an SAE: the loop round the step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from microtome import __version__
from microtome.errors import ArgumentError, CheckpointError, NonFiniteError
from microtome.ops import synchronize
from microtome.sae.config import TrainConfig
from microtome.sae.evaluate import evaluate
from microtome.sae.feed import Feed
from microtome.sae.init import start_b_dec_
from microtome.sae.loss import Losses
from microtome.sae.ranks import ALONE
from microtome.sae.run import Run, Stepper
from microtome.sae.sae import SAE
from microtome.sae.schedule import lr_factor
from microtome.sae.sharded import ShardedSAE
from microtome.sae.sharded_step import ShardedStep
from microtome.sae.source import ActivationSource, as_source
from microtome.sae.step import FusedStep
from microtome.sae.unfused import UnfusedStep


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        sae: the trained SAE, the object that was passed in.
        history: the logged lines: step, loss, fvu, l0, dead_fraction, auxk_loss, lr,
            tokens_per_second of that step's batch, and held_out_fvu and so on where an evaluation
            fell on it.
        metrics: steps, tokens, train_fvu, train_l0, train_dead_fraction of the last logged step;
            with held-out rows also fvu, l0, dead_fraction and n_rows on those.
        path: the run's folder, or None.
    """

    sae: SAE | ShardedSAE
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    path: Path | None


def train(
    sae: SAE | ShardedSAE,
    activations: Any,
    config: TrainConfig,
    *,
    held_out: Any = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train an SAE on activations, in place.

    Args:
        sae: the autoencoder, on the device to train on. One from `shard` is trained by all its
            ranks, which make the same call; docs/parallel.md says who does what.
        activations: a tensor [rows, d], an ActivationStore or a view of one.
        config: the settings.
        held_out: rows to evaluate on, of the same kinds; None for no evaluation.
        out: the run's folder: config.json, log.jsonl, checkpoints/step_N, sae (SAELens layout),
            metrics.json, and wandb.json where Weights & Biases logs. A folder that holds a run
            with the same settings is continued from its newest whole checkpoint, with the same
            bits as if it had never stopped, given the same machine and thread count.
        progress: show a progress bar.

    Returns:
        A TrainResult.

    Raises:
        ShapeError, ArgumentError: activations do not fit the SAE, it is wrapped, or config is no
            TrainConfig.
        DistributedError: a rank failed, or read other rows; the same on every rank, as all errors.
        NonFiniteError: a batch holds NaN or infinity; the message names the rows. The SAE keeps its
            weights of the step before, and the last checkpoint stays.
        CheckpointError: `out` holds a run with other settings, a damaged one, or cannot be written
            (a full disk).

    Ctrl-C ends the step, writes a checkpoint and raises KeyboardInterrupt; a second one ends at
    once. Rows that cannot be read, or memory that runs out in an evaluation, end the run with a
    checkpoint of the last whole step, too. Deterministic: a function of the SAE, the activations
    and the config.
    """
    _check_sae(sae, config)
    ranks = sae.ranks if isinstance(sae, ShardedSAE) else ALONE
    progress = progress and ranks.first
    with ranks.together():
        source = as_source("train", activations, sae.d_model)
        held = None if held_out is None else as_source("train", held_out, sae.d_model)
        stepper = _stepper(sae, config)
    run = Run(None if out is None else Path(out), sae, stepper, source, config)
    failed = True
    try:
        if run.step == 0:
            with ranks.together():
                start_b_dec_(sae.local if isinstance(sae, ShardedSAE) else sae, source, config)
            ranks.copy_from_first_(sae.parameters_in_order[3])
        _loop(run, source, held, config, progress)
        metrics: dict[str, Any] = {"steps": run.step, "tokens": run.step * config.batch_size}
        for last in run.history[-1:]:  # none where a finished run's log.jsonl is gone
            metrics |= {f"train_{name}": last[name] for name in ("fvu", "l0", "dead_fraction")}
        if held is not None:
            metrics.update(evaluate(sae, held, progress=progress).to_dict())
        run.finish(metrics, _metadata(source, metrics))
        failed = False
    finally:
        run.close(failed=failed)
    return TrainResult(sae, run.history, metrics, run.out)


def _check_sae(sae: object, config: object) -> None:
    if not isinstance(config, TrainConfig):
        msg = f"train: config must be a TrainConfig, got {type(config).__name__}. Build one with "
        msg += "TrainConfig(steps=...)."
        raise ArgumentError(msg)
    if not isinstance(sae, (SAE, ShardedSAE)):
        msg = f"train: sae must be an SAE, or one from shard(), got {type(sae).__name__}."
        if hasattr(sae, "module"):
            msg += (
                " Training forms no gradients that a wrapper could reduce: pass shard(sae.module)"
            )
            msg += " to train on several ranks."
        raise ArgumentError(msg)
    if isinstance(sae, ShardedSAE) and not config.fused:
        name = config.to_dict()["optimizer"]["callable"]
        msg = "train: a sharded SAE is trained by the fused optimizers 'adam', 'adamw', 'sgd' and "
        msg += f"'signsgd', got the callable {name}."
        raise ArgumentError(msg)
    if isinstance(sae, ShardedSAE) and config.precision != "float32":
        msg = "train: a sharded SAE is trained with precision='float32', got "
        msg += f"precision={config.precision!r}. Drop it, or train the SAE on one rank."
        raise ArgumentError(msg)


def _stepper(sae: SAE | ShardedSAE, config: TrainConfig) -> Stepper:
    if isinstance(sae, ShardedSAE):
        return ShardedStep(sae, config)
    return FusedStep(sae, config) if config.fused else UnfusedStep(sae, config)


def _loop(
    run: Run,
    source: ActivationSource,
    held: ActivationSource | None,
    config: TrainConfig,
    progress: bool,
) -> None:
    sae, ranks, total, whole = run.sae, run.ranks, config.total_steps, True
    like = sae.parameters_in_order[0]
    read = source.batches(config.batch_size, seed=config.seed, start=run.step)
    batches = Feed(read, like.device, like.dtype)
    bar = tqdm(total=total, initial=run.step, desc="train", unit="step", disable=not progress)
    clock, counted = time.perf_counter(), run.step
    with _deferred_interrupt() as interrupted:
        ranks.listen(interrupted)
        try:
            while run.step < total:
                step = run.step + 1
                x = ranks.attempt(
                    lambda: next(batches),
                    lambda: like.new_zeros(config.batch_size, sae.d_model),
                )
                whole = False
                losses = _take(run.stepper, x, config, step)
                run.step, whole = step, True
                bar.update()
                evaluates = held is not None and config.eval_every and step % config.eval_every == 0
                if step in (1, total) or step % config.log_every == 0 or evaluates:
                    now = time.perf_counter()
                    speed = (step - counted) * config.batch_size / max(now - clock, 1e-9)
                    with _found_in(step):  # a GPU is waited for
                        line = _line(losses, step, speed)
                    if evaluates:
                        numbers = evaluate(sae, held).to_dict()
                        line.update(
                            {f"held_out_{k}": v for k, v in numbers.items() if k != "n_rows"}
                        )
                    run.log(line)
                    shown = {"loss": losses.loss, "fvu": losses.fvu, "dead": losses.dead_fraction}
                    bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
                    clock, counted = time.perf_counter(), step
                every = config.checkpoint_every
                if step == total or (every and step % every == 0):
                    with _found_in(step):
                        synchronize(like.device)  # nothing of this run is left for a later call
                        run.checkpoint()
                if ranks.stops(interrupted()):
                    raise KeyboardInterrupt
        except (NonFiniteError, CheckpointError):
            raise  # of these very weights; of the folder itself
        except BaseException as error:
            # A second Ctrl-C can fall into the middle of a step, and on one rank alone; other
            # errors may be one rank's, too.
            known = ranks.agreed if isinstance(error, KeyboardInterrupt) else ranks is ALONE
            if whole and known:
                with _found_in(run.step):
                    run.checkpoint()
            raise
        finally:
            bar.close()
            batches.close()


def _take(stepper: Stepper, x: Tensor, config: TrainConfig, step: int) -> Losses:
    with _found_in(step):
        try:
            return stepper.take(x, lr_factor(config, step), step)
        except NonFiniteError as error:
            if error.late:
                raise
            msg = f"train: step {step} (batch {step - 1} of seed {config.seed}): {error} The SAE "
            msg += f"keeps its weights of step {step - 1}."
            raise _reworded(error, msg) from error


@contextmanager
def _found_in(step: int) -> Iterator[None]:
    """Say when a GPU's finding came: it is of this step or one before."""
    try:
        yield
    except NonFiniteError as error:
        if not error.late:
            raise
        msg = f"train: found in step {step}: {error} The last checkpoint stays."
        raise _reworded(error, msg) from error


def _reworded(error: NonFiniteError, msg: str) -> NonFiniteError:
    other = NonFiniteError(msg)
    other.late, other.agreed = error.late, error.agreed  # said once, where all ranks raise it
    return other


def _line(losses: Losses, step: int, speed: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": losses.loss,
        "fvu": losses.fvu,
        "l0": losses.l0,
        "dead_fraction": losses.dead_fraction,
        "auxk_loss": losses.auxk,
        "lr": losses.lr,
        "tokens_per_second": speed,
    }


def _metadata(source: ActivationSource, metrics: dict[str, Any]) -> dict[str, Any]:
    """What cfg.json says of where the SAE comes from, under SAELens's names where it has one."""
    manifest = getattr(source, "manifest", None) or {}
    names = {"model_name": "model", "hook_name": "site", "context_size": "context_length"}
    known = {ours: manifest[key] for ours, key in names.items() if key in manifest}
    return {**known, "microtome_version": __version__, "metrics": metrics}


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back while open, so that no step is torn; the function says whether one came.

    Only in the main thread, and only where nobody else handles SIGINT.
    """
    pressed = False
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not usual:
        yield lambda: False
        return

    def hold(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            usual(number, frame)
        pressed = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)
