"""``r3patch auto on`` and the setup hook in a real Ray: in an environment that has it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from environment import Environment, answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray here"),
]

CALLS = """
import json, logging, sys
import ray

def look():
    import importlib.util
    importlib.util.find_spec("megatron.core")
    before = "r3patch" in sys.modules
    import megatron.core
    return before, "r3patch" in sys.modules

def plain():
    return "r3patch" in sys.modules

class Actor:
    look = staticmethod(look)

def told(reference):
    try:
        return ray.get(reference)
    except Exception as error:
        return str(error)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         runtime_env=json.loads(sys.argv[1]))
task = ray.remote(look)
in_env = lambda task, **env: task.options(runtime_env={"env_vars": env}).remote()
print(json.dumps({
    "without Megatron": told(ray.remote(plain).remote()),
    "task": told(task.remote()),
    "actor": told(ray.remote(Actor).remote().look.remote()),
    "PYTHONPATH replaced": told(in_env(task, PYTHONPATH="/nowhere")),
    "R3PATCH_AUTO=0": told(in_env(task, R3PATCH_AUTO="0")),
    "bad value": told(in_env(task, R3PATCH_ALARM="loud")),
    "bad value without Megatron": told(in_env(ray.remote(plain), R3PATCH_ALARM="loud")),
}))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """r3patch and an empty Megatron of their own, and this environment's Ray behind them."""
    made = Environment(tmp_path / "environment")
    made.patience = 600  # Ray starts a dozen processes
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    (made.site / "ray.pth").write_text(f"{Path(spec.origin).parents[1]}\n")
    (made.folder / "calls.py").write_text(CALLS)
    return made


def test_auto_reaches_tasks_and_actors(environment: Environment) -> None:
    """With Megatron and not before; a bad value fails those calls only that import Megatron."""
    answer(environment.r3patch("auto", "on"))
    found = json.loads(environment.run("calls.py", "{}").stdout.splitlines()[-1])
    assert "R3PATCH_ALARM is 'loud'" in found.pop("bad value")
    assert found == {
        "without Megatron": False,
        "task": [False, True],
        "actor": [False, True],
        "PYTHONPATH replaced": [False, True],
        "R3PATCH_AUTO=0": [False, False],
        "bad value without Megatron": False,
    }


def test_the_setup_hook_reaches_tasks_and_actors(environment: Environment) -> None:
    """`worker_process_setup_hook` at job level imports r3patch in every worker."""
    hook = json.dumps({"worker_process_setup_hook": "r3patch.install"})
    found = json.loads(environment.run("calls.py", hook).stdout.splitlines()[-1])
    assert (found["without Megatron"], found["task"], found["actor"]) == (
        True,
        [True, True],
        [True, True],
    )
