"""r3patch report: what goes wrong in a run is visible, in words and in the figure they name."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r3patch import R3PatchError, ReplayError, Routes, _config, cli
from r3patch.metrics import expert_load, policy_gap, route_mismatch
from r3patch.observe import trace as writer
from r3patch.observe.history import Check, History, checks, gap_series, load
from r3patch.observe.stats import ReplayStats, RouterStats

LAYERS, NUM_TOKENS, NUM_EXPERTS, TOPK = (2, 3, 4, 5), 64, 16, 4
STEPS = range(6)

REACHED = "Did every main router replay?"
RELATED = "Are the routes those of these tokens, layers and weights?"
MTP_ALONE = "Were MTP routers left alone?"
RECOMPUTED = "Did recompute route as its forward did?"
NO_ERROR = "Did every session end without an error?"
WHOLE = "Is the trace whole?"

Stats = Callable[..., ReplayStats]


def rollout(step: int, shift: int = 0) -> Routes:
    """What the model of a step would choose, all but exactly; shifted by layers if asked to."""
    generator = torch.Generator().manual_seed(step)
    scores = torch.randn(NUM_TOKENS, len(LAYERS), NUM_EXPERTS, generator=generator)
    experts = scores.topk(TOPK).indices.roll(shift, dims=1)
    return Routes(experts, LAYERS, num_experts=NUM_EXPERTS)


def live(step: int) -> Routes:
    """The trainer's own choice: the rollout's, but for one expert in every eighth row."""
    experts = rollout(step).experts.long()
    absent = torch.tensor(
        [[next(e for e in range(NUM_EXPERTS) if e not in row) for row in t] for t in experts]
    )
    experts[::8, :, 0] = absent[::8]
    return Routes(experts, LAYERS, num_experts=NUM_EXPERTS)


def stats(step: int, given: Routes, *, without: int | None = None, **mtp: int) -> ReplayStats:
    """What a measured session counts that replays `given`; `without` is an orphaned layer."""
    found = route_mismatch(given, live(step))
    routers = []
    for place, layer in enumerate(LAYERS):
        name = f"decoder.layers.{layer - 1}.mlp.router"
        counts = {
            "forward_calls": 2,
            "recompute_calls": 2,
            "rows_replayed": NUM_TOKENS,
            "rows_live": 8,
            "rows_measured": NUM_TOKENS,
            "rows_differing": found.rows_differing[place],
            "experts_shared": found.experts_shared[place],
            "recompute_rows_measured": NUM_TOKENS,
        }
        if layer == without:
            counts = {}
        routers.append(RouterStats(name, 0, "main", layer, topk=TOPK, **counts))
    mtp = {"forward_calls": 2, "rows_live": 72, **mtp}
    routers.append(RouterStats("mtp.layers.0.mlp.router", 0, "mtp", 1, topk=TOPK, **mtp))
    tokens = bytes([2] * found.tokens_differing + [1] * (found.tokens - found.tokens_differing))
    return ReplayStats(tuple(routers), tokens, seconds=0.002)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., History]:
    """Writes sessions through the library's own writer, and reads them back."""
    base = tmp_path / "run.jsonl"
    monkeypatch.setattr(_config, "CONFIG", dataclasses.replace(_config.CONFIG, trace=str(base)))
    monkeypatch.setattr(writer, "_lost", 0)

    def write(sessions: list[dict[str, Any]]) -> History:
        for session in sessions:
            session = dict(session)
            rank = session.pop("rank", 0)
            monkeypatch.setattr(writer, "_rank", lambda rank=rank: rank)
            monkeypatch.setattr(writer, "_process", session.pop("process", "first"))
            writer.write(writer.session(session.pop("kind", "replay"), **session))
        return load([str(base)])

    return write


def healthy(**changes: Any) -> list[dict[str, Any]]:
    return [{"step": step, "stats": stats(step, rollout(step)), **changes} for step in STEPS]


def answers(history: History) -> dict[str, Check]:
    return {check.question: check for check in checks(history)}


def bad(history: History) -> set[str]:
    return {check.question for check in checks(history) if check.good is False}


def page(tmp_path: Path, *options: str) -> str:
    pytest.importorskip("matplotlib")
    output = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "run.jsonl"), "-o", str(output), *options]) == 0
    return output.read_text()


def test_a_healthy_run_has_no_bad_answer(trace: Callable[..., History]) -> None:
    """An eighth of the rows differ by one expert of four, in every layer and step."""
    history = trace(healthy())
    assert bad(history) == set()
    assert [[history.mismatch(layer, step) for step in STEPS] for layer in LAYERS] == [
        [0.125] * len(STEPS)
    ] * len(LAYERS)
    assert history.overlap(2, 0) == 1 - 0.125 / TOPK
    assert history.by_step("rows_replayed") == [NUM_TOKENS * len(LAYERS)] * len(STEPS)
    assert history.tokens[0] == (64, 8)
    assert answers(history)[RELATED].answer == "They share 96.9% of the live experts."


def test_a_replay_shifted_by_one_layer_shows_in_mismatch_by_layer_and_step(
    trace: Callable[..., History],
) -> None:
    """Every layer is dark at every step, and the answer says which kind of fault that is."""
    history = trace(
        [{"step": step, "stats": stats(step, rollout(step, shift=1))} for step in STEPS]
    )
    check = answers(history)[RELATED]
    assert check.good is False
    assert check.shown_in == "Mismatch by layer and step"
    assert "layers 2-5, steps 0-5. At every measured step: columns shifted" in check.answer
    assert min(history.mismatch(layer, step) for layer in LAYERS for step in STEPS) > 0.9
    assert bad(history) == {RELATED}


def test_a_replay_of_stale_rows_shows_in_mismatch_by_layer_and_step(
    trace: Callable[..., History],
) -> None:
    """Two steps that replayed the rows of the step before are dark columns between pale ones."""
    stale = (3, 4)
    history = trace(
        [
            {"step": step, "stats": stats(step, rollout(step - 1 if step in stale else step))}
            for step in STEPS
        ]
    )
    check = answers(history)[RELATED]
    assert check.good is False
    assert check.shown_in == "Mismatch by layer and step"
    assert "steps 3-4. At some steps only: stale rows" in check.answer
    dark = {step for step in STEPS for layer in LAYERS if history.mismatch(layer, step) > 0.5}
    assert dark == set(stale)


def test_an_orphaned_router_shows_in_rows_by_source(trace: Callable[..., History]) -> None:
    """A router that nothing called has no bar among its neighbours, and the answer names it."""
    history = trace(
        [{"step": step, "stats": stats(step, rollout(step), without=4)} for step in STEPS]
    )
    check = answers(history)[REACHED]
    assert check.good is False
    assert check.shown_in == "Rows by source"
    assert "never called by decoder.layers.3.mlp.router (steps 0-5)" in check.answer
    rows = NUM_TOKENS * len(STEPS)
    assert history.by_layer("rows_replayed") == [rows, rows, 0, rows]


def test_an_orphan_shows_although_its_session_ended_with_an_error(
    trace: Callable[..., History],
) -> None:
    """Leaving such a session raises; the refusal is listed and the router is named."""
    error = ReplayError("decoder.layers.3.mlp.router (layer 4) replayed 0 microbatches")
    history = trace([{"step": 0, "stats": stats(0, rollout(0), without=4), "error": error}])
    assert bad(history) == {REACHED, NO_ERROR}
    assert history.errors[0]["error"]["type"] == "ReplayError"


def test_a_refused_session_blames_no_router(trace: Callable[..., History]) -> None:
    """A session that was refused at its entry called none, which is no orphan."""
    idle = ReplayStats((RouterStats("decoder.layers.1.mlp.router", 0, "main", 2),))
    refused = {"step": 6, "stats": idle, "error": ReplayError("refused")}
    assert bad(trace([*healthy(), refused])) == {NO_ERROR}


def test_a_step_without_any_route_is_no_good_answer(trace: Callable[..., History]) -> None:
    """All rows live: the session ran, and replayed nothing."""
    empty = stats(2, rollout(2))
    routers = tuple(
        dataclasses.replace(router, rows_replayed=0, rows_live=72, rows_measured=0)
        for router in empty.routers
    )
    history = trace([*healthy(), {"step": 6, "stats": ReplayStats(routers)}])
    assert "No row of layers 2-5 had routes at step 6." in answers(history)[REACHED].answer


def test_replay_that_reaches_mtp_is_a_bad_answer(trace: Callable[..., History]) -> None:
    """One replayed row of an MTP router is enough; else the calls left alone are counted."""
    assert answers(trace(healthy()))[MTP_ALONE].answer == "12 calls took Megatron's own top-k."
    touched = {"step": 9, "stats": stats(9, rollout(9), rows_replayed=1)}
    check = answers(trace([touched]))[MTP_ALONE]
    assert check.good is False
    assert "mtp.layers.0.mlp.router" in check.answer


def test_recompute_that_routes_otherwise_is_a_bad_answer(trace: Callable[..., History]) -> None:
    """2 % of the rows is a wrong match; a near-tie in a thousand rows is not."""

    def answer(differing: int, measured: int) -> bool | None:
        routers = tuple(
            dataclasses.replace(
                router,
                recompute_rows_measured=measured,
                recompute_rows_differing=differing,
            )
            for router in stats(0, rollout(0)).routers
        )
        history = History()
        from r3patch.observe import history as _history

        record = writer.session("replay", step=0, stats=ReplayStats(routers))
        head = {"time": 0, "process": "p", "rank": 0}
        _history._gather(history, [json.loads(json.dumps({**head, **record}))])
        return answers(history)[RECOMPUTED].good

    assert answer(20, 1000) is False
    assert answer(1, 1000) is True
    assert answer(0, 0) is None


def test_without_measure_the_routes_are_unknown_and_not_good(
    trace: Callable[..., History], tmp_path: Path
) -> None:
    """No measure, no verdict; the page says how to get one and still draws the rows."""
    routers = tuple(
        dataclasses.replace(
            router, rows_measured=0, rows_differing=0, experts_shared=0, recompute_rows_measured=0
        )
        for router in stats(0, rollout(0)).routers
    )
    history = trace([{"step": 0, "stats": ReplayStats(routers)}])
    assert answers(history)[RELATED].good is None
    text = page(tmp_path)
    assert "open sessions with measure=True" in text
    assert "Rows by source" in text
    assert "Mismatch over steps" not in text


def test_ranks_of_the_same_layers_add_up(trace: Callable[..., History]) -> None:
    """Data-parallel ranks: rows and tokens are summed; host time is that of the slowest."""
    slow = dataclasses.replace(stats(0, rollout(0, shift=1)), seconds=0.5)
    history = trace(
        [
            {"rank": 0, "step": 0, "stats": stats(0, rollout(0))},
            {"rank": 1, "step": 0, "stats": slow},
        ]
    )
    other = route_mismatch(rollout(0, shift=1), live(0))
    assert history.mismatch(2, 0) == (8 + other.rows_differing[0]) / 128
    assert history.tokens[0] == (128, 8 + other.tokens_differing)
    assert history.seconds[0] == 0.5
    assert not history.tokens_are_bounds


def test_tokens_of_pipeline_stages_are_a_lower_bound(
    trace: Callable[..., History], tmp_path: Path
) -> None:
    """Stages saw the same tokens, so their counts must not add up; the page says so."""

    def stage(routers: slice, differing: int) -> ReplayStats:
        whole = stats(0, rollout(0))
        tokens = bytes([2] * differing + [1] * (64 - differing))
        return ReplayStats(whole.routers[routers], tokens)

    history = trace(
        [
            {"rank": 0, "step": 0, "stats": stage(slice(0, 2), 8)},
            {"rank": 1, "step": 0, "stats": stage(slice(2, 5), 10)},
        ]
    )
    assert history.tokens[0] == (64, 10)
    assert history.tokens_are_bounds
    assert "lower bound" in page(tmp_path)


def test_steps_that_a_resumed_run_did_again_count_once(trace: Callable[..., History]) -> None:
    """The latest process counts; several sessions of one process in a step add up."""
    twice = {"step": 1, "stats": stats(1, rollout(1)), "process": "second"}
    history = trace([*healthy(), twice, twice])
    assert history.by_step("rows_replayed")[:3] == [256, 512, 256]


def test_sessions_without_steps_are_counted_by_their_order(
    trace: Callable[..., History], tmp_path: Path
) -> None:
    """The axis is then called session."""
    history = trace([{"stats": stats(0, rollout(0))} for _ in range(3)])
    assert history.steps == [0, 1, 2]
    assert "3 replay sessions, sessions 0 to 2, one rank" in page(tmp_path)


def test_notes_of_ranks_are_averaged_by_their_tokens(trace: Callable[..., History]) -> None:
    """The gap of two ranks equals that of all their tokens; a rank without tokens counts not."""
    torch.manual_seed(0)
    train, rollout_ = torch.randn(2, 100).double().unbind()
    parts = [slice(0, 10), slice(10, 100), slice(100, 100)]
    history = trace(
        [
            {
                "rank": rank,
                "step": 0,
                "stats": stats(0, rollout(0)),
                "notes": policy_gap(train[part], rollout_[part]).as_dict(),
            }
            for rank, part in enumerate(parts)
        ]
    )
    noted = {name: series[0] for name, series in history.notes.items()}
    assert noted == pytest.approx(policy_gap(train, rollout_).as_dict(), rel=1e-12)


def test_prefixed_notes_are_series_of_their_own(trace: Callable[..., History]) -> None:
    """live_mean_abs stands next to mean_abs in one panel; other notes do not."""
    notes = {"mean_abs": 0.1, "live_mean_abs": 0.4, "reward": 2.0, "live_tokens": 10.0}
    history = trace([{"step": 3, "stats": stats(3, rollout(3)), "notes": notes}])
    assert gap_series(history, "mean_abs") == {"": {3: 0.1}, "live": {3: 0.4}}


def test_expert_load_and_padding_are_summed_by_layer(trace: Callable[..., History]) -> None:
    """Two sessions of the same load give twice the counts."""
    padding = torch.arange(NUM_TOKENS) >= 48
    one = expert_load(rollout(0), padding)
    history = trace([{**session, "expert_load": one} for session in healthy()[:2]])
    assert history.load[2].real == (2 * one.real[0]).tolist()
    assert history.load[2].padding == (2 * one.padding[0]).tolist()
    assert sum(history.load[5].padding) == 2 * 16 * TOPK


def test_faults_of_the_trace_itself_are_told(trace: Callable[..., History], tmp_path: Path) -> None:
    """A cut line, and a rank whose file is missing."""
    trace([{**session, "rank": 1} for session in healthy()])
    with (tmp_path / "run.rank1.jsonl").open("a") as file:
        file.write('{"schema": 1, "ti')
    check = answers(load([str(tmp_path / "run.jsonl")]))[WHOLE]
    assert check.good is False
    assert check.answer == "1 unreadable lines; only ranks 1 are here"


def test_a_missing_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both names that were looked for, and no traceback."""
    pytest.importorskip("matplotlib")
    assert cli.main(["report", str(tmp_path / "run.jsonl")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"there is neither .*run.jsonl nor .*run.rank0.jsonl", error)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(R3PatchError, match=r"holds no trace record"):
        load([str(tmp_path / "empty.jsonl")])


def test_the_page_names_no_address_and_runs_no_script(
    trace: Callable[..., History], tmp_path: Path
) -> None:
    """Everything it loads is in it; its own policy forbids the rest."""
    trace(healthy())
    text = page(tmp_path)
    assert "default-src 'none'" in text
    assert "<script" not in text
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in text


def test_text_of_a_run_cannot_become_markup(trace: Callable[..., History], tmp_path: Path) -> None:
    """Router names, notes, errors and the title are escaped."""
    evil = "<img src=x onerror=alert(1)>"
    router = dataclasses.replace(stats(0, rollout(0)).routers[-1], name=evil)
    trace(
        [
            {
                "step": 0,
                "stats": ReplayStats((*stats(0, rollout(0)).routers[:-1], router)),
                "error": ValueError(evil),
                "notes": {evil: 1.0},
            }
        ]
    )
    text = page(tmp_path, "--title", evil)
    assert evil not in text
    assert text.count(html.escape(evil)) == 5  # title, heading, router, error, note


def test_every_answer_leads_to_a_place_on_the_page(
    trace: Callable[..., History], tmp_path: Path
) -> None:
    """Links point at ids that exist; figures are numbered from 1."""
    trace(healthy())
    text = page(tmp_path)
    links = re.findall(r'href="#([^"]+)"', text)
    assert {"rows-by-source", "mismatch-by-layer-and-step", "mtp-routers"} <= set(links)
    assert all(f'id="{link}"' in text for link in links)
    assert re.findall(r"Figure (\d)\.", text) == ["1", "2", "3"]


def test_figures_say_in_words_what_they_show(trace: Callable[..., History], tmp_path: Path) -> None:
    """The numbers of a figure are in its alternative text."""
    gap = policy_gap(torch.tensor([-1.0]), torch.tensor([-1.25])).as_dict()
    load_ = expert_load(rollout(0), torch.arange(NUM_TOKENS) >= 48)
    trace([{**session, "notes": gap, "expert_load": load_} for session in healthy()])
    texts = re.findall(r'alt="([^"]+)"', page(tmp_path))
    assert len(texts) == 6
    assert texts[0] == ("Heat map: 12.5% of rows differ over all layers and steps, 12.5% at most.")
    assert texts[2] == "Lines: the last mean_abs is 0.25 (replay)"
    assert texts[3] == "Bars: replayed 88.9%, live (no routes) 11.1%."
    assert texts[4].startswith(f"Heat map: the fullest expert has {max(load_.imbalance):.2f}")


def test_nan_in_a_note_does_not_stop_the_page(
    trace: Callable[..., History], tmp_path: Path
) -> None:
    """A run that blew up is when one needs it."""
    notes = {"mean_abs": math.nan, "k3": math.inf, "above_2": 0.5, "grad_norm": math.nan}
    trace([{**session, "notes": notes} for session in healthy()])
    text = page(tmp_path)
    assert "Policy gap" in text
    assert "grad_norm</td><td>nan" in text


def test_a_missing_extra_is_named(
    trace: Callable[..., History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Without matplotlib the error says which extra to install."""
    trace(healthy())
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["report", str(tmp_path / "run.jsonl")]) == 1
    assert "pip install 'r3patch[report]'" in capsys.readouterr().err


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

    def browse(file: Path, width: int) -> Seen:
        log, picture = tmp_path / "net.json", tmp_path / f"{file.stem}{width}.png"
        flags = [
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run",
            "--disable-background-networking --disable-component-update --disable-sync",
            "--hide-scrollbars --force-device-scale-factor=1 --enable-logging=stderr",
        ]
        command = [
            CHROMIUM,
            *" ".join(flags).split(),
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
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_opens_in_a_browser(
    width: int, trace: Callable[..., History], tmp_path: Path, browse: Callable[..., Seen]
) -> None:
    """No console message, no request, and its figures are there to see, on a phone's width too.

    Headless Chromium opens no window narrower than 500 pixels.
    """
    image = pytest.importorskip("matplotlib.image")
    gap = policy_gap(torch.tensor([-1.0]), torch.tensor([-1.25])).as_dict()
    load_ = expert_load(rollout(0), torch.arange(NUM_TOKENS) >= 48)
    trace([{**session, "notes": gap, "expert_load": load_} for session in healthy()])
    page(tmp_path)

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


def test_the_pictures_are_whole_svg(trace: Callable[..., History], tmp_path: Path) -> None:
    """Each embedded picture parses and refers to nothing outside itself."""
    from xml.etree import ElementTree

    trace(healthy())
    for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page(tmp_path)):
        root = ElementTree.fromstring(base64.b64decode(data))
        links = [
            value
            for element in root.iter()
            for name, value in element.attrib.items()
            if name.endswith("href")
        ]
        assert all(link.startswith(("#", "data:")) for link in links)
