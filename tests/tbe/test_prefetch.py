"""Prefetched rows arrive in a thread of their own, and nothing that comes in between is lost."""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.tbe.pair import ROWS, Pair
from torchrec_turbossd.errors import StoreError
from torchrec_turbossd.tbe.slot_memory import TrainingMemory

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a batch did not fit")
        yield


class Held:
    """Keeps reads of a pair's store waiting while it is closed, and can make them fail."""

    def __init__(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.asked = threading.Event(), threading.Event()
        self.open.set()
        self.failures = 0
        self.threads: set[str] = set()
        read = pair.store.read

        def waiting(table: str, ids: Any) -> Any:
            self.asked.set()
            if not self.open.is_set():
                self.threads.add(threading.current_thread().name)
            if not self.open.wait(PATIENCE_S):
                raise TimeoutError
            if self.failures:
                self.failures -= 1
                raise StoreError("planted")
            return read(table, ids)

        monkeypatch.setattr(pair.store, "read", waiting)


def test_rows_arrive_while_the_batch_before_computes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(device, (110, 80))
    held = Held(pair, monkeypatch)
    first, second = pair.batch(1), pair.batch(2)
    mine, theirs = pair.ours(*first), pair.stock(*first)
    held.open.clear()
    held.asked.clear()
    pair.ours.prefetch(*second)
    assert held.asked.wait(PATIENCE_S), "the rows were asked for"
    # Both of these would wait for ever if prefetch or backward did.
    mine.sum().backward()
    theirs.sum().backward()
    held.open.set()
    assert torch.equal(pair.ours(*second), pair.stock(*second))
    assert all(name.startswith("turbossd-") for name in held.threads)
    pair.same()


def test_a_prefetch_that_fails_is_made_good_by_its_forward(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(device, (110, 80))
    held = Held(pair, monkeypatch)
    held.failures = 1
    pair.ours.prefetch(*pair.batch(1))
    pair.step(1)
    pair.ours.prefetch(*(batch := pair.batch(2)))
    pair.ours._prefetched.settle()
    assert len(pair.ours._prefetched) == 1
    pair.ours(*batch)
    held.failures = 5
    pair.ours.prefetch(*pair.batch(3))
    with pytest.raises(StoreError, match="planted"):
        pair.ours(*pair.batch(3))
    held.failures = 0
    pair.step(4)
    pair.same()


def test_what_is_written_meanwhile_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(device, (110, 80))
    held = Held(pair, monkeypatch)
    batch = pair.batch(5)
    held.open.clear()
    pair.ours.prefetch(*batch)
    threading.Timer(0.2, held.open.set).start()
    ids = torch.arange(ROWS[0])
    rows = torch.rand(ROWS[0], DIM_BYTES // 4).view(torch.uint8)
    pair.ours.write_rows(0, ids, rows)
    TrainingMemory(pair.stock).write(0, ids, rows)
    assert torch.equal(pair.ours.read_rows(0, ids), rows)
    assert torch.equal(pair.ours(*batch), pair.stock(*batch))
    pair.same()


DIM_BYTES = 8 * 4 + 4
"""Of a row of the first table: weights, and row-wise state."""


def test_closing_waits_for_what_is_on_its_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(device, (110, 80))
    held = Held(pair, monkeypatch)
    held.open.clear()
    before = set(threading.enumerate())
    pair.ours.prefetch(*pair.batch(5))
    threading.Timer(0.2, held.open.set).start()
    pair.ours.close()
    assert held.open.is_set() and pair.ours.rows.cache.pinned_slots == 0
    assert not [t.name for t in set(threading.enumerate()) - before if "turbossd-" in t.name]


@pytest.mark.parametrize("slots", [(12, 9), (60, 40), (110, 80)])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_trains_like_stock(
    device: str, seed: int, slots: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, choose = Pair(device, slots), random.Random(seed)
    read = pair.store.read

    def slow(table: str, ids: Any) -> Any:
        time.sleep(choose.random() * 0.002)
        return read(table, ids)

    monkeypatch.setattr(pair.store, "read", slow)
    batches = [pair.batch(100 * seed + n) for n in range(60)]
    for n, (ids, offsets) in enumerate(batches):
        if choose.random() < 0.2:
            pair.ours.flush()
        if choose.random() < 0.2:
            with torch.no_grad():
                assert torch.equal(pair.ours(*batches[n - 1]), pair.stock(*batches[n - 1]))
        mine, theirs = pair.ours(ids, offsets), pair.stock(ids, offsets)
        assert torch.equal(mine, theirs)
        for ahead in batches[n + 1 : n + 1 + choose.randrange(3)]:
            pair.ours.prefetch(*ahead)
        if choose.random() < 0.15:
            # A batch that is never trained.
            del mine
            continue
        if choose.random() < 0.2:
            row = torch.tensor([choose.randrange(ROWS[1])])
            try:
                rows = pair.ours.read_rows(1, row)
            finally:
                assert torch.equal(rows, TrainingMemory(pair.stock).read(1, row))
        mine.sum().backward()
        theirs.sum().backward()
    pair.ours._prefetched.close()
    pair.same()


def test_prefetched_batches_train_the_same(device: str) -> None:
    pair = Pair(device, (110, 80))
    batches = [pair.batch(seed) for seed in range(12)]
    pair.ours.prefetch(*batches[0])
    for (ids, offsets), following in zip(batches, [*batches[1:], None], strict=True):
        mine, theirs = pair.ours(ids, offsets), pair.stock(ids, offsets)
        assert torch.equal(mine, theirs)
        if following is not None:
            pair.ours.prefetch(*following)
            assert pair.ours.rows.cache.pinned_slots >= torch.unique(following[0]).numel() // 2
        mine.sum().backward()
        theirs.sum().backward()
    pair.same()


@pytest.mark.gpu
def test_prefetch_on_a_stream_of_its_own() -> None:
    """Each prefetch must write back the rows of the batch before last, whose update slow kernels hold back."""
    pair = Pair("cuda:0", (40, 5))
    side, slow = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    offsets = pair.tensor(0, 20, 20, 20)
    batches = [torch.arange(first, first + 20, device="cuda") for first in range(0, 500, 20)]
    torch.cuda.synchronize()
    for step, ids in enumerate(batches):
        mine, theirs = pair.ours(ids, offsets), pair.stock(ids, offsets)
        if step + 1 < len(batches):
            with torch.cuda.stream(side):
                pair.ours.prefetch(batches[step + 1], offsets)
            assert len(pair.ours._prefetched) == 1, "two batches fit"
        for _ in range(20):
            slow = slow @ slow / 64
        gradient = torch.ones_like(mine) + 0 * slow[0, 0].clamp(-1, 1)
        mine.backward(gradient)
        theirs.backward(gradient)
    pair.same()


def test_batches_nobody_comes_for_let_their_rows_go(device: str) -> None:
    pair = Pair(device, ROWS)
    for seed in range(20):
        pair.ours.prefetch(*pair.batch(seed))
    assert len(pair.ours._prefetched) == 8
    ids, offsets = pair.batch(30)
    pair.ours.prefetch(ids, offsets)
    ids.zero_()
    assert torch.equal(pair.ours(ids, offsets), pair.stock(ids, offsets)), "ids written over after their prefetch"
    pair.ours.close()
    assert pair.ours.rows.cache.pinned_slots > 0, "the last output still has a graph"


def test_a_batch_of_the_same_shape_is_not_taken_for_the_prefetched_one(device: str) -> None:
    pair = Pair(device, (60, 40))
    prefetched, other, offsets = pair.tensor(1, 2, 3, 4), pair.tensor(5, 6, 7, 8), pair.tensor(0, 2, 3, 4)
    pair.ours.prefetch(prefetched, offsets)
    for ids in (other, prefetched):
        assert torch.equal(pair.ours(ids, offsets), pair.stock(ids, offsets))


def test_lookups_count_once_however_often_they_are_prefetched(device: str) -> None:
    pair = Pair(device, (60, 40))
    for seed in range(20):
        pair.ours.prefetch(*pair.batch(seed))
    batches = [pair.batch(seed) for seed in (3, 40, 41)]
    for ids, offsets in batches:
        pair.ours.prefetch(ids, offsets)
        pair.ours(ids, offsets).sum().backward()
    reads = pair.ours.rows.counters.read().values()
    assert sum(r.read_total_count for r in reads) == sum(ids.numel() for ids, _ in batches)


def test_other_offsets_are_another_batch() -> None:
    pair = Pair("cpu", (110, 80))
    ids, offsets = pair.batch(1)
    pair.ours.prefetch(ids, offsets)
    other = offsets.clone()
    # All lookups are of the second table.
    other[1:-1] = 0
    ids.clamp_(max=ROWS[1] - 1)
    pair.ours.prefetch(ids, offsets)
    assert torch.equal(pair.ours(ids, other), pair.stock(ids, other))
    pair.ours._prefetched.end_all()
    pair.same()


def test_prefetched_batches_do_not_keep_rows_from_being_loaded(device: str) -> None:
    pair = Pair(device, (110, 80))
    pair.ours.prefetch(*pair.batch(1))
    pair.ours.check_idle()
    pair.ours.forget()
    assert torch.equal(pair.ours(*pair.batch(1)), pair.stock(*pair.batch(1)))
