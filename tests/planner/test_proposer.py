"""The proposer moves tables one by one, in order, skips what cannot fit, and stops when told that it fits."""

from __future__ import annotations

from torchrec.distributed.planner.proposers import UniformProposer
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology

from tests.planner.models import MB, Model, planner, sharders, topology
from torchrec_turbossd.planner import TURBO_SSD
from torchrec_turbossd.planner.proposer import OffloadProposer

TABLES = ("hot", 1_000_000, 64), ("cold", 1_000_000, 64), ("huge", 4_000_000, 64), ("tiny", 500, 64)
LOOKUPS = {"hot": 10.0, "cold": 1.0, "huge": 8.0, "tiny": 1.0}


def loaded(where: Topology) -> OffloadProposer:
    constraints = {name: ParameterConstraints(pooling_factors=[count]) for name, count in LOOKUPS.items()}
    made = planner(where, constraints=constraints)
    proposer = OffloadProposer(where.compute_device, lambda option: LOOKUPS[option.name])
    proposer.load(made._enumerator.enumerate(Model(*TABLES), sharders()))
    return proposer


def on_ssd(proposal: list[ShardingOption] | None) -> set[str] | None:
    return None if proposal is None else {o.name for o in proposal if o.compute_kernel == TURBO_SSD}


def walked(proposer: OffloadProposer, room: Topology | None) -> list[set[str] | None]:
    """Tables on SSD in each proposal, when none fits."""
    found = []
    while (proposal := proposer.propose()) is not None:
        assert sorted(option.name for option in proposal) == sorted(LOOKUPS)
        found.append(on_ssd(proposal))
        proposer.feedback(False, proposal, storage_constraint=room)
    return found


def test_tables_leave_in_order_and_one_at_a_time() -> None:
    # 1 lookup for 256 MB, 8 for 1 GB, 10 for 256 MB; a table as small as its least slots would free nothing.
    order = [set(), {"cold"}, {"cold", "huge"}, {"cold", "huge", "hot"}]
    assert walked(loaded(topology("cpu")), None) == order
    # Both ways to shard each tier, on more than one rank.
    several = walked(loaded(topology("cuda", ranks=2)), None)
    assert [tables for n, tables in enumerate(several) if tables not in several[:n]] == order
    assert len(several) > len(order)


def test_what_cannot_fit_in_the_sum_of_all_ranks_is_skipped() -> None:
    for device in ("cpu", "cuda"):
        proposer = loaded(topology(device))
        assert walked(proposer, topology(device, fast=400 * MB)) == [set(), {"cold", "huge"}, {"cold", "huge", "hot"}]


def test_it_stops_at_the_first_plan_that_fits() -> None:
    proposer = loaded(topology("cpu"))
    proposer.feedback(False, storage_constraint=topology("cpu"))
    assert on_ssd(proposer.propose()) == {"cold", "huge"}
    proposer.feedback(True)
    assert proposer.propose() is None


def test_it_starts_over_when_loaded_again() -> None:
    made = planner(topology("cpu"))
    space = made._enumerator.enumerate(Model(*TABLES), sharders())
    proposer = OffloadProposer("cpu", lambda option: 1.0)
    assert proposer.propose() is None
    for _ in range(2):
        proposer.load(space)
        assert on_ssd(proposer.propose()) == set()
        proposer.feedback(True)
    proposer.load([])
    assert proposer.propose() in (None, [])


def test_it_finds_plans_without_the_stock_proposers() -> None:
    # Tables told where to be, so that TorchRec's uniform plans do not fit.
    model = Model(*((f"t{n}", 200_000 + 10_000 * n, 64) for n in range(20)))
    made = planner(topology("cuda", ranks=2, fast=200 * MB), proposer=UniformProposer())
    plan = made.plan(model, sharders()).plan["ebc"]
    moved = {name for name, sharding in plan.items() if sharding.compute_kernel == TURBO_SSD}
    # Alike but for their rows, the largest leave first.
    assert 0 < len(moved) < 20 and moved == {f"t{n}" for n in range(20 - len(moved), 20)}
