"""Replay and record under Megatron's real schedules on two ranks: maps, losses, recorded routes.

Run by torchrun, this file is a rank. It holds every routing map against what was fed; the test
holds losses and recorded routes against those of a single process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import r3patch
from r3patch import Layout, Routes, testing

LENGTH, BATCH, MICROBATCHES = 16, 2, 4
EXPERTS, TOPK, LAYERS = 16, 4, 4
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pp2": ({"pipeline": 2}, {}),
    "vpp2": ({"pipeline": 2, "virtual_pipeline": 2}, {}),
    "ep2_allgather": ({"expert": 2}, {}),
    "ep2_alltoall": ({"expert": 2}, {"moe_token_dispatcher_type": "alltoall"}),
    "tp2_sp": ({"tensor": 2}, {}),
    "cp2": ({"context": 2}, {}),
    "pp2_dense_first_stage": ({"pipeline": 2}, {"moe_layer_freq": [0, 0, 1, 1]}),
    "pp2_uneven": ({"pipeline": 2}, {"num_layers_in_first_pipeline_stage": 1}),
    "pp2_mtp_only_last_stage": ({"pipeline": 2}, {"pipeline_model_parallel_layout": "Etttt|mL"}),
}
VARIANTS = {
    "plain": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

# Both sides


def build(**overrides: Any) -> list[torch.nn.Module]:
    config = {
        "num_layers": LAYERS,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_layer_freq": [0, 1, 1, 1],
        "multi_latent_attention": False,
        **overrides,
    }
    chunks = testing.tiny_model("glm47_flash", **config)
    testing.seed_parameters(chunks)
    return [chunk.train() for chunk in chunks]


def batches() -> list[dict[str, Any]]:
    return testing.random_batches(
        num_microbatches=MICROBATCHES, micro_batch_size=BATCH, seq_length=LENGTH
    )


def foreign(layers: tuple[int, ...]) -> list[list[Routes]]:
    """For each microbatch the samples' routes: random ones, which the model would not choose."""
    generator = torch.Generator().manual_seed(5)
    shape = (MICROBATCHES, BATCH, LENGTH, LAYERS, EXPERTS)
    ids = torch.rand(shape, generator=generator).topk(TOPK).indices
    columns = [layer - 1 for layer in layers]
    return [
        [Routes(sample[:, columns], layers, num_experts=EXPERTS) for sample in microbatch]
        for microbatch in ids
    ]


def moe_layers(overrides: dict[str, Any]) -> tuple[int, ...]:
    frequency = overrides.get("moe_layer_freq", [0, 1, 1, 1])
    return tuple(i for i, is_moe in enumerate(frequency, start=1) if is_moe)


# The test's side


def single_process(overrides: dict[str, Any]) -> dict[str, Any]:
    """Losses under replay and recorded routes, per sample, of the whole model in one process."""
    model_only = ("moe_layer_freq",)
    overrides = {name: overrides[name] for name in model_only if name in overrides}
    with testing.megatron_on_cpu():
        chunks = build(**overrides)
        layout = Layout(packed=False, seq_length=LENGTH)
        placed = [layout.place(samples) for samples in foreign(moe_layers(overrides))]
        with r3patch.replay(chunks, placed):
            losses = testing.train_step(chunks, batches())
        with r3patch.record(chunks) as recording:
            testing.train_step(chunks, batches(), forward_only=True)
    samples = [
        [routes[torch.arange(LENGTH) * BATCH + sample] for sample in range(BATCH)]
        for routes in recording.routes
    ]
    return {"losses": torch.stack(losses), "samples": samples}


def as_sets(routes: Routes) -> tuple[tuple[int, ...], torch.Tensor]:
    return routes.layers, routes.experts.sort(-1).values


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_replay_and_record_on_two_ranks(case: str, tmp_path: Path) -> None:
    """Maps are what was fed, losses and recorded routes those of a single process."""
    sizes, overrides = CASES[case]
    status, output = testing.torchrun(__file__, "exact", case, str(tmp_path), timeout=200)
    assert status == 0, output[-6000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    want = single_process(overrides)
    for variant in ranks[0]["losses"]:
        losses = [rank["losses"][variant] for rank in ranks if len(rank["losses"][variant])]
        mean = torch.stack(losses).mean(0)  # context parallel ranks hold half of the tokens each
        torch.testing.assert_close(mean, want["losses"], rtol=1e-5, atol=1e-5)
    for index, samples in enumerate(want["samples"]):
        parts = []
        for rank in ranks:
            if not rank["recorded"]:
                continue
            got = Routes.load(tmp_path / rank["recorded"][index])
            expected = rank["layout"].place([s.select(got.layers) for s in samples])
            assert torch.equal(as_sets(got)[1], as_sets(expected)[1])
            parts.append(got)
        if "pipeline" in sizes:
            joined = Routes.join(parts)
            whole = Layout(packed=False, seq_length=LENGTH).place(samples)
            assert as_sets(joined.select(whole.layers))[0] == as_sets(whole)[0]
            assert torch.equal(as_sets(joined.select(whole.layers))[1], as_sets(whole)[1])


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["topk", "tokens"])
def test_a_wrong_payload_on_one_rank_ends_the_run(fault: str, tmp_path: Path) -> None:
    """The rank raises, and the job ends, instead of waiting in a collective for ever."""
    began = time.monotonic()
    status, output = testing.torchrun(__file__, fault, "pp2", str(tmp_path))
    assert status != 0
    assert time.monotonic() - began < 100
    error = "RoutesError: microbatches[0] is top-3" if fault == "topk" else "ReplayError: "
    assert error in output


# A rank's side


@contextlib.contextmanager
def session(
    chunks: list[torch.nn.Module], placed: list[Routes], *, feed: bool
) -> Iterator[dict[str, Any]]:
    """A replay session, prefilled or fed from inside forward_step, and the step's arguments."""
    if not feed:
        with r3patch.replay(chunks, placed):
            yield {}
        return
    with r3patch.replay(chunks) as opened:
        yield {"before_forward": lambda chunk, n: opened.feed(placed[n], chunk=chunk)}


def check_maps(calls: testing.RoutingCalls, placed: list[Routes], recompute: bool) -> int:
    """Main maps are what was fed, in every pass; MTP calls are Megatron's own. How many calls."""
    seen: dict[tuple[int, bool], list[torch.Tensor]] = {}
    for info, in_backward, grad, inputs, probs, routing_map in list(calls):
        if info.scope == "main":
            seen.setdefault((int(info.layer_number or 0), in_backward), []).append(routing_map)
            continue
        with torch.set_grad_enabled(grad):
            own_probs, own_map = info.module(inputs)
        assert torch.equal(own_probs, probs)
        assert torch.equal(own_map, routing_map)
    for (layer, _), maps in seen.items():
        assert len(maps) == MICROBATCHES
        for routes, routing_map in zip(placed, maps, strict=True):
            ids = routes.select((layer,)).experts[:, 0].long()
            want = torch.zeros(len(ids), EXPERTS, dtype=torch.bool).scatter(1, ids, True)
            assert torch.equal(routing_map, want), layer
    passes = {in_backward for _, in_backward in seen}
    assert passes in (set(), {False, True} if recompute else {False})
    return len(seen)


def exact(case: str, folder: str) -> None:
    sizes, overrides = CASES[case]
    rank = int(os.environ["RANK"])
    report: dict[str, Any] = {"losses": {}, "recorded": []}
    with testing.megatron_on_cpu(**sizes):
        chunks = build(**overrides)
        config = chunks[0].config
        layout = Layout.from_megatron(config, packed=False, seq_length=LENGTH)
        placed = [layout.place(samples) for samples in foreign(moe_layers(overrides))]
        with r3patch.record(chunks) as recording:
            testing.train_step(chunks, batches(), forward_only=True)
        for index, routes in enumerate(recording.routes):
            routes.save(Path(folder, f"{rank}-{index}.routes"))
            report["recorded"].append(f"{rank}-{index}.routes")
        for name, recompute in VARIANTS.items():
            for feed in (False, True):
                chunks = build(**overrides, **recompute)
                calls = testing.RoutingCalls(chunks)
                with session(chunks, placed, feed=feed) as arguments:
                    losses = testing.train_step(chunks, batches(), **arguments)
                checked = check_maps(calls, placed, bool(recompute))
                has_main = bool(r3patch.routers(chunks, "main"))
                assert bool(checked) == has_main
                key = f"{name} {'fed' if feed else 'prefilled'}"
                report["losses"][key] = torch.stack(losses) if losses else torch.empty(0)
        report["layout"] = layout
    torch.save(report, Path(folder, f"{rank}.pt"))


def wrong(fault: str, case: str) -> None:
    sizes, overrides = CASES[case]
    with testing.megatron_on_cpu(**sizes):
        chunks = build(**overrides)
        layout = Layout.from_megatron(chunks[0].config, packed=False, seq_length=LENGTH)
        placed = [layout.place(samples) for samples in foreign(moe_layers(overrides))]
        if os.environ["RANK"] == "1" and fault == "topk":
            placed[0] = Routes(placed[0].experts[..., :3], placed[0].layers, num_experts=EXPERTS)
        if os.environ["RANK"] == "1" and fault == "tokens":
            placed[0] = placed[0][: placed[0].num_tokens - 1]
        with r3patch.replay(chunks, placed):
            testing.train_step(chunks, batches())


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if sys.argv[1] == "exact":
        exact(sys.argv[2], sys.argv[3])
    else:
        wrong(sys.argv[1], sys.argv[2])
