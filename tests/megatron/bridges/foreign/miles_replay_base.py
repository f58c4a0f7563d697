"""A stand-in for miles/utils/replay_base.py, written from its documented behaviour.

Attribute names, cursors and stages are miles'; the code is not. The real file is run against the
bridge by hand, see docs/bridges/miles.md.
"""

from __future__ import annotations


class Replay:
    def __init__(self):
        self.top_indices_list = []
        self.forward_index = 0
        self.backward_index = 0

    def pop(self, cursor):
        index = getattr(self, cursor)
        ids = self.top_indices_list[index]  # IndexError where nothing was filled
        setattr(self, cursor, index + 1)
        return ids


class Manager:
    def __init__(self):
        self.replays = []
        self.current = None
        self.enabled = False
        self.stage = "fallthrough"

    def register_to_module(self, module, attr_name, stream_idx=None):
        if not self.enabled:
            return
        replay = Replay()
        self.replays.append(replay)
        setattr(module, attr_name, replay)

        def pre_forward_hook(*args, **kwargs):
            self.current = replay

        module.register_forward_pre_hook(pre_forward_hook)

    def get_topk_fn(self, old_topk_fn, return_probs):
        def new_topk_fn(scores, topk, *args, **kwargs):
            if not self.enabled or self.stage == "fallthrough":
                return old_topk_fn(scores, topk, *args, **kwargs)
            if self.stage == "record":
                probs, ids = old_topk_fn(scores, topk, *args, **kwargs)
                self.current.top_indices_list.append(ids.clone())
                return probs, ids
            cursor = "forward_index" if self.stage == "replay_forward" else "backward_index"
            ids = self.current.pop(cursor)
            assert ids.shape[0] == scores.shape[0], "replay n_tokens does not match scores"
            return scores.gather(1, ids), ids

        return new_topk_fn


routing_replay_manager = Manager()
