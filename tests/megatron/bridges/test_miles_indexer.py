"""miles' second manager, which replays sparse attention: MTP is kept out of it as of the first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FULL
from torch import nn

from r3patch import _config, bridges
from r3patch.labels import scope as scopes

from .common import TOKENS, bridge_status, build, changed, fails_after, loss_of

pytestmark = pytest.mark.megatron

CHOICES, PICKED = 8, 2


@pytest.fixture
def manager(miles: Any) -> Any:
    module = sys.modules["miles.utils.replay_base"]
    module.indexer_replay_manager.enabled = True
    return module.indexer_replay_manager


class Attention(nn.Module):
    """An attention layer whose indexer asks the manager, and which is numbered by its layer."""

    def __init__(self, manager: Any, layer_number: int) -> None:
        super().__init__()
        self.manager = [manager]
        self.seen: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []
        manager.register_to_module(self, "indexer_replay", stream_idx=layer_number - 1)

    def forward(self, hidden: torch.Tensor) -> None:
        scores = hidden.detach().reshape(TOKENS, -1)[:, :CHOICES]
        self.own.append(own_choice(scores, PICKED))
        topk = self.manager[0].get_topk_fn(own_choice, return_probs=False)
        self.seen.append(topk(scores, PICKED))


def own_choice(scores: torch.Tensor, topk: int) -> torch.Tensor:
    return scores.topk(topk).indices


def positions(seed: int) -> torch.Tensor:
    noise = torch.rand(TOKENS, CHOICES, generator=torch.Generator().manual_seed(seed))
    return own_choice(noise, PICKED)


@pytest.fixture
def sparse(manager: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Builds a model, each layer of which has such an attention in front."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    constructor, forward = TransformerLayer.__init__, TransformerLayer.forward

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        self.sparse = Attention(manager, self.layer_number)

    def run(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sparse(hidden_states)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(TransformerLayer, "__init__", construct)
    monkeypatch.setattr(TransformerLayer, "forward", run)
    return build


def attentions(model: Any) -> tuple[list[Attention], Attention]:
    """Those of the decoder, and MTP's."""
    *decoder, head = (part for part in model.modules() if isinstance(part, Attention))
    return decoder, head


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
def test_mtp_attention_is_kept_out(
    sparse: Callable[..., Any], manager: Any, recompute: dict[str, Any]
) -> None:
    """The decoder looks where the rollout looked; MTP where it would, also in recompute."""
    decoder, head = attentions(model := sparse(**recompute))
    assert manager.replays == [attention.indexer_replay for attention in decoder]
    assert not hasattr(head, "indexer_replay")
    for seed, stream in enumerate(manager.replays):
        stream.top_indices_list += [positions(seed), positions(9)]
    manager.stage = "replay_forward"
    loss = loss_of(model)
    manager.stage = "replay_backward"
    loss.backward()
    assert manager.stage == "replay_backward"
    for seed, attention in enumerate(decoder):
        assert len(attention.seen) == (2 if recompute else 1)
        assert all(torch.equal(ids, positions(seed)) for ids in attention.seen)
    assert len(head.seen) == (2 if recompute else 1)
    assert all(map(torch.equal, head.seen, head.own))
    cursors = [(stream.forward_index, stream.backward_index) for stream in manager.replays]
    assert cursors == [(1, 1 if recompute else 0)] * 3


def test_an_exception_gives_the_stage_back(
    sparse: Callable[..., Any], manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error in MTP's attention the manager is as it was."""
    model = sparse()
    _, head = attentions(model)
    for stream in manager.replays:
        stream.top_indices_list.append(positions(1))
    monkeypatch.setattr(head, "forward", fails_after(lambda *args: None).__get__(head))
    manager.stage = "replay_forward"
    with pytest.raises(RuntimeError, match="boom"):
        loss_of(model)
    assert manager.stage == "replay_forward"


def test_what_an_mtp_constructor_did_not_build_keeps_its_stream(manager: Any) -> None:
    """A layer that MTP shares with the decoder, and one of another model that came in between."""
    shared, owner = Attention(manager, 1), nn.Module()
    with scopes.constructing(owner, "mtp"):
        other = Attention(manager, 1)
        owner.shared, owner.own = shared, Attention(manager, 1)
    assert [id(s) for s in manager.replays] == [id(shared.indexer_replay), id(other.indexer_replay)]
    assert not shared._forward_hooks
    assert not other._forward_hooks
    assert len(owner.own._forward_hooks) == 1


def test_only_mtp_constructors_count(manager: Any) -> None:
    """What is built in scope "main" keeps its stream."""
    owner = nn.Module()
    with scopes.constructing(owner, "main"):
        owner.own = Attention(manager, 1)
    assert len(manager.replays) == 1


def test_it_is_governed_with_the_first(sparse: Callable[..., Any], manager: Any) -> None:
    """R3PATCH_BRIDGES without miles leaves both alone, and so does an uninstall."""
    with _config.override(bridges=("slime",)):
        sparse()
    assert len(manager.replays) == 4
    bridges.uninstall()
    sparse()
    bridges.install()
    assert len(manager.replays) == 8
    sparse()
    assert len(manager.replays) == 11


def test_a_miles_without_it(miles: Any) -> None:
    """An older miles has the routing manager only."""
    del sys.modules["miles.utils.replay_base"].indexer_replay_manager
    build()
    assert bridge_status("miles").state == "installed"


def test_an_error_is_kept_for_status(
    sparse: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is built, and the bridge of miles has failed, once for each MTP constructor."""
    monkeypatch.setattr("r3patch.bridges._miles_indexer.exclude", changed)
    sparse()
    assert bridge_status("miles").state == "failed"
    assert "wants a name (on 2 module(s))" in bridge_status("miles").detail
