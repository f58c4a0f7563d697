"""The demo, which is the first thing that people run, and the weights that it comes with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from r3patch import testing
from r3patch.cli.demo import arms, model
from r3patch.cli.demo.results import WEIGHTS

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "r3patch", "demo", *map(str, args)]


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    """One step of it: replay brings the differing calls to 0, and the report is written."""
    report = tmp_path / "demo.html"
    done = subprocess.run(
        command("--steps", "1", "--workers", "2", "-o", report),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    unlike = {}
    for line in done.stdout.splitlines():
        name, _, rest = line.rstrip().partition("  ")
        if len(rest.split()) == 5 and rest.endswith("%"):
            unlike[name] = float(rest.split()[-1].rstrip("%"))
    assert unlike.pop("no replay") > 0
    assert unlike == {"replay": 0, "replay reaches MTP": 0, "replay, MTP frozen": 0}
    text = report.read_text(encoding="utf-8")
    assert "Drafts that the engine accepts" in text
    assert "<strong>Good" in text


def heed_interrupts() -> None:
    """A test run in the background of a shell script ignores them, and what it starts would."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name != "posix", reason="signals to a group of processes")
@pytest.mark.parametrize("delay", [0, 1])  # the workers start, and import
def test_an_interrupt_ends_the_workers_too(tmp_path: Path, delay: int) -> None:
    """Ctrl-C goes to all processes; one line answers it."""
    report = tmp_path / "demo.html"
    with subprocess.Popen(
        command("-o", report),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509  # no other thread runs then
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("training 4 arms")
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "")
    assert out.splitlines()[-1:] == ["Interrupted, nothing written."]
    assert not report.exists()


@pytest.mark.usefixtures("cpu")
def test_the_shipped_weights_are_of_this_recipe_and_text() -> None:
    """The file says so; first steps of the recipe have its losses, its weights the last."""
    made = model.made(WEIGHTS)
    assert made["recipe"] == model.RECIPE
    assert made["text"] == model.text_digest()
    assert len(made["losses"]) == model.RECIPE["steps"]
    losses: list[float] = []
    model.pretrain(range(3), losses)
    assert losses == pytest.approx(made["losses"][:3], rel=1e-3)
    trained = model.build()
    model.load(trained, WEIGHTS)
    with torch.no_grad():
        loss = float(trained(**model.whole_text()).mean())
    assert loss == pytest.approx(sum(made["losses"][-20:]) / 20, rel=0.1)
    assert WEIGHTS.stat().st_size < 1_600_000


@pytest.mark.usefixtures("cpu")
def test_weights_survive_the_file(tmp_path: Path) -> None:
    """To half precision, under the names of either Megatron; expert biases to the bit."""
    one, other = model.build(), model.build()
    testing.seed_parameters(one, seed=1)
    model.save(one, tmp_path / "w.safetensors", [1.0])
    model.load(other, tmp_path / "w.safetensors")
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.half(), b.half()), name
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert "expert_bias" not in name or torch.equal(a, b), name


@pytest.mark.parametrize(
    "product",
    [
        torch.matmul,
        torch.bmm,
        lambda a, b: torch.baddbmm(a.new_zeros(()), a, b, beta=0.0),
        lambda a, b: torch.nn.functional.linear(a, b[0].t()),
    ],
)
def test_products_of_bf16_are_rounded_once(product: Callable[..., torch.Tensor]) -> None:
    """Those of fp32, rounded; the CPU's own are those but for the order of the sum."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 64, 64, generator=generator).bfloat16() for _ in range(2))
    with model.Products():
        found = product(a, b)
    assert torch.equal(found, product(a.float(), b.float()).bfloat16())
    torch.testing.assert_close(found, product(a, b), rtol=2**-7, atol=2**-5)


@pytest.mark.usefixtures("cpu")
def test_a_served_draft_is_accepted_where_the_main_model_agrees() -> None:
    """Against a loop over positions, on the logits of a plain forward."""
    engine = model.engine()
    testing.seed_parameters(engine, seed=3)
    accepted, _ = arms.serve(engine)
    seen: list[torch.Tensor] = []
    handle = engine.output_layer.register_forward_hook(
        lambda module, args, output: seen.append(output[0].clone())
    )
    batch = model.whole_text()
    with torch.no_grad(), model.Products():
        engine(**batch)
    handle.remove()
    drafts, main = (logits.argmax(-1).t() for logits in seen)
    agree = [
        bool(drafts[sample, place] == main[sample, place + 1])
        for sample in range(len(drafts))
        for place in range(model.LENGTH - 1)
    ]
    assert accepted == pytest.approx(sum(agree) / len(agree))
