"""moe_layers: which layers of a config have a router."""

from __future__ import annotations

from types import SimpleNamespace as Config
from typing import Any

import pytest

from r3patch import UnsupportedRoutingError, moe_layers


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Megatron
        ({"num_moe_experts": 8, "num_layers": 3}, (1, 2, 3)),
        ({"num_moe_experts": 8, "num_layers": 3, "moe_layer_freq": 1}, (1, 2, 3)),
        ({"num_moe_experts": 8, "num_layers": 5, "moe_layer_freq": 2}, (1, 3, 5)),
        ({"num_moe_experts": 8, "num_layers": 7, "moe_layer_freq": 3}, (1, 4, 7)),
        ({"num_moe_experts": 8, "num_layers": 4, "moe_layer_freq": [0, 1, 1, 0]}, (2, 3)),
        ({"num_moe_experts": 8, "num_layers": 3, "moe_layer_freq": "([0]*1+[1]*2)"}, (2, 3)),
        ({"num_moe_experts": 8, "num_layers": 4, "moe_layer_freq": "[0, 1] * 2"}, (2, 4)),
        ({"num_moe_experts": 8, "num_layers": 4, "moe_layer_freq": "2"}, (1, 3)),
        ({"num_experts": 8, "num_layers": 2, "moe_layer_freq": 1}, (1, 2)),
        # hybrid
        ({"num_layers": 6, "hybrid_layer_pattern": "M*E-GE"}, (3, 6)),
        ({"num_layers": 4, "hybrid_layer_pattern": "*E|*E/*E/*E"}, (2, 4)),
        ({"num_layers": 4, "hybrid_override_pattern": "ME*E"}, (2, 4)),
        ({"num_hidden_layers": 3, "hybrid_override_pattern": "M*-", "num_experts": 4}, ()),
        # Hugging Face
        ({"n_routed_experts": 64, "num_hidden_layers": 4, "first_k_dense_replace": 1}, (2, 3, 4)),
        (
            {
                "n_routed_experts": 64,
                "num_hidden_layers": 6,
                "first_k_dense_replace": 3,
                "moe_layer_freq": 2,
            },
            (5,),
        ),
        ({"n_routed_experts": 8, "num_hidden_layers": 3, "moe_layer_freq": [0, 1, 1]}, (2, 3)),
        ({"num_experts": 8, "num_hidden_layers": 4, "decoder_sparse_step": 2}, (2, 4)),
        ({"num_experts": 8, "num_hidden_layers": 3, "mlp_only_layers": [0, 2]}, (2,)),
        ({"num_local_experts": 8, "num_hidden_layers": 2}, (1, 2)),
        (
            {
                "n_routed_experts": 64,
                "num_hidden_layers": 3,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            },
            (2, 3),
        ),
        # dense
        ({"num_moe_experts": None, "num_layers": 3, "moe_layer_freq": 1}, ()),
        ({"num_hidden_layers": 3}, ()),
    ],
)
def test_layers(config: dict[str, Any], expected: tuple[int, ...]) -> None:
    """1-based numbers of the main model's MoE layers; empty without MoE."""
    assert moe_layers(Config(**config)) == expected


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_layers": 3, "moe_layer_freq": [0, 1]}, r"moe_layer_freq describes 2 .* has 3"),
        ({"num_layers": 3, "hybrid_layer_pattern": "*E"}, r"hybrid pattern describes 2 .* has 3"),
        ({"num_layers": 3, "moe_layer_freq": 0}, r"moe_layer_freq is 0, expected a positive"),
        ({"num_layers": 3, "moe_layer_freq": "__import__('os')"}, r"moe_layer_freq is \"__import"),
        ({"num_layers": 3, "moe_layer_freq": "[1]*"}, r"expected an integer or lists of 0 and 1"),
        ({"num_layers": 3, "moe_layer_freq": "[1]+1"}, r"expected an integer or lists of 0 and 1"),
        ({}, r"num_layers=None, expected an integer"),
        ({"num_layers": 3, "is_hybrid_model": True}, r"hybrid model, but has no hybrid_layer_p"),
    ],
)
def test_what_cannot_be_read_is_refused(config: dict[str, Any], text: str) -> None:
    """A pattern that cannot be read, or of another length than the model, is an error."""
    with pytest.raises(UnsupportedRoutingError, match=text):
        moe_layers(Config(num_moe_experts=8, **config))
