"""The proposer moves tables one by one, in order, in coarser and finer cuts, and skips what cannot fit."""

from __future__ import annotations

from torchrec.distributed.planner.proposers import UniformProposer
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology

from tests.planner.models import GB, MB, Model, planner, sharders, topology
from torchrec_turbossd.planner import TURBO_SSD
from torchrec_turbossd.planner.proposer import OffloadProposer, distinct, taste

TABLES = ("hot", 1_000_000, 64), ("cold", 1_000_000, 64), ("huge", 4_000_000, 64), ("tiny", 500, 64)
LOOKUPS = {"hot": 10.0, "cold": 1.0, "huge": 8.0, "tiny": 1.0}
# 1 lookup for 256 MB, 8 for 1 GB, 10 for 256 MB; a table as small as its least slots would free nothing.
ORDER = [set(), {"cold"}, {"cold", "huge"}, {"cold", "huge", "hot"}]


def loaded(where: Topology) -> OffloadProposer:
    """With the options of `TABLES` on CPU or CUDA, and the room of `where`."""
    constraints = {name: ParameterConstraints(pooling_factors=[count]) for name, count in LOOKUPS.items()}
    made = planner(where, constraints=constraints)
    proposer = OffloadProposer(
        where.compute_device, lambda option: LOOKUPS[option.name], lambda: [rank.storage for rank in where.devices]
    )
    proposer.load(made._enumerator.enumerate(Model(*TABLES), sharders()))
    return proposer


def on_ssd(proposal: list[ShardingOption] | None) -> set[str] | None:
    return None if proposal is None else {o.name for o in proposal if o.compute_kernel == TURBO_SSD}


def walked(proposer: OffloadProposer) -> list[list[ShardingOption]]:
    """Every proposal, when none fits."""
    found = []
    while (proposal := proposer.propose()) is not None:
        assert sorted(option.name for option in proposal) == sorted(LOOKUPS)
        found.append(proposal)
        proposer.feedback(False, proposal)
    return found


def cuts(proposals: list[list[ShardingOption]]) -> list[list[list[ShardingOption]]]:
    """Proposals by cut: each starts with fewer tables on SSD than the last one has."""
    found: list[list[list[ShardingOption]]] = [[]]
    for proposal in proposals:
        if found[-1] and len(on_ssd(proposal) or ()) < len(on_ssd(found[-1][-1]) or ()):
            found.append([])
        found[-1].append(proposal)
    return found


def test_tables_leave_in_order_and_one_at_a_time_in_every_cut() -> None:
    for where in (topology("cpu", fast=100 * GB), topology("cuda", ranks=4, local=2, fast=100 * GB)):
        every = cuts(walked(loaded(where)))
        assert len(every) == 9
        assert all([on_ssd(proposal) for proposal in cut] == ORDER for cut in every)


def test_cuts_get_finer() -> None:
    every = cuts(walked(loaded(topology("cuda", ranks=4, local=2, fast=8 * GB))))
    assert {o.sharding_type for proposal in every[0] for o in proposal} == {"table_wise"}
    shards = [next(len(o.shards) for o in cut[0] if o.name == "huge") for cut in every]
    times = [max(s.perf.total for o in cut[0] for s in o.shards) for cut in every]
    assert shards[0] == 1 and shards[-1] > 1
    assert times[-1] == min(times) < times[0]
    heaviest = [max(s.storage.hbm for o in cut[-1] if o.name != "tiny" for s in o.shards) for cut in every]
    assert heaviest[-1] == min(heaviest) < heaviest[0]


def test_a_way_that_fits_no_rank_is_left_out_of_all_cuts_but_the_simplest() -> None:
    every = cuts(walked(loaded(topology("cpu", ranks=4, fast=600 * MB))))
    kinds = [
        {next(o.sharding_type for o in p if o.name == "huge") for p in cut if "huge" not in (on_ssd(p) or ())}
        for cut in every
    ]
    assert kinds[0] == {"table_wise"} and all(kind == {"row_wise"} for kind in kinds[1:])


def test_what_cannot_fit_in_the_sum_of_all_ranks_is_skipped() -> None:
    for device in ("cpu", "cuda"):
        every = cuts(walked(loaded(topology(device, fast=400 * MB))))
        assert [on_ssd(proposal) for proposal in every[0]] == ORDER[2:]
    assert walked(loaded(topology("cpu", fast=MB))) == []


def test_a_cut_ends_with_the_first_plan_that_fits() -> None:
    proposer = loaded(topology("cuda", ranks=4, local=2, fast=100 * GB))
    seen = []
    while (proposal := proposer.propose()) is not None:
        seen.append(on_ssd(proposal))
        proposer.feedback(len(on_ssd(proposal) or ()) == 1, proposal)
    assert seen == 9 * ORDER[:2]


def test_it_starts_over_when_loaded_again() -> None:
    where = topology("cpu", fast=100 * GB)
    space = planner(where)._enumerator.enumerate(Model(*TABLES), sharders())
    proposer = OffloadProposer("cpu", lambda option: 1.0, lambda: [where.devices[0].storage])
    assert proposer.propose() is None
    for _ in range(2):
        proposer.load(space)
        assert on_ssd(proposer.propose()) == set()
        proposer.feedback(True)
    proposer.load([])
    assert proposer.propose() is None


def test_ways_that_are_the_same_are_offered_once_by_the_simplest_name() -> None:
    kinds = ["grid_shard", "table_column_wise", "table_row_wise", "column_wise", "row_wise", "table_wise"]
    constraints = {
        name: ParameterConstraints(sharding_types=kinds, compute_kernels=[TURBO_SSD], min_partition=width)
        for name, width in (("whole", 64), ("cut", 32))
    }
    model = Model(("whole", 1000, 64), ("cut", 1000, 64))
    expected = {
        # Ranks, ranks of a host: the ways of a table whose columns stay together, and of one whose are cut.
        (1, 1): (["table_wise"], ["table_wise", "column_wise"]),
        (2, 2): (["table_wise", "row_wise"], ["table_wise", "row_wise", "column_wise", "grid_shard"]),
        (4, 2): (["table_wise", "row_wise", "table_row_wise"], [
            "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard",
        ]),
        (2, 1): (["table_wise", "row_wise"], ["table_wise", "row_wise", "column_wise"]),
    }  # fmt: skip
    for (ranks, local), (whole, cut) in expected.items():
        found = planner(topology("cpu", ranks, local=local), constraints=constraints)._enumerator.enumerate(
            model, sharders()
        )
        assert [o.sharding_type for o in found if o.name == "whole"] == whole, (ranks, local)
        assert [o.sharding_type for o in found if o.name == "cut"] == cut, (ranks, local)
        assert distinct(sorted(found, key=taste)) == sorted(found, key=taste)


def test_it_finds_plans_without_the_stock_proposers() -> None:
    # Tables told where to be, so that TorchRec's uniform plans do not fit.
    model = Model(*((f"t{n}", 200_000 + 10_000 * n, 64) for n in range(20)))
    made = planner(topology("cuda", ranks=2, fast=200 * MB), proposer=UniformProposer())
    plan = made.plan(model, sharders()).plan["ebc"]
    moved = {name for name, sharding in plan.items() if sharding.compute_kernel == TURBO_SSD}
    # Alike but for their rows, the largest leave first.
    assert 0 < len(moved) < 20 and moved == {f"t{n}" for n in range(20 - len(moved), 20)}
