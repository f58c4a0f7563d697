"""R3 from vLLM's HTTP server to trainers under Ray: a controller sends each rank its own rows.

    vllm serve DIRECTORY --served-model-name tiny --enable-return-routed-experts ...
    python examples/vllm_to_ray.py --url http://127.0.0.1:8000 --checkpoint DIRECTORY

DIRECTORY is a checkpoint of `r3patch.testing.load_hf`; tools/engine/checkpoints.py makes tiny ones.
The trainers run stock Megatron on CPUs over gloo. The optimizer's step is left out, and with it
the weights' way back to the engine: what it sends stays the model's own choice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

import r3patch  # before the model is built
from r3patch import Routes, testing

LENGTH = 64  # of a padded sample
PER_MICROBATCH = 2
TIMEOUT = 300  # seconds, of each answer of the engine and of the trainers
PROMPTS = [list(range(3, 43)), list(range(60, 85)), list(range(9))]  # yours: a batch of ids


class Sample(NamedTuple):
    """A sequence with its routes, which know its tokens."""

    routes: Routes
    log_probs: list[float]  # by the engine, nan where it sampled nothing


class Part(NamedTuple):
    """What a trainer needs of a batch."""

    dp_rank: int
    layers: list[int]
    layout: r3patch.Layout


# The controller


def ask(url: str, prompt: list[int], **sampling: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 1.0}
    body |= {"logprobs": 1, "return_token_ids": True, **sampling}
    headers = {"Content-Type": "application/json"}
    address, data = f"{url}/v1/completions", json.dumps(body).encode()
    request = urllib.request.Request(address, data, headers)  # noqa: S310  # the user's own server
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
        choices: list[dict[str, Any]] = json.load(answer)["choices"]
    return choices


def seen(choice: dict[str, Any]) -> list[int]:
    ids: list[int] = choice["prompt_token_ids"] + choice["token_ids"]
    return ids


def sampled(choice: dict[str, Any]) -> list[float]:
    log_probs: list[float] = choice["logprobs"]["token_logprobs"]
    return log_probs


def roll_out(url: str, config: dict[str, Any]) -> list[Sample]:
    """Two answers to a prompt, a sample of two turns, and one that was aborted."""
    first, second = ask(url, PROMPTS[0], n=2)
    (turn,) = ask(url, PROMPTS[1], stop=["w1"])
    history = seen(turn)
    (following,) = ask(url, history, routed_experts_prompt_start=len(history) - 1)
    routes = r3patch.decode_batch(
        [first, second, [turn, following], None],
        tokens=[seen(first), seen(second), [history, seen(following)], PROMPTS[2]],
        start=[0, 0, [0, len(history) - 1], 0],
        config=config,
        keep="first",
    )
    responses = [sampled(first), sampled(second), sampled(turn) + sampled(following), []]
    return [
        Sample(routed, [math.nan] * (routed.num_tokens - len(response)) + response)
        for routed, response in zip(routes, responses, strict=True)
    ]


def padded(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """What ``GPTModel.forward`` takes, and ``engine``: its log-probabilities of the labels."""
    tokens = torch.zeros(len(samples), LENGTH, dtype=torch.long)
    engine = torch.full((len(samples), LENGTH), math.nan)
    for number, (routes, log_probs) in enumerate(samples):
        assert routes.tokens is not None  # decoded with them
        tokens[number, : routes.num_tokens] = routes.tokens
        engine[number, : routes.num_tokens - 1] = torch.tensor(log_probs[1:])
    return {
        "input_ids": tokens,
        "labels": tokens.roll(-1, dims=1),
        "position_ids": torch.arange(LENGTH).expand_as(tokens),
        "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1),
        "engine": engine,
    }


def control(args: argparse.Namespace) -> None:
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    sizes = {"tensor": args.tp, "pipeline": args.pp}
    ranks = args.tp * args.pp * args.dp
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    actor: Any = ray.remote(num_cpus=1)(Trainer)
    trainers = [actor.remote(r, ranks, port, args.checkpoint, sizes) for r in range(ranks)]
    parts: list[Part] = ray.get([t.part.remote() for t in trainers], timeout=TIMEOUT)
    for step in range(args.steps):
        samples = roll_out(args.url, config)
        answers = []
        for trainer, part in zip(trainers, parts, strict=True):
            own = samples[part.dp_rank :: args.dp]
            microbatches = [own[n : n + PER_MICROBATCH] for n in range(0, len(own), PER_MICROBATCH)]
            rows = [
                part.layout.place([sample.routes.select(part.layers) for sample in microbatch])
                for microbatch in microbatches
            ]
            answers.append(trainer.step.remote(step, list(map(padded, microbatches)), rows))
        show(step, ray.get(answers, timeout=TIMEOUT))


def show(step: int, answers: list[tuple[r3patch.ReplayStats, r3patch.metrics.PolicyGap]]) -> None:
    """One line: the figures of all ranks."""
    stats = answers[0][0].merge(*(other for other, _ in answers[1:]))
    gap = answers[0][1].merge(*(other for _, other in answers[1:]))
    main, mtp = stats.total("main"), stats.total("mtp")
    print(
        f"step {step}  {main.rows_replayed} rows replayed, {main.rows_differing} otherwise than "
        f"live  mtp {mtp.rows_replayed}  log-probs differ by at most {gap.max_abs:.0e}",
        flush=True,
    )


# A rank


class Trainer:
    """One rank of Megatron."""

    def __init__(
        self, rank: int, ranks: int, port: int, checkpoint: Path, sizes: dict[str, int]
    ) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.cpu = testing.megatron_on_cpu(**sizes)  # yours: initialize_megatron
        self.cpu.__enter__()
        self.chunks = testing.load_hf(checkpoint, mtp_num_layers=1)  # yours: get_model
        self.gap = r3patch.metrics.PolicyGap()

    def part(self) -> Part:
        from megatron.core import parallel_state

        layers = [info.layer_number or 0 for info in r3patch.routers(self.chunks, "main")]
        config: Any = self.chunks[0].config
        layout = r3patch.Layout.from_megatron(config, packed=False, seq_length=LENGTH)
        return Part(parallel_state.get_data_parallel_rank(), layers, layout)

    def step(
        self, number: int, batches: list[dict[str, torch.Tensor]], rows: list[Routes]
    ) -> tuple[r3patch.ReplayStats, r3patch.metrics.PolicyGap]:
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        self.gap = r3patch.metrics.PolicyGap()
        with r3patch.replay(self.chunks, rows, measure=True, step=number) as session:
            get_forward_backward_func()(
                forward_step_func=self.forward_step,
                data_iterator=iter(batches),
                model=self.chunks[0],
                num_microbatches=len(batches),
                seq_length=LENGTH,
                micro_batch_size=PER_MICROBATCH,
                forward_only=False,
            )
        self.chunks[0].zero_grad()  # yours: the optimizer's step
        return session.stats, self.gap

    def forward_step(self, data: Any, model: Any) -> Any:
        batch = dict(next(data))
        engine = batch.pop("engine")
        return model(**batch), lambda losses: self.loss(-losses, engine)

    def loss(self, log_probs: torch.Tensor, engine: torch.Tensor) -> Any:
        """The ratio of the policies where the engine sampled, every advantage 1."""
        sampled = ~engine.isnan()
        log_probs, engine = log_probs[sampled], engine[sampled]
        gap = r3patch.metrics.policy_gap(log_probs.detach(), engine)
        self.gap = self.gap.merge(gap)
        return -(log_probs - engine).exp().mean(), {}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True, help="of vLLM's server")
    parser.add_argument("--checkpoint", type=Path, required=True, help="what it serves")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=2, help="pipeline-parallel ranks")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--steps", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    variables = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    ray.init(
        num_cpus=args.tp * args.pp * args.dp,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    try:
        control(args)
    finally:
        ray.shutdown()
