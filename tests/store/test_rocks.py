"""What is particular to the row store in RocksDB: its directory, its format file, its lock."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch

from tests.store.store_kit import SIZES, batch_of, count_in, edit_format, made, run_child
from torchrec_turbossd.errors import (
    ConfigError,
    CorruptError,
    ForeignDirectoryError,
    FormatVersionError,
    ReadOnlyStoreError,
    StoreError,
    StoreLockedError,
)
from torchrec_turbossd.store import RocksOptions, RocksRowStore, clone_directory, remove_store
from torchrec_turbossd.store.directory import FORMAT_FILE


@pytest.mark.parametrize("wal", [True, False])
def test_rows_are_there_after_closing_and_opening(tmp_path: Path, wal: bool) -> None:
    store = RocksRowStore(tmp_path / "a", SIZES, wal=wal)
    store.write(batch_of([1, 2, 3]))
    store.close()
    again = RocksRowStore(tmp_path / "a", SIZES)
    assert again.read("users", torch.tensor([1, 2, 3, 4]))[1].tolist() == [True, True, True, False]
    again.close()


def test_the_format_file_says_what_the_directory_is(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    body = {"format": "torchrec_turbossd.store", "format_version": 1, "row_bytes": SIZES}
    assert json.loads((path / FORMAT_FILE).read_text()) == body
    store = RocksRowStore(path, SIZES)
    store.checkpoint(tmp_path / "b")
    assert json.loads((tmp_path / "b" / FORMAT_FILE).read_text()) == body
    store.close()


def test_tables_can_be_added_and_those_not_named_are_kept(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    store = RocksRowStore(path, {"new": 5, "users": 12})
    store.write({"new": (torch.tensor([3]), torch.full((1, 5), 9, dtype=torch.uint8))})
    store.close()
    whole = RocksRowStore(path, {**SIZES, "new": 5}, create=False)
    assert count_in(whole, "items@0+4") == 10 and count_in(whole, "new") == 1
    whole.close()


def test_a_table_may_be_named_default(tmp_path: Path) -> None:
    store = RocksRowStore(tmp_path / "a", {"default": 4})
    store.write(batch_of([1], sizes={"default": 4}))
    store.flush()
    store.close()
    again = RocksRowStore(tmp_path / "a", {"default": 4})
    assert count_in(again, "default") == 1
    again.close()


def test_other_row_sizes_and_missing_tables_are_named(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    with pytest.raises(StoreError, match="'users' has 12 bytes there, 16 were asked for"):
        RocksRowStore(path, {"users": 16})
    for arguments in ({"create": False}, {"read_only": True}):
        with pytest.raises(StoreError, match=r"lacks tables 'new'; it holds 'items@0\+4', 'users'"):
            RocksRowStore(path, {"new": 4}, **arguments)
    assert json.loads((path / FORMAT_FILE).read_text())["row_bytes"] == SIZES


def test_foreign_directories_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(ForeignDirectoryError, match=r"thesis\.tex"):
        RocksRowStore(tmp_path / "a", SIZES)
    with pytest.raises(ForeignDirectoryError):
        remove_store(tmp_path / "a")
    assert os.listdir(tmp_path / "a") == ["thesis.tex"]
    with pytest.raises(ForeignDirectoryError, match="is a file"):
        RocksRowStore(tmp_path / "a" / "thesis.tex", SIZES)
    with pytest.raises(StoreError, match="Not a directory"):
        RocksRowStore(tmp_path / "a" / "thesis.tex" / "deeper", SIZES)


def test_nothing_there_is_said_and_not_made(tmp_path: Path) -> None:
    for arguments in ({"create": False}, {"read_only": True}):
        with pytest.raises(StoreError, match="no row store"):
            RocksRowStore(tmp_path / "a", SIZES, **arguments)
    with pytest.raises(ForeignDirectoryError):
        remove_store(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_empty_directory_and_one_whose_making_was_cut_short_are_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f".{FORMAT_FILE}.half").write_text("{")
    path = made(tmp_path / "a")
    store = RocksRowStore(path, SIZES)
    assert count_in(store) == 10
    store.close()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format_version": 2}, FormatVersionError),
        ({"format": "other"}, ForeignDirectoryError),
        ({"format_version": "x"}, CorruptError),
        ({"row_bytes": {"users": -1}}, CorruptError),
    ],
)
def test_format_files_of_others_are_refused(tmp_path: Path, changes: dict[str, object], error: type) -> None:
    path = made(tmp_path / "a")
    edit_format(path, **changes)
    with pytest.raises(error):
        RocksRowStore(path, SIZES)
    with pytest.raises(error):
        clone_directory(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_torn_format_file_is_damage(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    (path / FORMAT_FILE).write_text('{"format"')
    with pytest.raises(CorruptError, match="JSON"):
        RocksRowStore(path, SIZES)


def test_a_store_has_one_writer(tmp_path: Path) -> None:
    store = RocksRowStore(tmp_path / "a", SIZES)
    store.write(batch_of([1]))
    with pytest.raises(StoreLockedError, match="is open in"):
        RocksRowStore(tmp_path / "a", {**SIZES, "new": 4})
    with pytest.raises(StoreLockedError):
        remove_store(tmp_path / "a")
    assert "new" not in json.loads((tmp_path / "a" / FORMAT_FILE).read_text())["row_bytes"]
    assert count_in(store) == 1
    store.close()
    RocksRowStore(tmp_path / "a", SIZES).close()


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    store = RocksRowStore(tmp_path / "a", SIZES)
    code = f"""
        from torchrec_turbossd.errors import StoreLockedError
        from torchrec_turbossd.store import RocksRowStore
        try:
            RocksRowStore({str(tmp_path / "a")!r}, {SIZES!r})
        except StoreLockedError:
            print("locked")
    """
    assert run_child(code) == "locked\n"
    store.close()


def test_closing_releases_the_lock_even_while_errors_and_scans_are_kept(tmp_path: Path) -> None:
    store = RocksRowStore(tmp_path / "a", SIZES)
    store.write(batch_of(list(range(9))))
    scan = store.scan("users", 0, 2)
    next(scan)
    with pytest.raises(StoreError) as kept:
        store.checkpoint(tmp_path / "a")
    gc.disable()
    try:
        store.close()
        RocksRowStore(tmp_path / "a", SIZES).close()
    finally:
        gc.enable()
    assert kept.value is not None and scan is not None


def test_read_only_reads_and_refuses_writes(tmp_path: Path) -> None:
    writer = RocksRowStore(tmp_path / "a", SIZES)
    writer.write(batch_of([1, 2]))
    reader = RocksRowStore(tmp_path / "a", SIZES, read_only=True)
    assert count_in(reader) == 2
    with pytest.raises(ReadOnlyStoreError):
        reader.write(batch_of([3]))
    reader.flush()
    reader.close()
    writer.close()


def test_a_read_only_disk_is_named(read_only_mount: tuple[Path, Path], tmp_path: Path) -> None:
    path, mounted = read_only_mount
    made(path / "a")
    for arguments in ({}, {"read_only": True}):
        with pytest.raises(ReadOnlyStoreError, match="may not be written"):
            RocksRowStore(mounted / "a", SIZES, **arguments)
    with pytest.raises(ReadOnlyStoreError):
        RocksRowStore(mounted / "new", SIZES)
    assert not clone_directory(mounted / "a", tmp_path / "b")
    clone = RocksRowStore(tmp_path / "b", SIZES)
    assert count_in(clone) == 10
    clone.close()


def test_a_directory_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "a")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ReadOnlyStoreError, match="may not be written"):
        RocksRowStore(path, SIZES)


def test_remove_store_removes_stores_only(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ForeignDirectoryError, match=r"notes\.txt"):
        remove_store(path)
    store = RocksRowStore(path, SIZES)
    assert count_in(store) == 10
    store.close()
    (path / "notes.txt").unlink()
    remove_store(path)
    assert not path.exists()


def test_arguments_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for sizes in ({"a": 0}, {"": 4}, {"a\0": 4}):
        with pytest.raises(ConfigError):
            RocksRowStore(tmp_path / "a", sizes)
    with pytest.raises(ConfigError, match="read_threads"):
        RocksRowStore(tmp_path / "a", SIZES, read_threads=0)
    with pytest.raises(ConfigError, match="write_buffer_bytes"):
        RocksOptions(write_buffer_bytes=0)
    assert not (tmp_path / "a").exists()
