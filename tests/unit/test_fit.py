"""Whether routes fit the routers of a chunk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from r3patch import Routes, RoutesError
from r3patch.rows.fit import check_fit


def router(layer: int, experts: int) -> Any:
    return SimpleNamespace(name=f"r{layer}", layer_number=layer, topk=1, num_experts=experts)


def test_the_first_id_that_a_pruned_layer_lacks_is_refused() -> None:
    """Its experts are numbered from 0: with four of them, 3 is the last."""
    routers = [router(1, 8), router(2, 4)]
    check_fit(Routes([[[7], [3]]], (1, 2), num_experts=8), routers, "it")
    with pytest.raises(RoutesError, match="it names expert 4 in layer 2, but r2 has 4 experts"):
        check_fit(Routes([[[7], [4]]], (1, 2), num_experts=8), routers, "it")


def test_rows_of_other_chunks_may_be_missing() -> None:
    """missing="error" is about the layers of this chunk."""
    routes = Routes([[[7], [3]]], (1, 2), [[True, False]], num_experts=8)
    check_fit(routes, [router(1, 8)], "it", missing="error")
    with pytest.raises(RoutesError, match="it has 1 rows without routes"):
        check_fit(routes, [router(2, 8)], "it", missing="error")
