"""Constructors that cannot be wrapped, or were lost: failed in status, refused by verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Fresh = Callable[..., str]


def test_a_half_imported_module_is_reported_and_can_be_repaired(
    fresh: Fresh, tmp_path: Path
) -> None:
    """r3patch imported from within the router module: WARNING, failed, verify raises, no crash."""
    (tmp_path / "cycle.py").write_text("import r3patch")
    log = fresh(
        """
        import logging, sys, probe
        logging.basicConfig()
        source = __import__("importlib.util").util.find_spec(probe.ROUTER).loader.get_source(
            probe.ROUTER)
        import types, importlib.machinery
        class Loader:
            def create_module(self, spec): return None
            def exec_module(self, module): exec("import cycle\\n" + source, vars(module))
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == probe.ROUTER:
                    return importlib.machinery.ModuleSpec(name, Loader())
        sys.meta_path.insert(0, Finder())
        model = probe.build()
        import r3patch
        assert probe.states() == ["failed", "installed", "installed"]
        assert "only half imported" in r3patch.status().targets[0].detail
        try:
            r3patch.verify(model)
        except r3patch.UnsupportedMegatronError as error:
            assert "Failed: " + probe.ROUTER + ".TopKRouter: " in str(error)
            assert "call r3patch.install() after the import" in str(error)
        else:
            raise AssertionError("verify passed")
        r3patch.install()
        assert probe.states() == ["installed"] * 3
        r3patch.verify(probe.build())
        """,
        first=tmp_path,
    )
    assert "WARNING:r3patch.labels.patch:r3patch could not patch " in log


SHAPES = {
    "class missing": ("class TopKRooter: pass", "TopKRouter is None"),
    "constructor inherited": (
        "class Router:\n    def __init__(self): pass\nclass TopKRouter(Router): pass",
        "it inherits that of Router",
    ),
    "not a class": ("def TopKRouter(): pass", "TopKRouter is <function"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unknown_shape_fails_loudly_and_lets_the_import_pass(fresh: Fresh, shape: str) -> None:
    """A module that is not what we know is left alone: failed with the reason, and a WARNING."""
    source, found = SHAPES[shape]
    log = fresh(
        f"""
        import logging, sys, types, probe
        logging.basicConfig()
        import r3patch
        module = types.ModuleType(probe.ROUTER)
        exec({source!r}, vars(module))
        import megatron.core.transformer.moe
        sys.modules[probe.ROUTER] = module
        r3patch.install()
        status = r3patch.status().targets[0]
        assert status.state == "failed"
        assert "looked for a class TopKRouter with a constructor of its own" in status.detail
        assert {found!r} in status.detail, status.detail
        assert "megatron-core 0.19.2" in status.detail
        """
    )
    assert "WARNING:r3patch.labels.patch:r3patch could not patch " in log
    assert log.count("could not patch") == 1


def test_a_module_is_patched_wholly_or_not_at_all(fresh: Fresh, tmp_path: Path) -> None:
    """If one class of a module has an unknown shape, no class of that module is wrapped."""
    fresh(
        """
        import megatron.core.transformer.multi_token_prediction as mtp
        del mtp.MultiTokenPredictionLayer
        import megatron.core.transformer.moe.router
        import r3patch, probe
        assert probe.states() == ["installed", "failed", "failed"]
        assert probe.layers(mtp.MultiTokenPredictionBlock) == 0
        """
    )


def test_a_reload_is_noticed_and_install_repairs_it(fresh: Fresh) -> None:
    """importlib.reload makes new classes past the import hook: status says so, verify raises."""
    fresh(
        """
        import importlib, sys, r3patch, probe
        old = probe.build()
        importlib.reload(sys.modules[probe.ROUTER])
        assert probe.states() == ["failed", "installed", "installed"]
        try:
            r3patch.verify(old)
        except r3patch.UnsupportedMegatronError as error:
            assert "was imported or reloaded past r3patch; call r3patch.install()" in str(error)
        else:
            raise AssertionError("verify passed")
        r3patch.install()
        assert probe.states() == ["installed"] * 3
        assert [i.scope for i in r3patch.verify(old)] == ["main", "main", "mtp", "mtp"]
        """
    )


def test_a_failure_that_was_repaired_is_not_told_again(fresh: Fresh) -> None:
    """After a reload status says that, not why an install long before had failed."""
    fresh(
        """
        import importlib, probe
        import megatron.core.transformer.moe.router as router
        TopKRouter = router.TopKRouter
        del router.TopKRouter
        import r3patch
        assert "TopKRouter is None" in r3patch.status().targets[0].detail
        router.TopKRouter = TopKRouter
        r3patch.install()
        assert probe.states()[0] == "installed"
        importlib.reload(router)
        assert "was imported or reloaded past r3patch" in r3patch.status().targets[0].detail
        """
    )


def test_a_foreign_import_hook_that_raises_is_noticed(fresh: Fresh) -> None:
    """wrapt drops all hooks when one raises; the second import is unpatched, and we say so."""
    fresh(
        """
        import wrapt, probe
        def bad(module):
            raise RuntimeError("bad hook")
        wrapt.register_post_import_hook(bad, probe.ROUTER)
        import r3patch
        try:
            probe.build()
        except RuntimeError:
            pass
        probe.build()
        assert probe.states()[0] == "failed"
        r3patch.install()
        assert probe.labels(probe.build()) == ["main", "main", "mtp", "mtp"]
        """
    )


def test_a_hook_that_raises_is_kept_for_status(fresh: Fresh) -> None:
    """A bridge's import hook that raises lets the import pass; status and verify name it."""
    log = fresh(
        """
        import logging
        logging.basicConfig()
        import r3patch, probe
        def hook(module):
            raise KeyError("no such manager")
        r3patch.labels.patch.when_imported("megatron.core.models", hook)
        model = probe.build()
        assert r3patch.status().targets[-1] == (
            "megatron.core.models", "failed", "KeyError: 'no such manager'")
        try:
            r3patch.verify(model)
        except r3patch.UnsupportedMegatronError as error:
            assert "megatron.core.models: KeyError: 'no such manager'" in str(error)
        else:
            raise AssertionError("verify passed")
        """
    )
    assert "WARNING:r3patch.labels.patch:r3patch could not patch megatron.core.models" in log


def test_uninstall_forgets_what_failed(fresh: Fresh) -> None:
    """Afterwards nothing is failed any more: the next install starts clean."""
    fresh(
        """
        import r3patch, probe
        def hook(module):
            raise KeyError("no such manager")
        r3patch.labels.patch.when_imported("megatron.core.models", hook)
        probe.build()
        assert probe.states()[-1] == "failed"
        r3patch.uninstall()
        assert probe.states() == ["disabled"] * 3
        r3patch.install()
        r3patch.verify(probe.build())
        """
    )
