"""Install, uninstall, status: labels and bridges, composed."""

from __future__ import annotations

from typing import NamedTuple

from r3patch import bridges
from r3patch.labels import patch
from r3patch.labels.patch import TargetStatus

__all__ = ["Status", "TargetStatus", "install", "status", "uninstall"]


class Status(NamedTuple):
    """What `install` has done so far."""

    targets: tuple[TargetStatus, ...]

    def __str__(self) -> str:
        return "\n".join(" ".join(filter(None, target)) for target in self.targets)


def install(*ignored: object, **also_ignored: object) -> None:
    """Wrap the constructors of Megatron that `r3patch` labels routers from.

    Those of modules that are not imported yet are wrapped when they are. Safe to call again and
    from several threads; also retries what failed and re-wraps what a reload has lost.

    Arguments are accepted and ignored, so that it can stand where a framework wants a function
    that is called with its own: slime and miles take
    ``--custom-megatron-init-path r3patch.install``.
    """
    patch.install()
    bridges.install()


def uninstall() -> None:
    """Give Megatron its constructors back, and forget what failed. Labels that routers carry stay.

    Where somebody else has wrapped on top of ours, ours stays below theirs and calls straight
    through; `status` then says ``buried``.
    """
    bridges.uninstall()
    patch.uninstall()


def status() -> Status:
    """The state of every target, as it is now. Changes nothing.

    ``pending``: its module is not imported yet. ``installed``: wrapped. ``failed``: it could not
    be wrapped, or was lost since. ``disabled``: by `uninstall` or ``R3PATCH_DISABLE=1``.
    ``buried``: uninstalled below somebody else's wrapper.

    A bridge to another replay manager is listed if it failed, as ``bridge miles``, say;
    ``r3patch.bridges.status()`` lists them all.
    """
    return Status(patch.status())
