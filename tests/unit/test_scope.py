"""Labels: which scope a router is born in, whoever builds it, and in which thread."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from r3patch import UnlabelledRouterError, building, scope_of
from r3patch.labels import scope as _scope

Fresh = Callable[..., str]

GENERATIONS = ("v012", "v013", "v015", "v017", "v020")


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


def test_a_scope_opened_inside_an_mtp_constructor_counts(fresh: Fresh) -> None:
    """Who says building("main") there is heard; only routers born without a scope are asked for."""
    fresh(
        """
        import r3patch
        from torch import nn
        from r3patch.labels.scope import constructing
        from megatron.core.transformer.moe.router import TopKRouter
        owner = nn.Module()
        with constructing(owner, "mtp"):
            nn.Module.__init__(owner)
            with r3patch.building("main"):
                owner.first = TopKRouter(None)
            owner.second = TopKRouter(None)
        assert [r.r3_scope for r in owner.children()] == ["main", "mtp"]
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
