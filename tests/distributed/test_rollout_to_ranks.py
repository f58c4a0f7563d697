"""The whole path on stock Megatron: recorded, sent as an engine sends it, placed, replayed.

Run by torchrun, this file is a rank: it replays the payloads that the test wrote.
"""

from __future__ import annotations

import base64
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import r3patch

LENGTHS = (13, 16, 9, 6)  # two microbatches of two samples
SEQUENCE, PACK, EXPERTS, TOPK = 16, 32, 16, 4
CASES = {
    "pp2": {"pipeline": 2},
    "vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2_sp": {"tensor": 2},
    "ep2": {"expert": 2},
    "cp2": {"context": 2},
}


def build(seed: int) -> list[torch.nn.Module]:
    torch.manual_seed(seed)
    chunks = r3patch.testing.tiny_model(
        "glm47_flash",
        num_layers=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        multi_latent_attention=False,
    )
    for router in r3patch.routers(chunks):
        torch.nn.init.normal_(router.module.weight)  # so that two seeds choose differently
    return chunks


def token_ids() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]


# The test's side


def record_payloads(path: Path) -> None:
    """Record every sample by itself, in one process; write what SGLang would have sent."""
    payloads = []
    with r3patch.testing.megatron_on_cpu():
        (model,) = build(seed=1)
        with r3patch.record(model) as recording, torch.no_grad():
            for ids in token_ids():
                forward(model, ids.unsqueeze(0))
        for routes in recording.routes:
            rows = torch.zeros(routes.num_tokens - 1, 4, TOPK, dtype=torch.int32)
            rows[:, [layer - 1 for layer in routes.layers]] = routes.experts[:-1].to(torch.int32)
            payloads.append(base64.b64encode(rows.numpy().tobytes()).decode())
    path.write_text(json.dumps(payloads))


@pytest.fixture(scope="module")
def payloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rollout") / "payloads.json"
    record_payloads(path)
    return path


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_token_takes_the_experts_that_one_process_recorded(case: str, payloads: Path) -> None:
    """In every layer and on every rank, padded and packed, from payload to routing map."""
    status, output = r3patch.testing.torchrun(__file__, case, str(payloads), timeout=240)
    assert status == 0, output[-4000:]
    seen = [json.loads(payloads.with_name(f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    # Every fed token in every MoE layer, once per rank that holds its layer; EP ranks hold all.
    fed = sum(length - 1 for length in LENGTHS) * 3
    rows = sum(report["padded"] for report in seen), sum(report["packed"] for report in seen)
    assert rows == ((2 * fed,) * 2 if case == "ep2" else (fed,) * 2)


# A rank's side


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The per-token loss, or the hidden states of a stage before the last."""
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand_as(tokens)
    output: torch.Tensor = model(tokens, positions, mask, labels=tokens)
    return output


def on_this_cp_rank(row: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """Megatron's cut of a row: of 2 * size chunks the ones at rank and at the mirrored place."""
    if size == 1:
        return row
    chunks = row.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def batch(samples: list[torch.Tensor], packed: bool, cp_size: int, cp_rank: int) -> torch.Tensor:
    """``[micro_batch, s]`` with 0 for padding: a row for each sample, or a pack of PACK tokens."""
    cut = functools.partial(on_this_cp_rank, size=cp_size, rank=cp_rank)
    lengths = [len(x) + -len(x) % 4 if packed else SEQUENCE for x in samples]
    rows = [
        cut(torch.nn.functional.pad(x, (0, length - len(x))))
        for x, length in zip(samples, lengths, strict=True)
    ]
    if not packed:
        return torch.stack(rows)
    row = torch.cat(rows)
    return torch.nn.functional.pad(row, (0, PACK // cp_size - len(row))).unsqueeze(0)


def decoded(path: str, config: Any) -> list[r3patch.Routes]:
    sizes = {"num_experts": EXPERTS, "topk": TOPK, "num_layers": config.num_layers}
    return [
        r3patch.decode(text, num_tokens=n, moe_layers=r3patch.moe_layers(config), **sizes)
        for text, n in zip(json.loads(Path(path).read_text()), LENGTHS, strict=True)
    ]


def run_schedule(chunks: list[torch.nn.Module], microbatches: list[torch.Tensor]) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(data: Any, model: torch.nn.Module) -> Any:
        loss = forward(model, next(data))
        return loss, lambda output: (output.mean(), {"loss": output.mean().detach()})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks]
        if len(chunks) > 1
        else iter(microbatches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].shape[1],
        micro_batch_size=microbatches[0].shape[0],
        forward_only=False,
    )


def replay_and_check(
    chunks: list[torch.nn.Module], samples: list[r3patch.Routes], packed: bool
) -> int:
    """How many rows of real, fed tokens took the recorded experts; all others fail here."""
    from megatron.core import parallel_state as state

    config = chunks[0].config
    cp = state.get_context_parallel_world_size(), state.get_context_parallel_rank()
    sp, tp_rank = (
        state.get_tensor_model_parallel_world_size(),
        state.get_tensor_model_parallel_rank(),
    )
    own = (
        {"align": 4, "pad_to_multiple": PACK}
        if packed
        else {"packed": False, "seq_length": SEQUENCE}
    )
    layout = r3patch.Layout.from_megatron(config, **own)
    ids, pairs = token_ids(), [slice(0, 2), slice(2, 4)]
    batches = [batch(ids[pair], packed, *cp) for pair in pairs]
    # Who stands where, by the batch's own cut and Megatron's flatten: nothing of Layout.
    numbers = [1000 * (n + 1) + torch.arange(length) for n, length in enumerate(LENGTHS)]
    places = [
        batch(numbers[pair], packed, *cp).t().reshape(-1).chunk(sp)[tp_rank] for pair in pairs
    ]
    for pair, place in zip(pairs, places, strict=True):
        assert torch.equal(layout.place_ids(numbers[pair], pad=0), place)

    routers = r3patch.routers(chunks, "main")
    layers = [int(router.layer_number or 0) for router in routers]
    rows = [layout.place([sample.select(layers) for sample in samples[pair]]) for pair in pairs]
    maps: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for router in routers:
        router.module.register_forward_hook(
            lambda module, args, output, layer=router.layer_number: maps[layer].append(output[1])
        )
    with r3patch.replay(chunks, rows):
        run_schedule(chunks, batches)
    checked = 0
    for layer, called in maps.items():
        assert len(called) == len(places)
        for chosen, place in zip(called, places, strict=True):
            for row, number in enumerate(place.tolist()):
                sample, token = number // 1000 - 1, number % 1000
                if number == 0 or token == LENGTHS[sample] - 1:
                    continue
                column = samples[sample].layers.index(layer)
                want = samples[sample].experts[token, column].tolist()
                assert sorted(chosen[row].nonzero().flatten().tolist()) == sorted(want)
                checked += 1
    return checked


def rank_main(case: str, path: str) -> None:
    with r3patch.testing.megatron_on_cpu(**CASES[case]):
        report = {}
        for name, packed in (("padded", False), ("packed", True)):
            chunks = build(seed=2)
            samples = decoded(path, chunks[0].config)
            report[name] = replay_and_check(chunks, samples, packed)
        # A file each: lines that two ranks print run into each other.
        answer = Path(path).with_name(f"{case}-{torch.distributed.get_rank()}.json")
        answer.write_text(json.dumps(report))


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
