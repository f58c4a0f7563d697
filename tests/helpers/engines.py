"""What rollout engines send: samples of any sizes, encoded by the rule of each wire format."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from r3patch import Routes

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass
class Sample:
    """What the engine knows: rows of the MoE layers, and the sizes."""

    rows: Array  # [num_tokens - 1, len(moe_layers), topk] int64
    num_tokens: int
    num_layers: int
    moe_layers: tuple[int, ...]
    topk: int
    num_experts: int

    @property
    def sizes(self) -> dict[str, Any]:
        names = ("num_tokens", "num_layers", "moe_layers", "topk", "num_experts")
        return {name: getattr(self, name) for name in names}

    @property
    def routes(self) -> Routes:
        return self.from_token(0)

    def from_token(self, start: int) -> Routes:
        experts = np.zeros((self.num_tokens, *self.rows.shape[1:]), np.int64)
        experts[: len(self.rows)] = self.rows
        token = torch.arange(self.num_tokens)
        valid = (token >= start) & (token < self.num_tokens - 1)
        return Routes(experts, self.moe_layers, valid, num_experts=self.num_experts)

    def all_layers(self, dense: int = 0) -> Array:
        full = np.full((len(self.rows), self.num_layers, self.topk), dense, np.int64)
        full[:, np.array(self.moe_layers) - 1] = self.rows
        return full


def make(
    num_tokens: int = 5,
    num_layers: int = 4,
    moe_layers: Iterable[int] = (2, 4),
    topk: int = 3,
    num_experts: int = 20,
    seed: int = 0,
) -> Sample:
    random = np.random.default_rng(seed)
    layers = tuple(moe_layers)
    shape = (max(0, num_tokens - 1), len(layers), num_experts)
    rows = random.random(shape).argsort(-1)[..., :topk]
    return Sample(rows, num_tokens, num_layers, layers, topk, num_experts)


@st.composite
def samples(draw: st.DrawFn, max_experts: int = 400, min_topk: int = 1) -> Sample:
    num_layers = draw(st.integers(1, 5))
    moe_layers = sorted(draw(st.sets(st.integers(1, num_layers), min_size=1)))
    topk = draw(st.integers(min_topk, 9))
    num_experts = draw(st.one_of(st.integers(topk, 20), st.sampled_from([128, 255, 256, 257, 384])))
    assume(num_experts <= max_experts and num_experts > 1)
    num_tokens = draw(st.integers(0, 12))
    return make(num_tokens, num_layers, moe_layers, topk, num_experts, draw(st.integers(0, 999)))


Encoder: TypeAlias = Callable[[Sample], Any]


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def npy(array: Array) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return b64(file.getvalue())


def narrowest(sample: Sample) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if sample.num_experts <= 256 else np.uint16


def nemo(array: Array) -> str:
    shape = "x".join(map(str, array.shape))
    return f"nrlre1:{array.dtype}:{shape}:{b64(array.tobytes())}"


def envelope(array: Array, data: object, **more: object) -> dict[str, Any]:
    return {"data": data, "shape": list(array.shape), "dtype": str(array.dtype), **more}


def read_only(array: Array) -> Array:
    same: Array = np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
    return same


def prompt_and_generation(sample: Sample) -> tuple[Array, Array]:
    rows = sample.rows.astype(np.int16)
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


FORMATS: dict[str, Encoder] = {
    "sglang": lambda s: b64(s.all_layers().astype("<i4").tobytes()),
    "sglang bytes": lambda s: b64(s.all_layers().astype("<i4").tobytes()).encode(),
    "sglang meta_info": lambda s: {
        "routed_experts": b64(s.all_layers().astype("<i4").tobytes()), "finish_reason": "stop"
    },
    "sglang with dtype": lambda s: {
        "routed_experts": b64(s.all_layers().astype("<u2").tobytes()),
        "routed_experts_dtype": "uint16",
    },
    "sglang tensor": lambda s: torch.from_numpy(s.all_layers().astype(np.int32)).flatten(),
    "vllm array": lambda s: s.all_layers().astype(narrowest(s)),
    "vllm read-only": lambda s: read_only(s.all_layers().astype(narrowest(s))),
    "vllm int32 npy": lambda s: npy(s.all_layers().astype(np.int32)),
    "vllm narrow npy": lambda s: npy(s.all_layers().astype(narrowest(s))),
    "vllm fortran npy": lambda s: npy(np.asfortranarray(s.all_layers().astype(np.uint16))),
    "vllm 0.21": prompt_and_generation,
    "vllm 0.21 lists": lambda s: tuple(part.tolist() for part in prompt_and_generation(s)),
    "vllm 0.21 response": lambda s: json.loads(
        json.dumps(
            {
                "prompt_routed_experts": prompt_and_generation(s)[0].tolist(),
                "routed_experts": prompt_and_generation(s)[1].tolist(),
            }
        )
    ),
    "tensorrt-llm": lambda s: torch.from_numpy(s.rows.astype(np.int16)),
    "lmdeploy": lambda s: s.all_layers(dense=54321).astype(np.uint16),
    "lmdeploy lists": lambda s: s.all_layers(dense=54321).tolist(),
    "envelope base64": lambda s: envelope(
        a := s.all_layers().astype(np.int16), b64(a.tobytes()), start=0
    ),
    "envelope bytes": lambda s: envelope(a := s.all_layers().astype(np.uint16), a.tobytes()),
    "nemo": lambda s: nemo(s.rows.astype(np.int16)),
    "nemo int32": lambda s: nemo(s.all_layers().astype(np.int32)),
    "big-endian array": lambda s: s.all_layers().astype(">i4"),
    "int64 tensor": lambda s: torch.from_numpy(s.all_layers()),
}  # fmt: skip


def routes(
    num_tokens: int = 6,
    layers: Sequence[int] = (2, 3, 5),
    topk: int = 2,
    experts: int = 8,
    seed: int = 0,
) -> Routes:
    """Valid rows everywhere, drawn without repeats."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, len(layers), experts, generator=generator)
    return Routes(scores.topk(topk).indices, layers, num_experts=experts)
