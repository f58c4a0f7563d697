"""What the demo says at its end, in words that are made from its numbers."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from r3patch.cli._terminal import paragraph, plain, table
from r3patch.cli.demo.results import (
    FROZEN,
    LEAK,
    PLAIN,
    REPLAY,
    Curves,
    Difference,
    Excerpt,
    change,
)

SHOWN = 5  # differences of the excerpt
_WIDE = 68  # columns that the whole table takes


def tell(out: Console, curves: Curves, excerpt: Excerpt | None) -> None:
    """Print the table, what it says, and the excerpt."""
    out.print(_table(curves, out.width))
    for text in reading(curves):
        out.print(paragraph(text))
    if excerpt is not None:
        _print_excerpt(out, excerpt)


def _table(curves: Curves, width: int) -> object:
    steps = next(iter(curves.values()))[-1].step
    headings = ("", "accepted", "change", "MTP loss", "policy gap", "calls unlike")
    rows = [
        (
            name,
            f"{points[-1].accepted:.1%}",
            f"[bold]{change(points):+.1f}[/]",
            f"{points[-1].served_loss:.3f}",
            f"{points[-1].gap:.3f}",
            f"{points[-1].mismatch:.1%}",
        )
        for name, points in curves.items()
    ]
    shown = len(headings) if width >= _WIDE else 3  # the paragraphs below have the others
    title = f"MTP drafts that the engine accepts after {steps} steps from the same weights"
    return table(title, headings[:shown], [row[:shown] for row in rows])


def reading(curves: Curves) -> Iterator[str]:
    """What the run showed, a paragraph each; where it did not come out as expected, that."""
    plain_, replay, leak, frozen = (curves[arm.name] for arm in (PLAIN, REPLAY, LEAK, FROZEN))
    yield (
        f"Replay: {plain_[-1].mismatch:.1%} of the trainer's router calls took other experts than "
        f"the rollout's; with replay {replay[-1].mismatch:.1%}. The policy gap goes from "
        f"{plain_[-1].gap:.3f} to {replay[-1].gap:.3f}."
    )
    lost, worse = change(replay) - change(leak), change(frozen) - change(leak)
    text = (
        f"MTP: where replay reaches it, the policy gap is {leak[-1].gap:.3f}, next to "
        f"{replay[-1].gap:.3f}. The MTP loss that its trainer logs goes from "
        f"{leak[1].trained_loss:.2f} to {leak[-1].trained_loss:.2f}, while the engine's goes from "
        f"{leak[0].served_loss:.2f} to {leak[-1].served_loss:.2f}. "
    )
    if lost > 0 and worse > 0:
        text += (
            f"The engine accepts {lost:.1f} points fewer drafts than with labels, and {worse:.1f} "
            "fewer than if MTP had not been trained at all."
        )
    else:
        text += (
            "This run did not come out as expected: replay that reaches MTP should cost accepted "
            f"drafts, and they changed by {change(leak):+.1f} points, against "
            f"{change(replay):+.1f} with labels and {change(frozen):+.1f} with MTP frozen."
        )
    yield text
    yield (
        "The model was pretrained on this text and is measured on it, and the loss is "
        "cross-entropy: a few steps of this are no RL run. Where a model has learnt less of its "
        "text the damage is smaller (docs/demo.md); nothing here says how large it is in yours."
    )


def difference_line(difference: Difference, text: str) -> str:
    """One token that differed, in words."""
    token = text[difference.place]
    return (
        f"{token!r} layer {difference.layer}: rollout {_ids(difference.rollout)}, trainer "
        f"{_ids(difference.trainer)}"
    )


def _ids(experts: tuple[int, ...]) -> str:
    return ", ".join(map(str, experts))


def caption(excerpt: Excerpt) -> str:
    """What the excerpt shows."""
    return (
        f"Tokens that the trainer, without replay, sent to other experts than the rollout did: "
        f"{excerpt.share:.1%} of the last batch's; here are some."
    )


def _print_excerpt(out: Console, excerpt: Excerpt) -> None:
    out.print(paragraph(caption(excerpt)))
    text = Text("    ")
    marked = {difference.place for difference in excerpt.differences}
    for place, character in enumerate(excerpt.text.replace("\n", " ")):
        text.append(character, style="bold reverse" if place in marked else "")
    out.print(text, soft_wrap=True)
    for difference in excerpt.differences[:SHOWN]:
        out.print(f"    {plain(difference_line(difference, excerpt.text))}")
    out.print()
