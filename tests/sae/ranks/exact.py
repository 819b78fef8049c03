"""Numbers: codes, reconstructions and steps of several ranks beside those of one process."""

import sys
from pathlib import Path

import torch
from shared import D, F, N, mine_of, moved, rows, same, same_state

import microtome as mt
from microtome import SAE, TopK, TrainConfig, evaluate, shard
from microtome.sae.sharded_step import ShardedStep
from microtome.sae.sharded_top_k import first_round
from microtome.sae.step import FusedStep

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.floors import exchange_bytes


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=g).float()


def on_whole_numbers(center: bool) -> tuple[SAE, torch.Tensor]:
    """An SAE and rows on which no sum of a step is rounded, with ties between the ranks.

    The variance of the rows is 256, so that the scale of the gradients is a power of two.
    """
    sae = SAE(D, F, TopK(5), seed=None, center=center)
    with torch.no_grad():
        sae.W_enc[:] = whole_numbers(3, F, D)
        sae.W_dec[torch.arange(F), torch.arange(F) % D] = 1.0 - 2.0 * (torch.arange(F) % 2)
        sae.b_dec[:] = whole_numbers(4, D)
    half = torch.zeros(16 * D)
    places = torch.randperm(16 * D, generator=torch.Generator().manual_seed(5))[:32]
    half[places] = 2.0 * (1 - 2 * (places % 2))
    return sae, torch.cat([half, -half]).reshape(32, D)


def encode_finds_the_bits_of_one_process(rank, size, folder):
    for k, f in ((1, F), (7, F), (20, F), (50, F), (6, 6)):
        sae = moved(k, f)
        ours = shard(sae)
        for x in (rows(), rows(1, 1), rows(2, 0), rows().reshape(3, 11, D)):
            one, all_ = sae.encode(x), ours.encode(x)
            same(all_.values, one.values)
            same(all_.indices, one.indices)
            assert (all_.shape, all_.n_features) == (one.shape, f)


def ties_between_ranks_go_to_the_lower_index(rank, size, folder):
    sae = SAE(D, F, TopK(9), seed=None)
    with torch.no_grad():
        sae.W_enc[:] = whole_numbers(3, 10, D).repeat(5, 1)  # every row five times, over all ranks
    for x in (whole_numbers(4, N, D), torch.zeros(4, D)):
        one, all_ = sae.encode(x), shard(sae).encode(x)
        same(all_.indices, one.indices)
        same(all_.values, one.values)
    assert all_.indices[0].tolist() == list(range(9))  # all are zero
    with torch.no_grad():  # nearly ties: neighbours one unit in the last place apart
        sae.W_enc *= (1 + torch.arange(F).flip(0)[:, None] * 2**-23).clamp(max=1.00001)
    one, all_ = sae.encode(rows()), shard(sae).encode(rows())
    same(all_.indices, one.indices)
    same(all_.values, one.values)


def rows_whose_answer_lies_on_one_rank_take_a_second_round(rank, size, folder):
    k = 8
    q = first_round(k, size)
    assert q == {2: 8, 3: 6}[size]  # of two ranks each sends all it has at once
    for n_forced in (0, 5):
        sae = moved(k)
        with torch.no_grad():
            sae.W_enc[:4], sae.b_enc[:] = 0, -100.0
            sae.W_enc[4:, 0] = sae.W_enc[4:, 0].abs()
            sae.b_enc[:12] = 10.0  # all on rank 0, whichever the size
            sae.b_enc[20:22], sae.b_enc[40:42] = 60.0, 60.0
        x = rows() * 0.1
        if n_forced:
            with torch.no_grad():
                sae.b_enc[20:], sae.W_enc[20:] = -100.0, 0.0
        ours = shard(sae)
        before = ours.ranks.received
        one, all_ = sae.encode(x), ours.encode(x)
        same(all_.indices, one.indices)
        same(all_.values, one.values)
        floor = exchange_bytes(N, D, k, size)
        second = N * 8 * (k - q) * (size - 1) if n_forced else 0
        received = ours.ranks.received - before
        assert 0 <= received - floor["encode"] - second <= 64 * size, (received, floor)


def decode_adds_up_in_the_order_of_the_ranks(rank, size, folder):
    sae = moved()
    ours = shard(sae)
    code = sae.encode(rows())
    expected = torch.zeros(N, D)
    dense, first = code.to_dense().detach(), 0
    for count in ours.counts:
        part = mt.sae.SparseCode(
            code.values * ((code.indices >= first) & (code.indices < first + count)),
            code.indices, F,
        )  # fmt: skip
        partial = sae.decode(part) - 0
        bare = mt.ops.sparse_decode(part.values, part.indices, sae.W_dec)
        del partial
        expected = bare.detach() if first == 0 else expected + bare.detach()
        first += count
    expected = expected + sae.b_dec.detach()
    out = ours.decode(code)
    same(out, expected)
    _, (others,) = ours.ranks.gather(out)
    assert all(torch.equal(other, out) for other in others)
    torch.testing.assert_close(out, dense @ sae.W_dec.detach() + sae.b_dec.detach())
    same(ours(rows()), out)
    before = ours.ranks.received
    ours.decode(code)
    assert 0 <= ours.ranks.received - before - exchange_bytes(N, D, 7, size)["decode"] <= 64 * size


def a_step_on_whole_numbers_has_the_bits_of_one_process(rank, size, folder):
    for optimizer, center, dead, options in (
        ("adam", True, 0, {}),
        ("adam", True, 20, {}),
        ("adam", False, 20, {"moments": "float32", "rowsparse": True}),
        ("adamw", True, 3, {"weight_decay": 0.5}),
        ("sgd", True, 20, {}),
        ("signsgd", False, 3, {"beta1": 0.0}),
    ):
        sae, x = on_whole_numbers(center)
        ours = shard(sae)
        config = TrainConfig(
            steps=1, lr=0.25, optimizer=optimizer, auxk_coefficient=0.25, k_aux=8, **options
        )
        alone, step = FusedStep(sae, config), ShardedStep(ours, config)
        alone.since_fired[F - dead :] = config.dead_after_tokens
        if dead == 20:  # some on the first rank, too
            alone.since_fired[:4] = config.dead_after_tokens
        step.since_fired.copy_(mine_of(ours, alone.since_fired))
        one, all_ = alone.take(x, 1.0, 1), step.take(x, 1.0, 1)
        assert (one.fvu, one.auxk, one.loss, one.l0) == (all_.fvu, all_.auxk, all_.loss, all_.l0)
        assert (one.auxk > 0) == (dead > 0)
        assert one.dead_fraction == all_.dead_fraction
        same(all_.dead, mine_of(ours, one.dead))
        same_state(ours, step, sae, alone)
        rebuilt = mt.ops.screen_weights(ours.local.W_enc)
        same(ours.local.screen().shadow, rebuilt.shadow)


def twenty_steps_end_where_one_process_ends(rank, size, folder):
    for optimizer, moments, center in (
        ("adam", "float32", True),
        ("sgd", "float32", False),
        ("adamw", "bfloat16", True),
        ("adam", "int8", True),
    ):
        sae = moved(center=center)
        with torch.no_grad():
            sae.b_enc[12:20] = -9.0  # they never fire, so they die
        ours = shard(sae)
        config = TrainConfig(
            steps=20, lr=1e-3, optimizer=optimizer, moments=moments, dead_after_tokens=3 * N,
            k_aux=5,
        )  # fmt: skip
        alone, step = FusedStep(sae, config), ShardedStep(ours, config)
        before, revived = ours.ranks.received, 0
        for s in range(1, 21):
            one, all_ = alone.take(rows(s), 1.0, s), step.take(rows(s), 1.0, s)
            revived += all_.auxk > 0
        assert revived
        _, others = ours.ranks.gather(
            torch.tensor([all_.fvu, all_.auxk, all_.loss, all_.l0, all_.dead_fraction]),
            ours.local.b_dec,
        )
        assert all(bool((t == t[0]).all()) for t in others), "the ranks drift apart"
        exact = moments == "float32"  # the others round by random bits of their own
        assert abs(one.fvu / all_.fvu - 1) < (1e-4 if exact else 1e-2), (moments, one, all_)
        for a, b in zip(ours.parameters_in_order, sae.parameters_in_order, strict=True):
            b = b if b.shape == (D,) else mine_of(ours, b)
            assert (a - b).abs().max() < (2e-5 if exact else 2e-2)
        floor = exchange_bytes(N, D, 7, size, 5)
        received = ours.ranks.received - before
        assert received <= 20 * (floor["step"] + floor["encode whole"] + 1000 * size)


def an_evaluation_gives_every_rank_the_numbers_of_one_process(rank, size, folder):
    sae = moved()
    one, all_ = (
        evaluate(sae, rows(11, 240), batch_size=70),
        evaluate(shard(sae), rows(11, 240), batch_size=70),
    )
    assert (one.l0, one.dead_fraction, one.n_rows) == (all_.l0, all_.dead_fraction, all_.n_rows)
    same(one.firing_counts, all_.firing_counts)
    assert abs(one.fvu - all_.fvu) < 1e-6


def the_parameters_are_dtensors_of_the_whole_and_share_memory_with_the_shard(rank, size, folder):
    sae = moved()
    ours = shard(sae)
    assert [name for name, _ in ours.named_parameters()] == ["W_enc", "b_enc", "W_dec", "b_dec"]
    for name, whole in sae.named_parameters():
        spread = getattr(ours, name)
        assert spread.shape == whole.shape
        assert not spread.requires_grad
        same(spread.full_tensor(), whole.detach())
    assert sum(ours.counts) == F
    assert ours.W_enc.to_local().data_ptr() == ours.local.W_enc.data_ptr()
    screen = ours.local.screen()
    with torch.no_grad():
        ours.W_enc.mul_(2.0)
    assert ours.local.screen() is not screen
    assert f"on rank {rank} of {size}" in repr(ours)


CASES = [
    encode_finds_the_bits_of_one_process,
    ties_between_ranks_go_to_the_lower_index,
    rows_whose_answer_lies_on_one_rank_take_a_second_round,
    decode_adds_up_in_the_order_of_the_ranks,
    a_step_on_whole_numbers_has_the_bits_of_one_process,
    twenty_steps_end_where_one_process_ends,
    an_evaluation_gives_every_rank_the_numbers_of_one_process,
    the_parameters_are_dtensors_of_the_whole_and_share_memory_with_the_shard,
]
