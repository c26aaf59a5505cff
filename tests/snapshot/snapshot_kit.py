"""Hand-made snapshots: stores of shards, written part by part."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

from torchrec_turbossd.snapshot import (
    Manifest,
    Part,
    ShardRange,
    commit_snapshot,
    snapshot_part,
    staging_directory,
)
from torchrec_turbossd.store import RocksRowStore
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableShard, TableSpec

ShardRows = dict[TableShard, Rows]
"""What a rank holds: of each shard (global ids, rows)."""


def write_snapshot(
    path: Path, tables: Sequence[TableSpec], ranks: Sequence[ShardRows], *, kind: str = "training", version: int = 0
) -> Manifest:
    """Write a snapshot as ranks would: each its part, then one manifest."""
    parts, files = [], {}
    with staging_directory(path) as staging:
        for rank, shards in enumerate(ranks):
            scratch = path.with_name(f"{path.name}-rank-{rank}")
            store = RocksRowStore(scratch, {s.key: s.row_bytes for s in shards}, wal=False)
            try:
                store.write({shard.key: rows for shard, rows in shards.items()})
                files |= snapshot_part(store, staging / f"part-{rank}")
            finally:
                store.close()
            parts.append(Part(directory=f"part-{rank}", shards={s.key: ShardRange.of(s) for s in shards}))
        manifest = Manifest(
            kind=kind,
            id=uuid.uuid4().hex,
            version=version,
            tables=tuple(tables),
            parts=tuple(parts),
            files=files,
            extra={"iter": 7},
        )
        commit_snapshot(staging, path, manifest)
    return manifest


def one_table_snapshot(path: Path, table: TableSpec, rows: Rows, **options: object) -> Manifest:
    """A snapshot of one table in one part."""
    return write_snapshot(path, [table], [{TableShard.whole(table): rows}], **options)  # type: ignore[arg-type]


def row_file(path: Path) -> Path:
    """A file of `path` that holds rows."""
    return next(f for f in sorted(path.rglob("*")) if f.suffix in (".rows", ".sst"))
