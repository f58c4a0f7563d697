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
        ({"num_experts": 8, "num_hidden_layers": 4, "num_dense_layers": 2}, (3, 4)),
        (
            {"num_experts": 8, "num_hidden_layers": 6}
            | {"expert_layer_period": 3, "expert_layer_offset": 1},
            (2, 5),
        ),
        (
            {"num_experts": 8, "num_hidden_layers": 3, "layers_num_experts": [1, 8, 8]},
            (2, 3),
        ),
        ({"num_experts": [1, 8, 8], "num_hidden_layers": 3}, (2, 3)),
        (
            {"moe_num_experts": 8, "num_hidden_layers": 8, "moe_layer_interval": 2}
            | {"moe_layer_start_index": 2, "moe_layer_end_index": 6},
            (4, 6),
        ),
        ({"moe_num_experts": 8, "num_hidden_layers": 2, "moe_layer_end_index": -1}, (1, 2)),
        (
            {"num_local_experts": 8, "num_hidden_layers": 4, "interleave_moe_layer_step": 2},
            (2, 4),
        ),
        ({"num_local_experts": 8, "num_hidden_layers": 4, "moe_layers": [0, 3]}, (1, 4)),
        ({"n_routed_experts": 8, "num_hidden_layers": 4, "num_hash_layers": 3}, (4,)),
        (
            {"n_routed_experts": 8, "num_hidden_layers": 3}
            | {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
            (2, 3),
        ),
        (
            {"n_routed_experts": 8, "num_hidden_layers": 4}
            | {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
            (2, 4),
        ),
        (
            {"num_local_experts": 8, "num_hidden_layers": 2}
            | {"layers_block_type": ["mamba", "attention"]},
            (1, 2),
        ),
        ({"ffn_config": {"moe_num_experts": 4, "moe_top_k": 1}, "n_layers": 2}, (1, 2)),
        # composite
        ({"text_config": Config(num_experts=8, num_hidden_layers=2)}, (1, 2)),
        ({"thinker_config": {"text_config": {"num_experts": 8, "num_hidden_layers": 1}}}, (1,)),
        ({"text_config": {"num_hidden_layers": 2}, "num_experts": 8}, ()),
        ({"text_config": None, "num_experts": 8, "num_hidden_layers": 2}, (1, 2)),
        # dense
        ({"num_experts": 8, "num_hidden_layers": 2, "is_moe": False}, ()),
        ({"num_experts": 8, "num_hidden_layers": 2, "enable_moe_block": False}, ()),
        ({"num_experts": 1, "num_hidden_layers": 2}, ()),
        ({"num_moe_experts": None, "num_layers": 3, "moe_layer_freq": 1}, ()),
        ({"num_hidden_layers": 3}, ()),
    ],
)
def test_layers(config: dict[str, Any], expected: tuple[int, ...]) -> None:
    """1-based numbers of the main model's MoE layers; empty without MoE."""
    assert moe_layers(Config(**config)) == expected
    assert moe_layers(config) == expected  # a config.json


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
        ({"num_layers": 3, "mlp_layer_types": ["dense", "soft", "sparse"]}, r"kinds \['soft'\]"),
        ({"num_layers": 3, "is_encoder_decoder": True}, r"of an encoder-decoder model"),
        ({"num_layers": 3, "is_hybrid_model": True}, r"hybrid model, but has no hybrid_layer_p"),
    ],
)
def test_what_cannot_be_read_is_refused(config: dict[str, Any], text: str) -> None:
    """A pattern that cannot be read, or of another length than the model, is an error."""
    with pytest.raises(UnsupportedRoutingError, match=text):
        moe_layers(Config(num_moe_experts=8, **config))


@pytest.mark.parametrize(
    "field",
    [
        {"moe_layers_enum": "4,5,6"},
        {"expert_layer_step": 2},
        {"dense_layer_ids": [0]},
        {"sparse_step": 2},
        {"layer_moe_flags": [1, 0]},
        {"moe_freq": 2},
    ],
)
def test_a_scheme_that_is_not_known_is_refused(field: dict[str, Any]) -> None:
    """A new model's rule would come out as "all layers" in silence."""
    config = Config(num_experts=8, num_hidden_layers=3, **field)
    with pytest.raises(UnsupportedRoutingError, match=rf"{next(iter(field))}=.* is not known here"):
        moe_layers(config)


# First and last MoE layer of every MoE model of transformers 5.24, read from its decoder layer.
EXPECTED = {
    "afmoe": (2, 32), "aria": (1, 32), "aria_text": (1, 32), "axk1": (2, 61), "axk2": (2, 48),
    "bailing_hybrid": (3, 42), "beam": (4, 52), "cohere2_moe": (1, 40), "dbrx": (1, 24),
    "deepseek_v2": (1, 32), "deepseek_v3": (4, 61), "deepseek_v32": (4, 61),
    "deepseek_v4": (4, 43), "dots3_note": (2, 46), "dots3_note_text": (2, 46),
    "ernie4_5_moe": (2, 28), "ernie4_5_vl_moe": (2, 28), "ernie4_5_vl_moe_text": (2, 28),
    "exaone_moe": (2, 32), "flex_olmo": (1, 32), "flint": (3, 49), "glm4_moe": (2, 46),
    "glm4_moe_lite": (2, 47), "glm4v_moe": (2, 46), "glm4v_moe_text": (2, 46),
    "glm5_next": (4, 45), "glm5_next_text": (4, 45), "glm_moe_dsa": (4, 78), "gpt_oss": (1, 36),
    "granitemoe": (1, 32), "granitemoe_swa": (1, 32), "granitemoehybrid": (1, 32),
    "granitemoeshared": (1, 32), "hy_v3": (2, 80), "hy_v4": (2, 34), "hy_v4_vl": (2, 78),
    "hy_v4_vl_text": (2, 78), "inkling2": (1, 48), "inkling2_loop": (1, 24),
    "inkling2_loop_text": (1, 24), "inkling2_text": (1, 48), "inkling_mm_model": (1, 66),
    "inkling_text": (1, 66), "jetmoe": (1, 12), "kimi_k25": (4, 61), "kimi_linear": (2, 27),
    "kolibri1": (1, 50), "laguna": (2, 40), "lara_mini": (1, 34), "lfm2_moe": (3, 32),
    "llama4": (1, 48), "llama4_text": (1, 48), "longcat_flash": (1, 28), "mellum": (1, 28),
    "mimo_v2_flash": (2, 48), "minimax": (1, 32), "minimax_m2": (1, 62), "minimax_m3_vl": (1, 60),
    "minimax_m3_vl_text": (1, 60), "mistral4": (1, 36), "mistral_large4": (2, 72),
    "mistral_large4_text": (2, 72), "mixtral": (1, 32), "muse_spark": (1, 62),
    "muse_spark_text": (1, 62), "nemotron_h": (2, 2), "nemotron_h_omni": (2, 2), "olmoe": (1, 16),
    "openai_privacy_filter": (1, 8), "phimoe": (1, 32), "qwen2_moe": (1, 24),
    "qwen3_5_moe": (1, 40), "qwen3_5_moe_text": (1, 40), "qwen3_moe": (1, 24),
    "qwen3_next": (1, 48), "qwen3_omni_moe": (1, 28), "qwen3_omni_moe_talker_text": (1, 20),
    "qwen3_omni_moe_text": (1, 28), "qwen3_omni_moe_thinker": (1, 28), "qwen3_vl_moe": (1, 24),
    "qwen3_vl_moe_text": (1, 24), "qwen4_exp": (1, 40), "qwen4_exp_text": (1, 40),
    "sarvam_mla": (2, 32), "sarvam_moe": (2, 19), "solar_open": (1, 48), "step3p5": (4, 45),
    "step3p7": (4, 45), "unlimited_ocr": (2, 12), "unlimited_ocr_text": (2, 12), "zaya": (1, 40),
}  # fmt: skip
EVERY_OTHER = {"jamba": tuple(range(2, 33, 2))}
PATTERN = {
    "nemo_speechlm": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
}
REFUSED = {"nllb-moe", "switch_transformers", "dots3_note_vision_encoder"}
# Mixtures of experts that are off by default, and one whose default config builds no model.
OFF = {"doge", "hunyuan_v1_moe", "vitpose_backbone", "vitpose"}
INCOMPLETE = {"deepseek_ocr2", "deepseek_ocr2_text"}


def test_every_moe_config_of_transformers() -> None:
    """The default config of every model type that has experts, against its modelling code."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    found: dict[str, tuple[int, ...] | None] = {}
    for name in sorted(auto.CONFIG_MAPPING):
        try:
            config = auto.CONFIG_MAPPING[name]()
        except Exception:
            continue
        try:
            found[name] = moe_layers(config)
        except UnsupportedRoutingError:
            found[name] = None
    assert {name for name, layers in found.items() if layers is None} <= REFUSED
    assert all(not found[name] for name in OFF & found.keys())
    expected = {name: tuple(range(a, b + 1)) for name, (a, b) in EXPECTED.items()} | EVERY_OTHER
    for name, pattern in PATTERN.items():
        expected[name] = tuple(i for i, symbol in enumerate(pattern, 1) if symbol == "E")
    with_moe = {name: layers for name, layers in found.items() if layers}
    assert {n: w for n, w in with_moe.items() if n in expected} == {
        n: layers for n, layers in expected.items() if n in found
    }
    new = with_moe.keys() - expected.keys() - INCOMPLETE
    assert not new, f"read the decoder layers of {sorted(new)} and add what they say"
