"""The order in which tables leave fast memory: least asked for by byte first, and only as many as must."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Storage, Topology
from torchrec.distributed.types import ShardingType

from torchrec_turbossd.planner.kernel import TURBO_SSD, fast_memory
from torchrec_turbossd.planner.space import STORAGE, facts_of

_SIMPLEST_FIRST = [
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
]
_RESIDENT = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value)
_CUTS = (math.inf, *(2.0**-n for n in range(7)), 0.0)
_ONE_BY_ONE = 4
"""How many tables more than a cut starts with leave one at a time, before strides grow."""


@dataclass(frozen=True)
class _Way:
    """A way to hold a table: its ms and memory, all ranks together, and the most that a shard takes, in ms, fast memory
    and SSD. `total` is [3], as `STORAGE` has it."""

    option: ShardingOption
    work: float
    total: npt.NDArray[np.float64]
    heaviest: tuple[float, float, float]

    @classmethod
    def of(cls, option: ShardingOption, fast: int) -> _Way:
        facts = facts_of(option)
        most = facts.storage.max(axis=0)
        work = 0.0
        for time in facts.times[facts.which].tolist():
            work += time
        heaviest = float(facts.times.max()), float(most[fast]), float(most[STORAGE.index("ssd")])
        return cls(option, work, facts.storage[facts.which].sum(axis=0), heaviest)


Tier = dict[str, list[_Way]]
"""A table's ways in one tier by its name, the simplest first."""


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """The tables of a model, and the room for them.

    `leaving` are those that may leave fast memory, in order. `room` and `roomiest` are [3], as `STORAGE` has it: of all
    ranks together, and of the roomiest rank in each. `fast` is the place of fast memory in them.
    """

    names: list[str]
    resident: Tier
    on_ssd: Tier
    leaving: list[str]
    room: npt.NDArray[np.float64]
    roomiest: npt.NDArray[np.float64]
    fast: int


class _Cut:
    """Proposals of one cut, by how many tables have left."""

    def __init__(self, tables: _Tables, limit: float) -> None:
        self._tables, self._limit = tables, limit
        self._turn = {name: turn for turn, name in enumerate(tables.leaving)}
        self._picked: dict[tuple[str, bool, float], _Way] = {}

    def walk(self) -> Generator[list[_Way], bool, None]:
        """Proposals that may fit, each answered by whether it does; the last one that does has the fewest tables on
        SSD among those tried."""
        last = len(self._tables.leaving)
        first = bisect.bisect_left(range(last + 1), True, key=self._has_fast_memory)
        if first > last:
            return
        short, count = first - 1, first
        while not (yield from self._fits(count)):
            if count == last:
                return
            short, count = count, min(last, count + max(1, count - first - _ONE_BY_ONE + 1))
        while count - short > 1:
            middle = (short + count) // 2
            if (yield from self._fits(middle)):
                count = middle
            else:
                short = middle

    def _fits(self, count: int) -> Generator[list[_Way], bool, bool]:
        ways = self._ways(count)
        return bool((_total(ways) <= self._tables.room).all()) and (yield ways)

    def _has_fast_memory(self, count: int) -> bool:
        fast = self._tables.fast
        return bool(_total(self._ways(count))[fast] <= self._tables.room[fast])

    def _ways(self, count: int) -> list[_Way]:
        tables = self._tables
        gone = [name not in tables.resident or self._turn.get(name, count) < count for name in tables.names]
        pairs = list(zip(tables.names, gone, strict=True))
        slowest = max((tables.on_ssd if left else tables.resident)[name][0].heaviest[0] for name, left in pairs)
        return [self._pick(name, left, slowest) for name, left in pairs]

    def _pick(self, name: str, gone: bool, slowest: float) -> _Way:
        known = self._picked.get((name, gone, slowest))
        if known is None:
            tables = self._tables
            roomiest = tables.roomiest[tables.fast], tables.roomiest[STORAGE.index("ssd")]
            ways = (tables.on_ssd if gone else tables.resident)[name]
            known = _pick(ways, (slowest, float(roomiest[0]), float(roomiest[1])), self._limit)
            self._picked[name, gone, slowest] = known
        return known


def _total(ways: list[_Way]) -> npt.NDArray[np.float64]:
    total: npt.NDArray[np.float64] = np.array([way.total for way in ways]).sum(axis=0)
    return total


class OffloadProposer(Proposer):
    """Proposes all tables in fast memory, then more and more on SSD, until a plan fits, and no more than that takes.

    The next to go is the table with the fewest lookups for each byte of fast memory that its leaving frees. This is
    done in several cuts, and TorchRec keeps the plan that it rates best. In the first, every table is sharded in the
    simplest way. In the others, it is in the one of the least work, all ranks together, among those without a shard
    that weighs more than a limit, which halves from cut to cut; where there is none, in that with the lightest shards.
    A shard weighs the largest of: its time, in that of the first cut's slowest shard; its fast memory and its SSD, in
    those of the roomiest rank.

    A cut starts with the fewest tables on SSD with which the rest fits in the sum of all ranks; whether it fits rank by
    rank, TorchRec's partitioner says. The first few more go one at a time. Then strides double, and the last one, which
    led to a plan, is halved until one table fewer would not fit: a handful of proposals, however many tables there are.

    Args:
        compute_device: says which memory is fast.
        lookups: of one global batch for an option's table.
        ranks: memory that tables may take on each rank, asked for once the planner has made its reservations.
    """

    def __init__(
        self,
        compute_device: str,
        lookups: Callable[[ShardingOption], float],
        ranks: Callable[[], Iterable[Storage]],
    ) -> None:
        self._fast = STORAGE.index(fast_memory(compute_device))
        self._lookups, self._ranks = lookups, ranks
        self._walks: list[Generator[list[_Way], bool, None]] = []
        self._current: list[_Way] | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Start over with the options of every table."""
        names = list(dict.fromkeys(option.fqn for option in search_space))
        on_ssd = self._by_table(option for option in search_space if option.compute_kernel == TURBO_SSD)
        resident = self._by_table(option for option in search_space if option.compute_kernel != TURBO_SSD)
        # Lookups for each byte that a table's leaving frees, then its name, so that every run agrees.
        worth = {}
        for name in names:
            freed = self._freed(resident[name][0], on_ssd[name][0]) if name in resident and name in on_ssd else 0.0
            if freed > 0:
                worth[name] = self._lookups(resident[name][0].option) / freed, name
        ranks = np.array([[getattr(rank, kind) for kind in STORAGE] for rank in self._ranks()], dtype=np.float64)
        tables = _Tables(
            names=names,
            resident=resident,
            on_ssd=on_ssd,
            leaving=sorted(worth, key=worth.__getitem__),
            room=ranks.sum(axis=0),
            roomiest=ranks.max(axis=0),
            fast=self._fast,
        )
        self._walks = [_Cut(tables, limit).walk() for limit in _CUTS] if names else []
        self._start()

    def propose(self) -> list[ShardingOption] | None:
        """One option for each table; None when there is nothing more to propose."""
        return None if self._current is None else [way.option for way in self._current]

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Move on to the next proposal, with fewer tables on SSD where this one fits, else with more."""
        try:
            self._current = self._walks[0].send(partitionable)
        except StopIteration:
            del self._walks[0]
            self._start()

    def _start(self) -> None:
        """Go to the first proposal of the next cut that has one."""
        self._current = None
        while self._walks and self._current is None:
            self._current = next(self._walks[0], None)
            if self._current is None:
                del self._walks[0]

    def _freed(self, resident: _Way, on_ssd: _Way) -> float:
        return float(resident.total[self._fast] - on_ssd.total[self._fast])

    def _by_table(self, options: Iterable[ShardingOption]) -> Tier:
        tier: Tier = {}
        for option in sorted(options, key=taste):
            tier.setdefault(option.fqn, []).append(_Way.of(option, self._fast))
        # Other kernels may need less fast memory only because they keep their rows elsewhere.
        kernels = (TURBO_SSD, *_RESIDENT)
        return {
            name: [way for way in ways if way.option.compute_kernel in kernels] or ways for name, ways in tier.items()
        }


def _pick(ways: list[_Way], scale: tuple[float, float, float], limit: float) -> _Way:
    if limit == math.inf:
        return ways[0]
    weights = [max(a / b if b else float(a > 0) for a, b in zip(way.heaviest, scale, strict=True)) for way in ways]
    light = [way for way, weight in zip(ways, weights, strict=True) if weight <= limit]
    return min(light, key=lambda way: way.work) if light else ways[weights.index(min(weights))]


def taste(option: ShardingOption) -> tuple[bool, int, str, str]:
    """Sorts equally good options of a table: in memory before on SSD, then the simpler sharding, then by name."""
    kind = option.sharding_type
    simple = _SIMPLEST_FIRST.index(kind) if kind in _SIMPLEST_FIRST else len(_SIMPLEST_FIRST)
    return option.compute_kernel == TURBO_SSD, simple, kind, option.compute_kernel


def distinct(options: Iterable[ShardingOption]) -> list[ShardingOption]:
    """The first of the options that cut a table into the same shards for the same kernel: one column shard is a table,
    and on one host table-row-wise is row-wise."""
    seen: dict[tuple[object, ...], ShardingOption] = {}
    for option in options:
        shards = tuple((*shard.size, *shard.offset) for shard in option.shards)
        seen.setdefault((option.fqn, option.compute_kernel, shards), option)
    return list(seen.values())


__all__ = ["OffloadProposer", "distinct", "taste"]
