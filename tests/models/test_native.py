"""Models in parts: waves of any writes against the naive sweep, and when parts are not trusted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from microtome.models import ToyModel, splice
from microtome.models.native.base import BaseRun
from microtome.models.native.plan import STAGES, Plan, Writes
from microtome.models.native.runner import Runner, runner_of
from microtome.models.native.weights import weights_key
from microtome.ops import ADD, REPLACE, SCALE, ZERO
from microtome.patching import logit_difference, sweep
from microtome.patching.naive import Write, naive_sweep
from microtome.testing import families
from microtome.testing.patching import apart, changed, everything, naive_twin

pytest.importorskip("transformers", reason="transformers is not installed")

B, T, LAYERS = 2, 5, 3
BASE = families.tokens(B, T)
SOURCE = families.tokens(5, T)[3:]
NONE = torch.zeros(B, dtype=torch.int32)
OPS = {"replace": REPLACE, "add": ADD, "zero": ZERO, "scale": SCALE}


pytestmark = pytest.mark.usefixtures("one_thread")


def runner(model: nn.Module, tokens: Tensor = BASE, first: Tensor = NONE) -> Runner:
    found = runner_of(model, tokens, first)
    assert isinstance(found, Runner), found
    return found


# Any writes


def random_cells(sites: list[str], n: int, generator: torch.Generator) -> list[list[Write]]:
    """n cells of one to four writes, at any sites, positions and heads."""
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    cells = []
    for _ in range(n):
        cell = []
        for _ in range(1 + draw(4)):
            site, op = sites[draw(len(sites))], list(OPS)[draw(4)]
            heads = {"q": 4, "z": 4, "pattern": 4, "k": 2, "v": 2}.get(site)
            factor = {"factor": 0.25 * (draw(8) - 3)} if op in ("add", "scale") else {}
            head = None if heads is None else draw(heads)
            cell.append(Write(f"{site}.{draw(LAYERS)}", draw(T), head, op=op, **factor))
        cells.append(cell)
    return cells


def as_plan(cells: list[list[Write]], base: BaseRun) -> Plan:
    """Each cell once for each prompt; sources are the other prompts of the same run."""
    rows = []
    for c, cell in enumerate(cells):
        for write in cell:
            site, layer = write.site.split(".")
            at = int(layer), site
            lo, hi = 0, base.site(*at).shape[1]
            if write.heads is not None:
                unit = T if site == "pattern" else base.site(0, "q").shape[1] // 4
                lo, hi = write.heads * unit, (write.heads + 1) * unit
            place = int(layer), STAGES.index(site), write.positions, lo, hi, OPS[write.op]
            rows += [
                (c * B + prompt, *place, (B + prompt) * T + write.positions, write.factor)
                for prompt in range(B)
            ]
    *whole, factor = zip(*rows, strict=True)
    writes = Writes(*map(torch.tensor, whole), torch.tensor(factor, dtype=torch.float64))
    places = {(row[1], STAGES[row[2]]) for row in rows}
    example = torch.arange(len(cells) * B) % B
    return Plan(example, writes, {place: base.site(*place) for place in places})


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("read", ["last", "all"])
def test_rows_with_several_writes_at_any_stages_are_the_patched_forward(name, read):
    model = families.in_float64(name, **({"sliding_window": 3} if name == "gemma2" else {}))
    found = runner(model)
    sites = [s for s in STAGES[:-1] if s != "resid_mid" or name != "gpt_neox"]
    cells = random_cells(sites, 40, torch.Generator().manual_seed(1))
    first = torch.zeros(2 * B, dtype=torch.int32)
    base = found.base(model, torch.cat((BASE, SOURCE)), first)
    plan = as_plan(cells, base)
    readout = torch.zeros(2 * B, T, dtype=torch.bool)
    readout[:B, T - 1 if read == "last" else slice(None)] = True
    last = slice(T - 1, T) if read == "last" else slice(None)
    logits: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        logits.append(x[:, last])
        return x[:, -1, 0]

    naive_sweep(model, BASE, SOURCE, keep, cells)
    own = found.stack.logits(base.final).unflatten(0, (2 * B, T))[:B, last]
    mine = own.repeat(len(cells), 1, 1)
    for trimmed in (plan, plan.without_unchanged(base.site, T)):
        for rows, final in found.waves(base, trimmed, readout, delta=False, memory=1 << 16):
            slot = final.position - (T - 1 if read == "last" else 0)
            mine[rows[final.row], slot] = found.stack.logits(final.stream).detach()
        wanted = torch.cat(logits)
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()))


# When parts are trusted


def edit(model: nn.Module) -> Tensor:
    return model.transformer.h[1].attn.c_attn.weight


def through_data(model: nn.Module) -> None:
    edit(model).data[:, :6] *= 2  # no version counter sees this


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        edit(model).mul_(1.5)


def one_number(model: nn.Module) -> None:
    edit(model).data[3, 4] += 1


def swapped(model: nn.Module) -> None:
    edit(model).data = edit(model).detach().flip(0).contiguous()


@pytest.mark.parametrize("change", [through_data, in_place, one_number, swapped])
def test_changed_weights_are_read_anew(change):
    model = families.build("gpt2")
    clean, metric = changed(BASE, (0, 1), (1, 2)), logit_difference(11, 12)
    before, key = runner(model), weights_key(model)
    assert runner(model) is before
    change(model)
    assert weights_key(model) != key
    assert runner(model) is not before
    found = sweep(model, clean, BASE, metric, "v", progress=False)
    assert found.engine == "native"
    twin = lambda x: x[:, -1, 11] - x[:, -1, 12]  # noqa: E731
    assert apart(found, naive_twin(model, found, BASE, clean, twin)) < 1e-4


def test_lengths_of_prompt_share_their_weights():
    model = families.build("llama")
    short, long = runner(model, BASE[:, :3]), runner(model)
    assert short is not long
    for one, other in zip(short.stack.blocks, long.stack.blocks, strict=True):
        assert one.qkv is other.qkv
        assert one.mlp is other.mlp
        assert (len(one.cos), len(other.cos)) == (3, T)


def test_padding_is_verified_apart():
    model, padded = families.build("llama"), torch.tensor([0, 2], dtype=torch.int32)
    assert runner(model) is not runner(model, BASE, padded)
    assert runner(model, BASE, padded) is runner(model, BASE, padded.flip(0))


def test_a_model_is_not_kept_alive():
    model = families.build("llama")
    found = sweep(model, BASE, SOURCE, everything, progress=False)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
    assert found.scores.shape == (LAYERS, T)


def reason(model: nn.Module) -> str:
    found = runner_of(model, BASE, NONE)
    assert isinstance(found, str)
    return found


def test_a_model_with_hooks_is_run_by_its_own_forward():
    model = families.build("gpt2")
    runner(model)
    with splice(model, "z.1", torch.zeros_like):
        assert reason(model) == (
            "GPT2LMHeadModel carries a forward hook, which parts would not call"
        )
        found = sweep(model, BASE, SOURCE, everything, engine="blocks", progress=False)
        assert apart(found, naive_twin(model, found, SOURCE, BASE, everything)) < 1e-5
    runner(model)
    model.transformer.h[2].forward = model.transformer.h[2].forward
    assert reason(model) == (
        "the forward of transformer.h.2 was replaced, which parts would not call"
    )


def twisted(twist: Callable[[nn.Module], None]) -> nn.Module:
    model = families.build("llama")
    twist(model)
    return model


def scaled_block(model: nn.Module) -> None:
    """The class of a block, with another forward."""
    block = model.model.layers[1]

    class Twisted(type(block)):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            return 1.1 * super().forward(*args, **kwargs)

    block.__class__ = Twisted


def other_scale(model: nn.Module) -> None:
    attention = model.model.layers[2].self_attn

    class Twisted(type(attention)):
        def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            return super().forward(hidden_states * 1.01, *args, **kwargs)

    attention.__class__ = Twisted


@pytest.mark.parametrize("twist", [scaled_block, other_scale])
def test_a_twist_in_a_forward_is_caught_and_the_user_is_told(twist):
    model, clean = twisted(twist), changed(BASE, (0, 1), (1, 2))
    with pytest.warns(UserWarning, match="its parts give other logits than the model") as told:
        found = sweep(model, clean, BASE, everything, "mlp_out", progress=False)
    assert str(told[0].message).startswith("sweep: mlp_out patches run block by block, since its ")
    assert found.engine == "blocks"
    assert "(off by " in found.note
    assert apart(found, naive_twin(model, found, BASE, clean, everything)) < 1e-5


def test_parts_that_are_elsewhere_or_in_another_precision_are_not_guessed():
    model = families.build("llama")
    del model.model.layers[1].self_attn.k_proj
    model.model.layers[1].self_attn.forward = None
    assert "was replaced" in reason(model)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = families.build("gpt2").config
            self.weight = nn.Parameter(torch.zeros(1))

    assert reason(Other()) == (
        "its parts were not found where gpt2 keeps them (Other has no attribute `transformer`)"
    )
    assert reason(families.build("llama").bfloat16()) == (
        "its weights are bfloat16, and parts are run in float32 or float64 (model.float() converts "
        "it)"
    )
    mixed = families.build("llama")
    mixed.lm_head.double()
    assert reason(mixed).startswith("its weights are float32, float64, and parts")
    assert reason(families.build("bert")) == (
        "BertForMaskedLM is not one of the architectures that are read into parts"
    )


def test_a_looped_block_is_not_read_into_parts():
    model = ToyModel()

    class Twice(type(model)):
        def forward(self, input_ids: Tensor) -> object:
            self.h[0](torch.zeros(1, 2, 64))
            return super().forward(input_ids)

    model.__class__ = Twice
    assert reason(model).startswith("its parts were not found where microtome_toy keeps them")


def test_what_the_models_own_forward_raises_is_no_reason_to_fall_back():
    model = ToyModel()

    class Broken(type(model)):
        def forward(self, input_ids: Tensor) -> object:
            message = "out of order"
            raise RuntimeError(message)

    model.__class__ = Broken
    with pytest.raises(RuntimeError, match="out of order"):
        runner_of(model, BASE, NONE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
