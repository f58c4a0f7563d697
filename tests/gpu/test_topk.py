"""Megatron's own choice for some rows is that for all rows, ties included.

torch takes another kernel of top-k for many rows of many columns (``should_use_multiblock``,
aten/src/ATen/native/cuda/TensorTopK.cu), and r3patch asks for the rows without routes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from r3patch.sessions._tap import TopkCall

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron")]

EXPERTS = (8, 64, 128, 256, 384, 400, 512)
TOPK = (1, 2, 6, 8, 22)
ROWS = (1, 2, 21, 128, 1000, 4000, 4001, 4096, 20000, 65536)
ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre_softmax": {"use_pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid"},
    "expert_bias": {"score_function": "sigmoid"},
    "groups": {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
}


class Spy:
    """Lets Megatron choose, and keeps the call."""

    call: TopkCall

    def get_replay_topk(self, *args: Any) -> Any:
        self.call = TopkCall(*args)
        return self.call.own()


def logits(ties: str, rows: int, experts: int, device: torch.device) -> torch.Tensor:
    """``[rows, experts]`` with as many ties as the name says."""
    if ties == "equal":
        return torch.zeros(rows, experts, device=device)
    generator = torch.Generator(device).manual_seed(rows * 1000 + experts)
    noise = torch.randn(rows, experts, generator=generator, device=device)
    return {
        "none": noise,
        "bf16": noise.bfloat16(),
        "quantised": (noise * 2).round() / 2,
        "two_values": (noise > 0).float(),
    }[ties]


def differences(
    routing: str, ties: str, experts: int, device: torch.device
) -> Iterator[tuple[str, str]]:
    """Each case in which some rows are answered otherwise on their own: what differs, and it."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    settings = dict(ROUTINGS[routing])
    if routing == "expert_bias":
        bias = torch.arange(experts, device=device) % 3 * 0.25
        settings["expert_bias"] = bias - bias.mean()
    for rows in ROWS if device.type == "cuda" else ROWS[:4]:
        values = logits(ties, rows, experts, device)
        order = torch.randperm(rows, device=device)
        for topk in TOPK:
            if topk > experts // 2 or (routing == "groups" and topk % 2):
                continue
            for grad in (True, False):
                spy = Spy()
                with torch.set_grad_enabled(grad):
                    topk_routing_with_score_function(values, topk, router_replay=spy, **settings)
                    whole = spy.call.own_ids()
                    for count in {1, -(-rows // 100), rows // 2 or 1, rows}:
                        part = order[:count].sort().values
                        got, want = spy.call.own_ids(part), whole.index_select(0, part)
                        if not torch.equal(got, want):
                            sets = torch.equal(got.sort(1).values, want.sort(1).values)
                            case = f"{count} of {rows} rows, topk {topk}, grad {grad}"
                            yield "order" if sets else "ids", case


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("ties", ["none", "bf16", "quantised", "two_values", "equal"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_some_rows_are_chosen_as_all_rows_are(
    routing: str, ties: str, experts: int, device: torch.device
) -> None:
    """The same ids in the same order, whatever the number of rows asked for."""
    found = list(differences(routing, ties, experts, device))
    ids = sum(what == "ids" for what, _ in found)
    assert not found, f"{ids} x other ids, {len(found) - ids} x another order; {found[:3]}"
