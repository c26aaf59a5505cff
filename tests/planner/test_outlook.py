"""Plans are rated by what they will be once leftover memory is shared, and that is foreseen nearly exactly."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption, Storage

from tests.planner.models import GB, MB, Model, planner, sharders, topology
from torchrec_turbossd.planner import TURBO_SSD, SsdSpeed, TurboSSDPlanner
from torchrec_turbossd.planner.budget import share_leftover
from torchrec_turbossd.planner.partitioner import UniformFirstPartitioner
from torchrec_turbossd.planner.perf import TurboSSDPerfModel
from torchrec_turbossd.sizing import AccessProfile

SLOW = SsdSpeed(reads_per_s=20_000, bytes_per_s=80e6, writes_per_read=0.0)
Plan = list[ShardingOption]


class Case:
    """A model of a few tables whose every plan can be tried."""

    def __init__(
        self,
        device: str,
        fast: int,
        tables: list[tuple[str, int, int, float, float]],
        batches: int,
        dram: float | None = None,
    ) -> None:
        """`tables`: name, rows, dim, lookups of a sample, Zipf exponent. `dram`: GiB of a rank's tier."""
        self.finished: Plan = []
        self.where = topology(device, 2, fast=fast)
        self.batches = batches
        self.planner: TurboSSDPlanner = planner(
            self.where,
            64,
            {name: ParameterConstraints(pooling_factors=[pooling]) for name, _, _, pooling, _ in tables},
            access={name: AccessProfile.zipf(rows, alpha) for name, rows, _, _, alpha in tables},
            batches_in_flight=batches,
            ssd=SLOW,
            callbacks=[self._keep],
        )
        self.planner.plan(Model(*((name, rows, dim) for name, rows, dim, _, _ in tables)), sharders(dram))

    def _keep(self, plan: Plan) -> Plan:
        self.finished = plan
        return plan

    def available(self) -> dict[int, Storage]:
        return {device.rank: device.storage for device in self.where.devices}

    def shared(self, plan: Plan) -> Plan:
        return share_leftover(plan, self.available(), self.planner._terms)

    def rate(self, plan: Plan) -> float:
        """Of a plan whose leftover memory is shared."""
        return TurboSSDPerfModel(self.where, batches_in_flight=self.batches).rate(plan)

    def placed(self) -> list[Plan]:
        """Every combination of options that fits, with ranks."""
        options: dict[str, list[ShardingOption]] = {}
        for option in self.planner._enumerator.last_stored_search_space or []:
            options.setdefault(option.name, []).append(option)
        found = []
        for combination in itertools.product(*options.values()):
            try:
                found.append(UniformFirstPartitioner().partition(own(combination), copy.deepcopy(self.where)))
            except PlannerError:
                continue
        return found


def own(plan: Any) -> Plan:
    """A copy whose shards share no estimates."""
    copies: Plan = [copy.deepcopy(option) for option in plan]
    for shard in (shard for option in copies for shard in option.shards):
        shard.storage, shard.perf = copy.copy(shard.storage), copy.copy(shard.perf)
    return copies


GPU_TABLES = [("a", 187_502, 256, 1.0, 1.05), ("b", 400_000, 128, 3.0, 0.6), ("c", 50_000, 64, 10.0, 1.05)]

# In the first, a table that just fits in memory would leave the skewed one next to no slots.
CASES: dict[str, tuple[Any, ...]] = {
    "starved": (
        "cpu",
        233 * MB,
        [("a", 846_488, 128, 3.0, 1.3), ("b", 103_277, 8, 10.0, 0.6), ("c", 1_775_528, 64, 1.0, 1.05)],
        1,
    ),
    "even": ("cpu", 3 * MB, [("a", 1_084, 8, 1.0, 0.0), ("b", 34_182, 16, 1.0, 0.0), ("c", 103_808, 16, 1.0, 1.3)], 2),
    "gpu": ("cuda", GB // 5, GPU_TABLES, 2),
    "gpu with a small tier": ("cuda", GB // 5, GPU_TABLES, 2, 0.05),
    "gpu without a tier": ("cuda", GB // 5, GPU_TABLES, 2, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_no_other_plan_is_much_better(name: str) -> None:
    case = Case(*CASES[name])
    best = min(case.rate(case.shared(plan)) for plan in case.placed())
    assert case.rate(case.finished) <= 1.02 * best


@pytest.mark.parametrize("name", CASES)
def test_what_will_be_saved_is_foreseen(name: str) -> None:
    case = Case(*CASES[name])
    on_ssd = 0
    for plan in case.placed()[:60]:
        before = [sum(s.perf.prefetch_compute for o in plan for s in o.shards if s.rank == rank) for rank in range(2)]
        saved = case.planner._outlook.saved(plan, case.available())
        after = [
            sum(s.perf.prefetch_compute for o in case.shared(plan) for s in o.shards if s.rank == rank)
            for rank in range(2)
        ]
        on_ssd += any(option.compute_kernel == TURBO_SSD for option in plan)
        assert saved == pytest.approx(np.subtract(before, after), rel=0.05, abs=0.02 * max(before))
    assert on_ssd > 10


def test_a_table_whose_slots_the_user_fixed_gains_nothing() -> None:
    case = Case(*CASES["starved"])
    plan = case.placed()[-1]
    for option in plan:
        if option.compute_kernel == TURBO_SSD:
            option.cache_params.fixed = True
    assert case.planner._outlook.saved(plan, case.available()).tolist() == [0.0, 0.0]
