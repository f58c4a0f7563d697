"""The page as a browser shows it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r3patch.metrics import expert_load, policy_gap

NUM_TOKENS = 64

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@dataclasses.dataclass
class Seen:
    """What a browser made of a page."""

    picture: Path
    console: list[str]
    requests: list[str]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., Seen]:
    """Opens a file in headless Chromium, for which no name on the network exists."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")

    def browse(file: Path, width: int, *further: str) -> Seen:
        log, picture = tmp_path / "net.json", tmp_path / f"{file.stem}{width}.png"
        flags = [
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run",
            "--disable-background-networking --disable-component-update --disable-sync",
            "--hide-scrollbars --force-device-scale-factor=1 --enable-logging=stderr",
        ]
        command = [
            CHROMIUM,
            *" ".join(flags).split(),
            *further,
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            f"--window-size={width},2400",
            f"--screenshot={picture}",
            file.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
        return Seen(
            picture,
            [line for line in done.stderr.splitlines() if "CONSOLE" in line],
            # Requests of the browser itself (updates, time) have no page that initiated them.
            [
                event["url"]
                for event in events
                if event.get("initiator", "not an origin") != "not an origin"
            ],
        )

    return browse


@pytest.mark.browser
def test_the_browser_test_sees_errors_and_requests(
    tmp_path: Path, browse: Callable[..., Seen]
) -> None:
    """The instrument itself: a page with a script error and an outside image is caught."""
    file = tmp_path / "bad.html"
    file.write_text('<img src="http://example.com/x.png"><script>console.error("boom")</script>')
    seen = browse(file, 600)
    assert any("boom" in line for line in seen.console)
    assert seen.requests == ["http://example.com/x.png"]


@pytest.mark.browser
def test_the_page_is_dark_where_the_reader_wants_it(
    run: Any, tmp_path: Path, browse: Callable[..., Seen]
) -> None:
    """Paper is dark and ink light, but the figures keep a light ground for their own ink."""
    image = pytest.importorskip("matplotlib.image")
    run.trace(run.healthy()[:2])
    run.page()
    seen = browse(tmp_path / "report.html", 800, "--blink-settings=preferredColorScheme=0")
    pixels = image.imread(seen.picture)[..., :3]
    assert (pixels[:, -8:] < 0.2).all()
    assert (pixels > 0.8).all(-1).mean() > 0.05


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_opens_in_a_browser(
    run: Any, width: int, tmp_path: Path, browse: Callable[..., Seen]
) -> None:
    """No console message, no request, and its figures are there to see, on a phone's width too.

    Headless Chromium opens no window narrower than 500 pixels.
    """
    image = pytest.importorskip("matplotlib.image")
    gap = policy_gap(torch.tensor([-1.0]), torch.tensor([-1.25])).as_dict()
    load_ = expert_load(run.rollout(0), torch.arange(NUM_TOKENS) >= 48)
    run.trace([{**session, "notes": gap, "expert_load": load_} for session in run.healthy()])
    run.page()

    seen = browse(tmp_path / "report.html", width)

    assert seen.console == []
    assert seen.requests == []
    pixels = image.imread(seen.picture)[..., :3]
    assert pixels.shape[:2] == (2400, width)
    colored = (pixels.max(-1) - pixels.min(-1)) > 0.2  # ink and paper are grey, figures are not
    assert 0.02 < colored.mean() < 0.6
    assert (pixels < 0.4).all(-1).mean() > 0.004  # text
    # Nothing sticks out at the right: the margin is paper from top to bottom.
    assert (pixels[:, -8:] > 0.99).all()
