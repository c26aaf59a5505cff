"""A snapshot is whole or it is none: writing, reading and every kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.snapshot.snapshot_kit import one_table_snapshot, row_file
from torchrec_turbossd.errors import CorruptError, FormatVersionError, SnapshotError, TurboSSDError
from torchrec_turbossd.snapshot import (
    MANIFEST_FILE,
    Manifest,
    OptimizerProgress,
    Part,
    ShardRange,
    commit_snapshot,
    new_staging,
    read_manifest,
    snapshot_part,
    staging_directory,
    verify,
)
from torchrec_turbossd.snapshot.manifest import FORMAT_VERSION
from torchrec_turbossd.store import MemoryRowStore
from torchrec_turbossd.tables import InitRule, StateSpec, TableSpec

TABLE = TableSpec(
    name="a", rows=50, dim=4, state=(StateSpec(name="momentum1", per_row=True),), init=InitRule(seed=3, high=1.0)
)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    rows = torch.randint(0, 255, (20, TABLE.row_bytes), dtype=torch.uint8)
    one_table_snapshot(tmp_path / "snap", TABLE, (torch.arange(20), rows), version=5)
    return tmp_path / "snap"


def test_manifest_survives_the_file(snapshot: Path) -> None:
    manifest = verify(snapshot)
    assert (manifest.kind, manifest.version, manifest.tables, manifest.extra) == ("training", 5, (TABLE,), {"iter": 7})
    assert Manifest.loads(manifest.dumps(), "here") == manifest
    assert manifest.parts[0].shards["a"] == ShardRange(table="a", rows=50, cols=4)


def test_format_1_has_no_optimizer_and_an_old_name(snapshot: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        del body["optimizer"]
        body["format_version"] = 1
        body["tables"][0]["state"] = [{"name": "momentum1", "per_row": False}, {"name": "momentum2", "per_row": True}]

    edit_manifest(snapshot, change, sign=True)
    manifest = read_manifest(snapshot)
    assert manifest.optimizer == {} and manifest.format_version == 1
    assert [(s.name, s.per_row) for s in manifest.tables[0].state] == [("momentum1", False), ("exp_avg_sq", True)]


@pytest.mark.parametrize("field", ["iter", "learning_rate", "next_learning_rate"])
def test_an_optimizer_has_all_its_fields(snapshot: Path, field: str) -> None:
    progress = OptimizerProgress(iter=3, learning_rate=0.1, next_learning_rate=0.2)
    manifest = replace(read_manifest(snapshot), optimizer={"a": progress})
    assert Manifest.loads(manifest.dumps(), "here").optimizer == {"a": progress}
    with pytest.raises(SnapshotError, match="'b'"):
        replace(manifest, optimizer={"b": progress})
    (snapshot / MANIFEST_FILE).write_text(manifest.dumps())
    edit_manifest(snapshot, lambda body: body["optimizer"]["a"].pop(field), sign=True)
    with pytest.raises(CorruptError, match="lacks a field"):
        read_manifest(snapshot)


def test_extra_may_hold_what_json_holds() -> None:
    extra = {"lr": 0.1, "nested": {3: [1, None]}, "10": 1, "9": 2}
    parts = (Part(directory="p", shards={}),)
    manifest = Manifest(kind="training", id="x", version=0, tables=(TABLE,), parts=parts, files={}, extra=extra)
    read = Manifest.loads(manifest.dumps(), "here")
    assert read.extra == json.loads(json.dumps(extra))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool) -> None:
    """Change the manifest's JSON; with `sign` its digest fits again."""
    file = path / MANIFEST_FILE
    body = json.loads(file.read_text())
    change(body)
    if sign:
        from torchrec_turbossd.snapshot.manifest import _digest

        body.pop("digest")
        body["digest"] = _digest(body)
    file.write_text(json.dumps(body))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def remove_manifest(path: Path) -> None:
    (path / MANIFEST_FILE).unlink()


def foreign(path: Path) -> None:
    (path / MANIFEST_FILE).write_text('{"format": "another"}')


def newer(path: Path) -> None:
    edit_manifest(path, lambda body: body.update(format_version=FORMAT_VERSION + 1), sign=False)


def short_file(path: Path) -> None:
    file = row_file(path)
    file.write_bytes(file.read_bytes()[:-1])


def missing_file(path: Path) -> None:
    row_file(path).unlink()


def added_file(path: Path) -> None:
    (path / "part-0" / "LOG").write_text("opened")


def added_beside(path: Path) -> None:
    (path / "notes.txt").write_text("x")


def added_folder(path: Path) -> None:
    (path / "part-7").mkdir()


def flipped_row(path: Path) -> None:
    flip(row_file(path), 100)


def flipped_manifest(path: Path) -> None:
    file = path / MANIFEST_FILE
    flip(file, file.read_text().index('"version": 5') + len('"version": '))


def garbled_manifest(path: Path) -> None:
    (path / MANIFEST_FILE).write_bytes(b"\xff\x00{")


def linked_file(path: Path) -> None:
    file = row_file(path)
    shutil.move(file, path.parent / "elsewhere.sst")
    file.symlink_to(path.parent / "elsewhere.sst")


def outside(path: Path) -> None:
    def change(body: dict[str, object]) -> None:
        body["files"]["../outside"] = [1, "0" * 64]  # type: ignore[index]

    edit_manifest(path, change, sign=True)


def unknown_table(path: Path) -> None:
    edit_manifest(path, lambda body: body["parts"][0]["shards"]["a"].update(table="z"), sign=True)  # type: ignore[index]


def no_tables(path: Path) -> None:
    edit_manifest(path, lambda body: body.pop("tables"), sign=True)


DAMAGE: list[tuple[Callable[[Path], None], type[TurboSSDError], str]] = [
    (shutil.rmtree, SnapshotError, "not a directory"),
    (remove_manifest, SnapshotError, "no MANIFEST.json"),
    (foreign, SnapshotError, "not a snapshot manifest"),
    (newer, FormatVersionError, "format 3, this release reads up to 2"),
    (short_file, CorruptError, "bytes, its manifest says"),
    (missing_file, SnapshotError, "lacks"),
    (added_file, SnapshotError, "LOG"),
    (added_beside, SnapshotError, "notes.txt"),
    (added_folder, SnapshotError, "part-7"),
    (flipped_row, CorruptError, "does not match its digest"),
    (flipped_manifest, CorruptError, "own digest"),
    (garbled_manifest, CorruptError, "not JSON"),
    (linked_file, SnapshotError, "link"),
    (outside, SnapshotError, "lie under it"),
    (unknown_table, SnapshotError, "no table 'z'"),
    (no_tables, CorruptError, "lacks a field"),
]


@pytest.mark.parametrize(("damage", "error", "said"), DAMAGE, ids=[d.__name__ for d, *_ in DAMAGE])
def test_damage_is_found(damage: Callable[[Path], None], error: type[TurboSSDError], said: str, snapshot: Path) -> None:
    damage(snapshot)
    with pytest.raises(error, match=said):
        verify(snapshot)


def test_every_flipped_bit_of_a_manifest_is_found(snapshot: Path) -> None:
    file = snapshot / MANIFEST_FILE
    whole = file.read_bytes()
    for at in range(0, len(whole), 23):
        flip(file, at)
        with pytest.raises(TurboSSDError):
            read_manifest(snapshot)
        file.write_bytes(whole)
    read_manifest(snapshot)


def test_commit_refuses_a_path_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "snap").mkdir()
    one_table_snapshot(tmp_path / "snap", TABLE, (torch.arange(0), torch.empty(0, TABLE.row_bytes).byte()))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SnapshotError, match="not empty"):
        new_staging(tmp_path / "snap")
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match="not a directory"):
        new_staging(tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "file"])


def test_nothing_is_there_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryRowStore({"a": TABLE.row_bytes})
    parts = (Part(directory="part-0", shards={"a": ShardRange(table="a", rows=50, cols=4)}),)
    path = tmp_path / "snap"

    def fail(*_: object) -> None:
        raise OSError("planted")

    with staging_directory(path) as staging:
        files = snapshot_part(store, staging / "part-0")
        manifest = Manifest(kind="training", id="x", version=0, tables=(TABLE,), parts=parts, files=files)
        with monkeypatch.context() as patch:
            patch.setattr("torchrec_turbossd.snapshot.write.os.rename", fail)
            with pytest.raises(TurboSSDError, match="planted"):
                commit_snapshot(staging, path, manifest)
        assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_commit_compares_the_parts_with_the_manifest(tmp_path: Path) -> None:
    store = MemoryRowStore({"a": TABLE.row_bytes})
    parts = (Part(directory="part-0", shards={"a": ShardRange(table="a", rows=50, cols=4)}),)
    with staging_directory(tmp_path / "snap") as staging:
        files = snapshot_part(store, staging / "part-0")
        lost = {**files, "part-0/other": (1, "0")}
        manifest = Manifest(kind="training", id="x", version=0, tables=(TABLE,), parts=parts, files=lost)
        with pytest.raises(SnapshotError, match="other"):
            commit_snapshot(staging, tmp_path / "snap", manifest)
    assert not (tmp_path / "snap").exists()
