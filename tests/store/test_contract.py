"""What every row store does, whatever holds the rows."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.store_kit import SIZES, Maker, batch_of, rows_of
from torchrec_turbossd.errors import ClosedError, InputError, StoreError, UnknownTableError
from torchrec_turbossd.store import RowStore


def ids_of(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def assert_holds(store: RowStore, table: str, want: dict[int, int], absent: list[int]) -> None:
    """`want` is {id: salt}."""
    ids = ids_of(*want, *absent)
    rows, found = store.read(table, ids)
    assert found.tolist() == [True] * len(want) + [False] * len(absent)
    for i, (key, salt) in enumerate(want.items()):
        assert torch.equal(rows[i], rows_of(ids_of(key), SIZES[table], salt)[0]), (table, key)
    assert not rows[len(want) :].any()


def test_read_gives_what_write_put_in_the_order_asked(store: RowStore) -> None:
    store.write(batch_of([5, 0, 2**40, 3]))
    for table in SIZES:
        assert_holds(store, table, {2**40: 0, 3: 0, 0: 0, 5: 0}, [1, 4, 2**63 - 1])


def test_read_repeats_rows_of_repeated_ids(store: RowStore) -> None:
    store.write(batch_of([7, 9]))
    rows, found = store.read("users", ids_of(9, 7, 8, 9, 8))
    assert found.tolist() == [True, True, False, True, False]
    assert torch.equal(rows[0], rows[3]) and torch.equal(rows[0], rows_of(ids_of(9), 12)[0])


def test_reads_of_many_rows_and_none(store: RowStore) -> None:
    ids = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    written = ids[ids % 3 != 0]
    store.write({"users": (written, rows_of(written, 12))})
    rows, found = store.read("users", ids)
    assert torch.equal(found, ids % 3 != 0)
    assert torch.equal(rows, rows_of(ids, 12) * found[:, None])
    rows, found = store.read("users", ids[:0])
    assert tuple(rows.shape) == (0, 12) and tuple(found.shape) == (0,)


def test_strided_tensors_are_read_and_written(store: RowStore) -> None:
    ids = torch.arange(40)[::4]
    store.write({"users": (ids, rows_of(torch.arange(40), 24)[::4, ::2])})
    rows, found = store.read("users", torch.arange(80)[::8])
    assert found.tolist() == [True] * 5 + [False] * 5
    assert torch.equal(rows[:5], rows_of(torch.arange(40)[::8], 24)[:, ::2])


def test_last_of_duplicates_wins_within_a_write_and_between(store: RowStore) -> None:
    ids = ids_of(4, 4, 1, 4)
    rows = torch.cat([rows_of(ids[i : i + 1], 12, salt=i) for i in range(4)])
    store.write({"users": (ids, rows)})
    assert_holds(store, "users", {4: 3, 1: 2}, [])
    store.write(batch_of([4], salt=9))
    assert_holds(store, "users", {4: 9, 1: 2}, [])


def test_written_tensors_may_be_reused(store: RowStore) -> None:
    ids = ids_of(1, 2)
    rows = rows_of(ids, 12)
    store.write({"users": (ids, rows)})
    rows.zero_()
    ids += 10
    assert_holds(store, "users", {1: 0, 2: 0}, [11, 12])


def test_tables_are_apart(store: RowStore) -> None:
    store.write({"users": (ids_of(1), rows_of(ids_of(1), 12))})
    assert_holds(store, "items@0+4", {}, [1])
    store.write({"items@0+4": (ids_of(1), rows_of(ids_of(1), 7, 5)), "users": (ids_of(), rows_of(ids_of(), 12))})
    assert_holds(store, "items@0+4", {1: 5}, [])
    assert_holds(store, "users", {1: 0}, [])


@pytest.mark.parametrize("window", [1, 7, 50, 51, 5000])
def test_scan_gives_rows_by_ascending_id(store: RowStore, window: int) -> None:
    ids = [300 - 6 * i for i in range(50)] + [2**33]
    store.write(batch_of(ids))
    windows = list(store.scan("users", 13, window))
    assert all(0 < part.numel() <= window for part, _ in windows)
    got = torch.cat([part for part, _ in windows])
    assert got.tolist() == sorted(i for i in ids if i >= 13)
    assert torch.equal(torch.cat([rows for _, rows in windows]), rows_of(got, 12))


def test_scan_of_nothing(store: RowStore) -> None:
    assert list(store.scan("users")) == []
    store.write(batch_of([3]))
    assert list(store.scan("users", 4)) == []


def test_scan_is_of_the_time_it_was_asked_for(store: RowStore) -> None:
    store.write(batch_of(list(range(10))))
    scan = store.scan("users", 0, 4)
    store.write(batch_of([3, 20], salt=1))
    store.flush()
    got = list(scan)
    assert torch.cat([ids for ids, _ in got]).tolist() == list(range(10))
    assert torch.equal(torch.cat([rows for _, rows in got]), rows_of(torch.arange(10), 12))


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([1], dtype=torch.int32), InputError),
        (torch.tensor([[1]]), InputError),
        (torch.tensor([3, -1]), InputError),
        (torch.tensor([1.0]), InputError),
    ],
)
def test_ids_that_cannot_be_are_refused(store: RowStore, ids: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="store ids"):
        store.read("users", ids)
    with pytest.raises(error, match="store ids"):
        store.write({"users": (ids, torch.zeros(ids.numel(), 12, dtype=torch.uint8))})


def test_unknown_tables_and_windows_are_refused(store: RowStore) -> None:
    with pytest.raises(UnknownTableError, match="'users'"):
        store.read("user", ids_of(1))
    with pytest.raises(UnknownTableError):
        store.scan("user")
    with pytest.raises(InputError):
        store.scan("users", -1)
    with pytest.raises(InputError, match="window"):
        store.scan("users", 0, 0)


@pytest.mark.parametrize(
    "rows", [torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(1, 7, dtype=torch.uint8), torch.zeros(2, 7)]
)
def test_a_refused_write_changes_nothing(store: RowStore, rows: torch.Tensor) -> None:
    store.write(batch_of([1]))
    good = (ids_of(1, 2), rows_of(ids_of(1, 2), 12, salt=1))
    with pytest.raises(InputError, match="store rows"):
        store.write({"users": good, "items@0+4": (ids_of(1, 2), rows)})
    with pytest.raises(UnknownTableError):
        store.write({"users": good, "other": good})
    assert_holds(store, "users", {1: 0}, [2])
    store.write({})


def test_checkpoint_is_a_copy_that_later_writes_do_not_change(maker: Maker, tmp_path: Path) -> None:
    store = maker.make()
    store.write(batch_of([1, 2]))
    store.checkpoint(tmp_path / "new" / "copy")
    store.write(batch_of([2, 3], salt=1))
    store.flush()
    copy = maker.open_checkpoint(tmp_path / "new" / "copy")
    for table in SIZES:
        assert_holds(copy, table, {1: 0, 2: 0}, [3])
    copy.write(batch_of([1], salt=8))
    assert_holds(store, "users", {1: 0, 2: 1, 3: 1}, [])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["copy"]


def test_checkpoint_refuses_a_path_that_exists(store: RowStore, tmp_path: Path) -> None:
    store.write(batch_of([1]))
    (tmp_path / "copy").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(StoreError, match="exists"):
        store.checkpoint(tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert list((tmp_path / "copy").iterdir()) == []


def test_closed_stores_refuse_every_call(store: RowStore, tmp_path: Path) -> None:
    store.write(batch_of(list(range(10))))
    scan = store.scan("users", 0, 2)
    next(scan)
    store.close()
    store.close()
    with pytest.raises(ClosedError):
        next(scan)
    for call in (
        lambda: store.read("users", ids_of(1)),
        lambda: store.write(batch_of([1])),
        lambda: store.scan("users"),
        lambda: store.flush(),
        lambda: store.checkpoint(tmp_path / "copy"),
    ):
        with pytest.raises(ClosedError, match="is closed"):
            call()


def test_close_waits_for_calls_in_flight(store: RowStore) -> None:
    ids = torch.arange(4096)
    store.write({"users": (ids, rows_of(ids, 12))})
    started = threading.Barrier(5)

    def read_until_closed() -> int:
        started.wait()
        for count in range(10_000):
            try:
                rows, found = store.read("users", ids)
            except ClosedError:
                return count
            assert bool(found.all()) and torch.equal(rows, rows_of(ids, 12))
        return -1

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read_until_closed) for _ in range(4)]
        started.wait()
        time.sleep(0.02)
        store.close()
        assert all(reader.result(timeout=30) >= 0 for reader in readers)


def test_writers_and_readers_at_once(store: RowStore) -> None:
    def run(worker: int) -> None:
        ids = torch.arange(64) * 4 + worker
        for salt in range(12):
            store.write({table: (ids, rows_of(ids, width, salt)) for table, width in SIZES.items()})
            for table, width in SIZES.items():
                rows, found = store.read(table, ids)
                assert bool(found.all()) and torch.equal(rows, rows_of(ids, width, salt))
            if salt % 5 == worker:
                store.flush()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert sum(ids.numel() for ids, _ in store.scan("users")) == 256


actions = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, 60), min_size=1, max_size=40)),
        st.tuples(st.just("read"), st.lists(st.integers(0, 70), max_size=40)),
        st.tuples(st.just("scan"), st.lists(st.integers(1, 60), min_size=2, max_size=2)),
        st.tuples(st.sampled_from(["flush", "reopen"]), st.just([])),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=actions)
def test_any_calls_answer_as_a_dict_does(maker: Maker, steps: list[tuple[str, list[int]]]) -> None:
    oracle: dict[str, dict[int, bytes]] = {table: {} for table in SIZES}
    name = f"example{len(maker.made)}"
    store = maker.make(name)
    for salt, (action, ids) in enumerate(steps):
        if action == "write":
            given_rows = torch.tensor(random.Random(salt).choices(range(256), k=len(ids)), dtype=torch.uint8)
            batch = {t: (ids_of(*ids), given_rows[:, None].expand(-1, w)) for t, w in SIZES.items()}
            store.write(batch)
            for table, (index, rows) in batch.items():
                oracle[table].update(zip(index.tolist(), map(bytes, rows.numpy()), strict=True))
        elif action == "flush":
            store.flush()
        elif action == "reopen" and not maker.kind.endswith("memory"):
            store.close()
            store = maker.make(name)
        for table, width in SIZES.items():
            if action == "read":
                rows, found = store.read(table, ids_of(*ids))
                assert found.tolist() == [i in oracle[table] for i in ids]
                assert [bytes(r) for r in rows.numpy()] == [oracle[table].get(i, bytes(width)) for i in ids]
            elif action == "scan":
                windows = list(store.scan(table, *ids))
                got = [
                    (i, bytes(row))
                    for part, rows in windows
                    for i, row in zip(part.tolist(), rows.numpy(), strict=True)
                ]
                assert got == sorted((i, v) for i, v in oracle[table].items() if i >= ids[0])
    store.close()
