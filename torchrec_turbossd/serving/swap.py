"""A snapshot becomes a generation: cloned or converted beside the live one, caught up with updates, and warmed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchrec_turbossd.errors import ConfigError, SnapshotError, StoreError
from torchrec_turbossd.serving.generations import CONVERTED, ROWS, GenerationInfo, match_tables, write_info
from torchrec_turbossd.serving.updates import UpdateBatch
from torchrec_turbossd.snapshot import Manifest, convert_to_serving, read_manifest, verify
from torchrec_turbossd.snapshot.files import check_files
from torchrec_turbossd.store.checkpoint import clone_directory
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.cached_rows import stored_rows

_WARM_ROWS = 65536


def build_generation(snapshot: Path, folder: Path, tables: Sequence[TableSpec]) -> GenerationInfo:
    """Make the generation `folder`, which is empty, of the snapshot at `snapshot`.

    The snapshot is verified and cloned (hard links on one file system), or, where it is a training one or has several
    parts, converted to the types of `tables`.

    Raises:
        SnapshotError, FormatVersionError, CorruptError: not a whole snapshot, or not one of these tables.
        StoreFullError, StoreError: no space, or the file system refuses.
    """
    manifest = read_manifest(snapshot)
    check_snapshot_tables(manifest, tables)
    if manifest.kind == "serving" and len(manifest.parts) == 1:
        _clone(verify(snapshot), snapshot, folder / ROWS)
    else:
        manifest = convert_to_serving(snapshot, folder / CONVERTED, {t.name: t.data_type for t in tables})
        (folder / CONVERTED / manifest.parts[0].directory).rename(folder / ROWS)
        shutil.rmtree(folder / CONVERTED)
    info = GenerationInfo(tables=manifest.tables, version=manifest.version, base_version=manifest.version)
    write_info(folder, info)
    return info


def check_snapshot_tables(manifest: Manifest, tables: Sequence[TableSpec]) -> None:
    """Raise `SnapshotError` unless the snapshot holds `tables`; a training one may have them in another type."""
    held = [manifest.table(t.name) for t in tables]
    if manifest.kind == "training":
        for ours, theirs in zip(tables, held, strict=True):
            if (ours.rows, ours.dim) != (theirs.rows, theirs.dim):
                raise SnapshotError(
                    f"table {ours.name!r} has {theirs.rows} x {theirs.dim} values in the snapshot, "
                    f"{ours.rows} x {ours.dim} here"
                )
        return
    try:
        match_tables(held, tables, "the snapshot")
    except ConfigError as error:
        raise SnapshotError(str(error)) from error


def _clone(manifest: Manifest, snapshot: Path, rows: Path) -> None:
    part = manifest.parts[0]
    linked = clone_directory(snapshot / part.directory, rows)
    # Linked files are the ones that were verified; copies are verified themselves.
    check_files(rows, manifest.files_of(part), deep=not linked)


class CarriedUpdates:
    """Updates that arrive while a generation is made, written to it as well once it is open.

    The caller holds the module's updating lock in every method.

    Args:
        version: the snapshot's; updates that are not newer are in it already.
    """

    def __init__(self, version: int) -> None:
        self.version = self.newest = version
        self.failure: StoreError | None = None
        self._store: RowStore | None = None
        self._keys: list[str] = []
        self._waiting: list[UpdateBatch] = []
        self._touched: dict[int, list[Tensor]] = {}

    def add(self, batch: UpdateBatch, version: int | None) -> None:
        """Carry an update that the live generation has taken. A store that fails fails the load, not the update."""
        if version is not None and version <= self.version:
            return
        self.newest = max(self.newest, version or 0)
        for table, (ids, _) in batch.items():
            self._touched.setdefault(table, []).append(ids)
        if self._store is None:
            self._waiting.append(batch)
        elif self.failure is None:
            try:
                self._write(batch)
            except StoreError as error:
                self.failure = error

    def attach(self, store: RowStore, keys: Sequence[str]) -> None:
        """The new generation is open: write what has waited; `keys` are its tables'."""
        self._store, self._keys = store, list(keys)
        for batch in self._waiting:
            self._write(batch)
        self._waiting.clear()
        self._touched.clear()

    def _write(self, batch: UpdateBatch) -> None:
        if self._store is not None:
            self._store.write({self._keys[table]: rows for table, rows in batch.items()})

    def touched(self, table: int) -> Tensor:
        """Ids of a table that were carried since `attach`, with repeats."""
        return torch.cat([*self._touched.get(table, []), torch.empty(0, dtype=torch.int64)])


@dataclass
class HotRows:
    """Rows of a new generation that will take the place of those in slots, by table: (ids ascending, rows)."""

    store: RowStore
    shards: list[TableShard]
    rows: list[Rows]

    @classmethod
    def read(cls, store: RowStore, shards: Sequence[TableShard], resident: Sequence[Tensor]) -> HotRows:
        """Read the rows with ids `resident` of each table."""
        hot = cls(store, list(shards), [])
        hot.rows = [hot._read(table, ids.sort().values) for table, ids in enumerate(resident)]
        return hot

    def refresh(self, table: int, resident: Tensor, touched: Tensor) -> None:
        """Read again what was `touched`, and what came into slots since."""
        ids, rows = self.rows[table]
        old = ids[torch.isin(ids, touched)]
        if old.numel():
            rows[torch.searchsorted(ids, old)] = self._read(table, old)[1]
        came = resident[~torch.isin(resident, ids)]
        if came.numel():
            more_ids, more_rows = self._read(table, came)
            # Order matters no more; ids stay distinct.
            self.rows[table] = torch.cat([ids, more_ids]), torch.cat([rows, more_rows])

    def _read(self, table: int, ids: Tensor) -> Rows:
        shard = self.shards[table]
        whole = torch.empty(ids.numel(), shard.row_bytes, dtype=torch.uint8)
        for first in range(0, ids.numel(), _WARM_ROWS):
            window = slice(first, first + _WARM_ROWS)
            whole[window] = stored_rows(self.store, shard, ids[window])
        return ids, whole


__all__ = ["CarriedUpdates", "HotRows", "build_generation", "check_snapshot_tables"]
