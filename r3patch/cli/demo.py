"""``r3patch demo``: what replay closes, and what it breaks in an MTP layer that it reaches.

A GLM-4.7-Flash-shaped model is trained on English text. A bf16 copy plays the rollout engine: it
routes held-out text, and what it chose is recorded. Then one policy step in fp32 on that text,
three times from the same weights: without replay, with replay, and with replay whose decoder rows
also reach the MTP router, as they do where routers carry no label.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from r3patch import _config
from r3patch.cli._terminal import console, paragraph, table

LENGTH = 128  # tokens per sample; a token is a byte of text
BATCH = 4  # samples per microbatch
MICROBATCHES = 6
WAYS = ("no replay", "replay", "replay, MTP too")


@dataclass(frozen=True)
class Step:
    """The figures of one policy step, by the names of the table's rows, and its MTP gradients."""

    figures: dict[str, float]
    mtp_gradient: Any  # [num_mtp_parameters] fp32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=100, help="training steps (100)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument(
        "-o", "--output", default="r3patch-demo.html", metavar="FILE", help="the report of replay"
    )


def run(args: argparse.Namespace) -> int:
    out = console()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jit_fuser wants a C++ compiler
    warnings.filterwarnings("ignore")  # Megatron's, about kernels that a CPU has no use for
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import megatron.core  # noqa: F401  (what is missing is told before the training, not after)
    import torch

    from r3patch import testing
    from r3patch.cli import report
    from r3patch.observe import history as histories

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, testing.megatron_on_cpu():
        trace = Path(folder, "demo.jsonl")
        steps = _experiment(args, out, trace)
        out.print(_table(steps))
        out.print(paragraph(_reading(steps)))
        history = histories.load([str(trace)])
        about = (
            f"Each step on this page is one of the {MICROBATCHES} microbatches of a single policy "
            "step."
        )
        page = report.page(history, "r3patch demo: one policy step", about)
        Path(args.output).write_text(page, encoding="utf-8")
    out.print(paragraph(f"{args.output} is the report of the second column."))
    return 0


def _experiment(args: argparse.Namespace, out: Console, trace: Path) -> dict[str, Step]:
    """Train, roll out, and take the policy step in each way; replay writes a trace."""
    with Progress(console=out, transient=True) as progress:
        train, held_out = _texts(args.seed)
        model = _model(args.seed)
        _train(model, train, progress.track(range(args.steps), description="training"))
        batches = [next(held_out) for _ in range(MICROBATCHES)]
        rollout = _rollout(model, progress.track(batches, description="rollout in bf16"))
        steps = {}
        for way in progress.track(WAYS, description="policy step, three ways"):
            traced = _config.override(trace=str(trace)) if way == WAYS[1] else nullcontext()
            with traced:
                steps[way] = _policy_step(model, batches, rollout, way)
    return steps


def _texts(seed: int) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Endless batches of CPython's help texts: from their first nine tenths, and from the last."""
    from pydoc_data.topics import topics

    import torch

    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
    cut = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(seed)

    def batches(part: Any) -> Iterator[dict[str, Any]]:
        while True:
            starts = torch.randint(len(part) - LENGTH, (BATCH, 1), generator=generator)
            tokens = part[starts + torch.arange(LENGTH + 1)].long()
            yield {
                "input_ids": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
                "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1),
            }

    return batches(text[:cut]), batches(text[cut:])


def _model(seed: int, **overrides: Any) -> Any:
    import torch

    from r3patch import testing

    torch.manual_seed(seed)
    sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "moe_ffn_hidden_size": 32}
    (model,) = testing.tiny_model("glm47_flash", **sizes, **overrides)
    return model.train()


def _train(model: Any, batches: Iterator[dict[str, Any]], steps: Iterable[int]) -> None:
    import torch
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in steps:
        optimizer.zero_grad()
        model(**next(batches)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _update_router_expert_bias([model], model.config)


def _rollout(model: Any, batches: Iterable[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """What a bf16 copy chose, and its log-probs ``[BATCH, LENGTH]``, for each microbatch."""
    import torch

    import r3patch

    engine = _model(0, bf16=True, params_dtype=torch.bfloat16)
    engine.load_state_dict(model.state_dict())
    with torch.no_grad(), r3patch.record(engine) as recording:
        logprobs = [-engine(**batch).float() for batch in batches]
    return recording.routes, logprobs


def _policy_step(
    model: Any, batches: list[Any], rollout: tuple[list[Any], list[Any]], way: str
) -> Step:
    """Forward and backward of one policy-gradient step over all microbatches, in one of `WAYS`."""
    import torch

    from r3patch.metrics import PolicyGap, policy_gap

    routes, rollout_logprobs = rollout
    generator = torch.Generator().manual_seed(1)
    gap = PolicyGap()
    model.zero_grad()
    _mtp_losses().zero_()
    with _routed(model) as trained:
        for index, batch in enumerate(batches):
            advantages = torch.randn(BATCH, 1, generator=generator)
            with _session(model, routes[index], index, way) as session:
                logprobs = -model(**batch)
                ratio = (logprobs - rollout_logprobs[index]).exp()
                (-(ratio * advantages).mean() / len(batches)).backward()
                part = policy_gap(logprobs, rollout_logprobs[index])
                if session is not None:
                    session.note(**part.as_dict())
            gap = gap.merge(part)
    mismatch = _mismatch(trained, routes)
    figures = {
        "rows trained unlike the rollout": mismatch.mismatch,
        "tokens with such a row": mismatch.token_mismatch,
        "mean |delta log-prob|": gap.mean_abs,
        "k3 KL": gap.k3,
        "tokens off by a factor > 2": gap.above_2,
        "MTP loss": float(_mtp_losses()[0]) / len(batches),
    }
    gradients = [
        p.grad.flatten() for name, p in model.named_parameters() if name.startswith("mtp.")
    ]
    return Step(figures, torch.cat(gradients))


@contextmanager
def _session(model: Any, routes: Any, index: int, way: str) -> Iterator[Any]:
    """A microbatch's session in one of `WAYS`; measured, so that the report has what to show."""
    import r3patch

    if way == WAYS[0]:
        yield None
        return
    with (
        r3patch.replay(model, [routes], measure=True, step=index) as session,
        _reach_mtp(model, routes) if way == WAYS[2] else nullcontext(),
    ):
        yield session


@contextmanager
def _routed(model: Any) -> Iterator[dict[int, list[Any]]]:
    """Collects what main routers really do: by layer number a routing map per microbatch."""
    import r3patch

    maps: dict[int, list[Any]] = {}
    handles = []
    for info in r3patch.routers(model, "main"):
        calls = maps.setdefault(info.layer_number or 0, [])
        note = lambda module, args, output, calls=calls: calls.append(output[1].detach())  # noqa: E731
        handles.append(info.module.register_forward_hook(note))
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _reach_mtp(model: Any, routes: Any) -> Iterator[None]:
    """Give the MTP router the rows of the first MoE layer, as replay without labels does.

    From Megatron 0.17 on MTP layer 1 and decoder layer 1 have the same layer number. The replay is
    Megatron's own `RouterReplay`.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    import r3patch

    (info,) = r3patch.routers(model, "mtp")
    native, tap = RouterReplay(), info.module.router_replay
    RouterReplay.global_router_replay_instances.remove(native)
    native.set_target_indices(routes.experts[:, 0].long())
    native.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    info.module.router_replay = native
    try:
        yield
    finally:
        info.module.router_replay = tap


def _mismatch(maps: dict[int, list[Any]], rollout: list[Any]) -> Any:
    """Routing maps against the rollout's routes, over all microbatches."""
    import torch

    from r3patch import Routes
    from r3patch.metrics import route_mismatch

    parts = []
    for index, routes in enumerate(rollout):
        columns = [
            maps[layer][index].nonzero()[:, 1].view(-1, routes.topk) for layer in routes.layers
        ]
        trained = Routes(torch.stack(columns, 1), routes.layers, num_experts=routes.num_experts)
        parts.append(route_mismatch(trained, routes))
    return parts[0].merge(*parts[1:])


def _mtp_losses() -> Any:
    """Megatron's own sum of MTP losses, ``[mtp_num_layers]``; the key changed with 0.19."""
    import torch
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = MTPLossLoggingHelper.tracker
    return tracker.get("loss_values", tracker.get("values", torch.zeros(1)))


def _distance(a: Any, b: Any) -> float:
    """Relative distance of two gradients."""
    return float((a - b).norm() / b.norm())


def _table(steps: dict[str, Step]) -> Any:
    rows = [
        (name, *(_number(name, steps[way].figures[name]) for way in WAYS))
        for name in steps[WAYS[0]].figures
    ]
    contaminated = _distance(steps[WAYS[2]].mtp_gradient, steps[WAYS[1]].mtp_gradient)
    rows.append(("MTP gradients, distance from replay", "", "0", f"{contaminated:.3f}"))
    return table("One policy step on the same weights and text", ("", *WAYS), rows)


def _number(name: str, value: float) -> str:
    if "row" in name or "factor" in name:
        return f"{value:.2%}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.4f}"


def _reading(steps: dict[str, Step]) -> str:
    """What the table says, in words made from its numbers."""
    plain, replay, leaked = (steps[way].figures for way in WAYS)
    gap = "mean |delta log-prob|"
    return (
        f"Replay takes {gap} from {plain[gap]:.3g} to {replay[gap]:.3g}: the trainer uses the "
        "experts that the rollout chose. Where replay reaches the MTP router too, the main figures "
        f"do not show it; the MTP loss goes from {replay['MTP loss']:.4f} to "
        f"{leaked['MTP loss']:.4f}, and its gradients are "
        f"{_distance(steps[WAYS[2]].mtp_gradient, steps[WAYS[1]].mtp_gradient):.0%} of their own "
        "length away from what they should be."
    )
