"""The demo around its training: what it checks first, shows on the way, and says at the end."""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


from rich.console import Console

from r3patch import _config, cli
from r3patch.cli.demo import page, picture, progress, told, work
from r3patch.cli.demo.results import ARMS, Arm, Curves, Difference, Excerpt, Point
from r3patch.observe import trace

NAN = math.nan


def curves(**last: float) -> Curves:
    """Two points for each arm; ``last`` has other accepted drafts at the end."""
    ends = {"plain": 0.80, "replay": 0.81, "leak": 0.70, "frozen": 0.75} | last
    return {
        arm.name: [
            Point(0, 0.76, 0.5, NAN, NAN, NAN),
            Point(8, end, 1 - end, 2.0, 0.02, 0.0 if arm.replay else 0.04),
        ]
        for arm, end in zip(ARMS, ends.values(), strict=True)
    }


EXCERPT = Excerpt(
    "[red] it\n<b>", (Difference(1, 2, (3,), (4,)), Difference(8, 3, (0,), (9,))), 0.1
)


def run(arms: Any, task: work.Task, workers: int) -> Iterator[tuple[Arm, Point | Excerpt | None]]:
    """In place of `work.run`: no training."""
    found = curves()
    for arm in arms:
        yield arm, found[arm.name][0]
        for _ in range(task.steps - 1):
            yield arm, None
        yield arm, found[arm.name][1]
    yield arms[0], EXCERPT
    with _config.override(trace=str(task.trace)):
        trace.write(trace.session("replay", step=1))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "run", run)


@pytest.mark.usefixtures("untrained")
def test_in_a_pipe_progress_is_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One when it begins, and one for every point of every arm."""
    assert cli.main(["demo", "--steps", "8", "-o", str(tmp_path / "x.html")]) == 0
    begin, *lines = capsys.readouterr().out.splitlines()
    assert begin == "training 4 arms of 8 steps"
    assert lines[:2] == [
        "no replay: step 0 of 8, 76.0% of drafts accepted",
        "no replay: step 8 of 8, 80.0% of drafts accepted (+4.0)",
    ]
    assert sum(" of drafts accepted" in line for line in lines) == 8


@pytest.mark.usefixtures("untrained")
def test_the_report_begins_with_the_arms(tmp_path: Path) -> None:
    """The first picture is the large one; a page of text with markup stays text."""
    path = tmp_path / "x.html"
    assert cli.main(["demo", "--steps", "8", "-o", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert text.index("Drafts that the engine accepts") < text.index("MTP loss as served")
    assert text.index('id="demo"') < text.index('class="verdict')
    assert text.count('<img src="data:image/svg') == 3
    assert "<mark>r</mark>ed] it\n&lt;<mark>" not in text
    assert "[<mark>r</mark>ed] it" in text


@pytest.mark.parametrize("output", ["nowhere/x.html", "."])
def test_the_output_is_checked_before_the_training(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is not there is told now and not in a minute."""
    monkeypatch.setattr(work, "run", lambda *args: pytest.fail("it trained"))
    assert cli.main(["demo", "-o", str(tmp_path / output)]) == 1
    assert capsys.readouterr().err.startswith("r3patch demo: ")


@pytest.mark.parametrize("there", [True, False])
def test_an_interrupt_leaves_one_line_and_no_file(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 130, as shells have it; a report of before stays as it was."""
    path = tmp_path / "x.html"
    if there:
        path.write_text("before")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "run", interrupted)
    assert cli.main(["demo", "-o", str(path)]) == 130
    assert capsys.readouterr().out.splitlines()[1:] == ["Interrupted, nothing written."]
    assert path.exists() == there
    assert not there or path.read_text() == "before"


@pytest.mark.parametrize("package", ["torch", "megatron.core", "safetensors", "matplotlib"])
def test_a_missing_package_is_told_before_the_training(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the extra that brings it."""
    monkeypatch.setattr(work, "run", lambda *args: pytest.fail("it trained"))
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["demo"]) == 1
    assert "pip install '.[" in capsys.readouterr().err


def text_of(curves: Curves, width: int = 80) -> str:
    out = io.StringIO()
    told.tell(Console(file=out, width=width), curves, EXCERPT)
    return out.getvalue()


def test_it_says_what_the_run_showed() -> None:
    """Points lost against labels, and against no training of MTP, by the run's numbers."""
    text = " ".join(text_of(curves()).split())
    assert "11.0 points fewer drafts than with labels, and 5.0 fewer than if MTP had not" in text
    assert "4.0% of the trainer's router calls took other experts" in text


@pytest.mark.parametrize("last", [{"leak": 0.82}, {"frozen": 0.69}, {"leak": 0.81}])
def test_it_says_so_where_the_order_is_another(last: dict[str, float]) -> None:
    """No claim that this run did not measure."""
    text = " ".join(text_of(curves(**last)).split())
    assert "did not come out as expected" in text
    assert "points fewer drafts than with labels" not in text


@pytest.mark.parametrize("width", [40, 60, 100])
def test_it_fits_a_narrow_terminal(width: int) -> None:
    """No line is longer than the terminal is wide, the marked text apart."""
    lines = text_of(curves(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("[red] it <b>" in line for line in lines)
    assert sum(line.startswith(arm.name + " ") for line in lines for arm in ARMS) >= len(ARMS)


@pytest.mark.parametrize("width", [40, 100])
def test_in_a_terminal_progress_is_bars(width: int) -> None:
    """Every arm has one, with the change in accepted drafts so far; none is left at the end."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    points = curves()["replay"]
    with progress.shown(console, [arm.name for arm in ARMS], 8) as show:
        show("replay", points[:1], points[0])
        show("replay", points, points[1])
    assert "+5.0" in out.getvalue()
    assert "replay reaches MTP" in out.getvalue()


def test_labels_at_the_ends_of_lines_do_not_touch() -> None:
    """They keep their order, and move as little as that takes."""
    assert picture._apart([1.0, 5.0], 1.0) == [1.0, 5.0]
    moved = picture._apart([3.0, 3.1, 0.0, 2.9], 1.0)
    assert sorted(range(4), key=lambda index: moved[index]) == [2, 3, 0, 1]
    heights = sorted(moved)
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert min(gaps) > 0.99
    assert sum(moved) == pytest.approx(9.0)


def test_every_arm_is_in_every_picture() -> None:
    """In the words for those who do not see it, too."""
    large, *small = picture.pictures(curves())
    assert len(small) == 2
    assert all(arm.name in figure.alt for arm in ARMS for figure in (large, *small))
    assert "-6.0 (replay reaches MTP)" in large.alt
    assert page.lead(curves(), None).count("<figure>") == 3
