"""What is particular to the layered store: its layers, commits, the journal's life, crashes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.store.layered_kit import applied, held_back, reopened, salts
from tests.store.store_kit import BASE_SALT, SIZES, TABLE_ROWS, based, batch_of, layered, rows_of
from torchrec_turbossd.errors import (
    ClosedError,
    CorruptError,
    InputError,
    StoreFullError,
)
from torchrec_turbossd.store import LayeredRowStore, RocksRowStore, clone_directory
from torchrec_turbossd.store import layered as module


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LayeredRowStore]:
    store = layered(based(tmp_path / "a", torch.arange(0, TABLE_ROWS, 2)))
    yield store
    store.discard()


def test_the_newest_layer_that_has_a_row_answers(store: LayeredRowStore) -> None:
    store.write(batch_of([4, 6, 7], salt=1))
    applied(store)
    go = held_back(store)
    store.write(batch_of([6, 9], salt=2))
    assert salts(store, [2, 4, 6, 7, 8, 9, 3, 6]) == [BASE_SALT, 1, 2, 1, BASE_SALT, 2, None, 2]
    go.set()
    assert salts(applied(store), [9, 6, 4, 2, 3, 7]) == [2, 2, 1, BASE_SALT, None, 1]
    got = torch.cat([ids for ids, _ in store.scan("users", 3, 2)])
    assert got.tolist() == sorted({*range(4, TABLE_ROWS, 2), 7, 9})
    for ids, rows in store.scan("users", 0, 100):
        want = rows_of(ids, 12, BASE_SALT)
        for salt, updated in ((1, (4, 7)), (2, (6, 9))):
            at = torch.isin(ids, torch.tensor(updated))
            want[at] = rows_of(ids[at], 12, salt)
        assert torch.equal(rows, want)


def test_a_committed_batch_is_read_once_it_is_published(store: LayeredRowStore) -> None:
    first, second = store.commit(batch_of([1, 2], salt=1)), store.commit(batch_of([2, 3], salt=2))
    assert salts(store, [1, 2, 3]) == [None, BASE_SALT, None]
    store.publish(first)
    assert salts(store, [1, 2, 3]) == [1, 1, None]
    store.publish(second)
    assert salts(store, [1, 2, 3]) == [1, 2, 2]
    for again in (first, second):
        with pytest.raises(InputError, match="order of commits"):
            store.publish(again)
    store.publish(store.commit({}))
    assert salts(reopened(store), [1, 2, 3]) == [1, 2, 2]


def test_a_batch_passed_over_gives_its_room_back(store: LayeredRowStore) -> None:
    first, second = store.commit(batch_of([1], salt=1)), store.commit(batch_of([2], salt=2))
    store.publish(second)
    with pytest.raises(InputError):
        store.publish(first)
    assert store._memory._reserved_bytes == 0
    assert salts(store, [1, 2]) == [None, 2]


def test_publishing_waits_for_no_disk_and_no_store(store: LayeredRowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = store.commit(batch_of(list(range(256)), salt=1))
    go = held_back(store)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("publishing did this")

    with monkeypatch.context() as patch:
        for name in ("append", "sync", "rotate", "drop"):
            patch.setattr(store._journal, name, forbidden)
        store.publish(committed)
    assert salts(store, [255]) == [1]
    go.set()
    applied(store)


def test_what_a_crash_leaves_in_the_journal_is_read_back(store: LayeredRowStore) -> None:
    go = held_back(store)
    for salt in range(1, 6):
        store.write(batch_of([salt, 500], salt=salt))
    store.commit(batch_of([600], salt=9))
    threading.Timer(0.05, go.set).start()
    store = reopened(store)
    assert salts(store, [1, 5, 500, 600]) == [1, 5, 5, 9]
    store.write(batch_of([1], salt=11))
    store = reopened(store)
    assert salts(applied(store), [1, 5, 500, 600]) == [11, 5, 5, 9]
    store.close()
    assert list((store.path / "journal").iterdir()) == []
    store = layered(store.path)
    assert salts(store, [1, 5, 500, 600]) == [11, 5, 5, 9]
    store.close()


def test_the_journal_is_cut_once_its_rows_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 20_000)
    store = layered(tmp_path / "a")
    order: list[str] = []
    for owner, name in ((store._disk._updates, "flush"), (store._journal, "drop")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _r=real, _n=name: (order.append(_n), _r(*a))[1])
    for salt in range(60):
        store.write(batch_of(list(range(100)), salt=salt))
        if salt % 4 == 0:
            applied(store)
    applied(store)
    time.sleep(0.05)
    assert sum(s.size for s in store._journal.segments) < 60_000
    assert order and order[::2] == ["flush"] * (len(order) // 2) and set(order[1::2]) == {"drop"}
    store = reopened(store)
    assert salts(store, [0, 99], "items@0+4") == [59, 59]
    store.discard()


def test_rows_reach_rocksdb_only_after_the_journal_has_them_for_good(tmp_path: Path) -> None:
    store = layered(tmp_path / "a")
    real, seen = store._disk._updates.write, []

    def write(batch: dict[str, tuple[Tensor, Tensor]]) -> None:
        seen.append((store._journal.synced, int(batch["users"][0][0])))
        real(batch)

    store._disk._updates.write = write  # type: ignore[method-assign,assignment]
    for number in range(1, 20):
        store.write({"users": batch_of([number])["users"]})
        if number % 3 == 0:
            applied(store)
    applied(store)
    # The id is the number of the batch.
    assert seen and all(synced >= number for synced, number in seen)
    store.close()


def test_batches_are_applied_in_chunks(tmp_path: Path) -> None:
    store = layered(tmp_path / "a")
    real, sizes = store._disk._updates.write, []
    store._disk._updates.write = lambda b: (sizes.extend(i.numel() for i, _ in b.values()), real(b))[1]  # type: ignore[method-assign,func-returns-value]
    store.write(batch_of(list(range(1000)), salt=3))
    applied(store)
    assert max(sizes) == 256 and sum(sizes) == 2000
    assert salts(store, [0, 255, 256, 999]) == [3] * 4
    store.close()


def test_memory_is_bounded(tmp_path: Path) -> None:
    store = LayeredRowStore(tmp_path / "a", SIZES, dict.fromkeys(SIZES, 1000), max_pending_bytes=20_000)
    go = held_back(store)
    ids = list(range(500))
    store.write(batch_of(ids))
    writer = threading.Thread(target=store.write, args=(batch_of(ids, salt=1),))
    writer.start()
    writer.join(0.1)
    assert writer.is_alive() and store.pending_bytes <= 20_000
    go.set()
    writer.join(20)
    assert not writer.is_alive()
    assert salts(applied(store), [499]) == [1]
    store.close()


def test_rows_that_cannot_be_applied_stay_and_are_tried_again(
    store: LayeredRowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store._memory, "_how", module.Applying(rows=256, retry_s=0.05, before=store._before_applying))
    full = [StoreFullError("disk full")]
    real = store._disk._updates.write

    def write(batch: dict[str, tuple[Tensor, Tensor]]) -> None:
        if full:
            raise full[0]
        real(batch)

    monkeypatch.setattr(store._disk._updates, "write", write)
    store.write(batch_of([1, 2], salt=1))
    end = time.monotonic() + 20
    while store._memory._error is None and time.monotonic() < end:
        time.sleep(0.001)
    for call in (lambda: store.write(batch_of([5], salt=2)), store.flush, lambda: store.checkpoint(store.path / "no")):
        with pytest.raises(StoreFullError, match="kept in memory"):
            call()
    assert salts(store, [1, 2, 5]) == [1, 1, None]
    full.clear()
    while store._memory._error is not None and time.monotonic() < end:
        time.sleep(0.01)
    store.write(batch_of([5], salt=2))
    store.flush()
    assert salts(applied(store), [1, 2, 5]) == [1, 1, 2]


def test_a_full_disk_refuses_commits_and_loses_nothing(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(14 << 20))
    sizes, rows = {"a": 1000}, {"a": 100_000}
    store = LayeredRowStore(small_disk / "s", sizes, rows)
    calls = 0
    with pytest.raises(StoreFullError):
        for calls in range(200):
            ids = torch.arange(64) + 64 * calls
            store.write({"a": (ids, rows_of(ids, 1000, calls))})
    assert calls > 10
    ids = torch.arange(64 * calls)
    assert bool(store.read("a", ids)[1].all())
    assert not bool(store.read("a", torch.arange(64) + 64 * calls)[1].any())
    ballast.unlink()
    end = time.monotonic() + 30
    while True:
        try:
            store.write({"a": (torch.tensor([99_999]), torch.ones(1, 1000, dtype=torch.uint8))})
            break
        except StoreFullError:
            assert time.monotonic() < end
            time.sleep(0.1)
    store.flush()
    store.close()
    again = LayeredRowStore(small_disk / "s", sizes, rows)
    assert torch.cat([part for part, _ in again.scan("a")]).tolist() == [*ids.tolist(), 99_999]
    for call in range(calls):
        some = torch.arange(64) + 64 * call
        assert torch.equal(again.read("a", some)[0], rows_of(some, 1000, call))
    again.close()


def test_a_refused_commit_leaves_nothing(store: LayeredRowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise StoreFullError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(store._journal, "append", fail)
        with pytest.raises(StoreFullError):
            store.commit(batch_of([1]))
    assert store._memory._reserved_bytes == 0
    assert salts(reopened(store), [1]) == [None]


@pytest.mark.parametrize("kind", ["missing", "damaged", "torn"])
def test_bits_that_are_lost_bring_no_old_row_back(tmp_path: Path, kind: str) -> None:
    store = layered(based(tmp_path / "a", torch.arange(TABLE_ROWS)))
    store.write(batch_of(list(range(0, 900, 3)), salt=5))
    store.close()
    bits = tmp_path / "a" / "bits" / "0.bits"
    if kind == "missing":
        bits.unlink()
    else:
        data = bytearray(bits.read_bytes())
        data[20:60] = bytes(40) if kind == "damaged" else bits.read_bytes()[0:40]
        bits.write_bytes(data)
    store = layered(tmp_path / "a")
    assert salts(store, [3, 300, 897, 4]) == [5, 5, 5, BASE_SALT]
    store.close()
    bits.write_bytes(bits.read_bytes()[:100])
    with pytest.raises(CorruptError, match="100 bytes"):
        layered(tmp_path / "a")


def test_rows_never_updated_cost_no_look_in_rocksdb(store: LayeredRowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(batch_of([10, 700], salt=1))
    applied(store)
    asked: list[int] = []
    real = RocksRowStore.read
    monkeypatch.setattr(RocksRowStore, "read", lambda s, t, ids: (asked.extend(ids.tolist()), real(s, t, ids))[1])
    assert salts(store, [8, 10, 11, 12, 700, 702]) == [BASE_SALT, 1, None, BASE_SALT, 1, BASE_SALT]
    assert asked == [10, 700]


def test_ids_beyond_two_to_the_31(tmp_path: Path) -> None:
    rows = {"a": 2**31 + 1000}
    store = LayeredRowStore(tmp_path / "s", {"a": 9}, rows)
    ids = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 999, 2**31 + 5000, 2**40])
    store.write({"a": (ids, rows_of(ids, 9, 1))})
    store.close()
    clone_directory(tmp_path / "s", tmp_path / "c")
    for path in ("s", "c"):
        store = LayeredRowStore(tmp_path / path, {"a": 9}, rows)
        got, found = store.read("a", torch.cat([ids, ids + 1]))
        assert torch.equal(got[:6], rows_of(ids, 9, 1)) and found.tolist() == [True] * 6 + [False, True] + [False] * 4
        store.close()
        assert sum(f.stat().st_blocks for f in (tmp_path / path).rglob("*")) * 512 < 4 << 20


def test_draining_applies_what_is_published_while_writes_go_on(store: LayeredRowStore) -> None:
    go = held_back(store)
    store.write(batch_of([1, 2], salt=1))
    draining = threading.Thread(target=store.drain)
    draining.start()
    store.write(batch_of([3], salt=2))
    assert draining.is_alive() and store.pending_bytes > 0
    go.set()
    draining.join(20)
    assert not draining.is_alive()
    rows, found = store._disk.read("users", torch.tensor([1, 2]))
    assert bool(found.all()) and torch.equal(rows, rows_of(torch.tensor([1, 2]), SIZES["users"], 1))
    store.close()
    with pytest.raises(ClosedError):
        store.drain()


def test_checkpoints_and_clones_change_apart_from_their_source(store: LayeredRowStore, tmp_path: Path) -> None:
    store.write(batch_of([1, 2], salt=1))
    store.checkpoint(tmp_path / "copy")
    store.write(batch_of([2, 4], salt=2))
    assert not (tmp_path / "copy" / "journal").exists()
    assert clone_directory(tmp_path / "copy", tmp_path / "clone")
    linked = {f.name for f in (tmp_path / "clone").rglob("*") if f.is_file() and f.stat().st_nlink > 1}
    assert {"0.rows", "0.ids", "1.rows", "1.ids"} < linked and all(
        n.endswith((".rows", ".ids", ".sst")) for n in linked
    )
    for name, salt in (("copy", 5), ("clone", 6)):
        other = layered(tmp_path / name, create=False)
        assert salts(other, [1, 2, 4, 6]) == [1, 1, BASE_SALT, BASE_SALT]
        other.write(batch_of([1, 6], salt=salt))
        other.close()
    assert salts(store, [1, 2, 4, 6]) == [1, 2, 2, BASE_SALT]
    for name, salt in (("copy", 5), ("clone", 6)):
        other = layered(tmp_path / name)
        assert salts(other, [1, 6]) == [salt, salt]
        other.close()


def test_a_clone_takes_the_journal_along(store: LayeredRowStore, tmp_path: Path) -> None:
    go = held_back(store)
    store.write(batch_of([1], salt=1))
    threading.Timer(0.02, go.set).start()
    store.discard()
    clone_directory(store.path, tmp_path / "clone")
    other = layered(tmp_path / "clone")
    assert salts(other, [1, 2]) == [1, BASE_SALT]
    other.close()


def test_a_clone_to_another_disk_is_a_copy(small_disk: Path, tmp_path: Path) -> None:
    path = based(tmp_path / "a", torch.arange(300))
    assert not clone_directory(path, small_disk / "b")
    other = layered(small_disk / "b")
    assert salts(other, [299]) == [BASE_SALT]
    other.close()


def test_closed_stores_publish_nothing(store: LayeredRowStore) -> None:
    committed = store.commit(batch_of([1], salt=1))
    store.close()
    for call in (lambda: store.publish(committed), lambda: store.commit(batch_of([1]))):
        with pytest.raises(ClosedError):
            call()
    again = layered(store.path)
    assert salts(again, [1]) == [1]
    again.close()


def test_readers_see_each_update_once_it_returned(store: LayeredRowStore) -> None:
    done, failures = threading.Event(), []
    last = [0]

    def read(seed: int) -> None:
        chooser = random.Random(seed)
        try:
            while not done.is_set():
                low = last[0]
                ids = chooser.sample(range(40), 8)
                for table in SIZES:
                    found = salts(store, ids, table)
                    assert all(s is not None and s >= low for s in found if s != BASE_SALT or low), (low, found)
        except BaseException as error:
            failures.append(error)

    store.write(batch_of(list(range(40)), salt=0))
    readers = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for reader in readers:
        reader.start()
    for salt in range(1, 70):
        store.publish(store.commit(batch_of(list(range(40)), salt=salt)))
        last[0] = salt
        if salt % 9 == 0:
            store.flush()
            applied(store)
    done.set()
    for reader in readers:
        reader.join(60)
    assert not failures
