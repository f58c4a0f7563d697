"""Answers of a real vLLM on tiny checkpoints: every way in which rows reach a sample.

    python tools/engine/rollout.py CHECKPOINTS PAYLOADS [NAME_DTYPE ...]    # with tools/engine.txt

Writes a JSON for each checkpoint and precision. A sample has ``tokens``, ``prompt`` (how many of
them), ``payload`` (base64 of the ``.npy`` that the engine's server would send, null where it has
none), ``start``, ``log_probs`` of the response's tokens; the turns of a multi-turn one are a list.
"""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the little that is compiled in spite of enforce_eager
}
os.environ |= ENVIRONMENT

#: Prompts are prefilled in pieces of 64 tokens, and twelve samples do not fit the cache.
ENGINE = {
    "enable_chunked_prefill": True,
    "enable_return_routed_experts": True,
    "enforce_eager": True,
    "max_model_len": 192,
    "max_num_batched_tokens": 64,
    "seed": 0,
}
BLOCK = {"qwen3_moe": 32, "glm4_moe": 32, "glm4_moe_lite": 16}  # of the CPU's attention kernels
MLA = {
    "attention_backend": "CPU_MLA",  # which every CPU has: with AMX another one would be taken
    # By PyTorch: the kernel takes MLA's [tokens, heads, d] for [batch, tokens, d] and turns others.
    "compilation_config": {"custom_ops": ["-rotary_embedding"]},
}
CACHE_TOKENS = 480

ENGINES = [f"{m}_{d}" for m in ("qwen3_moe", "glm4_moe_lite") for d in ("float32", "bfloat16")]


def main(directory: Path, payloads: Path, engines: list[str]) -> None:
    import vllm  # noqa: F401  # takes longer than an engine: the children have it

    payloads.mkdir(parents=True, exist_ok=True)
    for name in engines or ENGINES:
        model_type, dtype = name.rsplit("_", 1)
        checkpoint = checkpoints.write(directory, model_type)
        file = payloads / f"{name}.json"
        child = multiprocessing.get_context("fork").Process(
            target=roll_out, args=(checkpoint, dtype, file)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"the engine {name} ended with status {child.exitcode}")
        print(file, flush=True)


def roll_out(checkpoint: Path, dtype: str, file: Path) -> None:
    import vllm

    block = BLOCK[checkpoint.name]
    llm = vllm.LLM(
        str(checkpoint),
        dtype=dtype,
        skip_tokenizer_init=True,
        block_size=block,
        num_gpu_blocks_override=CACHE_TOKENS // block,
        **(MLA if checkpoint.name == "glm4_moe_lite" else {}),
        disable_log_stats=False,
        **ENGINE,
    )
    # vLLM turns these off for MLA on a CPU, whatever it was asked (platforms/cpu.py).
    config = llm.llm_engine.vllm_config
    able = {
        "chunked prefill": config.scheduler_config.enable_chunked_prefill,
        "prefix-cache hit": config.cache_config.enable_prefix_caching,
    }
    samples = [sample for sample in cases(Engine(llm)) if able.get(sample["case"], True)]
    counts = {metric.name: metric for metric in llm.get_metrics()}
    preempted = counts["vllm:num_preemptions"].value
    hits = counts["vllm:prefix_cache_hits"].value
    assert preempted, "the case `preemption` preempted nothing"
    assert bool(hits) == able["prefix-cache hit"], f"{hits} tokens were in the prefix cache"
    contents = {
        "vllm": vllm.__version__,
        "model_type": checkpoint.name,
        "dtype": dtype,
        "fingerprint": checkpoints.fingerprint(checkpoint),
        "preempted": preempted,
        "cached": hits,
        "unable": [case for case, is_able in able.items() if not is_able],
        "samples": samples,
    }
    file.write_text(json.dumps(contents) + "\n", encoding="utf-8")


def cases(engine: Engine) -> list[dict[str, Any]]:
    shared = prompt(70)  # whole blocks and a part of one
    single = engine.generate(
        *(("batch", prompt(length), {}) for length in (9, 33, 21)),
        ("n=2", prompt(12), {"n": 2}),
        ("prompt start", prompt(30), {"routed_experts_prompt_start": 10}),
        ("prompt start at its end", prompt(30), {"routed_experts_prompt_start": 30}),
        ("one-token prompt", prompt(1), {}),
        ("one-token response", prompt(12), {"max_tokens": 1}),
        ("chunked prefill", prompt(150), {}),
    )
    before, turn = engine.generate(
        ("before the prefix is cached", shared, {}), ("multi-turn", prompt(40), {})
    )
    hit, next_turn = engine.generate(
        ("prefix-cache hit", shared + prompt(5), {}),
        ("multi-turn", turn["tokens"] + prompt(7), {}),
    )
    return [
        *single,
        before,
        hit,
        {"case": "multi-turn", "turns": [turn, next_turn]},
        *engine.generate(*(("preemption", prompt(28), {"max_tokens": 12}) for _ in range(12))),
        engine.aborted("abort", prompt(20)),
    ]


class Engine:
    """Requests by token ids, answers as samples."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def generate(self, *requests: tuple[str, list[int], dict[str, Any]]) -> list[dict[str, Any]]:
        """Case, prompt and sampling parameters of each, in one batch."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for _, ids, _ in requests],
            [self._params(**params) for _, _, params in requests],
            use_tqdm=False,
        )
        return [
            {
                "case": case,
                "tokens": [*output.prompt_token_ids, *answer.token_ids],
                "prompt": len(output.prompt_token_ids),
                "start": params.get("routed_experts_prompt_start", 0),
                "payload": as_npy(answer.routed_experts),
                "log_probs": [
                    round(steps[token].logprob, 6)
                    for token, steps in zip(answer.token_ids, answer.logprobs, strict=True)
                ],
            }
            for (case, _, params), output in zip(requests, outputs, strict=True)
            for answer in output.outputs
        ]

    def aborted(self, case: str, ids: list[int]) -> dict[str, Any]:
        """Stopped after three tokens: what the engine has said by then."""
        core = self.llm.llm_engine
        name = core.add_request("aborted", {"prompt_token_ids": ids}, self._params(max_tokens=50))
        for _ in range(3):
            (output,) = core.step()
        core.abort_request([name or "aborted"], internal=bool(name))
        while core.has_unfinished_requests():
            core.step()
        tokens = [*ids, *output.outputs[0].token_ids]
        payload = as_npy(output.outputs[0].routed_experts)
        return {
            "case": case,
            "tokens": tokens,
            "prompt": len(tokens),  # no token that a trainer would count
            "start": 0,
            "payload": payload,
            "log_probs": [],
        }

    def _params(self, **params: Any) -> Any:
        from vllm import SamplingParams

        # No seed: with one, a prefill in pieces fails on a CPU ("does not use offset").
        common = {"max_tokens": 8, "temperature": 1.0, "logprobs": 0, "ignore_eos": True}
        return SamplingParams(**{**common, "detokenize": False, **params})


_random = np.random.default_rng(0)


def prompt(length: int) -> list[int]:
    ids: list[int] = _random.integers(0, 256, length).tolist()
    return ids


def as_npy(experts: Any) -> str | None:
    """What vLLM's server makes of the array."""
    if experts is None:
        return None
    buffer = io.BytesIO()
    np.save(buffer, experts)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
