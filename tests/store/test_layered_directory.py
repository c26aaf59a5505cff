"""What a layered store's directory may be: made, refused, locked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.store.layered_kit import salts
from tests.store.store_kit import BASE_SALT, SIZES, TABLE_ROWS, based, batch_of, layered
from torchrec_turbossd.errors import (
    ConfigError,
    CorruptError,
    ForeignDirectoryError,
    FormatVersionError,
    StoreError,
    StoreLockedError,
)
from torchrec_turbossd.store import LayeredRowStore, RocksRowStore
from torchrec_turbossd.store.directory import FORMAT_FILE
from torchrec_turbossd.store.journal import Journal


def edit(path: Path, **changes: object) -> None:
    body = json.loads((path / FORMAT_FILE).read_text())
    (path / FORMAT_FILE).write_text(json.dumps({**body, **changes}))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda p: edit(p, format_version=2), FormatVersionError),
        (lambda p: edit(p, format="torchrec_turbossd.store"), ForeignDirectoryError),
        (lambda p: edit(p, format_version="x"), CorruptError),
        (lambda p: edit(p, tables={"users": {"row_bytes": 3}}), CorruptError),
        (lambda p: edit(p, tables=[]), CorruptError),
        (lambda p: (p / FORMAT_FILE).write_text("{"), CorruptError),
        (lambda p: (p / FORMAT_FILE).unlink(), ForeignDirectoryError),
        (lambda p: shutil.rmtree(p / "updates"), CorruptError),
        (lambda p: shutil.rmtree(p / "base"), CorruptError),
        (lambda p: os.truncate(p / "base" / "1.rows", 5000), CorruptError),
    ],
)
def test_directories_that_are_not_whole_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], error: type[Exception]
) -> None:
    path = based(tmp_path / "a", torch.arange(500))
    damage(path)
    for _ in range(2):
        with pytest.raises(error):
            layered(path)


def test_other_sizes_and_tables_are_refused(tmp_path: Path) -> None:
    layered(tmp_path / "a").close()
    rows = dict.fromkeys(SIZES, TABLE_ROWS)
    with pytest.raises(StoreError, match="other sizes"):
        LayeredRowStore(tmp_path / "a", {**SIZES, "users": 13}, rows)
    with pytest.raises(StoreError, match="other sizes"):
        LayeredRowStore(tmp_path / "a", SIZES, {**rows, "users": 5})
    with pytest.raises(StoreError, match="lacks tables 'more'"):
        LayeredRowStore(tmp_path / "a", {**SIZES, "more": 3}, {**rows, "more": 3})
    for sizes, counts in (({"a": 3}, {}), ({"a": 3}, {"a": 0}), ({"a": 0}, {"a": 3})):
        with pytest.raises(ConfigError):
            LayeredRowStore(tmp_path / "b", sizes, counts)
    with pytest.raises(ConfigError, match="read_threads"):
        LayeredRowStore(tmp_path / "b", {"a": 3}, {"a": 3}, read_threads=0)
    with pytest.raises(StoreError, match="no row store"):
        layered(tmp_path / "b", create=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    some = LayeredRowStore(tmp_path / "a", {"users": 12}, rows)
    some.write({"users": batch_of([1])["users"]})
    some.close()


def test_directories_of_others_are_left_alone(tmp_path: Path) -> None:
    RocksRowStore(tmp_path / "r", SIZES).close()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    for name in ("r", "thesis"):
        before = sorted(p.name for p in (tmp_path / name).iterdir())
        with pytest.raises(ForeignDirectoryError):
            layered(tmp_path / name)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == before
    layered(based(tmp_path / "l", torch.arange(5))).close()
    with pytest.raises(ForeignDirectoryError):
        RocksRowStore(tmp_path / "l", SIZES)
    (tmp_path / "empty").mkdir()
    layered(tmp_path / "empty").close()


def test_a_store_has_one_opener(tmp_path: Path) -> None:
    store = layered(tmp_path / "a")
    store.write(batch_of([1], salt=1))
    with pytest.raises(StoreLockedError):
        layered(store.path)
    assert bool(store.read("users", torch.tensor([1]))[1])
    store.close()


def test_a_journal_of_other_tables_is_damage(tmp_path: Path) -> None:
    layered(tmp_path / "a").close()
    journal = Journal(tmp_path / "a" / "journal")
    journal.append({"other": batch_of([1])["users"]})
    journal.close()
    with pytest.raises(CorruptError, match="other tables"):
        layered(tmp_path / "a")


def test_a_failed_cut_keeps_the_store_closable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "planted")

    store = layered(based(tmp_path / "a", torch.arange(0, TABLE_ROWS, 2)))
    store.write(batch_of([1], salt=1))
    with monkeypatch.context() as patch:
        patch.setattr("torchrec_turbossd.store.journal.sync_directory", fail)
        with pytest.raises(StoreError, match="planted"):
            store.close()
    store.close()
    again = layered(store.path, create=False)
    assert salts(again, [1, 2]) == [1, BASE_SALT]
    again.discard()
