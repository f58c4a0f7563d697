"""r3patch.testing: nothing leaks, every shape trains, and cuts of a model are one model."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import r3patch
from r3patch import Routes, testing

pytestmark = pytest.mark.megatron

HYBRID = pytest.param(
    "nemotron_hybrid",
    marks=pytest.mark.feature("module:megatron.core.models.hybrid.hybrid_model:HybridModel"),
)
SHAPES = ["glm47_flash", "qwen3_moe", "deepseek_v3", HYBRID]


def state() -> dict[str, Any]:
    """Everything that the context replaces, by identity, and what it initialises."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    owners = (torch.cuda, torch.Tensor, torch.nn.Module, random, moe_utils, token_dispatcher)
    found = {
        f"{owner.__name__}.{name}": value
        for owner in owners
        for name, value in vars(owner).items()
        if not name.startswith("__")
    }
    found["new"] = vars(WrappedTorchNorm)["__new__"]
    found["distributed"] = torch.distributed.is_initialized()
    found["parallel"] = parallel_state.model_parallel_is_initialized()
    modes: Any = torch.overrides._get_current_function_mode_stack
    found["mode"] = modes()
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    same = {"distributed", "parallel", "mode"}
    names = before.keys() | after.keys()
    return {
        name
        for name in names
        if (before.get(name) != after.get(name))
        if name in same or before.get(name) is not after.get(name)
    }


@pytest.mark.parametrize("leave", ["normally", "by an exception"])
def test_nothing_leaks(leave: str) -> None:
    """After the context every attribute is the same object, and nothing is initialised."""
    with testing.megatron_on_cpu():
        testing.tiny_model()  # what an import or a first call changes for good, is changed
    before = state()

    def inside() -> None:
        with testing.megatron_on_cpu():
            testing.train_step(testing.tiny_model(), testing.random_batches())
            if leave != "normally":
                raise ZeroDivisionError

    if leave == "normally":
        inside()
    else:
        with pytest.raises(ZeroDivisionError):
            inside()
    assert not changes(before, state())


def test_it_does_not_nest() -> None:
    """A second context would tear the first one's process group down: it is refused."""
    with (
        testing.megatron_on_cpu(),
        pytest.raises(r3patch.ReplayError, match="set up already"),
        testing.megatron_on_cpu(),
    ):
        pass
    with testing.megatron_on_cpu():
        assert torch.distributed.is_initialized()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains(shape: str) -> None:
    """Ten Adam steps on one batch lower its loss."""
    with testing.megatron_on_cpu():
        torch.manual_seed(0)
        chunks = testing.tiny_model(shape)
        batches = testing.random_batches(num_microbatches=1)
        optimizer = torch.optim.Adam(chunks[0].parameters(), lr=1e-2)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            losses += testing.train_step(chunks, batches)
            optimizer.step()
    assert losses[-1] < losses[0] - 1


@pytest.mark.foreign_routes
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_replays(shape: str) -> None:
    """Foreign routes are what the main maps show; an MTP call is Megatron's own, to the bit."""
    with testing.megatron_on_cpu():
        chunks = testing.tiny_model(shape)
        testing.seed_parameters(chunks)
        infos = r3patch.routers(chunks)
        config: Any = chunks[0].config
        (batch,) = testing.random_batches(num_microbatches=1)
        layers = r3patch.moe_layers(config)
        assert layers == tuple(i.layer_number for i in infos if i.scope == "main")
        noise = torch.rand(batch["input_ids"].numel(), len(layers), config.num_moe_experts)
        ids = noise.topk(config.moe_router_topk).indices
        calls: dict[str, Any] = {}
        for info in infos:
            info.module.register_forward_hook(note(calls, info.name))
        with r3patch.replay(chunks, [Routes(ids, layers, num_experts=config.num_moe_experts)]):
            testing.train_step(chunks, [batch])
        for info in infos:
            inputs, (probs, routing_map) = calls[info.name]
            if info.scope == "mtp":
                own_probs, own_map = info.module(inputs)
                assert torch.equal(own_probs, probs)
                assert torch.equal(own_map, routing_map)
            else:
                column = ids[:, layers.index(info.layer_number)]
                assert torch.equal(
                    routing_map, torch.zeros_like(routing_map).scatter(1, column, True)
                )


def note(calls: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        calls.setdefault(name, (args[0].detach(), output))

    return hook


def test_seeded_weights_do_not_depend_on_the_order_of_building() -> None:
    """The same seed is the same model, another seed another one."""
    with testing.megatron_on_cpu():
        a, b, c = (testing.tiny_model()[0] for _ in range(3))
        for model, seed in ((a, 1), (b, 1), (c, 2)):
            testing.seed_parameters(model, seed)
        same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
        other = [torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True)]
    assert all(same)
    assert not all(other)


def test_plain_attention_takes_no_field_of_another() -> None:
    """A shape's own fields of MLA go with it; the caller's are refused by Megatron's config."""
    plain: dict[str, Any] = {"multi_latent_attention": False}
    with testing.megatron_on_cpu():
        assert testing.tiny_config("glm47_flash").multi_latent_attention
        assert not testing.tiny_config("glm47_flash", **plain).multi_latent_attention
        for shape, fields in (("qwen3_moe", {}), ("glm47_flash", plain)):
            with pytest.raises(TypeError, match="q_lora_rank"):
                testing.tiny_config(shape, q_lora_rank=8, **fields)


def test_what_ranks_return_outlives_them() -> None:
    """A tensor, too, which torch would hand over by a file of the rank."""
    answers = testing.run_ranks(torch.arange, 100_000, timeout=60)
    assert all(torch.equal(answer, torch.arange(100_000)) for answer in answers)


def test_ranks_are_ended_in_time() -> None:
    """A rank that hangs is a TimeoutError that names it, and no child is left."""
    import multiprocessing
    import time

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not finish within 3 s"):
        testing.run_ranks(time.sleep, 60, timeout=3)
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()


def test_a_failing_rank_is_shown() -> None:
    """What a rank raised is in the error, with its traceback."""
    import math

    with pytest.raises(RuntimeError, match=r"rank [01] raised:(.|\n)*math domain error|expected"):
        testing.run_ranks(math.sqrt, -1.0, timeout=60)


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs as it stands, replays all main rows and no MTP row."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    exec(compile(example.group(1), "README.md", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1] == "m"]
    assert [(scope, replayed, live) for scope, _, replayed, live in lines] == [
        ("main", "64", "0"),
        ("main", "64", "0"),
        ("mtp", "0", "64"),
    ]
    assert "r3patch" in sys.modules
