"""Combined 1F1B: Megatron runs parts of layers of two microbatches in turn, past every forward.

Run by torchrun, this file is a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import r3patch
from r3patch import Routes, testing

EXPERTS, TOPK, TOKENS, MICROBATCHES = 16, 4, 32, 3


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
# Before 0.17 the overlap takes MTP with pipeline parallelism only: more than two ranks.
@pytest.mark.feature("config:mtp_use_repeated_layer")
def test_overlapped_expert_communication_replays_exactly() -> None:
    """Router calls that no forward of a layer or model contains get their rows all the same."""
    status, output = testing.torchrun(__file__, timeout=150)
    assert status == 0, output[-4000:]
    assert output.count("every map is what was fed") == 2


def forward_step(
    data: Iterator[dict[str, Any]], model: Any, return_schedule_plan: bool = False
) -> Any:
    def mean(loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss.float().mean(), {}

    batch = next(data)
    if not return_schedule_plan:
        return model(**batch), mean
    inputs = (batch["input_ids"], batch["position_ids"], batch["attention_mask"])
    return model.build_schedule_plan(*inputs, labels=batch["labels"]), mean


def rank() -> None:
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    chunks = testing.tiny_model(
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_token_dispatcher_type="alltoall",
        multi_latent_attention=False,
        overlap_moe_expert_parallel_comm=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )
    testing.seed_parameters(chunks)
    calls = testing.RoutingCalls(chunks)
    shape, generator = (MICROBATCHES, TOKENS, 2, EXPERTS), torch.Generator().manual_seed(0)
    fed = torch.rand(shape, generator=generator).topk(TOPK).indices
    tokens = [
        batch["input_ids"].t().flatten()
        for batch in testing.random_batches(num_microbatches=MICROBATCHES)
    ]
    rows = [
        Routes(ids, (2, 3), num_experts=EXPERTS, tokens=own)
        for ids, own in zip(fed, tokens, strict=True)
    ]
    with r3patch.replay(chunks, rows, tokens="strict", alarm="off") as session:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(testing.random_batches(num_microbatches=MICROBATCHES)),
            model=chunks,
            num_microbatches=MICROBATCHES,
            seq_length=16,
            micro_batch_size=2,
            forward_only=False,
        )
    assert session.stats.token_checks[0].checked == MICROBATCHES * TOKENS
    for column, layer in enumerate((2, 3)):
        maps = [
            c.routing_map for c in calls if (c.info.scope, c.info.layer_number) == ("main", layer)
        ]
        for ids, got in zip(fed[:, :, column], maps, strict=True):
            assert torch.equal(got, torch.zeros_like(got).scatter(1, ids, True))
    assert sum(call.info.scope == "mtp" for call in calls) == MICROBATCHES
    print("every map is what was fed", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with testing.megatron_on_cpu(expert=2):
        rank()
