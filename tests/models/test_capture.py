"""capture and splice on the toy model and plain modules: values, batching, clean-up, messages."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, DtypeError, ShapeError, SiteError
from microtome.models import Activations, ToyConfig, ToyModel, capture, sites, splice

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(15).view(5, 3)


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Plain(nn.Module):
    """x -> (relu(2x), 7) inside, + 1 outside; the ReLU writes into its input."""

    class Inner(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, int]:
            return x * scale, 7

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.relu, self.idle = Plain.Inner(), nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.inner(x, scale=torch.tensor(2.0))[0]) + 1


def test_module_paths_give_inputs_and_outputs_of_any_module():
    x = torch.tensor([[-1.0, 3.0]])
    acts = capture(Plain(), ["inner:in", "inner", "relu:in", "relu"], x, stop_early=False)
    assert acts["inner:in"].tolist() == [[-1.0, 3.0]]
    assert acts["inner"].tolist() == [[-2.0, 6.0]]
    assert acts["relu:in"].tolist() == [[-2.0, 6.0]]  # as it was before the ReLU overwrote it
    assert acts["relu"].tolist() == [[0.0, 6.0]]
    assert acts.tokens is x


def test_batches_are_joined_in_order_and_agree_with_one_batch():
    model = ToyModel()
    names = ["z.1", "resid_mid.0", "mlp_out.3", "h.2.mlp.0"]
    one, many = (
        capture(model, names, TOKENS, batch_size=5),
        capture(model, names, TOKENS, batch_size=2),
    )
    assert list(many.by_site) == names
    for name in names:
        torch.testing.assert_close(one[name], many[name])
    assert many["z.1"].shape == (5, 3, 4, 16)
    assert many["h.2.mlp.0"].shape == (5, 3, 256)


def test_stopping_early_skips_later_modules_and_changes_nothing():
    model = ToyModel()
    ran = []
    handle = model.h[2].register_forward_hook(lambda *_: ran.append(1))
    early = capture(model, ["resid_post.1", "z.0"], TOKENS)
    assert not ran
    full = capture(model, ["resid_post.1", "z.0"], TOKENS, stop_early=False)
    assert ran
    handle.remove()
    for name in early.by_site:
        assert torch.equal(early[name], full[name])


def test_a_model_that_collects_hidden_states_is_not_stopped_early():
    model = ToyModel()
    object.__setattr__(model.config, "output_hidden_states", True)
    ran = []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    capture(model, "resid_pre.0", TOKENS)
    assert ran == [1]


def test_capture_leaves_the_model_as_it_was():
    model = ToyModel().train()
    model.h[1].eval()
    acts = capture(model, sites(model), TOKENS)
    assert model.training
    assert model.h[0].mlp.training
    assert not model.h[1].mlp.training
    assert hooks_on(model) == 0
    assert not any(tensor.requires_grad for tensor in acts.by_site.values())
    assert torch.is_grad_enabled()


def test_capture_runs_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity()).train()
    assert torch.equal(capture(model, "1", torch.ones(2, 50))["1"], torch.ones(2, 50))


def test_hooks_are_removed_after_an_exception_in_the_model():
    model = ToyModel().train()

    def fail(*_: object) -> None:
        raise RuntimeError

    handle = model.h[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        capture(model, ["resid_pre.0", "resid_post.3"], TOKENS)
    handle.remove()
    assert hooks_on(model) == 0
    assert model.training


def test_a_module_that_never_runs_is_an_error_and_leaves_no_hook():
    model = Plain()
    with pytest.raises(SiteError) as caught:
        capture(model, ["inner", "idle"], torch.ones(1, 2))
    assert str(caught.value) == (
        "capture: site 'idle' did not fire: the forward never called module 'idle'. "
        "Name a module that runs."
    )
    assert hooks_on(model) == 0


def test_outputs_that_hold_no_tensor_are_an_error():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "text"

    model = nn.Sequential(Odd(), nn.Identity())
    with pytest.raises(SiteError, match="the output of '0' is a str that does not begin with a"):
        capture(model, "0", torch.ones(1))
    with pytest.raises(SiteError, match="the input of '1' holds no tensor"):
        capture(model, "1:in", torch.ones(1))


def test_an_activation_without_a_batch_axis_cannot_be_joined():
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten()

    model = nn.Sequential(Flat())
    assert capture(model, "0", torch.ones(3, 4))["0"].shape == (12,)
    with pytest.raises(ShapeError, match=r"first axis is not the batch.* Pass batch_size=3"):
        capture(model, "0", torch.ones(3, 4), batch_size=2)


def test_mappings_and_tuples_are_read_and_replaced_at_their_first_entry():
    from collections import namedtuple

    pair = namedtuple("pair", ["a", "b"])

    class Holder(nn.Module):
        def __init__(self, make: object) -> None:
            super().__init__()
            self.make = make

        def forward(self, x: Tensor) -> object:
            return self.make(x)

    class Outer(nn.Module):
        def __init__(self, make: object, read: object) -> None:
            super().__init__()
            self.holder, self.read = Holder(make), read

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.holder(x))

    for make, read in (
        (lambda x: {"a": x, "b": 1}, lambda o: o["a"]),
        (lambda x: [x, 1], lambda o: o[0]),
        (lambda x: pair(x, 1), lambda o: o.a),
    ):
        model = Outer(make, read)
        with splice(model, "holder", lambda x: x + 1):
            assert model(torch.zeros(2)).tolist() == [1.0, 1.0]
        assert capture(model, "holder", torch.zeros(2))["holder"].tolist() == [0.0, 0.0]


def test_splice_replaces_inputs_given_by_keyword():
    class Inner(nn.Module):
        def forward(self, *, x: Tensor) -> Tensor:
            return x * 2

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x=x)

    model = Outer()
    with splice(model, "inner:in", lambda x: x + 10):
        assert model(torch.ones(1)).tolist() == [22.0]


def test_splicing_zero_at_resid_mid_removes_it_from_the_skip_connection_too():
    model = ToyModel()
    with splice(model, "resid_mid.1", torch.zeros_like):
        acts = capture(model, ["resid_mid.1", "mlp_out.1", "resid_post.1"], TOKENS)
    assert torch.equal(acts["resid_post.1"], acts["mlp_out.1"])
    assert not acts["resid_mid.1"].any()


def test_a_capture_inside_a_splice_sees_the_replacement_and_splices_nest():
    model = ToyModel()
    with (
        splice(model, "resid_post.0", torch.zeros_like),
        splice(model, "resid_pre.1", lambda x: x + 3),
    ):
        acts = capture(model, ["resid_post.0", "resid_pre.1"], TOKENS)
    assert not acts["resid_post.0"].any()
    assert torch.equal(acts["resid_pre.1"], torch.full_like(acts["resid_pre.1"], 3.0))


def test_splices_within_one_block_do_not_depend_on_the_order_they_are_opened_in():
    model = ToyModel()
    tens = [("resid_mid.1", 10.0), ("mlp_out.1", 20.0), ("resid_post.1", 30.0)]
    for order in itertools.permutations(tens):
        with contextlib.ExitStack() as stack:
            for site, ten in order:
                stack.enter_context(splice(model, site, lambda x, ten=ten: x * 0 + ten))
            acts = capture(model, ["resid_mid.1", "mlp_out.1", "resid_post.1"], TOKENS)
        for site, ten in tens:
            assert torch.equal(acts[site], torch.full_like(acts[site], ten))
    for order in itertools.permutations(tens[:2]):
        with contextlib.ExitStack() as stack:
            for site, ten in order:
                stack.enter_context(splice(model, site, lambda x, ten=ten: x * 0 + ten))
            post = capture(model, "resid_post.1", TOKENS)["resid_post.1"]
        assert torch.equal(post, torch.full_like(post, 30.0))


def test_splices_at_one_stream_apply_in_the_order_they_are_opened_in():
    model = ToyModel()
    with (
        splice(model, "mlp_out.0", torch.zeros_like),
        splice(model, "resid_mid.0", lambda x: x * 0 + 3),
    ):
        with splice(model, "resid_mid.0", lambda x: x * x):
            nine = capture(model, "resid_post.0", TOKENS)["resid_post.0"]
        three = capture(model, "resid_post.0", TOKENS)["resid_post.0"]
    assert torch.equal(nine, torch.full_like(nine, 9.0))
    assert torch.equal(three, torch.full_like(three, 3.0))
    assert hooks_on(model) == 0


def test_gradients_flow_through_a_splice():
    model, scale = ToyModel(), torch.ones((), requires_grad=True)
    with splice(model, "resid_pre.2", lambda x: x * scale):
        model(TOKENS).logits.square().mean().backward()
    assert scale.grad is not None
    assert scale.grad.abs() > 0


def test_a_result_in_another_precision_is_cast():
    model = ToyModel().bfloat16()
    with splice(model, "resid_pre.1", lambda x: x.float()):
        assert model(TOKENS).logits.dtype == torch.bfloat16


def test_splice_refuses_wrong_results_and_removes_its_hooks():
    model = ToyModel()
    with (
        pytest.raises(
            ShapeError, match=r"'z.0' must return shape \[5, 3, 4, 16\], got \[5, 3, 64\]"
        ),
        splice(model, "z.0", lambda x: x.flatten(-2)),
    ):
        model(TOKENS)
    with (
        pytest.raises(DtypeError, match="must return a tensor, got NoneType"),
        splice(model, "z.0", lambda _: None),
    ):
        model(TOKENS)
    assert hooks_on(model) == 0


def test_a_splice_that_replaced_nothing_is_an_error_once_the_model_ran():
    model = Plain()
    with splice(model, "idle", torch.relu):
        pass
    with (
        pytest.raises(SiteError, match="splice: site 'idle' did not fire"),
        splice(model, "idle", torch.relu),
    ):
        model(torch.ones(1))


def test_bad_tokens_are_refused_before_the_model_runs():
    model = ToyModel(ToyConfig(vocab_size=20, max_position_embeddings=4))
    with pytest.raises(DtypeError, match="tokens must be int64, got float32"):
        capture(model, "z.0", TOKENS.float())
    with pytest.raises(DtypeError, match="tokens must be a tensor, got list"):
        capture(model, "z.0", [[1, 2]])
    with pytest.raises(ShapeError, match=r"tokens must be \[b, t\], got shape \[15\]"):
        capture(model, "z.0", TOKENS.flatten())
    with pytest.raises(ArgumentError, match=r"tokens must lie in \[0, vocabulary=20\), got 99"):
        capture(model, "z.0", torch.tensor([[1, 99]]))
    with pytest.raises(ArgumentError, match=r"tokens is empty, got shape \[0, 3\]"):
        capture(model, "z.0", TOKENS[:0])
    with pytest.raises(ArgumentError, match="between 1 and max_position_embeddings=4, got context"):
        capture(model, "z.0", torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="batch_size must be between 1"):
        capture(model, "z.0", TOKENS, batch_size=0)
    with pytest.raises(ShapeError, match=r"attention_mask must be \[b, t\] with b=5"):
        capture(model, "z.0", TOKENS, attention_mask=torch.ones(4, 3))


def test_asking_for_a_site_that_was_not_captured_lists_those_that_were():
    acts = capture(ToyModel(), ["z.0", "resid_pre.0"], TOKENS)
    with pytest.raises(
        SiteError, match=r"'z\.1' was not captured; there is 'z\.0', 'resid_pre\.0'"
    ):
        acts["z.1"]
    assert repr(acts) == "Activations(z.0: [5, 3, 4, 16], resid_pre.0: [5, 3, 64])"
    assert isinstance(acts, Activations)


def test_an_attention_mask_reaches_the_model():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from microtome.testing import families

    model, tokens = families.build("bert"), families.tokens()
    mask = torch.ones_like(tokens)
    mask[:, 5:] = 0
    masked = capture(model, "resid_post.1", tokens, attention_mask=mask, batch_size=2)
    changed = tokens.clone()
    changed[:, 5:] = 1
    again = capture(model, "resid_post.1", changed, attention_mask=mask, batch_size=2)
    torch.testing.assert_close(masked["resid_post.1"][:, :5], again["resid_post.1"][:, :5])
    assert masked.attention_mask is mask


def test_a_progress_bar_is_shown_only_when_asked(capsys: pytest.CaptureFixture[str]):
    capture(ToyModel(), "z.0", TOKENS, progress=True)
    assert "5/5" in capsys.readouterr().err
    capture(ToyModel(), "z.0", TOKENS)
    assert capsys.readouterr().err == ""
