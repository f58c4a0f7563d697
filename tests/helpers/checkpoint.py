"""A Hugging Face checkpoint in stock Megatron: how its log-probabilities are had."""

from __future__ import annotations

from typing import Any

import torch
from oracle import batch


@torch.no_grad()
def log_probs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token but the first. ``[samples, length - 1]``."""
    loss: torch.Tensor = model(**batch(tokens))
    return -loss[:, :-1].float()


@torch.no_grad()
def mtp_log_probs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """By the first MTP layer, of every token but the first two. ``[samples, length - 2]``."""
    outputs: list[torch.Tensor] = []
    hook = model.mtp.register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
    model(**batch(tokens))
    hook.remove()
    hidden = outputs[0].chunk(1 + model.config.mtp_num_layers)[1]  # behind the decoder's own
    logits = model.output_layer(hidden)[0].transpose(0, 1)[:, :-2]
    every: torch.Tensor = logits.float().log_softmax(-1)
    return every.gather(-1, tokens[:, 2:].unsqueeze(-1)).squeeze(-1)
