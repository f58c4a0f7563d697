"""docs/engine-to-step.md, run block by block: recorded answers of vLLM, stock Megatron."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import recorded
import torch
from oracle import batch

import r3patch
from r3patch import testing

PAGE = Path(__file__).parents[2] / "docs" / "engine-to-step.md"

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


def blocks(page: Path) -> Iterator[str]:
    """The Python blocks, each below as many empty lines as stand above it in the page."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("checkpoints"), "qwen3_moe")


@pytest.fixture
def given(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """What the page says is yours: the model is the one that answered, with an MTP head."""
    (model,) = testing.load_hf(checkpoint, mtp_num_layers=1)
    asked = [recorded.exchanges(case)[0]["request"] for case in ("n=2", "multi-turn")]
    logged: list[dict[str, float]] = []
    scalars: dict[str, float] = {}
    with recorded.server() as server:
        yield {
            "server": server,
            "prompts": [*(request["prompt"] for request in asked), list(range(9))],
            "model": model,
            "config": model.config,
            "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
            "step": 7,
            "policy_loss": lambda logprobs, tokens: (-logprobs.mean(), {}),
            "wandb": types.SimpleNamespace(log=lambda figures, step: logged.append(figures)),
            "writer": types.SimpleNamespace(add_scalar=lambda n, v, step: scalars.update({n: v})),
            "logged": logged,
            "scalars": scalars,
        }


def tokens_of(choice: dict[str, Any]) -> int:
    return len(choice["prompt_token_ids"]) + len(choice["token_ids"])


def test_the_page_runs_from_engine_to_optimizer_step(given: dict[str, Any]) -> None:
    """Every block, in order; R3 replayed the rows that vLLM sent, and R2 every real token."""
    before = [parameter.detach().clone() for parameter in given["model"].parameters()]
    count = 0
    for block in blocks(PAGE):
        exec(compile(block, str(PAGE), "exec"), given)
        count += 1
    assert count >= 7
    # R3: n tokens with n - 1 rows, in 4 layers, of 2 microbatches of 2 x 64 tokens.
    lengths = [tokens_of(given[name]) for name in ("first", "second", "next_turn")]
    (figures,) = given["logged"]
    assert figures["r3/rows_replayed"] == (sum(lengths) - 3) * 4
    assert figures["r3/rows_live"] == (4 * 64 - sum(lengths) + 3) * 4
    assert (figures["r3/mtp_rows_replayed"], figures["r3/mtp_rows_live"]) == (0, 4 * 64)
    assert given["scalars"].keys() == figures.keys()
    # R2: the last token and the aborted sample have rows of the trainer's own.
    assert given["session"].stats.total("main").rows_replayed == (sum(lengths) + 9) * 4
    changed = [
        not torch.equal(a, b) for a, b in zip(before, given["model"].parameters(), strict=True)
    ]
    assert any(changed)


def test_the_rows_of_both_turns_are_the_models_own(given: dict[str, Any]) -> None:
    """Joined they leave no token but the last without rows, and none differs from a live pass."""
    for block in list(blocks(PAGE))[:3]:
        exec(compile(block, str(PAGE), "exec"), given)
    samples, model = given["samples"], given["model"]
    turn, following = given["turn"], given["next_turn"]
    assert tokens_of(turn) < samples[2].num_tokens == tokens_of(following)
    assert samples[2].invalid_rows == 4
    assert samples[3].invalid_rows == 9 * 4
    ids = given["ids"][2].unsqueeze(0)
    with r3patch.record(model) as live, torch.no_grad():
        model(**batch(ids))
    found = r3patch.metrics.route_mismatch(samples[2], live.routes[0])
    assert sum(found.rows) == 4 * (samples[2].num_tokens - 1)
    assert sum(found.rows_differing) == 0
