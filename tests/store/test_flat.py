"""Flat tables: rows come back, damage is found, sizes beyond 32 bits work."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.store.store_kit import rows_of
from torchrec_turbossd.errors import CorruptError, FormatVersionError, InputError, StoreError, StoreFullError
from torchrec_turbossd.store import flat
from torchrec_turbossd.store.flat import HEADER_BYTES, FlatTable, FlatWriter, ids_file, rows_file
from torchrec_turbossd.store.records import RecordForm


def written(path: Path, ids: Tensor, width: int = 10, window: int = 700) -> Path:
    """A finished table of `rows_of(ids)`."""
    writer = FlatWriter(path, width)
    for part in ids.split(window):
        writer.append(part, rows_of(part, width))
    writer.finish()
    return path


DENSE = torch.arange(2000)
SPARSE = torch.arange(2000) * 5 + 3 + (torch.arange(2000) > 1500) * 2**40


@pytest.fixture(params=["dense", "sparse"])
def ids(request: pytest.FixtureRequest) -> Tensor:
    return DENSE if request.param == "dense" else SPARSE


@pytest.fixture
def path(tmp_path: Path, ids: Tensor) -> Path:
    return written(tmp_path / "t", ids)


def assert_answers(table: FlatTable, ids: Tensor, wanted: Tensor, width: int = 10) -> None:
    rows, found = table.read(wanted)
    assert torch.equal(found, torch.isin(wanted, ids))
    assert torch.equal(rows, rows_of(wanted, width) * found[:, None])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.one_of(
        st.integers(0, 1500).map(lambda n: list(range(n))),
        st.sets(st.integers(0, 3000), max_size=1500).map(sorted),
        st.sets(st.integers(0, 2**62), max_size=30).map(sorted),
    ),
    width=st.integers(1, 40),
    window=st.integers(1, 800),
    cold=st.booleans(),
    start=st.integers(0, 3100),
    seed=st.integers(0, 100),
)
def test_any_rows_are_read_and_scanned_as_written(
    tmp_path: Path, ids: list[int], width: int, window: int, cold: bool, start: int, seed: int
) -> None:
    path = tmp_path / str(len(list(tmp_path.iterdir())))
    have = torch.tensor(ids, dtype=torch.int64)
    table = FlatTable(written(path, have, width, window), width)
    table._cold = cold
    assert (table.rows, table.is_dense) == (len(ids), ids == list(range(len(ids))))
    wanted = torch.tensor([*ids, *(i + 1 for i in ids), 0, 3001, 2**63 - 1], dtype=torch.int64)
    wanted = wanted[torch.randint(0, wanted.numel(), (200,), generator=torch.Generator().manual_seed(seed))]
    assert_answers(table, have, wanted, width)
    windows = list(table.scan(start, window))
    assert all(0 < part.numel() <= window for part, _ in windows)
    got = torch.cat([part for part, _ in windows]) if windows else have[:0]
    assert got.tolist() == [i for i in ids if i >= start]
    assert not windows or torch.equal(torch.cat([rows for _, rows in windows]), rows_of(got, width))
    table.close()
    table.close()


def test_reads_of_none_and_of_repeated_ids(path: Path, ids: Tensor) -> None:
    table = FlatTable(path, 10)
    rows, found = table.read(ids[:0])
    assert tuple(rows.shape) == (0, 10) and tuple(found.shape) == (0,)
    assert_answers(table, ids, ids[[4, 1, 4, 4]])


def flipped(path: Path, place: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def test_every_flipped_bit_of_rows_is_found_and_harms_no_other_row(path: Path, ids: Tensor) -> None:
    chooser = random.Random(3)
    stride = RecordForm(10).stride
    for _ in range(150):
        place, byte, bit = chooser.randrange(2000), chooser.randrange(stride), chooser.randrange(8)
        flipped(rows_file(path), HEADER_BYTES + place * stride + byte, bit)
        table = FlatTable(path, 10)
        wrong = ids[place : place + 1]
        with pytest.raises(CorruptError, match=f"row {int(wrong)} in .* checksum"):
            table.read(wrong)
        with pytest.raises(CorruptError):
            list(table.scan())
        assert_answers(table, ids, ids[ids != wrong])
        flipped(rows_file(path), HEADER_BYTES + place * stride + byte, bit)


def test_the_same_flip_in_two_words_does_not_cancel() -> None:
    form = RecordForm(64)
    ids, rows = torch.arange(1), torch.zeros(1, 64, dtype=torch.uint8)
    right = int(form.checksums(ids, rows.view(torch.int32)))
    for bit in range(8):
        for first in range(64):
            for second in range(first + 4, 64, 4):
                other = rows.clone()
                other[0, first] = other[0, second] = 1 << bit
                assert int(form.checksums(ids, other.view(torch.int32))) != right


def test_rows_in_each_others_places_and_lost_pages_are_found(path: Path, ids: Tensor) -> None:
    data = bytearray(rows_file(path).read_bytes())
    stride = RecordForm(10).stride
    one, other = (slice(HEADER_BYTES + i * stride, HEADER_BYTES + (i + 1) * stride) for i in (100, 101))
    data[one], data[other] = data[other], data[one]
    data[HEADER_BYTES + 500 * stride : HEADER_BYTES + 600 * stride] = bytes(100 * stride)
    rows_file(path).write_bytes(data)
    table = FlatTable(path, 10)
    for place in (100, 101, 500, 599):
        with pytest.raises(CorruptError):
            table.read(ids[place : place + 1])
    assert_answers(table, ids, torch.cat([ids[:100], ids[102:500], ids[600:]]))


def test_a_damaged_id_never_gives_a_wrong_answer(tmp_path: Path) -> None:
    path = written(tmp_path / "t", SPARSE)
    chooser = random.Random(5)
    size = ids_file(path).stat().st_size
    found_out = 0
    around = torch.cat([SPARSE, SPARSE + 1])
    for case in range(120):
        place = chooser.choice([chooser.randrange(size), chooser.randrange(16000), size - 1 - chooser.randrange(32)])
        bit = chooser.randrange(8)
        flipped(ids_file(path), place, bit)
        table = FlatTable(path, 10)
        # The damaged id, those before and after it, and some anywhere.
        near = place // 8
        picked = torch.cat([SPARSE[max(0, near - 1) : near + 2], torch.randint(0, 4000, (3,))])
        for wanted in torch.cat([picked[picked >= 4000], around[picked[picked < 4000]]]).split(1):
            table._cold = bool(case % 2)
            try:
                assert_answers(table, SPARSE, wanted.repeat(65 if case % 3 else 1))
            except CorruptError:
                found_out += 1
        flipped(ids_file(path), place, bit)
    assert found_out > 40


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda p: rows_file(p).unlink(), CorruptError, "missing"),
        (lambda p: os.truncate(rows_file(p), HEADER_BYTES + 500), CorruptError, "bytes, its header says"),
        (lambda p: os.truncate(rows_file(p), 20), CorruptError, "not a flat table"),
        (lambda p: os.truncate(rows_file(p), 0), CorruptError, "finished"),
        (lambda p: flipped(rows_file(p), 41), CorruptError, "checksum|bytes"),
        (lambda p: flipped(rows_file(p), 2), CorruptError, "not a flat table"),
        (lambda p: flipped(rows_file(p), 32, 4), FormatVersionError, "newer release"),
    ],
)
def test_files_that_are_not_whole_are_refused(
    path: Path, damage: Callable[[Path], object], error: type[Exception], words: str
) -> None:
    damage(path)
    with pytest.raises(error, match=words):
        FlatTable(path, 10)


def test_other_row_sizes_and_lost_ids_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t", SPARSE)
    with pytest.raises(CorruptError, match="rows of 10 bytes, 12 were"):
        FlatTable(path, 12)
    os.truncate(ids_file(path), 4096)
    with pytest.raises(CorruptError, match="bytes, its header says"):
        FlatTable(path, 10)
    ids_file(path).unlink()
    with pytest.raises(CorruptError, match="missing"):
        FlatTable(path, 10)


def test_a_writer_that_was_not_finished_leaves_no_table(tmp_path: Path) -> None:
    writer = FlatWriter(tmp_path / "t", 10)
    writer.append(DENSE, rows_of(DENSE, 10))
    writer.close()
    with pytest.raises(CorruptError, match="never finished"):
        FlatTable(tmp_path / "t", 10)
    with pytest.raises(StoreError, match="finished"):
        writer.append(DENSE, rows_of(DENSE, 10))
    with pytest.raises(StoreError, match="File exists"):
        FlatWriter(tmp_path / "t", 10)


@pytest.mark.parametrize(
    "wrong", [[5, 4], [4, 4], [3, 9], [-1, 7]], ids=["falling", "twice", "below the last", "negative"]
)
def test_ids_that_do_not_ascend_are_refused_and_nothing_is_written(tmp_path: Path, wrong: list[int]) -> None:
    writer = FlatWriter(tmp_path / "t", 10)
    first = torch.tensor([0, 3])
    writer.append(first, rows_of(first, 10))
    bad = torch.tensor(wrong)
    with pytest.raises(InputError, match="ascend"):
        writer.append(bad, rows_of(bad, 10))
    with pytest.raises(InputError, match="uint8 rows"):
        writer.append(torch.tensor([4]), torch.zeros(1, 9, dtype=torch.uint8))
    last = torch.tensor([4])
    writer.append(last, rows_of(last, 10))
    writer.finish()
    assert [ids.tolist() for ids, _ in FlatTable(tmp_path / "t", 10).scan()] == [[0, 3, 4]]


def test_a_full_disk_is_named(small_disk: Path) -> None:
    writer = FlatWriter(small_disk / "t", 1000)
    with pytest.raises(StoreFullError):
        for first in range(0, 100_000, 1000):
            writer.append(torch.arange(first, first + 1000), torch.zeros(1000, 1000, dtype=torch.uint8))
    writer.close()


def test_places_beyond_two_to_the_31_and_files_beyond_4_gib(tmp_path: Path) -> None:
    rows = 2**31 + 100
    form = RecordForm(4)
    ids = torch.tensor([0, 2**29, 2**31 - 1, 2**31, rows - 1])
    writer = FlatWriter(tmp_path / "t", 4)
    writer.finish()
    with rows_file(tmp_path / "t").open("r+b") as file:
        file.write(flat._header(4, rows, False))
        file.truncate(HEADER_BYTES + rows * form.stride)
        for i, record in zip(ids.tolist(), form.pack(ids, rows_of(ids, 4)), strict=True):
            file.seek(HEADER_BYTES + i * form.stride)
            file.write(record.numpy().tobytes())
    table = FlatTable(tmp_path / "t", 4)
    for cold in (True, False):
        table._cold = cold
        got, found = table.read(torch.cat([ids, torch.tensor([rows])]).repeat(20))
        assert torch.equal(got.view(20, 6, 4)[7, :5], rows_of(ids, 4)) and found.view(20, 6)[3].tolist() == [
            True
        ] * 5 + [False]
    with pytest.raises(CorruptError):
        table.read(torch.tensor([2**31 + 1]))
    assert [part.tolist() for part, _ in table.scan(rows - 1)] == [[rows - 1]]


def test_rows_that_come_slowly_are_asked_for_until_they_come_fast(path: Path, ids: Tensor) -> None:
    table = FlatTable(path, 10)
    asked: list[int] = []
    real = flat.MappedFile.ask_for
    table._files[0].ask_for = lambda pages: (asked.append(pages.size), real(table._files[0], pages))[0]  # type: ignore[method-assign]
    took = 0.0
    clock = iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat.MappedFile, "holds", lambda *_: False)
        patch.setattr(flat.time, "perf_counter", lambda: next(clock) % 2 * took)
        for took, asks in ((4e-4, True), (1e-4, True), (2.5e-4, False), (4e-4, False), (2e-4, True), (1e-4, True)):
            asked.clear()
            assert_answers(table, ids, ids[:128])
            assert bool(asked) == asks, took
        table._cold = True
        patch.setattr(flat.MappedFile, "holds", lambda *_: True)
        asked.clear()
        assert_answers(table, ids, ids[:128])
        assert not asked
        table.read(ids[:10])
        assert asked


def test_a_file_tells_what_is_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "t", torch.arange(200_000))
    table = FlatTable(path, 10)
    file = table._files[0]
    places = torch.arange(0, 200_000, 20_000) * 16 + HEADER_BYTES
    list(table.scan())
    if not file.holds(places):
        pytest.skip("this file system does not tell")
    os.posix_fadvise(file._handle, 0, 0, os.POSIX_FADV_DONTNEED)
    assert not file.holds(places)


def test_rows_not_in_memory_are_read(path: Path, ids: Tensor) -> None:
    for file in path.parent.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    assert_answers(FlatTable(path, 10), ids, torch.cat([ids, ids + 1]))


def test_many_readers_at_once(path: Path, ids: Tensor) -> None:
    table = FlatTable(path, 10)
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            for _ in range(30):
                chosen = torch.randint(0, 2000, (300,), generator=torch.Generator().manual_seed(seed))
                assert_answers(table, ids, ids[chosen])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
