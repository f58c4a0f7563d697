"""An alarm that needs nothing: do the replayed experts look like the model's own?

In a session's first forward each main router compares a few rows with Megatron's own choice. Routes
of other tokens, other layers or other weights overlap with it as much as one row's choice with
another row's does: by chance, which is measured too, because routers that prefer some experts have
far more of it than topk / experts says.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from r3patch._errors import ReplayError
from r3patch.observe.stats import Agreement
from r3patch.sessions._measure import shared_experts

__all__ = ["Alarm", "AlarmMode"]

logger = logging.getLogger(__name__)

AlarmMode = Literal["warn", "raise", "off"]


class Alarm:
    """The agreement of a session's first rows with Megatron's choice, over all routers of a rank.

    Attributes:
        rang: whether `ring` found less of it than routes of these tokens have.
    """

    def __init__(self, mode: AlarmMode) -> None:
        self.mode: AlarmMode = mode
        self.rang = False
        self._experts = 0  # topk of each row that was compared, summed
        self._rows = 0
        self._shared: torch.Tensor | int = 0
        self._by_chance: torch.Tensor | int = 0

    def add(self, ids: torch.Tensor, own: torch.Tensor, num_experts: int) -> None:
        """Compare the experts of some rows ``[n, topk] int64`` with Megatron's choice for them."""
        if ids.shape[0] < 2:  # there is no other row to measure chance by
            return
        self._rows += ids.shape[0]
        self._experts += ids.numel()
        self._shared = self._shared + shared_experts(own, ids, num_experts).sum()
        # Half the rows away: neighbours may be of one sample's repetition.
        other = own.roll(max(1, own.shape[0] // 2), 0)
        self._by_chance = self._by_chance + shared_experts(own, other, num_experts).sum()

    def agreement(self) -> Agreement:
        """What was compared so far. Waits for the device."""
        return Agreement(self._rows, self._experts, int(self._shared), int(self._by_chance))

    def ring(self, overlap: float | None = None) -> None:
        """On leaving a session: say so if the routes hardly are this model's.

        Args:
            overlap: of all rows, where they were measured: it goes before that of the first ones.

        Raises:
            ReplayError: in mode "raise".
        """
        if self.mode == "off":
            return
        found = self.agreement()
        kappa = found.kappa if overlap is None else found.above_chance(overlap)
        if kappa is None or not found.alarming(overlap):
            return
        self.rang = True
        text = (
            f"the replayed experts agree with Megatron's own choice by {kappa:.2f} (1: equal, 0: "
            f"as by chance; healthy runs are above 0.8, over {found.rows} rows): they hardly are "
            "of these tokens, layers or weights. Look at the order of microbatches and samples "
            "(decode(tokens=...) names it), at moe_layers, and at which weights the engine has. "
            'Where routes are foreign on purpose, pass alarm="off".'
        )
        if self.mode == "raise":
            raise ReplayError(text)
        logger.warning("%s", text)
