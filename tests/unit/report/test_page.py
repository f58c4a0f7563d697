"""r3patch report: the page and its words."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from r3patch import R3PatchError, cli
from r3patch.metrics import expert_load, policy_gap
from r3patch.observe.history import load
from r3patch.observe.stats import ReplayStats

NUM_TOKENS = 64


def test_a_missing_trace_is_one_line(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both names that were looked for, and no traceback."""
    pytest.importorskip("matplotlib")
    assert cli.main(["report", str(tmp_path / "run.jsonl")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"there is neither .*run.jsonl nor .*run.rank0.jsonl", error)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(R3PatchError, match=r"holds no trace record"):
        load([str(tmp_path / "empty.jsonl")])


def test_the_page_names_no_address_and_runs_no_script(run: Any) -> None:
    """Everything it loads is in it; its own policy forbids the rest."""
    run.trace(run.healthy())
    text = run.page()
    assert "default-src 'none'" in text
    assert "<script" not in text
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in text


def test_text_of_a_run_cannot_become_markup(run: Any) -> None:
    """Router names, notes, errors and the title are escaped."""
    evil = "<img src=x onerror=alert(1)>"
    router = dataclasses.replace(run.stats(0).routers[-1], name=evil)
    run.trace(
        [
            {
                "step": 0,
                "stats": ReplayStats((*run.stats(0).routers[:-1], router)),
                "error": ValueError(evil),
                "notes": {evil: 1.0},
            }
        ]
    )
    text = run.page("--title", evil, status=1)
    assert evil not in text
    assert text.count(html.escape(evil)) == 5  # title, heading, router, error, note


def test_every_answer_leads_to_a_place_on_the_page(run: Any) -> None:
    """Links point at ids that exist; figures are numbered from 1."""
    run.trace(run.healthy())
    text = run.page()
    links = re.findall(r'href="#([^"]+)"', text)
    assert {"rows-by-source", "mismatch-by-layer-and-step", "mtp-routers"} <= set(links)
    assert all(f'id="{link}"' in text for link in links)
    assert re.findall(r"Figure (\d)\.", text) == ["1", "2", "3"]


def test_figures_say_in_words_what_they_show(run: Any) -> None:
    """The numbers of a figure are in its alternative text."""
    gap = policy_gap(torch.tensor([-1.0]), torch.tensor([-1.25])).as_dict()
    load_ = expert_load(run.rollout(0), torch.arange(NUM_TOKENS) >= 48)
    run.trace([{**session, "notes": gap, "expert_load": load_} for session in run.healthy()])
    texts = re.findall(r'alt="([^"]+)"', run.page())
    assert len(texts) == 6
    assert texts[0] == (
        "Heat map: 12.5% of router calls differ over all layers and steps, 12.5% at most."
    )
    assert texts[2] == "Lines: the last mean_abs is 0.25 (replay)"
    assert texts[3] == "Bars: replayed 88.9%, live (no routes) 11.1%."
    assert texts[4].startswith(f"Heat map: the fullest expert has {max(load_.imbalance):.2f}")


def test_nan_in_a_note_does_not_stop_the_page(run: Any) -> None:
    """A run that blew up is when one needs it."""
    notes = {"mean_abs": math.nan, "k3": math.inf, "above_2": 0.5, "grad_norm": math.nan}
    run.trace([{**session, "notes": notes} for session in run.healthy()])
    text = run.page()
    assert "Policy gap" in text
    assert "grad_norm</td><td>nan" in text


def test_a_missing_extra_is_named(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without matplotlib the error says which extra to install."""
    run.trace(run.healthy())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(tmp_path / "run.jsonl")]) == 1
    assert "from a checkout of r3patch: pip install '.[report]'" in capsys.readouterr().err


def test_the_pictures_are_whole_svg(run: Any) -> None:
    """Each embedded picture parses and refers to nothing outside itself."""
    from xml.etree import ElementTree as ET

    run.trace(run.healthy())
    for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", run.page()):
        root = ET.fromstring(base64.b64decode(data))
        links = [
            value
            for element in root.iter()
            for name, value in element.attrib.items()
            if name.endswith("href")
        ]
        assert all(link.startswith(("#", "data:")) for link in links)
