"""Fourteen ways in which rows of the right count are of other tokens, and what tells them.

    python benchmarks/faults.py [--update] [--cost]

Every fault and the healthy twin of its layout run on stock Megatron on the CPU: the model itself is
the rollout's engine, sample by sample; the training batch is collated here, by hand; the rows are
placed by `r3patch.Layout`, in the fault's way. Tokens and the alarm look at the same session, each
by itself: the table says what each sees. Prints the table as Markdown; ``--update``
writes it into docs/faults.md, ``--cost`` prints what the comparison of tokens costs instead. The
exit status is 1 where a healthy twin is not silent.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import r3patch
from r3patch import Layout, Routes, testing
from r3patch.sessions import _alarm
from r3patch.sessions._tokens import TokenWatch

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
BEGIN, END = "<!-- table: python benchmarks/faults.py --update -->", "<!-- end of the table -->"

# Two prompts with two responses each. Siblings are of one length: other lengths would be told.
PROMPTS, LENGTHS = (8, 8, 12, 12), (32, 32, 28, 38)
WIDTH, PACK, PROMPT_WIDTH = 44, 136, 16  # tokens of a padded row, of a pack, of a row's prompts
CUT = slice(10, 13)  # tokens of sample 0 that a trainer drops after decoding
THOUGHT = slice(15, 21)  # tokens of the last sample's first turn that its second turn drops
PADDING = 255  # a token of the vocabulary, as engines and trainers have it

Tokens = torch.Tensor  # [num_tokens] int64
Microbatches = list[list[Routes]]  # the samples of each, in the batch's order


# The rollout


def sample_tokens(seed: int) -> list[list[Tokens]]:
    """The samples of two microbatches; siblings share their prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tokens:
        return torch.randint(PADDING, (count,), generator=generator)

    microbatches = []
    for _ in range(2):
        prompts = [draw(PROMPTS[0]), draw(PROMPTS[2])]
        lengths = enumerate(zip(PROMPTS, LENGTHS, strict=True))
        microbatches.append(
            [torch.cat([prompts[i // 2], draw(length - prompt)]) for i, (prompt, length) in lengths]
        )
    return microbatches


def generate(model: torch.nn.Module, tokens: Tokens) -> Routes:
    """A sample as an engine returns it: its last token was never fed."""
    with r3patch.record(model) as recording, torch.no_grad():
        model(**Batch([tokens.tolist()], [[0] * len(tokens)]).arguments())
    (routes,) = recording.routes
    valid = torch.arange(len(tokens)) < len(tokens) - 1
    return Routes(
        routes.experts, routes.layers, valid, num_experts=routes.num_experts, tokens=tokens
    )


# The training batch


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and which sample each is of (-1: padding), by hand and without `Layout`."""

    tokens: list[list[int]]
    samples: list[list[int]]

    def arguments(self) -> dict[str, torch.Tensor]:
        """What ``GPTModel.forward`` takes. A token attends to those before it in its sample."""
        ids, samples = torch.tensor(self.tokens), torch.tensor(self.samples)
        length = ids.shape[1]
        other = samples.unsqueeze(1) != samples.unsqueeze(2)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        return {
            "input_ids": ids,
            "labels": ids.roll(-1, 1),
            "position_ids": torch.arange(length).expand_as(ids),
            "attention_mask": (other | later).unsqueeze(1),
        }

    def part(self, chunks: Sequence[int], of: int) -> Batch:
        """Some of so many equal parts of each row."""

        def cut(rows: list[list[int]]) -> list[list[int]]:
            size = len(rows[0]) // of
            return [[v for c in chunks for v in row[c * size : (c + 1) * size]] for row in rows]

        return Batch(cut(self.tokens), cut(self.samples))


def packed(samples: list[Tokens]) -> Batch:
    tokens = torch.cat(samples).tolist()
    numbers = [number for number, sample in enumerate(samples) for _ in sample]
    rest = PACK - len(tokens)
    return Batch([tokens + [PADDING] * rest], [numbers + [-1] * rest])


def padded(samples: list[Tokens], before: Callable[[int], int]) -> Batch:
    """One sample a row, behind so many tokens of padding."""
    rows, numbers = [], []
    for number, sample in enumerate(samples):
        left = before(number)
        right = WIDTH - len(sample) - left
        rows.append([PADDING] * left + sample.tolist() + [PADDING] * right)
        numbers.append([-1] * left + [number] * len(sample) + [-1] * right)
    return Batch(rows, numbers)


def right(samples: list[Tokens]) -> Batch:
    return padded(samples, lambda _: 0)


def left(samples: list[Tokens]) -> Batch:
    return padded(samples, lambda number: WIDTH - len(samples[number]))


def prompts_left(samples: list[Tokens]) -> Batch:
    return padded(samples, lambda number: PROMPT_WIDTH - PROMPTS[number])


COLLATE: dict[str, Callable[[list[Tokens]], Batch]] = {
    "packed": packed,
    "padded right": right,
    "padded left": left,
    "prompts left, responses right": prompts_left,
    # The part of rank 0 of two, as a model of its own: tests/distributed has two ranks.
    "tensor + sequence parallel": lambda samples: right(samples).part([0], of=2),
    "context parallel": lambda samples: right(samples).part([0, 3], of=4),
}
RIGHT = Layout(packed=False, seq_length=WIDTH)
LAYOUTS = {
    "packed": Layout(pack_length=PACK),
    "padded right": RIGHT,
    "padded left": dataclasses.replace(RIGHT, padding_side="left"),
    "prompts left, responses right": dataclasses.replace(RIGHT, prompt_width=PROMPT_WIDTH),
    "tensor + sequence parallel": dataclasses.replace(RIGHT, tp_size=2, sequence_parallel=True),
    "context parallel": dataclasses.replace(RIGHT, cp_size=2),
}


def place(layout: Layout, microbatches: Microbatches) -> list[Routes]:
    prompts = PROMPTS if layout.prompt_width else None
    return [layout.place(samples, prompts) for samples in microbatches]


# The cases


@functools.cache
def generated(weights: int, seed: int) -> Microbatches:
    """What a model of these weights returns for these samples."""
    model = build(weights)
    return [[generate(model, sample) for sample in part] for part in sample_tokens(seed)]


@functools.cache
def first_turn() -> Routes:
    """Of microbatch 0's last sample: its second turn was rendered without what was thought."""
    whole = sample_tokens(0)[0][-1]
    thought = (whole[THOUGHT] + 1) % PADDING
    return generate(
        build(0), torch.cat([whole[: THOUGHT.start], thought, whole[THOUGHT.start : 22]])
    )


class World:
    """A model, what it generated, and what is to be trained on."""

    def __init__(self, **recompute: Any) -> None:
        self.model = build(0, **recompute)
        self.tokens = sample_tokens(0)
        self.rollout = generated(0, 0)

    def cut_tokens(self) -> list[list[Tokens]]:
        first, *others = self.tokens[0]
        return [[first[_without(CUT, len(first))], *others], self.tokens[1]]


def build(seed: int, **overrides: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    own: dict[str, Any] = {"num_moe_experts": 32, "multi_latent_attention": False}
    (model,) = testing.tiny_model(**{**own, **overrides})
    testing.seed_parameters([model], seed)
    return model.train()


def _without(dropped: slice, length: int) -> torch.Tensor:
    places = torch.arange(length)
    return places[(places < dropped.start) | (places >= dropped.stop)]


def _replace(rollout: Microbatches, number: int, sample: Routes) -> Microbatches:
    """With another sample in the first microbatch."""
    return [[sample if i == number else s for i, s in enumerate(rollout[0])], *rollout[1:]]


def _stitched(world: World) -> Routes:
    """The rows of the first turn, and from there on those of the second, by their number alone."""
    turns = first_turn(), world.rollout[0][-1]
    start = turns[0].num_tokens - 1  # the first turn's last token was never fed
    parts = turns[0][:start], turns[1][start:]
    whole = [torch.cat([getattr(p, name) for p in parts]) for name in ("experts", "mask", "tokens")]
    return Routes(
        whole[0], turns[0].layers, whole[1], num_experts=turns[0].num_experts, tokens=whole[2]
    )


@dataclass(frozen=True)
class Case:
    """Rows for a batch that is collated as ``batch`` says."""

    batch: str
    rows: Callable[[World], list[Routes]]
    tokens: Callable[[World], list[list[Tokens]]] = lambda world: world.tokens


def _other(batch: str, change: Callable[[World], Microbatches]) -> Case:
    """Samples that are other ones, placed as they should be."""
    return Case(batch, lambda world: place(LAYOUTS[batch], change(world)))


def _placed(batch: str, layout: Layout) -> Case:
    """The right samples, placed in another way."""
    return Case(batch, lambda world: place(layout, world.rollout))


def _rolled(rows: list[Routes]) -> list[Routes]:
    return [part[torch.arange(part.num_tokens).roll(1)] for part in rows]


def _next_layers(rows: list[Routes]) -> list[Routes]:
    return [
        Routes(p.experts.roll(1, 1), p.layers, p.mask, num_experts=p.num_experts, tokens=p.tokens)
        for p in rows
    ]


FAULTS = {
    "microbatches swapped": _other("packed", lambda w: w.rollout[::-1]),
    "samples swapped in a pack": _other(
        "packed", lambda w: [[w.rollout[0][i] for i in (2, 0, 1, 3)], w.rollout[1]]
    ),
    "a sample cut after decoding": Case(
        "packed", lambda w: place(LAYOUTS["packed"], w.rollout), World.cut_tokens
    ),
    "left-padded prompts, right-padded responses": _placed("prompts left, responses right", RIGHT),
    "wrong padding side": _placed("padded left", RIGHT),
    "shift by one": Case("packed", lambda w: _rolled(place(LAYOUTS["packed"], w.rollout))),
    "batch-first order": _placed("padded right", Layout(align=WIDTH)),
    "wrong tensor-parallel rank": _placed(
        "tensor + sequence parallel",
        dataclasses.replace(LAYOUTS["tensor + sequence parallel"], tp_rank=1),
    ),
    "wrong context-parallel rank": _placed(
        "context parallel", dataclasses.replace(LAYOUTS["context parallel"], cp_rank=1)
    ),
    "a sibling's rows": _other("packed", lambda w: _replace(w.rollout, 0, w.rollout[0][1])),
    "an older batch": _other("packed", lambda w: generated(0, 1)),
    "a re-rendered history": _other("packed", lambda w: _replace(w.rollout, 3, _stitched(w))),
    "rows of the next layer": Case(
        "packed", lambda w: _next_layers(place(LAYOUTS["packed"], w.rollout))
    ),
    "other weights": _other("packed", lambda w: generated(1, 0)),
}

HEALTHY = {
    **{name: _placed(name, layout) for name, layout in LAYOUTS.items()},
    "a sample cut with its routes": Case(
        "packed",
        lambda w: place(
            LAYOUTS["packed"],
            _replace(w.rollout, 0, w.rollout[0][0][_without(CUT, LENGTHS[0])]),
        ),
        World.cut_tokens,
    ),
    "turns joined": _other(
        "packed",
        lambda w: _replace(
            w.rollout, 3, Routes.join([first_turn(), w.rollout[0][3]], keep="first")
        ),
    ),
}


# What tells


@dataclass(frozen=True)
class Verdict:
    """What was told, empty for silence; and whether somebody looked."""

    tokens: str  # the text of the error
    alarm: str  # of the warning
    compared: int
    agreement: float | None
    alarming: bool  # whether the alarm rings, or would if no error were before it

    @property
    def who(self) -> str:
        told = {"tokens": bool(self.tokens), "alarm": self.alarming}
        return " and ".join(name for name in told if told[name]) or "nothing"

    @property
    def silent(self) -> bool:
        """Silent, and not for want of a look."""
        looked = self.compared > 0 and self.agreement is not None
        return looked and self.who == "nothing" and not self.alarm


class Heard(logging.Handler):
    """The texts of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def judge(world: World, case: Case) -> Verdict:
    """Run a training step of two microbatches; backward too where it repeats the forward."""
    batches = [COLLATE[case.batch](samples).arguments() for samples in case.tokens(world)]
    session = r3patch.replay(world.model, case.rows(world))
    backward = getattr(world.model.config, "recompute_granularity", None) is not None
    logger, heard, told = logging.getLogger(_alarm.__name__), Heard(), ""
    logger.addHandler(heard)
    try:
        with session, torch.set_grad_enabled(backward):
            for batch in batches:
                loss = world.model(**batch).mean()
                if backward:
                    loss.backward()
    except r3patch.ReplayError as error:
        told = str(error)  # which goes before the alarm: that still has its figure
    finally:
        logger.removeHandler(heard)
        world.model.zero_grad()
    compared = sum(check.checked for check in session.stats.token_checks)
    rows = session.stats.first_rows
    return Verdict(told, "".join(heard.texts), compared, rows.kappa, rows.alarming())


def table(verdicts: dict[str, Verdict]) -> str:
    lines = ["| fault | what tells | agreement | text |", "|---|---|---|---|"]
    for name, verdict in verdicts.items():
        assert verdict.agreement is not None
        text = verdict.tokens or verdict.alarm
        lines.append(f"| {name} | {verdict.who} | {verdict.agreement:.2f} | {text} |")
    return "\n".join(lines)


# The cost


def cost(repeats: int) -> tuple[float, float, float]:
    """Of 4,096 tokens: microseconds to compare them, and of a whole forward; bytes for each."""
    (batch,) = testing.random_batches(num_microbatches=1, micro_batch_size=8, seq_length=512)
    model = build(0)
    with r3patch.record(model) as recording, torch.no_grad():
        model(**batch)
    (plain,) = recording.routes
    tokens = batch["input_ids"].t().flatten()
    routes = Routes(plain.experts, plain.layers, num_experts=plain.num_experts, tokens=tokens)
    bytes_each = (len(pickle.dumps(routes)) - len(pickle.dumps(plain))) / len(tokens)
    spent: list[float] = []
    whole: list[float] = []
    with (
        _timed("_note_call", spent),
        _timed("_note_ids", spent),
        _timed("compare", spent),
        r3patch.replay(model, [routes] * repeats, alarm="off"),
        torch.no_grad(),
    ):
        for _ in range(repeats):
            begin = time.thread_time()
            model(**batch)
            whole.append(time.thread_time() - begin)
    calls = len(spent) // repeats
    each = [sum(spent[i * calls : (i + 1) * calls]) for i in range(repeats)]
    return statistics.median(each) * 1e6, statistics.median(whole) * 1e6, bytes_each


@contextlib.contextmanager
def _timed(name: str, seconds: list[float]) -> Iterator[None]:
    """Every call of a method of the session's `TokenWatch`."""
    method = getattr(TokenWatch, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if name == "compare":  # the copy of the rows is the session's, with tokens and without
            args[1].to_device(args[3])
        begin = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.thread_time() - begin)

    with mock.patch.object(TokenWatch, name, timed):
        yield


def update(page: Path, text: str) -> None:
    """Put the table between the marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write the table into {PAGE.name}")
    parser.add_argument("--cost", action="store_true", help="what comparing tokens costs, instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with testing.megatron_on_cpu():
        if args.cost:
            compared, whole, each = cost(20)
            print(
                f"4,096 tokens: {compared:.0f} us to compare, in a forward of {whole / 1e3:.0f} ms"
                f"; {each:.1f} bytes per token travel with the rows"
            )
            return 0
        world = World()
        found = table({name: judge(world, case) for name, case in FAULTS.items()})
        print(found)
        if args.update:
            update(PAGE, found)
        false = [name for name, case in HEALTHY.items() if not judge(world, case).silent]
    print(f"\n{len(HEALTHY)} healthy twins, {len(false)} false alarms {false or ''}")
    return len(false) > 0


if __name__ == "__main__":
    raise SystemExit(main())
