"""What transformers computes on the tiny checkpoints: the oracle of `testing.load_hf`.

    python tools/engine/expected.py FILE    # with the packages of tools/engine.txt

Writes the log-probabilities of the next tokens, and of the ones after those by the MTP layer, that
transformers has no model for: its decoder layer runs here between MTP's own few operations.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LENGTH = 24


def main(file: Path) -> None:
    expected: dict[str, Any] = {"transformers": transformers.__version__, "models": {}}
    tokens = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected["tokens"] = tokens.tolist()
    with tempfile.TemporaryDirectory() as directory:
        for model_type in checkpoints.CONFIGS:
            checkpoint = checkpoints.write(Path(directory), model_type)
            found = log_probs(checkpoint, tokens)
            expected["models"][model_type] = {
                "fingerprint": checkpoints.fingerprint(checkpoint),
                **{
                    name: [[round(x, 6) for x in row] for row in values.tolist()]
                    for name, values in found.items()
                },
            }
    file.write_text(json.dumps(expected) + "\n", encoding="utf-8")


@torch.no_grad()
def log_probs(checkpoint: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """``main`` ``[samples, LENGTH - 1]``, and ``mtp`` ``[samples, LENGTH - 2]`` where it is."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    hidden = model.model(tokens).last_hidden_state
    found = {"main": _of(model.lm_head(hidden[:, :-1]), tokens[:, 1:])}
    if model.config.model_type != "qwen3_moe":
        hidden = _mtp(model, load_file(checkpoint / "model.safetensors"), hidden, tokens)
        found["mtp"] = _of(model.lm_head(hidden[:, :-1]), tokens[:, 2:])
    return found


def _of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _mtp(
    model: Any, tensors: dict[str, torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Hidden states of the MTP layer for all places but the last (vLLM's glm4_moe_mtp.py)."""
    number = model.config.num_hidden_layers
    prefix = f"model.layers.{number}."
    own = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if prefix in name}
    layer = model.model.layers[-1]  # transformers keeps experts in one tensor
    layer.load_state_dict(_fused(own, layer.state_dict()))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], own[f"{name}.weight"], eps=1e-6)

    embedded = model.model.embed_tokens(tokens[:, 1:])
    both = torch.cat([norm("enorm", embedded), norm("hnorm", hidden[:, :-1])], dim=-1)
    length = both.shape[1]
    places = torch.arange(length).unsqueeze(0)
    states = layer(
        both @ own["eh_proj.weight"].T,
        attention_mask=torch.full((length, length), -torch.inf).triu(1)[None, None],
        position_embeddings=model.model.rotary_emb(both, places),
    )
    return norm("shared_head.norm", states[0] if isinstance(states, tuple) else states)


def _fused(own: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    experts = range(like["mlp.gate.weight"].shape[0])
    stacked = {
        part: torch.stack([own[f"mlp.experts.{e}.{part}_proj.weight"] for e in experts])
        for part in ("gate", "up", "down")
    }
    fused = {
        "mlp.experts.gate_up_proj": torch.cat([stacked["gate"], stacked["up"]], dim=1),
        "mlp.experts.down_proj": stacked["down"],
    }
    return {name: fused[name] if name in fused else own[name] for name in like}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
