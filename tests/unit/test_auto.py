"""``r3patch auto``: which processes it reaches, and that it harms no other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import LOOK, Environment, answer

IS_THERE = "import sys, megatron.core; print('r3patch' in sys.modules)"
SPAWN = """
import multiprocessing, sys

def child(queue):
    import megatron.core
    queue.put("r3patch" in sys.modules)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
"""


@pytest.fixture(scope="module")
def switched_on(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Read-only for the tests of this file."""
    environment = Environment(tmp_path_factory.mktemp("auto"))
    done = environment.r3patch("auto", "on")
    assert done.returncode == 0, done.stderr
    (environment.folder / "train.py").write_text(IS_THERE)
    (environment.folder / "spawn.py").write_text(SPAWN)
    return environment


@pytest.fixture(scope="module")
def switched_off(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Read-only for the tests of this file."""
    return Environment(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def broken(tmp_path: Path, switched_on: Environment) -> Iterator[Environment]:
    """The same environment, which a test may break; mended afterwards."""
    kept = tmp_path / "kept"
    shutil.copytree(switched_on.site, kept)
    yield switched_on
    shutil.rmtree(switched_on.site)
    shutil.copytree(kept, switched_on.site)


@pytest.mark.parametrize(
    "command",
    [
        ("-c", IS_THERE),
        ("train.py",),
        ("-m", "train"),
        ("-I", "train.py"),
        ("-E", "-s", "train.py"),
        ("spawn.py", "spawn"),
        ("spawn.py", "fork"),
        ("spawn.py", "forkserver"),
    ],
)
def test_a_process_that_imports_megatron_has_r3patch(
    switched_on: Environment, command: tuple[str, ...]
) -> None:
    """However it was started, without a line of code; also where PYTHONPATH was replaced."""
    assert answer(switched_on.run(*command, PYTHONPATH="/nowhere")) == "True"


def test_a_process_without_site_is_not_reached_and_on_says_so(switched_on: Environment) -> None:
    """`python -S` reads no start-up file."""
    path = f"import sys; sys.path.append({str(switched_on.site)!r}); "
    assert answer(switched_on.run("-S", "-c", path + IS_THERE)) == "False"
    assert "`python -S` does not read it" in switched_on.r3patch("auto", "on").stdout


def test_r3patch_is_imported_with_megatron_and_not_before(switched_on: Environment) -> None:
    """Not at the start, not by a look whether there is a Megatron, not where there is none."""
    assert answer(switched_on.run("-c", LOOK)) == "False True"
    looks = "import importlib.util, sys; assert importlib.util.find_spec('megatron.core')"
    assert answer(switched_on.run("-c", f"{looks}; print('r3patch' in sys.modules)")) == "False"
    none = "import sys; sys.path.remove({!r})\ntry: import megatron.core\nexcept ImportError: "
    code = none.format(str(switched_on.site)) + "print('r3patch' in sys.modules)"
    assert answer(switched_on.run("-c", code)) == "False"


def test_megatron_is_as_if_nobody_had_been_there(switched_on: Environment) -> None:
    """Its spec and its loader are Python's own, its source is found, a reload works."""
    code = """
import importlib, inspect, megatron.core
print(type(megatron.core.__spec__.loader).__name__, type(megatron.core.__loader__).__name__)
print(inspect.getsource(importlib.reload(megatron.core)).strip())
"""
    assert answer(switched_on.run("-c", code)).splitlines() == [
        "SourceFileLoader SourceFileLoader",
        "NAME = 'megatron.core'",
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_other_import_hooks_on_megatron_still_fire(switched_on: Environment, when: str) -> None:
    """wrapt's post-import hook on the same module, in front of the finder or behind it."""
    move = "sys.meta_path.insert(0, sys.meta_path.pop(1))" if when == "before" else "pass"
    code = f"""
import sys, wrapt
wrapt.register_post_import_hook(lambda module: print("hook", module.NAME), "megatron.core")
{move}
import megatron.core
print("r3patch" in sys.modules)
"""
    assert answer(switched_on.run("-c", code)).splitlines() == ["hook megatron.core", "True"]


def test_two_threads_that_import_r3patch_and_megatron_do_not_wait_for_each_other(
    switched_on: Environment, tmp_path: Path
) -> None:
    """One is in the middle of r3patch's own imports when the other comes from Megatron."""
    slow = tmp_path / "r3patch"
    slow.mkdir()
    (slow / "part.py").touch()
    (slow / "__init__.py").write_text(
        "import time; time.sleep(0.4)\nimport r3patch.part\ndef install(): ...\n"
    )
    code = f"""
import sys, threading, time
sys.path.insert(0, {str(tmp_path)!r})
first = threading.Thread(target=lambda: __import__("r3patch"), daemon=True)
first.start()
time.sleep(0.1)
second = threading.Thread(target=lambda: __import__("megatron.core"), daemon=True)
second.start()
first.join(20)
second.join(20)
print("megatron.core" in sys.modules and "r3patch.part" in sys.modules)
"""
    assert answer(switched_on.run("-c", code)) == "True"


def test_auto_0_keeps_a_process_from_it(switched_on: Environment) -> None:
    """And any other word than 0 and 1 is loud, where Megatron is imported."""
    assert answer(switched_on.run("-c", LOOK, R3PATCH_AUTO="0")) == "False False"
    assert answer(switched_on.run("-c", LOOK, R3PATCH_AUTO="1")) == "False True"
    done = switched_on.run("-c", LOOK, R3PATCH_AUTO="no")
    assert "ConfigError: R3PATCH_AUTO is 'no', but takes '1' or '0'" in done.stderr


def test_disable_1_imports_and_patches_nothing(switched_on: Environment) -> None:
    """The switch of the import itself is the package's."""
    code = "import megatron.core, r3patch; print({t.detail for t in r3patch.status().targets})"
    assert answer(switched_on.run("-c", code, R3PATCH_DISABLE="1")) == "{'R3PATCH_DISABLE=1'}"


RAISES = """
for attempt in range(2):
    try:
        import megatron.core
    except ImportError:
        print("swallowed")
    except RuntimeError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"R3PATCH_DISABLE": "yes"}, "ConfigError R3PATCH_DISABLE is 'yes'"),
        ({"R3PATCH_BRIDGE": "miles"}, "ConfigError unknown environment variable R3PATCH_BRIDGE"),
    ],
)
def test_a_bad_value_is_loud_with_megatron_and_silent_without(
    switched_on: Environment, env: dict[str, str], text: str
) -> None:
    """No ImportError, which frameworks swallow; raised by every attempt; other processes run."""
    out = answer(switched_on.run("-c", RAISES, **env)).splitlines()
    assert [line.startswith(text) for line in out] == [True, True]
    assert answer(switched_on.run("-c", "import json; print(1)", **env)) == "1"


def _remove(site: Path) -> None:
    shutil.rmtree(site / "r3patch")


def _leave_a_folder(site: Path) -> None:
    for path in (site / "r3patch").rglob("*.py"):
        path.unlink()


def _break_code(site: Path) -> None:
    (site / "r3patch" / "__init__.py").write_text("def install(:\n")


def _lack_wrapt(site: Path) -> None:
    shutil.rmtree(site / "wrapt")


@pytest.mark.parametrize(
    ("breaks", "cause"),
    [
        (_remove, "ModuleNotFoundError: No module named 'r3patch'"),
        (_leave_a_folder, "AttributeError: module 'r3patch' has no attribute 'install'"),
        (_break_code, "SyntaxError: "),
        (_lack_wrapt, "ModuleNotFoundError: No module named 'wrapt'"),
    ],
)
def test_an_r3patch_that_is_gone_or_broken_is_loud_with_megatron_and_silent_without(
    broken: Environment, breaks: object, cause: str
) -> None:
    """The error names the file that asks for r3patch, the cause, and the ways out."""
    assert callable(breaks)
    breaks(broken.site)
    out = answer(broken.run("-c", RAISES)).splitlines()
    assert len(out) == 2
    for line in out:
        assert line.startswith("RuntimeError this process imports megatron.core, and `r3patch auto")
        assert f"{broken.site}/_r3patch_auto.pth" in line
        assert cause in line
        assert "R3PATCH_AUTO=0" in line
    assert answer(broken.run("-c", "import json; print(1)")) == "1"
    assert answer(broken.run("-c", LOOK, R3PATCH_AUTO="0")) == "False False"


def test_a_start_up_file_without_its_module_stops_no_process(broken: Environment) -> None:
    """Python's site reports it, in every process, and goes on."""
    (broken.site / "_r3patch_auto.py").unlink()
    done = broken.run("-c", "print(1)")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert "_r3patch_auto" in done.stderr


def test_an_import_of_r3patch_that_was_swallowed_is_repeated_by_megatron(
    switched_off: Environment,
) -> None:
    """verl swallows what its plugins raise; without any start-up file a bad value is loud still."""
    code = "try: import r3patch\nexcept Exception: pass\n" + RAISES
    out = answer(switched_off.run("-c", code, R3PATCH_ALARM="loud")).splitlines()
    assert [line.startswith("ConfigError R3PATCH_ALARM is 'loud'") for line in out] == [True, True]


def test_a_start_imports_one_module_and_no_other(
    switched_on: Environment, switched_off: Environment
) -> None:
    """The whole cost of a process without Megatron."""
    code = "import sys; print(*sys.modules)"
    with_it, without = (
        set(answer(environment.run("-c", code)).split())
        for environment in (switched_on, switched_off)
    )
    codec = "encodings.utf_8_sig"  # Python 3.13 and newer read a `.pth` by it, whatever is inside
    assert with_it - without - {codec} == {"_r3patch_auto"}
