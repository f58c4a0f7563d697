"""Do the rows belong to the tokens that the model gets?

A row of the right count can belong to another token, and nothing else would tell. Where routes
carry the token ids that the engine saw, they are compared with what the chunk embeds, on the
device: microbatch by microbatch, when the first main router asks for rows.

The ids are taken at the ``embedding`` of the module that owns the decoder with the main routers,
not from the batch: wrappers and schedules that call a chunk layer by layer come through it, and a
later pipeline stage, which gets the same batch, embeds nothing. Calls in backward are recomputes,
calls from megatron/core/transformer/multi_token_prediction.py are MTP's own: both are passed over.

Where the owner lies deeper (a VLM's ``language_model``), its wrapper embeds and hands it a
``decoder_input``, in which the embeddings of images stand in the place of tokens' own. Rows that
are not what the embedding gave are not compared, whatever id stood for them; where the shapes do
not say which row is which token, none is.
Source: ``LLaVAModel.forward`` (megatron/core/models/multimodal/llava_model.py), ``MimoModel``
(megatron/core/models/mimo/model/base.py), both 0.16 and 0.19.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from r3patch._errors import ReplayError
from r3patch.labels.model import MainRouter
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
_MARK = 8  # of a row's hidden values: one that still begins so is the token's own


@dataclass
class _Embedded:
    """One embedding call, before the decoder that it is for has met a router."""

    ids: torch.Tensor  # [b, s]
    mark: torch.Tensor | None = None  # [s, b, _MARK]: how the embeddings begin
    replaced: torch.Tensor | None = None  # [s, b] bool: rows with something else in their place
    why_not: str = ""  # it is not certain that the decoder gets them
    unsure: str = ""  # nor that it gets these and not others: equal rows prove it, others nothing


class _Comparison:
    """A comparison on the device, which the host reads when it is there: it waits for nothing."""

    def __init__(
        self, number: int, rows: torch.Tensor, ids: torch.Tensor, embedded: _Embedded
    ) -> None:
        self.number = number  # of the microbatch
        self.unsure = embedded.unsure
        self.rows = rows  # [num_tokens] int32, -1 where nothing is compared
        self.ids = ids  # [num_tokens] int32: what the routers got
        self.batch = embedded.ids.shape[0]
        # [s, b]: what the ids are a sequence parallel part of
        self.whole = embedded.ids.t() if embedded.ids.numel() != ids.numel() else None
        compared = rows >= 0
        counts = torch.stack([compared.sum(), ((rows != ids) & compared).sum()])
        self._counts = torch.empty_like(counts, device="cpu", pin_memory=counts.is_cuda)
        self._counts.copy_(counts, non_blocking=True)
        self._there: Any = None
        if counts.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def ready(self) -> bool:
        """Whether the device has come so far."""
        return self._there is None or bool(self._there.query())

    def counts(self) -> tuple[int, int]:
        """How many tokens were compared, and how many of them are others. Waits for the device."""
        if self._there is not None:
            self._there.synchronize()
        compared, wrong = self._counts.tolist()
        return compared, wrong


class TokenWatch:
    """Compares the tokens of one chunk's microbatches with what the chunk embeds.

    Args:
        chunk: the model chunk.
        index: its place in the model.
        routers: its main routers.
        mode: ``"check"`` raises on leaving the session, ``"strict"`` at once where the ids are on
            the host, ``"ignore"`` never compares.
    """

    def __init__(
        self, chunk: nn.Module, index: int, routers: Sequence[MainRouter], mode: TokenMode
    ) -> None:
        self._index = index
        self._mode: TokenMode = mode
        self._owner = _owner(chunk, routers)
        self._embedding = None if self._owner is None else self._owner.embedding
        config = routers[0].module.config if routers else None
        self._cut = bool(getattr(config, "sequence_parallel", False))
        self._deeper = self._owner is not innermost(chunk)  # its wrapper may embed for it
        self._inside = not self._deeper  # whether the owner embeds for itself
        self._embedded: _Embedded | None = None  # by the latest call that no router has met yet
        self._tokens_per_sample: int | None = None
        self._pending: deque[_Comparison] = deque()
        self._known: deque[tuple[int, torch.Tensor]] = deque(maxlen=_REMEMBERED)
        self._counts: dict[int, tuple[int, int]] = {}  # compared, wrong: by microbatch
        self._skipped = "no microbatch had tokens"
        self._fault = ""

    def watch(self) -> None:
        """Hook the embedding and its owner."""
        if self._mode == "ignore" or self._owner is None or self._embedding is None:
            return
        self._owner.register_forward_pre_hook(self._note_call, with_kwargs=True)
        self._embedding.register_forward_pre_hook(self._note_ids, with_kwargs=True)
        if self._deeper:
            self._embedding.register_forward_hook(self._note_output)

    def unwatch(self) -> None:
        """Take the hooks away again, as many as there are."""
        for module in (self._owner, self._embedding):
            if not isinstance(module, nn.Module):
                continue
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                mine = [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]
                for key in mine:
                    hooks.pop(key)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    def restart(self) -> None:
        """A forward pass of the chunk begins: ids of one that failed are not its."""
        self._embedded = None
        self._inside = not self._deeper

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
        elif not microbatch.checked_tokens:
            self._skipped = "no row has routes"
        elif embedded is None:
            self._skipped = self._nothing_embedded()
        elif embedded.why_not:
            self._skipped = embedded.why_not
        else:
            ids = self._router_order(embedded.ids.t(), microbatch.num_tokens)
            if ids is None:
                shape = tuple(embedded.ids.shape)
                self._skipped = f"{shape} ids are embedded for {microbatch.num_tokens} rows"
                return
            if rows.device.type != "cpu":
                rows = rows.clone()  # a view would keep all rows of the microbatch
            if embedded.replaced is not None:
                replaced = self._router_order(embedded.replaced, microbatch.num_tokens)
                assert replaced is not None
                rows = rows.masked_fill(replaced.to(rows.device), -1)
            ids = ids.to(rows.device, torch.int32)
            self._pending.append(_Comparison(number, rows, ids, embedded))
            self._settle(wait=False)
            if self._fault and self._mode == "strict":
                raise ReplayError(self._fault)

    def check(self) -> None:
        """Read what was compared. Waits for the device.

        Raises:
            ReplayError: some rows belong to other tokens.
        """
        self._settle(wait=True)
        if self._fault:
            raise ReplayError(self._fault)

    def report(self) -> TokenCheck:
        """For the stats: how many tokens were compared, and why others were not.

        Waits for the device.
        """
        self._settle(wait=True)
        checked = sum(compared for compared, _ in self._counts.values())
        wrong = sum(wrong for _, wrong in self._counts.values())
        return TokenCheck(self._index, checked, "" if checked else self._skipped, wrong)

    def _settle(self, *, wait: bool) -> None:
        """Read the comparisons in their order, and let go of their ids."""
        while self._pending and (wait or self._pending[0].ready()):
            one = self._pending.popleft()
            compared, wrong = one.counts()
            if wrong and one.unsure:
                self._skipped = one.unsure
                continue
            self._counts[one.number] = compared, wrong
            if not compared:
                self._skipped = "every row stands for something else than the token's embedding"
            if not wrong or self._fault:
                continue
            others = {number: tokens for number, tokens in self._known if number != one.number}
            whole = () if one.whole is None else one.whole.cpu().chunk(tensor_parallel()[0])
            self._fault = cause(
                one.rows.cpu(),
                one.ids.cpu(),
                others,
                number=one.number,
                batch=one.batch,
                ranks=[part.flatten() for part in whole],
            )

    def _nothing_embedded(self) -> str:
        if self._owner is not None:
            return "the chunk embeds nothing for its decoder: it is a later stage, or is given ids"
        return "the chunk has no `embedding` beside its decoder: a later stage, or another model"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_call(self, owner: Any, args: Any, kwargs: Any) -> None:
        """The owner's forward begins: is what was embedded before what it decodes?

        Source: ``GPTModel.forward(input_ids, position_ids, attention_mask, decoder_input, ...)``,
        megatron/core/models/gpt/gpt_model.py; Mamba's and the hybrid's alike.
        """
        if in_recompute():
            return
        packing = kwargs.get("packed_seq_params")
        self._tokens_per_sample = getattr(packing, "tokens_per_sample", None)
        given = kwargs.get("decoder_input", args[3] if len(args) > 3 else None)
        embedded, self._inside = self._embedded, given is None
        if embedded is None or given is None:
            self._embedded = None
            return
        embedded.why_not = self._match(embedded, given)

    def _match(self, embedded: _Embedded, given: torch.Tensor) -> str:
        """Which rows of the decoder's input are the tokens' own, or why nobody knows."""
        ids, shape, mark = tuple(embedded.ids.shape), tuple(given.shape), embedded.mark
        unlike = f"{ids} ids are embedded for a decoder input {shape}"
        if mark is None or given.dim() != mark.dim() or given.shape[1] != mark.shape[1]:
            return unlike
        if given.shape[0] != mark.shape[0]:
            size, rank = tensor_parallel()
            if not self._cut or given.shape[0] * size != mark.shape[0]:
                return unlike
            mark = mark.chunk(size)[rank]
        embedded.replaced = (given.detach()[..., :_MARK] != mark.to(given.dtype)).any(-1)
        return ""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_ids(self, embedding: Any, args: Any, kwargs: Any) -> None:
        if in_recompute() or _called_by_mtp():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            why_not, unsure, before = "", "", self._embedded
            if not self._inside:
                why_not = "the ids are embedded outside of the decoder's own model"
            elif before is not None and before.ids.data_ptr() != ids.data_ptr():
                # Or a forward failed that no hook saw, and this is its retry.
                unsure = "ids are embedded twice before the decoder, which gets some of them"
            self._embedded = _Embedded(ids.detach(), why_not=why_not, unsure=unsure)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_output(self, embedding: Any, args: Any, output: Any) -> None:
        embedded = self._embedded
        if embedded is not None and not self._inside and isinstance(output, torch.Tensor):
            # A copy: some write the images into the output itself.
            embedded.mark = output.detach()[..., :_MARK].clone()

    def _router_order(self, values: torch.Tensor, num_rows: int) -> torch.Tensor | None:
        """Values of tokens ``[s, b]`` as Megatron's router gets them; None: it gets others.

        Source: ``LanguageModelEmbedding.forward`` (megatron/core/models/common/embeddings/
        language_model_embedding.py: ``[b, s]`` to ``[s, b]``, cut along s under sequence
        parallelism); ``TransformerLayer._maybe_unflatten_for_moe`` (0.19.2).
        """
        if values.numel() != num_rows:
            size, rank = tensor_parallel() if self._cut else (1, 0)
            if num_rows == 0 or values.numel() != num_rows * size or values.shape[0] % size:
                return None
            values = values.chunk(size)[rank]
        per_sample = self._tokens_per_sample
        if per_sample and values.shape[0] > per_sample:
            values = values.reshape(-1, per_sample).t()
        return values.reshape(-1)


def _owner(chunk: nn.Module, routers: Sequence[MainRouter]) -> Any:
    """The module that has the decoder with all main routers, and an ``embedding`` for it.

    The innermost one on the way from the chunk down to the list of layers: what lies further out
    may embed images, what lies further in is a layer.
    """
    steps = zip(*(router.name.split(".") for router in routers), strict=False)
    common = itertools.takewhile(lambda names: len(set(names)) == 1, steps)
    here: Any = chunk
    owner = None
    for name in [*(names[0] for names in common), ""]:
        if isinstance(here, nn.ModuleList):
            break
        if isinstance(getattr(here, "embedding", None), nn.Module):
            owner = here
        # With several chunks a name begins with the chunk's own.
        here = here._modules.get(name, here if here is chunk else None)
        if here is None:
            break
    return owner


def _called_by_mtp() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_MTP_FILE):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
