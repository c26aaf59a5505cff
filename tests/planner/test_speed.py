"""Planning takes a handful of proposals and estimates, however many tables and ranks, and finds the same plans."""

from __future__ import annotations

import copy
import itertools
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption, Topology
from torchrec.distributed.planner.utils import reset_shard_rank

from tests.planner.models import GB, MB, Model, planner, printed_under_hash_seeds, sharders, topology
from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.planner import TURBO_SSD, TurboSSDPlanner
from torchrec_turbossd.planner.greedy import ThinGreedyProposer, _search
from torchrec_turbossd.planner.partitioner import UniformFirstPartitioner
from torchrec_turbossd.planner.perf import TurboSSDPerfModel
from torchrec_turbossd.planner.proposer import OffloadProposer
from torchrec_turbossd.planner.space import PlannedOption, Shards, facts_of

# The first 12 tables take 0.5 GB.
MACHINES = pytest.mark.parametrize(
    "where",
    [
        topology("cpu", ranks=3, fast=180 * MB),
        topology("cuda", ranks=8, local=8, fast=80 * MB),
        topology("cuda", ranks=8, local=4, fast=80 * MB),
    ],
    ids=["3 cpu", "8 cuda", "2 hosts of 4 cuda"],
)


def tables(count: int) -> list[tuple[str, int, int]]:
    """From a thousand rows to a million, in a mixed order, some of them alike, of three widths."""
    return [(f"t{n}", int(1000 * 10 ** (3 * (n * 37 % 41) / 40)) + n % 5, (32, 64, 128)[n % 3]) for n in range(count)]


def wanted(count: int) -> dict[str, ParameterConstraints]:
    """Pooling factors, and for some tables columns that may be cut."""
    return {
        f"t{n}": ParameterConstraints(pooling_factors=[1.0 + n * 7 % 20], min_partition=16 if n % 4 == 0 else None)
        for n in range(count)
    }


def made_for(where: Topology, count: int, **kwargs: Any) -> TurboSSDPlanner:
    """For `tables(count)`, with a batch whose rows take little."""
    return planner(where, batch_size=64, constraints=wanted(count), stats=[], **kwargs)


def space(where: Topology, count: int = 12) -> list[ShardingOption]:
    return made_for(where, count)._enumerator.enumerate(Model(*tables(count)), sharders())


def names(proposal: list[ShardingOption]) -> list[tuple[str, str, str]]:
    return [(option.name, option.sharding_type, option.compute_kernel) for option in proposal]


def ranks_of(where: Topology) -> Callable[[], list[Any]]:
    return lambda: [device.storage for device in where.devices]


class Rated(TurboSSDPerfModel):
    """Keeps the best rating."""

    best = float("inf")

    def rate(self, plan: list[ShardingOption]) -> float:
        self.best = min(self.best, rating := super().rate(plan))
        return rating


@MACHINES
def test_every_shard_has_the_estimate_that_it_would_have_alone(where: Topology) -> None:
    made = made_for(where, 12)
    found = made._enumerator.enumerate(Model(*tables(12)), sharders())
    again = [copy.copy(option) for option in found]
    for option in again:
        option.shards = [type(shard)(size=shard.size, offset=shard.offset) for shard in option.shards]
        option.cache_params = None
    # TorchRec's own way, shard by shard.
    EmbeddingEnumerator.populate_estimates(made._enumerator, again)
    assert [option.shards for option in again] == [option.shards for option in found]
    assert [option.cache_params for option in again] == [option.cache_params for option in found]
    assert any(len({tuple(shard.size) for shard in option.shards}) > 1 for option in found)


def test_estimates_are_asked_for_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    made = planner(topology("cuda", ranks=64, local=8, fast=GB))
    monkeypatch.setattr(
        EmbeddingEnumerator,
        "populate_estimates",
        lambda self, options: seen.extend(shard for option in options for shard in option.shards),
    )
    made._enumerator.populate_estimates(found := space(topology("cuda", ranks=64, local=8, fast=GB)))
    assert len(seen) < 5 * len(found) < sum(len(option.shards) for option in found) / 4


@MACHINES
def test_hashes_tell_options_apart_and_follow_new_estimates(where: Topology) -> None:
    found = space(where)
    assert all(type(option) is PlannedOption for option in found)
    assert len({hash(option) for option in found}) == len(found)
    assert [hash(option) for option in copy.deepcopy(found)] == [hash(option) for option in found]
    made = made_for(where, 12)
    made._enumerator.enumerate(Model(*tables(12)), sharders())
    before = [hash(option) for option in found]
    for option in found:
        option.batch_size = 1024
    made._enumerator.populate_estimates(found)
    assert not set(before) & {hash(option) for option in found}


def test_copies_share_nothing_with_the_first_ones_and_pickle() -> None:
    option = space(topology("cuda", ranks=8, fast=GB))[1]
    twin = copy.deepcopy(option)
    assert type(twin.shards) is Shards and twin.shards == option.shards == pickle.loads(pickle.dumps(option.shards))
    twin.shards[0].storage.hbm += 1
    twin.shards[0].size[0] += 1
    twin.shards[0].rank = 3
    assert twin.shards[0] != option.shards[0] and option.shards[0].rank is None
    # As copies of anything do.
    assert twin.shards[0].storage is twin.shards[1].storage


def test_callbacks_may_change_the_estimate_of_one_shard() -> None:
    changed = []

    def change(plan: list[ShardingOption]) -> list[ShardingOption]:
        for option in plan:
            before = [copy.copy(shard.storage) for shard in option.shards]
            option.shards[0].storage.ssd += 1
            option.shards[0].perf.fwd_compute += 1
            changed.append([a != b.storage for a, b in zip(before, option.shards, strict=True)])
            assert len({id(shard.perf) for shard in option.shards}) == len(option.shards)
        return plan

    kinds = {"fused": ["fused"], "ssd": [TURBO_SSD]}
    constraints = {n: ParameterConstraints(sharding_types=["row_wise"], compute_kernels=k) for n, k in kinds.items()}
    made = planner(topology("cpu", ranks=4), constraints=constraints, callbacks=[change])
    made.plan(Model(("fused", 1000, 64), ("ssd", 100_000, 64)), sharders())
    assert changed == [[True, False, False, False]] * 2


@MACHINES
@pytest.mark.parametrize("kind", ["mixed", "uniform"])
def test_the_partitioner_places_as_torchrec_does(where: Topology, kind: str) -> None:
    found = space(where)
    options: dict[str, list[ShardingOption]] = {}
    for option in found:
        if kind == "mixed" or option.partition_by == "uniform":
            options.setdefault(option.name, []).append(option)
    outcomes = []
    for turn in range(60):
        proposal = [ways[(turn * 5 + n * (1 + turn % 7)) % len(ways)] for n, ways in enumerate(options.values())]
        placed = []
        for partitioner in (GreedyPerfPartitioner(), UniformFirstPartitioner()):
            reset_shard_rank(proposal)
            try:
                placed.append([o.get_shards_assignment() for o in partitioner.partition(proposal, where)])
            except PlannerError:
                placed.append([])
        assert placed[0] == placed[1]
        outcomes.append(bool(placed[0]))
    # Both ways of it were seen.
    assert 0 < sum(outcomes) < 60
    assert all(device.perf.total == 0 for device in where.devices)


def test_shards_on_every_rank_fit_to_the_byte() -> None:
    where = topology("cpu", ranks=3, fast=GB)
    rows = [option for option in space(where) if (option.sharding_type, option.compute_kernel) == ("row_wise", "fused")]
    last = sum(option.shards[-1].storage.ddr for option in rows)
    assert last < sum(option.shards[0].storage.ddr for option in rows)
    where.devices[-1].storage.ddr = last
    UniformFirstPartitioner().partition(rows, where)
    assert [option.get_shards_assignment() for option in rows] == [[0, 1, 2]] * len(rows)
    where.devices[-1].storage.ddr = last - 1
    with pytest.raises(PlannerError, match="does not fit on every rank"):
        UniformFirstPartitioner().partition(rows, where)


@MACHINES
@pytest.mark.parametrize("use_depth", [True, False])
def test_the_thin_walk_proposes_what_torchrec_does_and_may_fit(where: Topology, use_depth: bool) -> None:
    found = space(where, 6)
    stock, ours = GreedyProposer(use_depth), ThinGreedyProposer(ranks_of(where), use_depth)
    stock.load(found)
    ours.load(found)
    every, kept = [], []
    while (proposal := stock.propose()) is not None:
        every.append(names(proposal))
        stock.feedback(False)
    while (proposal := ours.propose()) is not None:
        kept.append(names(proposal))
        ours.feedback(False)
    by_name = {(o.name, o.sharding_type, o.compute_kernel): o for o in found}
    fitting = []
    for proposal in every:
        options = [by_name[name] for name in proposal]
        reset_shard_rank(options)
        try:
            GreedyPerfPartitioner().partition(options, where)
        except PlannerError:
            continue
        fitting.append(proposal)
    assert 0 < len(kept) <= len(every)
    # In the same order, and nothing that fits is left out.
    assert kept == [proposal for proposal in every if proposal in kept]
    assert all(proposal in kept for proposal in fitting) and fitting


def searched(count: int, most: int, rate: Callable[[int], float]) -> list[int]:
    """What is tried of the even numbers below twice `count`."""
    search, tried = _search(range(0, 2 * count, 2), most), []
    try:
        number = next(search)
        while True:
            tried.append(number)
            number = search.send(rate(number))
    except StopIteration:
        return tried


def test_a_long_walk_is_thinned_and_homes_in_on_the_best() -> None:
    for best in (0, 2, 666, 1234, 1998):
        tried = searched(1000, 40, lambda number, best=best: abs(number - best))
        assert best in tried and len(tried) <= 40 and len(set(tried)) == len(tried)
    # Only what comes late fits: the best is the first of it.
    assert 1502 in searched(1000, 40, lambda number: number if number >= 1502 else float("inf"))
    # Where nothing fits, it looks everywhere.
    tried = sorted(searched(1000, 40, lambda number: float("inf")))
    assert max(b - a for a, b in itertools.pairwise(tried)) < 120 and 30 < len(tried) <= 40
    assert searched(30, 40, float) == list(range(0, 60, 2)) and searched(0, 40, float) == []


def test_a_cut_finds_the_fewest_tables_in_a_few_proposals() -> None:
    where = topology("cpu", ranks=2, fast=1000 * GB)
    found = space(where, 60)

    def first_cut(needed: float) -> list[int]:
        """Tables on SSD in each proposal of the first cut, where plans fit with `needed` and more."""
        proposer = OffloadProposer("cpu", lambda option: 1.0, ranks_of(where))
        proposer.load(found)
        cut = []
        while not cut or sum(option.compute_kernel == TURBO_SSD for option in proposer.propose() or []):
            cut.append(sum(option.compute_kernel == TURBO_SSD for option in proposer.propose() or []))
            proposer.feedback(cut[-1] >= needed)
        return cut

    most = sum(freed(found, name) > 0 for name in {option.name for option in found})
    assert most > 20
    for needed in range(most + 1):
        cut = first_cut(needed)
        assert cut[: min(needed, 4) + 1] == [0, 1, 2, 3, 4][: min(needed, 4) + 1]
        assert needed in cut and len(cut) <= 18
    assert first_cut(float("inf"))[-1] == most and len(first_cut(float("inf"))) <= 12


def freed(found: list[ShardingOption], name: str) -> int:
    """Bytes of memory that the simplest ways of a table differ by."""
    ways = [option for option in found if option.name == name and option.sharding_type == "table_wise"]
    resident, on_ssd = sorted(ways, key=lambda option: option.compute_kernel == TURBO_SSD)
    return int(resident.total_storage.ddr - on_ssd.total_storage.ddr)


@MACHINES
@pytest.mark.parametrize("fast", [30 * MB, 60 * MB, 10 * GB])
def test_plans_are_as_good_as_with_torchrecs_own_proposers(where: Topology, fast: int) -> None:
    where = copy.deepcopy(where)
    for device in where.devices:
        device.storage.hbm = device.storage.ddr = fast
    model = Model(*tables(16))
    own: dict[str, Any] = {
        "proposer": [GreedyProposer(), GreedyProposer(False)],
        "partitioner": GreedyPerfPartitioner(),
    }
    best, tried = [], []
    for kwargs in (own, {}):
        rated = Rated(where)
        made = made_for(where, 16, performance_model=rated, **kwargs)
        made.plan(model, sharders())
        best.append(rated.best)
        tried.append(made._num_proposals)
    assert best[1] <= best[0] * (1 + 1e-9) < float("inf")
    assert tried[1] < tried[0] or fast > GB


def test_a_users_proposer_and_partitioner_are_used() -> None:
    class Partitioner(GreedyPerfPartitioner):
        calls = 0

        def partition(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().partition(*args, **kwargs)

    partitioner, proposer = Partitioner(), GreedyProposer()
    made = planner(topology("cpu", ranks=2), partitioner=partitioner, proposer=[proposer])
    assert made._partitioner is partitioner and made._proposers[1:] == [proposer]
    made.plan(Model(*tables(4)), sharders())
    assert partitioner.calls == made._num_proposals > 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks, fast", [(8, 50 * GB), (8, 400 * MB), (64, 200 * MB), (8, MB)])
def test_many_tables_take_seconds(ranks: int, fast: int) -> None:
    made = made_for(topology("cuda", ranks=ranks, local=8, fast=fast), 300)
    model = Model(*tables(300))
    start = time.process_time()
    try:
        made.plan(model, sharders())
    except BudgetError:
        assert fast == MB
    # A third of that on an idle machine; proposals do not depend on the machine.
    assert time.process_time() - start < 30
    assert made._num_proposals < 500


PROGRAM = """
import logging
logging.disable(logging.WARNING)
from tests.planner.models import Model, sharders, topology
from tests.planner.test_speed import made_for, tables
made = made_for(topology("cuda", ranks=8, local=4, fast=80 * 10**6), 40)
plan = made.plan(Model(*tables(40)), sharders()).plan["ebc"]
print(made._num_proposals, sorted((n, s.compute_kernel, s.sharding_type, s.ranks) for n, s in plan.items()))
"""


@pytest.mark.slow
def test_every_run_tries_the_same() -> None:
    said = printed_under_hash_seeds(PROGRAM, "1", "2")
    assert len(said) == 1 and TURBO_SSD in said.pop()


def test_facts_of_stock_options_are_never_kept() -> None:
    option = space(topology("cpu", ranks=2))[0]
    stock = ShardingOption.__new__(ShardingOption)
    stock.__dict__.update({name: value for name, value in option.__dict__.items() if name != "_facts"})
    first = facts_of(stock)
    assert facts_of(stock) is not first and facts_of(option) is facts_of(option)
