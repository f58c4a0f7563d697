"""A stand-in for miles/utils/replay_base.py, written from its documented behaviour.

Attribute names, cursors and stages are miles'; the code is not. The real file is run against the
bridge by hand, see docs/bridges/miles.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replay:
    def __init__(self, stream_idx: int | None = None) -> None:
        self.stream_idx = stream_idx
        self.top_indices_list: list[Any] = []
        self.forward_index = 0
        self.backward_index = 0

    def pop(self, cursor: str) -> Any:
        index = getattr(self, cursor)
        ids = self.top_indices_list[index]  # IndexError where nothing was filled
        setattr(self, cursor, index + 1)
        return ids


class Manager:
    def __init__(self) -> None:
        self.replays: list[Replay] = []
        self.current: Any = None
        self.enabled = False
        self.stage = "fallthrough"

    def register_to_module(
        self, module: Any, attr_name: str, stream_idx: int | None = None
    ) -> None:
        if not self.enabled:
            return
        replay = Replay(stream_idx)
        self.replays.append(replay)
        setattr(module, attr_name, replay)

        def pre_forward_hook(*args: Any, **kwargs: Any) -> None:
            self.current = replay

        module.register_forward_pre_hook(pre_forward_hook)

    def get_topk_fn(self, old_topk_fn: Callable[..., Any], return_probs: bool) -> Any:
        def new_topk_fn(scores: Any, topk: int, *args: Any, **kwargs: Any) -> Any:
            if not self.enabled or self.stage == "fallthrough":
                return old_topk_fn(scores, topk, *args, **kwargs)
            if self.stage == "record":
                result = old_topk_fn(scores, topk, *args, **kwargs)
                ids = result[1] if return_probs else result
                self.current.top_indices_list.append(ids.clone())
                return result
            cursor = "forward_index" if self.stage == "replay_forward" else "backward_index"
            ids = self.current.pop(cursor)
            assert ids.shape[0] == scores.shape[0], "replay n_tokens does not match scores"
            return (scores.gather(1, ids), ids) if return_probs else ids

        return new_topk_fn


routing_replay_manager = Manager()
indexer_replay_manager = Manager()
