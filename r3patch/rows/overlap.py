"""How much two selections of experts share, and when that is too little. Needs no torch."""

from __future__ import annotations


def suspicious_overlap(topk: int, num_experts: int) -> float:
    """The overlap below which two selections hardly are of the same tokens, layers and weights.

    Half way between that of unrelated selections, ``topk / num_experts``, and equality. Rollout
    and trainer share about 98 % of their experts where 10 % of the rows differ.
    """
    return (1 + topk / num_experts) / 2
