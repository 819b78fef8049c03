"""What a sweep is asked for, what it saves, and what it returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from microtome.models import ToyModel
from microtome.models.native import runner
from microtome.models.native.block import Stack
from microtome.models.native.linear import Linear
from microtome.models.native.plan import Plan
from microtome.models.native.wave import Wave
from microtome.patching import Metric, Sweep, execute, kl_divergence, logit_difference, sweep
from microtome.patching.hooked import HookEngine
from microtome.testing import families
from microtome.testing.patching import apart, changed, everything, last_difference, naive_twin

CORRUPTED = families.tokens(2, 5)
CLEAN = changed(CORRUPTED, (0, 1), (1, 3))
LAST = logit_difference(11, 12)


@pytest.fixture(scope="module")
def toy() -> ToyModel:
    return ToyModel().double()


def run(model: torch.nn.Module, metric: object = LAST, site: str = "resid_pre", **how) -> Sweep:
    return sweep(model, CLEAN, CORRUPTED, metric, site, progress=False, **how)


# What is asked


def test_denoising_writes_clean_into_corrupted_and_noising_corrupted_into_clean(toy):
    denoised, noised = run(toy, site="z"), run(toy, site="z", direction="noise")
    for found, base, source in ((denoised, CORRUPTED, CLEAN), (noised, CLEAN, CORRUPTED)):
        assert apart(found, naive_twin(toy, found, base, source, last_difference)) < 1e-9
    assert (denoised.base, noised.base) == ("corrupted", "clean")
    assert torch.equal(denoised.clean, noised.clean)
    assert torch.equal(denoised.unpatched, denoised.corrupted)
    assert torch.equal(noised.unpatched, noised.clean)


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_each_prompt_may_have_its_own_tokens_and_position(toy, engine):
    metric = logit_difference([7, 9], torch.tensor([8, 10]), position=torch.tensor([2, -1]))

    def twin(logits: Tensor) -> Tensor:
        return torch.stack(
            (logits[0, 2, 7] - logits[0, 2, 8], logits[1, -1, 9] - logits[1, -1, 10])
        )

    for site in ("resid_pre", "v", "resid_post"):
        found = run(toy, metric, site, engine=engine)
        assert apart(found, naive_twin(toy, found, CORRUPTED, CLEAN, twin)) < 1e-9


@pytest.mark.parametrize("engine", ["native", "blocks"])
def test_a_metric_of_ones_own_may_read_a_position_twice(toy, engine):
    metric = Metric(
        "own",
        lambda logits, _: logits[..., 0, 0] + 2 * logits[..., 1, 1] + 4 * logits[..., 2, 0],
        tokens=torch.tensor([[3, 4], [5, 6]]),
        positions=torch.tensor([[4, -1, 2]]),
    )

    def twin(logits: Tensor) -> Tensor:
        prompt, a, b = torch.arange(2), torch.tensor([3, 5]), torch.tensor([4, 6])
        return logits[prompt, 4, a] + 2 * logits[prompt, 4, b] + 4 * logits[prompt, 2, a]

    found = run(toy, metric, engine=engine)
    assert apart(found, naive_twin(toy, found, CORRUPTED, CLEAN, twin)) < 1e-9


def test_chosen_layers_positions_and_heads_are_cells_of_the_whole_grid(toy):
    whole = run(toy, site="z", axes=("position", "head"))
    assert whole.axes == ("layer", "position", "head")
    part = run(
        toy, site="z", axes=("layer", "position", "head"),
        layers=[3, 1], positions=[4], heads=torch.tensor([2, 0]),
    )  # fmt: skip
    assert part.values == ((3, 1), (4,), (2, 0))
    torch.testing.assert_close(part.by_prompt, whole.by_prompt[[3, 1]][:, [4]][:, :, [2, 0]])
    swapped = run(toy, site="z", axes=("head", "position"))
    assert swapped.axes == ("layer", "head", "position")
    torch.testing.assert_close(swapped.by_prompt.transpose(1, 2), whole.by_prompt)


def test_one_prompt_may_come_without_a_batch_axis(toy):
    alone = sweep(toy, CLEAN[0], CORRUPTED[0], LAST, progress=False)
    torch.testing.assert_close(alone.by_prompt[..., 0], run(toy).by_prompt[..., 0])


def test_the_model_may_be_in_training_mode_and_stays_in_it():
    model = families.build("gpt2").train()
    model.transformer.h[1].eval()
    training = [module.training for module in model.modules()]
    for engine in ("native", "blocks"):
        first, second = (run(model, engine=engine) for _ in range(2))
        assert torch.equal(first.scores, second.scores)  # no dropout
        assert [module.training for module in model.modules()] == training
    assert torch.is_grad_enabled()


def test_a_metric_with_parameters_leaves_no_graph(toy):
    probe = torch.randn(256, dtype=torch.float64, requires_grad=True)
    found = run(toy, lambda logits: logits[:, -1] @ probe)
    assert not found.by_prompt.requires_grad
    assert not found.clean.requires_grad


@pytest.mark.parametrize("engine", ["native", "blocks", "forwards"])
def test_a_metric_that_reads_the_end_of_another_run_is_given_that_run(toy, engine):
    for which, other in (("clean", CLEAN), ("corrupted", CORRUPTED)):
        found = run(toy, kl_divergence(which, position=-2), "mlp_out", engine=engine)
        with torch.no_grad():
            p = toy(other).logits[:, -2].log_softmax(-1)

        def twin(logits: Tensor, p: Tensor = p) -> Tensor:
            return (p.exp() * (p - logits[:, -2].log_softmax(-1))).sum(-1)

        wanted = naive_twin(toy, found, CORRUPTED, CLEAN, twin)
        torch.testing.assert_close(found.by_prompt, wanted, rtol=1e-9, atol=1e-12)
        assert float(getattr(found, which).abs().max()) < 1e-12


# What is saved


def test_written_is_zero_exactly_where_no_bit_of_the_activation_differs():
    model = families.build("llama")
    clean = changed(CORRUPTED[:1], (0, 1), (0, 3))
    first = sweep(model, clean, CORRUPTED[:1], LAST, progress=False)
    assert first.written.tolist() == [[0, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert torch.equal(first.by_prompt[first.written == 0], first.corrupted.expand(5, 1))
    assert (first.by_prompt[first.written > 0] != first.corrupted).all()
    values = sweep(model, clean, CORRUPTED[:1], LAST, "v", axes=("position",), progress=False)
    assert values.written[0].tolist() == [0, 1, 0, 1, 0]
    entries = sweep(
        model, clean, CORRUPTED[:1], LAST, "pattern",
        axes=("head", "position", "source"), progress=False,
    )  # fmt: skip
    above = torch.ones(5, 5).triu(1).bool()
    assert not entries.written[:, :, above].any()
    assert not entries.written[:, :, 0].any()
    assert entries.written[:, :, 4].all()


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "z", "k", "pattern", "neurons"])
def test_a_sweep_of_a_run_into_itself_is_all_unpatched_and_runs_no_wave(site, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Wave, "run", never)
    found = sweep(
        families.build("llama"), CLEAN, CLEAN, everything, site,
        axes=("position",) if site == "neurons" else None, progress=False,
    )  # fmt: skip
    assert not found.written.any()
    assert torch.equal(found.by_prompt, found.clean.expand_as(found.by_prompt))
    assert torch.equal(found.clean, found.corrupted)


class Counted:
    """Tokens that pass each of a stack's linear maps while a wave runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: dict[int, int] = {}
        self.read: list[tuple[int, int]] = []
        multiply, wave, logits = Linear.__call__, Wave.run, Stack.logits
        inside = False

        def count(linear: Linear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            if inside:
                where = linear.weight.data_ptr()
                self.tokens[where] = self.tokens.get(where, 0) + len(x)
            return multiply(linear, x, *args, **kwargs)

        def run_wave(wave_: Wave) -> object:
            nonlocal inside
            inside = True
            try:
                return wave(wave_)
            finally:
                inside = False

        def unembed(stack: Stack, stream: Tensor, columns: Tensor | None = None) -> Tensor:
            self.read.append((len(stream), 0 if columns is None else len(columns)))
            return logits(stack, stream, columns)

        monkeypatch.setattr(Linear, "__call__", count)
        monkeypatch.setattr(Wave, "run", run_wave)
        monkeypatch.setattr(Stack, "logits", unembed)

    def of(self, linear: torch.nn.Linear, first_output: int = 0) -> int:
        return self.tokens.get(linear.weight[first_output:].data_ptr(), 0)


def test_a_wave_carries_only_positions_from_the_patch_on_and_layers_above_it(monkeypatch):
    layers, t = 4, 6
    toy = ToyModel()
    corrupted = torch.arange(t)[None]
    run = sweep(toy, corrupted + 10, corrupted, LAST, progress=False)  # read and verified here
    counted = Counted(monkeypatch)
    again = sweep(toy, corrupted + 10, corrupted, LAST, progress=False)
    assert torch.equal(run.scores, again.scores)
    suffixes = t * (t + 1) // 2  # tokens of the t rows that join at one layer
    for layer, block in enumerate(toy.h):
        passing = layer * suffixes  # of rows that joined below
        if layer < layers - 1:
            # A joining row projects its one new token, for all later keys are the base run's.
            assert counted.of(block.attn.c_attn) == passing + t
            wanted = passing + suffixes
        else:
            # In the last layer one query a row asks, and keys and values are of all tokens: those
            # that join again project one token, all three parts of it.
            assert counted.of(block.attn.c_attn) == layer * t + t
            assert counted.of(block.attn.c_attn, 64) == passing
            wanted = (layer + 1) * t
        for linear in (block.attn.c_proj, block.mlp[0], block.mlp[2]):
            assert counted.of(linear) == wanted
    # Two columns of one position: of the two unpatched runs, then of each cell.
    assert counted.read == [(1, 2), (1, 2), (layers * t, 2)]


def test_a_wave_starts_at_the_stage_of_its_patch(monkeypatch):
    t, toy = 6, ToyModel()
    corrupted = torch.arange(t)[None]
    for site, own in (
        ("attn_out", {"c_attn": 0, "c_proj": 0, "in": t, "out": t}),
        ("z", {"c_attn": 0, "c_proj": t, "in": t, "out": t}),
        ("q", {"c_attn": 0, "c_proj": t, "in": t, "out": t}),
        ("neurons", {"c_attn": 0, "c_proj": 0, "in": 0, "out": t}),
        ("mlp_out", {"c_attn": 0, "c_proj": 0, "in": 0, "out": 0}),
    ):
        with monkeypatch.context() as patch:
            how = {"axes": ("layer",), "layers": [1], "progress": False}
            sweep(toy, corrupted + 10, corrupted, LAST, site, **how)
            counted = Counted(patch)
            sweep(toy, corrupted + 10, corrupted, LAST, site, **how)
            block = toy.h[1]
            seen = {
                "c_attn": counted.of(block.attn.c_attn),
                "c_proj": counted.of(block.attn.c_proj),
                "in": counted.of(block.mlp[0]),
                "out": counted.of(block.mlp[2]),
            }
            assert seen == own, site
            assert counted.of(toy.h[0].attn.c_attn) == 0
            assert counted.of(toy.h[2].attn.c_attn) == t


def test_blocks_below_a_patch_do_not_run(monkeypatch):
    toy, patched = ToyModel(), HookEngine._run
    rows: list[list[int]] = []  # for each forward, how many rows passed each block

    def count(layer: int) -> Callable[[object, tuple[Tensor]], None]:
        return lambda _, args: rows[-1].__setitem__(layer, len(args[0]))

    def run(engine: HookEngine, plan: Plan, start: int) -> Tensor:
        rows.append([0] * 4)
        hooks = [b.ln_1.register_forward_pre_hook(count(i)) for i, b in enumerate(toy.h)]
        try:
            return patched(engine, plan, start)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(HookEngine, "_run", run)
    corrupted = torch.arange(5)[None]
    sweep(toy, corrupted + 10, corrupted, LAST, engine="blocks", progress=False)
    assert rows == [[5, 5, 5, 5], [0, 5, 5, 5], [0, 0, 5, 5], [0, 0, 0, 5]]
    rows.clear()
    sweep(toy, corrupted + 10, corrupted, LAST, engine="forwards", progress=False)
    assert rows == [[5, 5, 5, 5]] * 4


# How it is split


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_memory_and_threads_change_no_bit(name, monkeypatch):
    model = families.build(name)
    corrupted = families.tokens(2, 6)
    clean = changed(corrupted, (0, 1), (1, 3))

    def scores(site: str) -> Tensor:
        return sweep(model, clean, corrupted, everything, site, progress=False).by_prompt

    sites = ("resid_pre", "v", "mlp_out")
    whole = [scores(site) for site in sites]
    torch.set_num_threads(2)
    threaded = [scores(site) for site in sites]
    torch.set_num_threads(1)
    monkeypatch.setattr(runner, "bytes_a_token", lambda base: 1 << 27)  # 8 tokens in 1 GiB
    split = [scores(site) for site in sites]
    monkeypatch.setattr(execute, "TOKENS", 100)
    grouped = [scores(site) for site in sites]
    for site, *runs in zip(sites, whole, threaded, split, grouped, strict=True):
        for other in runs[1:]:
            assert torch.equal(runs[0], other), site
