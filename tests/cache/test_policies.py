"""Eviction policies: the same hits as told in plain words, what victims may be, and who beats LRU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.cache.plain_policies import PlainS3Fifo, PlainSieve, SmallCache, drifting_rows, policy_bytes, zipf_rows
from torchrec_turbossd import sizing
from torchrec_turbossd.cache.eviction import EvictionPolicy
from torchrec_turbossd.cache.ghost import Ghost
from torchrec_turbossd.cache.policies import BYTES_PER_SLOT, DEFAULT_POLICY, POLICIES
from torchrec_turbossd.cache.s3_fifo import S3Fifo

NAMES = pytest.mark.parametrize("name", sorted(POLICIES))


def make(name: str, slots: int) -> SmallCache:
    return SmallCache(POLICIES[name](slots))


def hits(name: str, ids: list[int], slots: int, batch: int) -> int:
    cache = make(name, slots)
    return sum(cache.serve(ids[n : n + batch]) for n in range(0, len(ids), batch))


@pytest.mark.parametrize(("name", "plain"), [("s3_fifo", PlainS3Fifo), ("sieve", PlainSieve)])
@pytest.mark.parametrize("slots", [1, 2, 3, 7, 40, 150])
def test_one_lookup_at_a_time_is_the_published_policy(name: str, plain: type, slots: int) -> None:
    for ids in (zipf_rows(400, 0.8, 500, seed=slots), drifting_rows(250, 1.05, 700, seed=slots)):
        reference, cache = plain(slots), make(name, slots)
        assert [reference.read(i) for i in ids] == [cache.serve([i]) == 1 for i in ids]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=120), st.integers(1, 9))
def test_short_streams_too(ids: list[int], slots: int) -> None:
    for name, plain in (("s3_fifo", PlainS3Fifo(slots)), ("sieve", PlainSieve(slots))):
        cache = make(name, slots)
        assert [plain.read(i) for i in ids] == [cache.serve([i]) == 1 for i in ids]


GOLDEN = {
    "clock": (13390, 13388, 13368),
    "lru": (13104, 13055, 12611),
    "s3_fifo": (14384, 14356, 13629),
    "sieve": (14404, 14267, 13702),
}


@NAMES
def test_golden_hits(name: str) -> None:
    """Of 20,000 lookups of a Zipf 1.05 table, 200 slots, in batches; a batch's repeats of an absent row are misses."""
    ids = zipf_rows(2000, 1.05, 20_000, seed=11)
    assert tuple(hits(name, ids, 200, batch) for batch in (16, 64, 256)) == GOLDEN[name]


@pytest.mark.parametrize("slots", [20, 100, 200, 500])
@pytest.mark.parametrize("batch", [16, 128])
@pytest.mark.parametrize("stream", ["steady", "drifting", "scanned"])
def test_the_default_beats_lru(slots: int, batch: int, stream: str) -> None:
    drifts = stream == "drifting"
    ids = drifting_rows(2000, 1.05, 12_000, seed=5) if drifts else zipf_rows(2000, 0.95, 12_000, seed=6)
    if stream == "scanned":
        # A fifth of the lookups goes once through rows that nobody asks for again.
        ids = [2000 + n if n % 1000 < 200 else i for n, i in enumerate(ids)]
    assert hits(DEFAULT_POLICY, ids, slots, batch) >= hits("lru", ids, slots, batch)


class VictimsAreAsPromised(RuleBasedStateMachine):
    """Random batches, pins, drops and moves; `SmallCache.evict` checks each answer."""

    name = "clock"
    slots = 11

    def __init__(self) -> None:
        super().__init__()
        self.cache = make(self.name, self.slots)

    @rule(ids=st.lists(st.integers(0, 30), min_size=1, max_size=12))
    def serve(self, ids: list[int]) -> None:
        self.cache.serve(ids)

    @rule(count=st.integers(1, 14))
    def evict(self, count: int) -> None:
        self.cache.evict(count)

    @rule(count=st.integers(1, 14))
    def name_and_keep(self, count: int) -> None:
        named = self.cache.policy.victims(count, self.cache.evictable)
        assert named.numel() == min(count, int(self.cache.evictable(self.cache.numbers(range(self.slots + 1))).sum()))

    @rule(count=st.integers(1, 14), part=st.integers(0, 14))
    def evict_some_of_those_named(self, count: int, part: int) -> None:
        gone = self.cache.policy.victims(count, self.cache.evictable)[part:]
        self.cache.policy.evicted(gone, self.cache.owners[gone])
        self.cache._empty(gone)

    @precondition(lambda self: self.cache.slots)
    @rule(pick=st.integers(0, 100), count=st.integers(1, 5), what=st.sampled_from(["drop", "move", "pin", "read"]))
    def change(self, pick: int, count: int, what: str) -> None:
        rows = sorted(self.cache.slots)
        rows = [rows[(pick + n) % len(rows)] for n in range(min(count, len(rows)))]
        if what == "pin":
            self.cache.pinned[[self.cache.slots[r] for r in rows]] ^= True
        elif what == "read":
            self.cache.policy.touch(self.cache.numbers([self.cache.slots[r] for r in rows] * 2))
        elif what == "drop":
            self.cache.drop(rows)
        else:
            self.cache.move(rows)

    @invariant()
    def heat_knows_who_is_there(self) -> None:
        heat = self.cache.policy.heat()
        assert heat.shape == (self.slots + 1,) and heat.dtype == torch.int64
        assert (heat > 0).tolist() == (self.cache.owners >= 0).tolist()


class LruVictims(VictimsAreAsPromised):
    name = "lru"


class S3FifoVictims(VictimsAreAsPromised):
    name = "s3_fifo"

    @invariant()
    def each_row_is_in_one_queue(self) -> None:
        policy = self.cache.policy
        assert isinstance(policy, S3Fifo) and policy._small.size + policy._main.size == len(self.cache.slots)


class SieveVictims(VictimsAreAsPromised):
    name = "sieve"


TestClockVictims = VictimsAreAsPromised.TestCase
TestLruVictims = LruVictims.TestCase
TestS3FifoVictims = S3FifoVictims.TestCase
TestSieveVictims = SieveVictims.TestCase
for case in (TestClockVictims, TestLruVictims, TestS3FifoVictims, TestSieveVictims):
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
del case


@NAMES
def test_slots_never_admitted_are_not_victims(name: str) -> None:
    policy = POLICIES[name](10)
    mine = torch.tensor([2, 5, 9])
    policy.admitted(mine, torch.tensor([7, 8, 9]))
    policy.touch(torch.tensor([0, 1, 2, 10]))
    policy.released(torch.tensor([5]))
    assert sorted(policy.victims(10, lambda slots: slots > 0).tolist()) == [2, 9]


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"lru"}))
def test_a_new_row_inherits_no_reads(name: str) -> None:
    cache = make(name, 10)
    cache.serve(list(range(10)))
    cache.serve(list(range(10)))
    cache.drop(list(range(5)))
    cache.policy.touch(torch.arange(11))
    cache.serve(list(range(20, 25)))
    cache.evict(5)
    assert sorted(cache.slots) == list(range(5, 10)), "those read stay"


@NAMES
def test_victims_are_found_behind_many_that_are_pinned(name: str) -> None:
    cache = make(name, 3000)
    cache.serve(list(range(3000)))
    cache.serve(list(range(1000, 2000)))
    cache.pinned[:] = True
    loose = [cache.slots[row] for row in (1, 999, 1000, 1500, 1999, 2500, 2999)]
    cache.pinned[loose] = False
    assert cache.evict(2).numel() == 2
    assert cache.evict(9).numel() == 5
    assert len(cache.slots) == 2993


@NAMES
def test_victims_are_the_coldest_by_heat(name: str) -> None:
    """Of rows that nobody has read since they came, and others; all orders agree on these."""
    cache = make(name, 40)
    cache.serve(list(range(40)))
    cache.serve(list(range(10)))
    heat = cache.policy.heat()
    read = torch.tensor([cache.slots[r] for r in range(10)])
    others = torch.tensor([cache.slots[r] for r in range(10, 40)])
    assert heat[read].min() > heat[others].max()
    gone = {int(i) for i in cache.owners[cache.policy.victims(30, cache.evictable)]}
    assert gone == set(range(10, 40))


@NAMES
def test_heat_orders_a_large_cache(name: str) -> None:
    policy = POLICIES[name](1000)
    slots = torch.arange(1, 1001)
    policy.admitted(slots, slots)
    policy.touch(slots[:300])
    heat = policy.heat()
    assert heat[0] == 0 and heat[1:301].min() > heat[301:].max() > 0


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"clock"}))
def test_a_moved_row_keeps_its_rank(name: str) -> None:
    """Two caches serve the same; in one, rows change slots in between. CLOCK's order is that of the slots."""
    still, moving = make(name, 30), make(name, 30)
    ids = zipf_rows(60, 0.8, 600, seed=3)
    for n in range(0, len(ids), 5):
        for cache in (still, moving):
            cache.serve(ids[n : n + 5])
            cache.drop([r for r in sorted(cache.slots) if r % 7 == n % 7][:3])
        assert set(still.slots) == set(moving.slots)
        heat, moved = moving.policy.heat(), sorted(moving.slots)[:2]
        before = heat[[moving.slots[r] for r in moved]]
        moving.move(moved)
        assert moving.policy.heat()[[moving.slots[r] for r in moved]].tolist() == before.tolist()
    theirs = [c.owners[c.policy.victims(30, c.evictable)].tolist() for c in (still, moving)]
    # One batch's reads share a stamp, so that LRU's order within it is anyone's.
    assert sorted(theirs[0]) == sorted(theirs[1]) if name == "lru" else theirs[0] == theirs[1]


def test_a_moved_clock_mark_follows_its_row() -> None:
    cache = make("clock", 6)
    cache.serve([1, 2, 3, 4])
    cache.serve([4])
    cache.drop([1])
    cache.move([4])
    assert cache.slots[4] == 1, "where the hand is"
    cache.evict(2)
    assert list(cache.slots) == [4]


def test_named_and_kept_slots_are_named_again() -> None:
    cache = make("s3_fifo", 20)
    for n in range(0, 200, 4):
        cache.serve(list(range(n, n + 4)))
        cache.serve([n, n + 1])
    named = cache.policy.victims(20, cache.evictable)
    assert torch.equal(cache.policy.victims(20, cache.evictable), named) and named.numel() == 20
    first = cache.policy.victims(3, cache.evictable)
    assert torch.equal(cache.policy.victims(3, cache.evictable), first)


@NAMES
def test_memory_is_what_the_policy_says(name: str) -> None:
    for slots in (1, 2, 3, 4, 9, 1001, 1002):
        policy = POLICIES[name](slots)
        assert policy.nbytes == policy_bytes(policy) == (slots + 1) * policy.bytes_per_slot


def test_planning_counts_the_default_policy() -> None:
    assert BYTES_PER_SLOT == sizing.BYTES_PER_SLOT == 13 + POLICIES[DEFAULT_POLICY].bytes_per_slot
    assert DEFAULT_POLICY == sizing.DEFAULT_POLICY


def test_a_row_that_comes_back_soon_goes_to_the_main_queue() -> None:
    for row, stays in ((15, True), (50, False)):
        cache = make("s3_fifo", 20)
        for first in range(25):
            cache.serve([first])
        assert 15 not in cache.slots, "it went when 20 came"
        cache.serve([row])
        # Twenty new rows pass through the small queue and leave the main one alone.
        for new in range(100, 120):
            cache.serve([new])
        assert (row in cache.slots) == stays


def test_the_ghost_remembers_about_as_many_ids_as_it_has_cells() -> None:
    ghost = Ghost(4096)
    ghost.add(np.arange(2048) * 1_000_003)
    assert ghost.take(np.arange(2048) * 1_000_003).mean() > 0.7
    assert not ghost.take(np.arange(2048) * 1_000_003).any(), "taken once"
    ghost.add(np.arange(4096))
    ghost.add(np.arange(10**6, 10**6 + 4096))
    # Of the first, (e - 1) / e outlived the others of their batch, and one in e of those the second batch.
    assert 0.2 < ghost.take(np.arange(4096)).mean() < 0.265
    assert ghost.take(np.arange(2**60, 2**60 + 100_000)).mean() < 1e-3, "ids never seen"


def test_reads_are_counted_up_to_three() -> None:
    policy: EvictionPolicy = S3Fifo(20)
    slots = torch.arange(1, 21)
    policy.admitted(slots, slots)
    for _ in range(9):
        policy.touch(torch.tensor([7, 7]))
    order = []
    for _ in range(20):
        (gone,) = policy.victims(1, lambda asked: asked > 0)
        policy.evicted(gone[None], gone[None])
        order.append(int(gone))
    assert order[-1] == 7
