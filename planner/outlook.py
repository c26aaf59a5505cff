"""What the memory that a plan leaves over will save, once it is shared among the caches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torchrec.distributed.planner.types import ShardingOption, Storage

from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.budget import budget_item, grows
from torchrec_turbossd.planner.demand import Demand
from torchrec_turbossd.planner.kernel import fast_memory
from torchrec_turbossd.planner.space import STORAGE, facts_of
from torchrec_turbossd.planner.ssd import SsdSpeed
from torchrec_turbossd.sizing.budget import gain_steps
from torchrec_turbossd.sizing.memory import host_slot_bytes

_POINTS = 48

Floats = npt.NDArray[np.float64]
_Kind = tuple[str, int, int, int]
"""What shards that gain alike have in common: table, rows, bytes of a row, slots."""


class Outlook:
    """Tells what `share_leftover` will do for a plan, nearly, without doing it.

    Every curve is a few straight lines here, and a rank's best lines are bought until its memory is spent: exact but
    for the last one bought and for what lies between the ends of a line.

    Args:
        compute_device: says which memory is fast.
        demand: lookups of a batch.
        access: hit-rate curves.
        ssd: of one rank.
    """

    def __init__(self, compute_device: str, *, demand: Demand, access: Access, ssd: SsdSpeed) -> None:
        self._device, self._fast = compute_device, STORAGE.index(fast_memory(compute_device))
        self._demand, self._access, self._ssd = demand, access, ssd
        self._steps: dict[_Kind, tuple[Floats, Floats, int]] = {}

    def saved(self, plan: list[ShardingOption], available: Mapping[int, Storage]) -> Floats:
        """Milliseconds of the SSD that each rank will be spared: [ranks].

        Args:
            plan: options with ranks, before `share_leftover`.
            available: memory of each rank that tables may take.
        """
        ranks = sorted(available)
        left = np.array([[getattr(available[rank], kind) for kind in STORAGE] for rank in ranks], dtype=np.float64)
        growing: list[list[_Kind]] = [[] for _ in ranks]
        place = {rank: n for n, rank in enumerate(ranks)}
        for option in plan:
            facts, where = facts_of(option), [place[shard.rank] for shard in option.shards]
            np.subtract.at(left, where, facts.storage[facts.which])
            if grows(option):
                for n, shard in enumerate(option.shards):
                    if shard.size[0]:
                        growing[where[n]].append(self._kind(option, n))
        bought: dict[tuple[_Kind, ...], tuple[Floats, Floats]] = {}
        saved = np.zeros(len(ranks))
        for n, kinds in enumerate(growing):
            if kinds:
                key = tuple(kinds)
                if key not in bought:
                    bought[key] = self._bought(key)
                saved[n] = np.interp(self._budget(kinds, left[n]), *bought[key])
        return saved

    def _kind(self, option: ShardingOption, number: int) -> _Kind:
        params = option.cache_params
        kind = option.fqn, int(option.shards[number].size[0]), params.row_bytes[number], params.slots[number]
        if kind not in self._steps:
            item = budget_item(option, number, self._device, demand=self._demand, access=self._access, ssd=self._ssd)
            self._steps[kind] = (*gain_steps(item, _POINTS), item.bytes_per_slot)
        return kind

    def _bought(self, kinds: tuple[_Kind, ...]) -> tuple[Floats, Floats]:
        """Bytes spent, rising from 0, and ms saved by then."""
        sizes = np.concatenate([self._steps[kind][0] for kind in kinds])
        gains = np.concatenate([self._steps[kind][1] for kind in kinds])
        order = np.argsort(-gains / sizes, kind="stable")
        return np.append(0.0, np.cumsum(sizes[order])), np.append(0.0, np.cumsum(gains[order]))

    def _budget(self, kinds: list[_Kind], left: Floats) -> float:
        budget = max(0.0, float(left[self._fast]))
        beside = host_slot_bytes(self._device)
        if beside:
            thinnest = min(self._steps[kind][2] for kind in kinds)
            budget = min(budget, max(0.0, float(left[STORAGE.index("ddr")])) / beside * thinnest)
        return budget


__all__ = ["Outlook"]
