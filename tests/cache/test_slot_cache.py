"""The slot cache against a plain dict: random steps, every invariant checked after each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.cache.plain_policies import policy_bytes
from torchrec_turbossd.cache import BYTES_PER_SLOT, SLOT_MAP_BYTES_PER_ROW, SlotCache
from torchrec_turbossd.errors import CacheFullError, ConfigError
from torchrec_turbossd.sizing.memory import shard_fast_bytes

ROWS, SLOTS = [40, 25], [6, 9]


class CacheAgainstDict(RuleBasedStateMachine):
    """What is where, what is pinned and what is dirty, kept twice."""

    policy = "clock"

    def __init__(self) -> None:
        super().__init__()
        self.cache = SlotCache(ROWS, SLOTS, policy=self.policy)
        self.slot_of: list[dict[int, int]] = [{}, {}]
        self.pins: dict[tuple[int, int], int] = {}
        self.dirty: set[tuple[int, int]] = set()

    def _at(self, table: int, ids: list[int]) -> torch.Tensor:
        base = int(self.cache.slot_bases[table])
        return torch.tensor([self.slot_of[table][i] + base for i in ids], dtype=torch.int64)

    @rule(table=st.integers(0, 1), seed=st.integers(0, 10**6), count=st.integers(1, 10))
    def admit(self, table: int, seed: int, count: int) -> None:
        held = self.slot_of[table]
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.randperm(ROWS[table], generator=generator)[:count].tolist()
        ids = [i for i in wanted if i not in held]
        free = SLOTS[table] - len(held)
        loose = sum((table, i) not in self.pins for i in held)
        if len(ids) > free + loose:
            with pytest.raises(CacheFullError):
                self.cache.reserve(table, torch.tensor(ids))
            return
        reservation = self.cache.reserve(table, torch.tensor(ids, dtype=torch.int64))
        gone = reservation.evicted_ids.tolist()
        for i, slot, dirty in zip(gone, reservation.evicted_slots.tolist(), reservation.dirty.tolist(), strict=True):
            assert (table, i) not in self.pins, "a pinned row was evicted"
            assert held.pop(i) == slot
            assert dirty == ((table, i) in self.dirty)
            self.dirty.discard((table, i))
        self.cache.commit(reservation)
        for i, slot in zip(ids, reservation.slots.tolist(), strict=True):
            assert slot not in held.values() and 1 <= slot <= SLOTS[table]
            held[i] = slot

    @rule(table=st.integers(0, 1), pick=st.integers(0, 100))
    def pin_touch_and_dirty(self, table: int, pick: int) -> None:
        ids = sorted(self.slot_of[table])[: pick % 4]
        at = self._at(table, ids)
        self.cache.pin(at, 1)
        self.cache.touch(table, at - int(self.cache.slot_bases[table]))
        self.cache.mark_dirty(at)
        for i in ids:
            self.pins[table, i] = self.pins.get((table, i), 0) + 1
            self.dirty.add((table, i))

    @precondition(lambda self: self.pins)
    @rule(pick=st.integers(0, 100))
    def unpin(self, pick: int) -> None:
        table, i = sorted(self.pins)[pick % len(self.pins)]
        self.cache.pin(self._at(table, [i]), -1)
        self.pins[table, i] -= 1
        if not self.pins[table, i]:
            del self.pins[table, i]

    @rule(table=st.integers(0, 1), pick=st.integers(0, 100))
    def drop_or_clean(self, table: int, pick: int) -> None:
        loose = [i for i in sorted(self.slot_of[table]) if (table, i) not in self.pins][: 1 + pick % 3]
        ids = torch.tensor(loose, dtype=torch.int64)
        if pick % 2:
            self.cache.drop(table, ids)
            for i in loose:
                del self.slot_of[table][i]
        else:
            self.cache.clean(table, self.cache.slots_of(table, ids))
        self.dirty -= {(table, i) for i in loose}

    @invariant()
    def agrees(self) -> None:
        self.cache.check()
        for table, held in enumerate(self.slot_of):
            found = self.cache.slots_of(table, torch.arange(ROWS[table])).tolist()
            assert {i: s for i, s in enumerate(found) if s} == held
            ids, _ = self.cache.dirty(table)
            assert {(table, i) for i in ids.tolist()} == {(t, i) for t, i in self.dirty if t == table}
        assert self.cache.pinned_slots == len(self.pins)


class LruAgainstDict(CacheAgainstDict):
    policy = "lru"


class S3FifoAgainstDict(CacheAgainstDict):
    policy = "s3_fifo"


class SieveAgainstDict(CacheAgainstDict):
    policy = "sieve"


TestClock = CacheAgainstDict.TestCase
TestLru = LruAgainstDict.TestCase
TestS3Fifo = S3FifoAgainstDict.TestCase
TestSieve = SieveAgainstDict.TestCase
for case in (TestClock, TestLru, TestS3Fifo, TestSieve):
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
del case


def test_memory_is_what_planning_counts() -> None:
    cache = SlotCache(ROWS, SLOTS)
    assert cache.map.nbytes == sum(ROWS) * SLOT_MAP_BYTES_PER_ROW
    planned = sum(shard_fast_bytes(s, r, 0) for s, r in zip(SLOTS, ROWS, strict=True))
    assert cache.nbytes == planned
    own = sum(array.nbytes for array in (cache._owners, cache._pins, cache._dirty))
    policies = sum(policy_bytes(policy) for policy in cache._policies)
    assert own + policies == (sum(SLOTS) + len(SLOTS)) * BYTES_PER_SLOT


def test_a_billion_row_map_opens_without_touching_memory() -> None:
    cache = SlotCache([1_600_000_000], [4])
    reservation = cache.reserve(0, torch.tensor([1_599_999_999]))
    cache.commit(reservation)
    assert cache.lookup(torch.tensor([1_599_999_999, 7])).tolist() == [1, 0]
    with open("/proc/self/status") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    assert resident < 2_000_000, "kB resident: the map's pages must not be touched"


@pytest.mark.parametrize(("rows", "slots"), [([0], [1]), ([5], [0]), ([5, 5], [1])])
def test_sizes_that_make_no_sense(rows: list[int], slots: list[int]) -> None:
    with pytest.raises(ConfigError, match="rows"):
        SlotCache(rows, slots)


def test_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="clock, lru"):
        SlotCache([5], [1], policy="random")


def test_check_finds_planted_damage() -> None:
    for damage in ("_owners", "_pins", "_dirty"):
        cache = SlotCache([9], [3])
        cache.commit(cache.reserve(0, torch.tensor([4])))
        getattr(cache, damage)[2] = 1
        with pytest.raises(RuntimeError, match="invariant broken in table 0"):
            cache.check()


def _hits(policy: str, ids: torch.Tensor, rows: int, slots: int, batch: int) -> int:
    """Hits of a stream served in batches: every lookup but the first of an absent id; only rows found were read."""
    cache = SlotCache([rows], [slots], policy=policy)
    misses = 0
    for part in torch.split(ids, batch):
        found = cache.lookup(part)
        here = found[found > 0].to(torch.int64)
        cache.pin(here, 1)
        absent = torch.unique(part[found == 0])
        cache.commit(cache.reserve(0, absent))
        cache.pin(here, -1)
        cache.touch(0, found)
        misses += absent.numel()
    return ids.numel() - misses


def zipf_stream(rows: int, alpha: float, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -alpha
    return torch.multinomial(weights, count, replacement=True, generator=generator)


@pytest.mark.parametrize(("policy", "golden"), [("clock", 13486), ("lru", 13322), ("s3_fifo", 14428), ("sieve", 14286)])
def test_golden_hits(policy: str, golden: int) -> None:
    ids = zipf_stream(2000, 1.05, 20_000, seed=11)
    assert _hits(policy, ids, 2000, 200, batch=64) == golden
