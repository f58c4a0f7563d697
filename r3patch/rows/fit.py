"""Do these routes fit these routers? Asked before a session or a bridge uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from r3patch._errors import RoutesError
from r3patch.rows.routes import Routes

Missing = Literal["live", "spread", "error"]


class Router(Protocol):
    """What a router says of itself, as ``labels.model.MainRouter`` does."""

    @property
    def name(self) -> str: ...
    @property
    def layer_number(self) -> int: ...
    @property
    def topk(self) -> int: ...
    @property
    def num_experts(self) -> int: ...


def check_fit(
    routes: Routes,
    routers: Sequence[Router],
    source: str,
    *,
    num_experts: int | None = None,
    missing: Missing = "live",
) -> None:
    """Refuse routes that do not fit the main routers of a chunk.

    Args:
        routes: the rows of a microbatch, columns of other layers allowed.
        routers: the routers that take them.
        source: what the routes are, for the message.
        num_experts: what the model's config says, where it says more than ``routers`` do: a
            pruned layer has fewer experts, and its ids are checked against its own number.
        missing: ``"error"`` refuses invalid rows.

    Raises:
        RoutesError: a layer without a column, another topk or number of experts, an id that a
            layer does not have, or invalid rows under ``missing="error"``.
    """
    if not isinstance(routes, Routes):
        raise RoutesError(
            f"{source} is a {type(routes).__qualname__}, expected r3patch.Routes: decode the "
            "payloads by r3patch.decode and place them by Layout.place."
        )
    fullest, topk = max((router.num_experts for router in routers), default=0), routes.topk
    for router in routers:
        if router.layer_number not in routes.layers:
            raise RoutesError(
                f"{source} has no column for {router.name} (layer {router.layer_number}); its "
                f"columns are layers {list(routes.layers)}. Columns carry 1-based Megatron layer "
                "numbers, dense layers counted: see r3patch.moe_layers(config)."
            )
        if topk != router.topk or routes.num_experts not in (fullest, num_experts):
            raise RoutesError(
                f"{source} is top-{topk} of {routes.num_experts} experts, {router.name} is "
                f"top-{router.topk} of {fullest}. Decode with the trained model's numbers."
            )
        if router.num_experts < routes.num_experts:
            _check_pruned(routes, router, source)
    if routers and missing == "error":
        _refuse_missing(routes.select([router.layer_number for router in routers]), source)


def _check_pruned(routes: Routes, router: Router, source: str) -> None:
    # Ids of invalid rows are stored as zeros, which every layer has.
    ids = routes.experts[:, routes.layers.index(router.layer_number)]
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= router.num_experts:
        raise RoutesError(
            f"{source} names expert {largest} in layer {router.layer_number}, but {router.name} "
            f"has {router.num_experts} experts. Were the routes made by the pruned model?"
        )


def _refuse_missing(routes: Routes, source: str) -> None:
    if routes.invalid_rows:
        raise RoutesError(
            f"{source} has {routes.invalid_rows} rows without routes and the session was opened "
            "with missing='error'. Padding and each sample's last token have none: use "
            "missing='live' or 'spread'."
        )
