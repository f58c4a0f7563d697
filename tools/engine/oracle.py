"""The engine as an oracle: its rows and log-probabilities against stock Megatron's, replayed.

`tests/megatron/test_engine.py` asks it about the payloads in tests/data/engine, and `make engine`
about fresh ones.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import r3patch
from r3patch import Routes, testing

FULL_RECOMPUTE: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BF16: dict[str, Any] = {
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16,
}
PER_MICROBATCH = 4


def batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ``GPTModel.forward`` takes for whole samples; the last token has no label."""
    count, length = tokens.shape
    return {
        "input_ids": tokens,
        "labels": torch.cat([tokens[:, 1:], tokens.new_zeros(count, 1)], dim=1),
        "position_ids": torch.arange(length).expand(count, length),
        "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).triu(1),
    }


@dataclass
class Rollout:
    """What `rollout.py` or `serve.py` wrote, decoded: samples, and the routes of each."""

    contents: dict[str, Any]
    samples: list[dict[str, Any]]  # of several turns the last
    routes: list[Routes]

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields of the trainer's config: the engine's precision, and an MTP head."""
        return {"mtp_num_layers": 1, **(BF16 if self.contents["dtype"] == "bfloat16" else {})}

    @property
    def length(self) -> int:
        longest = max(len(sample["tokens"]) for sample in self.samples)
        return -(-longest // 8) * 8

    def microbatches(self) -> Iterator[tuple[dict[str, torch.Tensor], list[Routes]]]:
        """Padded batches as ``GPTModel.forward`` takes them, and the routes of their samples."""
        count = PER_MICROBATCH
        for number in range(0, len(self.samples), count):
            samples = self.samples[number : number + count]
            tokens = torch.zeros(count, self.length, dtype=torch.long)
            for row, sample in zip(tokens, samples, strict=False):
                row[: len(sample["tokens"])] = torch.tensor(sample["tokens"])
            routes = self.routes[number : number + count]
            like = routes[0]
            empty = [Routes.missing(0, like.layers, like.topk, like.num_experts, tokens=[])]
            yield batch(tokens), routes + empty * (count - len(routes))

    def placed(self, config: Any) -> list[Routes]:
        """The routes of each microbatch on this rank."""
        layout = r3patch.Layout.from_megatron(config, packed=False, seq_length=self.length)
        return [layout.place(routes) for _, routes in self.microbatches()]

    def log_probs(self) -> torch.Tensor:
        """By the engine, of the tokens that it sampled, sample by sample."""
        return torch.tensor([x for sample in self.samples for x in sample["log_probs"]])

    def pick(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """The same tokens' out of what `GPTModel.forward` returned for each microbatch."""
        rows = itertools.chain.from_iterable(losses)
        found = [
            -row[sample["prompt"] - 1 : len(sample["tokens"]) - 1]
            for row, sample in zip(rows, self.samples, strict=False)
        ]
        return torch.cat(found).float()


def read(file: Path, config: Any) -> Rollout:
    """Decode what `rollout.py` or `serve.py` wrote.

    Args:
        file: the JSON.
        config: of the checkpoint, of Hugging Face or of Megatron.
    """
    contents = json.loads(file.read_text(encoding="utf-8"))
    samples = [sample for written in contents["samples"] for sample in _samples(written)]

    def each(name: str) -> list[Any]:
        return [
            [turn[name] for turn in sample["turns"]] if "turns" in sample else sample[name]
            for sample in samples
        ]

    routes = r3patch.decode_batch(
        each("payload"), tokens=each("tokens"), start=each("start"), config=config, keep="latest"
    )
    return Rollout(contents, [sample.get("turns", [sample])[-1] for sample in samples], routes)


def _samples(written: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a case: itself, or what the choices of an exchange over HTTP are."""
    if "turns" in written:
        turns = [sample for turn in written["turns"] for sample in _samples(turn)]
        yield {"case": written["case"], "turns": turns}
    elif "response" in written:
        for choice in written["response"]["choices"]:
            yield {"case": written.get("case"), **_sample(written, choice)}
    else:
        yield written


def _sample(exchange: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    said = choice["logprobs"]
    prompt = {**exchange["response"], **choice}["prompt_token_ids"]  # the chat's is in the body
    return {
        "tokens": prompt + choice["token_ids"],
        "prompt": len(prompt),
        "start": exchange["request"].get("routed_experts_prompt_start", 0),
        "payload": choice,
        "log_probs": said.get("token_logprobs") or [token["logprob"] for token in said["content"]],
    }


def read_for(file: Path, checkpoints: Path) -> tuple[Rollout, Path]:
    """The same, with the sizes from its checkpoint's own config, and the checkpoint."""
    model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    checkpoint = checkpoints / model_type
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return read(file, config), checkpoint


@dataclass
class Figures:
    """What was found, of one model in one precision."""

    routes: r3patch.metrics.RouteMismatch  # the engine's, and what the trainer alone chooses
    gap: r3patch.metrics.PolicyGap  # of the sampled tokens, without replay
    gap_replayed: r3patch.metrics.PolicyGap
    mtp_replayed: int
    rows_replayed: int


def compare(rollout: Rollout, chunks: list[torch.nn.Module]) -> Figures:
    """Forward without replay, and replayed, both without grad."""
    (model,) = chunks
    batches = [batch for batch, _ in rollout.microbatches()]
    placed = rollout.placed(model.config)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return rollout.pick([model(**batch) for batch in batches])

    with r3patch.record(chunks) as own:
        alone = forward()
    first, *rest = map(r3patch.metrics.route_mismatch, placed, own.routes)
    with r3patch.replay(chunks, placed) as session:
        replayed = forward()
    engine = rollout.log_probs()
    main, mtp = session.stats.total("main"), session.stats.total("mtp")
    return Figures(
        routes=first.merge(*rest),
        gap=r3patch.metrics.policy_gap(alone, engine),
        gap_replayed=r3patch.metrics.policy_gap(replayed, engine),
        mtp_replayed=mtp.rows_replayed,
        rows_replayed=main.rows_replayed,
    )


@dataclass
class Trained:
    """Of a forward and backward over all microbatches, replayed."""

    losses: list[float]
    main_replayed: int
    mtp_replayed: int
    rows_differing: int  # between the engine and the live choice under its rows
    recompute_calls: int
    rows_differing_in_recompute: int


def train(rollout: Rollout, chunks: list[torch.nn.Module]) -> Trained:
    """By Megatron's own schedule, whatever the parallel sizes; gradients are left in ``.grad``."""
    config: Any = chunks[0].config
    with r3patch.replay(chunks, rollout.placed(config), measure=True) as session:
        losses = testing.train_step(chunks, [batch for batch, _ in rollout.microbatches()])
    main, mtp = session.stats.total("main"), session.stats.total("mtp")
    return Trained(
        [float(loss) for loss in losses],
        main.rows_replayed,
        mtp.rows_replayed,
        main.rows_differing,
        main.recompute_calls,
        main.recompute_rows_differing,
    )


def train_a_rank(files: list[Path], checkpoints: Path, cut: dict[str, int]) -> list[Trained]:
    """What `testing.run_ranks` runs: each rollout under full recompute."""
    found = []
    with testing.megatron_on_cpu(**cut):
        for file in files:
            rollout, checkpoint = read_for(file, checkpoints)
            chunks = testing.load_hf(checkpoint, **rollout.overrides, **FULL_RECOMPUTE)
            found.append(train(rollout, chunks))
    return found


def assert_on_two_ranks(
    files: list[Path], checkpoints: Path, cut: dict[str, int], alone: list[Trained]
) -> None:
    """Under full recompute: losses of one process, the engine's rows, and none replayed in MTP.

    Args:
        files: what `rollout.py` wrote in fp32: in bf16, sums over ranks round otherwise.
        checkpoints: the folder of their checkpoints.
        cut: sizes for `testing.megatron_on_cpu`.
        alone: what one process found, by file.
    """
    ranks = testing.run_ranks(train_a_rank, files, checkpoints, cut, timeout=400)
    for whole, *parts in zip(alone, *ranks, strict=True):
        got, want = torch.tensor(parts[-1].losses), torch.tensor(whole.losses)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        for part in parts:
            assert part.main_replayed > 0
            assert part.mtp_replayed == 0
            assert part.rows_differing == 0
            assert part.rows_differing_in_recompute == 0
