"""Install and uninstall: any order, any thread, whoever else patches, and never in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

GENERATIONS = ("v012", "v013", "v015", "v017", "v020")
LABELLED = ["main", "main", "mtp", "mtp"]

ORDERS = {
    "install import": True,
    "import install": True,
    "install install import": True,
    "import install install": True,
    "install import install": True,
    "install uninstall import": False,
    "install import uninstall": False,
    "import install uninstall": False,
    "install uninstall uninstall import": False,
    "install uninstall install import": True,
    "install uninstall import install": True,
    "install import uninstall install": True,
    "import install uninstall install": True,
    "install import uninstall install uninstall": False,
    "import install uninstall install uninstall install": True,
}

Fresh = Callable[..., str]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_constructors_are_wrapped_once_or_not_at_all(
    fresh: Fresh, order: str, generation: str
) -> None:
    """In any order of import, install and uninstall, each constructor has one wrapper or none."""
    fresh(
        f"""
        import types
        import probe

        def step(name):
            if name == "import":
                import megatron.core.models
            else:
                import r3patch
                getattr(r3patch, name)()

        for name in {order.split()!r}:
            step(name)
        installed = {ORDERS[order]}
        assert [probe.layers(cls) for cls in probe.classes()] == [int(installed)] * 3
        if not installed:
            assert all(type(vars(c)["__init__"]) is types.FunctionType for c in probe.classes())
        assert probe.states() == ["installed" if installed else "disabled"] * 3
        labels = probe.labels(probe.build())
        assert labels == ({LABELLED} if installed else [None] * 4), labels
        """,
        generation=generation,
    )


@pytest.mark.parametrize("pure", ["", "1"])
def test_pure_python_wrapt_labels_as_well(fresh: Fresh, pure: str) -> None:
    """Labels do not depend on wrapt's C extension."""
    fresh(
        f"""
        import sys, r3patch, probe
        assert ("wrapt._wrappers" in sys.modules) is {not pure}
        model = probe.build()
        assert probe.labels(model) == {LABELLED}
        r3patch.verify(model)
        """,
        WRAPT_DISABLE_EXTENSIONS=pure,
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_wrapper_on_a_forward_path(fresh: Fresh, generation: str) -> None:
    """Of all that a model's classes and instances hold, only target constructors are wrapped."""
    fresh(
        """
        import wrapt, probe
        import megatron.core.transformer.moe.router as router
        proxy = getattr(wrapt, "BaseObjectProxy", wrapt.ObjectProxy)  # wrapt 2, wrapt 1
        before = router.TopKRouter.forward, router.TopKRouter.routing
        import r3patch
        assert before == (router.TopKRouter.forward, router.TopKRouter.routing)
        model = probe.build()
        wrapped = set()
        for module in model.modules():
            assert not any(issubclass(type(v), proxy) for v in vars(module).values())
            for cls in type(module).__mro__:
                for name, value in vars(cls).items():
                    if issubclass(type(value), proxy):
                        wrapped.add((cls, name))
        assert wrapped == {(cls, "__init__") for cls in probe.classes()}
        """,
        generation=generation,
    )


def test_compiled_code_that_builds_nothing_sees_no_wrapper(fresh: Fresh) -> None:
    """A compiled region that calls a labelled router gives what eager gives, in one graph."""
    fresh(
        """
        import torch, r3patch, probe
        from torch._dynamo.testing import CompileCounter
        model, x, counter = probe.build(), torch.randn(3, 2), CompileCounter()
        router = model.decoder[0].mlp.router
        compiled = torch.compile(router, backend=counter, fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), router(x)))
        assert counter.frame_count == 1
        """,
        TORCHDYNAMO_DISABLE="0",
    )


def test_torch_compile_runs_what_is_below_a_wrapper(fresh: Fresh) -> None:
    """The reason to wrap constructors only: on a compiled path a wrapper is passed over silently.

    Should this fail, torch or wrapt has learnt better.
    """
    fresh(
        """
        import torch, wrapt
        class Router:
            def route(self, x):
                return x + 1
        wrapt.wrap_function_wrapper(Router, "route", lambda wrapped, _, args, kw: -wrapped(*args))
        router, x = Router(), torch.ones(2)
        compiled = torch.compile(lambda x: router.route(x), backend="eager", fullgraph=True)
        assert router.route(x).tolist() == [-2, -2]
        assert compiled(x).tolist() == [2, 2]
        """,
        TORCHDYNAMO_DISABLE="0",
    )


def test_classes_imported_by_name_before_the_patch_are_patched(fresh: Fresh) -> None:
    """``from megatron... import TopKRouter`` before ``import r3patch`` holds the same class."""
    fresh(
        """
        from megatron.core.transformer.moe.router import InferenceTopKRouter, TopKRouter
        import r3patch
        for cls in (TopKRouter, InferenceTopKRouter):
            assert r3patch.scope_of(cls(None)) == "main"
        """
    )


def test_a_subclass_is_labelled_once(fresh: Fresh) -> None:
    """A router whose class calls its base's constructor gets one label, not two."""
    fresh(
        """
        from megatron.core.transformer.moe.router import InferenceTopKRouter
        import r3patch
        given = []
        r3patch.labels.scope.listeners.append(given.append)
        router = InferenceTopKRouter(None)
        assert given == [router]
        """
    )


def test_signatures_stay_visible(fresh: Fresh) -> None:
    """Whoever inspects a constructor sees Megatron's parameters."""
    fresh(
        """
        import inspect, r3patch, probe
        router = probe.classes()[0]
        assert list(inspect.signature(router).parameters) == [
            "config", "pg_collection", "is_mtp_layer"]
        assert router.__init__.__qualname__ == "TopKRouter.__init__"
        """
    )


ON_TOP = {
    "wrapt": """
        import wrapt
        def theirs(wrapped, instance, args, kwargs):
            calls.append(1)
            return wrapped(*args, **kwargs)
        wrapt.wrap_function_wrapper(TopKRouter, "__init__", theirs)
        """,
    "functools.wraps": """
        import functools
        ours = TopKRouter.__init__
        @functools.wraps(ours)
        def theirs(self, *args, **kwargs):
            calls.append(1)
            ours(self, *args, **kwargs)
        TopKRouter.__init__ = theirs
        """,
    "plain function": """
        ours = TopKRouter.__init__
        def theirs(self, *args, **kwargs):
            calls.append(1)
            ours(self, *args, **kwargs)
        TopKRouter.__init__ = theirs
        """,
}


@pytest.mark.parametrize("on_top", ON_TOP)
def test_somebody_elses_wrapper_on_top_survives(fresh: Fresh, on_top: str) -> None:
    """Below another wrapper ours works, falls silent on uninstall, and works after install."""
    fresh(
        f"""
        import r3patch, probe
        from megatron.core.transformer.moe.router import TopKRouter
        calls, given = [], []
        {ON_TOP[on_top]}
        r3patch.labels.scope.listeners.append(given.append)
        top = vars(TopKRouter)["__init__"]
        assert probe.states()[0] == "installed"
        assert "somebody" in r3patch.status().targets[0].detail or {on_top!r} == "plain function"
        assert probe.labels(probe.build()) == {LABELLED}

        r3patch.uninstall()
        assert probe.states() == ["buried", "disabled", "disabled"]
        assert vars(TopKRouter)["__init__"] is top
        assert probe.labels(probe.build()) == [None] * 4
        assert (len(calls), len(set(map(id, given)))) == (8, 4)

        r3patch.install()
        assert probe.states() == ["installed"] * 3
        assert probe.labels(probe.build()) == {LABELLED}
        assert len(calls) == 12
        # Some more than once: nobody can see through a plain function, so ours is wrapped again.
        assert len(set(map(id, given))) == 8
        """
    )


def test_install_repairs_a_constructor_that_was_put_back(fresh: Fresh) -> None:
    """Somebody restores what he saved before ours was there; install() wraps it again."""
    fresh(
        """
        from megatron.core.transformer.moe.router import TopKRouter
        saved = TopKRouter.__init__
        import r3patch, probe
        TopKRouter.__init__ = saved
        assert "was replaced since" in r3patch.status().targets[0].detail
        r3patch.install()
        assert r3patch.status().targets[0].detail == ""
        assert probe.labels(probe.build()) == ["main", "main", "mtp", "mtp"]
        """
    )


def test_what_was_wrapped_before_ours_is_restored(fresh: Fresh) -> None:
    """Uninstall gives back the very object that was there, another patch included."""
    fresh(
        """
        from megatron.core.transformer.moe.router import TopKRouter
        original = TopKRouter.__init__
        def theirs(self, *args, **kwargs):
            original(self, *args, **kwargs)
        TopKRouter.__init__ = theirs
        import r3patch
        assert r3patch.scope_of(TopKRouter(None)) == "main"
        r3patch.uninstall()
        assert TopKRouter.__init__ is theirs
        """
    )


def test_install_from_many_threads_wraps_once(fresh: Fresh) -> None:
    """Sixteen threads that install at once leave one wrapper."""
    fresh(
        """
        import sys, threading, r3patch, probe
        classes = probe.classes()
        r3patch.uninstall()
        sys.setswitchinterval(1e-6)
        barrier = threading.Barrier(16)
        def work():
            barrier.wait()
            r3patch.install()
        threads = [threading.Thread(target=work) for _ in range(16)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert [probe.layers(cls) for cls in classes] == [1, 1, 1]
        """
    )


def test_uninstall_leaves_labels(fresh: Fresh) -> None:
    """Routers keep what they were given, and are verified by it still."""
    fresh(
        """
        import r3patch, probe
        model = probe.build()
        r3patch.uninstall()
        assert [i.scope for i in r3patch.verify(model)] == ["main", "main", "mtp", "mtp"]
        """
    )


def test_install_takes_what_a_framework_gives_it(fresh: Fresh) -> None:
    """slime and miles call ``--custom-megatron-init-path r3patch.install`` with their arguments."""
    fresh(
        """
        import r3patch, probe
        r3patch.uninstall()
        r3patch.install(object(), 3, args=None, model_provider=print)
        assert probe.labels(probe.build()) == ["main", "main", "mtp", "mtp"]
        """
    )


def test_status_follows_the_imports(fresh: Fresh) -> None:
    """Pending until the module is imported, then installed, and readable when printed."""
    fresh(
        """
        import r3patch, probe
        assert probe.states() == ["pending"] * 3
        assert r3patch.status().targets[0].detail == "its module is not imported yet"
        import megatron.core.transformer.moe.router
        assert probe.states() == ["installed", "pending", "pending"]
        assert str(r3patch.status()).splitlines()[0] == probe.ROUTER + ".TopKRouter installed"
        """
    )


def test_disable_leaves_megatron_alone_until_asked(fresh: Fresh) -> None:
    """R3PATCH_DISABLE=1: the import patches nothing; an explicit install still does."""
    fresh(
        """
        import r3patch, probe
        assert probe.labels(probe.build()) == [None] * 4
        assert {(t.state, t.detail) for t in r3patch.status().targets} == {
            ("disabled", "R3PATCH_DISABLE=1")}
        r3patch.install()
        assert probe.labels(probe.build()) == ["main", "main", "mtp", "mtp"]
        """,
        R3PATCH_DISABLE="1",
    )


def test_one_info_line_for_each_target(fresh: Fresh) -> None:
    """The log names each constructor that is wrapped, once."""
    log = fresh(
        """
        import logging
        logging.basicConfig(level=logging.INFO)
        import r3patch, probe
        probe.classes()
        r3patch.install()
        """
    )
    assert log.count("INFO:r3patch.labels.patch:r3patch wraps the constructor of megatron.") == 3
