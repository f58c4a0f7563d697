"""Labels on stock Megatron: every way in which its releases build routers."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
import torch
import wrapt

import r3patch

pytest.importorskip("megatron.core")

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import multi_token_prediction as mtp
from megatron.core.transformer.moe import moe_utils, router
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]

KNOWN = {field.name for field in fields(TransformerConfig)}
TWO_AND_TWO = ["main", "main", "mtp", "mtp"]


def config(**overrides: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_layer_freq": [0, 1, 1],
        "moe_token_dispatcher_type": "allgather",
        "mtp_num_layers": 2,
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
    }
    return TransformerConfig(**{**settings, **overrides})


def gpt(wrap_mlp: Callable[[Any], Any] | None = None, **overrides: Any) -> GPTModel:
    """A GPT with one dense and two MoE layers, and MTP; `wrap_mlp` edits the spec of the MoE."""
    settings = config(**overrides)
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    if wrap_mlp is not None:
        for layer in spec.layer_specs[1:]:
            layer.submodules.mlp = wrap_mlp(layer.submodules.mlp)
    return GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        mtp_block_spec=get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False),
        vocab_size=32,
        max_sequence_length=16,
        position_embedding_type="rope",
    )


def moe_builder(mlp: Any, layer: Any = MoELayer, **submodules: Any) -> Any:
    """The MoE spec of any release, of another layer class or with other submodules."""
    given = copy.copy(mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules)
    for name, value in submodules.items():
        setattr(given, name, value)
    if isinstance(mlp, ModuleSpec):
        return ModuleSpec(module=layer, submodules=given)
    return functools.partial(layer, submodules=given)


def scopes(model: Any) -> list[str | None]:
    return [info.scope for info in r3patch.verify(model)]


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_mtp_of_several_depths(depths: int) -> None:
    """Decoder routers are main and numbered as moe_layers says; every MTP depth is mtp."""
    model = gpt(mtp_num_layers=depths)
    assert scopes(model) == ["main", "main"] + ["mtp"] * depths
    main = r3patch.routers(model, "main")
    assert tuple(info.layer_number for info in main) == r3patch.moe_layers(model.config) == (2, 3)
    assert [info.name.split(".")[0] for info in r3patch.routers(model, "mtp")] == ["mtp"] * depths


if "mtp_use_repeated_layer" in KNOWN:

    def test_a_repeated_mtp_layer_has_one_router() -> None:
        """mtp_use_repeated_layer builds one layer for all depths, and it is mtp."""
        assert scopes(gpt(mtp_use_repeated_layer=True)) == ["main", "main", "mtp"]


if hasattr(router, "InferenceTopKRouter"):

    def test_the_inference_router_that_drops_megatrons_flag() -> None:
        """InferenceTopKRouter says is_mtp_layer=False in MTP (0.17 to 0.19); the label says mtp."""
        build = functools.partial(moe_builder, router=router.InferenceTopKRouter)
        infos = r3patch.verify(gpt(build))
        assert [info.scope for info in infos] == TWO_AND_TWO
        assert {type(info.module) for info in infos} == {router.InferenceTopKRouter}


class OwnMoELayer(MoELayer):  # type: ignore[misc]
    """As frameworks subclass it."""


def test_a_subclass_of_the_moe_layer() -> None:
    """The label does not depend on who builds the router."""
    assert scopes(gpt(functools.partial(moe_builder, layer=OwnMoELayer))) == TWO_AND_TWO


def test_a_partial_in_the_place_of_the_router_class() -> None:
    """A functools.partial of TopKRouter (the MoE specs of 0.18 and newer are partials anyway)."""
    build = functools.partial(moe_builder, router=functools.partial(TopKRouter))
    assert scopes(gpt(build)) == TWO_AND_TWO


def hybrid_submodules(settings: TransformerConfig) -> Any:
    """Attention and MoE layers of a hybrid stack, without Transformer Engine."""
    from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    dense, moe = (copy.deepcopy(spec) for spec in layer_specs(settings))
    dense.submodules.mlp, dense.submodules.mlp_bda = IdentityOp, IdentityFuncOp
    dense.submodules.pre_mlp_layernorm = IdentityOp
    moe.submodules.self_attention, moe.submodules.self_attn_bda = IdentityOp, IdentityFuncOp
    moe.submodules.input_layernorm = IdentityOp
    return HybridStackSubmodules(attention_layer=dense, moe_layer=moe)


def layer_specs(settings: TransformerConfig) -> list[Any]:
    return list(get_gpt_decoder_block_spec(settings, use_transformer_engine=False).layer_specs[:2])


if "hybrid_submodules" in inspect.signature(mtp.MultiTokenPredictionBlock).parameters:

    def test_hybrid_stacks_in_the_decoder_and_in_mtp() -> None:
        """E layers of a HybridStack: main in the decoder, mtp in MTP, where the flag is dropped."""
        from megatron.core.models.hybrid.hybrid_block import HybridStack
        from megatron.core.process_groups_config import ProcessGroupCollection

        settings = config(num_layers=4, moe_layer_freq=[0, 1, 0, 1])
        groups = ProcessGroupCollection.use_mpu_process_groups()
        submodules = hybrid_submodules(settings)
        decoder = HybridStack(
            settings,
            submodules,
            layer_type_list=list("*E*E"),
            post_layer_norm=False,
            pg_collection=groups,
        )
        spec = get_gpt_decoder_block_spec(config(), use_transformer_engine=False)
        head = mtp.MultiTokenPredictionBlock(
            settings,
            get_gpt_mtp_block_spec(config(), spec, use_transformer_engine=False),
            pg_collection=groups,
            mtp_layer_pattern="*E",
            mtp_num_depths=2,
            hybrid_submodules=submodules,
        )
        model = torch.nn.ModuleDict({"decoder": decoder, "mtp": head})
        assert scopes(model) == TWO_AND_TWO
        settings.hybrid_layer_pattern = "*E|*E/*E/*E"
        numbers = tuple(info.layer_number for info in r3patch.routers(model, "main"))
        assert numbers == r3patch.moe_layers(settings) == (2, 4)


def test_two_models_in_two_threads() -> None:
    """Models built at the same time do not lend each other their scope."""
    models: list[GPTModel] = []
    barrier = threading.Barrier(2)

    def build() -> None:
        barrier.wait()
        models.extend(gpt() for _ in range(3))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [scopes(model) for model in models] == [TWO_AND_TWO] * 6


class ThreadedMoELayer(MoELayer):  # type: ignore[misc]
    """Has its router built by a thread of a pool, which no ContextVar reaches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(super().__init__, *args, **kwargs).result()


def test_routers_built_in_a_thread_pool() -> None:
    """What an MTP constructor has built elsewhere is mtp all the same."""
    assert scopes(gpt(functools.partial(moe_builder, layer=ThreadedMoELayer))) == TWO_AND_TWO


def test_the_meta_device() -> None:
    """A model without storage is labelled like any other."""
    with torch.device("meta"):
        model = gpt()
    assert any(parameter.is_meta for parameter in model.parameters())
    assert scopes(model) == TWO_AND_TWO


class BrokenMoELayer(MoELayer):  # type: ignore[misc]
    """Raises once its router is built, in MTP only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.router.r3_scope == "mtp":
            raise ValueError("broken")


def test_a_constructor_that_raises_inside_mtp() -> None:
    """The next model is labelled rightly, and build_module passes the error on."""
    with pytest.raises(ValueError, match="broken"):
        gpt(functools.partial(moe_builder, layer=BrokenMoELayer))
    assert scopes(gpt()) == TWO_AND_TWO


def test_a_custom_head_in_building() -> None:
    """A head made of a plain MoE layer: main unless it is built inside building('mtp')."""
    model = decoder_only()
    model.head = plain_moe_layer(model)
    with pytest.raises(r3patch.ScopeConflictError, match=r"head\.router \(layer 2\)"):
        r3patch.verify(model)
    with r3patch.building("mtp"):
        model.head = plain_moe_layer(model)
    assert scopes(model) == ["main", "main", "mtp"]


def test_a_custom_head_labelled_afterwards() -> None:
    """label(head, scope='mtp') is as good as building('mtp')."""
    model = decoder_only()
    model.head = plain_moe_layer(model)
    r3patch.label(model.head, scope="mtp")
    assert scopes(model) == ["main", "main", "mtp"]


def decoder_only() -> GPTModel:
    settings = config(mtp_num_layers=None)
    return GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_decoder_block_spec(settings, use_transformer_engine=False),
        vocab_size=32,
        max_sequence_length=16,
    )


def plain_moe_layer(model: GPTModel) -> MoELayer:
    settings, given = model.config, layer_specs(model.config)[1].submodules.mlp
    submodules = given.keywords["submodules"] if hasattr(given, "keywords") else given.submodules
    layer = MoELayer(settings, submodules=submodules)
    layer.set_layer_number(2)
    return layer


@pytest.fixture
def _process_groups_can_be_copied() -> Iterator[None]:
    nothing: Any = (type(None), ())
    copyreg.pickle(torch.distributed.ProcessGroup, lambda group: nothing)
    yield
    del copyreg.dispatch_table[torch.distributed.ProcessGroup]


@pytest.mark.usefixtures("_process_groups_can_be_copied")
def test_a_deep_copy_of_a_model() -> None:
    """A reference policy made by deepcopy is labelled as its original."""
    assert scopes(copy.deepcopy(gpt())) == TWO_AND_TWO


def mtp_router() -> TopKRouter:
    return r3patch.routers(gpt(), "mtp")[0].module


@pytest.mark.usefixtures("_process_groups_can_be_copied")
def test_pickle_and_torch_save_of_a_router() -> None:
    """Labels are in what is written (whole Megatron models cannot be pickled at all)."""
    router, buffer = mtp_router(), io.BytesIO()
    torch.save(router, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(router)), torch.load(buffer, weights_only=False)):
        assert r3patch.scope_of(other) == "mtp"


@pytest.mark.slow
@pytest.mark.usefixtures("_process_groups_can_be_copied")
def test_a_spawned_process_reads_the_label() -> None:
    """The label of a router that travels to a spawned process travels with it."""
    data = pickle.dumps(mtp_router())
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(pickle.loads, (data,)).r3_scope == "mtp"


def test_labels_are_not_in_the_state_dict() -> None:
    """Checkpoints stay what they were."""
    assert not [name for name in gpt().state_dict() if "r3_" in name]


def test_a_model_built_before_the_installation() -> None:
    """verify names the routers; label(model) finds MTP by its classes, wrapped or not."""
    r3patch.uninstall()
    try:
        model = gpt()
    finally:
        r3patch.install()
    with pytest.raises(r3patch.UnlabelledRouterError, match=r"^4 of 4 routers have no scope label"):
        r3patch.verify(model)
    wrapped = torch.nn.ModuleDict({"module": model})
    assert [info.scope for info in r3patch.label([wrapped])] == TWO_AND_TWO
    assert scopes(wrapped) == TWO_AND_TWO


def test_forward_path_objects_are_megatrons_own() -> None:
    """Forward, routing and the top-k functions are what Megatron defined, r3patch or not."""
    assert [target.state for target in r3patch.status().targets] == ["installed"] * 3
    functions = [TopKRouter.forward, TopKRouter.routing, TopKRouter.gating]
    names = ("topk_routing_with_score_function", "topk_softmax_with_capacity")
    functions += [getattr(owner, name, None) for owner in (moe_utils, router) for name in names]
    for function in filter(None, functions):
        assert type(function).__name__ == "function"
        assert function.__module__.startswith("megatron.core.transformer.moe.")
        assert not hasattr(function, "__wrapped__")


def test_only_constructors_of_a_model_are_wrapped() -> None:
    """Of all classes and instances of a model, wrapt holds the constructors of the targets."""
    model = gpt()
    wrapped = set()
    for module in model.modules():
        for owner in (module, *type(module).__mro__):
            for name, value in vars(owner).items():
                if issubclass(type(value), wrapt.FunctionWrapper):
                    wrapped.add((owner, name))
    block, layer = mtp.MultiTokenPredictionBlock, mtp.MultiTokenPredictionLayer
    assert wrapped == {(owner, "__init__") for owner in (TopKRouter, block, layer)}


@pytest.mark.parametrize("freq", [1, 2, 3, [0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0]])
def test_moe_layers_agrees_with_the_layer_specs(freq: Any) -> None:
    """Megatron's own parse of moe_layer_freq builds MoE layers where moe_layers says."""
    settings = config(num_layers=6, moe_layer_freq=freq)
    specs = get_gpt_decoder_block_spec(settings, use_transformer_engine=False).layer_specs
    dense = get_gpt_decoder_block_spec(
        config(num_layers=1, moe_layer_freq=[0]), use_transformer_engine=False
    ).layer_specs[0]
    built = tuple(number for number, spec in enumerate(specs, 1) if kind(spec) != kind(dense))
    assert r3patch.moe_layers(settings) == built


def kind(spec: Any) -> Any:
    mlp = spec.submodules.mlp
    return getattr(mlp, "func", getattr(mlp, "module", mlp))
