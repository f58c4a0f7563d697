"""R3 on two ranks: a GLM-4.7-Flash-shaped model, pipeline-parallel, a loss and stats per step.

    torchrun --nproc-per-node 2 examples/train_glm47_flash.py
    torchrun --nproc-per-node 8 examples/train_glm47_flash.py --device cuda --tp 2 --pp 2 --ep 2

A copy of the model under other weights plays the rollout engine: what it chose is recorded, each
rank its own layers, and replayed in the policy's steps. The first form runs on CPUs over gloo; the
second is the same code on GPUs over NCCL, and has not been run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

import r3patch  # before the model is built
from r3patch import testing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=2, help="pipeline-parallel ranks")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--recompute", action="store_true", help="full activation recompute")
    return parser.parse_args()


@contextlib.contextmanager
def on_gpus(tensor: int, pipeline: int, expert: int) -> Iterator[None]:
    """What `testing.megatron_on_cpu` does, as it is done on GPUs."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel(tensor, pipeline, expert_model_parallel_size=expert)
    model_parallel_cuda_manual_seed(0)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build(args: argparse.Namespace, seed: int) -> list[torch.nn.Module]:
    recompute: dict[str, Any] = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    chunks = testing.tiny_model("glm47_flash", num_layers=4, **recompute if args.recompute else {})
    testing.seed_parameters(chunks, seed)
    return [chunk.to(args.device).train() for chunk in chunks]


def batches(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    made = testing.random_batches(num_microbatches=args.microbatches, seed=seed)
    return [{name: value.to(args.device) for name, value in batch.items()} for batch in made]


def train(args: argparse.Namespace) -> None:
    engine, policy = build(args, seed=1), build(args, seed=0)
    parameters = [p for chunk in policy for p in chunk.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for step in range(args.steps):
        data = batches(args, seed=step)
        with r3patch.record(engine) as rollout:
            testing.train_step(engine, data, forward_only=True)
        optimizer.zero_grad()
        with r3patch.replay(policy, rollout.routes, measure=True, step=step) as session:
            losses = testing.train_step(policy, data)
        optimizer.step()
        show(step, losses, session.stats)


def show(step: int, losses: list[torch.Tensor], stats: r3patch.ReplayStats) -> None:
    """One line from each step, the stats of all stages merged."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (stats, [float(loss) for loss in losses]))
    if torch.distributed.get_rank() != 0:
        return
    merged = gathered[0][0].merge(*(other for other, _ in gathered[1:]))
    mean = [loss for _, values in gathered for loss in values]
    main, mtp = merged.total("main"), merged.total("mtp")
    print(
        f"step {step}  loss {sum(mean) / len(mean):.4f}  replayed {main.rows_replayed} rows, "
        f"{main.mismatch:.1%} otherwise than live  mtp {mtp.rows_live} rows left alone",
        flush=True,
    )


if __name__ == "__main__":
    args = arguments()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    context = (
        testing.megatron_on_cpu(tensor=args.tp, pipeline=args.pp, expert=args.ep)
        if args.device == "cpu"
        else on_gpus(args.tp, args.pp, args.ep)
    )
    with context:
        train(args)
