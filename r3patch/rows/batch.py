"""Many samples at once: answered, aborted or in several turns, and what only all of them show."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from r3patch._errors import RoutesError
from r3patch._layers import Sizes
from r3patch.rows.arrays import is_numpy
from r3patch.rows.decode import SUSPICIOUS_ZEROS, count_tokens, decode, model_sizes
from r3patch.rows.plain import integer
from r3patch.rows.routes import Routes

logger = logging.getLogger(__name__)

# So many picks per expert leave none of the upper half out by chance.
_PICKS_PER_EXPERT = 16


def decode_batch(
    samples: Sequence[Any],
    *,
    tokens: Any = None,
    num_tokens: Any = None,
    config: Any = None,
    num_experts: int | None = None,
    topk: int | None = None,
    num_layers: int | None = None,
    moe_layers: Sequence[int] | None = None,
    start: int | Sequence[Any] = 0,
    on_bad_rows: Literal["error", "invalid"] = "error",
    keep: Literal["error", "first", "latest"] = "error",
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Routes]:
    """Routes of a batch of samples; `decode` explains the arguments that both have.

    Args:
        samples: for each sample its payload; None where it was aborted, which gives missing rows;
            or the list of its turns, each a payload or None, which are joined.
        tokens: for each sample its token ids, or the list of them for each of its turns.
        num_tokens: their numbers in place of the ids, in the same form.
        start: one for all, or one for each sample, or for each turn.
        keep: which row counts where turns differ, as `Routes.join` takes it.
        threads: decode so many samples at a time.
        progress: called as ``progress(done, total)`` after each sample, from this thread.

    Returns:
        One `Routes` for each sample, in their order.

    Raises:
        RoutesError: as `decode` and `Routes.join`, with the number of the sample in front; a list
            of another length than ``samples``; or under topk 1 a layer that has expert 0 in every
            row of all samples, which was never captured.
    """
    threads = integer(threads, "threads", 1)
    model = model_sizes(
        config, num_experts=num_experts, topk=topk, num_layers=num_layers, moe_layers=moe_layers
    )

    def one(payload: Any, ids: Any, count: Any, begin: Any, name: str) -> Routes:
        if isinstance(payload, list) and payload and _is_payload(payload[0]):
            spread = _each(name, "turns", len(payload), ids, count, begin)
            turns = [
                one(*turn, f"{name}, turn {number}")
                for number, turn in enumerate(zip(payload, *spread, strict=True))
            ]
            try:
                return Routes.join(turns, keep=keep)
            except RoutesError as error:
                raise RoutesError(f"{name}: {error}") from error
        if payload is None:
            return _missing(ids, count, model, name)
        return decode(
            payload,
            tokens=ids,
            num_tokens=count,
            **model._asdict(),
            start=begin,
            on_bad_rows=on_bad_rows,
            name=name,
        )

    names = [f"sample {number}" for number in range(len(samples))]
    columns = _each("the batch", "samples", len(samples), tokens, num_tokens, start)
    batch = []
    with ThreadPoolExecutor(threads) as pool:
        results = (pool.map if threads > 1 else map)(one, samples, *columns, names)
        for routes in results:
            batch.append(routes)
            if progress is not None:
                progress(len(batch), len(samples))
    _warn_of_too_many_experts(batch, model)
    return _without_dead_layers(batch, on_bad_rows)


def _is_payload(item: Any) -> bool:
    """Whether an element of a list is a turn, rather than a row or an id."""
    text = (str, bytes, bytearray, Mapping, tuple, Tensor)
    return item is None or isinstance(item, text) or is_numpy(item)


def _each(
    name: str, what: str, count: int, tokens: Any, num_tokens: Any, start: Any
) -> tuple[Any, Any, Any]:
    """The three arguments for each of ``count`` samples or turns."""
    columns = []
    for key, given in (("tokens", tokens), ("num_tokens", num_tokens), ("start", start)):
        one_for_all = given is None or (key == "start" and not isinstance(given, (list, tuple)))
        value = [given] * count if one_for_all else given
        if not hasattr(value, "__len__") or len(value) != count:
            raise RoutesError(
                f"{name} has {count} {what}, but {key} is no list of as many: "
                f"{f'it has {len(value)}' if hasattr(value, '__len__') else repr(value)}."
            )
        columns.append(value)
    return columns[0], columns[1], columns[2]


def _missing(tokens: Any, num_tokens: Any, model: Sizes, name: str) -> Routes:
    try:
        ids, count = count_tokens(tokens, num_tokens)
    except RoutesError as error:
        raise RoutesError(f"{name}: {error}") from error
    return Routes.missing(count, model.moe_layers, model.topk, model.num_experts, tokens=ids)


def _warn_of_too_many_experts(batch: list[Routes], model: Sizes) -> None:
    picks = sum(int(routes.mask.sum()) for routes in batch) * model.topk
    if picks < _PICKS_PER_EXPERT * model.num_experts:
        return
    greatest = max(int(routes.experts.max()) for routes in batch if routes.experts.numel())
    if greatest < model.num_experts // 2:
        logger.warning(
            "num_experts is %d, but the greatest id of %d picks is %d: is it another model's?",
            model.num_experts, picks, greatest,
        )  # fmt: skip


def _without_dead_layers(batch: list[Routes], on_bad_rows: str) -> list[Routes]:
    """With topk 1 a row of zeros is legal; a layer of nothing else in all samples is not."""
    if not batch or batch[0].topk > 1 or batch[0].num_experts == 1:
        return batch
    known = torch.stack([routes.mask.sum(0) for routes in batch]).sum(0)
    used = torch.stack([(routes.experts[..., 0] != 0).any(0) for routes in batch]).any(0)
    dead = ~used & (known >= SUSPICIOUS_ZEROS)
    if not dead.any():
        return batch
    layers = [
        layer for layer, is_dead in zip(batch[0].layers, dead.tolist(), strict=True) if is_dead
    ]
    trouble = (
        f"layers {layers} have expert 0 in every row of all {len(batch)} samples, so they were "
        "never captured"
    )
    if on_bad_rows == "error":
        raise RoutesError(f"{trouble}: see decode on rows of zeros.")
    logger.warning("%s. They are marked invalid.", trouble)
    return [
        Routes(r.experts, r.layers, r.mask & ~dead, num_experts=r.num_experts, tokens=r.tokens)
        for r in batch
    ]
