"""Where the ids are taken: wrappers, models of images and text, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import BATCH, FULL, LENGTH, TOKENS, batch, build

import r3patch
from r3patch import Routes

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]

CHECKED = BATCH * (LENGTH - 1)  # the last token of a sample was never fed
IMAGE = (3, 6)  # tokens of each sample that are an image's
PLACEHOLDER = 63  # the id of an image's tokens in the batch; the engine may have another


class Wrapper(torch.nn.Module):
    """DDP and Float16Module: the model is their ``module``."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.module(**inputs)


class Plain(torch.nn.Module):
    """A wrapper with a name of its own, which hands the ids on."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.language_model: Any = model

    def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        return self.language_model(input_ids=input_ids, **inputs)


class Images(Plain):
    """As Megatron's LLaVA: embeds, puts images in the place of some, and hands over the result."""

    mix: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, model: torch.nn.Module, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(model)
        self.mix = mix
        self.embedding = torch.nn.Linear(4, 32)  # of patches: not the tokens'

    def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        embed = self.language_model.embedding
        embed(torch.zeros(5, 2, dtype=torch.int64), position_ids=None)  # tags of an image's tiles
        mixed = self.mix(embed(input_ids=input_ids, position_ids=inputs["position_ids"]))
        return self.language_model(input_ids=None, decoder_input=mixed, **inputs)


class Mimo(Plain):
    """As Megatron's MIMO: embeds the text of all samples as one."""

    def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        found = self.language_model.embedding(input_ids=input_ids.view(1, -1), position_ids=None)
        mixed = found.view(*input_ids.shape, -1).transpose(0, 1).contiguous()
        return self.language_model(input_ids=None, decoder_input=mixed, **inputs)


def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGE[1] - IMAGE[0], BATCH, 32, generator=generator)


def copied(embedded: torch.Tensor) -> torch.Tensor:
    return torch.cat([embedded[: IMAGE[0]], image(), embedded[IMAGE[1] :]])


def in_place(embedded: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        embedded[IMAGE[0] : IMAGE[1]] = image()
    return embedded


MIXES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"copied": copied, "in place": in_place}


def routes_for(model: Any, *, engine: int = PLACEHOLDER, seed: int = 1) -> Routes:
    """What the whole model chooses, with the ids of an engine that has its own for images."""
    ids = inputs(seed)["input_ids"].clone()
    ids[:, IMAGE[0] : IMAGE[1]] = engine
    with r3patch.record(model) as recording, torch.no_grad():
        model(**inputs(seed))
    (routes,) = recording.routes
    valid = torch.arange(TOKENS) < CHECKED
    return Routes(routes.experts, routes.layers, valid, num_experts=16, tokens=ids.t().flatten())


def inputs(seed: int = 1) -> dict[str, torch.Tensor]:
    whole = batch(seed)
    whole["input_ids"] = whole["input_ids"].clone()
    whole["input_ids"][:, IMAGE[0] : IMAGE[1]] = PLACEHOLDER
    return whole


def replay(model: Any, routes: Routes, seed: int = 1) -> Any:
    with r3patch.replay(model, [routes], tokens="strict") as session:
        model(**inputs(seed)).mean().backward()
    return session.stats.token_checks[0]


WRAPPERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "DDP and Float16Module": lambda model: Wrapper(Wrapper(model)),
    "a wrapper of another name": Plain,
    "a VLM in DDP": lambda model: Wrapper(Images(model, copied)),
}


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_compared(wrapper: str, recompute: Any) -> None:
    """The embedding is found beside the decoder, however deep; a fault is told, a twin is not."""
    model = WRAPPERS[wrapper](build(mtp_num_layers=None, **recompute))
    routes = routes_for(model)
    images = 0 if "VLM" not in wrapper else BATCH * (IMAGE[1] - IMAGE[0])
    check = replay(model, routes)
    assert (check.checked, check.wrong, check.why_not) == (CHECKED - images, 0, "")
    with pytest.raises(r3patch.ReplayError, match="microbatch 0, row 0"):
        replay(model, routes, seed=2)


class Sometimes(Images):
    """Hands text on as it is, and embeds for itself where there are images."""

    def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        forward = Images.forward if bool((input_ids == PLACEHOLDER).any()) else Plain.forward
        return forward(self, input_ids, **inputs)


def test_images_after_text_are_compared() -> None:
    """Where one microbatch's ids were embedded says nothing of the next one's."""
    model = Sometimes(build(mtp_num_layers=None), copied)
    routes = routes_for(model)
    any_rows = Routes(routes.experts, routes.layers, routes.valid, num_experts=16)
    text = batch(5)
    text["input_ids"] = text["input_ids"].clamp(max=PLACEHOLDER - 1)

    def run(seed: int) -> None:
        with r3patch.replay(model, [any_rows, routes], tokens="strict", alarm="off"):
            model(**text)
            model(**inputs(seed))

    run(1)
    with pytest.raises(r3patch.ReplayError, match="microbatch 1, row 0"):
        run(2)


@pytest.mark.parametrize("engine", [PLACEHOLDER, 0, 40])
@pytest.mark.parametrize("mix", MIXES)
def test_rows_of_images_are_not_compared(mix: str, engine: int) -> None:
    """Whatever id the engine has for them, and however they got into the decoder's input."""
    model = Images(build(mtp_num_layers=None), MIXES[mix])
    routes = routes_for(model, engine=engine)
    check = replay(model, routes)
    assert (check.checked, check.wrong) == (CHECKED - BATCH * (IMAGE[1] - IMAGE[0]), 0)
    last = CHECKED - 1
    assert routes.tokens is not None
    routes.tokens[last] += 1
    with pytest.raises(r3patch.ReplayError, match=f"microbatch 0, row {last}"):
        replay(model, routes)


class Unseen(Plain):
    """Passes the forward of its language model by, as a decoder called part by part does."""

    def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        return self.language_model.forward(input_ids=input_ids, **inputs)


NOT_COMPARED: dict[str, tuple[Callable[[Any], torch.nn.Module], str]] = {
    "text of all samples as one": (Mimo, "(1, 24) ids are embedded for a decoder input (12, 2, "),
    "other embeddings": (lambda m: Images(m, lambda e: 2 * e), "every row stands for something"),
    "a forward that is passed by": (Unseen, "embedded outside of the decoder's own model"),
}


@pytest.mark.parametrize("case", NOT_COMPARED)
def test_what_is_not_certain_is_not_compared(case: str) -> None:
    """No false alarm where the decoder's rows are not those of the ids; the stats say why."""
    make, why = NOT_COMPARED[case]
    model = make(build(mtp_num_layers=None))
    check = replay(model, routes_for(model))
    assert check.checked == 0
    assert why in check.why_not


def test_a_model_without_an_embedding_says_so() -> None:
    """As a later stage: nothing is there to compare with."""
    model = build(mtp_num_layers=None)
    model.inner, embedding = model.embedding, model.embedding
    del model.embedding

    def embed(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        ids, positions = inputs.pop("input_ids"), inputs["position_ids"]
        return inputs | {"input_ids": ids, "decoder_input": embedding(ids, positions)}

    with r3patch.record(model) as recording, torch.no_grad():
        model(**embed(**inputs()))
    (routes,) = recording.routes
    tokens = torch.zeros(TOKENS, dtype=torch.int32)
    routes = Routes(routes.experts, routes.layers, num_experts=16, tokens=tokens)
    with r3patch.replay(model, [routes], tokens="strict") as session:
        model(**embed(**inputs()))
    (check,) = session.stats.token_checks
    assert (check.checked, check.why_not.partition(":")[0]) == (
        0,
        "the chunk has no `embedding` beside its decoder",
    )
