"""A process that gets placed rows, and nothing else: for tests/distributed/test_placement.py."""

from __future__ import annotations

import pickle
from typing import Any

import torch

TOPK, EXPERTS = 2, 64


def expert(token: int, layer: int, column: int) -> int:
    """What the engine chose, computable by anyone."""
    return (7 * token + 5 * layer + 31 * column) % EXPERTS


def receive(received: Any, answers: Any) -> None:
    """Holds nothing but what it was sent; reports the tokens whose routes it can vouch for."""
    for message in iter(received.get, None):
        layers, tokens, routes = pickle.loads(message)
        assert routes.layers == layers
        assert routes.num_tokens == len(tokens)
        valid = torch.ones(len(tokens), 1) if routes.valid is None else routes.valid
        vouched = []
        for row, token in enumerate(tokens.tolist()):
            if not valid[row].all():
                assert not valid[row].any()
                continue
            for column, layer in enumerate(layers):
                want = [expert(token, layer, k) for k in range(TOPK)]
                assert routes.experts[row, column].tolist() == want
            vouched.append(token)
        answers.put((layers, vouched))
