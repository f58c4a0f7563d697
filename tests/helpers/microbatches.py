"""Microbatches of any layout: what there is to place."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from hypothesis import strategies as st

from r3patch import Layout

Case: TypeAlias = "tuple[Layout, list[int]]"


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, list[int]]:
    """A layout that can cut every microbatch, and the lengths of one."""
    tp, cp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    lengths = draw(st.lists(st.integers(0, 21), min_size=1, max_size=5))
    fields: dict[str, Any] = {
        "tp_size": tp,
        "tp_rank": draw(st.integers(0, tp - 1)),
        "cp_size": cp,
        "cp_rank": draw(st.integers(0, cp - 1)),
        "sequence_parallel": draw(st.booleans()),
        "packed": draw(st.booleans()),
        "cp_order": draw(st.sampled_from(["zigzag", "contiguous"])),
    }
    even = 2 * cp * tp
    if fields["packed"]:
        fields["align"] = draw(st.sampled_from([1, 2, 3, 8]))
        fields["tail_in_last_sample"] = draw(st.booleans())
        if draw(st.booleans()):
            fields["pad_to_multiple"] = even * draw(st.integers(1, 3))
        else:  # five samples of 21 tokens, each padded to 48 at most
            fields["pack_length"] = even * math.ceil(5 * 48 / even)
    else:
        fields["seq_length"] = even * draw(st.integers(math.ceil(21 / even), 12))
        fields["padding_side"] = draw(st.sampled_from(["right", "left"]))
    return Layout(**fields), lengths
