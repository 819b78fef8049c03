"""The demo: a language model, a text, a sparse autoencoder and a report, within a time limit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from microtome import _check
from microtome.errors import ArgumentError
from microtome.models import ActivationStore, Corpus, LoadedModel, capture, corpus, tokenise
from microtome.report import About, write_report
from microtome.report.write import EVALUATION
from microtome.sae import SAE, TopK, TrainConfig, train
from microtome.workflow import capture_text, measure, open_model, stand_ins, table

CONTEXT_LENGTH = 128
HELD_OUT = 0.1
BATCH = 1024
# Share of the time limit for a stage. Training ends at TRAINED_BY, so a slow capture shortens it;
# what is left is for measuring and the report.
CAPTURE_SHARE, TRAINED_BY, SPLICE_SHARE = 0.38, 0.72, 0.08
MOST_TOKENS, MOST_STEPS, MOST_CONTEXTS = 100_000, 3_000, 32
_STATE = "demo.json"
_PRINT = partial(print, flush=True)  # through a pipe too each line comes when it is said
_MADE = (
    "store",
    "run",
    _STATE,
    "report.html",
    "fvu.png",
    "density.png",
    "dead.png",
    "alignment.png",
)


@dataclass(frozen=True)
class Request:
    """What the user asked for; None leaves a size to the time limit."""

    model: str = "auto"
    text: str = "auto"
    features: int = 8192
    k: int = 32
    tokens: int | None = None
    steps: int | None = None


class _Stages:
    """Says where the demo is, and keeps in demo.json what was decided, for a later call."""

    def __init__(
        self, request: Request, out: Path, minutes: float, show: Callable[[str], None]
    ) -> None:
        self.out, self.minutes, self.show = out, minutes, show
        self.began = time.monotonic()
        self.state: dict[str, Any] = {"request": asdict(request)}
        file = out / _STATE
        if file.exists():
            kept = _read_state(file)
            if kept["request"] != self.state["request"]:
                changed = [
                    n for n, v in self.state["request"].items() if kept["request"].get(n) != v
                ]
                msg = (
                    f"demo: {out} holds a demo with another {', '.join(changed)}. "
                    "Give another --out, or --fresh to throw it away."
                )
                raise ArgumentError(msg)
            self.state = kept

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self.began)
        self.show(f"[{seconds // 60}:{seconds % 60:02d}] {text}")

    def spent(self) -> float:
        """Share of the time limit that is over."""
        return (time.monotonic() - self.began) / (self.minutes * 60)

    def seconds(self, share: float) -> float:
        return share * self.minutes * 60

    def decide(self, name: str, value: Callable[[], Any]) -> Any:
        """A size decided once: a later call of the same demo reads it, and measures nothing."""
        if name not in self.state:
            self.state[name] = value()
            partial = self.out / (_STATE + ".partial")
            partial.write_text(json.dumps(self.state, indent=2), encoding="utf-8")
            partial.replace(self.out / _STATE)
        return self.state[name]


def _read_state(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(kept["request"], dict):
            return dict(kept)
        why = "no request in it"
    except (ValueError, LookupError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    msg = f"demo: {file} is damaged ({why}). Add --fresh to begin anew, or give another --out."
    raise ArgumentError(msg)


def demo(
    request: Request,
    out: Path,
    *,
    minutes: float = 10.0,
    fresh: bool = False,
    show: Callable[[str], None] = _PRINT,
) -> Path:
    """Run the whole demo; stages that an earlier call finished are not repeated.

    Args:
        request: model, text and sizes.
        out: folder for all results.
        minutes: time limit, by which tokens and steps are chosen from speeds measured here. It is
            kept roughly: a machine that slows down in mid-run takes longer.
        fresh: throw away what an earlier demo left in `out`.
        show: what prints a line.

    Returns:
        The path of report.html.

    Raises:
        ArgumentError: `out` holds a demo of another request or a damaged one, a size is out of its
            range, or minutes is not positive.
        PackageError: a model that was asked for by name is not installed.
    """
    if not minutes > 0:
        msg = f"demo: minutes must be above 0, got minutes={minutes}."
        raise ArgumentError(msg)
    least = {"features": 1, "k": 1, "steps": 1, "tokens": 2 * CONTEXT_LENGTH}  # one is held out
    for name, low in least.items():
        if getattr(request, name) is not None:
            _check.between("demo", name, getattr(request, name), low, 1 << 40)
    _check.between("demo", "k", request.k, 1, request.features, "features")
    if fresh:
        _throw_away(out)
    out.mkdir(parents=True, exist_ok=True)
    stages = _Stages(request, out, minutes, show)
    stages.say(f"microtome demo: about {minutes:g} minutes, results in {out}/")
    loaded = open_model(stages.state.get("model", request.model))
    captured, resumed = "captured" in stages.state, "model" in stages.state
    text = None if captured else corpus(stages.state.get("text", request.text))
    notes = stages.decide("notes", lambda: stand_ins(loaded, text))
    if text is not None:
        stages.decide("text", lambda: text.name)
    stages.decide("model", lambda: loaded.name)
    for note in notes:
        stages.say(note)
    if resumed and notes and "auto" in (request.model, request.text):
        stages.say("So it was when this demo began; to choose model and text anew, add --fresh.")
    stages.say(f"model: {loaded.description}; site {loaded.site_default}")
    store = _capture(stages, request, loaded, text, notes)
    rows, held_out = store.split(HELD_OUT)
    sae = _train(stages, request, rows, held_out)
    file = out / "run" / EVALUATION
    if file.exists():
        numbers = json.loads(file.read_text(encoding="utf-8"))
        stages.say("evaluation: done before")
    else:
        numbers = _evaluate(stages, sae, held_out, loaded)
        file.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    stages.say("report: looking for the features' highest activations in the whole text")
    report = write_report(out / "run", store, out / "report.html", about=About.read(out / "store"))
    stages.say("done")
    k, f = request.k, sae.n_features
    show(f"\n{loaded.description}, {loaded.site_default}, {len(store):,} tokens, f={f:,}, k={k}")
    show(table(numbers))
    show(f"\nOpen {report.resolve()}\nPictures, the store and the run lie beside it.")
    return report


def _throw_away(out: Path) -> None:
    """Remove what a demo makes, and nothing else that lies in the folder."""
    for name in _MADE:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _capture(
    stages: _Stages, request: Request, loaded: LoadedModel, text: Corpus | None, notes: list[str]
) -> ActivationStore:
    path = stages.out / "store"
    if text is None:
        store = ActivationStore(path)
        stages.say(f"capture: done before, {len(store):,} tokens in {path}")
        return store
    speed = stages.decide("tokens_per_second", lambda: _capture_speed(loaded, text.text))
    affordable = int(speed * stages.seconds(CAPTURE_SHARE))
    tokens = max(16 * CONTEXT_LENGTH, min(MOST_TOKENS, affordable))
    if request.tokens is not None:
        tokens = request.tokens
    cut = tokenise(loaded.tokenizer, text.text, CONTEXT_LENGTH, tokens)
    stages.say(
        f"capture: {cut.numel():,} tokens of {text.description}, "
        f"about {cut.numel() / speed / 60:.1f} minutes at {speed:,.0f} tokens/s"
    )
    shutil.rmtree(path, ignore_errors=True)  # an interrupted capture: its rows cannot be continued
    store = capture_text(loaded, text, cut, loaded.site_default, path, notes=notes)
    stages.decide("captured", lambda: len(store))
    return store


def _capture_speed(loaded: LoadedModel, text: str) -> float:
    """Tokens a second up to the site, over two batches after one that warms up."""
    tokens = tokenise(loaded.tokenizer, text, CONTEXT_LENGTH, 8 * CONTEXT_LENGTH)
    capture(loaded.model, loaded.site_default, tokens)
    start = time.monotonic()
    for _ in range(2):
        capture(loaded.model, loaded.site_default, tokens)
    return 2 * tokens.numel() / (time.monotonic() - start)


def _train(stages: _Stages, request: Request, rows: Any, held_out: Any) -> SAE:
    path = stages.out / "run"
    if "trained" in stages.state:
        stages.say(f"train: done before, the SAE is in {path / 'sae'}")
        return SAE.from_pretrained(path / "sae")
    sae = SAE(rows.d, request.features, TopK(request.k))
    batch = min(BATCH, len(rows))
    steps = stages.decide(
        "steps", lambda: request.steps or _affordable_steps(stages, sae, rows, batch)
    )
    stages.say(
        f"train: TopK SAE, d={rows.d}, f={request.features:,}, k={request.k}, {steps:,} steps of "
        f"{batch:,} tokens ({steps * batch / len(rows):.0f} passes over {len(rows):,} tokens); "
        f"{len(held_out):,} are held out"
    )
    config = TrainConfig(
        steps=steps,
        batch_size=batch,
        lr=8e-4,
        warmup_steps=min(50, steps),
        decay_fraction=0.3,
        dead_after_tokens=100 * batch,
        eval_every=max(1, steps // 10),
        checkpoint_every=max(1, steps // 4),
    )
    result = train(sae, rows, config, held_out=held_out, out=path)
    stages.decide("trained", lambda: steps)
    return result.sae


def _affordable_steps(stages: _Stages, sae: SAE, rows: Any, batch: int) -> int:
    """Steps that fit the time, by the speed of a few steps of a throw-away SAE."""
    trial = SAE(sae.d_model, sae.n_features, sae.activation)
    steps = 6
    config = TrainConfig(
        steps=steps, batch_size=batch, warmup_steps=0, log_every=1, b_dec_init="mean"
    )
    result = train(trial, rows, config, progress=False)
    speed = max(line["tokens_per_second"] for line in result.history) / batch
    stages.say(f"one training step takes {1000 / speed:.0f} ms here")
    share = min(0.45, max(0.1, TRAINED_BY - stages.spent()))
    return max(100, min(MOST_STEPS, int(speed * stages.seconds(share))))


def _evaluate(stages: _Stages, sae: SAE, held_out: Any, loaded: LoadedModel) -> dict[str, Any]:
    # A clean, a spliced and a zeroed forward, through a model about three times as deep.
    affordable = stages.state["tokens_per_second"] * stages.seconds(SPLICE_SHARE) / 10
    contexts = max(2, min(MOST_CONTEXTS, int(affordable / CONTEXT_LENGTH)))
    what = f", and the model's loss on {contexts} contexts with the reconstruction spliced in"
    stages.say(f"evaluate: held-out tokens{what if loaded.causal_lm else ''}")
    return measure(sae, held_out, loaded, loaded.site_default, contexts)
