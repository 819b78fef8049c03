"""Words and tokens as players: what is rebuilt, what is masked, what models get."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from microtome.errors import ArgumentError
from microtome.shapley import SetGame, explain_text, permutation, text_game
from microtome.shapley.coalitions import of_members
from microtome.shapley.pieces import Rebuild, encode, token_pieces, words

TEXT = "Not good, [bad] don't!"


def every(p):
    """[2^p, p] bool."""
    return torch.tensor(list(itertools.product([False, True], repeat=p)))


def exact(game):
    """[p, o]: Shapley values from all coalitions, by the definition."""
    p = len(game.players)
    inside = every(p)
    value = game.values(*of_members(inside, 0), torch.zeros(1, dtype=torch.int64))[0]
    empty, full = game.ends()
    value[0], value[-1] = empty[0, 0], full[0]
    place = 2 ** torch.arange(p - 1, -1, -1)
    phi = torch.zeros(p, value.shape[1], dtype=torch.float64)
    for k, row in enumerate(inside):
        size = int(row.sum())
        for j in torch.nonzero(~row).flatten().tolist():
            weight = math.factorial(size) * math.factorial(p - size - 1) / math.factorial(p)
            phi[j] += weight * (value[k + place[j]] - value[k])
    return phi


@pytest.fixture(scope="module")
def tokenizer():
    """Words in lower case and punctuation, between [CLS] and [SEP]."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "not", "good", ",", "bad", "[", "]"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {w: i for i, w in enumerate([*words, "don", "'", "t", "!", "ba", "##d"])},
            unk_token="[UNK]",
        )
    )
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


@pytest.fixture(scope="module")
def fast(tokenizer):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", pad_token="[PAD]",
    )  # fmt: skip


class Bag(nn.Module):
    """Products of neighbouring tokens' scores, so that tokens interact and places matter."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.score = nn.Embedding(32, 2)
        self.score.weight.data = torch.randn(32, 2, generator=generator)

    def forward(self, input_ids, attention_mask=None):
        scores = self.score(input_ids)
        if attention_mask is not None:
            scores = scores * attention_mask[..., None]
        return (scores[:, 1:] * scores[:, :-1]).sum(1)


@given(st.text(max_size=40), st.sampled_from(["", "...", "[MASK]"]))
@settings(max_examples=150, deadline=None)
def test_all_words_in_give_the_text_back_exactly(text, mask):
    try:
        spans = words("op", text, None)
    except ArgumentError:
        assert not re.search(r"\w", text)
        return
    rebuild = Rebuild(text, spans, mask)
    assert rebuild(torch.ones(1, len(spans), dtype=torch.bool)) == [text]


def test_absent_words_are_masked_or_dropped_with_the_space_before_them():
    spans = words("op", TEXT, None)
    assert [TEXT[s:e] for s, e in spans] == ["Not", "good", "bad", "don't"]
    inside = torch.tensor([[True, False, True, False], [False] * 4])
    assert Rebuild(TEXT, spans, "___")(inside) == ["Not ___, [bad] ___!", "___ ___, [___] ___!"]
    assert Rebuild(TEXT, spans, "")(inside) == ["Not, [bad]!", ", []!"]


def test_separators_say_where_words_end():
    names = text_game(lambda t: [len(a) for a in t], TEXT, separators=r"\s+").players.names
    assert names == ("Not", "good,", "[bad]", "don't!")


def test_a_function_of_texts_is_explained_as_enumeration_does():
    def f(texts):
        return [len(t) + 5 * ("not" in t.lower() and "good" in t) for t in texts]

    game = text_game(f, TEXT, mask="_", batch=3)
    pieces = ["Not", "good", "bad", "don't"]

    def value(inside):
        w = [[x if i else "_" for x, i in zip(pieces, row, strict=True)] for row in inside.tolist()]
        return f([f"{a} {b}, [{c}] {d}!" for a, b, c, d in w])

    torch.testing.assert_close(exact(game), exact(SetGame(value, 4)))
    result = permutation(game, n_permutations=200)
    result.check_additivity()
    assert result.players.kind == "text"
    assert (result.values[0] - exact(game)[:, 0]).abs().max() < 5 * result.stderr.max() + 1e-9


def test_one_word_gets_all_of_it():
    result = permutation(text_game(lambda texts: [len(t) for t in texts], "good"))
    assert result.values.tolist() == [[4.0]]
    assert result.names == ("good",)


@pytest.mark.parametrize("hide", [False, True])
def test_a_model_of_token_ids_gets_masked_ids_and_the_attention_mask(tokenizer, hide):
    model = Bag()
    game = text_game(model, TEXT, tokenizer=tokenizer, unit="token", hide=hide, batch=5)
    ids = torch.tensor(tokenizer.encode(TEXT).ids)
    p = len(ids) - 2
    assert game.players.names == ("Not", "good", ",", "[", "bad", "]", "don", "'", "t", "!")

    def value(inside):
        there = torch.cat([torch.ones(len(inside), 1), inside, torch.ones(len(inside), 1)], 1)
        attention = there.long() if hide else torch.ones_like(there, dtype=torch.int64)
        return model(torch.where(there.bool(), ids, 4), attention)  # 4 is [MASK]

    torch.testing.assert_close(exact(game), exact(SetGame(value, p)))


def test_every_kind_of_tokenizer_gives_the_same_game(tokenizer, fast):
    def called(text):
        found = tokenizer.encode(text)
        return {"input_ids": found.ids, "offset_mapping": found.offsets}

    model = Bag()
    first = exact(text_game(model, TEXT, tokenizer=tokenizer))
    for other in (fast, called):
        torch.testing.assert_close(exact(text_game(model, TEXT, tokenizer=other, mask=4)), first)
    assert len(first) == 4  # words: their tokens play together, and punctuation not at all


def test_tokens_of_a_function_rebuild_the_text_whether_pieces_or_places():
    for found in (lambda t: re.findall(r"\S+\s*", t), lambda t: [(0, 3), (3, 9), (9, len(t))]):
        seen = []
        game = text_game(
            lambda texts, seen=seen: [seen.append(t) or len(t) for t in texts],
            TEXT, tokenizer=found, unit="token", mask="",
        )  # fmt: skip
        game.ends()
        assert TEXT in seen


def test_a_slow_tokenizer_is_located_in_the_text_where_it_can_be():
    transformers = pytest.importorskip("transformers")
    slow = transformers.ByT5Tokenizer()
    game = text_game(lambda t: [len(a) for a in t], "a b", tokenizer=slow, unit="token", mask="")
    assert game.players.view["spans"] == ((0, 1), (1, 2), (2, 3))
    with pytest.raises(ArgumentError, match="does not say where its tokens lie"):
        text_game(lambda t: [len(a) for a in t], "é b", tokenizer=slow, unit="token")
    ids = text_game(
        lambda rows: rows.double().sum(1), "é b", tokenizer=slow, unit="token", takes="ids", mask=0
    )
    assert len(ids.players) == 4  # two bytes, a space, a letter; not the end token
    assert exact(ids).flatten().tolist() == pytest.approx([198.0, 172.0, 35.0, 101.0])


def test_tokens_of_one_character_play_together_and_special_ones_never():
    encoded = encode("op", "a\u20acb", lambda t: [(0, 1), (1, 2), (1, 2), (2, 3), (3, 3)])
    pieces = token_pieces("op", "a\u20acb", encoded)
    assert pieces.spans == ((0, 1), (1, 2), (2, 3))
    assert pieces.player.tolist() == [0, 1, 1, 2, -1]


def test_a_special_token_spelled_out_in_the_text_is_no_player(fast):
    game = text_game(Bag(), "good [SEP] bad", tokenizer=fast, unit="token")
    assert game.players.names == ("good", "bad")


def test_a_text_classification_pipeline_is_called_with_all_its_labels(fast):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    pipe = transformers.TextClassificationPipeline(model=model, tokenizer=fast)
    game = text_game(pipe, "not good , bad")
    assert game.players.view["outputs"] == ("neg", "pos")
    ids = torch.tensor(fast("not good , bad")["input_ids"])[None]
    wanted = model(ids).logits.softmax(1).double()
    torch.testing.assert_close(game.ends()[1], wanted, atol=1e-6, rtol=0)
    phi = exact(game)
    torch.testing.assert_close(phi.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    # the model itself takes ids, returns logits in an output, and sees no difference
    by_ids = text_game(model, "not good , bad", tokenizer=fast)
    torch.testing.assert_close(by_ids.ends()[1].softmax(1), wanted, atol=1e-6, rtol=0)


def test_a_scikit_learn_pipeline_of_texts_names_its_outputs():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(text.CountVectorizer(), LogisticRegression())
    model.fit(["good film", "bad film", "good", "bad"], ["up", "down", "up", "down"])
    (result,) = explain_text(model, ["good bad film"], n_permutations=8)
    assert result.players.view["outputs"] == ("down", "up")
    assert result.values[0, 0, 1] > 0 > result.values[0, 1, 1]


def test_many_texts_are_many_games_and_the_message_says_which_is_empty():
    results = explain_text(lambda texts: [len(t) for t in texts], ["a bb", "one two three"])
    assert [r.values.shape[1] for r in results] == [2, 3]
    with pytest.raises(ArgumentError, match=r"text 1 of 2: text_game: the text is empty"):
        explain_text(lambda texts: [len(t) for t in texts], ["a", " \n"])


def count(texts):
    return [len(t) for t in texts]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text_game(count, ""), "the text is empty, so there are no players"),
        (lambda: text_game(count, "?!"), "'?!' has no word, so there are no players"),
        (lambda: text_game(count, ["a"]), "text must be one string, got list"),
        (lambda: text_game(count, "a", unit="line"), "unit must be one of 'word', 'token'"),
        (lambda: text_game(count, "a", unit="token"), "unit='token' needs a tokenizer"),
        (lambda: text_game(Bag(), "a"), "a model that takes token ids needs a tokenizer"),
        (lambda: text_game(count, "a", separators="("), "separators must be a regular expression"),
        (lambda: text_game(count, "a", mask=3), "mask must be a string where f takes texts"),
        (lambda: text_game(count, "a", batch=0), "batch must be at least 1, got batch=0"),
        (lambda: text_game(count, "a", hide=True), "hide=True needs an f that takes token ids"),
        (
            lambda: text_game(count, "a b", tokenizer=lambda t: ["b", "a"], unit="token"),
            "do not lie one after another in 'a b'",
        ),
        (
            lambda: text_game(count, "a b", tokenizer=lambda t: [(0, 9)], unit="token"),
            "places outside of 'a b'",
        ),
        (
            lambda: text_game(Bag(), "a b", tokenizer=lambda t: ["a", "b"]),
            "the tokenizer returned none. Return a mapping with input_ids",
        ),
    ],
)
def test_bad_input_is_answered_in_words(call, message):
    with pytest.raises(ArgumentError) as caught:
        call()
    assert message in str(caught.value)


def test_a_mask_of_several_tokens_and_a_text_too_long_are_refused(tokenizer, fast):
    with pytest.raises(ArgumentError, match=r"mask='not good' must be one token, but makes 2"):
        text_game(Bag(), TEXT, tokenizer=tokenizer, mask="not good")
    fast.model_max_length = 4
    with pytest.raises(ArgumentError, match="12 tokens, the model takes at most 4"):
        text_game(Bag(), TEXT, tokenizer=fast)
    fast.model_max_length = 512


def test_a_function_that_is_not_deterministic_is_found_out():
    counter = itertools.count()
    with pytest.raises(ArgumentError, match="different answers to the same rows"):
        permutation(text_game(lambda texts: [next(counter) for _ in texts], "a b"))
