"""Do the rows belong to the tokens that the model gets?

A row of the right count can belong to another token, and nothing else would tell. Where routes
carry the token ids that the engine saw, they are compared with what the chunk embeds, on the
device: microbatch by microbatch, when the first main router asks for rows.

The ids are taken at the chunk's ``embedding``, not from the batch: wrappers and schedules that
call a chunk layer by layer come through it, and a later pipeline stage, which gets the same batch,
embeds nothing. A chunk whose embedding is deeper (a VLM's ``language_model``) is not compared.
Calls in backward are recomputes, calls from megatron/core/transformer/multi_token_prediction.py
are MTP's own: both are passed over.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from r3patch._errors import ReplayError
from r3patch.observe.stats import TokenCheck
from r3patch.sessions._microbatch import DeviceRows, Microbatch
from r3patch.sessions._passes import innermost
from r3patch.sessions._preflight import tensor_parallel
from r3patch.sessions._recompute import in_recompute
from r3patch.sessions._token_cause import cause

__all__ = ["TokenMode", "TokenWatch"]

TokenMode = Literal["check", "strict", "ignore"]

_MTP_FILE = "multi_token_prediction.py"
_REMEMBERED = 16  # microbatches whose tokens may be the ones that came in another's place


@dataclass
class _Embedded:
    """The ids of one embedding call ``[b, s]``, and what of Megatron's changes their order."""

    ids: torch.Tensor
    tokens_per_sample: int | None


class _Comparison(NamedTuple):
    """A comparison on the device that the host has not read yet."""

    number: int  # of the microbatch
    differs: torch.Tensor  # [] bool
    rows: torch.Tensor  # [num_tokens] int32, -1 where nothing is compared
    ids: torch.Tensor  # [num_tokens] int32: what the routers got
    batch_size: int
    whole: torch.Tensor | None  # [s, b]: what the ids are a sequence parallel part of


class TokenWatch:
    """Compares the tokens of one chunk's microbatches with what the chunk embeds.

    Args:
        chunk: the model chunk.
        index: its place in the model.
        mode: ``"check"`` raises on leaving the session, ``"strict"`` at once where the ids are on
            the host, ``"ignore"`` never compares.
    """

    def __init__(self, chunk: nn.Module, index: int, mode: TokenMode) -> None:
        self._model = innermost(chunk)
        self._index = index
        self._mode: TokenMode = mode
        self._embedding = getattr(self._model, "embedding", None)
        self._embedded: _Embedded | None = None  # by the latest call that no router has met yet
        self._tokens_per_sample: int | None = None
        self._pending: deque[_Comparison] = deque()
        self._known: deque[tuple[int, torch.Tensor]] = deque(maxlen=_REMEMBERED)
        self._checked: dict[int, int] = {}  # tokens compared, by microbatch
        self._skipped = "no microbatch had tokens"
        self._fault = ""

    def watch(self) -> None:
        """Hook the chunk's embedding."""
        if self._mode != "ignore" and isinstance(self._embedding, nn.Module):
            self._model.register_forward_pre_hook(self._note_packing, with_kwargs=True)
            self._embedding.register_forward_pre_hook(self._note_ids, with_kwargs=True)

    def unwatch(self) -> None:
        """Take the hooks away again, as many as there are."""
        for module in (self._model, self._embedding):
            if not isinstance(module, nn.Module):
                continue
            hooks = module._forward_pre_hooks
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)

    def restart(self) -> None:
        """A forward pass of the chunk begins: ids of one that failed are not its."""
        self._embedded = None

    def remember(self, number: int, tokens: torch.Tensor | None) -> None:
        """Keep the tokens of a microbatch for the name of a fault."""
        if tokens is not None and self._mode != "ignore":
            self._known.append((number, tokens))

    def compare(self, microbatch: Microbatch, number: int, there: DeviceRows) -> None:
        """Compare when the first router of the chunk takes a microbatch. Waits for nothing.

        Args:
            microbatch: the microbatch.
            number: of it, in the order of the forward passes.
            there: its rows on the routers' device.

        Raises:
            ReplayError: in mode "strict", where the ids are on the host.
        """
        embedded, self._embedded = self._embedded, None
        if self._mode == "ignore":
            self._skipped = 'tokens="ignore"'
        elif (rows := there.tokens) is None:
            self._skipped = "no tokens: pass tokens= to decode"
        elif embedded is None:
            self._skipped = (
                "the chunk embeds nothing: a later stage, or a model without `embedding`"
            )
        else:
            ids = _router_order(embedded, microbatch.num_tokens)
            if ids is None:
                shape = tuple(embedded.ids.shape)
                self._skipped = f"{shape} ids are embedded for {microbatch.num_tokens} rows"
                return
            if rows.device.type != "cpu":
                rows = rows.clone()  # a view would keep all rows of the microbatch
            ids = ids.to(rows.device, torch.int32)
            differs = ((rows != ids) & (rows >= 0)).any()
            self._checked[number] = microbatch.checked_tokens
            batch_size = embedded.ids.shape[0]
            whole = embedded.ids.t() if embedded.ids.numel() != ids.numel() else None
            self._pending.append(_Comparison(number, differs, rows, ids, batch_size, whole))
            # On another device the host reads when all is done: reading waits.
            if differs.device.type == "cpu":
                self._settle()
                if self._fault and self._mode == "strict":
                    raise ReplayError(self._fault)

    def check(self) -> None:
        """Read what was compared. Waits for the device.

        Raises:
            ReplayError: some rows belong to other tokens.
        """
        self._settle()
        if self._fault:
            raise ReplayError(self._fault)

    def report(self) -> TokenCheck:
        """For the stats: how many tokens were compared, and why others were not."""
        checked = sum(self._checked.values())
        return TokenCheck(self._index, checked, "" if checked else self._skipped)

    def _settle(self) -> None:
        while self._pending:
            one = self._pending.popleft()
            if bool(one.differs) and not self._fault:
                others = {number: tokens for number, tokens in self._known if number != one.number}
                whole = () if one.whole is None else one.whole.cpu().chunk(tensor_parallel()[0])
                self._fault = cause(
                    one.rows.cpu(),
                    one.ids.cpu(),
                    others,
                    number=one.number,
                    batch=one.batch_size,
                    ranks=[part.flatten() for part in whole],
                )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_packing(self, chunk: Any, args: Any, kwargs: Any) -> None:
        if not in_recompute():
            packing = kwargs.get("packed_seq_params")
            self._tokens_per_sample = getattr(packing, "tokens_per_sample", None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_ids(self, embedding: Any, args: Any, kwargs: Any) -> None:
        if in_recompute() or _called_by_mtp():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.dim() == 2:
            self._embedded = _Embedded(ids.detach(), self._tokens_per_sample)


def _called_by_mtp() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_MTP_FILE):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _router_order(embedded: _Embedded, num_rows: int) -> torch.Tensor | None:
    """The ids ``[num_rows]`` as Megatron's router gets their tokens; None: it gets others.

    Source: ``LanguageModelEmbedding.forward`` (megatron/core/models/common/embeddings/
    language_model_embedding.py: ``[b, s]`` to ``[s, b]``, cut along s under sequence parallelism);
    ``TransformerLayer._maybe_unflatten_for_moe`` (0.19.2).
    """
    ids = embedded.ids.t()
    if ids.numel() != num_rows:
        size, rank = tensor_parallel()
        if num_rows == 0 or ids.numel() != num_rows * size or ids.shape[0] % size:
            return None
        ids = ids.chunk(size)[rank]
    per_sample = embedded.tokens_per_sample
    if per_sample and ids.shape[0] > per_sample:
        ids = ids.reshape(-1, per_sample).t()
    return ids.reshape(-1)
