"""What the memory that a plan leaves over will save, once it is shared among the caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torchrec.distributed.planner.types import ShardingOption, Storage

from torchrec_turbossd.planner.budget import Terms, budget_item, dram_for_tier, grows, tier_grows, tier_item
from torchrec_turbossd.planner.kernel import TURBO_SSD, fast_memory
from torchrec_turbossd.planner.space import STORAGE, facts_of
from torchrec_turbossd.planner.stores import bytes_of_stores
from torchrec_turbossd.sizing.budget import BudgetItem, gain_steps
from torchrec_turbossd.sizing.memory import dram_row_bytes, least_dram_slots, most_dram_slots

_POINTS = 48

Floats = npt.NDArray[np.float64]
_Kind = tuple[str, int, int, int, int]
"""What shards that gain alike have in common: table, rows, bytes of a row, slots, rows in the DRAM tier."""


@dataclass(frozen=True)
class _Steps:
    """Lines of the curves of some shards, those bought first first.

    owner: [S] whose. start: [S] rows of the shard in memory where the line begins, or slots of it. rows: [S] of the
    line. price: [S] bytes of a row. gain: [S] ms.
    """

    owner: npt.NDArray[np.int64]
    start: Floats
    rows: Floats
    price: Floats
    gain: Floats

    @classmethod
    def of(cls, item: BudgetItem, first: int) -> _Steps:
        """Those of one shard, from `first` rows on."""
        sizes, gains = gain_steps(item, _POINTS)
        rows = sizes / item.bytes_per_slot
        price = np.full(rows.size, float(item.bytes_per_slot))
        return cls(np.zeros(rows.size, dtype=np.int64), first + np.cumsum(rows) - rows, rows, price, gains)

    @classmethod
    def joined(cls, parts: list[_Steps]) -> _Steps:
        """Those of several shards, the best for their bytes first."""
        owner = np.repeat(np.arange(len(parts)), [part.rows.size for part in parts])
        start, rows, price, gain = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "rows", "price", "gain")
        )
        order = np.argsort(-gain / (rows * price), kind="stable")
        return cls(owner[order], start[order], rows[order], price[order], gain[order])

    def bought(self, budget: float, taken: Floats | None = None) -> tuple[float, Floats]:
        """What `budget` bytes buy: ms, and rows of each line [S].

        Args:
            taken: [S] share of each line that is there without being bought.
        """
        share = np.ones(self.rows.size) if taken is None else 1.0 - taken
        sizes = self.rows * self.price * share
        before = np.cumsum(sizes) - sizes
        part = np.clip((budget - before) / np.maximum(sizes, 1e-9), 0.0, 1.0) * share
        return float((self.gain * part).sum()), self.rows * part


@dataclass
class _Rank:
    """Shards of a rank by kind: all that gain something, and for each whether in slots and in the DRAM tier."""

    kinds: list[_Kind]
    slots: list[bool]
    tier: list[bool]


class Outlook:
    """Tells what `share_leftover` will do for a plan, nearly, without doing it.

    Every curve is a few straight lines here, and a rank's best lines are bought until its memory is spent: exact but
    for the last one bought, for what lies between the ends of a line, and for shards of one table on one rank that
    share an `l2_cache_size`.

    Args:
        terms: what caches are sized by.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._fast = STORAGE.index(fast_memory(terms.compute_device))
        self._items: dict[tuple[_Kind, bool], _Steps] = {}
        self._behind: dict[_Kind, _Steps] = {}
        self._joined: dict[tuple[object, ...], _Steps] = {}

    def saved(self, plan: list[ShardingOption], available: Mapping[int, Storage]) -> Floats:
        """Milliseconds of misses that each rank will be spared: [ranks].

        Args:
            plan: options with ranks, before `share_leftover`.
            available: memory of each rank that tables may take.
        """
        ranks = sorted(available)
        left = np.array([[getattr(available[rank], kind) for kind in STORAGE] for rank in ranks], dtype=np.float64)
        place = {rank: n for n, rank in enumerate(ranks)}
        found = [_Rank([], [], []) for _ in ranks]
        for option in plan:
            facts, where = facts_of(option), [place[shard.rank] for shard in option.shards]
            np.subtract.at(left, where, facts.storage[facts.which])
            if option.compute_kernel == TURBO_SSD:
                self._note(option, [found[n] for n in where])
        if self._terms.tier:
            for number, size in bytes_of_stores(plan, ranks, self._terms.compute_device).items():
                left[place[number], STORAGE.index("ddr")] -= size
        saved = np.zeros(len(ranks))
        known: dict[tuple[object, ...], float] = {}
        for n, rank in enumerate(found):
            if rank.kinds:
                # Ranks of a plan that is even are alike.
                key = (*rank.kinds, *rank.slots, *rank.tier, *left[n].tolist())
                if key not in known:
                    known[key] = self._saved(rank, left[n])
                saved[n] = known[key]
        return saved

    def _note(self, option: ShardingOption, ranks: list[_Rank]) -> None:
        in_slots, in_tier = grows(option), tier_grows(option, self._terms)
        if not (in_slots or in_tier):
            return
        params = option.cache_params
        for n, (shard, rank) in enumerate(zip(option.shards, ranks, strict=True)):
            if shard.size[0]:
                tier = params.dram_slots[n] if params.dram_slots else 0
                kind = option.fqn, int(shard.size[0]), params.row_bytes[n], params.slots[n], tier
                rank.kinds.append(kind)
                rank.slots.append(in_slots)
                rank.tier.append(in_tier)
                if in_slots and (kind, False) not in self._items:
                    for plenty in (False, True):
                        item = budget_item(option, n, self._terms, plenty=plenty)
                        self._items[kind, plenty] = _Steps.of(item, kind[3])
                if in_tier and kind not in self._behind:
                    item = tier_item(option, n, self._terms, kind[3])
                    # From the slots on, and not from the least rows, which are there before they count as a tier.
                    self._behind[kind] = _Steps.of(dataclasses.replace(item, floor_slots=0), kind[3])

    def _saved(self, rank: _Rank, left: Floats) -> float:
        behind = [kind for kind, grown in zip(rank.kinds, rank.tier, strict=True) if grown]
        least = sum(least_dram_slots(rows) * dram_row_bytes(size) for _, rows, size, _, _ in behind)
        room = dram_for_tier(int(left[STORAGE.index("ddr")]), least, self._terms) if behind else 0
        need = sum(most_dram_slots(slots, rows) * dram_row_bytes(size) for _, rows, size, slots, _ in behind)
        plenty = need <= room
        saved, grown = 0.0, np.zeros(len(rank.kinds))
        in_slots = [n for n, grows in enumerate(rank.slots) if grows]
        if in_slots:
            steps = self._steps(("slots", plenty), [self._items[rank.kinds[n], plenty] for n in in_slots])
            saved, rows = steps.bought(max(0.0, float(left[self._fast])))
            grown[in_slots] = np.bincount(steps.owner, rows, len(in_slots))
        if behind:
            steps = self._steps(("tier",), [self._behind[kind] for kind in behind])
            taken = None
            if not plenty:
                there = np.array([kind[3] for kind in rank.kinds]) + grown
                there = there[np.array(rank.tier)][steps.owner]
                taken = np.clip((there - steps.start) / steps.rows, 0.0, 1.0)
            saved += steps.bought(float(room), taken)[0]
        return saved

    def _steps(self, kind: tuple[object, ...], parts: list[_Steps]) -> _Steps:
        key = (*kind, *map(id, parts))
        if key not in self._joined:
            self._joined[key] = _Steps.joined(parts)
        return self._joined[key]


__all__ = ["Outlook"]
