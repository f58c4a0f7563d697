"""What the tests in tests/gpu share: models on the card, routes forced otherwise, and waits."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import tiny
import torch
from stack import Forced

import r3patch
from r3patch import Routes

#: The dtype of parameters, and of the router's arithmetic.
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"params_dtype": torch.bfloat16},
    "bf16_router_fp32": {"params_dtype": torch.bfloat16, "moe_router_dtype": "fp32"},
}


def build(**fields: Any) -> Any:
    """`tiny.build`, of the dtype of its config, as Megatron's Float16Module would make it."""
    dtype = fields.get("params_dtype", torch.float32)
    half = {"bf16": True, "pipeline_dtype": dtype} if dtype != torch.float32 else {}
    return tiny.build(**half, **fields).to(dtype)


def batch(seed: int) -> dict[str, torch.Tensor]:
    """`tiny.batch` on the device where Megatron runs."""
    return tiny.here(tiny.batch(seed))


def own_routes(model: Any, seeds: tuple[int, ...] = (1, 2)) -> list[Routes]:
    """What the model chooses by itself, from the maps that hooks have seen."""
    calls = tiny.Calls(model)
    for seed in seeds:
        tiny.loss_of(model, seed)
    maps = calls.main(in_backward=False)
    numbers = tiny.layers(model)
    return [
        Routes(
            torch.stack([_ids(maps[layer][index]) for layer in numbers], dim=1),
            numbers,
            num_experts=tiny.EXPERTS,
        )
        for index in range(len(seeds))
    ]


def _ids(routing_map: torch.Tensor) -> torch.Tensor:
    return routing_map.nonzero()[:, 1].view(len(routing_map), -1)


@contextlib.contextmanager
def forced(model: Any, routes: Routes, *, native: bool) -> Iterator[None]:
    """The same routes by Megatron's own RouterReplay, or by lifting scores over all others."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    device = torch.cuda.current_device()
    instances = RouterReplay.global_router_replay_instances
    before, infos = list(instances), r3patch.routers(model, "main")
    for info in infos:
        number = info.layer_number or 0
        taken: Any = Forced(routes, number)
        if native:
            taken = RouterReplay()
            ids = routes.select((number,)).experts[:, 0].long()
            taken.set_target_indices(ids.to(device))
            taken.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        info.module.router_replay = taken
    try:
        yield
    finally:
        instances[:] = before
        for info in infos:
            info.module.router_replay = None


@contextlib.contextmanager
def waits(mode: str = "warn") -> Iterator[list[str]]:
    """The operations inside for which the host waits for the device; ``"error"``: they raise.

    Nothing is found on a CPU.
    """
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = "called a synchronizing CUDA operation"
    found += [f"{w.filename}:{w.lineno}" for w in caught if said in str(w.message)]


def keep_busy(milliseconds: float = 100.0) -> None:
    """Queue nothing of use on the current stream: what comes behind it has not run yet."""
    if torch.cuda.is_available():
        torch.cuda._sleep(int(milliseconds * 1.5e6))  # cycles, at some 1.5 GHz or more
