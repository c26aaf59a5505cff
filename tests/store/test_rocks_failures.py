"""Crashes, full disks and damage under the row store in RocksDB."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import torchrec_turbossd.store as stores
from tests.store.store_kit import SIZES, batch_of, child_environment, count_in, edit_format, made, rows_of, run_child
from torchrec_turbossd.errors import (
    CorruptError,
    StoreFullError,
)
from torchrec_turbossd.store import RocksOptions, RocksRowStore


def fill(store: RocksRowStore, sizes: dict[str, int]) -> int:
    """Calls of 64 rows that were acknowledged before one failed."""
    for call in range(2000):
        ids = torch.arange(64) + 64 * call
        try:
            store.write({t: (ids, rows_of(ids, w, call)) for t, w in sizes.items()})
        except StoreFullError as error:
            assert "free some space" in str(error)
            return call
    raise AssertionError("the disk never filled")


@pytest.mark.parametrize("write_buffer_bytes", [1 << 20, 64 << 20])
def test_a_full_disk_loses_nothing_and_can_be_freed(small_disk: Path, write_buffer_bytes: int) -> None:
    sizes = {"a": 1000, "b": 500}
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(16 << 20))
    options = RocksOptions(write_buffer_bytes=write_buffer_bytes)
    store = RocksRowStore(small_disk / "store", sizes, options=options)
    calls = fill(store, sizes)
    acknowledged = torch.arange(64 * calls)
    failed = torch.arange(64) + 64 * calls
    for table in sizes:
        assert bool(store.read(table, acknowledged)[1].all())
        assert not bool(store.read(table, failed)[1].any())
    with pytest.raises(StoreFullError):
        store.write(batch_of(failed.tolist(), sizes=sizes))
    # A try to write must not cost the reads that still work.
    assert bool(store.read("a", acknowledged)[1].all())
    ballast.unlink()
    store.write(batch_of(failed.tolist(), sizes=sizes))
    store.flush()
    store.close()
    again = RocksRowStore(small_disk / "store", sizes)
    for table in sizes:
        assert count_in(again, table) == 64 * (calls + 1)
    again.close()


def test_damaged_rows_are_found_by_reading_and_scanning(tmp_path: Path) -> None:
    path = made(tmp_path / "a", count=3000)
    for file in path.glob("*.sst"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    store = RocksRowStore(path, SIZES)
    with pytest.raises(CorruptError, match="checksum"):
        store.read("users", torch.arange(3000))
    with pytest.raises(CorruptError, match="checksum"):
        count_in(store)
    store.close()
    RocksRowStore(path, SIZES).close()


@pytest.mark.parametrize("name", ["MANIFEST-*", "CURRENT", "*.sst"])
def test_missing_and_damaged_files_are_damage(tmp_path: Path, name: str) -> None:
    for kind in ("damaged", "missing"):
        path = made(tmp_path / kind)
        for file in path.glob(name):
            if kind == "missing":
                file.unlink()
            else:
                file.write_bytes(b"x" + file.read_bytes()[1:-1])
        with pytest.raises(CorruptError):
            store = RocksRowStore(path, SIZES)
            store.close()


def test_rows_of_another_width_are_damage(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    edit_format(path, row_bytes={**SIZES, "users": 8})
    store = RocksRowStore(path, {**SIZES, "users": 8})
    with pytest.raises(CorruptError, match="8 bytes") as kept:
        store.read("users", torch.arange(4))
    with pytest.raises(CorruptError, match="8 bytes"):
        list(store.scan("users"))
    store.close()
    # The frames that the error keeps must not keep the lock.
    RocksRowStore(path, {**SIZES, "users": 8}).close()
    assert kept.value.__traceback__ is not None


ENDLESS_WRITER = """
    import sys, torch
    from torchrec_turbossd.store import RocksRowStore, RocksOptions
    store = RocksRowStore(sys.argv[1], {"a": 24, "b": 9}, options=RocksOptions(write_buffer_bytes=1 << 16))
    for call in range(1 << 30):
        ids = torch.arange(500) + 500 * call
        store.write({t: (ids, torch.full((500, w), call % 251, dtype=torch.uint8)) for t, w in store.row_bytes.items()})
        sys.stdout.write(f"{call}\\n")
        sys.stdout.flush()
"""


def test_acknowledged_writes_survive_a_kill_and_none_is_half_there(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ENDLESS_WRITER), str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    assert child.stdout is not None
    for _ in range(25):
        assert child.stdout.readline()
    time.sleep(0.003)
    child.send_signal(signal.SIGKILL)
    acknowledged = 25 + len([line for line in child.stdout.read().split("\n")[:-1] if line])
    child.wait()
    store = RocksRowStore(tmp_path / "a", {"a": 24, "b": 9}, create=False)
    for call in range(acknowledged + 3):
        ids = torch.arange(500) + 500 * call
        (rows_a, found_a), (rows_b, found_b) = store.read("a", ids), store.read("b", ids)
        found = torch.cat([found_a, found_b])
        assert bool(found.all()) if call < acknowledged else bool(found.all() or not found.any()), call
        if bool(found.all()):
            assert bool((rows_a == call % 251).all()) and bool((rows_b == call % 251).all())
    store.close()


def test_without_the_log_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    code = f"""
        import os, signal, torch
        from torchrec_turbossd.store import RocksRowStore
        store = RocksRowStore({str(tmp_path / "a")!r}, {SIZES!r}, wal=False)
        ids = torch.arange(100)
        store.write({{t: (ids, torch.ones(100, w, dtype=torch.uint8)) for t, w in store.row_bytes.items()}})
        store.flush()
        print("flushed", flush=True)
        os._exit(0)
    """
    assert run_child(code) == "flushed\n"
    store = RocksRowStore(tmp_path / "a", SIZES)
    assert [count_in(store, table) for table in SIZES] == [100, 100]
    store.close()


def test_a_failed_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RocksRowStore(tmp_path / "a", SIZES)
    store.write(batch_of([1]))

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores.rocks.directory, "write_format", no_space)
    with pytest.raises(StoreFullError):
        store.checkpoint(tmp_path / "copy")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    store.checkpoint(tmp_path / "copy")
    store.close()
