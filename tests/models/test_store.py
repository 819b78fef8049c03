"""ActivationStore: what goes in comes out; damage is named; a failed write leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from microtome.errors import (
    ArgumentError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    SiteError,
    StoreError,
)
from microtome.models import ActivationStore, ToyModel, capture, capture_to_store, store_write

D, T = 3, 4
OPTIONS = {"site": "resid_pre.1", "model_name": "toy", "d": D, "context_length": T}


def fill(path: Path, rows: int = 40, **options: object) -> tuple[ActivationStore, torch.Tensor]:
    """A store of `rows` rows counted up from 0 in shards of 12, added in uneven pieces."""
    values = torch.arange(rows * D, dtype=torch.float32).view(rows, D)
    with ActivationStore.write(path, **{**OPTIONS, "shard_rows": 12, **options}) as writer:
        for piece in range(0, rows, 7):
            part = slice(piece, piece + 7)
            writer.add(values[part], torch.arange(rows)[part] + 1000)
    return ActivationStore(path), values


def test_rows_and_tokens_come_back_in_order_across_shards(tmp_path: Path):
    store, values = fill(tmp_path / "s")
    assert len(store) == 40
    assert store.d == D
    assert [shard["rows"] for shard in store.manifest["shards"]] == [12, 12, 12, 4]
    assert torch.equal(store.rows(slice(None)), values)
    assert torch.equal(store.rows(slice(10, 26)), values[10:26])
    assert torch.equal(store.rows(slice(30, 2, -5)), values[torch.tensor(range(30, 2, -5))])
    assert store.rows(slice(5, 5)).shape == (0, D)
    index = torch.tensor([39, 0, 12, 11, 12, -1, 23])
    assert torch.equal(store.rows(index), values[index])
    assert torch.equal(store.tokens(index), torch.arange(1000, 1040)[index])
    assert store.tokens(slice(11, 13)).tolist() == [1011, 1012]
    assert store.rows(torch.empty(0, dtype=torch.int64)).shape == (0, D)
    assert repr(store) == "ActivationStore(40 rows of 3, resid_pre.1 of toy, float32)"


def test_what_is_read_belongs_to_the_caller(tmp_path: Path):
    store, values = fill(tmp_path / "s")
    store.rows(slice(0, 5)).zero_()
    store.rows(torch.arange(5)).zero_()
    store.tokens(slice(0, 5)).zero_()
    assert torch.equal(store.rows(slice(0, 5)), values[:5])
    assert store.tokens(slice(0, 5)).tolist() == [1000, 1001, 1002, 1003, 1004]
    store.verify()


def test_the_manifest_tells_where_the_rows_came_from(tmp_path: Path):
    fill(tmp_path / "s", extra={"text": "kjv"})
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    shards = manifest.pop("shards")
    assert manifest == {
        "format": "microtome-activations",
        "version": 1,
        "model": "toy",
        "site": "resid_pre.1",
        "dtype": "float32",
        "d": D,
        "context_length": T,
        "tokens": 40,
        "extra": {"text": "kjv"},
    }
    first = load_file(tmp_path / "s" / shards[0]["file"])
    assert first["rows"].shape == (12, D)
    assert first["tokens"].tolist() == list(range(1000, 1012))
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "manifest.json",
        *(f"shard_0000{i}.safetensors" for i in range(4)),
    ]


def test_bfloat16_is_stored_and_float32_comes_back(tmp_path: Path):
    store, values = fill(tmp_path / "s", dtype=torch.bfloat16)
    assert store.manifest["dtype"] == "bfloat16"
    assert store.rows(slice(None)).dtype == torch.float32
    assert torch.equal(store.rows(slice(None)), values.bfloat16().float())
    assert torch.equal(store.rows(torch.tensor([39, 3])), values[[39, 3]].bfloat16().float())


def test_split_cuts_whole_contexts_off_the_end(tmp_path: Path):
    store, values = fill(tmp_path / "s")
    train, held = store.split(0.25)  # 10 contexts: 2.5 rounds to 2
    assert (len(train), len(held)) == (32, 8)
    assert torch.equal(train.rows(slice(None)), values[:32])
    assert torch.equal(held.rows(torch.tensor([0, -1])), values[[32, 39]])
    assert held.tokens(slice(0, 1)).tolist() == [1032]
    assert held.d == D
    assert (len(store.split(1e-9)[1]), len(store.split(0.999)[0])) == (T, T)
    inner, last = held.split(0.5)
    assert torch.equal(torch.cat([inner.rows(slice(None)), last.rows(slice(None))]), values[32:])
    with pytest.raises(ArgumentError, match=r"at least two contexts, got 0\.5 over 1"):
        last.split(0.5)
    with pytest.raises(
        ArgumentError, match=r"between 0 and 1 over at least two contexts, got 1\.0"
    ):
        store.split(1.0)


def test_row_numbers_that_do_not_exist_are_refused(tmp_path: Path):
    store, _ = fill(tmp_path / "s")
    with pytest.raises(ArgumentError, match=r"index must lie in \[-40, rows=40\), got 40"):
        store.rows(torch.tensor([0, 40]))
    with pytest.raises(ArgumentError, match=r"index must lie in \[-40, rows=40\), got -41"):
        store.tokens(torch.tensor([-41]))
    with pytest.raises(DtypeError, match="index must be an integer tensor or a slice, got list"):
        store.rows([1, 2])
    with pytest.raises(DtypeError, match="index must be int32, int64, got float32"):
        store.rows(torch.tensor([1.0]))


def test_damage_is_found_and_the_shard_named(tmp_path: Path):
    store, _ = fill(tmp_path / "s")
    shard = tmp_path / "s" / "shard_00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        StoreError, match=r"shard_00002\.safetensors has .* bytes where .* were written"
    ):
        ActivationStore(tmp_path / "s")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    shard.write_bytes(bytes(flipped))
    opened = ActivationStore(tmp_path / "s")
    with pytest.raises(StoreError, match=r"shard_00002\.safetensors is corrupt: its sha256"):
        opened.verify()
    with pytest.raises(StoreError, match=r"shard_00002\.safetensors is corrupt: its sha256"):
        ActivationStore(tmp_path / "s", verify=True)
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(StoreError, match=r"shard_00002.safetensors is corrupt \("):
        ActivationStore(tmp_path / "s").rows(slice(None))
    shard.unlink()
    with pytest.raises(StoreError, match=r"shard_00002\.safetensors is missing"):
        ActivationStore(tmp_path / "s")
    assert len(store.rows(slice(0, 12))) == 12


def test_a_shard_of_another_store_is_not_taken_for_this_ones(tmp_path: Path):
    fill(tmp_path / "s")
    fill(tmp_path / "wide", d=D * 1, rows=36)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    manifest["d"] = 1
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"does not hold the \[12, 1\] rows of the manifest"):
        ActivationStore(tmp_path / "s").rows(slice(None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is corrupt"),
        ("[]", "manifest.json is corrupt"),
        ('{"format": "zip", "version": 1}', "has format 'zip' version 1, this release reads"),
        (
            '{"format": "microtome-activations", "version": 1}',
            "is corrupt .d, context_length",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path: Path, text: str, message: str):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        ActivationStore(tmp_path)


def test_a_directory_without_manifest_is_no_store(tmp_path: Path):
    with pytest.raises(StoreError, match=r"there is no finished store: manifest\.json is missing"):
        ActivationStore(tmp_path)


def test_an_existing_store_and_foreign_files_are_never_overwritten(tmp_path: Path):
    fill(tmp_path / "s")
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    with pytest.raises(
        StoreError, match=r"is a finished store already\. Delete it or choose another"
    ):
        fill(tmp_path / "s", rows=8)
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(StoreError, match=r"holds other files \(s, thesis.tex\)"):
        fill(tmp_path)
    with pytest.raises(StoreError, match=r"is a file\. Choose a directory"):
        fill(tmp_path / "thesis.tex")
    with pytest.raises(StoreError, match="s3://bucket/x is remote; stores are read from there"):
        fill("s3://bucket/x")
    assert (tmp_path / "thesis.tex").read_text() == "dear"


@pytest.mark.parametrize(
    ("key", "value"),
    [("shards", None), ("shards", [{}]), ("shards", {"a": 1}), ("dtype", ["float32"]), ("d", "3"),
     ("tokens", 4.0), ("context_length", 0), ("context_length", 7), ("site", 3)],
)  # fmt: skip
def test_an_entry_of_the_manifest_that_cannot_be_is_named(tmp_path: Path, key: str, value: object):
    fill(tmp_path / "s")
    file = tmp_path / "s" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(StoreError, match=rf"manifest\.json is corrupt \({key} missing or wrong\)"):
        ActivationStore(tmp_path / "s")


def test_what_is_no_text_no_folder_or_gone_since_is_an_error_of_the_store(tmp_path: Path):
    fill(tmp_path / "s")
    store = ActivationStore(tmp_path / "s")
    (tmp_path / "s" / "shard_00000.safetensors").unlink()
    for read in (store.verify, lambda: store.rows(slice(0, 2))):
        with pytest.raises(StoreError, match=r"shard shard_00000\.safetensors is missing"):
            read()
    file = tmp_path / "s" / "manifest.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=r"manifest\.json is corrupt \('utf-8' codec"):
        ActivationStore(tmp_path / "s")
    with pytest.raises(StoreError, match="there is no finished store"):
        ActivationStore(file)
    with pytest.raises(StoreError, match=r"fsspec cannot open nosuch://x \(Protocol not known"):
        ActivationStore("nosuch://x")
    with pytest.raises(ArgumentError, match="extra must hold JSON values"):
        ActivationStore.write(tmp_path / "e", **OPTIONS, extra={"a": object()})


def test_what_an_interrupted_write_left_is_no_store_and_is_replaced(tmp_path: Path):
    path = tmp_path / "s"
    writer = ActivationStore.write(path, **{**OPTIONS, "shard_rows": 12})
    writer.add(torch.ones(30, D), torch.zeros(30, dtype=torch.int64))
    (path / "shard_00002.safetensors.tmp").write_bytes(b"half of a sh")  # as kill -9 leaves it
    with pytest.raises(StoreError, match="there is no finished store"):
        ActivationStore(path)
    store, values = fill(path, rows=8)
    assert torch.equal(store.rows(slice(None)), values)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "shard_00000.safetensors"]


def test_an_exception_while_writing_withdraws_the_store(tmp_path: Path):
    writer = ActivationStore.write(tmp_path / "s", **{**OPTIONS, "shard_rows": 2})
    writer.add(torch.ones(4, D), torch.zeros(4, dtype=torch.int64))
    assert len(list((tmp_path / "s").iterdir())) == 2
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "write of the manifest"])
def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        last = 9 if call == "write of the manifest" else 3  # two calls a file: it and its folder
        if len(calls) == last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "earlier").write_text("kept")
    monkeypatch.setattr(store_write.os, "fsync", full)
    with pytest.raises(StoreError) as caught:
        fill(tmp_path / "s")
    assert "could not be written (No space left on device)." in str(caught.value)
    assert "Free some space or permission, or choose another path" in str(caught.value)
    assert list((tmp_path / "s").iterdir()) == []
    assert (tmp_path / "earlier").read_text() == "kept"


def test_a_write_the_kernel_cuts_short_leaves_nothing(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with (
            pytest.raises(StoreError, match="File too large"),
            ActivationStore.write(tmp_path / "s", **{**OPTIONS, "d": 1000}) as writer,
        ):
            writer.add(torch.ones(400, 1000), torch.zeros(400, dtype=torch.int64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "s").iterdir()) == []


def test_rows_that_do_not_fit_are_refused(tmp_path: Path):
    tokens = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"rows must be \[m, d=3\], got shape \[4, 5\]"):
        ActivationStore.write(tmp_path / "a", **OPTIONS).add(torch.ones(4, 5), tokens)
    with pytest.raises(ShapeError, match=r"tokens must be \[m\] with m=3"):
        ActivationStore.write(tmp_path / "b", **OPTIONS).add(torch.ones(3, D), tokens)
    with pytest.raises(DtypeError, match="rows must be float32, bfloat16"):
        ActivationStore.write(tmp_path / "c", **OPTIONS).add(torch.ones(4, D).int(), tokens)
    with pytest.raises(DtypeError, match="dtype must be float32, bfloat16, got float16"):
        ActivationStore.write(tmp_path / "d", **OPTIONS, dtype=torch.float16)
    with pytest.raises(ArgumentError, match="shard_rows must be between 1"):
        ActivationStore.write(tmp_path / "e", **OPTIONS, shard_rows=0)
    for rows in (0, 6):
        with pytest.raises(
            ArgumentError, match=f"{rows} rows are no whole number of contexts of 4"
        ):
            fill(tmp_path / "f", rows=rows)


def test_capture_to_store_holds_what_capture_gives(tmp_path: Path):
    model = ToyModel()
    tokens = torch.arange(40).view(5, 8)
    for site in ("resid_pre.2", "z.1"):
        store = capture_to_store(
            model, tokens, site, tmp_path / site, model_name="toy", batch_size=2, progress=False
        )
        expected = capture(model, site, tokens, batch_size=2)[site].flatten(2).flatten(0, 1)
        assert torch.equal(store.rows(slice(None)), expected)
        assert torch.equal(store.tokens(slice(None)), tokens.flatten())
        assert (store.context_length, store.d, store.manifest["site"]) == (8, 64, site)


def test_capture_to_store_refuses_before_it_runs_and_cleans_up_after(tmp_path: Path):
    model, tokens = ToyModel(), torch.zeros(2, 3, dtype=torch.int64)
    options = {"model_name": "toy", "progress": False}
    with pytest.raises(ShapeError, match=r"'wpe' has shape \[3, 64\], must be \[b, t, d\]"):
        capture_to_store(model, tokens, "wpe", tmp_path / "s", **options)
    with pytest.raises(
        SiteError, match=r"'pattern.0' is a pattern \[h, t, t\], not one activation"
    ):
        capture_to_store(model, tokens, "pattern.0", tmp_path / "s", **options)
    with torch.no_grad():
        model.h[0].mlp[2].bias[5] = float("nan")
    with pytest.raises(NonFiniteError, match="activations holds NaN or infinity in row 0, 1"):
        capture_to_store(model, tokens, "resid_post.0", tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()
    fill(tmp_path / "done")
    with pytest.raises(StoreError, match="is a finished store already"):
        capture_to_store(model, tokens, "resid_pre.0", tmp_path / "done", **options)


def test_a_remote_store_is_read_through_fsspec(tmp_path: Path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    local, values = fill(tmp_path / "s")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "s"), "/stores/s", recursive=True)
    remote = ActivationStore("memory://stores/s", verify=True)
    assert torch.equal(remote.rows(torch.tensor([39, 2])), values[[39, 2]])
    assert torch.equal(
        next(remote.batches(8, seed=1, prefetch=0)), next(local.batches(8, seed=1, prefetch=0))
    )
    fs.rm("/stores/s/shard_00001.safetensors")
    with pytest.raises(StoreError, match=r"shard_00001\.safetensors is missing"):
        ActivationStore("memory://stores/s")
    with pytest.raises(StoreError, match="there is no finished store"):
        ActivationStore("memory://stores/none")
