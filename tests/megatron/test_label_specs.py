"""Why the MTP specs are no target of the patch: they build no module."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from r3patch import testing

pytestmark = pytest.mark.megatron


def test_an_mtp_spec_builds_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch that is turned off around get_gpt_mtp_block_spec is on again when routers are built.

    The last layer of the decoder and MTP share one layer spec, so a mark on it could not tell them
    apart either.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=4,
        mtp_num_layers=1,
        add_bias_linear=False,  # up to 0.13 MoE refuses it
    )
    built: list[nn.Module] = []
    constructor = nn.Module.__init__

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        constructor(self, *args, **kwargs)

    with testing.megatron_on_cpu(), monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__init__", counted)
        decoder = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
        head = get_gpt_mtp_block_spec(settings, decoder, use_transformer_engine=False)
        assert built == []
    (head,) = head.layer_specs
    submodules = vars(head.submodules).values()
    assert any(submodule is decoder.layer_specs[-1] for submodule in submodules)
