"""TorchRec's greedy walk, of which only the proposals worth a look are tried."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from torchrec.distributed.planner.types import (
    Enumerator,
    PartitionByType,
    Proposer,
    ShardingOption,
    Storage,
    Topology,
)

from torchrec_turbossd.planner.space import STORAGE, facts_of

_LARGEST = [STORAGE.index("hbm"), STORAGE.index("ddr")]
_PLACED = 400_000
_FEWEST, _MOST = 24, 160
"""Proposals of a walk: as many as have `_PLACED` shards together, within these bounds."""
_UNIFORM = PartitionByType.UNIFORM.value


class ThinGreedyProposer(Proposer):
    """Proposes what TorchRec's `GreedyProposer` does, without what cannot fit, and not all of it where it is much.

    That one starts with every table's quickest option and goes on with the next one of the table that takes the most
    memory: proposals and the time for each grow with the tables, and neighbours differ little. Here, those that exceed
    the sum of all ranks, a rank, or what shards on every rank leave of the first are skipped. Of the others all are
    proposed where they are few. Else it is some at even distances, then those halfway between the one that is rated
    best and its neighbours, again and again.

    Args:
        ranks: memory that tables may take on each rank, asked for once the planner has made its reservations.
        use_depth: options are sorted by their slowest shard, else by the time of all.
    """

    def __init__(self, ranks: Callable[[], Iterable[Storage]], use_depth: bool = True) -> None:
        self._ranks, self._use_depth = ranks, use_depth
        self._tables: list[list[ShardingOption]] = []
        self._steps: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._search: Generator[int, float, None] = _search([], 0)
        self._current: int | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Start over with the options of every table."""
        tables: dict[str, list[ShardingOption]] = {}
        for option in search_space:
            tables.setdefault(option.fqn, []).append(option)
        self._tables = [sorted(options, key=self._score) for options in tables.values()]
        self._steps = np.array(_steps(self._tables), dtype=np.int64)
        ranks = np.array([[getattr(rank, kind) for kind in STORAGE] for rank in self._ranks()], dtype=np.float64)
        may_fit = np.flatnonzero(_may_fit(self._tables, self._steps, ranks)).tolist() if tables else []
        shards = max(1, sum(len(options[0].shards) for options in self._tables))
        self._search = _search(may_fit, min(_MOST, max(_FEWEST, _PLACED // shards)))
        self._current = next(self._search, None)

    def propose(self) -> list[ShardingOption] | None:
        """One option for each table; None when there is nothing more to propose."""
        if self._current is None:
            return None
        positions = np.bincount(self._steps[: self._current], minlength=len(self._tables))
        return [options[n] for options, n in zip(self._tables, positions.tolist(), strict=True)]

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Move on to the next proposal."""
        rating = perf_rating if partitionable and perf_rating is not None else math.inf
        try:
            self._current = self._search.send(rating)
        except StopIteration:
            self._current = None

    def _score(self, option: ShardingOption) -> float:
        facts = facts_of(option)
        return float(facts.times.max()) if self._use_depth else sum(facts.times[facts.which].tolist())


def _steps(tables: Sequence[Sequence[ShardingOption]]) -> list[int]:
    """The table that each step of the walk takes to its next option."""

    def weight(table: int, position: int) -> tuple[float, ...]:
        facts = facts_of(tables[table][position])
        storage = facts.storage[:, _LARGEST]
        most, total = storage.max(axis=0), storage[facts.which].sum(axis=0)
        return -float(most[0]), -float(total[0]), -float(most[1]), -float(total[1])

    heap = [(weight(n, 0), n, 0) for n, options in enumerate(tables) if len(options) > 1]
    heapq.heapify(heap)
    steps = []
    while heap:
        _, table, position = heapq.heappop(heap)
        steps.append(table)
        if position + 2 < len(tables[table]):
            heapq.heappush(heap, (weight(table, position + 1), table, position + 1))
    return steps


def _may_fit(
    tables: Sequence[Sequence[ShardingOption]], steps: npt.NDArray[np.int64], ranks: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """[1 + steps]: whether the walk's proposals may fit in `ranks` [ranks, 3]."""
    needs = [np.array([_needs(option, ranks) for option in options]) for options in tables]
    position = np.zeros(len(tables), dtype=np.int64)
    changes = [np.sum([need[0] for need in needs], axis=0)]
    for table in steps.tolist():
        at = position[table]
        changes.append(needs[table][at + 1] - needs[table][at])
        position[table] += 1
    room = np.concatenate([ranks.sum(axis=0), ranks[0], np.zeros(1)])
    return np.asarray((np.cumsum(changes, axis=0) <= room).all(axis=1))


def _needs(option: ShardingOption, ranks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[7]: what all ranks need, what the first one does if all have a shard, and whether a shard is too large."""
    facts = facts_of(option)
    first = facts.storage[facts.which[0]] * (option.partition_by == _UNIFORM)
    too_large = (facts.storage.max(axis=0) > ranks.max(axis=0)).any()
    return np.concatenate([facts.storage[facts.which].sum(axis=0), first, [float(too_large)]])


def _search(numbers: Sequence[int], most: int) -> Generator[int, float, None]:
    """At most `most` of `numbers`, which rise, each answered by its rating: the lower, the better, infinite where it
    does not fit."""
    coarse = numbers if len(numbers) <= most else [numbers[n] for n in _even(len(numbers), most // 2)]
    rated = {}
    for number in coarse:
        rated[number] = yield number
    place = {number: n for n, number in enumerate(numbers)}
    while rated:
        known = sorted(place[number] for number in rated)
        best = place[min(rated, key=lambda number: (rated[number], number))]
        gaps = [(a, b) for a, b in itertools.pairwise(known) if b - a > 1]
        near = [gap for gap in gaps if best in gap] if rated[numbers[best]] < math.inf else gaps
        if not near or len(rated) + len(near) > most:
            return
        for a, b in near:
            number = numbers[(a + b) // 2]
            rated[number] = yield number


def _even(count: int, wanted: int) -> list[int]:
    return sorted({round(n) for n in np.linspace(0, count - 1, wanted).tolist()})


__all__ = ["ThinGreedyProposer"]
