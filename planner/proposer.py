"""The order in which tables leave fast memory: least asked for by byte first, and only as many as must."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import reduce

from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Storage, Topology
from torchrec.distributed.types import ShardingType

from torchrec_turbossd.planner.kernel import TURBO_SSD, fast_memory

_PREFERRED = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value]
_TURNS = 3

Tier = dict[str, list[ShardingOption]]
"""A table's options in one tier by its name, fastest first."""


class OffloadProposer(Proposer):
    """Proposes all tables in fast memory, then one more on SSD at a time, and stops at the first plan that fits.

    The next to go is the table with the fewest lookups for each byte of fast memory that its leaving frees. With the
    same tables on SSD it tries the sharding types of each tier, fastest first. Proposals that cannot fit even in the
    sum of all ranks are skipped; whether the others fit, TorchRec's partitioner says.

    Args:
        compute_device: says which memory is fast.
        lookups: of one global batch for an option's table.
    """

    def __init__(self, compute_device: str, lookups: Callable[[ShardingOption], float]) -> None:
        self._fast = fast_memory(compute_device)
        self._lookups = lookups
        self._resident: Tier = {}
        self._on_ssd: Tier = {}
        self._proposals: Iterator[list[ShardingOption]] = iter(())
        self._current: list[ShardingOption] | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Start over with the options of every table."""
        names = list(dict.fromkeys(option.fqn for option in search_space))
        ours = [option for option in search_space if option.compute_kernel == TURBO_SSD]
        stock = [option for option in search_space if option.compute_kernel != TURBO_SSD]
        self._resident, self._on_ssd = self._by_table(stock), self._by_table(ours)
        self._proposals = self._walk(names)
        self._current = next(self._proposals, None)

    def propose(self) -> list[ShardingOption] | None:
        """One option for each table; None when there is nothing more to propose."""
        return self._current

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Move on to the next proposal, or stop because this one fits."""
        self._current = None
        if partitionable:
            return
        room = None
        if storage_constraint is not None:
            room = reduce(lambda a, b: a + b, (device.storage for device in storage_constraint.devices))
        for proposal in self._proposals:
            if room is None or _total(proposal).fits_in(room):
                self._current = proposal
                return

    def _walk(self, names: list[str]) -> Iterator[list[ShardingOption]]:
        """Every proposal, in order."""
        movable = [name for name in names if name in self._resident and name in self._on_ssd]
        gone = {name for name in names if name not in self._resident}
        turns = list(itertools.product(_turns(self._resident), _turns(self._on_ssd)))
        for leaving in [None, *sorted((n for n in movable if self._frees(n) > 0), key=self._worth)]:
            if leaving is not None:
                gone.add(leaving)
            seen = set()
            for resident, on_ssd in turns:
                proposal = [
                    _turn(self._on_ssd[name], on_ssd) if name in gone else _turn(self._resident[name], resident)
                    for name in names
                ]
                ids = tuple(map(id, proposal))
                if ids not in seen:
                    seen.add(ids)
                    yield proposal

    def _worth(self, name: str) -> tuple[float, str]:
        """Lookups for each byte that its leaving frees, then the name, so that every run agrees."""
        return self._lookups(self._resident[name][0]) / self._frees(name), name

    def _frees(self, name: str) -> int:
        resident, on_ssd = self._resident[name][0], self._on_ssd[name][0]
        return int(getattr(resident.total_storage, self._fast) - getattr(on_ssd.total_storage, self._fast))

    def _by_table(self, options: list[ShardingOption]) -> Tier:
        tier: Tier = {}
        for option in sorted(options, key=lambda o: (_slowest(o), getattr(o.total_storage, self._fast), *taste(o))):
            known = tier.setdefault(option.fqn, [])
            # Another kernel than the fastest may need less only because it keeps its rows elsewhere.
            alike = not known or known[0].compute_kernel == option.compute_kernel
            # On one rank a table by rows is a table.
            if alike and all(_shape(option) != _shape(other) for other in known):
                known.append(option)
        return tier


def _shape(option: ShardingOption) -> list[list[int]]:
    return [list(shard.size) for shard in option.shards]


def _turns(tier: Tier) -> range:
    return range(min(_TURNS, max(map(len, tier.values()), default=1)))


def _turn(options: list[ShardingOption], turn: int) -> ShardingOption:
    return options[min(turn, len(options) - 1)]


def taste(option: ShardingOption) -> tuple[bool, int, str, str]:
    """Sorts equally good options of a table: in memory before on SSD, then the simpler sharding, then by name."""
    kind = option.sharding_type
    simple = _PREFERRED.index(kind) if kind in _PREFERRED else len(_PREFERRED)
    return option.compute_kernel == TURBO_SSD, simple, kind, option.compute_kernel


def _slowest(option: ShardingOption) -> float:
    return max(shard.perf.total for shard in option.shards)


def _total(proposal: list[ShardingOption]) -> Storage:
    return reduce(lambda a, b: a + b, (option.total_storage for option in proposal))


__all__ = ["OffloadProposer", "taste"]
