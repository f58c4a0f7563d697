"""The demo's model: a GLM shape, small enough to train on while one waits, and its text.

A token is a byte. The weights are shipped, about 0.7 million in fp16, because pretraining takes
longer than the demo; ``python tools/demo_weights.py`` makes them again by `pretrain`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from r3patch import testing

LENGTH = 128  # tokens per sample

#: Of the model: what `testing.tiny_model` has of GLM-4.7-Flash, and other sizes.
SIZES: dict[str, Any] = {
    "num_layers": 3,  # the first is dense
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "moe_ffn_hidden_size": 32,
    "num_moe_experts": 32,
    "moe_router_topk": 4,
    "multi_latent_attention": False,  # faster; what replay does is the routers' matter
}
#: How the shipped weights are made.
RECIPE: dict[str, Any] = {
    "steps": 400,
    "batch": 8,
    "learning_rate": 6e-3,  # of the first half; then down in a line
    "last_learning_rate": 3e-4,  # that of the arms: what they gain is no slower rate's work
    "mtp_loss_scale": 0.5,
    "seed": 0,
    **SIZES,
}


def text() -> Tensor:
    """``[num_bytes] int64``: some of r3patch's documentation, as it was when the weights were made.

    One more than a multiple of `LENGTH`, so that whole samples cover it.
    """
    data = Path(__file__).with_name("text.txt").read_bytes()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def build(**overrides: Any) -> Any:
    """The model on this CPU, with random weights, in training mode."""
    (model,) = testing.tiny_model("glm47_flash", **SIZES, **overrides)
    return model.train()


class Products(TorchFunctionMode):
    """Products of bf16 tensors, added up in fp32 and rounded once, as a GPU has them.

    A CPU without an instruction for bf16 is 15 times slower at its own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and any(_is_bf16(value) for value in args):
            wide = [value.float() if _is_bf16(value) else value for value in args]
            return func(*wide, **kwargs).bfloat16()
        return func(*args, **kwargs)


_PRODUCTS = {torch.matmul, Tensor.matmul, torch.bmm, torch.baddbmm, functional.linear}


def _is_bf16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def engine() -> Any:
    """A bf16 model without weights yet, which plays the rollout engine under `Products`."""
    return build(bf16=True, params_dtype=torch.bfloat16).eval()


def batch_of(tokens: Tensor) -> dict[str, Any]:
    """What ``GPTModel.forward`` takes.

    Args:
        tokens: ``[batch, LENGTH + 1] int64``.
    """
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(LENGTH).expand(len(tokens), LENGTH),
        "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1),
    }


def whole_text() -> dict[str, Any]:
    """The text in one batch, ``[num_samples, LENGTH]``."""
    return batch_of(text().unfold(0, LENGTH + 1, LENGTH))


def batches(size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Endless batches of samples that begin anywhere in the text."""
    whole = text()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(whole) - LENGTH, (size, 1), generator=generator)
        yield batch_of(whole[starts + torch.arange(LENGTH + 1)])


def pretrain(steps: Iterable[int], losses: list[float] | None = None) -> Any:
    """The model after so many steps of `RECIPE`; the loss of each goes into ``losses``."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    torch.manual_seed(RECIPE["seed"])
    model = build(mtp_loss_scaling_factor=RECIPE["mtp_loss_scale"])
    data = batches(RECIPE["batch"], RECIPE["seed"])
    optimizer = torch.optim.Adam(model.parameters())
    for step in steps:
        optimizer.param_groups[0]["lr"] = _learning_rate(step)
        optimizer.zero_grad()
        loss = model(**next(data)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _update_router_expert_bias([model], model.config)
        if losses is not None:
            losses.append(float(loss))
    return model


def _learning_rate(step: int) -> float:
    first, last = RECIPE["learning_rate"], RECIPE["last_learning_rate"]
    done = max(0.0, 2 * step / RECIPE["steps"] - 1)
    return float(first + (last - first) * done)


def save(model: Any, path: Path, losses: list[float]) -> None:
    """Write the weights in fp16, with what they were made by and the losses on the way."""
    from safetensors.torch import save_file

    weights = {
        _name(name): (tensor if name.endswith("expert_bias") else tensor.half()).contiguous()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    made = {"recipe": RECIPE, "text": text_digest(), "losses": losses}
    save_file(weights, path, {name: json.dumps(value) for name, value in made.items()})


def made(path: Path) -> dict[str, Any]:
    """What `save` wrote beside the weights: recipe, text (its SHA-256) and losses."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


def text_digest() -> str:
    return hashlib.sha256(bytes(text().tolist())).hexdigest()


def load(model: Any, path: Path) -> None:
    """Read weights that `save` wrote."""
    from safetensors.torch import load_file

    weights = load_file(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor is not None}
    model.load_state_dict({**own, **{name: weights[_name(name)] for name in own}})


def _name(name: str) -> str:
    """Megatron 0.17 renamed the layer within an MTP layer: the file has the newer name."""
    return re.sub(r"^(mtp\.layers\.\d+)\.transformer_layer\.", r"\1.mtp_model_layer.", name)
