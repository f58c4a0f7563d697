"""``r3patch report``: one page from the traces of a run, with nothing outside it."""

from __future__ import annotations

import argparse
import base64
import math
import shutil
import textwrap
import time
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from r3patch.observe.history import Counts, History, load
from r3patch.observe.numerals import compact, percent, plural, some
from r3patch.observe.verdict import Check, Verdict, checks, judged, verdict

if TYPE_CHECKING:
    from r3patch.cli._figures import Figure
    from r3patch.observe.reader import Session

_MARKS = {
    "good": ("✓", "yes"),
    "bad": ("✗", "no"),
    "attention": ("!", "look"),
    "unknown": ("-", "unknown"),
}
_MAX_ROWS = 50
_MAX_WORST = 8
_MAX_TEXT = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        nargs="+",
        help="the files of R3PATCH_TRACE; run.jsonl stands for run.rank0.jsonl, run.rank1.jsonl...",
    )
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE")
    parser.add_argument("--title", default="Rollout routing replay", help="the page's heading")


def run(args: argparse.Namespace) -> int:
    """0 if the run is good, 1 if it is not; the first line says which, and why."""
    history = load(args.trace)
    found = checks(history)
    try:
        Path(args.output).write_text(page(history, args.title), encoding="utf-8")
    finally:  # the verdict is there without matplotlib too
        _print(str(verdict(found)))
        for check in found:
            _print(f"{_MARKS[check.kind][0]} {check.question} {check.answer}")
    _print(f"{args.output} written.")
    return 0 if verdict(found).good else 1


def _print(text: str) -> None:
    width = shutil.get_terminal_size().columns
    print(textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False))


def page(history: History, title: str, about: str = "", lead: str = "") -> str:
    """The whole page, ``lead`` (HTML) first.

    The policy in its head keeps the browser from asking anyone for anything.
    """
    found = checks(history)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(". ".join(filter(None, (_subtitle(history), about))))}</p>
</header>
<main>
{lead}
{_verdict(verdict(found))}
{_body(history, found)}
</main>
</body>
</html>
"""


def _verdict(found: Verdict) -> str:
    word, reason = escape(found.word), escape(found.reason)
    return f'<p class="verdict {found.kind}"><strong>{word}</strong> {reason}</p>'


def _body(history: History, found: Sequence[Check]) -> str:
    from r3patch.cli._figures import figures

    drawn = figures(history)
    sections = {
        "Key figures": _key_figures(history),
        "Is it on?": "",
        "Worst sessions": _worst(history),
        "Tokens and the alarm": _tokens(history),
        "Figures": _pictures(drawn),
        "MTP routers": _mtp(history),
        "Refusals and errors": _errors(history),
        "Notes": _notes(history),
        "Unreadable": _unreadable(history),
        "Provenance": _provenance(history),
    }
    there = [*(title for title, body in sections.items() if body), *(f.title for f in drawn)]
    sections["Is it on?"] = _checks(found, there)
    return "\n".join(
        f'<section id="{_slug(title)}"><h2>{title}</h2>{body}</section>'
        for title, body in sections.items()
        if body
    )


def _slug(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _subtitle(history: History) -> str:
    steps = history.steps
    unit = "step" if history.numbered else "session"
    span = f"{unit}s {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{unit} {[*steps, 0][0]}"
    where = f"{len(history.ranks)} ranks" if len(history.ranks) > 1 else "one rank"
    names = [name for name in history.phases if name]
    phases = f", phases {some(names)}" if names else ""
    count = plural(len(history.replays), "replay session")
    return f"{count}, {span}, {where}{phases}" if steps else f"{count}, {where}"


def _key_figures(history: History) -> str:
    rows, measured = history.total("rows_replayed"), history.total("rows_measured")
    routed = rows + history.total("rows_live") + history.total("rows_spread")
    recompute = history.total("recompute_rows_measured")
    tokens = [sum(pair) for pair in zip(*history.tokens.values(), strict=True)]
    gap = history.gap_series("mean_abs").get("", {})
    seconds = sorted(history.seconds.values())
    worst = max((found.mismatch for found in judged(history)), default=math.nan)
    least = " (at least)" if history.tokens_are_bounds else ""
    figures = [
        (compact(rows), f"rows replayed, {percent(rows, routed)} of the main routers'"),
        (
            percent(history.total("rows_differing"), measured),
            f"of router calls differ; {percent(worst)} in the worst session",
        ),
        (percent(tokens[1], tokens[0]) if tokens else "-", f"of tokens differ in a layer{least}"),
        (f"{gap[max(gap)]:.3g}" if gap else "-", "mean |Δ log p| at the last step"),
        (
            percent(history.total("recompute_rows_differing"), recompute),
            f"of live rows differ in {compact(history.total('recompute_calls'))} recompute calls",
        ),
        (
            f"{1000 * seconds[len(seconds) // 2]:.3g} ms" if seconds else "-",
            "host time per step to place and copy (median)",
        ),
    ]
    tiles = "".join(
        f"<div><dt>{escape(text)}</dt><dd>{escape(number)}</dd></div>" for number, text in figures
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _checks(found: Sequence[Check], there: Collection[str]) -> str:
    rows = []
    for check in found:
        mark, word = _MARKS[check.kind]
        # Where there are several phases, the title of a figure ends with the name of its own.
        place = next((title for title in there if title.startswith(check.shown_in)), None)
        link = f'<a href="#{_slug(place)}">{escape(check.shown_in)}</a>' if place else ""
        rows.append(
            f'<li class="{check.kind}">'
            f'<span class="mark" role="img" aria-label="{word}">{mark}</span>'
            f"<div><strong>{escape(check.question)}</strong> {escape(check.answer)} {link}</div>"
            "</li>"
        )
    return f'<ul class="checks">{"".join(rows)}</ul>'


def _worst(history: History) -> str:
    found = judged(history)
    rows = [
        (
            str(one.session),
            percent(one.mismatch),
            percent(one.overlap),
            compact(one.rows),
        )
        for one in found[:_MAX_WORST]
    ]
    if not rows:
        return ""
    bad = sum(bool(one.unrelated) for one in found)
    text = (
        f"{plural(bad, 'session')} of {len(found):,} replayed routes of something else."
        if bad
        else f"The {len(rows)} of {len(found):,} measured sessions that share least."
    )
    headings = ("session", "router calls that differ", "experts shared", "rows measured")
    return f"<p>{text}</p>{_table(headings, rows, bad=min(bad, len(rows)))}"


def _tokens(history: History) -> str:
    """The sessions whose rows agree least with their tokens, and with the model's own choice."""
    there = [s for s in history.replays if s.tokens_checked or s.agreement]
    if not there:
        return ""
    found = sorted(there, key=_trouble)
    rows = []
    for session in found[:_MAX_WORST]:
        agreed = session.agreement
        told = ("-", "-", "-")
        if agreed is not None:
            kappa = "too few rows" if agreed.kappa is None else f"{agreed.kappa:.2f}"
            told = (kappa, f"{agreed.chance:.2f}", f"{agreed.rows:,}")
        tokens = (f"{session.tokens_checked:,}", f"{session.tokens_wrong:,}")
        rows.append((str(session), *tokens, *told))
    headings = ("session", "tokens compared", "of others", "agreement", "chance", "rows")
    bad = sum(_trouble(session)[:2] < (0.0, True) for session in found)
    return (
        f"<p>The {len(rows)} of {plural(len(found), 'session')} that agree least: with the tokens "
        "that the model got, and by the first rows with Megatron's own choice (1 is equal, 0 as by "
        "chance).</p>"
        f"{_table(headings, rows, bad=min(bad, len(rows)))}"
    )


def _trouble(session: Session) -> tuple[float, bool, float]:
    """Orders sessions, the worst first."""
    wrong = session.tokens_wrong / max(1, session.tokens_checked)
    return (-wrong, not session.alarmed, session.kappa)


def _pictures(drawn: Sequence[Figure]) -> str:
    parts = []
    for number, figure in enumerate(drawn, start=1):
        shown = picture(figure, f"Figure {number}. {figure.title}")
        parts.append(f'<figure id="{_slug(figure.title)}">{shown}</figure>')
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def picture(figure: Figure, title: str) -> str:
    """What a <figure> of the page holds: the picture, and what stands below it."""
    data = base64.b64encode(figure.svg.encode()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(figure.alt)}">'
        f"<figcaption><strong>{escape(title)}.</strong> {escape(figure.caption)}</figcaption>"
    )


def _mtp(history: History) -> str:
    if not history.mtp:
        return ""
    shown = sorted(history.mtp.items(), key=lambda item: (not item[1]["rows_replayed"], item[0]))
    names = ("forward_calls", "recompute_calls", "rows_live", "rows_replayed")
    rows = [(name, *_counts(counts, names)) for name, counts in shown[:_MAX_ROWS]]
    bad = sum(bool(counts["rows_replayed"]) for counts in history.mtp.values())
    text = (
        "Rows were replayed by routers of multi-token-prediction layers, which have none."
        if bad
        else "Routers of multi-token-prediction layers have no rollout routes. They took "
        "Megatron's own top-k, in every call."
    )
    headings = ("router", "forward calls", "recompute calls", "live rows", "replayed rows")
    table = _table(headings, rows, bad=min(bad, len(rows)))
    return f"<p>{text}</p>{table}{_more(len(shown))}"


def _counts(counts: Counts, names: Iterable[str]) -> list[str]:
    return [f"{int(counts[name]):,}" for name in names]


def _errors(history: History) -> str:
    rows = [
        (str(session), f"{session.error.type}: {session.error.text}")
        for session in history.errors[:_MAX_ROWS]
        if session.error
    ]
    if not rows:
        return ""
    return _table(("session", "error"), rows, bad=len(rows)) + _more(len(history.errors))


def _notes(history: History) -> str:
    rows = []
    for note, series in sorted(history.other_notes().items()):
        values = [series[step] for step in sorted(series)]
        shown = (values[0], values[-1], min(values), max(values))
        rows.append((note, *(f"{value:.4g}" for value in shown)))
    headings = ("note", "first", "last", "least", "most")
    return _table(headings, rows[:_MAX_ROWS]) + _more(len(rows)) if rows else ""


def _unreadable(history: History) -> str:
    rows = [(text, f"{lines:,}") for text, lines in history.unreadable.most_common()]
    if not rows:
        return ""
    table = _table(("file and reason", "lines"), rows[:_MAX_ROWS], bad=len(rows))
    return f"<p>What these lines say is in no number of this page.</p>{table}{_more(len(rows))}"


def _more(count: int) -> str:
    return f"<p>And {count - _MAX_ROWS:,} more.</p>" if count > _MAX_ROWS else ""


def _provenance(history: History) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in history.versions.items())
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    files = ", ".join(Path(file).name for file in history.files[:_MAX_ROWS])
    return f"""<p>A row is one token in one forward call of one router. A router call differs where
its set of experts is not the one that Megatron would have chosen on the same input; experts shared
are the fraction that is in both. Only replayed rows are measured. Their input comes from layers
that replay already, so the trainer alone would differ more often. Every session of every rank is
judged by itself; the numbers and figures are summed over ranks, notes averaged by their tokens,
times those of the longest session. Steps that were done again after a restart count once.</p>
<p>From {escape(files)}: {plural(len(history.replays), "replay session")} and
{plural(history.recordings, "record session")}. {escape(versions)}. Written
{escape(written)}.</p>"""


def _table(headings: Iterable[str], rows: Sequence[Sequence[str]], *, bad: int = 0) -> str:
    """The first ``bad`` rows are marked so."""
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in headings)
    body = "".join(
        f"<tr{' class=bad' if number < bad else ''}>"
        + "".join(f"<td>{escape(_shortened(cell))}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."


_STYLE = """
:root { --ink: #22262b; --soft: #5b636d; --line: #d9dce0; --paper: #fff; --accent: #0b6e99;
  --good: #2e6b34; --bad: #a4262c; --look: #8a5a00; --fair: #edf4ee; --foul: #fbeeee;
  --odd: #fdf5e3; --on: #fff; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #a3abb5; --line: #3a4047; --paper: #16191d; --accent: #6fb7d6;
    --good: #7cc086; --bad: #f08a87; --look: #e2b657; --fair: #1c2a1f; --foul: #331d1f;
    --odd: #2e2714; --on: #16191d; }
  figure img { border-radius: 4px; filter: brightness(.88); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 Charter, "Bitstream Charter", "Source Serif 4", Cambria,
  Georgia, serif; }
header { border-bottom: 2px solid var(--ink); padding-bottom: .75rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.subtitle { color: var(--soft); margin: .35rem 0 0; }
.verdict { margin: 1.25rem 0 1.5rem; padding: .7rem .9rem; border-left: 5px solid var(--good);
  background: var(--fair); overflow-wrap: anywhere; }
.verdict strong { color: var(--good); }
.verdict.bad { border-color: var(--bad); background: var(--foul); }
.verdict.bad strong, tr.bad td:first-child { color: var(--bad); }
.verdict.attention { border-color: var(--look); background: var(--odd); }
.verdict.attention strong, .attention strong { color: var(--look); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0;
  margin: 0; border-top: 1px solid var(--line); border-left: 1px solid var(--line); }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end;
  padding: .7rem .85rem; border-right: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.tiles dt { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.tiles dd { margin: 0; font-size: clamp(1.2rem, 5vw, 1.55rem); white-space: nowrap;
  font-variant-numeric: tabular-nums lining-nums; }
.checks { list-style: none; margin: 0; padding: 0; border-top: 1px solid var(--line); }
.checks li { display: flex; gap: .75rem; padding: .5rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
.mark { flex: none; width: 1.5rem; height: 1.5rem; line-height: 1.5rem; border-radius: 50%;
  text-align: center; font: 700 .85rem/1.5rem system-ui, sans-serif; color: var(--on);
  background: var(--soft); }
.good .mark { background: var(--good); }
.bad .mark { background: var(--bad); }
.attention .mark { background: var(--look); }
.bad strong { color: var(--bad); }
.checks a { color: var(--soft); font-size: .85rem; font-style: italic; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: 2rem 2.5rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; line-height: 1.45; color: var(--soft); margin-top: .5rem; }
figcaption strong { color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; border-top: 1.5px solid var(--ink);
  border-bottom: 1.5px solid var(--ink); }
th { text-align: left; font-weight: 600; border-bottom: 1px solid var(--ink); }
th, td { padding: .35rem .9rem .35rem 0; vertical-align: top; }
td { overflow-wrap: anywhere; }
#provenance p { color: var(--soft); font-size: .9rem; }
@media (max-width: 480px) {
  body { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
@media print {
  @page { margin: 16mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .figures { grid-template-columns: 1fr 1fr; gap: 6mm 8mm; }
  .tiles { grid-template-columns: repeat(3, 1fr); }
  figure, .checks li, tr, .tiles div { break-inside: avoid; }
  h2 { break-after: avoid; }
  .checks a { text-decoration: none; }
  .mark, .verdict { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; }
}
"""
