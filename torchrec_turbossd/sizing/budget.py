"""Sharing a memory budget among caches so that the fewest lookups miss."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.sizing.curve import Curve
from torchrec_turbossd.sizing.profile import Floats, Ints

Key = TypeVar("Key", bound=Hashable)
_POINTS = 512
_TRADES = 32
_MOST_TRADED = 32
_WORTH_TRADING = 1e-4


@dataclass(frozen=True, kw_only=True)
class BudgetItem:
    """One cache that wants a share.

    Attributes:
        bytes_per_slot: what one more slot costs.
        curve: its hit rate by slots.
        weight: lookups a batch, times what a miss costs where that differs between items.
        floor_slots: slots it must have.
        max_slots: slots beyond which more do not help: its rows.
        fixed_bytes: what it takes whatever its slots: slot map, reserved slot.
    """

    bytes_per_slot: int
    curve: Curve
    weight: float
    floor_slots: int
    max_slots: int
    fixed_bytes: int = 0

    def __post_init__(self) -> None:
        if self.bytes_per_slot < 1 or self.fixed_bytes < 0:
            raise ConfigError(f"a slot takes at least 1 byte, got {self.bytes_per_slot} and {self.fixed_bytes} fixed")
        if not 0 <= self.floor_slots <= self.max_slots:
            raise ConfigError(f"0 <= floor <= max slots is needed, got {self.floor_slots} and {self.max_slots}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"a weight is finite and not negative, got {self.weight}")

    @functools.cached_property
    def jump(self) -> float:
        """The hit rate that the last slot adds, where it is more than twice what slots do on average, else 0; so it is
        with concave curves."""
        if self.max_slots < 2:
            return 0.0
        before, last = self.curve.hit_rate(np.array([self.max_slots - 1, self.max_slots], dtype=np.float64))
        gained = float(last - before)
        return gained if gained * self.max_slots > 2 * float(last) else 0.0

    def bytes_for(self, slots: int) -> int:
        """Bytes that it takes with `slots`."""
        return self.fixed_bytes + slots * self.bytes_per_slot


@dataclass
class _Step:
    """Slots `start` to `stop` of an item on the concave hull of its gain; `density` is gain per byte."""

    item: int
    start: int
    stop: int
    density: float


def split_budget(items: Mapping[Key, BudgetItem], budget_bytes: int) -> dict[Key, int]:
    """Slots for each item, floors included, that together fit `budget_bytes` and lose the fewest weighted lookups.

    Every item's gain is replaced by its least concave majorant, cut into steps; steps are taken by gain per byte,
    best first, the last one in part (B. Fox, "Discrete Optimization via Marginal Analysis", 1966). With concave curves,
    as those of access profiles are, what that misses of the best is less than the gain of one slot; where slots are so
    few that this matters, some are then traded between two items at a time. The same input gives the same result.

    A curve that jumps with its very last slot, as those of traces do, is taken to stay where it was before: what a
    cache of all rows gains over one of all rows seen so far it gains in the long run, if ever. Memory that nothing
    else is worth goes there.

    Raises:
        BudgetError: the floors do not fit; or a budget that is negative or not a whole number of bytes.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 0:
        raise BudgetError(f"a budget is a whole number of bytes, not negative, got {budget_bytes!r}")
    slots = [item.floor_slots for item in items.values()]
    left = budget_bytes - sum(item.bytes_for(item.floor_slots) for item in items.values())
    if left < 0:
        raise BudgetError(_short(items, budget_bytes, -left))
    wanted = list(items.values())
    steps = [step for number, item in enumerate(wanted) for step in _steps(number, item)]
    steps.sort(key=lambda step: (-step.density, step.item, step.start))
    for step in steps:
        # A step left out in part bars the later ones of its item, which are worth less.
        if slots[step.item] != step.start:
            continue
        price = wanted[step.item].bytes_per_slot
        taken = min(step.stop - step.start, left // price)
        slots[step.item] += taken
        left -= taken * price
    left = _spend_on_jumps(wanted, slots, left)
    for _ in range(_TRADES):
        trade = _best_trade(wanted, np.array(slots, dtype=np.int64), left)
        if trade is None:
            break
        for number, change in trade:
            slots[number] += change
            left -= change * wanted[number].bytes_per_slot
    return dict(zip(items, slots, strict=True))


def gain_steps(item: BudgetItem, points: int) -> tuple[Floats, Floats]:
    """An item's gain beyond its floor as steps, the best for their bytes first, on `points` points of its curve.

    Returns:
        Bytes of each step [S], and the weighted hits that it gains [S].
    """
    slots, gains = _majorant(item, points)
    sizes, gained = np.diff(slots) * float(item.bytes_per_slot), np.diff(gains)
    return sizes[gained > 0], gained[gained > 0]


def explain_split(items: Mapping[Key, BudgetItem], slots: Mapping[Key, int]) -> str:
    """A line for each item: slots, bytes, hit rate per lookup, and what one more MiB would do for it."""
    lines = []
    for key, item in items.items():
        now = slots[key]
        more = min(item.max_slots, now + max(1, 2**20 // item.bytes_per_slot))
        rates = item.curve.hit_rate(np.array([now, more], dtype=np.float64))
        lines.append(
            f"{key}: {now:,} of {item.max_slots:,} slots, {item.bytes_for(now) / 2**20:,.1f} MiB, "
            f"hit rate {rates[0]:.1%}; one more MiB: {rates[1]:.1%}"
        )
    return "\n".join(lines)


def _short(items: Mapping[Key, BudgetItem], budget: int, short: int) -> str:
    floors = sorted(((item.bytes_for(item.floor_slots), str(key)) for key, item in items.items()), reverse=True)
    named = ", ".join(f"{key!r} {size:,} bytes" for size, key in floors[:5])
    rest = f" and {len(floors) - 5} more" if len(floors) > 5 else ""
    return (
        f"the least slots of {len(floors)} caches take {budget + short:,} bytes, {short:,} more than the budget of "
        f"{budget:,}: {named}{rest}; raise the budget, or lower the batch size or the batches in flight"
    )


def _steps(number: int, item: BudgetItem) -> list[_Step]:
    slots, gains = _majorant(item, _POINTS)
    densities = np.diff(gains) / np.diff(slots) / item.bytes_per_slot
    return [
        _Step(number, int(a), int(b), float(density))
        for (a, b), density in zip(itertools.pairwise(slots), densities, strict=True)
        if density > 0
    ]


def _majorant(item: BudgetItem, points: int) -> tuple[Ints, Floats]:
    """Slots and gains where the least concave majorant bends, which is known at so many points; none to be had: [0]."""
    grid = _grid(item.floor_slots, item.max_slots, points)
    if grid.size < 2 or item.weight == 0:
        return grid[:0], np.empty(0)
    gains = _gain(item, grid)
    hull = _hull(grid, gains)
    return grid[hull], gains[hull]


def _spend_on_jumps(items: Sequence[BudgetItem], slots: list[int], left: int) -> int:
    """Give what is left to items whose last slot is worth it, the most for its bytes first; returns what still is."""
    prices = {n: (item.max_slots - slots[n]) * item.bytes_per_slot for n, item in enumerate(items)}
    gains = {n: item.weight * item.jump for n, item in enumerate(items) if slots[n] < item.max_slots}
    for number in sorted((n for n in gains if gains[n] > 0), key=lambda n: (-gains[n] / prices[n], n)):
        taken = min(items[number].max_slots - slots[number], left // items[number].bytes_per_slot)
        slots[number] += taken
        left -= taken * items[number].bytes_per_slot
    return left


def _best_trade(items: Sequence[BudgetItem], slots: Ints, left: int) -> list[tuple[int, int]] | None:
    """The change of slots of two items, (item, change) each, that gains most; None where it is not worth the while."""
    prices = np.array([item.bytes_per_slot for item in items], dtype=np.int64)
    spare = slots - np.array([item.floor_slots for item in items], dtype=np.int64)
    room = np.minimum(np.array([item.max_slots for item in items], dtype=np.int64) - slots, _MOST_TRADED)
    steps = np.arange(_MOST_TRADED + 1)
    now = np.array([_gain(item, count) for item, count in zip(items, slots, strict=True)])
    lose = np.array([_gain(item, np.maximum(count - steps, 0)) for item, count in zip(items, slots, strict=True)])
    win = np.array([_gain(item, count + steps) for item, count in zip(items, slots, strict=True)])
    best, most = None, _WORTH_TRADING * float(now.sum())
    for giver, price in enumerate(prices):
        given = steps[: spare[giver] + 1]
        taken = np.minimum((left + given[:, None] * price) // prices, room)
        taken[:, giver] = 0
        net = lose[giver, given][:, None] - now[giver] + np.take_along_axis(win, taken.T, axis=1).T - now
        number, taker = np.unravel_index(int(net.argmax()), net.shape)
        if net[number, taker] > most:
            most = float(net[number, taker])
            best = [(giver, -int(given[number])), (int(taker), int(taken[number, taker]))]
    return best


def _gain(item: BudgetItem, slots: npt.ArrayLike) -> Floats:
    """Weighted hits, without the jump."""
    counts = np.asarray(slots, dtype=np.float64)
    return item.weight * (item.curve.hit_rate(counts) - item.jump * (counts >= item.max_slots))


def _grid(low: int, high: int, points: int) -> Ints:
    """Every slot count where there are few, else finer near `low`, where the curve bends."""
    if high - low < points:
        return np.arange(low, high + 1, dtype=np.int64)
    offsets = np.geomspace(1, high - low, points).round().astype(np.int64)
    grid = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), offsets])) + low
    grid[-1] = high
    return grid


def _hull(grid: Ints, gains: Floats) -> list[int]:
    """Indices of the upper concave hull of the points."""
    hull: list[int] = []
    for point in range(grid.size):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (gains[b] - gains[a]) / (grid[b] - grid[a])
            after = (gains[point] - gains[b]) / (grid[point] - grid[b])
            if before > after:
                break
            hull.pop()
        hull.append(point)
    return hull


__all__ = ["BudgetItem", "explain_split", "gain_steps", "split_budget"]
