"""The checkpoints around a call, where torch does not tell its saved-tensor hooks (2.6).

They are on the Python stack: torch/utils/checkpoint.py keeps a suspended generator with the frame
of the region while the region runs, and repeats it from the unpack hook that holds this frame. So
the hooks are made again from the frame, once for each repetition, and stand for those that torch
has and does not show. Other implementations of non-reentrant checkpoints are not seen here, and
what they repeat is refused.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils import checkpoint

_FILE = checkpoint.__file__
#: By region, the hook of each graph task that repeats it: one repetition is one object.
_repeating: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()
_lock = threading.Lock()


def checkpoint_hooks() -> list[Callable[..., Any]]:
    """The pack hooks of torch's non-reentrant checkpoints around the caller, innermost first."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            find = _FIND.get(frame.f_code.co_name)
            hook = None if find is None else find(frame)
            if hook is not None:
                found.append(hook.pack_hook)
        frame = frame.f_back
    return found


def _run(frame: FrameType) -> Any:
    """Of the region that a call of ``checkpoint`` runs, if it will be repeated."""
    suspended = getattr(frame.f_locals.get("gen"), "gi_frame", None)
    region = suspended and suspended.f_locals.get("new_frame")
    if region is None:
        return None
    saver = getattr(region, "input_saver", None)
    if saver is not None and saver.grad_fn is None:
        return None  # where no input needs a gradient, torch of this age sets no hooks
    return checkpoint._checkpoint_hook(region)


def _repeated(frame: FrameType) -> Any:
    """Of the region that an unpack hook repeats; other unpack hooks of the file repeat none."""
    region, task = frame.f_locals.get("frame"), frame.f_locals.get("gid")
    if region is None or task is None:
        return None
    with _lock:
        hooks = _repeating.setdefault(region, {})
        if task not in hooks:
            hooks[task] = checkpoint._recomputation_hook(weakref.ref(region), task)
        return hooks[task]


_FIND = {"checkpoint": _run, "unpack_hook": _repeated}
