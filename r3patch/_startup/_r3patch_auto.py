"""Imports r3patch when the process imports ``megatron.core``, and does nothing before.

Every process of an environment may run this, most of them without Megatron. So it imports nothing
but what Python has imported already, knows nothing of r3patch, and what is wrong with r3patch is
an error of those processes only that import Megatron. It may outlive the package: ``r3patch auto
on`` writes a copy of this file next to the start-up file.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

WAITS_FOR = "megatron.core"


def start() -> None:
    """What the start-up file calls; ``R3PATCH_AUTO=0`` keeps it off."""
    if os.environ.get("R3PATCH_AUTO") != "0":
        folder = os.path.dirname(__file__)  # noqa: PTH120  # pathlib would cost every process
        arm(
            f"`r3patch auto on` has written {folder}/_r3patch_auto.pth",
            "delete the files _r3patch_auto.* there, or set R3PATCH_AUTO=0",
        )


def arm(reason: str, way_out: str) -> None:
    """Import r3patch as soon as this process imports Megatron; again without effect.

    Args:
        reason: why, for the error where r3patch cannot be imported.
        way_out: what to do, there, if r3patch is not wanted.
    """
    if not any(getattr(finder, "is_r3patch", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(reason, way_out))


class Finder:
    """Finds one module, with the finders behind it, and gives it a loader that imports r3patch.

    The import waits for the loader. Who only looks whether there is a Megatron shall not get
    r3patch for it; and Python holds a lock of the whole process while it asks a finder, under which
    an import could wait for ever for a thread that imports r3patch by itself.

    It stays where it is when it is done: another thread may be walking along the same list, and
    would miss a finder if this one left.
    """

    is_r3patch = True

    def __init__(self, reason: str, way_out: str) -> None:
        self.reason, self.way_out = reason, way_out

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != WAITS_FOR:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(self, spec.loader)  # type: ignore[assignment]
                return spec
        return None

    def import_r3patch(self) -> None:
        """Import it.

        Raises:
            RuntimeError: there is none. No ImportError, which frameworks swallow around their
                imports of Megatron: the model would be trained without labels.
        """
        try:
            # By name: this file is no part of the package where it runs. And a mere folder that is
            # called r3patch is a package, too, but has no `install`.
            __import__("r3patch").install  # noqa: B018
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "r3patch":
                raise  # it was found, and says itself what is wrong
            raise RuntimeError(
                f"this process imports {WAITS_FOR}, and {self.reason}, but r3patch cannot be "
                f"imported: {type(error).__name__}: {error}. Install it for {sys.executable}; "
                f"or, to go on without it, {self.way_out}."
            ) from error


class Loader:
    """In the place of the loader of ``megatron.core`` until the module is made."""

    def __init__(self, finder: Finder, loader: "Any") -> None:
        self._finder, self._loader = finder, loader

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        if spec.loader is self:  # type: ignore[comparison-overlap]
            spec.loader = self._loader  # the module shall not know of us
        self._finder.import_r3patch()
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: "ModuleType") -> None:
        """Called only where somebody has put a loader around this one."""
        self._loader.exec_module(module)

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)
