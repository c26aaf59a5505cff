"""Cloning a store's directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.store.store_kit import SIZES, batch_of, count_in, made, rows_of
from torchrec_turbossd.errors import (
    StoreFullError,
)
from torchrec_turbossd.store import RocksRowStore, clone_directory


def test_clones_and_their_source_change_apart(tmp_path: Path) -> None:
    path = made(tmp_path / "a")
    told: list[tuple[int, int]] = []
    assert clone_directory(path, tmp_path / "b", progress=lambda *amount: told.append(amount))
    shared = {f.name for f in (tmp_path / "b").iterdir() if f.stat().st_nlink > 1}
    assert shared and all(name.endswith(".sst") for name in shared)
    assert told[-1][0] == told[-1][1] > 0
    clone = RocksRowStore(tmp_path / "b", SIZES)
    clone.write(batch_of([3, 50], salt=4))
    clone.flush()
    clone.close()
    source = RocksRowStore(path, SIZES)
    assert count_in(source) == 10
    assert torch.equal(source.read("users", torch.tensor([3]))[0], rows_of(torch.tensor([3]), 12))
    source.close()


def test_clones_to_another_disk_are_copies_that_must_fit(tmp_path: Path, small_disk: Path) -> None:
    path = made(tmp_path / "a")
    assert not clone_directory(path, small_disk / "b")
    clone = RocksRowStore(small_disk / "b", SIZES)
    assert count_in(clone) == 10
    clone.close()
    shutil.rmtree(small_disk / "b")
    next(path.glob("*.sst")).write_bytes(bytes(40 << 20))
    with pytest.raises(StoreFullError, match="are free"):
        clone_directory(path, small_disk / "b")
    assert list(small_disk.iterdir()) == []
