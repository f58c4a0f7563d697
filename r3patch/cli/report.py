"""``r3patch report``: one page from the traces of a run, with nothing outside it."""

from __future__ import annotations

import argparse
import base64
import math
import time
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

from r3patch.cli._figures import Figure, figures
from r3patch.observe.history import Check, History, checks, gap_series, load, other_notes

_MARKS = {True: ("good", "✓", "yes"), False: ("bad", "✗", "no"), None: ("unknown", "-", "unknown")}
_MAX_ERRORS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        nargs="+",
        help="the files of R3PATCH_TRACE; run.jsonl stands for run.rank0.jsonl, run.rank1.jsonl...",
    )
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE")
    parser.add_argument("--title", default="Rollout routing replay", help="the page's heading")


def run(args: argparse.Namespace) -> int:
    history = load(args.trace)
    Path(args.output).write_text(page(history, args.title), encoding="utf-8")
    for check in checks(history):
        print(f"{_MARKS[check.good][1]} {check.question} {check.answer}")
    print(f"{args.output} written.")
    return 0


def page(history: History, title: str) -> str:
    """The whole page. The policy in its head keeps the browser from asking anyone for anything."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(_subtitle(history))}</p>
</header>
<main>
{_body(history)}
</main>
</body>
</html>
"""


def _body(history: History) -> str:
    drawn = figures(history)
    sections = {
        "Key figures": _key_figures(history),
        "Is it on?": "",
        "Figures": _pictures(drawn),
        "MTP routers": _mtp(history),
        "Refusals and errors": _errors(history),
        "Notes": _notes(history),
        "Provenance": _provenance(history),
    }
    there = {*(title for title, body in sections.items() if body), *(f.title for f in drawn)}
    sections["Is it on?"] = _checks(checks(history), there)
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
    span = f"{unit}s {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{unit} {steps[0]}"
    where = f"{len(history.ranks)} ranks" if len(history.ranks) > 1 else "one rank"
    return f"{history.sessions:,} replay sessions, {span}, {where}" if steps else where


def _key_figures(history: History) -> str:
    rows, measured = history.total("rows_replayed"), history.total("rows_measured")
    routed = rows + history.total("rows_live") + history.total("rows_spread")
    recompute = history.total("recompute_rows_measured")
    tokens = [sum(pair) for pair in zip(*history.tokens.values(), strict=True)]
    gap = gap_series(history, "mean_abs").get("", {})
    seconds = sorted(history.seconds.values())
    figures = [
        (_compact(rows), f"rows replayed, {_percent(rows, routed)} of the main routers'"),
        (_percent(history.total("rows_differing"), measured), "of router calls differ"),
        (
            _percent(tokens[1], tokens[0]) if tokens else "-",
            "of tokens differ in a layer" + (" (at least)" if history.tokens_are_bounds else ""),
        ),
        (f"{gap[max(gap)]:.3g}" if gap else "-", "mean |Δ log p| at the last step"),
        (
            _percent(history.total("recompute_rows_differing"), recompute),
            f"of live rows differ in {_compact(history.total('recompute_calls'))} recompute calls",
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
        kind, mark, word = _MARKS[check.good]
        link = f'<a href="#{_slug(check.shown_in)}">{escape(check.shown_in)}</a>'
        rows.append(
            f'<li class="{kind}"><span class="mark" role="img" aria-label="{word}">{mark}</span>'
            f"<div><strong>{escape(check.question)}</strong> {escape(check.answer)} "
            f"{link if check.shown_in in there else ''}</div></li>"
        )
    return f'<ul class="checks">{"".join(rows)}</ul>'


def _pictures(drawn: Sequence[Figure]) -> str:
    parts = []
    for number, figure in enumerate(drawn, start=1):
        data = base64.b64encode(figure.svg.encode()).decode()
        parts.append(
            f'<figure id="{_slug(figure.title)}">'
            f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(figure.alt)}">'
            f"<figcaption><strong>Figure {number}. {escape(figure.title)}.</strong> "
            f"{escape(figure.caption)}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _mtp(history: History) -> str:
    if not history.mtp:
        return ""
    rows = [
        (name, *(_count(counts[c]) for c in ("forward_calls", "recompute_calls", "rows_live")))
        for name, counts in sorted(history.mtp.items())
    ]
    text = (
        "Routers of multi-token-prediction layers have no rollout routes. They took Megatron's own "
        "top-k, in every call."
        if not any(counts["rows_replayed"] for counts in history.mtp.values())
        else "Rows were replayed by routers of multi-token-prediction layers, which have none."
    )
    table = _table(("router", "forward calls", "recompute calls", "rows"), rows)
    return f"<p>{text}</p>{table}"


def _errors(history: History) -> str:
    if not history.errors:
        return ""
    rows = [
        (
            "-" if record["step"] is None else str(record["step"]),
            str(record["rank"]),
            f"{record['error']['type']}: {record['error']['text']}",
        )
        for record in history.errors[:_MAX_ERRORS]
    ]
    more = len(history.errors) - len(rows)
    rest = f"<p>And {more} more.</p>" if more else ""
    table = _table(("step", "rank", "error"), rows)
    return table + rest


def _notes(history: History) -> str:
    rows = []
    for note, series in sorted(other_notes(history).items()):
        values = [series[step] for step in sorted(series)]
        shown = (values[0], values[-1], min(values), max(values))
        rows.append((note, *(f"{value:.4g}" for value in shown)))
    return _table(("note", "first", "last", "least", "most"), rows) if rows else ""


def _provenance(history: History) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in history.versions.items())
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    files = ", ".join(Path(file).name for file in history.files)
    return f"""<p>A row is one token in one forward call of one router. Two rows differ if their
experts differ as sets; their overlap is the fraction of experts that are in both. Measured are
replayed rows only, against what Megatron would have chosen on the same input. Steps that were done
again after a restart count once, as the last process did them. Numbers of ranks are summed, notes
averaged by their tokens, times those of the slowest rank.</p>
<p>From {escape(files)}: {history.sessions:,} replay and {history.recordings:,} record sessions.
{escape(versions)}. Written {escape(written)}.</p>"""


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _percent(part: float, whole: float) -> str:
    """With a digit more where little is left to see."""
    if not whole:
        return "-"
    return f"{part / whole:.2%}" if 0 < part / whole < 0.01 else f"{part / whole:.1%}"


def _count(number: float) -> str:
    return f"{int(number):,}"


def _compact(number: float) -> str:
    """Three digits and a power of a thousand."""
    if number < 10_000:
        return _count(number)
    power = min(3, int(math.log10(number) // 3))
    return f"{number / 1000**power:.3g}{' kMG'[power]}"


_STYLE = """
:root { --ink: #22262b; --soft: #5b636d; --line: #d9dce0; --paper: #fff; --accent: #0b6e99;
  --good: #2e6b34; --bad: #a4262c; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 Charter, "Bitstream Charter", "Source Serif 4", Cambria,
  Georgia, serif; }
header { border-bottom: 2px solid var(--ink); padding-bottom: .75rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.subtitle { color: var(--soft); margin: .35rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0;
  margin: 0; border-top: 1px solid var(--line); border-left: 1px solid var(--line); }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end;
  padding: .7rem .85rem; border-right: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.tiles dt { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.tiles dd { margin: 0; font-size: 1.55rem; font-variant-numeric: tabular-nums lining-nums; }
.checks { list-style: none; margin: 0; padding: 0; border-top: 1px solid var(--line); }
.checks li { display: flex; gap: .75rem; padding: .5rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
.mark { flex: none; width: 1.5rem; height: 1.5rem; line-height: 1.5rem; border-radius: 50%;
  text-align: center; font: 700 .85rem/1.5rem system-ui, sans-serif; color: #fff;
  background: var(--soft); }
.good .mark { background: var(--good); }
.bad .mark { background: var(--bad); }
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
  .mark { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; }
}
"""
