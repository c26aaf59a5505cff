"""The order in which tables leave fast memory: least asked for by byte first, and only as many as must."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Storage, Topology
from torchrec.distributed.types import ShardingType

from torchrec_turbossd.planner.kernel import TURBO_SSD, fast_memory

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


@dataclass(frozen=True)
class _Way:
    """A way to hold a table: its ms and memory, all ranks together, and the most that a shard takes, in ms, fast memory
    and SSD."""

    option: ShardingOption
    work: float
    total: Storage
    heaviest: tuple[float, float, float]

    @classmethod
    def of(cls, option: ShardingOption, fast: str) -> _Way:
        shards = [(s.perf.total, getattr(s.storage, fast), s.storage.ssd) for s in option.shards]
        times, memory, ssd = (max(values) for values in zip(*shards, strict=True))
        return cls(option, option.total_perf, option.total_storage, (times, memory, ssd))


Tier = dict[str, list[_Way]]
"""A table's ways in one tier by its name, the simplest first."""


class OffloadProposer(Proposer):
    """Proposes all tables in fast memory, then one more on SSD at a time, until a plan fits.

    The next to go is the table with the fewest lookups for each byte of fast memory that its leaving frees. This is
    done in several cuts, and TorchRec keeps the plan that it rates best. In the first, every table is sharded in the
    simplest way. In the others, it is in the one of the least work, all ranks together, among those without a shard
    that weighs more than a limit, which halves from cut to cut; where there is none, in that with the lightest shards.
    A shard weighs the largest of: its time, in that of the first cut's slowest shard; its fast memory and its SSD, in
    those of the roomiest rank. Proposals that cannot fit even in the sum of all ranks are skipped; whether the others
    fit, TorchRec's partitioner says.

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
        self._fast = fast_memory(compute_device)
        self._lookups, self._ranks = lookups, ranks
        self._resident: Tier = {}
        self._on_ssd: Tier = {}
        self._cuts: list[Iterator[list[_Way]]] = []
        self._current: list[_Way] | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Start over with the options of every table."""
        names = list(dict.fromkeys(option.fqn for option in search_space))
        ours = [option for option in search_space if option.compute_kernel == TURBO_SSD]
        stock = [option for option in search_space if option.compute_kernel != TURBO_SSD]
        self._resident, self._on_ssd = self._by_table(stock), self._by_table(ours)
        ranks = list(self._ranks())
        self._room = reduce(operator.add, ranks)
        self._roomiest = max(getattr(rank, self._fast) for rank in ranks), max(rank.ssd for rank in ranks)
        self._cuts = [self._walk(names, limit) for limit in _CUTS] if names else []
        self._advance()

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
        """Move on to the next proposal, which is of the next cut where this one fits."""
        if partitionable:
            del self._cuts[:1]
        self._advance()

    def _advance(self) -> None:
        self._current = None
        while self._cuts and self._current is None:
            self._current = next((ways for ways in self._cuts[0] if self._may_fit(ways)), None)
            if self._current is None:
                del self._cuts[0]

    def _may_fit(self, ways: Sequence[_Way]) -> bool:
        return bool(reduce(operator.add, (way.total for way in ways)).fits_in(self._room))

    def _walk(self, names: list[str], limit: float) -> Iterator[list[_Way]]:
        """Every proposal of a cut, in order."""
        movable = [name for name in names if name in self._resident and name in self._on_ssd]
        gone = {name for name in names if name not in self._resident}
        for leaving in [None, *sorted((n for n in movable if self._frees(n) > 0), key=self._worth)]:
            if leaving is not None:
                gone.add(leaving)
            tiers = [self._on_ssd[name] if name in gone else self._resident[name] for name in names]
            slowest = max(ways[0].heaviest[0] for ways in tiers)
            yield [_pick(ways, (slowest, *self._roomiest), limit) for ways in tiers]

    def _worth(self, name: str) -> tuple[float, str]:
        """Lookups for each byte that its leaving frees, then the name, so that every run agrees."""
        return self._lookups(self._resident[name][0].option) / self._frees(name), name

    def _frees(self, name: str) -> int:
        resident, on_ssd = self._resident[name][0], self._on_ssd[name][0]
        return int(getattr(resident.total, self._fast) - getattr(on_ssd.total, self._fast))

    def _by_table(self, options: list[ShardingOption]) -> Tier:
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
