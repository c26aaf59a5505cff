"""Budgets are kept to the byte and spent nearly as well as trying everything would."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.sizing import (
    BYTES_PER_SLOT,
    AccessProfile,
    BudgetItem,
    HitRateCurve,
    explain_split,
    shard_fast_bytes,
    slot_bytes,
    split_budget,
)
from torchrec_turbossd.sizing.profile import Floats


def item(
    rows: int = 100, alpha: float = 1.0, weight: float = 1.0, bytes_per_slot: int = 10, floor: int = 0, fixed: int = 0
) -> BudgetItem:
    return BudgetItem(
        bytes_per_slot=bytes_per_slot,
        curve=HitRateCurve(AccessProfile.zipf(rows, alpha)),
        weight=weight,
        floor_slots=floor,
        max_slots=rows,
        fixed_bytes=fixed,
    )


def spent(items: dict[str, BudgetItem], slots: dict[str, int]) -> int:
    return sum(one.bytes_for(slots[key]) for key, one in items.items())


def best_gain(items: dict[str, BudgetItem], budget: int) -> float:
    """The most that any split gains, by trying all."""
    gains = [one.weight * one.curve.hit_rate(np.arange(one.max_slots + 1.0)) for one in items.values()]
    sizes = [np.arange(one.max_slots + 1) * one.bytes_per_slot + one.fixed_bytes for one in items.values()]
    gains = [
        np.where(np.arange(g.size) >= one.floor_slots, g, -np.inf) for g, one in zip(gains, items.values(), strict=True)
    ]
    total = gains[0][:, None, None] + gains[1][None, :, None] + gains[2]
    size = sizes[0][:, None, None] + sizes[1][None, :, None] + sizes[2]
    return float(total[size <= budget].max())


# The last ones need slots traded after the greedy pass.
@pytest.mark.parametrize("case", [*range(40), 87, 129, 147])
def test_within_one_percent_of_trying_everything(case: int) -> None:
    rng = np.random.default_rng(case)
    items = {
        key: item(
            rows=int(rng.integers(30, 60)),
            alpha=float(rng.uniform(0.3, 1.5)),
            weight=float(rng.uniform(1, 50)),
            bytes_per_slot=int(rng.integers(8, 80)),
            floor=int(rng.integers(0, 5)),
            fixed=int(rng.integers(0, 100)),
        )
        for key in "abc"
    }
    floors = spent(items, {key: one.floor_slots for key, one in items.items()})
    full = spent(items, {key: one.max_slots for key, one in items.items()})
    budget = int(floors + rng.uniform(0.05, 0.9) * (full - floors))
    slots = split_budget(items, budget)
    assert spent(items, slots) <= budget
    assert all(one.floor_slots <= slots[key] <= one.max_slots for key, one in items.items())
    gain = sum(one.weight * float(one.curve.hit_rate(np.array([slots[k]]))[0]) for k, one in items.items())
    assert gain >= 0.99 * best_gain(items, budget)


def test_large_tables_use_all_but_a_slot_of_the_budget() -> None:
    items = {
        str(n): item(rows=10**6 * (n + 1), weight=float(100 * n), bytes_per_slot=100 + n, floor=1000) for n in range(8)
    }
    for budget in (2 * 10**6, 10**8, 10**9):
        left = budget - spent(items, split_budget(items, budget))
        assert 0 <= left < 200


def test_busier_and_smaller_rows_get_more() -> None:
    slots = split_budget({"busy": item(10_000, weight=10.0), "idle": item(10_000)}, 30_000)
    assert slots["busy"] > 2 * slots["idle"] > 0
    slots = split_budget({"wide": item(10_000, bytes_per_slot=80), "thin": item(10_000)}, 30_000)
    assert slots["thin"] > 2 * slots["wide"] > 0


def test_equal_items_share_evenly_and_every_run_agrees() -> None:
    items = {n: item(5000, bytes_per_slot=7) for n in range(3)}
    slots = split_budget(items, 30_000)
    assert max(slots.values()) - min(slots.values()) <= 1 or len(set(slots.values())) <= 2
    assert all(split_budget(dict(items), 30_000) == slots for _ in range(3))


def test_nothing_is_given_where_it_does_not_help() -> None:
    items = {"unused": item(weight=0.0, floor=3), "full": item(rows=5)}
    assert split_budget(items, 10**9) == {"unused": 3, "full": 5}
    assert split_budget({}, 0) == {}


def test_a_curve_that_is_not_concave_is_climbed_over() -> None:
    class Cliff:
        """Useless below 40 slots, as for a scan that just fits."""

        def hit_rate(self, slots: Floats, /) -> Floats:
            return np.where(np.asarray(slots) >= 40, 1.0, 0.0)

    cliff = BudgetItem(bytes_per_slot=10, curve=Cliff(), weight=1.0, floor_slots=0, max_slots=50)
    assert split_budget({"cliff": cliff, "flat": item(weight=0.1)}, 450)["cliff"] == 40


def test_floors_that_do_not_fit_are_named() -> None:
    items = {"big": item(floor=50, fixed=40), "small": item(floor=3)}
    assert split_budget(items, 570) == {"big": 50, "small": 3}
    with pytest.raises(
        BudgetError, match=r"570 bytes, 1 more than the budget of 569: 'big' 540 bytes, 'small' 30 bytes"
    ):
        split_budget(items, 569)


@pytest.mark.parametrize("budget", [-1, 1.5, float("nan"), True])
def test_absurd_budgets(budget: Any) -> None:
    with pytest.raises(BudgetError, match="whole number of bytes"):
        split_budget({"a": item()}, budget)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bytes_per_slot": 0},
        {"fixed_bytes": -1},
        {"floor_slots": 11},
        {"floor_slots": -1},
        {"weight": -1.0},
        {"weight": float("nan")},
    ],
)
def test_absurd_items(wrong: dict[str, Any]) -> None:
    curve = HitRateCurve(AccessProfile.zipf(10))
    fine = {"bytes_per_slot": 1, "curve": curve, "weight": 1.0, "floor_slots": 0, "max_slots": 10}
    BudgetItem(**fine)
    with pytest.raises(ConfigError):
        BudgetItem(**{**fine, **wrong})


def test_the_split_explains_itself() -> None:
    items = {"ads": item(rows=10**6, bytes_per_slot=256)}
    text = explain_split(items, split_budget(items, 2**20))
    assert text.startswith("ads: 4,096 of 1,000,000 slots, 1.0 MiB, hit rate ") and "one more MiB" in text


def test_fast_bytes_count_everything() -> None:
    assert slot_bytes(100) == 100 + BYTES_PER_SLOT == 126
    assert shard_fast_bytes(10, 1000, 100) == 11 * 126 + 4000
    assert shard_fast_bytes(0, 0, 100) == 0
    for wrong in itertools.permutations((-1, 5, 5)):
        with pytest.raises(BudgetError):
            shard_fast_bytes(*wrong)
    with pytest.raises(BudgetError):
        shard_fast_bytes(6, 5, 8)


class Jump:
    """A curve as a trace's: it rises over the rows that were seen, stays, and is 1 when all rows have a slot."""

    def __init__(self, rows: int, seen: int, rate: float) -> None:
        self._rows, self._seen, self._rate = rows, seen, rate

    def hit_rate(self, slots: Floats, /) -> Floats:
        rising = self._rate * np.sqrt(np.minimum(slots, self._seen) / self._seen)
        return np.where(slots >= self._rows, 1.0, rising)


def jumping(rows: int, seen: int, rate: float, weight: float) -> BudgetItem:
    return BudgetItem(bytes_per_slot=10, curve=Jump(rows, seen, rate), weight=weight, floor_slots=0, max_slots=rows)


@pytest.mark.parametrize("rows", [100, 10_000])
def test_rows_never_seen_get_only_what_is_left_over(rows: int) -> None:
    seen = rows // 4
    items = {"busy": jumping(rows, seen, 0.9, 9.0), "idle": jumping(rows, seen, 0.5, 1.0)}
    for share in (0.2, 0.3, 0.5):
        split = split_budget(items, int(20 * rows * share))
        if share < 0.25:
            assert split["busy"] <= seen * 1.1 and split["idle"] <= seen * 1.1
        else:
            # All rows seen have a slot: the rest goes where unseen rows are asked for more, to the byte.
            assert split["busy"] > seen and split["idle"] >= 0.9 * seen
            assert 10 * sum(split.values()) == int(20 * rows * share)
    assert split_budget(items, 20 * rows) == {"busy": rows, "idle": rows}
