"""The naive sweep against numbers worked by hand, on a linear model and on the toy model."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, ShapeError, SiteError
from microtome.models import ToyModel, capture, sites, splice
from microtome.patching import naive
from microtome.patching.naive import Write, naive_sweep, run_patched
from microtome.testing import families

BASE = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SOURCE = torch.tensor([[2, 7, 1, 8, 2], [8, 1, 8, 2, 8]])
B, T, H = 2, 5, 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy() -> ToyModel:
    return ToyModel().double()  # so that what is equal in exact arithmetic is close


class Table(nn.Module):
    """Token i embeds as (10 i, 10 i + 1), and the logits are the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 2)
        with torch.no_grad():
            self.embed.weight[:, 0] = 10 * torch.arange(10)
            self.embed.weight[:, 1] = 10 * torch.arange(10) + 1

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


def everything(logits: Tensor) -> Tensor:
    """A metric that sees every logit."""
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=torch.float64).view(logits[0].shape)
    return (logits.double() * weights).sum((1, 2))


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (Write("embed"), [[[40, 41], [50, 51]], [[60, 61], [70, 71]]]),
        (Write("embed", positions=1), [[[0, 1], [50, 51]], [[20, 21], [70, 71]]]),
        (Write("embed", positions=-2), [[[40, 41], [10, 11]], [[60, 61], [30, 31]]]),
        (Write("embed", units=1), [[[0, 41], [10, 51]], [[20, 61], [30, 71]]]),
        (
            Write("embed", units=slice(0, 1), value=7.0),
            [[[7, 1], [7, 11]], [[7, 21], [7, 31]]],
        ),
        (
            Write("embed", positions=0, units=(1, 0), value=torch.tensor([8.0, 9.0])),
            [[[9, 8], [10, 11]], [[9, 8], [30, 31]]],
        ),
        (
            Write("embed", units=0, value=torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
            [[[1, 1], [2, 11]], [[3, 21], [4, 31]]],
        ),
        (Write("embed", positions=1, op="zero"), [[[0, 1], [0, 0]], [[20, 21], [0, 0]]]),
        (
            Write("embed", positions=1, op="scale", factor=-2.0),
            [[[0, 1], [-20, -22]], [[20, 21], [-60, -62]]],
        ),
        (Write("embed", units=0, op="add"), [[[40, 1], [60, 11]], [[80, 21], [100, 31]]]),
        (
            Write("embed", op="add", value=torch.tensor([1.0, 2.0]), factor=0.5),
            [[[0.5, 2], [10.5, 12]], [[20.5, 22], [30.5, 32]]],
        ),
        # The source's rows average to (50, 51) at position 0 and (60, 61) at position 1.
        (Write("embed", op="mean"), [[[50, 51], [60, 61]], [[50, 51], [60, 61]]]),
        (
            Write("embed", positions=0, units=1, op="mean"),
            [[[0, 51], [10, 11]], [[20, 51], [30, 31]]],
        ),
    ],
)
def test_each_write_by_hand(write: Write, wanted: list[list[list[float]]]):
    base, source = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 5], [6, 7]])
    seen: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits[:, 0, 0]

    naive_sweep(Table(), base, source, metric, [[write]])
    assert seen[0].tolist() == wanted


def test_the_result_has_a_row_for_each_cell_and_a_column_for_each_prompt():
    base, source = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 5], [6, 7]])
    cells = [[], [Write("embed", 0)], [Write("embed", 1)], [Write("embed", 0), Write("embed", 1)]]
    scores = naive_sweep(Table(), base, source, lambda logits: logits[..., 0].sum(1), cells)
    assert scores.tolist() == [[10, 50], [50, 90], [50, 90], [90, 130]]
    assert naive_sweep(Table(), base, None, everything, []).shape == (0, 2)


def test_writes_at_one_site_apply_in_their_order():
    base, last = torch.tensor([[0, 1], [2, 3]]), lambda logits: logits[:, 1, 0]
    double = Write("embed", op="scale", factor=2.0)
    one_more = Write("embed", op="add", value=1.0)
    scores = naive_sweep(Table(), base, None, last, [[double, one_more], [one_more, double]])
    assert scores.tolist() == [[21, 61], [22, 62]]


def test_patching_the_whole_first_stream_gives_the_source_run_exactly(toy):
    with torch.no_grad():
        wanted = toy(SOURCE).logits
    assert torch.equal(
        naive_sweep(toy, BASE, SOURCE, everything, [[Write("resid_pre.0")]])[0], everything(wanted)
    )
    cells = [[Write("resid_pre.0", p) for p in range(T)]]
    assert torch.equal(naive_sweep(toy, BASE, SOURCE, everything, cells)[0], everything(wanted))


def test_patching_a_run_into_itself_changes_no_bit(toy):
    cells = [[Write(site)] for site in sites(toy) if not site.startswith("pattern")]
    cells += [[Write("z.1", 2, 3), Write("resid_mid.1", 1, units=slice(3, 9)), Write("k.2", 4, 0)]]
    scores = naive_sweep(toy, BASE, BASE, everything, [[], *cells])
    assert torch.equal(scores, scores[:1].expand_as(scores))
    # Watching a pattern changes rounding; from there on nothing does.
    with splice(toy, "pattern.2", torch.clone):
        clean = run_patched(toy, BASE, [])
    cells = [[Write("pattern.2")], [Write("pattern.2", 3, 1, (0, 2))]]
    scores = naive_sweep(toy, BASE, BASE, everything, cells)
    assert torch.equal(scores, everything(clean).expand_as(scores))


def test_a_cell_below_the_first_difference_changes_nothing_and_one_above_it_does(toy):
    source = BASE.clone()
    source[:, 2] += 1
    cells = [[Write("resid_pre.1", p)] for p in range(T)]
    scores = naive_sweep(toy, BASE, source, everything, [[], *cells])
    assert torch.equal(scores[1:3], scores[:1].expand(2, B))
    assert (scores[3:] != scores[:1]).all()


def test_zeroing_attention_or_mlp_is_removing_it(toy):
    block = toy.h[3]
    x = capture(toy, "resid_pre.3", BASE)["resid_pre.3"]

    def head(stream: Tensor) -> Tensor:
        return everything(toy.lm_head(toy.ln_f(stream)))

    with torch.no_grad():
        mid = x + block.attn(block.ln_1(x))
        wanted = [head(x + block.mlp(block.ln_2(x))), head(mid), head(x)]
    cells = [
        [Write("attn_out.3", op="zero")],
        [Write("mlp_out.3", op="zero")],
        [Write("attn_out.3", op="zero"), Write("mlp_out.3", op="zero")],
    ]
    scores = naive_sweep(toy, BASE, None, everything, cells)
    torch.testing.assert_close(scores, torch.stack(wanted))


def test_zeroing_a_head_subtracts_its_rows_of_the_output_projection(toy):
    z = capture(toy, "z.2", BASE)["z.2"]
    rows = toy.h[2].attn.c_proj.weight[:, 16:32]  # head 1 of width 16
    lost = -(z[:, :, 1] @ rows.T).detach()
    cells = [[Write("z.2", heads=1, op="zero")], [Write("attn_out.2", op="add", value=lost)]]
    by_head, by_output = naive_sweep(toy, BASE, None, everything, cells)
    torch.testing.assert_close(by_head, by_output)
    assert (by_head != naive_sweep(toy, BASE, None, everything, [[]])[0]).all()


def test_a_pattern_entry_moves_one_value_into_one_destination(toy):
    acts = capture(toy, ["pattern.1", "v.1"], BASE)
    destination, head, at = 3, 2, 1
    # z[3] of head 2 gains (0.9 - pattern[3, 1]) v[1].
    gain = (0.9 - acts["pattern.1"][:, head, destination, at])[:, None] * acts["v.1"][:, at, head]
    cells = [
        [Write("pattern.1", positions=destination, heads=head, units=at, value=0.9)],
        [Write("z.1", positions=destination, heads=head, op="add", value=gain)],
    ]
    by_pattern, by_z = naive_sweep(toy, BASE, None, everything, cells)
    torch.testing.assert_close(by_pattern, by_z)


def test_a_pattern_row_from_the_source_is_the_sources_attention_over_the_bases_values(toy):
    pattern = capture(toy, "pattern.0", SOURCE)["pattern.0"][:, 1, 4]  # [b, source]
    v = capture(toy, "v.0", BASE)["v.0"][:, :, 1]
    z = torch.einsum("bs,bsd->bd", pattern, v)
    cells = [[Write("pattern.0", 4, 1)], [Write("z.0", 4, 1, value=z)]]
    by_pattern, by_z = naive_sweep(toy, BASE, SOURCE, everything, cells)
    torch.testing.assert_close(by_pattern, by_z)


def test_writes_within_one_block_do_not_depend_on_their_order(toy):
    writes = [
        Write("resid_mid.1", 1, op="zero"),
        Write("mlp_out.1", 2, op="scale", factor=3.0),
        Write("resid_post.1", 3, op="zero"),
        Write("neurons.1", 4, units=slice(0, 100), op="zero"),
    ]
    cells = list(itertools.permutations(writes))
    scores = naive_sweep(toy, BASE, None, everything, cells)
    assert torch.equal(scores, scores[:1].expand_as(scores))
    alone = naive_sweep(toy, BASE, None, everything, [[write] for write in writes])
    assert not any(torch.equal(row, scores[0]) for row in alone)


def test_run_patched_applies_all_functions_and_lets_gradients_through(toy):
    scale = torch.ones((), requires_grad=True)
    logits = run_patched(
        toy, BASE, [("resid_pre.2", lambda x: x * scale), ("z.3", lambda x: x * scale)]
    )
    assert logits.shape == (B, T, 256)
    logits.square().mean().backward()
    assert scale.grad is not None
    with torch.no_grad():
        assert torch.equal(logits, toy(BASE).logits)


def test_the_model_is_afterwards_as_it_was():
    toy = ToyModel().train()
    toy.h[1].eval()
    with pytest.raises(ShapeError):
        naive_sweep(toy, BASE, SOURCE, lambda logits: logits, [[Write("pattern.0"), Write("z.1")]])
    assert toy.training
    assert not toy.h[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in toy.modules())
    assert "z.1" in sites(toy)


def test_masked_positions_of_the_source_do_not_reach_the_result():
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokens = families.build("bert").double(), families.tokens()
    mask = torch.ones_like(tokens)
    mask[:, 5:] = 0
    changed = tokens.clone()
    changed[:, 5:] = 1
    cells = [[Write("resid_pre.1", 2)], [Write("z.1", heads=1)], [Write("pattern.0", 1, 2)]]

    def visible(logits: Tensor) -> Tensor:
        return logits[:, :5].square().sum((1, 2))

    one, other = (
        naive_sweep(model, tokens.flip(0), source, visible, cells, attention_mask=mask)
        for source in (tokens, changed)
    )
    torch.testing.assert_close(one, other)


def test_grouped_query_models_count_key_value_heads_at_k_and_v():
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokens = families.build("llama").double(), families.tokens()
    zero_v = [[Write("v.1", heads=1, op="zero")]]
    zero_z = [[Write("z.1", heads=2, op="zero"), Write("z.1", heads=3, op="zero")]]
    by_v, by_z = naive_sweep(model, tokens, None, everything, zero_v + zero_z)
    torch.testing.assert_close(by_v, by_z)
    with pytest.raises(ArgumentError) as caught:
        naive_sweep(model, tokens, None, everything, [[Write("k.1", heads=2, op="zero")]])
    assert str(caught.value) == ("naive_sweep at k.1: heads must be between -2 and 1, got heads=2.")


def test_wrong_writes_are_refused(toy):
    def fails(error: type[Exception], *writes: Write, source: Tensor | None = SOURCE) -> str:
        with pytest.raises(error) as caught:
            naive_sweep(toy, BASE, source, everything, [writes])
        return str(caught.value)

    with pytest.raises(ArgumentError, match=r"op must be one of 'replace', .* got 'swap'"):
        Write("z.0", op="swap")
    with pytest.raises(ArgumentError) as caught:
        Write("z.0", op="zero", value=1.0)
    assert str(caught.value) == (
        "Write: op 'zero' takes no value, got value=1.0. Leave it out, or use 'replace' or 'add'."
    )
    with pytest.raises(ArgumentError, match="op 'replace' takes no factor, got factor=2"):
        Write("z.0", factor=2.0)
    assert fails(ArgumentError, Write("z.0", positions=5)) == (
        "naive_sweep at z.0: positions must be between -5 and 4, got positions=5."
    )
    assert "units must be between -16 and 15, got units=16" in fails(
        ArgumentError, Write("z.0", units=(0, 16))
    )
    assert fails(ArgumentError, Write("resid_pre.0", heads=1)) == (
        "naive_sweep at resid_pre.0: shape [2, 5, 64] has no heads, got heads=1. Choose units."
    )
    assert fails(ShapeError, Write("z.0", 1, value=torch.zeros(3))) == (
        "naive_sweep: the value for 'z.0' must broadcast to [2, 4, 16], got shape [3]."
    )
    assert fails(ArgumentError, Write("z.0"), source=None) == (
        "naive_sweep: the write at 'z.0' takes its value from the source run, got "
        "source_tokens=None. Pass source_tokens, or a value in each write."
    )
    assert fails(ShapeError, Write("z.0"), source=SOURCE[:, :4]) == (
        "naive_sweep: source_tokens must have the shape of base_tokens, [2, 5], got [2, 4]. Pad "
        "both to one length."
    )
    assert "naive_sweep: no site matches 'z.4'" in fails(SiteError, Write("z.4"))


def test_a_metric_that_keeps_no_number_for_each_row_is_refused(toy):
    with pytest.raises(ShapeError) as caught:
        naive_sweep(toy, BASE, None, lambda logits: logits.sum(), [[]])
    assert str(caught.value) == (
        "naive_sweep: metric must map logits [b, t, V] to [b] with b=2, got []. Return one number "
        "for each row."
    )
    with pytest.raises(ShapeError, match=r"with b=2, got float\."):
        naive_sweep(toy, BASE, None, lambda logits: float(logits.sum()), [[]])


def test_a_model_without_logits_is_refused():
    pytest.importorskip("transformers", reason="transformers is not installed")
    headless = families.build("gpt2").transformer
    with pytest.raises(ArgumentError, match=r"GPT2Model returns a .* without logits"):
        run_patched(headless, families.tokens(), [])


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(naive)
    assert results.attempted > 0
    assert results.failed == 0
