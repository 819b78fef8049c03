"""Path patching against two forwards of the model itself, all but the path held fixed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from microtome.errors import ArgumentError, NonFiniteError
from microtome.models import capture
from microtome.models.native.runner import Runner, runner_of
from microtome.patching import Node, Paths, Write, patch, path_patch, run_patched
from microtome.patching.paths import sent
from microtome.testing import families
from microtome.testing.patching import changed, everything, last_difference

pytest.importorskip("transformers", reason="transformers is not installed")

B, T, LAYERS = 2, 5, 3
END = f"resid_post.{LAYERS - 1}"
CORRUPTED = families.tokens(B, T)
CLEAN = changed(CORRUPTED, (0, 1), (1, 0), (1, 3))
SENDERS = (
    Node("embed"), Node("z", 0, 1), Node("attn_out", 1), Node("mlp_out", 0), Node("z", 1, 3),
)  # fmt: skip
RECEIVERS: tuple[Node | list[Node], ...] = (
    Node("q", 2, 1), Node("k", 1, 0), Node("v", 2), Node("mlp", 1), Node("mlp", 2), Node("out"),
    [Node("k", 2, 0), Node("v", 2, 1), Node("out")],
)  # fmt: skip


class ByHand:
    """Two forwards a pair, with the model's own modules spliced."""

    def __init__(
        self, model: nn.Module, base: Tensor, source: Tensor, mask: Tensor | None = None
    ) -> None:
        self.model, self.base, self.mask = model, base, mask
        sites = [
            f"{kind}.{layer}"
            for kind in ("resid_pre", "z", "attn_out", "mlp_out")
            for layer in range(LAYERS)
        ]
        sites.append(END)
        self.own, self.other = (
            capture(model, sites, tokens, attention_mask=mask).by_site for tokens in (base, source)
        )

    def fixed(self, sender: Node, node: Node, freeze_mlps: bool) -> dict[str, Tensor]:
        """The sender's output from the source run, and attention and MLPs as they were."""
        fixed = {f"attn_out.{layer}": self.own[f"attn_out.{layer}"] for layer in range(LAYERS)}
        if freeze_mlps:
            fixed |= {f"mlp_out.{layer}": self.own[f"mlp_out.{layer}"] for layer in range(LAYERS)}
        if node.site == "mlp":
            fixed.pop(f"mlp_out.{node.layer}", None)
        if sender.site == "embed":
            fixed["resid_pre.0"] = self.other["resid_pre.0"]
        elif sender.site == "z" and sender.head is not None:
            del fixed[f"attn_out.{sender.layer}"]
            name = f"z.{sender.layer}"
            fixed[name] = self.own[name].clone()
            fixed[name][:, :, sender.head] = self.other[name][:, :, sender.head]
        else:
            name = f"{'mlp_out' if sender.site == 'mlp_out' else 'attn_out'}.{sender.layer}"
            fixed[name] = self.other[name]
        return fixed

    def receives(self, sender: Node, node: Node, freeze_mlps: bool) -> tuple[str, Tensor]:
        """Where a receiver is written to, and what it becomes."""
        site = {"out": END, "mlp": f"mlp_out.{node.layer}"}.get(
            node.site, f"{node.site}.{node.layer}"
        )
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x)
            return x

        fixed = self.fixed(sender, node, freeze_mlps)
        patches = [(name, lambda _, value=value: value) for name, value in fixed.items()]
        self.run([*patches, (site, keep)])
        return site, seen[0]

    def run(self, patches: list[tuple[str, Callable[[Tensor], Tensor]]]) -> Tensor:
        with torch.no_grad():
            return run_patched(self.model, self.base, patches, attention_mask=self.mask)

    def logits(self, sender: Node, group: Sequence[Node], freeze_mlps: bool) -> Tensor:
        patches = []
        for node in group:
            site, value = self.receives(sender, node, freeze_mlps)

            def write(x: Tensor, value: Tensor = value, node: Node = node) -> Tensor:
                x = x.clone()
                if node.site == "out":  # what other receivers changed on the way stays
                    return x + value - self.own[END]
                part = slice(None) if node.head is None else node.head
                where = (slice(None), slice(None), *([] if node.site == "mlp" else [part]))
                x[where] = value[where]
                return x

            patches.append((site, write))
        return self.run(patches)

    def agrees(self, found: Paths, metric, freeze_mlps: bool) -> None:
        for i, sender in enumerate(found.senders):
            for j, group in enumerate(found.receivers):
                wanted = metric(self.logits(sender, group, freeze_mlps))
                torch.testing.assert_close(
                    found.by_prompt[i, j], wanted, rtol=1e-9, atol=1e-9,
                    msg=lambda why, s=sender, g=group: f"{s} -> {g}: {why}",
                )  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return families.in_float64("llama")


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_a_path_is_what_two_forwards_with_the_rest_held_fixed_give(name, freeze_mlps):
    model = families.in_float64(name)
    found = path_patch(
        model, CLEAN, CORRUPTED, everything, SENDERS, RECEIVERS, freeze_mlps=freeze_mlps,
        progress=False,
    )  # fmt: skip
    assert found.scores.shape == found.written.shape == (5, 7)
    ByHand(model, CORRUPTED, CLEAN).agrees(found, everything, freeze_mlps)
    assert float(found.effect()[:, 5:].abs().min()) > 1e-6
    torch.testing.assert_close(found.scores, found.by_prompt.mean(-1))


def test_noising_sends_corrupted_outputs_in_the_clean_run(llama):
    given = (llama, CLEAN, CORRUPTED, last_difference, SENDERS[:2], RECEIVERS[:3])
    noised = path_patch(*given, direction="noise", progress=False)
    ByHand(llama, CLEAN, CORRUPTED).agrees(noised, last_difference, True)
    other = path_patch(llama, CORRUPTED, CLEAN, *given[3:], progress=False)
    assert torch.equal(noised.by_prompt, other.by_prompt)
    assert (noised.base, other.base) == ("clean", "corrupted")
    assert torch.equal(noised.clean, other.corrupted)
    torch.testing.assert_close(noised.effect(), (noised.by_prompt - noised.clean).mean(-1))


@pytest.mark.parametrize("freeze_mlps", [True, False])
def test_padding_neither_sends_nor_receives(llama, freeze_mlps):
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    clean = changed(CORRUPTED, (0, 0), (0, 2), (1, 2), (1, 4))

    def visible(logits: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape).to(logits)
        return torch.where(mask[..., None] == 1, logits * weights, 0.0).sum((1, 2))

    found = path_patch(
        llama, clean, CORRUPTED, visible, SENDERS[:3], RECEIVERS[:4], attention_mask=mask,
        freeze_mlps=freeze_mlps, progress=False,
    )  # fmt: skip
    ByHand(llama, CORRUPTED, clean, mask).agrees(found, visible, freeze_mlps)
    assert int(found.written.max()) <= int(mask.sum())


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_sender_after_its_receiver_leaves_the_run_as_it_was(name):
    model = families.in_float64(name)
    senders = [Node("z", 2, 0), Node("attn_out", 2), Node("mlp_out", 2)]
    receivers = [Node("q", 2), Node("k", 1), Node("mlp", 1), [Node("v", 2, 0), Node("q", 0)]]
    found = path_patch(
        model, CLEAN, CORRUPTED, last_difference, senders, receivers, progress=False
    )  # fmt: skip
    assert not found.written.any()
    assert torch.equal(found.by_prompt, found.corrupted.expand(3, 4, B))
    # The MLP of a parallel block reads the stream that its attention reads.
    found = path_patch(
        model, CLEAN, CORRUPTED, last_difference, senders, [Node("mlp", 2)], progress=False
    )  # fmt: skip
    assert found.written[:, 0].gt(0).tolist() == [name == "llama"] * 2 + [False]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gpt_neox"])
def test_all_that_is_sent_is_the_whole_difference_of_the_final_stream(name):
    model = families.in_float64(name)
    runner = runner_of(model, CORRUPTED, torch.zeros(B, dtype=torch.int32))
    assert isinstance(runner, Runner)
    both = torch.cat((CORRUPTED, CLEAN))
    run = runner.base(model, both, torch.zeros(2 * B, dtype=torch.int32))
    senders = [Node("embed")]
    senders += [Node(site, at) for at in range(LAYERS) for site in ("attn_out", "mlp_out")]
    parts = [sent(run, sender, B * T) for sender in senders]
    torch.testing.assert_close(sum(parts), run.final[B * T :] - run.final[: B * T])
    whole = sent(run, Node("attn_out", 1), B * T)
    torch.testing.assert_close(sent(run, Node("z", 1), B * T), whole)
    if name != "gemma3":  # whose norm after attention ties the heads together
        heads = sum(sent(run, Node("z", 1, head), B * T) for head in range(4))
        torch.testing.assert_close(heads, whole)
    # In one cell they turn the corrupted logits into the clean ones.
    writes = [Write(END, op="add", value=part.view(B, T, -1)) for part in parts]
    found = patch(model, CORRUPTED, CLEAN, everything, [writes, []])
    with torch.no_grad():
        torch.testing.assert_close(found[0], everything(model(CLEAN).logits))
        torch.testing.assert_close(found[1], everything(model(CORRUPTED).logits))


def test_without_mlps_paths_between_heads_are_followed(llama):
    with_mlps = path_patch(
        llama, CLEAN, CORRUPTED, everything, [Node("embed")], [Node("q", 0), Node("out")],
        progress=False,
    )  # fmt: skip
    answered = path_patch(
        llama, CLEAN, CORRUPTED, everything, [Node("embed")], [Node("q", 0), Node("out")],
        freeze_mlps=False, progress=False,
    )  # fmt: skip
    assert torch.equal(with_mlps.scores[:, 0], answered.scores[:, 0])  # no MLP lies between
    assert float((with_mlps.scores - answered.scores)[0, 1].abs()) > 1e-6


def test_nodes_say_what_they_are_and_wrong_ones_are_refused(llama):
    assert str(Node("embed")) == "embed"
    assert [str(Node("z", 1, 3)), str(Node("q", 2))] == ["z.1.3", "q.2"]

    def refuses(senders: object, receivers: object, message: str, model=llama) -> None:
        with pytest.raises(ArgumentError) as raised:
            path_patch(model, CLEAN, CORRUPTED, everything, senders, receivers, progress=False)
        assert str(raised.value) == f"path_patch: {message}"

    z, out = Node("z", 0), Node("out")
    refuses([], [out], "no sender was named. Pass at least one Node.")
    refuses([z], [], "no receiver was named. Pass at least one Node.")
    refuses([z], "out", "receivers must be a Node or a list of them, got 'out'.")
    refuses(["z.0"], out, "a sender must be a Node, such as Node('z', 3, 1), got 'z.0'.")
    refuses(
        [Node("q")], [out],
        "sender's site must be one of 'embed', 'z', 'attn_out', 'mlp_out', got 'q'.",
    )  # fmt: skip
    refuses(
        [z], [z], "receiver's site must be one of 'q', 'k', 'v', 'mlp', 'out', got 'z'."
    )  # fmt: skip
    layer = "layer must be between 0 and 2, got"
    refuses([Node("z", 3)], [out], f"sender's {layer} sender's layer=3.")
    refuses([z], [Node("mlp", -1)], f"receiver's {layer} receiver's layer=-1.")
    refuses([z], [Node("k", 1, 2)], "receiver k.1.2 has no head 2; there are 2.")
    refuses([Node("z", 1, 4)], [out], "sender z.1.4 has no head 4; there are 4.")
    refuses([Node("mlp_out", 1, 0)], [out], "sender mlp_out.1.0 has no head 0; there are 0.")
    refuses(
        [z], [out],
        "engine 'native' cannot run this model: BertForMaskedLM is not one of the architectures "
        "that are read into parts. Paths are followed through its parts.",
        families.in_float64("bert"),
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="direction must be one of 'denoise', 'noise', got 'x'"):
        path_patch(llama, CLEAN, CORRUPTED, everything, [z], [out], direction="x")


def test_one_sender_or_receiver_needs_no_list(llama):
    z, out = Node("z", 0), Node("out")
    alone, listed = (
        path_patch(llama, CLEAN, CORRUPTED, everything, *nodes, progress=False)
        for nodes in ((z, out), ([z], [out]))
    )
    assert torch.equal(alone.scores, listed.scores)
    assert (alone.senders, alone.receivers) == (listed.senders, listed.receivers)


def test_nan_names_the_path(llama):
    with torch.no_grad():
        known = [llama(tokens).logits for tokens in (CLEAN, CORRUPTED)]

    def picky(logits: Tensor) -> Tensor:
        new = torch.stack([(logits - run).abs().amax((1, 2)) > 1e-9 for run in known]).all(0)
        return torch.where(new, torch.nan, logits[:, -1, 0])

    receivers = [Node("q", 0), [Node("k", 1, 0), Node("v", 1, 0)]]
    with pytest.raises(NonFiniteError, match=r"the patch at z.0.1 -> k.1.0, v.1.0\. Usual causes"):
        path_patch(llama, CLEAN, CORRUPTED, picky, [Node("z", 0, 1)], receivers, progress=False)
