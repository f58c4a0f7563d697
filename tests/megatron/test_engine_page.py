"""docs/engine-to-step.md, run block by block: real answers of vLLM, stock Megatron."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import r3patch
from r3patch import testing

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "engine-to-step.md"
ANSWERS = ROOT / "tests" / "data" / "vllm"

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


def blocks(page: Path) -> Iterator[str]:
    """The Python blocks, each below as many empty lines as stand above it in the page."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


def recorded(name: str) -> dict[str, Any]:
    text = (ANSWERS / f"vllm0.30.0_http_{name}.json").read_text(encoding="utf-8")
    exchange: dict[str, Any] = json.loads(text)
    return exchange


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What vLLM answered to the request; of a second turn, what it answered to the whole of it."""
    name = "n2" if request.get("n") == 2 else "stop_string" if "stop" in request else "completion"
    exchange = recorded(name)
    asked, response = exchange["request"], exchange["response"]
    start = request.pop("routed_experts_prompt_start", 0)
    if not start:
        assert {k: asked[k] for k in request} == request, "the page asks what nobody recorded"
        return dict(response)
    (choice,) = response["choices"]
    whole = choice["prompt_token_ids"] + choice["token_ids"]
    count = len(request["prompt"])
    assert request["prompt"] == whole[:count], "the history is not the recorded one"
    rows = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    file = io.BytesIO()
    np.save(file, rows[start:])
    turn = {
        **choice,
        "prompt_token_ids": whole[:count],
        "token_ids": whole[count:],
        "routed_experts": base64.b64encode(file.getvalue()).decode(),
    }
    return {**response, "choices": [turn]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(answer(request)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture
def given(server: str) -> dict[str, Any]:
    """What the page says is yours."""
    (model,) = testing.tiny_model(
        "qwen3_moe",
        num_layers=4,
        moe_layer_freq=[1, 1, 1, 1],
        num_moe_experts=16,
        moe_router_topk=4,
        vocab_size=512,
    )
    prompt = recorded("completion")["request"]["prompt"]
    logged: list[dict[str, float]] = []
    scalars: dict[str, float] = {}
    return {
        "server": server,
        "prompts": [prompt, prompt, prompt[:9]],
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


@pytest.mark.foreign_routes
def test_the_page_runs_from_engine_to_optimizer_step(given: dict[str, Any]) -> None:
    """Every block, in order; then R3 replayed the rows that vLLM sent, and R2 every real token."""
    before = [parameter.detach().clone() for parameter in given["model"].parameters()]
    count = 0
    for block in blocks(PAGE):
        exec(compile(block, str(PAGE), "exec"), given)
        count += 1
    assert count >= 7
    # R3: 56 tokens with 55 rows, three times, in 4 layers, of 2 microbatches of 2 x 64 tokens.
    (figures,) = given["logged"]
    assert figures["r3/rows_replayed"] == 3 * 55 * 4
    assert figures["r3/rows_live"] == (4 * 64 - 3 * 55) * 4
    assert (figures["r3/mtp_rows_replayed"], figures["r3/mtp_rows_live"]) == (0, 4 * 64)
    assert given["scalars"].keys() == figures.keys()
    # R2: the last token and the aborted sample have rows of the trainer's own.
    assert given["session"].stats.total("main").rows_replayed == (3 * 56 + 9) * 4
    changed = [
        not torch.equal(a, b) for a, b in zip(before, given["model"].parameters(), strict=True)
    ]
    assert any(changed)


def test_the_routes_of_the_page_are_those_of_one_undivided_answer(given: dict[str, Any]) -> None:
    """Two turns joined are the sample that the engine had answered at once."""
    for block in list(blocks(PAGE))[:3]:
        exec(compile(block, str(PAGE), "exec"), given)
    (choice,) = recorded("completion")["response"]["choices"]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    assert given["samples"][2] == r3patch.decode(choice, tokens=ids, config=given["config"])
    assert given["samples"][3].invalid_rows == 9 * 4
