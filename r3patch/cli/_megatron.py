"""What the installed Megatron offers, part by part, and its own faults that a model with MTP meets.

Found by looking, as everywhere. A fault is warned of where the settings of a model meet it.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from r3patch._errors import R3PatchError
from r3patch.labels.targets import MTP_MODULE


def sessions() -> str:
    """Why `r3patch.record` and `r3patch.replay` are not to be had; empty if they are."""
    try:
        from r3patch.sessions import _preflight

        _preflight.require_extension_point()
    except R3PatchError as error:
        return str(error)
    except Exception as error:  # torch that is absent, or that does not load
        return f"{type(error).__name__}: {error}"
    return ""


def testing() -> str:
    """Why `r3patch.testing` builds no model with MTP here; empty if it does. Takes seconds."""
    try:
        cpu = import_module("r3patch.testing")
        with warnings.catch_warnings(), cpu.megatron_on_cpu():
            warnings.simplefilter("ignore")
            cpu.tiny_model()
    except Exception as error:
        return f"no model with MTP can be built: {type(error).__name__}: {error}"
    return ""


def faults(config: Any) -> Iterator[tuple[str, str]]:
    """The setting that meets a fault of Megatron's, and what happens.

    Args:
        config: a ``TransformerConfig``.
    """
    has_mtp, recompute = (
        getattr(config, name, None) for name in ("mtp_num_layers", "recompute_granularity")
    )
    if not has_mtp or recompute != "full":
        return
    if _checkpoint_lacks_padding_mask():
        yield (
            "recompute_granularity='full' with MTP",
            (
                "MultiTokenPredictionLayer hands a padding_mask to its _checkpointed_forward, "
                "which takes none: the first forward is a TypeError of Megatron's own (stock "
                "0.18.0 to 0.18.2). Use another release, or selective recompute."
            ),
        )
    frequency = getattr(config, "dsa_indexer_topk_freq", None) or 1
    if getattr(config, "experimental_attention_variant", None) == "dsa" and frequency > 1:
        yield (
            f"dsa_indexer_topk_freq={frequency} with MTP and recompute_granularity='full'",
            (
                "decoder layers share the sparse attention's choices by layer number, and MTP "
                "layers are numbered from 1 again: a decoder layer that is recomputed may read "
                "what MTP has written in its source's place, and gradients are wrong without a "
                "word (stock 0.19; docs/upstream.md). Whether it does depends on the schedule of "
                "sharing and on the MTP depth. Compare gradients with and without recompute, or "
                "set dsa_indexer_topk_freq=1."
            ),
        )


def _checkpoint_lacks_padding_mask() -> bool:
    layer = getattr(sys.modules.get(MTP_MODULE), "MultiTokenPredictionLayer", None)
    inner, outer = (
        inspect.signature(getattr(layer, name, lambda **_: None)).parameters
        for name in ("_proj_and_transformer_layer", "_checkpointed_forward")
    )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in outer.values())
    return "padding_mask" in inner and "padding_mask" not in outer and not takes_any
