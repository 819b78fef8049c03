"""The SAELens layout, written for and read from the installed sae-lens."""

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from microtome import SAE, TopK
from microtome.errors import CheckpointError, NonFiniteError


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens", reason="sae-lens is not installed")


def filled(center: bool = True) -> SAE:
    sae = SAE(8, 32, TopK(4), center=center, seed=3)
    with torch.no_grad():
        sae.b_dec += torch.arange(8.0) / 8
        sae.b_enc -= torch.arange(32.0) / 20
        sae.W_enc += 0.1
    return sae


X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("center", [True, False])
def test_a_saved_sae_comes_back_bit_for_bit(tmp_path: Path, center):
    sae = filled(center)
    sae.save_pretrained(tmp_path / "sae", {"model_name": "toy"})
    back = SAE.from_pretrained(tmp_path / "sae")
    assert (back.center, back.activation) == (center, TopK(4))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


@pytest.mark.parametrize("center", [True, False])
def test_sae_lens_loads_what_we_save_and_computes_the_same(tmp_path: Path, sae_lens, center):
    sae = filled(center)
    sae.save_pretrained(tmp_path, {"model_name": "toy", "hook_name": "blocks.0.hook_resid_pre"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == "topk"
    assert theirs.cfg.metadata.model_name == "toy"
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(X), sae.encode(X).to_dense())
        torch.testing.assert_close(theirs(X), sae(X))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", ["save_inference_model", "save_model"])
def test_we_load_what_sae_lens_trains_and_saves(tmp_path: Path, sae_lens, rescale, method):
    config = sae_lens.TopKTrainingSAEConfig(
        d_in=8, d_sae=32, k=4, rescale_acts_by_decoder_norm=rescale
    )
    theirs = sae_lens.TopKTrainingSAE(config)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        theirs.W_dec *= 0.5 + torch.rand(32, 1, generator=g)
        theirs.b_enc += 0.1 * torch.randn(32, generator=g)
        theirs.b_dec += torch.randn(8, generator=g)
    getattr(theirs, method)(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(X)
        torch.testing.assert_close(ours(X), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            ours.encode(X).to_dense(), theirs.encode(X), rtol=1e-5, atol=1e-6
        )


def test_a_plain_save_of_an_inference_sae_is_read(tmp_path: Path, sae_lens):
    theirs = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=8, d_sae=32, k=4))
    theirs.save_model(tmp_path)
    ours = SAE.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(X), theirs(X))


def test_an_sae_changed_and_saved_again_by_sae_lens_is_read(tmp_path: Path, sae_lens):
    filled().save_pretrained(tmp_path / "a")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
    with torch.no_grad():
        theirs.b_dec += 1.0
    theirs.save_model(tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(SAE.from_pretrained(tmp_path / "b")(X), theirs(X))


def saved(path: Path) -> Path:
    filled().save_pretrained(path)
    return path


def change_cfg(path: Path, **changes) -> None:
    cfg = json.loads((path / "cfg.json").read_text())
    cfg.update(changes)
    cfg.pop("weights_sha256", None)
    (path / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "jumprelu"}, "has architecture 'jumprelu'; only 'topk' can be read"),
        ({"architecture": None}, "has architecture None"),
        ({"k": "four"}, "must have k as a whole number above 0, got 'four'"),
        ({"k": 33}, "has k=33 above d_sae=32"),
        ({"d_in": 9}, r"W_enc in .* must be \[9, 32\] of floats as cfg.json says, is \[8, 32\]"),
        (
            {"apply_b_dec_to_input": "no"},
            "must have apply_b_dec_to_input as true or false",
        ),
        ({"rescale_acts_by_decoder_norm": 0.0}, "must have rescale_acts_by_decoder_norm as true"),
        ({"normalize_activations": "layer_norm"}, "has normalize_activations='layer_norm'"),
        ({"reshape_activations": "hook_z"}, "has reshape_activations='hook_z'"),
    ],
)
def test_a_cfg_that_we_cannot_express_is_refused_by_name(tmp_path: Path, changes, message):
    change_cfg(saved(tmp_path), **changes)
    with pytest.raises(CheckpointError, match=message):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "noise"])
def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path, name, damage):
    file = saved(tmp_path) / name
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        noise = bytes(len(whole))
        file.write_bytes({"truncated": whole[:-50], "empty": b"", "noise": noise}[damage])
    with pytest.raises(CheckpointError, match=name):
        SAE.from_pretrained(tmp_path)


def test_truncated_weights_without_a_hash_are_seen_too(tmp_path: Path):
    change_cfg(saved(tmp_path))
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        SAE.from_pretrained(tmp_path)


def test_a_flipped_bit_in_the_weights_is_seen(tmp_path: Path):
    file = saved(tmp_path) / "sae_weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        SAE.from_pretrained(tmp_path)


def test_nan_is_refused_when_loading_and_when_saving(tmp_path: Path):
    change_cfg(saved(tmp_path))
    file = tmp_path / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["b_enc"][3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"b_enc in .* holds NaN or infinity"):
        SAE.from_pretrained(tmp_path)
    sae = filled()
    with torch.no_grad():
        sae.W_dec[1, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="W_dec holds NaN or infinity; nothing was written"):
        sae.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_pickle_in_the_place_of_the_weights_is_never_opened(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    change_cfg(saved(tmp_path))
    (tmp_path / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        SAE.from_pretrained(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_folder_and_bad_metadata_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no folder .*; it must hold cfg\.json and"):
        SAE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="metadata must be JSON values"):
        filled().save_pretrained(tmp_path / "x", {"tensor": torch.ones(1)})


def test_saving_over_a_folder_leaves_its_other_files_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    saved(saved(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert torch.equal(SAE.from_pretrained(tmp_path).W_enc, filled().W_enc)
