"""The data iterator that miles and slime fill from: one sample in each microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from contract import Rollout


class Samples:
    """What their ``DataIterator`` gives for the keys that a fill asks for."""

    def __init__(self, key: str, rollout: Rollout, tokens: list[torch.Tensor]) -> None:
        self.key, self.rollout, self.tokens = key, rollout, tokens
        self.reset()

    def reset(self) -> None:
        self.number = 0

    def get_next(self, keys: Sequence[str]) -> dict[str, Any]:
        number, self.number = self.number, self.number + 1
        return {
            self.key: [self.rollout.experts[number].int()],
            "tokens": [self.tokens[number]],
            "max_seq_lens": [len(self.tokens[number])],
        }
