"""r3patch.metrics against slow references in plain Python, and what it refuses."""

from __future__ import annotations

import math
import random

import pytest
import torch

from r3patch import Routes, RoutesError
from r3patch.metrics import (
    PolicyGap,
    expert_load,
    imbalance,
    policy_gap,
    route_mismatch,
)

LAYERS = (2, 4, 5)
NUM_EXPERTS = 12
TOPK = 3


def random_routes(seed: int, num_tokens: int = 40, invalid: float = 0.2) -> Routes:
    rng = random.Random(seed)
    ids = [[rng.sample(range(NUM_EXPERTS), TOPK) for _ in LAYERS] for _ in range(num_tokens)]
    valid = [[rng.random() >= invalid for _ in LAYERS] for _ in range(num_tokens)]
    return Routes(ids, LAYERS, torch.tensor(valid), num_experts=NUM_EXPERTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_policy_gap_equals_a_slow_reference(dtype: torch.dtype) -> None:
    """Every measure equals plain Python over the masked tokens, whatever the dtype."""
    torch.manual_seed(0)
    train = (-3 * torch.rand(4, 50, dtype=torch.float64)).to(dtype)
    rollout = (-3 * torch.rand(4, 50, dtype=torch.float64)).to(dtype)
    mask = torch.rand(4, 50) > 0.3
    pairs = [
        (p, q)
        for p, q, kept in zip(
            train.flatten().tolist(), rollout.flatten().tolist(), mask.flatten().tolist(),
            strict=True,
        )
        if kept
    ]  # fmt: skip

    def mean(function: object) -> float:
        return math.fsum(function(p, q) for p, q in pairs) / len(pairs)  # type: ignore[operator]

    gap = policy_gap(train, rollout, mask)

    assert gap.tokens == len(pairs)
    assert gap.mean_abs == pytest.approx(mean(lambda p, q: abs(p - q)), rel=1e-12)
    assert gap.mean_squared == pytest.approx(mean(lambda p, q: (p - q) ** 2), rel=1e-12)
    assert gap.k1 == pytest.approx(mean(lambda p, q: q - p), rel=1e-12)
    assert gap.k3 == pytest.approx(mean(lambda p, q: math.exp(p - q) - 1 - (p - q)), rel=1e-12)
    for bound, measured in ((2, gap.above_2), (5, gap.above_5)):
        ratio = mean(lambda p, q: max(math.exp(p - q), math.exp(q - p)) > bound)  # noqa: B023
        assert measured == ratio
        assert 0 < ratio < 1
    assert gap.max_abs == max(abs(p - q) for p, q in pairs)


def test_policy_gap_k1_has_the_sign_of_kl_from_rollout_to_train() -> None:
    """A trainer that gives the sampled tokens half the probability has k1 = log 2 > 0."""
    rollout = torch.full((8,), -1.0, dtype=torch.float64)
    gap = policy_gap(rollout - math.log(2), rollout)
    assert gap.k1 == pytest.approx(math.log(2))
    assert gap.k3 == pytest.approx(0.5 - 1 + math.log(2))
    assert policy_gap(rollout - math.log(1.99), rollout).above_2 == 0
    assert policy_gap(rollout - math.log(2.01), rollout).above_2 == 1
    assert policy_gap(rollout + math.log(2.01), rollout).above_2 == 1


def test_policy_gap_keeps_small_k3_that_float32_would_lose() -> None:
    """k3 of a gap of 1e-6 is 5e-13; exp(delta) - 1 - delta in float32 gives 0 or noise."""
    rollout = torch.full((1000,), -1.0, dtype=torch.float64)
    assert policy_gap(rollout + 1e-6, rollout).k3 == pytest.approx(5e-13, rel=1e-3)


def test_merged_policy_gaps_equal_the_gap_of_all_tokens() -> None:
    """Ranks of different sizes, one of them without a token, merge to the whole."""
    torch.manual_seed(1)
    train, rollout = torch.randn(2, 30).double().unbind()
    parts = [slice(0, 7), slice(7, 7), slice(7, 30)]
    first, *rest = [policy_gap(train[part], rollout[part]) for part in parts]
    merged, whole = first.merge(*rest), policy_gap(train, rollout)
    assert merged.as_dict() == pytest.approx(whole.as_dict(), rel=1e-12)


def test_the_gap_of_no_token_is_nan() -> None:
    """An empty mask must not read as a gap of zero."""
    gap = policy_gap(torch.zeros(3), torch.ones(3), torch.zeros(3))
    assert gap == PolicyGap()
    assert math.isnan(gap.mean_abs)
    assert math.isnan(gap.k3)


def test_a_nan_log_prob_shows_in_every_mean_and_survives_a_merge() -> None:
    """Broken log-probs are not averaged away; max() alone would drop the nan."""
    bad = policy_gap(torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]))
    good = policy_gap(torch.tensor([-1.0]), torch.tensor([-1.5]))
    for gap in (bad.merge(good), good.merge(bad)):
        assert math.isnan(gap.mean_abs)
        assert math.isnan(gap.max_abs)


def test_policy_gap_needs_no_gradient_and_leaves_none() -> None:
    """Log-probs that still carry their graph are fine."""
    train = torch.zeros(3, requires_grad=True)
    assert policy_gap(train * 2, torch.zeros(3)).mean_abs == 0


def test_policy_gap_refuses_shapes_that_would_broadcast() -> None:
    """[4, 1] against [4] would compare every token with every other."""
    with pytest.raises(ValueError, match=r"rollout_logprobs has shape \(4,\), expected .*\(4, 1\)"):
        policy_gap(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match=r"mask has shape \(1,\)"):
        policy_gap(torch.zeros(4), torch.zeros(4), torch.ones(1))


def test_policy_gap_refuses_weights_for_a_mask() -> None:
    """A mask of weights would silently count as all ones."""
    with pytest.raises(ValueError, match="other numbers than 0 and 1"):
        policy_gap(torch.zeros(2), torch.zeros(2), torch.tensor([0.5, 1.0]))


def slow_mismatch(a: Routes, b: Routes) -> tuple[list[list[int]], int, int]:
    b = b.select(a.layers)
    per_layer = [[0, 0, 0] for _ in a.layers]
    tokens = differing = 0
    for token in range(a.num_tokens):
        rows = []
        for column in range(a.num_layers):
            if not all(r.valid is None or bool(r.valid[token, column]) for r in (a, b)):
                continue
            ours = set(a.experts[token, column].tolist())
            theirs = set(b.experts[token, column].tolist())
            rows.append(ours != theirs)
            for place, amount in enumerate((1, int(ours != theirs), len(ours & theirs))):
                per_layer[column][place] += amount
        tokens += bool(rows)
        differing += any(rows)
    return per_layer, tokens, differing


def test_route_mismatch_equals_a_slow_reference() -> None:
    """Sets, not rows; only rows valid in both; columns matched by layer number."""
    full = random_routes(1, invalid=0)
    a = Routes(full.experts, LAYERS, random_routes(1, invalid=0.5).valid, num_experts=NUM_EXPERTS)
    rows = full.experts.flip(-1)  # the same sets, in another order
    other = random_routes(2, invalid=0).experts
    rows[::3] = other[::3]
    b = Routes(rows, LAYERS, random_routes(3, invalid=0.5).valid, num_experts=NUM_EXPERTS)
    b = b.select((5, 2, 4))

    found = route_mismatch(a, b)
    per_layer, tokens, differing = slow_mismatch(a, b)

    assert found.layers == LAYERS
    assert list(zip(found.rows, found.rows_differing, found.experts_shared, strict=True)) == [
        tuple(layer) for layer in per_layer
    ]
    assert (found.tokens, found.tokens_differing) == (tokens, differing)
    assert found.mismatch_by_layer == tuple(layer[1] / layer[0] for layer in per_layer)
    assert found.overlap_by_layer == tuple(layer[2] / (layer[0] * TOPK) for layer in per_layer)
    assert found.mismatch == sum(x[1] for x in per_layer) / sum(x[0] for x in per_layer)
    assert found.overlap == sum(x[2] for x in per_layer) / (sum(x[0] for x in per_layer) * TOPK)
    assert 0 < found.token_mismatch < 1


def test_one_shifted_layer_shows_as_mismatch_of_exactly_that_layer() -> None:
    """Routes whose second layer holds the third's rows differ there and nowhere else."""
    a = random_routes(4, invalid=0)
    shifted = a.experts.clone()
    shifted[:, 1] = a.experts[:, 2]
    found = route_mismatch(a, Routes(shifted, LAYERS, num_experts=NUM_EXPERTS))
    assert found.mismatch_by_layer[0] == found.mismatch_by_layer[2] == 0
    assert found.mismatch_by_layer[1] > 0.9
    assert found.overlap_by_layer[1] < 0.5  # chance: topk / num_experts = 0.25


def test_merged_route_mismatches_equal_that_of_all_tokens() -> None:
    """Microbatches merge to the whole."""
    a, b = random_routes(5), random_routes(6)
    parts = [slice(0, 11), slice(11, 40)]
    first, rest = [route_mismatch(a[part], b[part]) for part in parts]
    assert first.merge(rest) == route_mismatch(a, b)


def test_mismatch_of_no_common_row_is_nan() -> None:
    """Two selections without a common valid row must not read as equal."""
    missing = Routes.missing(40, LAYERS, TOPK, NUM_EXPERTS)
    found = route_mismatch(random_routes(7), missing)
    assert found.rows == (0, 0, 0)
    assert math.isnan(found.mismatch)
    assert math.isnan(found.token_mismatch)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (random_routes(1, num_tokens=39), "num_tokens is 40 in one and 39 in the other"),
        (Routes.missing(40, LAYERS, 2, NUM_EXPERTS), "topk is 3 in one and 2"),
        (Routes.missing(40, LAYERS, TOPK, 8), "num_experts is 12 in one and 8"),
        (random_routes(1).select((2, 4)), r"layers \[2, 4, 5\] and b \[2, 4\].*select"),
    ],
)
def test_route_mismatch_refuses_routes_of_other_shapes(other: Routes, text: str) -> None:
    """Nothing is broadcast or cut to fit."""
    with pytest.raises(RoutesError, match=text):
        route_mismatch(random_routes(1), other)


def test_expert_load_equals_a_slow_reference_with_padding_apart() -> None:
    """Counts by layer and expert; padding and invalid rows never count as real."""
    routes = random_routes(8)
    padding = torch.arange(40) >= 30
    real = [[0] * NUM_EXPERTS for _ in LAYERS]
    padded = [[0] * NUM_EXPERTS for _ in LAYERS]
    invalid = [0] * len(LAYERS)
    assert routes.valid is not None
    for token in range(40):
        for column in range(len(LAYERS)):
            if not routes.valid[token, column]:
                invalid[column] += 1
                continue
            for expert in routes.experts[token, column].tolist():
                (padded if padding[token] else real)[column][expert] += 1

    load = expert_load(routes, padding)

    assert load.real.tolist() == real
    assert load.padding.tolist() == padded
    assert load.invalid.tolist() == invalid
    assert load.imbalance == tuple(max(row) / (sum(row) / NUM_EXPERTS) for row in real)


def test_merged_expert_loads_equal_that_of_all_tokens() -> None:
    """Data-parallel ranks add up."""
    routes = random_routes(9)
    merged = expert_load(routes[0:13]).merge(expert_load(routes[13:40]))
    assert torch.equal(merged.real, expert_load(routes).real)
    assert torch.equal(merged.invalid, expert_load(routes).invalid)


def test_imbalance_of_even_load_is_one_and_of_no_load_is_nan() -> None:
    """An empty layer is not balanced, it is unknown."""
    even, empty, one = imbalance(torch.tensor([[2, 2, 2, 2], [0, 0, 0, 0], [8, 0, 0, 0]]))
    assert even == 1
    assert math.isnan(empty)
    assert one == 4


def test_expert_load_refuses_a_mask_of_another_length() -> None:
    """A mask of the unpadded batch would mark the wrong tokens."""
    with pytest.raises(RoutesError, match=r"padding is torch.bool \(39,\), expected bool \(40,\)"):
        expert_load(random_routes(1), torch.zeros(39, dtype=torch.bool))


def test_more_than_256_experts_keep_their_ids() -> None:
    """int16 ids above 255 are counted as themselves."""
    routes = Routes([[[300, 1]], [[300, 511]]], (1,), num_experts=512)
    load = expert_load(routes)
    assert load.real[0, 300] == 2
    assert load.real[0, 511] == 1
    assert int(load.real.sum()) == 4


def test_route_metrics_stay_on_the_host_whatever_the_default_device() -> None:
    """Routes live there; a counter that torch's factories built elsewhere would not meet them."""
    a, b = random_routes(1), random_routes(2)
    expected = route_mismatch(a, b), expert_load(a)
    with torch.device("meta"):
        mismatch, load = route_mismatch(a, b), expert_load(a)
        none = expert_load(a.select([]))
    assert mismatch == expected[0]
    assert torch.equal(load.real, expected[1].real)
    assert none.real.shape == (0, NUM_EXPERTS)
