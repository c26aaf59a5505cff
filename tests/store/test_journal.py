"""The journal: what was appended is replayed, what was not is not, damage is found."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.store.store_kit import SIZES, batch_of
from torchrec_turbossd.errors import ClosedError, CorruptError, FormatVersionError, StoreError, StoreFullError
from torchrec_turbossd.store import journal as module
from torchrec_turbossd.store.journal import Journal, segments_in


def replayed(path: Path) -> list[tuple[int, int]]:
    """(sequence number, number of ids) of every batch; each must be what `batch_of` made."""
    journal = Journal(path)
    found = []
    for sequence, batch in journal.replay():
        ids, rows = batch["users"]
        assert set(batch) == set(SIZES)
        want = batch_of(ids.tolist(), salt=sequence)
        for table in SIZES:
            assert torch.equal(batch[table][0], want[table][0]) and torch.equal(batch[table][1], want[table][1])
        assert rows.shape[1] == SIZES["users"]
        found.append((sequence, ids.numel()))
    assert journal.last == (found[-1][0] if found else 0)
    journal.close()
    return found


def fail(*_: object) -> None:
    raise OSError(errno.EIO, "planted")


def append(journal: Journal, count: int = 3, size: int = 4) -> None:
    for _ in range(count):
        following = journal.last + 1
        assert journal.append(batch_of(list(range(size)), salt=following)) == following


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "j")
    yield journal
    journal.close()


def test_batches_come_back_in_order_over_openings_and_segments(tmp_path: Path) -> None:
    for opening in range(4):
        journal = Journal(tmp_path / "j")
        append(journal)
        if opening == 1:
            journal.rotate()
            journal.rotate()
            append(journal, 1)
        journal.close()
    assert replayed(tmp_path / "j") == [(i, 4) for i in range(1, 14)]
    assert [s.number for s in segments_in(tmp_path / "j")] == [1, 2, 3, 4, 5]


def test_batches_of_no_rows_many_tables_and_odd_names(journal: Journal) -> None:
    sizes = {"": 1, "über/../x": 3, "b": 200_000}
    batch = batch_of([2**62, 0, 7], sizes=sizes)
    journal.append({**batch, "none": (torch.arange(0), torch.empty(0, 5, dtype=torch.uint8))})
    journal.append({})
    journal.append({"strided": (torch.arange(9)[::3], torch.arange(90, dtype=torch.uint8).view(9, 10)[::3, ::2])})
    (_, first), (_, second), (_, third) = Journal(journal.path).replay()
    assert second == {} and tuple(first.pop("none")[1].shape) == (0, 5)
    assert first.keys() == batch.keys()
    assert all(torch.equal(a, b) for name in batch for a, b in zip(first[name], batch[name], strict=True))
    assert third["strided"][1].tolist() == [[0, 2, 4, 6, 8], [30, 32, 34, 36, 38], [60, 62, 64, 66, 68]]


def test_a_write_cut_short_at_any_byte_loses_only_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    append(journal, 1)
    journal.rotate()
    ends, header = [0], 48
    for _ in range(3):
        append(journal, 1, size=2)
        ends.append(journal.open_bytes)
    journal.close()
    file = segments_in(tmp_path / "j")[-1].path
    whole = file.read_bytes()
    assert len(whole) == ends[-1]
    near = {end + i for end in ends for i in range(-1, 18)} & set(range(len(whole) + 1))
    for cut in sorted(near | set(range(0, len(whole), 7))):
        for tail in (b"", bytes(50)) if cut >= header else (b"",):
            file.write_bytes(whole[:cut] + tail)
            left = sum(cut >= end for end in ends[1:])
            # Zeros may complete a record that ends in zeros.
            got = replayed(tmp_path / "j")
            assert got[: left + 1] == [(1, 4), (2, 2), (3, 2), (4, 2)][: left + 1] and len(got) <= left + 2
            if not tail:
                assert len(got) == left + 1
            if not file.exists():
                break
    file.write_bytes(whole[: ends[2] + 5])
    journal = Journal(tmp_path / "j")
    append(journal, 2)
    journal.close()
    assert [s for s, _ in replayed(tmp_path / "j")] == [1, 2, 3, 4, 5]


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_before_the_last_record_is_damage(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    append(journal, 2)
    journal.rotate()
    append(journal, 1)
    before = journal.open_bytes
    append(journal, 1)
    journal.close()
    first, last = (s.path for s in segments_in(tmp_path / "j"))
    chooser = random.Random(1)
    places = [(first, p) for p in range(first.stat().st_size)] + [(last, p) for p in range(before)]
    for file, place in chooser.sample(places, 100):
        bit = chooser.randrange(8)
        flip(file, place, bit)
        with pytest.raises((CorruptError, FormatVersionError)):
            Journal(tmp_path / "j")
        flip(file, place, bit)
    # In the last record it cannot be told from a write cut short, but never comes back as rows.
    for place in range(before, last.stat().st_size, 2):
        data = last.read_bytes()
        flip(last, place, chooser.randrange(8))
        try:
            assert len(replayed(tmp_path / "j")) == 3
        except CorruptError:
            assert place < before + 16
        last.write_bytes(data)


def test_a_lost_segment_is_damage(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for _ in range(3):
        append(journal, 1)
        journal.rotate()
    journal.close()
    segments_in(tmp_path / "j")[1].path.unlink()
    with pytest.raises(CorruptError, match="lacks segment 2"):
        Journal(tmp_path / "j")


def test_segments_of_others_and_of_newer_releases_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "journal-00000001.log").write_bytes(b"x" * 100)
    with pytest.raises(CorruptError, match="not a journal"):
        Journal(tmp_path / "j")
    monkeypatch.setattr(module, "FORMAT_VERSION", 2)
    journal = Journal(tmp_path / "k")
    append(journal, 1)
    journal.close()
    monkeypatch.undo()
    with pytest.raises(FormatVersionError, match="newer"):
        Journal(tmp_path / "k")


def partly(count: int, error: int) -> Callable[[int, Sequence[Any]], int]:
    """A `writev` that writes `count` bytes, then fails."""
    left = [count]

    def writev(handle: int, buffers: Sequence[Any]) -> int:
        if not left[0]:
            raise OSError(error, os.strerror(error))
        data = b"".join(bytes(b) for b in buffers)[: left[0]]
        left[0] -= len(data)
        return os.write(handle, data)

    return writev


@pytest.mark.parametrize("count", [0, 3, 20, 70])
def test_a_failed_append_leaves_nothing_and_the_next_succeeds(journal: Journal, count: int) -> None:
    append(journal, 2)
    before = journal.open_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "writev", partly(count, errno.ENOSPC))
        with pytest.raises(StoreFullError, match="free some space"):
            append(journal, 1)
    assert journal.open_bytes == before == journal.segments[-1].path.stat().st_size
    append(journal, 1)
    assert replayed(journal.path) == [(1, 4), (2, 4), (3, 4)]


def test_a_failed_append_that_cannot_be_undone_is_the_last(journal: Journal) -> None:
    append(journal, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "writev", partly(30, errno.EIO))
        patch.setattr(module.os, "ftruncate", fail)
        with pytest.raises(StoreError):
            append(journal, 1)
    for call in (lambda: append(journal, 1), journal.sync, journal.rotate):
        with pytest.raises(StoreError, match="could not be taken back"):
            call()
    assert journal.failed
    assert replayed(journal.path) == [(1, 4), (2, 4)]


def test_short_writes_are_completed(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "writev", lambda handle, buffers: os.write(handle, bytes(buffers[0])[:7]))
    append(journal, 3)
    assert replayed(journal.path) == [(1, 4), (2, 4), (3, 4)]


def test_a_segment_that_cannot_be_begun_leaves_nothing(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "writev", partly(10, errno.ENOSPC))
        with pytest.raises(StoreFullError):
            append(journal, 1)
    assert segments_in(journal.path) == []
    append(journal, 1)
    assert replayed(journal.path) == [(1, 4)]


def test_sync_tells_what_is_durable_and_fails_for_good(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    append(journal, 2)
    assert journal.synced == 0
    journal.sync()
    assert journal.synced == 2
    append(journal, 1)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fdatasync", fail)
        with pytest.raises(StoreError, match="planted"):
            journal.sync()
    assert journal.synced == 2
    for call in (journal.sync, lambda: append(journal, 1)):
        with pytest.raises(StoreError, match="could not be made durable"):
            call()


def test_dropping_takes_the_first_segments(journal: Journal) -> None:
    for _ in range(3):
        append(journal, 2)
        journal.rotate()
    append(journal, 1)
    assert [(s.number, s.last) for s in journal.complete] == [(1, 2), (2, 4), (3, 6)]
    journal.drop(journal.complete[:2])
    assert replayed(journal.path) == [(5, 4), (6, 4), (7, 4)]
    journal.drop(journal.segments)
    assert segments_in(journal.path) == []
    append(journal, 1)
    assert replayed(journal.path) == [(8, 4)]


def test_a_drop_that_could_not_be_made_durable_is_finished_later(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        append(journal, 1)
        journal.rotate()
    first, second, third = segments = journal.segments
    with monkeypatch.context() as patch:
        patch.setattr(module, "sync_directory", fail)
        with pytest.raises(StoreError, match="planted"):
            journal.drop(segments[:2])
        assert list(journal.segments) == [second, third] and not first.path.exists()
        # Before anything else goes, that the first one went must be certain.
        with pytest.raises(StoreError, match="planted"):
            journal.drop([second])
        assert second.path.exists()
    journal.drop(segments)
    assert segments_in(journal.path) == [] and not journal.segments


@pytest.mark.parametrize("undone", [True, False])
def test_an_interrupt_after_the_bytes_leaves_no_number_twice(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, undone: bool
) -> None:
    append(journal, 2)
    before = journal.open_bytes
    write_all = module._write_all

    def interrupted(handle: int, parts: Sequence[Any]) -> int:
        write_all(handle, parts)
        raise KeyboardInterrupt

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    class Number(int):
        """Bytes written, at the counting of which the interrupt comes."""

        def __radd__(self, other: int) -> int:
            raise KeyboardInterrupt

    for write in (interrupted, lambda handle, parts: Number(write_all(handle, parts))):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "_write_all", write)
            if not undone:
                patch.setattr(module.os, "ftruncate", interrupt)
            append(journal, 1)
        assert (journal.last, journal.open_bytes, journal.segments[-1].last) == (2, before, 2)
        if not undone:
            with pytest.raises(StoreError, match="could not be taken back"):
                append(journal, 1)
            return
    append(journal, 1)
    assert replayed(journal.path) == [(1, 4), (2, 4), (3, 4)]


def test_a_segment_without_a_record_counts_as_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is never dropped before that."""
    journal = Journal(tmp_path / "j")
    append(journal, 3)
    journal.rotate()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_record", lambda *_: [b"x" * 9])
        patch.setattr(module.os, "ftruncate", lambda *_: None)
        patch.setattr(module.os, "writev", partly(48, errno.ENOSPC))
        with pytest.raises(StoreFullError):
            append(journal, 1)
    assert [s.last for s in journal.segments] == [3, 3]
    journal.close()
    assert [s.last for s in Journal(tmp_path / "j").segments] == [3, 3]


def test_a_closed_journal_takes_nothing(journal: Journal) -> None:
    journal.close()
    journal.close()
    with pytest.raises(ClosedError):
        append(journal, 1)
