"""Ways of splitting a budget of bytes among tables: ours, rules of thumb, and the best of all that were tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.measured import Traffic
from torchrec_turbossd.sizing import AccessProfile, BudgetItem, HitRateCurve, slot_bytes, split_budget

Floats = npt.NDArray[np.float64]

OURS = "split_budget"
RULES = ("equal bytes", "bytes by rows", "same share of rows", "bytes by lookups")
_STEPS = 80


def items_of(traffic: Sequence[Traffic], *, whole: bool = False) -> dict[str, BudgetItem]:
    """Tables as `split_budget` takes them, known by the first half of their traffic, or by the whole of it.

    Each has at least the slots of one batch.
    """
    return {
        each.table.name: BudgetItem(
            bytes_per_slot=slot_bytes(each.table.row_bytes),
            curve=HitRateCurve(
                AccessProfile.from_trace(each.asked if whole else each.first_half, each.table.rows, batch=each.batch)
            ),
            weight=float(each.batch),
            floor_slots=min(each.table.rows, each.batch),
            max_slots=each.table.rows,
        )
        for each in traffic
    }


def all_splits(items: Mapping[str, BudgetItem], budget: int) -> dict[str, list[int]]:
    """Slots of each table by each way; all of them spend the same, to within a slot of each table."""
    rows = np.array([item.max_slots for item in items.values()], dtype=np.float64)
    sizes = np.array([item.bytes_per_slot for item in items.values()], dtype=np.float64)
    lookups = np.array([item.weight for item in items.values()])
    parts = dict(zip(RULES, (np.ones(len(items)), rows, rows * sizes, lookups), strict=True))
    return {
        OURS: list(split_budget(items, budget).values()),
        **{name: in_proportion(items, budget, part) for name, part in parts.items()},
    }


def in_proportion(items: Mapping[str, BudgetItem], budget: int, parts: Floats) -> list[int]:
    """Slots whose bytes are as `parts`; what a table cannot take, or must have, is the others' gain or loss."""
    least = np.array([item.floor_slots for item in items.values()])
    most = np.array([item.max_slots for item in items.values()])
    sizes = np.array([item.bytes_per_slot for item in items.values()])
    low, high = 0.0, 2.0 * float((most * sizes / parts).max())
    for _ in range(_STEPS):
        level = (low + high) / 2
        fits = int(_clipped(level, parts, sizes, least, most) @ sizes) <= budget
        low, high = (level, high) if fits else (low, level)
    slots: list[int] = _clipped(low, parts, sizes, least, most).tolist()
    return slots


def _clipped(
    level: float, parts: Floats, sizes: npt.NDArray[np.int64], least: npt.NDArray[np.int64], most: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    return np.clip(np.floor(level * parts / sizes), least, most).astype(np.int64)


def spent(items: Mapping[str, BudgetItem], slots: Sequence[int]) -> int:
    """Bytes of a split."""
    return sum(item.bytes_for(count) for item, count in zip(items.values(), slots, strict=True))


def expected_misses(items: Mapping[str, BudgetItem], slots: Sequence[int]) -> float:
    """Lookups of a batch that miss, by the curves, each times what it costs."""
    rates = [float(item.curve.hit_rate(np.array([n]))[0]) for item, n in zip(items.values(), slots, strict=True)]
    return sum(item.weight * (1 - rate) for item, rate in zip(items.values(), rates, strict=True))


def fewest_misses(choices: Sequence[tuple[Floats, Floats]], budget: int) -> tuple[float, tuple[int, ...]]:
    """The best of all combinations of three tables' choices: its misses, and which choice of each table.

    Args:
        choices: for each table, bytes [N] and misses [N] of each choice.
        budget: bytes of all three together.
    """
    (bytes_0, misses_0), (bytes_1, misses_1), (bytes_2, misses_2) = choices
    # For every number of bytes left, the best choice of the last table that fits.
    order = np.argsort(bytes_2, kind="stable")
    best = np.minimum.accumulate(misses_2[order])
    left = budget - bytes_0[:, None] - bytes_1
    fits = np.searchsorted(bytes_2[order], left, side="right") - 1
    total = np.where(fits >= 0, misses_0[:, None] + misses_1 + best[np.maximum(fits, 0)], np.inf)
    first, second = np.unravel_index(int(total.argmin()), total.shape)
    last = order[int(np.argmax(misses_2[order] == best[fits[first, second]]))]
    return float(total.min()), (int(first), int(second), int(last))


def every_choice(item: BudgetItem) -> tuple[Floats, Floats]:
    """Bytes and expected misses of every number of slots that a table may have."""
    slots = np.arange(item.floor_slots, item.max_slots + 1)
    misses: Floats = item.weight * (1 - item.curve.hit_rate(slots.astype(np.float64)))
    sizes: Floats = (item.fixed_bytes + slots * item.bytes_per_slot).astype(np.float64)
    return sizes, misses


__all__ = [
    "OURS",
    "RULES",
    "all_splits",
    "every_choice",
    "expected_misses",
    "fewest_misses",
    "in_proportion",
    "items_of",
    "spent",
]
