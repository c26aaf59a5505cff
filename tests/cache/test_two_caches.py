"""Slots that change hands: taken out, moved, evicted, and shared by two caches of which one takes the other's place."""

from __future__ import annotations

import pytest
import torch

from torchrec_turbossd.cache import POLICIES, SlotCache

ROWS, SLOTS = [50, 30], [8, 6]


def ids_of(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def fill(cache: SlotCache, table: int, *ids: int) -> torch.Tensor:
    slots = cache.take(table, len(ids))
    cache.admit(table, ids_of(*ids), slots)
    return slots


def held(cache: SlotCache, table: int) -> dict[int, int]:
    found = cache.slots_of(table, torch.arange(ROWS[table])).tolist()
    return {i: s for i, s in enumerate(found) if s}


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_are_never_lost(policy: str) -> None:
    cache = SlotCache(ROWS, SLOTS, policy=policy)
    slots = fill(cache, 0, 3, 1, 4, 15)
    assert held(cache, 0) == dict(zip([3, 1, 4, 15], slots.tolist(), strict=True)) and cache.free(0) == 4
    fresh = cache.take(0, 2)
    old = cache.move(0, ids_of(4, 3), fresh)
    assert held(cache, 0)[4] == int(fresh[0]) and held(cache, 0)[3] == int(fresh[1])
    assert old.tolist() == [int(slots[2]), int(slots[0])]
    none = old[:0]
    cache.check([old, none])
    cache.give(0, old)
    gone = cache.remove(0, ids_of(1))
    assert gone.tolist() == [int(slots[1])] and 1 not in held(cache, 0)
    cache.give(0, gone)
    evicted = cache.evict(0, 2)
    assert evicted.numel() == 2 and len(held(cache, 0)) == 1
    assert cache.evict(0, 5).numel() == 1, "no more than there are"
    assert cache.free(0) == 5
    with pytest.raises(RuntimeError, match="held, free or taken out"):
        cache.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_one_cache_takes_the_place_of_another(policy: str) -> None:
    live = SlotCache(ROWS, SLOTS, policy=policy)
    fill(live, 0, 1, 2, 3, 4, 5)
    fill(live, 1, 7, 8)
    before = [held(live, table) for table in range(2)]
    following = live.beside()
    assert following.free(0) == 0 and held(following, 0) == {}
    following.give(0, live.take(0, 3))
    following.give(1, live.take(1, 2))
    fill(following, 0, 4, 9)
    fill(following, 1, 29)
    after = [held(following, table) for table in range(2)]
    assert set(after[0]) == {4, 9} and [held(live, table) for table in range(2)] == before
    following.replace(live)
    assert [held(following, table) for table in range(2)] == after
    live.replace(following)
    assert [held(live, table) for table in range(2)] == before
    following.replace(live)
    for table in range(2):
        following.give(table, live.release_all(table))
    assert [held(following, table) for table in range(2)] == after
    following.check()
    assert following.free(0) == 6 and following.free(1) == 5
    fill(following, 0, 1, 2, 3, 10, 11, 12)
    assert following.evict(0, 8).numel() == 8


@pytest.mark.parametrize("policy", POLICIES)
def test_the_hottest_come_first(policy: str) -> None:
    cache = SlotCache([50], [8], policy=policy)
    fill(cache, 0, 1, 2, 3, 4, 5)
    for _ in range(2):
        cache.touch(0, cache.slots_of(0, torch.tensor([4, 2])).to(torch.int32))
    ids, slots = cache.hottest(0)
    assert set(ids[:2].tolist()) == {2, 4} and set(ids.tolist()) == {1, 2, 3, 4, 5}
    assert torch.equal(cache.slots_of(0, ids), slots)


def test_free_slots_are_lent_in_order() -> None:
    cache = SlotCache([50], [8])
    first = cache.take(0, 3)
    assert first.tolist() == [1, 2, 3]
    cache.give(0, first[1:])
    cache.give(0, first[:1])
    assert cache.take(0, 2).tolist() == [2, 3]
    assert cache.take(0, 9).tolist() == [1, 4, 5, 6, 7, 8] and cache.free(0) == 0
    assert cache.take(0, 1).numel() == 0


def test_touches_do_not_keep_whole_batches() -> None:
    cache = SlotCache([50], [8])
    fill(cache, 0, 1, 2)
    batch = torch.ones(100_000, dtype=torch.int32)
    cache.touch(0, batch[:3])
    assert sum(each.untyped_storage().nbytes() for each in cache._touches[0]) <= 12
