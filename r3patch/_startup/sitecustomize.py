"""Read by every Python that ``r3patch run`` starts; then the sitecustomize that it stands before.

``r3patch run`` puts this folder first on PYTHONPATH.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from os.path import dirname, realpath

import _r3patch_auto  # type: ignore[import-not-found]  # from this folder

HERE = realpath(dirname(__file__))  # noqa: PTH120  # pathlib would cost every process

_r3patch_auto.arm("the command was started by `r3patch run`", "start it without")

_spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if realpath(p) != HERE])
if _spec is not None and _spec.loader is not None:
    # It takes our name, as if we had never been there; what it raises is reported by Python's site.
    sys.modules["sitecustomize"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["sitecustomize"])
