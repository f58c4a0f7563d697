"""Runs frameworks' replay code on stock Megatron and prints what each router really did, as JSON.

    python tests/downstream/cells.py CHECKOUTS [FRAMEWORK ...]

One process has r3patch, another has ``R3PATCH_DISABLE=1``; `tools/downstream.py` starts both. Each
cell runs in a process forked from a clean one. What routers did comes from forward hooks, MTP is
told by its place in the model, and Megatron's own choice from a router that no framework has met:
no label, counter or session of r3patch is asked.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

import torch  # noqa: E402
from contract import Driver, DriverModule, Rollout  # noqa: E402
from loading import Checkout, find_checkout, use_package  # noqa: E402

import r3patch  # noqa: E402
from r3patch import testing  # noqa: E402

MICROBATCHES, TOKENS, LAYERS, EXPERTS, TOPK = 3, 12, 4, 16, 4
MODELS = {"first layer dense": [0, 1, 1, 1], "every layer MoE": [1, 1, 1, 1]}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "plain": {},
    "full recompute": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
GOVERNED = os.environ.get("R3PATCH_DISABLE", "0") != "1"


class Cell(NamedTuple):
    """One run."""

    framework: str
    model: str
    recompute: str
    pipeline: int
    patched: bool


class Call(NamedTuple):
    """One call of a router."""

    mtp: bool
    layer_number: int
    in_backward: bool
    grad_enabled: bool
    input: torch.Tensor
    probs: torch.Tensor
    routing_map: torch.Tensor


def drivers(names: list[str]) -> dict[str, DriverModule]:
    """The files in drivers/, all of them or those that are named."""
    files = sorted(path.stem for path in (HERE / "drivers").glob("*.py"))
    wanted = [name for name in files if not names or name in names]
    return {name: importlib.import_module(f"drivers.{name}") for name in wanted}


def cells(name: str, driver: DriverModule) -> Iterator[Cell]:
    pipelines = (1, 2) if driver.PIPELINE else (1,)
    for patched, pipeline, model in itertools.product(driver.PATCHED, pipelines, MODELS):
        for recompute in RECOMPUTE:
            yield Cell(name, model, recompute, pipeline, patched)


def run(cell: Cell, driver: DriverModule, checkout: Checkout) -> dict[str, Any]:
    """What came of a cell: an error, or how many calls were wrong."""
    answers = forked(functools.partial(_train, cell, driver, checkout), cell.pipeline)
    errors = [answer for answer in answers if isinstance(answer, str)]
    if errors:
        return {"error": errors[0]}
    calls = [call for answer in answers for call in answer]
    (own,) = forked(functools.partial(_megatrons_own, cell, driver, checkout, calls), 1)
    if isinstance(own, str):
        raise RuntimeError(own)
    return _judge(cell, calls, own)


def forked(function: Callable[[], Any], ranks: int) -> list[Any]:
    """By rank what the function gives in a fork of this process; the text of what it raised."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    queue = context.SimpleQueue()
    children = [
        context.Process(target=_rank, args=(function, rank, ranks, port, queue))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + 120
    while len(answers) < ranks and not any(isinstance(a, str) for a in answers.values()):
        if not queue.empty():
            rank, answer = pickle.loads(queue.get())
            answers[rank] = answer
        elif time.monotonic() > deadline:
            answers[-1] = "no end: a rank did not finish in 120 s"
        elif all(child.exitcode is not None for child in children):
            answers[-1] = f"a process ended with {[child.exitcode for child in children]}"
        else:
            time.sleep(0.01)
    for child in children:
        child.kill()  # a rank may wait for one that has raised
        child.join()
    return list(answers.values())


def _rank(function: Callable[[], Any], rank: int, ranks: int, port: int, queue: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # what the frameworks print
    if not os.environ.get("DOWNSTREAM_VERBOSE"):
        os.dup2(quiet, 2)
    try:
        answer = function()
    except Exception as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        answer = f"{type(error).__name__} in {place.name}" + (f": {error}" if str(error) else "")
    queue.put(pickle.dumps((rank, answer)))


def _train(cell: Cell, module: DriverModule, checkout: Checkout) -> list[Call]:
    """A step of three microbatches with the framework's replay, in this process."""
    use_package(module.PACKAGE, checkout.folder)
    below = GOVERNED and cell.patched  # the framework's source lies below r3patch, not above it
    if below:
        r3patch.uninstall()
    driver = module.open(checkout.folder, cell.patched)
    if below:
        r3patch.install()
    with testing.megatron_on_cpu(pipeline=cell.pipeline):
        chunk = _build(cell, driver)
        batches = testing.random_batches(
            num_microbatches=MICROBATCHES, micro_batch_size=1, seq_length=TOKENS
        )
        calls: list[Call] = []
        _hook(chunk, calls)
        driver.fill(chunk, _rollout(), [batch["input_ids"][0] for batch in batches])
        _step(chunk, batches, driver)
        return calls


def _build(cell: Cell, driver: Driver) -> Any:
    (chunk,) = testing.tiny_model(
        num_layers=LAYERS,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_layer_freq=MODELS[cell.model],
        **RECOMPUTE[cell.recompute],
        **driver.settings,
    )
    testing.seed_parameters(chunk)
    return chunk.train()


def _hook(chunk: torch.nn.Module, calls: list[Call]) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    for name, router in chunk.named_modules():
        if isinstance(router, TopKRouter):
            router.register_forward_hook(_note(calls, "mtp" in name.split("."), router))


def _note(calls: list[Call], mtp: bool, router: Any) -> Any:
    def note(module: Any, args: Any, output: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        tensors = (tensor.detach().clone() for tensor in (args[0], *output))
        grad = torch.is_grad_enabled()
        calls.append(Call(mtp, router.layer_number, in_backward, grad, *tensors))

    return note


def _rollout() -> Rollout:
    """Foreign experts, other ones for every token, layer and microbatch."""
    shape = (MICROBATCHES, TOKENS - 1, LAYERS, EXPERTS)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(7))
    return Rollout(noise.topk(TOPK).indices, EXPERTS)


def _step(chunk: Any, batches: list[dict[str, Any]], driver: Driver) -> None:
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    def forward_step(data: Iterator[Any], model: Any) -> Any:
        number, batch = next(data)
        more = driver.before(model, number)
        output = model(**batch, **more)
        driver.after(model, number)
        return output, lambda out: (out.float().mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(batches)),
        model=[chunk],
        num_microbatches=MICROBATCHES,
        seq_length=TOKENS,
        micro_batch_size=1,
        forward_only=False,
    )


def _megatrons_own(
    cell: Cell, module: DriverModule, checkout: Checkout, calls: list[Call]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the MTP router gives for the same inputs in a model that no framework has met."""
    use_package(module.PACKAGE, checkout.folder)  # which a fork of Megatron imports, switched off
    with testing.megatron_on_cpu():
        chunk = _build(cell, Driver())
        (router,) = (
            module.router
            for name, module in chunk.named_modules()
            if hasattr(module, "router") and "mtp" in name.split(".")
        )
        found = []
        for call in calls:
            if call.mtp:
                with torch.set_grad_enabled(call.grad_enabled):
                    probs, routing_map = router(call.input)
                found.append((probs.detach(), routing_map.detach()))
        return found


def _judge(cell: Cell, calls: list[Call], own: list[Any]) -> dict[str, Any]:
    """Main calls against the rollout's rows, MTP calls against Megatron's own bits."""
    fed = _maps(_rollout())  # [microbatch, layer, token, expert]
    main = [call for call in calls if not call.mtp]
    mtp = [call for call in calls if call.mtp]
    passes = 1 + (cell.recompute != "plain")
    numbers = [i + 1 for i, moe in enumerate(MODELS[cell.model]) if moe]
    wrong = 0
    for number, in_backward in itertools.product(numbers, (False, True)[:passes]):
        key = (number, in_backward)
        maps = [c.routing_map for c in main if (c.layer_number, c.in_backward) == key]
        assert len(maps) == MICROBATCHES, f"layer {number} was called {len(maps)} times"
        wrong += sum(
            not torch.equal(got[:-1], want[number - 1]) for got, want in zip(maps, fed, strict=True)
        )
    rows = fed.flatten(0, 1)
    return {
        "main": len(main),
        "main_wrong": wrong,
        "mtp": len(mtp),
        "mtp_fed": sum(bool((c.routing_map[:-1] == rows).all((1, 2)).any()) for c in mtp),
        "mtp_other": sum(
            not torch.equal(c.routing_map, o[1]) for c, o in zip(mtp, own, strict=True)
        ),
        "mtp_bits": sum(
            not (torch.equal(c.probs, o[0]) and torch.equal(c.routing_map, o[1]))
            for c, o in zip(mtp, own, strict=True)
        ),
    }


def _maps(rollout: Rollout) -> torch.Tensor:
    ids = rollout.experts.transpose(1, 2)
    empty = torch.zeros(*ids.shape[:-1], rollout.num_experts, dtype=torch.bool)
    return empty.scatter(-1, ids, True)


def main(arguments: list[str]) -> None:
    logging.getLogger("r3patch").setLevel(logging.ERROR)
    importlib.import_module("megatron.core.models.gpt")  # once, before the forks
    checkouts, names = Path(arguments[0]).resolve(), arguments[1:]
    for name, driver in drivers(names).items():
        checkout = find_checkout(checkouts, driver.FOLDERS)
        fork = find_checkout(checkouts, driver.FORKS)
        for found, wanted in ((checkout, driver.FOLDERS), (fork, driver.FORKS)):
            if wanted and found is None:
                print(json.dumps({"framework": name, "absent": list(wanted)}), flush=True)
        if checkout is not None:
            _answer(name, driver, checkout, fork if _is_imported(fork) else None)
            if fork is not None and not _is_imported(fork):
                _on_fork(fork, [str(checkouts), name])


def _is_imported(fork: Checkout | None) -> bool:
    megatron = importlib.import_module("megatron.core").__file__
    return fork is not None and Path(str(megatron)).is_relative_to(fork.folder)


def _on_fork(fork: Checkout, arguments: list[str]) -> None:
    """The cells of one framework in a process that imports its fork of Megatron."""
    path = os.pathsep.join(filter(None, [str(fork.folder), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)


def _answer(name: str, driver: DriverModule, checkout: Checkout, fork: Checkout | None) -> None:
    for cell in cells(name, driver):
        if driver.FORKS and cell.patched != (fork is not None):
            continue
        line = {
            **cell._asdict(),
            "name": driver.NAME,
            "commit": checkout.commit,
            "date": checkout.date,
            "fork": f"`{fork.commit}`, {fork.date}" if fork else "",
            "megatron": metadata.version("megatron-core"),
            "own_fault": driver.OWN_FAULTS.get(cell.model, ""),
            "governed": GOVERNED,
            **run(cell, driver, checkout),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
