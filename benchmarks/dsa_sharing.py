"""Megatron's shared sparse-attention choices, MTP and recompute: are the gradients the same?

``python benchmarks/dsa_sharing.py``, with stock megatron-core 0.19.2: a model without r3patch's
sessions, whose layers share what the indexer chose (``dsa_indexer_topk_freq``), once without
recompute and once with. docs/upstream.md has the answer. No part of ``make bench``: it is about
Megatron, and needs a release that has the sharing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_dsa_module_spec_for_backend,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.experimental_attention_variant import dsa

from r3patch import testing

SPARSE = {
    "experimental_attention_variant": "dsa",
    "dsa_indexer_topk": 4,
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 16,
    "dsa_indexer_skip_topk_offset": 1,
    "dsa_indexer_loss_coeff": 0.0,
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


class Linear(torch.nn.Linear):
    """In the place of Transformer Engine's, which the indexer asks for."""

    def __init__(self, inputs: int, outputs: int, **ignored: Any) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Backend(LocalSpecProvider):  # type: ignore[misc]  # Megatron is untyped
    def linear(self) -> type[Linear]:
        return Linear


def build(frequency: int, mtp: int, **recompute: Any) -> Any:
    shape: dict[str, Any] = {"num_layers": 4, "num_moe_experts": None, "mtp_num_layers": mtp}
    plain = testing.tiny_config("deepseek_v3", **shape)
    sparse = testing.tiny_config(
        "deepseek_v3", **shape, **SPARSE, dsa_indexer_topk_freq=frequency, **recompute
    )
    backend = Backend()
    spec = get_gpt_decoder_block_spec(plain, use_transformer_engine=False)
    for layer in spec.layer_specs:
        attention = get_dsa_module_spec_for_backend(sparse, backend)
        down = backend.column_parallel_linear()
        attention.submodules.linear_q_down_proj = attention.submodules.linear_kv_down_proj = down
        layer.submodules.self_attention = attention
    torch.manual_seed(0)
    return GPTModel(
        sparse,
        spec,
        vocab_size=256,
        max_sequence_length=64,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(sparse, spec, use_transformer_engine=False)
        if mtp
        else None,
    ).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    (batch,) = testing.random_batches(num_microbatches=1, micro_batch_size=1)
    # Without a mask, as kernels have it that know of causality: Megatron then keeps the choices on
    # the config. On a mask, of which a recompute gets a copy, it loses them and raises.
    model(**{**batch, "attention_mask": None}).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    dsa.rotate_activation = lambda x: x  # a CUDA kernel
    print("| dsa_indexer_topk_freq | MTP layers | gradients that differ under full recompute |")
    print("| --- | --- | --- |")
    for frequency, mtp in ((2, 1), (2, 0), (1, 1)):
        with testing.megatron_on_cpu():
            plain = gradients(build(frequency, mtp))
            again = gradients(build(frequency, mtp, **FULL))
        differ = sum(not torch.equal(plain[name], again[name]) for name in plain)
        print(f"| {frequency} | {mtp} | {differ} of {len(plain)} |")


if __name__ == "__main__":
    main()
