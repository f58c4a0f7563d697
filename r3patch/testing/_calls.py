"""What the routers of a model really do: every call's input, gate weights and routing map."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from r3patch.labels.model import RouterInfo, routers


class RoutingCall(NamedTuple):
    """One call of a router, its tensors copied."""

    info: RouterInfo
    in_backward: bool  # a recompute
    grad_enabled: bool
    input: torch.Tensor  # [s, b, hidden]
    probs: torch.Tensor  # [num_tokens, num_experts]
    routing_map: torch.Tensor  # [num_tokens, num_experts] bool


class RoutingCalls(list[RoutingCall]):
    """Every routing call of a model from now on, in order, by forward hooks on its routers.

    Checks made on it do not depend on what a session counts.

    Args:
        model: a module or a list of chunks.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        for info in routers(model):
            info.module.register_forward_hook(self._hook(info))

    def _hook(self, info: RouterInfo) -> Any:
        def note(module: Any, args: Any, output: Any) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            tensors = (args[0], *output)
            copies = (tensor.detach().clone() for tensor in tensors)
            self.append(RoutingCall(info, in_backward, torch.is_grad_enabled(), *copies))

        return note
