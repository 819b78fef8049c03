"""The survey, the choice of features and their contexts, against counts made by hand or densely."""

import torch

from microtome._seed import generator
from microtome.report.features import About, choose, describe, token_texts
from microtome.report.survey import survey
from microtome.sae import SAE, TopK

LENGTH = 8


class Store:
    """Rows in memory with the reading calls of an ActivationStore."""

    def __init__(self, x, tokens, length=LENGTH):
        self.x, self.t, self.manifest = x, tokens, {"context_length": length}

    def __len__(self):
        return len(self.x)

    def rows(self, index):
        return self.x[index]

    def tokens(self, index):
        return self.t[index]


class Code:
    """A code with one entry a row, as CSR where offsets are given."""

    def __init__(self, values, indices, offsets=None):
        self.values, self.indices, self.offsets = values, indices, offsets


class OneHot:
    """Feature i fires with x[:, i], all features at once."""

    n_features = 3

    def encode(self, x):
        return Code(x, torch.arange(3, dtype=torch.int32).expand(len(x), 3))


def by_hand():
    x = torch.zeros(24, 3)
    x[0, 0] = 9.0  # first position of a context: left out
    x[1, 0], x[2, 0], x[12, 0] = 2.0, 5.0, 3.0
    x[20, 1] = 1.0
    tokens = torch.zeros(24, dtype=torch.int64)
    tokens[1], tokens[2], tokens[12], tokens[20] = 7, 8, 7, 9
    return Store(x, tokens)


def test_the_survey_agrees_with_counts_by_hand():
    found = survey(OneHot(), by_hand(), peaks=4)
    assert found.n_rows == 21
    assert found.firings.tolist() == [3, 1, 0]
    assert found.maximum.tolist() == [5.0, 1.0, 0.0]
    assert found.total.tolist() == [10.0, 1.0, 0.0]
    assert found.contexts_fired.tolist() == [2, 1, 0]
    # One peak a context: row 1 lies in the context of row 2 and is lower.
    assert found.peak_rows.tolist() == [[2, 12, -1, -1], [20, -1, -1, -1], [-1, -1, -1, -1]]
    assert found.top_tokens(0) == [(7, 0.5), (8, 0.5)]
    torch.testing.assert_close(found.token_types[:2], torch.tensor([2.0, 1.0]))


def test_the_survey_does_not_depend_on_the_batch_size():
    g = generator(0, "survey")
    sae = SAE(6, 40, TopK(3))
    store = Store(torch.randn(96, 6, generator=g), torch.randint(0, 11, (96,), generator=g))
    one, many = survey(sae, store, batch_rows=1000), survey(sae, store, batch_rows=LENGTH)
    for name in ("firings", "maximum", "contexts_fired", "peak_rows", "token_types"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name))


def test_the_survey_agrees_with_the_dense_code():
    g = generator(1, "survey")
    sae = SAE(6, 40, TopK(3))
    store = Store(torch.randn(96, 6, generator=g), torch.randint(0, 11, (96,), generator=g))
    found = survey(sae, store)
    dense = sae.encode(store.x).to_dense().detach()
    dense[::LENGTH] = 0
    assert torch.equal(found.firings, (dense > 0).sum(0))
    torch.testing.assert_close(found.maximum, dense.max(0).values)
    for feature in range(40):
        top = dense[:, feature].view(-1, LENGTH).max(1).values.sort(descending=True).values
        rows = found.peak_rows[feature]
        torch.testing.assert_close(dense[rows[rows >= 0], feature], top[top > 0][: len(rows)])


def test_a_ragged_code_is_surveyed_like_a_uniform_one():
    class Ragged(OneHot):
        def encode(self, x):
            row, feature = (x > 0).nonzero(as_tuple=True)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (x > 0).sum(1).cumsum(0)])
            return Code(x[row, feature], feature.int(), offsets)

    uniform, ragged = survey(OneHot(), by_hand()), survey(Ragged(), by_hand())
    assert torch.equal(uniform.firings, ragged.firings)
    assert torch.equal(uniform.peak_rows, ragged.peak_rows)


def test_a_context_holds_the_text_round_the_peak_and_stays_within_its_context():
    store = by_hand()
    found = survey(OneHot(), store)
    choice = choose(found, 2)
    assert sorted(choice.words + choice.subjects) == [0, 1]
    features = {f.index: f for f in describe(OneHot(), store, found, choice, before=4, after=9)}
    first = features[0].contexts[0]
    assert first.row == 2
    assert first.peak == 2  # rows 0 to 7: the context begins at row 0 and ends at row 7
    assert first.tokens == (0, 7, 8, 0, 0, 0, 0, 0)
    assert first.activations == (9.0, 2.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_dense_features_are_not_chosen():
    g = generator(2, "choose")
    x = torch.zeros(800, 3)
    x[:, 0] = 5.0
    x[torch.randperm(800, generator=g)[:40] // 8 * 8 + 3, 1] = 1.0
    tokens = torch.full((800,), 4)
    found = survey(OneHot(), Store(x, tokens))
    choice = choose(found, 2, max_density=0.1)
    assert choice.words + choice.subjects == [1]
    assert "10% of the tokens" in choice.rule


def test_an_empty_code_gives_no_features():
    found = survey(OneHot(), Store(torch.zeros(16, 3), torch.zeros(16, dtype=torch.int64)))
    choice = choose(found)
    assert choice.words == choice.subjects == []


def test_word_pieces_join_and_words_keep_their_space():
    class Pieces:
        words = ("king", "##dom", ".")

        def convert_ids_to_tokens(self, ids):
            return [self.words[i] for i in ids]

        def decode(self, ids):
            return self.words[ids[0]]

    assert token_texts(Pieces(), [0, 1, 2]) == {0: " king", 1: "dom", 2: " ."}


def test_about_survives_the_disk(tmp_path):
    about = About("a text", {3: "<b>", 4: "\n"}, ("a note",))
    about.write(tmp_path)
    assert About.read(tmp_path) == about
    assert about.token(3) == "<b>"
    assert about.token(5) == " #5"
    assert About.read(tmp_path / "nowhere") == About()
