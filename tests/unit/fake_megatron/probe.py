"""What snippets do to the fake megatron. Imports it and r3patch only when asked to."""

import sys
from types import SimpleNamespace
from typing import Any

ROUTER = "megatron.core.transformer.moe.router"
MTP = "megatron.core.transformer.multi_token_prediction"


def build(num_layers: int = 2, mtp_num_layers: int = 2, **kwargs: Any) -> Any:
    from megatron.core.models import GPTModel

    config = SimpleNamespace(
        num_layers=num_layers, mtp_num_layers=mtp_num_layers, moe_router_topk=2
    )
    return GPTModel(config, **kwargs)


def labels(model: Any) -> list[str | None]:
    """The label of every router, main model first; None where there is none."""
    router = sys.modules[ROUTER].Router
    found = [module for module in model.modules() if isinstance(module, router)]
    return [getattr(module, "r3_scope", None) for module in found]


def classes() -> tuple[Any, Any, Any]:
    import megatron.core.transformer.moe.router as router
    import megatron.core.transformer.multi_token_prediction as mtp

    return router.TopKRouter, mtp.MultiTokenPredictionBlock, mtp.MultiTokenPredictionLayer


def layers(cls: type) -> int:
    """How many wrapt wrappers are around the constructor of a class."""
    import wrapt

    count, function = 0, vars(cls)["__init__"]
    while issubclass(type(function), wrapt.FunctionWrapper):
        count, function = count + 1, function.__wrapped__
    return count


def states() -> list[str]:
    import r3patch

    return [target.state for target in r3patch.status().targets]
