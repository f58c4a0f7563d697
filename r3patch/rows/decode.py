"""From what a rollout engine returned to ``Routes``.

Row i of a payload holds the experts chosen while token i was fed through the model. The last token
of a sequence is sampled but never fed, so n tokens come with n - 1 rows. Engines differ in the
rest: the dtype, the wrapping, and whether the layer axis counts all layers or MoE layers only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from r3patch._errors import RoutesError, UnsupportedRoutingError
from r3patch._layers import Sizes, sizes
from r3patch.rows.arrays import as_tokens, signed
from r3patch.rows.checks import narrow, stored_dtype
from r3patch.rows.payloads import read
from r3patch.rows.plain import ForeignErrors, check_layers, check_sizes, integer
from r3patch.rows.routes import Routes

logger = logging.getLogger(__name__)

# Two neighbours can share a row by chance in a shallow model; stale buffers repeat one for long.
_SUSPICIOUS_RUN = 16
# With topk 1 a single zero is a legal row; a column of this many is not.
SUSPICIOUS_ZEROS = 64
# Far above any model: a count of tokens given as num_layers must not build a tuple of its length.
_MOST_LAYERS = 1 << 16


def decode(
    payload: Any,
    *,
    tokens: Any = None,
    num_tokens: int | None = None,
    config: Any = None,
    num_experts: int | None = None,
    topk: int | None = None,
    num_layers: int | None = None,
    moe_layers: Iterable[int] | None = None,
    start: int = 0,
    on_bad_rows: Literal["error", "invalid"] = "error",
    name: str = "sample",
) -> Routes:
    """Routes of one sample from the payload of any rollout engine, checked row by row.

    Takes base64 text of flat int32 (SGLang) or of a ``.npy`` file (vLLM), a response's mapping
    with ``routed_experts`` (and ``routed_experts_dtype``, ``routed_experts_start_len`` or
    ``prompt_routed_experts``), a mapping of ``data``, ``shape``, ``dtype`` and ``start``, a tuple
    of prompt and generation parts (vLLM 0.21), NeMo-RL's ``nrlre1:`` text, numpy arrays, nested
    lists and tensors.

    Args:
        payload: what the engine returned.
        tokens: ``[num_tokens]`` ids of prompt and response together, exactly those that the
            engine was fed and sampled, not the trainer's own tokenization. They stay with the
            rows, and a session compares them with what the model is fed.
        num_tokens: how many they are, where the ids are not at hand: one of the two.
        config: of Megatron or Hugging Face, as `moe_layers` takes it. It says the four sizes that
            follow; one that is given as well counts more.
        num_experts: routed experts per MoE layer, without redundant copies.
        topk: experts per token.
        num_layers: decoder layers of the model, dense ones included and MTP layers not.
        moe_layers: ascending 1-based numbers of the MoE layers, ``r3patch.moe_layers(config)``;
            None without a config says that all layers are. Leave out layers that are routed by
            token id (hash).
        start: the offset that the request asked for. Rows before it come out invalid. A server
            that ignored it and sent all rows is recognised by the count.
        on_bad_rows: ``"error"``, or ``"invalid"`` to mark bad rows, log a warning and count them
            in ``Routes.bad_rows``. Rows of -1 are missing rather than bad: always marked only.
        name: the sample's name in messages.

    Returns:
        ``num_tokens`` rows of the layers ``moe_layers``; the last row is invalid.

    Raises:
        RoutesError: the payload is not one of these formats, a size contradicts the arguments,
            or a row has an id out of range, a repeated id, or is -1 in part.
    """
    if on_bad_rows not in ("error", "invalid"):
        raise RoutesError(f'on_bad_rows is {on_bad_rows!r}, expected "error" or "invalid".')
    try:
        model = model_sizes(
            config, num_experts=num_experts, topk=topk, num_layers=num_layers, moe_layers=moe_layers
        )
        ids, num_tokens = count_tokens(tokens, num_tokens)
        sent, stated = read(payload)
        first = _first_token(sent, stated, num_tokens, model, start)
        wide = _shape(sent, model)[: max(0, num_tokens - 1 - first)]
        columns = _columns(wide.shape[1], model)
        routes, trouble = _place_rows(wide, columns, first, num_tokens, model)
        routes.tokens = ids
        if trouble and on_bad_rows == "error":
            raise RoutesError(trouble)
    except RoutesError as error:
        raise RoutesError(f"{name}: {error}") from error.__cause__
    if trouble:
        logger.warning("%s: %s They are marked invalid.", name, trouble)
    _warn_of_stale_rows(routes, name)
    return routes


def _place_rows(
    wide: Tensor,
    columns: slice | Tensor,
    first: int,
    num_tokens: int,
    model: Sizes,
) -> tuple[Routes, str | None]:
    """The routes, with rows that cannot be routes marked invalid, and what is wrong with those."""
    layers, num_experts = model.moe_layers, model.num_experts
    shape = (num_tokens, len(layers), wide.shape[2])
    with ForeignErrors(f"no memory for rows of shape {shape}"):
        experts = torch.zeros(shape, dtype=stored_dtype(num_experts), device="cpu")
        valid = torch.zeros(shape[:2], dtype=torch.bool, device="cpu")
    rows = slice(first, first + wide.shape[0])
    unfit = narrow(wide, experts[rows], num_experts, columns)
    if wide.shape[2] == 1 and num_experts > 1:
        unfit = _add_zero_layers(unfit, experts[rows])
    if unfit is None:
        valid[rows] = True
        return Routes._checked(experts, layers, valid, num_experts), None
    valid[rows] = ~unfit
    experts[rows].masked_fill_(unfit.unsqueeze(-1), 0)
    routes = Routes._checked(experts, layers, valid, num_experts)
    bad = _BadRows.among(unfit, wide, columns)
    routes.bad_rows = len(bad.tokens)
    if not routes.bad_rows:
        return routes, None
    return routes, bad.describe(first, wide.shape[0], layers, num_experts)


class _BadRows(NamedTuple):
    """Rows that cannot be routes: ``[n]`` rows of the payload, ``[n]`` columns, ``[n, topk]``."""

    tokens: Tensor
    columns: Tensor
    ids: Tensor

    @classmethod
    def among(cls, unfit: Tensor, wide: Tensor, columns: slice | Tensor) -> _BadRows:
        """The unfit rows but for those of -1, which is how engines say "missing"."""
        tokens, places = unfit.nonzero().unbind(1)
        sent = torch.arange(wide.shape[1], device="cpu")[columns][places]
        ids = signed(wide)[tokens, sent].to(torch.int64)
        kept = ~(ids == -1).all(-1)
        return cls(tokens[kept], places[kept], ids[kept])

    def describe(self, first: int, rows: int, layers: tuple[int, ...], num_experts: int) -> str:
        token, column = int(self.tokens[0]), int(self.columns[0])
        ids = self.ids[0]
        zero = (self.ids == 0).all(-1)
        per_layer = torch.bincount(self.columns[zero], minlength=len(layers)).tolist()
        dead = [layer for layer, count in zip(layers, per_layer, strict=True) if count == rows]
        if dead:
            cause = (
                f"Layers {dead} are zero in every row, so they were never captured: dense and "
                "hash-routed layers belong out of moe_layers; otherwise the engine ran a fused "
                "kernel without capture (FlashInfer TRT-LLM MoE, Triton kernels) or several "
                "pipeline stages."
            )
        elif zero[0]:
            cause = (
                "A row of zeros was never captured: prefill/decode disaggregation without a "
                "merge of both answers, n-gram speculation, or the prompt of a hybrid model."
            )
        elif (ids >= num_experts).any():
            cause = (
                f"Ids must be below num_experts={num_experts}: these may be physical ids of "
                "redundant experts (EPLB before SGLang 0.5.13 or vLLM 0.16), or a wrong dtype."
            )
        elif (ids < 0).any():
            cause = (
                "A row is -1 as a whole (missing) or not at all: a wrong dtype or damaged bytes."
            )
        else:
            cause = "An id is there twice: a wrong topk, num_layers or dtype, or padding."
        return (
            f"{self.tokens.numel()} of {rows * len(layers)} rows are bad, the first at token "
            f"{first + token}, layer {layers[column]}: experts {ids.tolist()}. {cause}"
        )


def count_tokens(tokens: Any, num_tokens: int | None) -> tuple[Tensor | None, int]:
    """The token ids, if they are given, and how many they are."""
    if (tokens is None) == (num_tokens is None):
        raise RoutesError("give the sample's token ids, tokens=, or else num_tokens=: one of both.")
    if tokens is None:
        return None, integer(num_tokens, "num_tokens", 0)
    ids = as_tokens(tokens, "tokens")
    return ids, ids.numel()


def model_sizes(config: Any, **given: Any) -> Sizes:
    """The sizes that a config says and those that are given, checked; the given ones count more."""
    known: dict[str, Any] = {}
    if config is not None:
        try:
            known = sizes(config)._asdict()
        except UnsupportedRoutingError as error:
            raise RoutesError(f"config: {error}") from error
    known |= {name: value for name, value in given.items() if value is not None}
    for name in ("num_experts", "topk", "num_layers"):
        if name not in known:
            raise RoutesError(f"{name} is not given: give it, or config=.")
    topk, num_experts = check_sizes(known["topk"], known["num_experts"])
    num_layers = integer(known["num_layers"], "num_layers", 1, _MOST_LAYERS)
    layers = _check_moe_layers(num_layers, known.get("moe_layers"))
    return Sizes(num_layers, num_experts, topk, layers)


def _check_moe_layers(num_layers: int, moe_layers: Iterable[int] | None) -> tuple[int, ...]:
    if moe_layers is None:
        return tuple(range(1, num_layers + 1))
    layers = check_layers(moe_layers)
    if not layers or layers != tuple(sorted(layers)) or layers[-1] > num_layers:
        raise RoutesError(
            f"moe_layers is {layers}, expected ascending layer numbers from 1 to {num_layers}."
        )
    return layers


def _first_token(
    sent: Tensor, stated: int | None, num_tokens: int, model: Sizes, start: int
) -> int:
    """The token of the first row, by the number of rows; any other number is an error."""
    fed = max(0, num_tokens - 1)
    stating = start if stated is None else stated
    first = integer(stating, "start", 0, fed, context=f" with {num_tokens} tokens")
    flat = sent.dim() == 1
    ids_per_row = model.num_layers * model.topk
    if flat and sent.numel() % ids_per_row:
        raise RoutesError(
            f"{sent.numel()} ids are not rows of num_layers x topk = {ids_per_row} ids: "
            "the payload is truncated, or num_layers, topk or the dtype is wrong."
            + _other_width(sent, fed - first, model)
        )
    rows = sent.numel() // ids_per_row if flat else sent.shape[0]
    if rows == fed - first:
        return first
    if stated is None and rows == fed:
        return 0  # a server that ignored the start that was asked for
    # One surplus row, the last token's, is known of vLLM 0.21. Where a flat payload could as well
    # be num_tokens - 1 rows of another width, the sizes given here are wrong rather than its rows.
    if first == 0 and rows == num_tokens and (not flat or fed == 0 or ids_per_row % fed):
        return first
    raise RoutesError(
        f"the payload has {rows} rows, expected {fed - first}: {num_tokens} tokens, less the last, "
        f"which is never fed, less start={first}."
        + (_other_width(sent, fed - first, model) or _other_count(rows, fed, first))
        + " Pass the tokens that the engine saw: as it tokenized them, image tokens expanded, stop "
        "tokens included."
    )


def _other_width(sent: Tensor, rows: int, model: Sizes) -> str:
    """A number of layers with which a flat payload would have the expected rows."""
    if sent.dim() > 1 or not rows or not sent.numel() or sent.numel() % (rows * model.topk):
        return ""
    return f" With num_layers={sent.numel() // (rows * model.topk)} it would fit."


def _other_count(rows: int, fed: int, first: int) -> str:
    """A start, or a number of tokens, with which this number of rows would fit."""
    if rows < fed:
        return f" With start={fed - rows} it would fit: did the request ask for that?"
    return f" With {rows + first + 1} tokens it would fit: prompt and response count together."


def _shape(sent: Tensor, model: Sizes) -> Tensor:
    if sent.dim() == 1 or sent.shape[0] == 0:
        return sent.reshape(-1, model.num_layers, model.topk)
    if sent.shape[2] != model.topk:
        raise RoutesError(
            f"the payload has shape {tuple(sent.shape)}, expected topk={model.topk} ids at its end."
        )
    return sent


def _columns(axis: int, model: Sizes) -> slice | Tensor:
    """Where the MoE layers stand on the payload's layer axis, a slice if they stand together."""
    num_layers, layers = model.num_layers, model.moe_layers
    if axis == num_layers:
        start, stop = layers[0] - 1, layers[-1]
        if stop - start == len(layers):
            return slice(start, stop)
        return torch.tensor(layers, device="cpu") - 1
    if axis == len(layers):
        return slice(None)
    raise RoutesError(
        f"the payload has {axis} layers, expected all num_layers={num_layers} or the "
        f"{len(layers)} of moe_layers."
    )


def _add_zero_layers(unfit: Tensor | None, experts: Tensor) -> Tensor | None:
    """With topk 1 a row of zeros is legal; marks layers that hold nothing else."""
    if experts.shape[0] < SUSPICIOUS_ZEROS:
        return unfit
    dead = (experts == 0).flatten(2).all(-1).all(0)
    if not dead.any():
        return unfit
    dead = dead.expand(experts.shape[:2])
    return dead.clone() if unfit is None else unfit | dead


def _warn_of_stale_rows(routes: Routes, name: str) -> None:
    """Warns of runs of equal rows, which a stale capture buffer leaves and a model does not."""
    if routes.num_tokens <= _SUSPICIOUS_RUN:
        return
    same = _equal_neighbours(routes, slice(0, 1))  # one layer first: the others seldom matter
    if _longest_run(same)[1] < _SUSPICIOUS_RUN:
        return
    last, length = _longest_run(_equal_neighbours(routes, slice(None)))
    if length >= _SUSPICIOUS_RUN:
        logger.warning(
            "%s: the %d rows of tokens %d to %d are equal in every layer. Rows of a stale capture "
            "buffer look like this; compare them with the model's own routes (measure=True).",
            name, length, last - length + 1, last,
        )  # fmt: skip


def _equal_neighbours(routes: Routes, columns: slice) -> Tensor:
    experts = routes.experts[:, columns]
    same = (experts[1:] == experts[:-1]).flatten(1).all(1)
    known = routes.mask[:, columns].all(1)
    return same & known[1:] & known[:-1]


def _longest_run(same: Tensor) -> tuple[int, int]:
    """The last row and the length of the longest run of equal rows; ``same[i]``: i equals i+1."""
    position = torch.arange(1, same.numel() + 1, device="cpu")
    start = torch.where(same, 0, position).cummax(0).values
    length, index = (position - start).max(0)
    return int(index) + 1, int(length) + 1
