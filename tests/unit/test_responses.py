"""Whole responses and real payloads: what comes over the wire goes into decode as it is."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import FORMATS, make, prompt_and_generation

from r3patch import RoutesError, decode

DATA = Path(__file__).parents[1] / "data" / "vllm"
# The checkpoint behind the payloads: tests/data/vllm/README.md.
QWEN3 = SimpleNamespace(num_hidden_layers=4, num_experts=16, num_experts_per_tok=4)


def http(name: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((DATA / f"vllm0.30.0_http_{name}.json").read_text())
    return answer


def tokens_of(choice: dict[str, Any]) -> list[int]:
    ids: list[int] = choice["prompt_token_ids"] + choice["token_ids"]
    return ids


# Real payloads


@pytest.mark.parametrize("name", ["0_batch", "11_pstart10", "15_stop_token", "16_one-token"])
def test_what_vllm_returned_is_what_transformers_routed(name: str) -> None:
    """fp32: every row's set of experts is that of the same tokens by transformers."""
    about = json.loads((DATA / f"vllm0.30.0_qwen3_fp32_{name}.json").read_text())
    start = about["routed_experts_prompt_start"]
    ids = about["prompt"] + about["output"]
    payload = np.load(DATA / f"vllm0.30.0_qwen3_fp32_{name}.npy")
    routes = decode(payload, tokens=ids, config=QWEN3, start=start)
    truth = torch.tensor(about["true_routes_hf_fp32"]).sort(-1).values
    assert routes.mask.all(1).tolist() == [start <= i < len(ids) - 1 for i in range(len(ids))]
    rows = slice(start, len(ids) - 1)
    assert routes.experts[rows].sort(-1).values.tolist() == truth[rows].tolist()


@pytest.mark.parametrize("name", ["completion", "stop_string", "prompt_start"])
def test_a_whole_http_response_is_taken(name: str) -> None:
    """The body with one choice, or the choice, gives the same routes."""
    answer = http(name)
    [choice] = answer["response"]["choices"]
    start = answer["request"].get("routed_experts_prompt_start", 0)
    ids = tokens_of(choice)
    routes = decode(answer["response"], tokens=ids, config=QWEN3, start=start)
    assert routes == decode(choice, tokens=ids, config=QWEN3, start=start)
    assert routes == decode(choice["routed_experts"], tokens=ids, config=QWEN3, start=start)
    assert int(routes.mask.all(1).sum()) == len(ids) - 1 - start


def test_every_choice_of_n_is_a_sample_of_its_own() -> None:
    """A body of two choices is refused with the key to pass; each choice has the whole prompt."""
    body = http("n2")["response"]
    with pytest.raises(RoutesError, match=r'has 2 choices.*response\["choices"\]\[i\]'):
        decode(body, tokens=tokens_of(body["choices"][0]), config=QWEN3)
    first, second = (decode(c, tokens=tokens_of(c), config=QWEN3) for c in body["choices"])
    assert first[:39].experts.tolist() == second[:39].experts.tolist()
    assert first != second


def test_a_stream_and_json_text_are_named() -> None:
    """What is no payload yet says what to do."""
    text = (DATA / "vllm0.30.0_http_stream.txt").read_text()
    with pytest.raises(RoutesError, match="a stream carries no routes"):
        decode(text, num_tokens=56, config=QWEN3)
    body = http("completion")["response"]
    with pytest.raises(RoutesError, match=r"is JSON text: pass json\.loads\(text\)"):
        decode(json.dumps(body), num_tokens=56, config=QWEN3)
    with pytest.raises(RoutesError, match=r"a list of 1 payloads or responses: decode each"):
        decode([body], num_tokens=56, config=QWEN3)
    for chunk in (c.removeprefix("data: ") for c in text.split("\n\n")[:2]):
        with pytest.raises(RoutesError, match=r"has no routes.*--enable-return-routed-experts"):
            decode(json.loads(chunk), num_tokens=56, config=QWEN3)


# Responses of other engines


RESPONSES: dict[str, Any] = {
    "SGLang /generate": lambda s: {
        "text": "", "output_ids": [1], "meta_info": {"routed_experts": FORMATS["sglang"](s)}
    },
    "SGLang chat": lambda s: {
        "choices": [{"message": {}}], "sglext": {"routed_experts": FORMATS["sglang"](s)}
    },
    "SGLang choice": lambda s: {
        "message": {}, "meta_info": {"routed_experts": FORMATS["sglang"](s)}
    },
    "SGLang choice in its body": lambda s: {
        "choices": [{"message": {}, "sgl_ext": {"routed_experts": FORMATS["sglang"](s)}}]
    },
    "vLLM 0.21 body": lambda s: {
        "prompt_routed_experts": prompt_and_generation(s)[0].tolist(),
        "choices": [{"routed_experts": prompt_and_generation(s)[1].tolist()}],
    },
    "Megatron choice": lambda s: {
        "moe_topk_indices": s.rows.tolist(), "prompt_moe_topk_indices": s.rows[:2].tolist()
    },
    "Megatron body": lambda s: {"choices": [{"moe_topk_indices": s.rows.tolist()}]},
}  # fmt: skip


@pytest.mark.parametrize("build", RESPONSES.values(), ids=RESPONSES.keys())
def test_responses_of_other_engines_are_taken(build: Any) -> None:
    """Wherever the engine keeps the routes in its answer."""
    sample = make()
    assert decode(build(sample), **sample.sizes) == sample.routes


def test_sglang_routes_of_several_choices_are_refused() -> None:
    """SGLang returns the first choice's routes only; they are not taken for another's."""
    sample = make()
    body = RESPONSES["SGLang chat"](sample)
    body["choices"] *= 2
    with pytest.raises(RoutesError, match=r'of the first only: response\["sglext"\]'):
        decode(body, **sample.sizes)
    assert decode(body["sglext"], **sample.sizes) == sample.routes


def test_routes_that_were_not_asked_for_are_missed() -> None:
    """An aborted choice has the key without routes, one without the flag has no key."""
    sample = make()
    with pytest.raises(RoutesError, match="the engine returned no routes"):
        decode({"choices": [{"routed_experts": None}]}, **sample.sizes)
    with pytest.raises(RoutesError, match="return_routed_experts in the request"):
        decode({"text": "", "meta_info": {"id": 1}}, **sample.sizes)


@pytest.mark.parametrize("name", ["sglang", "vllm narrow npy"])
def test_base64_encoded_twice_is_named(name: str) -> None:
    """As JSON encoders that take bytes make it."""
    sample = make()
    twice = base64.b64encode(FORMATS[name](sample).encode()).decode()
    with pytest.raises(RoutesError, match="base64 of base64"):
        decode(twice, **sample.sizes)


# Likely causes of a wrong number of rows


@pytest.mark.parametrize(
    ("num_tokens", "changes", "hint"),
    [
        (10, {"num_layers": 3}, "With num_layers=9 it would fit"),
        (6, {}, "With 10 tokens it would fit: prompt and response count together"),
        (14, {}, "With start=4 it would fit: did the request ask for that"),
    ],
)
def test_what_would_fit_is_named(num_tokens: int, changes: dict[str, int], hint: str) -> None:
    """A wrong num_layers, the response's length alone, a start that was not passed on."""
    sample = make(num_tokens=10, num_layers=9, moe_layers=(1,), topk=4)
    sizes = sample.sizes | {"num_tokens": num_tokens, "moe_layers": None} | changes
    with pytest.raises(RoutesError, match=hint):
        decode(FORMATS["sglang"](sample), **sizes)


# config


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(
            num_layers=4, num_moe_experts=20, moe_router_topk=3, moe_layer_freq=[0, 1, 0, 1]
        ),
        {"num_hidden_layers": 4, "num_experts": 20, "num_experts_per_tok": 3}
        | {"decoder_sparse_step": 2},
        {"text_config": {"num_hidden_layers": 4, "n_routed_experts": 20, "moe_topk": 3}
         | {"mlp_layer_types": ["dense", "sparse"] * 2}},
    ],
)  # fmt: skip
def test_the_sizes_come_from_a_config(config: Any) -> None:
    """Megatron's, a config.json, a composite one: the same four sizes."""
    sample = make()
    assert decode(FORMATS["sglang"](sample), num_tokens=5, config=config) == sample.routes
    given = decode(FORMATS["sglang"](sample), num_tokens=5, config=config, moe_layers=(4,))
    assert given == sample.routes.select((4,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_experts is not given: give it, or config="),
        ({"num_experts": 8, "topk": 2}, "num_layers is not given"),
        ({"config": {"num_hidden_layers": 4}}, "config: dict is of a model without MoE layers"),
        (
            {"config": {"num_hidden_layers": 4, "num_experts": 8}},
            "config: dict says topk=None, expected an int",
        ),
        (
            {"config": {"num_hidden_layers": 4, "num_experts": [1, 8, 8, 4], "moe_topk": 2}},
            r"config: dict says num_experts=\[1, 8, 8, 4\], expected an int",
        ),
        (
            {"config": SimpleNamespace(num_experts=8, moe_layers_enum="1,2", num_hidden_layers=4)},
            "config: .*moe_layers_enum='1,2'.* is not known here",
        ),
    ],
)
def test_a_config_that_does_not_say_it_is_refused(arguments: dict[str, Any], message: str) -> None:
    """Which size is missing, and where from."""
    with pytest.raises(RoutesError, match=rf"^s7: {message}"):
        decode("", num_tokens=1, **arguments, name="s7")
