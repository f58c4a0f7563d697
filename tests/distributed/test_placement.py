"""Placed rows against the processes and the Megatron that receive them."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import pickle
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from receiver import EXPERTS, TOPK, expert, receive

from r3patch import Layout, Routes

PP_SIZE, CP_SIZE, TP_SIZE = 2, 2, 2
MOE_LAYERS = (2, 3, 5, 6)
LENGTHS = (37, 12, 25)
CONFIG = types.SimpleNamespace(
    tensor_model_parallel_size=TP_SIZE, context_parallel_size=CP_SIZE, sequence_parallel=True
)


def samples() -> list[Routes]:
    tokens = iter(range(sum(LENGTHS)))
    return [
        Routes(
            [
                [[expert(t, layer, k) for k in range(TOPK)] for layer in MOE_LAYERS]
                for t in itertools.islice(tokens, length)
            ],
            MOE_LAYERS,
            torch.arange(length) < length - 1,
            num_experts=EXPERTS,
        )
        for length in LENGTHS
    ]


def nbytes(routes: Routes) -> int:
    return routes.experts.nbytes + (0 if routes.valid is None else routes.valid.nbytes)


@pytest.fixture
def workers() -> Iterator[tuple[list[Any], Any]]:
    """Two processes with a queue each, and the queue of their answers."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    queues = [context.Queue() for _ in range(2)]
    processes = [context.Process(target=receive, args=(q, answers), daemon=True) for q in queues]
    for process in processes:
        process.start()
    yield queues, answers
    for queue in queues:
        queue.put(None)
    for process in processes:
        process.join(10)
        process.kill()


@pytest.mark.distributed
def test_every_rank_gets_its_own_rows_and_no_others(workers: tuple[list[Any], Any]) -> None:
    """Selected and placed on the controller, every row reaches one rank of its stage, once."""
    queues, answers = workers
    whole = samples()
    ids = torch.split(torch.arange(sum(LENGTHS)), list(LENGTHS))
    stages = (MOE_LAYERS[:2], MOE_LAYERS[2:])
    ranks = list(itertools.product(stages, range(CP_SIZE), range(TP_SIZE)))
    sent = 0
    for number, (layers, cp_rank, tp_rank) in enumerate(ranks):
        layout = Layout.from_megatron(CONFIG, cp_rank=cp_rank, tp_rank=tp_rank, pad_to_multiple=8)
        rows = layout.place([sample.select(layers) for sample in whole])
        sent += nbytes(rows)
        message = pickle.dumps((layers, layout.place_ids(ids), rows))
        assert len(message) < nbytes(rows) + 2500
        queues[number % 2].put(message)
    found = [answers.get(timeout=60) for _ in ranks]

    fed = sorted(token for part in ids for token in part[:-1].tolist())
    for layers in stages:
        assert sorted(t for got, tokens in found if got == layers for t in tokens) == fed
    # One byte per id and one per row, each row once but for padding.
    needed = sum(LENGTHS) * len(MOE_LAYERS)
    assert sent <= 1.2 * needed * (TOPK + 1)


@pytest.mark.megatron
@pytest.mark.feature(
    "module:megatron.core.transformer.transformer_layer:TransformerLayer._maybe_unflatten_for_moe"
)
@pytest.mark.parametrize(("tp_size", "mbs"), [(1, 1), (1, 3), (2, 2), (2, 3)])
def test_unflattened_packs_are_padded_batches_without_sequence_parallelism(
    tp_size: int, mbs: int
) -> None:
    """Megatron 0.19.2 reorders equal packed samples to [S, mbs], but not a rank's part of them."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    unflatten = TransformerLayer._maybe_unflatten_for_moe
    ids = [torch.arange(6) + 100 * number for number in range(mbs)]
    packed = Layout(tp_size=tp_size, sequence_parallel=tp_size > 1)
    expected = Layout(packed=False, seq_length=6) if tp_size == 1 else packed
    params = types.SimpleNamespace(tokens_per_sample=6)
    for rank in range(tp_size):
        own = dataclasses.replace(packed, tp_rank=rank).place_ids(ids)
        layer = types.SimpleNamespace(is_moe_layer=True)
        hidden, _, _ = unflatten(layer, own.view(-1, 1, 1), None, params)
        placed = dataclasses.replace(expected, tp_rank=rank if tp_size > 1 else 0).place_ids(ids)
        assert torch.equal(hidden.reshape(-1), placed)
