"""What r3patch relies on in Megatron: one list, and which entry a release has changed."""

from __future__ import annotations

import importlib
import inspect
import operator
from typing import NamedTuple

import pytest
from tiny import build

from r3patch.labels.targets import TARGETS

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]

ROUTER = "megatron.core.transformer.moe.router"
MTP = "megatron.core.transformer.multi_token_prediction"
REPLAY = "megatron.core.transformer.moe.router_replay"
PARALLEL = "megatron.core.parallel_state"
TOPK = "get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)"


class Shape(NamedTuple):
    """A name of Megatron's that r3patch looks up, or a call that it makes or takes."""

    module: str
    name: str
    parameters: tuple[str, ...]
    """Those that must be there, in this order; () asks for the name only."""
    used_by: str


NAMES = [
    *(Shape(t.module, f"{t.qualname}.__init__", ("self", "config"), "labels") for t in TARGETS),
    Shape(ROUTER, "Router.set_layer_number", ("self", "layer_number"), "sessions: columns"),
    Shape(ROUTER, "TopKRouter.forward", ("self", "input"), "sessions: the hooks around a call"),
    Shape(ROUTER, "TopKRouter.routing", ("self", "logits"), "the bridge to verl"),
    Shape(PARALLEL, "get_tensor_model_parallel_world_size", (), "Layout.from_megatron"),
    Shape(PARALLEL, "get_context_parallel_world_size", (), "Layout.from_megatron"),
    Shape("megatron.core.transformer.moe.moe_utils", "group_limited_topk", (), "the order of ids"),
]
SINCE_THE_EXTENSION_POINT = [
    Shape(
        ROUTER,
        "topk_routing_with_score_function",
        ("logits", "topk", "router_replay"),
        "sessions: gate weights at the replayed ids",
    ),
    Shape(
        REPLAY,
        "RouterReplay.get_replay_topk",
        ("self", "scores", "topk", "num_groups", "group_topk", "default_compute_topk"),
        "sessions: the tap stands where this object stands",
    ),
    Shape(REPLAY, "RouterReplay.global_router_replay_instances", (), "the bridge to Megatron"),
    Shape(REPLAY, "RouterReplay.set_target_indices", ("self", "topk_indices"), "native.drive"),
]


def changed(shape: Shape) -> str | None:
    """What is no longer as r3patch relies on it; None if all is."""
    try:
        found = operator.attrgetter(shape.name)(importlib.import_module(shape.module))
    except (ImportError, AttributeError) as error:
        return f"{shape.module}.{shape.name} is gone ({error}): {shape.used_by}"
    if not shape.parameters:
        return None
    got = [name for name in inspect.signature(found).parameters if name in shape.parameters]
    if got == list(shape.parameters):
        return None
    return (
        f"{shape.module}.{shape.name} takes {inspect.signature(found)}, expected the parameters "
        f"{', '.join(shape.parameters)} in this order: {shape.used_by}"
    )


def assert_unchanged(shapes: list[Shape]) -> None:
    differences = list(filter(None, map(changed, shapes)))
    assert not differences, "\n".join(["this Megatron has other shapes:", *differences])


def test_names_and_signatures() -> None:
    """Every class and function that labels, layouts and bridges look up is as they expect it."""
    assert_unchanged(NAMES)


@pytest.mark.feature(f"module:{REPLAY}:RouterReplay")
def test_the_extension_point() -> None:
    """What a session and the native bridge rest on, from the release that has it."""
    assert_unchanged(SINCE_THE_EXTENSION_POINT)


@pytest.mark.feature(f"module:{REPLAY}:RouterReplay")
def test_a_router_asks_its_extension_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """The top-k function calls ``router.router_replay`` with the arguments that a tap takes."""
    model = build()
    asked: list[object] = []

    class Tap:
        def get_replay_topk(
            self,
            scores: object,
            topk: object,
            num_groups: object,
            group_topk: object,
            default_compute_topk: object,
        ) -> object:
            asked.append(topk)
            assert callable(default_compute_topk)
            return default_compute_topk(scores, topk, num_groups, group_topk)

    router = model.decoder.layers[1].mlp.router
    monkeypatch.setattr(router, "router_replay", Tap())
    weight = router.weight
    router(weight.new_ones(2, 1, weight.shape[1]))
    assert asked == [router.topk], f"expected one call of {TOPK}"


def test_a_router_has_what_a_session_reads() -> None:
    """Attributes of a built router: config, topk, weight, layer_number, routing_type."""
    router = build().decoder.layers[1].mlp.router
    lacking = [
        name
        for name in ("config", "topk", "weight", "layer_number", "routing_type")
        if not hasattr(router, name)
    ]
    assert not lacking, f"{type(router).__name__} has no {', '.join(lacking)}"
    assert router.layer_number == 2, "the first MoE layer is layer 2, counted from 1 globally"


def test_a_change_is_told_by_name() -> None:
    """The message names what was looked for, what was found, and who needs it."""
    gone = changed(Shape(ROUTER, "TopKRouter.elsewhere", (), "labels"))
    assert gone is not None
    assert "router.TopKRouter.elsewhere is gone" in gone
    assert gone.endswith(": labels")
    other = changed(Shape(ROUTER, "Router.set_layer_number", ("self", "number"), "columns"))
    assert other is not None
    assert "takes (self, layer_number" in other
    assert "expected the parameters self, number" in other
