"""What is particular to writing behind: order, back-pressure, failures that lose nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from tests.store.store_kit import SIZES, batch_of, rows_of
from torchrec_turbossd.errors import ClosedError, ConfigError, StoreError, StoreFullError
from torchrec_turbossd.store import MemoryRowStore, Rows, WriteBackStore
from torchrec_turbossd.store.write_back import Applying


class Gated(MemoryRowStore):
    """Rows in memory whose writes wait for a word, or fail."""

    def __init__(self) -> None:
        super().__init__(SIZES)
        self.go = threading.Event()
        self.failure: Exception | None = None
        self.calls: list[dict[str, int]] = []

    def write(self, batch: Mapping[str, Rows]) -> None:
        assert self.go.wait(20)
        if self.failure is not None:
            raise self.failure
        self.calls.append({table: ids.numel() for table, (ids, _) in batch.items()})
        super().write(batch)


@pytest.fixture
def inner() -> Gated:
    return Gated()


@pytest.fixture
def store(inner: Gated) -> Iterator[WriteBackStore]:
    store = WriteBackStore(inner, max_pending_bytes=100_000)
    yield store
    inner.failure = None
    inner.go.set()
    store.close()


def assert_salt(store: WriteBackStore | MemoryRowStore, ids: list[int], salt: int) -> None:
    rows, found = store.read("users", torch.tensor(ids))
    assert bool(found.all())
    assert torch.equal(rows, rows_of(torch.tensor(ids), 12, salt))


def wait_until_failed(store: WriteBackStore) -> None:
    end = time.monotonic() + 20
    while store._error is None and time.monotonic() < end:
        time.sleep(0.001)


def test_writes_return_before_they_are_applied_and_are_read_at_once(store: WriteBackStore, inner: Gated) -> None:
    for salt in range(30):
        store.write(batch_of([1, 100 + salt], salt=salt))
    assert_salt(store, [1], 29)
    for salt in range(30):
        assert_salt(store, [100 + salt], salt)
    assert not inner.read("users", torch.tensor([1]))[1].any()
    assert store.pending_bytes > 0
    inner.go.set()
    store.flush()
    assert store.pending_bytes == 0
    assert_salt(inner, [1, 129], 29)


def test_reads_join_pending_rows_with_those_applied(store: WriteBackStore, inner: Gated) -> None:
    MemoryRowStore.write(inner, batch_of([1, 2, 3], salt=5))
    store.write(batch_of([2, 9], salt=6))
    rows, found = store.read("users", torch.tensor([3, 9, 4, 2, 9, 1]))
    assert found.tolist() == [True, True, False, True, True, True]
    want = [rows_of(torch.tensor([i]), 12, s) for i, s in ((3, 5), (9, 6), (2, 6), (9, 6), (1, 5))]
    assert torch.equal(rows[found], torch.cat(want)) and not rows[2].any()


def test_small_writes_are_merged_and_each_stays_whole(store: WriteBackStore, inner: Gated) -> None:
    for call in range(200):
        store.write(batch_of([2 * call, 2 * call + 1]))
    inner.go.set()
    store.flush()
    assert len(inner.calls) < 40
    assert all(call["users"] == call["items@0+4"] and call["users"] % 2 == 0 for call in inner.calls)
    assert sum(call["users"] for call in inner.calls) == 400


def test_a_full_queue_makes_writers_wait(store: WriteBackStore, inner: Gated) -> None:
    ids = list(range(2000))
    store.write(batch_of(ids))
    writer = threading.Thread(target=store.write, args=(batch_of(ids[:1600]),))
    writer.start()
    writer.join(0.1)
    assert writer.is_alive()
    inner.go.set()
    writer.join(20)
    assert not writer.is_alive()


def test_a_write_larger_than_the_limit_goes_alone(store: WriteBackStore, inner: Gated) -> None:
    inner.go.set()
    ids = list(range(20_000))
    store.write(batch_of(ids))
    store.write(batch_of(ids, salt=2))
    assert_salt(store, [0, 19_999], 2)


@pytest.mark.parametrize("failure", [StoreFullError("disk full"), RuntimeError("odd")])
def test_a_failure_is_told_keeps_rows_and_is_tried_again(
    store: WriteBackStore, inner: Gated, failure: Exception
) -> None:
    inner.failure = failure
    inner.go.set()
    store.write(batch_of([1, 2], salt=3))
    wait_until_failed(store)
    kind = StoreFullError if isinstance(failure, StoreError) else StoreError
    for call in (store.flush, lambda: store.write(batch_of([5])), store.flush, lambda: store.scan("users")):
        with pytest.raises(kind, match="could not be written in the background") as raised:
            call()
        assert raised.value.__cause__ is failure
        assert_salt(store, [1, 2], 3)
    assert not store.read("users", torch.tensor([5]))[1].any()
    inner.failure = None
    store.flush()
    assert_salt(inner, [1, 2], 3)
    store.write(batch_of([5]))
    store.flush()
    assert_salt(inner, [5], 0)


def test_a_writer_that_waits_is_told_of_a_failure(store: WriteBackStore, inner: Gated) -> None:
    inner.failure = StoreFullError("disk full")
    store.write(batch_of(list(range(3000))))
    told: list[type] = []

    def write() -> None:
        try:
            store.write(batch_of(list(range(3000))))
        except StoreError as error:
            told.append(type(error))

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    inner.go.set()
    writer.join(20)
    assert told == [StoreFullError]


def test_close_applies_what_is_pending(inner: Gated) -> None:
    store = WriteBackStore(inner, max_pending_bytes=100_000)
    seen: list[int] = []
    inner.close = lambda: seen.append(len(inner.calls))  # type: ignore[method-assign]
    store.write(batch_of([1, 2]))
    inner.go.set()
    store.close()
    store.close()
    assert seen == [1]
    assert_salt(inner, [1, 2], 0)


def test_close_that_cannot_apply_may_be_repeated(inner: Gated) -> None:
    store = WriteBackStore(inner, max_pending_bytes=100_000)
    inner.failure = StoreFullError("disk full")
    inner.go.set()
    store.write(batch_of([1, 2]))
    with pytest.raises(StoreFullError):
        store.close()
    assert_salt(store, [1, 2], 0)
    inner.failure = None
    store.close()
    with pytest.raises(ClosedError):
        store.flush()
    with pytest.raises(ClosedError):
        inner.flush()


def test_checkpoint_and_scan_hold_what_was_written_before(store: WriteBackStore, inner: Gated, tmp_path: Path) -> None:
    inner.go.set()
    for call in range(20):
        store.write(batch_of([call]))
    assert torch.cat([ids for ids, _ in store.scan("users")]).tolist() == list(range(20))
    store.write(batch_of([20]))
    store.checkpoint(tmp_path / "copy")
    copy = MemoryRowStore.open(tmp_path / "copy")
    assert_salt(copy, list(range(21)), 0)
    copy.close()


def test_a_reserved_batch_is_seen_once_published_and_its_room_can_be_given_back(
    store: WriteBackStore, inner: Gated
) -> None:
    ids = list(range(2000))
    store.write(batch_of([1]))
    reserved = store.reserve(batch_of(ids, salt=3))
    assert not store.read("users", torch.tensor([7]))[1].any()
    writer = threading.Thread(target=store.write, args=(batch_of(ids, salt=4),))
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    store.release(reserved)
    writer.join(20)
    assert not writer.is_alive()
    assert_salt(store, [7], 4)
    again = store.reserve(batch_of([7], salt=5))
    store.publish(again, 17)
    assert_salt(store, [7], 5)
    inner.go.set()
    store.flush()
    assert store.applied == 17


def test_chunks_hooks_and_tries_of_its_own(inner: Gated) -> None:
    told: list[tuple[str, int]] = []
    how = Applying(
        rows=100,
        before=lambda n: told.append(("before", n)),
        after=lambda n: told.append(("after", n)),
        retry_s=0.01,
    )
    store = WriteBackStore(inner, max_pending_bytes=100_000, applying=how)
    inner.failure = StoreFullError("disk full")
    inner.go.set()
    store.write(batch_of(list(range(250)), salt=3))
    wait_until_failed(store)
    with pytest.raises(StoreFullError):
        store.settle()
    inner.failure = None
    end = time.monotonic() + 20
    while store._error is not None and time.monotonic() < end:
        time.sleep(0.001)
    store.settle()
    assert inner.calls == [{table: count} for table in SIZES for count in (100, 100, 50)]
    assert_salt(inner, [0, 249], 3)
    store.close()
    assert told[-1] == ("after", 1) and told[:-1] == [("before", 1)] * (len(told) - 1) and len(told) > 2


def test_a_hook_that_fails_stops_nothing(inner: Gated, caplog: pytest.LogCaptureFixture) -> None:
    inner.go.set()
    told: list[int] = []

    def after(number: int) -> None:
        told.append(number)
        if number == 1:
            raise MemoryError("planted")

    store = WriteBackStore(inner, max_pending_bytes=100_000, applying=Applying(after=after))
    for salt in (1, 2):
        store.write(batch_of([1], salt=salt))
        end = time.monotonic() + 20
        while len(told) < salt and time.monotonic() < end:
            time.sleep(0.001)
    assert told == [1, 2]
    assert_salt(inner, [1], 2)
    assert "what follows batch 1 failed" in caplog.text and "planted" in caplog.text
    store.close()


def test_a_limit_that_makes_no_sense_is_refused(inner: Gated) -> None:
    with pytest.raises(ConfigError, match="max_pending_bytes"):
        WriteBackStore(inner, max_pending_bytes=0)


def test_discarding_writes_nothing_more_whatever_the_state(store: WriteBackStore, inner: Gated) -> None:
    inner.failure = StoreFullError("planted")
    store.write(batch_of([1]))
    store.write(batch_of([2]))
    inner.go.set()
    wait_until_failed(store)
    store.discard()
    assert not inner.calls
    store.discard()
    with pytest.raises(ClosedError):
        store.write(batch_of([3]))
    with pytest.raises(ClosedError):
        inner.read("users", torch.tensor([1]))


def test_discarding_frees_whoever_waits_for_room(store: WriteBackStore, inner: Gated) -> None:
    store.write(batch_of(list(range(7000))))
    said: list[Exception] = []

    def write() -> None:
        try:
            store.write(batch_of(list(range(7000))))
        except ClosedError as error:
            said.append(error)

    waiting = threading.Thread(target=write)
    waiting.start()
    time.sleep(0.05)
    threading.Timer(0.05, inner.go.set).start()
    store.discard()
    waiting.join(20)
    assert not waiting.is_alive() and said


def test_the_background_thread_itself_may_discard(inner: Gated) -> None:
    """As the garbage collector does when it runs there."""
    store = WriteBackStore(inner, max_pending_bytes=100_000)
    usual = MemoryRowStore.write

    def write(batch: Mapping[str, Rows]) -> None:
        store.discard()
        usual(inner, batch)

    inner.write = write  # type: ignore[method-assign]
    store.write(batch_of([1]))
    store._thread.join(20)
    assert not store._thread.is_alive()
    with pytest.raises(ClosedError):
        inner.read("users", torch.tensor([1]))
