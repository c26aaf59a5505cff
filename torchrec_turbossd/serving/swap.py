"""A snapshot becomes a generation: verified, and cloned or converted beside the live one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torchrec_turbossd.errors import ConfigError, SnapshotError
from torchrec_turbossd.serving.generations import CONVERTED, ROWS, GenerationInfo, match_tables, write_info
from torchrec_turbossd.snapshot import Manifest, convert_to_serving, read_manifest, verify
from torchrec_turbossd.snapshot.files import check_files
from torchrec_turbossd.store.checkpoint import clone_directory
from torchrec_turbossd.tables import TableSpec


def build_generation(snapshot: Path, folder: Path, tables: Sequence[TableSpec]) -> GenerationInfo:
    """Make the generation `folder`, which is empty, of the snapshot at `snapshot`.

    The snapshot is verified and cloned (hard links on one file system), or, where it is a training one, has several
    parts or was written by an earlier release, converted to the types of `tables`.

    Raises:
        SnapshotError, FormatVersionError, CorruptError: not a whole snapshot, or not one of these tables.
        StoreFullError, StoreError: no space, or the file system refuses.
    """
    manifest = read_manifest(snapshot)
    check_snapshot_tables(manifest, tables)
    if manifest.kind == "serving" and [part.store for part in manifest.stores] == ["layered"]:
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
    part = manifest.stores[0]
    linked = clone_directory(snapshot / part.directory, rows)
    # Linked files are the ones that were verified; copies are verified themselves.
    check_files(rows, manifest.files_of(part), deep=not linked)


__all__ = ["build_generation", "check_snapshot_tables"]
