"""The faults of Megatron's own that doctor warns of, where a model's settings meet them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from r3patch.cli import _megatron
from r3patch.labels.targets import MTP_MODULE

FULL = {"mtp_num_layers": 1, "recompute_granularity": "full"}
SHARED = {"experimental_attention_variant": "dsa", "dsa_indexer_topk_freq": 2}


class Whole:
    """As in 0.16 to 0.17 and 0.19: what is handed over is taken."""

    def _proj_and_transformer_layer(self, hidden_states: Any, padding_mask: Any = None) -> None: ...
    def _checkpointed_forward(self, hidden_states: Any, padding_mask: Any = None) -> None: ...


class Open:
    """As before 0.18: anything is taken."""

    def _proj_and_transformer_layer(self, hidden_states: Any, padding_mask: Any = None) -> None: ...
    def _checkpointed_forward(self, forward_func: Any, *args: Any, **kwargs: Any) -> None: ...


class Torn:
    """As in 0.18.0 to 0.18.2."""

    def _proj_and_transformer_layer(self, hidden_states: Any, padding_mask: Any = None) -> None: ...
    def _checkpointed_forward(self, hidden_states: Any, context: Any = None) -> None: ...


def settings(monkeypatch: pytest.MonkeyPatch, layer: type, **config: Any) -> list[str]:
    module = SimpleNamespace(MultiTokenPredictionLayer=layer)
    monkeypatch.setitem(sys.modules, MTP_MODULE, module)
    return [setting for setting, _ in _megatron.faults(SimpleNamespace(**config))]


@pytest.mark.parametrize(
    ("layer", "config", "found"),
    [
        (Whole, FULL, 0),
        (Open, FULL, 0),
        (object, FULL, 0),
        (Torn, FULL, 1),
        (Torn, {**FULL, "mtp_num_layers": None}, 0),
        (Torn, {**FULL, "recompute_granularity": "selective"}, 0),
        (Torn, {}, 0),
        (Whole, {**FULL, **SHARED}, 1),
        (Whole, {**FULL, **SHARED, "dsa_indexer_topk_freq": 1}, 0),
        (Whole, {**FULL, **SHARED, "mtp_num_layers": 0}, 0),
        (Whole, {**SHARED, "mtp_num_layers": 1, "recompute_granularity": None}, 0),
        (Torn, {**FULL, **SHARED}, 2),
    ],
)
def test_a_fault_is_warned_of_where_the_settings_meet_it(
    monkeypatch: pytest.MonkeyPatch, layer: type, config: dict[str, Any], found: int
) -> None:
    """MTP, full recompute, and a Megatron of the shape; nothing else."""
    assert len(settings(monkeypatch, layer, **config)) == found


@pytest.mark.megatron
def test_the_installed_megatron_can_recompute_mtp() -> None:
    """0.16.1 and 0.19.2, which CI has, are of neither shape; a release that is fails here."""
    from megatron.core.transformer import multi_token_prediction  # noqa: F401

    assert list(_megatron.faults(SimpleNamespace(**FULL))) == []
