"""Every public name, used as a user would: checked by mypy and by pyright, never run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import assert_type

import r3patch
from r3patch import Layout, ReplayManager, Routes, bridges, metrics, testing


def check_the_installation() -> str:
    r3patch.uninstall()
    r3patch.install()
    found = r3patch.status()
    assert_type(found, r3patch.Status)
    for target in found.targets:
        assert_type(target, r3patch.TargetStatus)
        if target.state == "failed":
            return f"{target.name}: {target.detail}"
    for bridge in bridges.status():
        if bridge.state == "failed":
            return f"{bridge.name}: {bridge.detail}"
    return f"r3patch {r3patch.__version__}"


def label_a_model(model: torch.nn.Module, head: torch.nn.Module) -> Iterator[str]:
    with r3patch.building("mtp"):
        torch.nn.Linear(1, 1)
    r3patch.label(head, scope="mtp")
    infos = r3patch.verify([model, head])
    assert_type(infos, list[r3patch.RouterInfo])
    assert_type(r3patch.routers(model, "main"), list[r3patch.RouterInfo])
    for info in infos:
        yield f"{info.name} {info.scope} {info.layer_number} {r3patch.scope_of(info.module)}"


def rows_of_a_rollout(
    config: Any, payloads: Sequence[str], lengths: Sequence[int], folder: Path
) -> Routes:
    layers = r3patch.moe_layers(config)
    assert_type(layers, tuple[int, ...])
    samples = [
        r3patch.decode(
            payload,
            num_tokens=n,
            num_experts=64,
            topk=4,
            num_layers=47,
            moe_layers=layers,
            on_bad_rows="invalid",
        )
        for payload, n in zip(payloads, lengths, strict=True)
    ]
    samples.append(Routes.missing(12, layers, topk=4, num_experts=64))
    batch = r3patch.decode_batch([None, b""], num_tokens=[4, 8], config=config)
    assert_type(batch, list[Routes])
    samples[0].save(folder / "sample.routes")
    samples[0] = Routes.load(folder / "sample.routes")
    joined = Routes.join([samples[0], samples[1]]).select(layers[:3])
    assert_type(joined, Routes)
    ids = torch.zeros(joined.num_tokens, joined.num_layers, joined.topk, dtype=torch.int64)
    Routes(ids, joined.layers, num_experts=joined.num_experts)
    layout = Layout.from_megatron(config, align=8)
    assert_type(layout.place_ids([torch.arange(n) for n in lengths]), torch.Tensor)
    assert_type(Layout(packed=False, seq_length=4096, cp_order="contiguous"), Layout)
    return layout.place(samples)


def train(chunks: list[torch.nn.Module], microbatches: list[Routes]) -> dict[str, Any]:
    with r3patch.record(chunks) as recording:
        chunks[0](torch.zeros(1))
    assert_type(recording.routes, list[Routes])
    with r3patch.replay(chunks, missing="spread", measure=True) as session:
        for routes in microbatches:
            session.feed(routes, chunk=chunks[0])
    assert_type(session.stats, r3patch.ReplayStats)
    assert_type(recording, r3patch.RecordSession)
    by_hooks = r3patch.replay(chunks, microbatches, step=3, name="train", tokens="strict")
    assert_type(by_hooks.open(), r3patch.ReplaySession)
    by_hooks.close()
    manager = ReplayManager(chunks[0])
    with manager.record(), manager.replay(microbatches, step=3) as opened:
        pass
    whole = session.stats.merge(opened.stats)
    assert_type(whole.total("main").mismatch, float | None)
    return whole.as_dict()


def measure(routes: Routes, mine: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    gap = metrics.policy_gap(mine, theirs)
    assert_type(metrics.route_mismatch(routes, routes).overlap, float)
    assert_type(metrics.expert_load(routes).imbalance, tuple[float, ...])
    return gap.as_dict()


def try_it_on_a_cpu() -> list[torch.Tensor]:
    with testing.megatron_on_cpu(pipeline=2, virtual_pipeline=2):
        chunks = testing.tiny_model("glm47_flash", num_moe_experts=16)
        testing.seed_parameters(chunks)
        calls = testing.RoutingCalls(chunks)
        losses = testing.train_step(chunks, testing.random_batches(num_microbatches=4))
        assert_type([call.routing_map for call in calls], list[torch.Tensor])
        return losses


def tell_errors_apart(model: torch.nn.Module, routes: Routes) -> str:
    try:
        train([model], [routes])
    except r3patch.UnlabelledRouterError:
        return "import r3patch before the model is built, or label(model)"
    except r3patch.ScopeConflictError as error:
        return f"a head of our own: {error}"
    except (r3patch.UnsupportedMegatronError, r3patch.UnsupportedRoutingError):
        return "not with this model"
    except (r3patch.RoutesError, r3patch.ReplayError, r3patch.ConfigError) as error:
        return str(error)
    except r3patch.R3PatchError:
        raise
    return ""
