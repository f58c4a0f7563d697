"""What a bridge is, to `r3patch.bridges`: declared here, and each bridge is checked by mypy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import ModuleType


class Bridge(Protocol):
    """One foreign manager. The modules native, miles, slime and verl are objects of this kind."""

    MODULE: str
    """Where the manager lives. A bridge acts once the process has imported it, never imports it."""

    NEEDS: tuple[str, ...]
    """Dotted paths below `MODULE`; where one is absent, the manager is not of a shape we know."""

    def govern(self, router: Any, scope: str, manager: ModuleType) -> None:
        """Make the manager keep the router, or not, as its scope asks.

        Called each time the router is given a label, so what it does must be safe to do twice.

        Args:
            router: a Megatron ``Router`` whose constructor has returned.
            scope: its label, ``"main"`` or ``"mtp"``.
            manager: the imported `MODULE`.
        """

    def is_replaying(self, router: Any, replay: object, manager: ModuleType) -> bool:
        """Whether the manager would replay or record, if the router ran now. Changes nothing.

        Args:
            router: a Megatron ``Router``.
            replay: the ``router_replay`` that is the router's own, also while a session has put
                its tap in that place.
            manager: the imported `MODULE`.
        """
