"""What the command line and the demo share: open a model, capture a text, measure, tabulate."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import _check
from microtome.errors import ArgumentError, PackageError
from microtome.models import ActivationStore, Corpus, LoadedModel, capture_to_store, load, sites
from microtome.report import About
from microtome.report.write import metrics
from microtome.sae import SAE, evaluate
from microtome.sae.files import read_json

PACKAGED = ("auto", "smollm2", "minilm", "toy")


def open_model(name: str) -> LoadedModel:
    """A packaged model by its name, or a Hugging Face causal language model from a folder.

    Args:
        name: "smollm2", "minilm", "toy", "auto", or a folder as `save_pretrained` writes it.

    Raises:
        ArgumentError: neither a name nor a folder, or a folder that transformers cannot load.
        PackageError: a package that it needs is not installed.
    """
    if name in PACKAGED:
        return load(name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        msg = (
            f"model: {name!r} is neither {', '.join(PACKAGED)} nor a folder with a config.json. "
            "Nothing is downloaded: save the model with save_pretrained first."
        )
        raise ArgumentError(msg)
    if util.find_spec("transformers") is None:
        msg = f"model: {name!r} needs transformers. Run: pip install transformers"
        raise PackageError(msg)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, SafetensorError) as error:
        msg = (
            f"model: {name!r} cannot be loaded as a causal language model with its tokenizer "
            f"({type(error).__name__}: {error}). Save both there with save_pretrained."
        )
        raise ArgumentError(msg) from error
    streams = [site for site in sites(model) if site.startswith("resid_pre.")]
    middle = streams[len(streams) // 2] if streams else ""
    return LoadedModel(model, tokenizer, name, folder.name, middle, causal_lm=True)


def stand_ins(loaded: LoadedModel, text: Corpus) -> list[str]:
    """What a reader must know about a model and a text, those that stand in for others above all.

    Args:
        loaded: the model.
        text: what it reads.

    Returns:
        Sentences: what "auto" would have preferred and why it is not there, what there is instead,
        and what the model cannot do.
    """
    notes = [reason.removeprefix("load: ") for reason in loaded.skipped]
    if notes:
        notes.append(f"So the model is {loaded.description} instead.")
    if loaded.name == "toy":
        notes.append(
            "The toy model's weights are random: its features show that all works, no more."
        )
    if not loaded.causal_lm:
        notes.append("This model predicts no next token, so there is no cross-entropy to recover.")
    if text.skipped:
        notes += [reason.removeprefix("corpus: ") for reason in text.skipped]
        notes.append(f"So the text is {text.description} instead.")
    return notes


def capture_text(
    loaded: LoadedModel,
    text: Corpus,
    tokens: Tensor,
    site: str,
    out: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 8,
    notes: Sequence[str] = (),
) -> ActivationStore:
    """Capture tokens [b, t] of a text to a store, and put beside it what its tokens say.

    Args:
        loaded: the model.
        text: where the tokens come from.
        tokens: [b, t] int64.
        site: where in the model.
        out: folder of the store.
        dtype: "float32" or "bfloat16".
        batch_size: contexts in one forward.
        notes: what a reader of the report must know.

    Returns:
        The open store.
    """
    store = capture_to_store(
        loaded.model,
        tokens,
        site,
        out,
        model_name=loaded.description,
        dtype=getattr(torch, dtype),
        batch_size=batch_size,
    )
    About.of(store, loaded.tokenizer, text.description, notes).write(out)
    return store


def rows_seen(run: Path, start: int) -> int:
    """How many of a store's rows from `start` on a run was trained on, if it is that run's store.

    Args:
        run: a run directory.
        start: the first row that is measured; training takes a store's rows from its beginning.
    """
    path = run / "config.json"
    config = read_json(path) if path.exists() else {}
    data = config.get("data") if isinstance(config, dict) else None
    rows = data.get("rows") if isinstance(data, dict) else None
    return max(0, rows - start) if isinstance(rows, int) else 0


def doubts(
    run: Path | None, store: ActivationStore, start: int, loaded: LoadedModel | None
) -> list[str]:
    """What a reader of an evaluation must know: another model, no cross-entropy, rows seen before.

    Args:
        run: the run directory, or None for an SAE alone.
        store: what is measured on, from row `start`.
        start: see above.
        loaded: the model, or None.
    """
    notes = []
    if loaded is not None and loaded.description != store.manifest["model"]:
        notes.append(
            f"the store says that it came from {store.manifest['model']}, the model is "
            f"{loaded.description}: the cross-entropies mean something only if these are the same."
        )
    if loaded is not None and not loaded.causal_lm:
        notes.append(f"{loaded.description} predicts no next token, so there is no cross-entropy")
    seen = rows_seen(run, start) if run is not None else 0
    if seen:
        notes.append(
            f"if this is the store of the run, it was trained on {seen:,} of the rows that are "
            "measured here; give the --held-out of `microtome train`, or less."
        )
    return notes


def measure(
    sae: SAE, held_out: Any, loaded: LoadedModel | None, site: str, contexts: int
) -> dict[str, Any]:
    """Evaluate an SAE on a view of a store; inside its model too, if it is a causal language model.

    Args:
        sae: the autoencoder.
        held_out: a view of the store that training did not see.
        loaded: the model the store came from, or None.
        site: where the reconstruction goes.
        contexts: the first so many contexts of the view carry the cross-entropy.

    Returns:
        Evaluation.to_dict(), and ce_tokens: how many tokens the cross-entropies are averaged over.
    """
    if loaded is None or not loaded.causal_lm:
        return evaluate(sae, held_out, progress=True).to_dict()
    _check.between("measure", "contexts", contexts, 1, 1 << 31)
    length = int(held_out.manifest["context_length"])
    count = min(contexts, len(held_out) // length)
    tokens = held_out.tokens(slice(0, count * length)).view(count, length)
    found = evaluate(
        sae, held_out, model=loaded.model, site=site, tokens=tokens, progress=True
    ).to_dict()
    return {**found, "ce_tokens": count * (length - 1)}


def table(numbers: dict[str, Any]) -> str:
    """The metrics as lines of text, each with what it says."""
    lines = []
    for metric in metrics(numbers):
        says = metric.says.split(". ")[0].split(": ")[0]
        lines.append(f"  {metric.name:<14}{metric.value:>9}   {says.rstrip('.')}")
    return "\n".join(lines)
