"""Labels: which scope a router is born in, and what verify makes of it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from r3patch import UnlabelledRouterError, building, scope_of
from r3patch.labels import scope as _scope

Fresh = Callable[..., str]

GENERATIONS = ("v012", "v013", "v015", "v017")


def test_the_scope_is_main_unless_one_is_open() -> None:
    """building() sets the scope for its block, nests, and gives the outer one back."""
    assert _scope.current() == "main"
    with building("mtp"):
        assert _scope.current() == "mtp"
        with building("main"):
            assert _scope.current() == "main"
        assert _scope.current() == "mtp"
    assert _scope.current() == "main"


def test_an_exception_closes_the_scope() -> None:
    """A block that raises leaves the scope as it was."""
    with pytest.raises(KeyError), building("mtp"):
        raise KeyError
    assert _scope.current() == "main"


def test_an_unknown_scope_is_refused() -> None:
    """Only 'main' and 'mtp' exist."""
    with pytest.raises(ValueError, match=r"^scope is 'draft', expected 'main' or 'mtp'$"):
        building("draft").__enter__()


def test_threads_do_not_inherit_the_scope_but_context_copies_do() -> None:
    """A new thread starts in main; one run in a copy of the context keeps the scope."""
    seen: list[str] = []

    def look() -> None:
        seen.append(_scope.current())

    with building("mtp"):
        context = contextvars.copy_context()
        for target in (look, lambda: context.run(look)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == ["main", "mtp"]


@pytest.mark.parametrize("label", [{}, {"r3_scope": None}, {"r3_scope": "draft"}])
def test_scope_of_refuses_what_has_no_label(label: dict[str, str]) -> None:
    """A router without a valid label is an error that says what to do."""
    expected = (
        r"SimpleNamespace has no scope label .*Import r3patch before.*r3patch\.label\(model\)"
    )
    with pytest.raises(UnlabelledRouterError, match=expected):
        scope_of(SimpleNamespace(**label))  # type: ignore[arg-type]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_is_labelled(fresh: Fresh, generation: str) -> None:
    """Decoder routers are main, those of each MTP depth mtp, whatever their layer numbers."""
    fresh(
        """
        import r3patch, probe
        infos = r3patch.verify(probe.build(num_layers=3))
        assert [i.scope for i in infos] == ["main"] * 3 + ["mtp"] * 2
        assert [i.layer_number for i in infos[:3]] == [1, 2, 3]
        assert infos[3].name.startswith("mtp.layers.0.")
        """,
        generation=generation,
    )


def test_routers_survive_copies(fresh: Fresh) -> None:
    """deepcopy, pickle and torch.save keep labels; the file needs no r3patch to be read."""
    fresh(
        """
        import copy, io, pickle, pickletools, torch, r3patch, probe
        model, buffer = probe.build(), io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  torch.load(buffer, weights_only=False)]
        for other in copies:
            assert [i.scope for i in r3patch.verify(other)] == ["main", "main", "mtp", "mtp"]
        names = {arg for _, arg, _ in pickletools.genops(pickle.dumps(model, 2)) if arg}
        assert not any("r3patch" in str(name) for name in names)
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
        """
    )


def test_builders_of_all_kinds(fresh: Fresh) -> None:
    """Partials, subclasses of MoELayer, a router class of one's own, and a builder tried twice."""
    fresh(
        """
        import functools, r3patch, probe
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.moe.router import InferenceTopKRouter, TopKRouter

        class OwnLayer(MoELayer): pass

        class OwnRouter(TopKRouter):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.extra = 1

        def old_builder(config):
            return MoELayer(config)

        def fails_late(config, layer_number=None, is_mtp_layer=None):
            MoELayer(config)
            if layer_number:
                raise TypeError("unexpected layer_number")
            return MoELayer(config)

        for mlp in (OwnLayer, old_builder, fails_late, functools.partial(MoELayer, submodules=None),
                    functools.partial(OwnLayer, submodules=InferenceTopKRouter),
                    functools.partial(MoELayer, submodules=OwnRouter)):
            infos = r3patch.verify(probe.build(mlp=mlp))
            assert [i.scope for i in infos] == ["main", "main", "mtp", "mtp"], mlp
        """
    )


def test_the_meta_device(fresh: Fresh) -> None:
    """A model without storage is labelled like any other."""
    fresh(
        """
        import torch, r3patch, probe
        with torch.device("meta"):
            model = probe.build()
        assert next(model.parameters()).is_meta
        assert [i.scope for i in r3patch.verify(model)] == ["main", "main", "mtp", "mtp"]
        """
    )


def test_a_constructor_that_raises_inside_an_mtp_block(fresh: Fresh) -> None:
    """The next router is main again, and nothing of the failed one is kept."""
    fresh(
        """
        import gc, weakref, r3patch, probe
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.moe.router import TopKRouter
        born = []
        def breaks(config, **kwargs):
            if r3patch.labels.scope.current() == "mtp":
                born.append(weakref.ref(TopKRouter(config)))
                raise RuntimeError("out of memory")
            return MoELayer(config)
        try:
            probe.build(mlp=breaks)
        except RuntimeError as error:
            assert "out of memory" in str(error)
        else:
            raise AssertionError("did not raise")
        assert r3patch.scope_of(TopKRouter(None)) == "main"
        gc.collect()
        assert born[0]() is None and not r3patch.labels.scope._unscoped_births
        """
    )


THREADED_MLP = """
        import threading, r3patch, probe
        from concurrent.futures import ThreadPoolExecutor
        from megatron.core.transformer.moe.moe_layer import MoELayer
        pool = ThreadPoolExecutor(2)
        def threaded(config, **kwargs):
            return pool.submit(MoELayer, config, **kwargs).result()
"""


def test_a_builder_in_a_thread_pool(fresh: Fresh) -> None:
    """Routers that an MTP constructor has built in other threads are mtp; the decoder's main."""
    fresh(
        THREADED_MLP
        + """
        given = []
        r3patch.labels.scope.listeners.append(lambda r: given.append((id(r), r.r3_scope)))
        model = probe.build(mlp=threaded)
        infos = r3patch.verify(model)
        assert [i.scope for i in infos] == ["main", "main", "mtp", "mtp"]
        # whoever listens hears of the correction
        assert [s for r, s in given if r == id(infos[2].module)] == ["main", "mtp"]
        """
    )


def test_two_models_built_at_once(fresh: Fresh) -> None:
    """Two threads, each inside its own MTP constructor while the other builds its decoder."""
    fresh(
        THREADED_MLP
        + """
        import sys
        sys.setswitchinterval(1e-6)
        models, barrier = [], threading.Barrier(4)
        def work(mlp):
            barrier.wait()
            for _ in range(20):
                models.append(probe.build(num_layers=4, mlp=mlp))
        builders = (None, None, threaded, threaded)
        threads = [threading.Thread(target=work, args=(mlp,)) for mlp in builders]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(models) == 80
        for model in models:
            assert [i.scope for i in r3patch.verify(model)] == ["main"] * 4 + ["mtp"] * 2
        """
    )


def test_a_decoder_built_while_an_mtp_constructor_waits(fresh: Fresh) -> None:
    """Another thread's whole model, built while an MTP constructor runs, keeps its labels."""
    fresh(
        THREADED_MLP
        + """
        other = []
        def slow(config, **kwargs):
            if r3patch.labels.scope.current() == "mtp" and not other:
                other.append(None)
                other[0] = pool.submit(probe.build).result()
            return MoELayer(config, **kwargs)
        model = probe.build(mlp=slow)
        for built in (model, other[0]):
            assert [i.scope for i in r3patch.verify(built)] == ["main", "main", "mtp", "mtp"]
        """
    )


def test_a_borrowed_decoder_layer_stays_main(fresh: Fresh) -> None:
    """An MTP layer that holds a layer of the decoder does not relabel it, and verify agrees."""
    fresh(
        """
        import r3patch, probe
        from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
        decoder = probe.build(mtp_num_layers=0)

        class Borrows(MultiTokenPredictionLayer):
            def __init__(self, config, submodules, layer_number, **kwargs):
                super().__init__(config, submodules, layer_number)
                self.shared = decoder.decoder[-1]

        model = probe.build(layer=Borrows)
        assert r3patch.scope_of(decoder.decoder[-1].mlp.router) == "main"
        for order in ([decoder, model], [model, decoder]):
            infos = r3patch.verify(order)
            assert [i.scope for i in infos].count("main") == 4
            assert [i.name for i in infos if i.module is decoder.decoder[-1].mlp.router] == [
                f"chunk{order.index(decoder)}.decoder.1.mlp.router"]
        """
    )


def test_a_decoder_layer_copied_in_an_mtp_constructor_is_a_conflict(fresh: Fresh) -> None:
    """A copy runs no constructor and keeps 'main': verify raises, label(model) corrects it."""
    fresh(
        """
        import copy, r3patch, probe
        from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
        layer = probe.build(mtp_num_layers=0).decoder[-1]

        class Copies(MultiTokenPredictionLayer):
            def __init__(self, config, submodules, layer_number, **kwargs):
                super().__init__(config, submodules, layer_number)
                self.mtp_model_layer = copy.deepcopy(layer)

        model = probe.build(layer=Copies)
        try:
            r3patch.verify(model)
        except r3patch.ScopeConflictError as error:
            assert "labelled 'main', but part of an MTP module or flagged " in str(error)
            assert "mtp.layers.0.mtp_model_layer.mlp.router, mtp.layers.1." in str(error)
            assert "call r3patch.label(model)" in str(error)
        else:
            raise AssertionError("verify passed")
        assert [i.scope for i in r3patch.label(model)] == ["main", "main", "mtp", "mtp"]
        r3patch.verify(model)
        """
    )


HEAD = """
        import r3patch, probe
        from torch import nn
        from types import SimpleNamespace as Config
        from megatron.core.transformer.moe.moe_layer import MoELayer

        class Model(nn.Module):
            def __init__(self, head=None, numbers=(1, 2), **flags):
                super().__init__()
                config = Config(num_layers=2)
                self.decoder = nn.ModuleList(MoELayer(config, layer_number=n) for n in numbers)
                self.head = (head or self.build)(config, **flags)

            def build(self, config, **flags):
                return MoELayer(config, layer_number=1, **flags)

        def error_of(function, *args):
            try:
                function(*args)
            except r3patch.R3PatchError as error:
                return type(error).__name__ + ": " + str(error)
            raise AssertionError("passed")
"""


def test_a_custom_head_built_inside_building(fresh: Fresh) -> None:
    """building('mtp') labels a head without Megatron's MTP classes; verify accepts it."""
    fresh(
        HEAD
        + """
        def head(config):
            with r3patch.building("mtp"):
                return MoELayer(config, layer_number=1)
        model = Model(head)
        assert [i.scope for i in r3patch.verify(model)] == ["main", "main", "mtp"]
        assert [i.scope for i in r3patch.label(model)] == ["main", "main", "mtp"]  # kept
        """
    )


def test_a_custom_head_labelled_afterwards(fresh: Fresh) -> None:
    """Unmarked, its layer number betrays it; label(head, scope='mtp') settles it."""
    fresh(
        HEAD
        + """
        model = Model()
        text = error_of(r3patch.verify, model)
        assert "ScopeConflictError: 2 main routers of one model share a layer number" in text
        assert "decoder.0.router (layer 1), head.router (layer 1)" in text
        assert "r3patch.label(head, scope='mtp')" in text
        assert [i.scope for i in r3patch.label(model.head, scope="mtp")] == ["mtp"]
        assert [i.scope for i in r3patch.verify(model)] == ["main", "main", "mtp"]
        """
    )


def test_megatrons_own_flag_is_heard_when_true(fresh: Fresh) -> None:
    """A True is_mtp_layer contradicts 'main', and label(model) follows it; False says nothing."""
    fresh(
        HEAD
        + """
        model = Model(numbers=(1,), is_mtp_layer=True)
        text = error_of(r3patch.verify, model)
        assert text.startswith("ScopeConflictError: labelled 'main', but part of an MTP module or ")
        assert ": head.router." in text
        assert [i.scope for i in r3patch.label(model)] == ["main", "mtp"]
        r3patch.verify(model)
        """
    )


@pytest.mark.parametrize("numbers", ["(1, 3)", "(0, 1)", "(None, 1)"])
def test_a_main_router_with_a_number_outside_the_model(fresh: Fresh, numbers: str) -> None:
    """The layer number of a main router is one of 1..num_layers."""
    fresh(
        HEAD
        + f"""
        text = error_of(r3patch.verify, Model(lambda config: None, numbers={numbers}))
        assert text.startswith(
            "ScopeConflictError: main routers with a layer number outside 1..2 (num_layers"), text
        """
    )


def test_the_same_number_in_two_chunks_is_no_conflict(fresh: Fresh) -> None:
    """Layer numbers must differ within a chunk; a list may hold two models."""
    fresh(
        HEAD
        + """
        model, other = (Model(lambda config: None) for _ in "ab")
        infos = r3patch.verify([model, other])
        assert [i.name for i in infos] == [
            f"chunk{c}.decoder.{i}.router" for c in (0, 1) for i in (0, 1)]
        assert len(r3patch.routers([model, model])) == 2
        """
    )


def test_models_built_before_the_import(fresh: Fresh) -> None:
    """verify names the unlabelled routers; label(model) labels them from their ancestors."""
    fresh(
        """
        import probe
        from torch import nn
        model = probe.build(num_layers=9)
        import r3patch
        try:
            r3patch.verify(model)
        except r3patch.UnlabelledRouterError as error:
            assert str(error).startswith(
                "11 of 11 routers have no scope label: decoder.0.mlp.router, ")
            assert "and 3 more" in str(error) and "call r3patch.label(model)" in str(error)
        else:
            raise AssertionError("verify passed")

        class Wrapper(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

        wrapped = Wrapper(Wrapper(model))
        assert [i.scope for i in r3patch.label([wrapped])] == ["main"] * 9 + ["mtp"] * 2
        assert r3patch.verify(wrapped)[0].name == "module.module.decoder.0.mlp.router"
        assert [i.scope for i in r3patch.routers(wrapped, "mtp")] == ["mtp"] * 2
        """
    )


def test_routers_of_a_scope_refuse_unlabelled_ones(fresh: Fresh) -> None:
    """Asking for main routers never leaves out one that might be."""
    said = fresh(
        """
        import probe
        model = probe.build()
        import r3patch
        assert [i.scope for i in r3patch.routers(model)] == [None] * 4
        for scope in ("main", "all"):
            try:
                r3patch.routers(model, scope)
            except (r3patch.UnlabelledRouterError, ValueError) as error:
                print(type(error).__name__)
        """
    )
    assert said == "UnlabelledRouterError\nValueError\n"


def test_what_is_no_model_is_refused(fresh: Fresh) -> None:
    """A state dict, or anything else that is no module, is a TypeError."""
    fresh(
        """
        import r3patch, torch
        for bad in ({}, [torch.nn.Linear(1, 1), None]):
            try:
                r3patch.routers(bad)
            except TypeError as error:
                assert "expected a torch module or a list of them" in str(error)
            else:
                raise AssertionError("passed")
        assert r3patch.routers(torch.nn.Linear(1, 1)) == r3patch.verify([]) == []
        """
    )


def test_listeners_can_stop_a_construction(fresh: Fresh) -> None:
    """An error in a listener is an ordinary error of the constructor, and the scope is closed."""
    fresh(
        """
        import r3patch, probe
        def listener(router):
            if router.r3_scope == "mtp":
                raise r3patch.UnsupportedRoutingError("no")
        r3patch.labels.scope.listeners.append(listener)
        try:
            probe.build()
        except r3patch.UnsupportedRoutingError as error:
            assert str(error).startswith("no when instantiating TransformerLayer"), error
        from r3patch.labels import scope
        assert scope.current() == "main" and not scope._unscoped_births
        """
    )
