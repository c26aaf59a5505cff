"""A training snapshot back into a sharded model, under whatever plan the model has now."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from torchrec_turbossd.errors import SnapshotError, StoreError, UnsupportedError
from torchrec_turbossd.rows import initial_rows
from torchrec_turbossd.sharding.checkpoint import sharded_modules
from torchrec_turbossd.sharding.collective import everywhere, together
from torchrec_turbossd.sharding.embeddingbag import TurboSSDShardedEmbeddingBagCollection
from torchrec_turbossd.sharding.local_tables import LocalTable, in_windows
from torchrec_turbossd.snapshot import Manifest, Part, ShardRange, verify
from torchrec_turbossd.store.checkpoint import clone_directory
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.store.rocks import RocksRowStore

_WINDOW_ROWS = 65536


def load_snapshot(model: nn.Module, path: str | os.PathLike[str]) -> Manifest:
    """Give every sharded table of `model` the rows and optimizer state of a training snapshot. Collective.

    World size, sharding types, tiers and slots may differ from those that saved it. Rows pass through memory a window
    at a time. Data-parallel tables, dense layers and learning rates (`Manifest.extra["learning_rates"]` has those of
    tables on SSD) are the caller's to load.

    Args:
        path: on a file system that all ranks share; it is verified first, and not changed.

    Returns:
        The manifest, with what the writer left in `extra`.

    Raises:
        SnapshotError: not a training snapshot, one without a table of the model, or one whose tables differ in rows,
            width, type, optimizer state or rule for rows never written; or another rank failed.
        FormatVersionError, CorruptError: see `torchrec_turbossd.snapshot.verify`.
        CacheFullError: a batch is in flight. ConfigError: the model has no module of this package.
            On all of these the model is unchanged.
        StoreError: a disk failed while rows were copied, here or on another rank; the model must be loaded again.
    """
    modules = [module for _, module in sharded_modules(model)]
    group = modules[0]._env.process_group
    manifest = together(group, lambda: verify(Path(path)), only=0)
    everywhere(group, lambda: _check(modules, manifest, Path(path)))
    try:
        everywhere(group, lambda: _load(modules, manifest, Path(path)))
    except Exception as error:
        raise StoreError(f"the model is half loaded from {path}: load again before it is used ({error})") from error
    dist.barrier(group=group)
    return manifest


def _check(modules: list[TurboSSDShardedEmbeddingBagCollection], manifest: Manifest, path: Path) -> None:
    if manifest.kind != "training":
        raise SnapshotError(f"{path} is a {manifest.kind} snapshot; training goes on from one of kind 'training'")
    for module in modules:
        module._check_open()
        for table in module._local():
            _check_table(table, manifest, path)
        for kernel in module._kernels():
            kernel.emb_module.check_idle()


def _check_table(table: LocalTable, manifest: Manifest, path: Path) -> None:
    ours, theirs = table.shard.table, manifest.table(table.shard.table.name)
    for what in ("rows", "dim", "data_type", "state"):
        if getattr(ours, what) != getattr(theirs, what):
            raise SnapshotError(
                f"table {ours.name!r}: {what} is {_said(getattr(theirs, what))} in {path}, "
                f"{_said(getattr(ours, what))} in the model; declare the table as it was saved, with the same optimizer"
            )
    if table.on_ssd and ours.init != theirs.init:
        raise SnapshotError(
            f"table {ours.name!r}: rows never written start from {theirs.init} in {path}, from {ours.init} in the "
            "model; use the same seed and weight_init_min / weight_init_max"
        )
    shards = [s for part in manifest.parts for s in part.shards.values() if s.table == ours.name]
    if table.shard.cols != ours.dim or any(s.cols != ours.dim for s in shards):
        raise UnsupportedError(f"table {ours.name!r}: column shards cannot be loaded; shard it by table or by row")


def _said(value: object) -> str:
    """A field of a table in words: its optimizer state by name."""
    return f"{[s.name for s in value]}" if isinstance(value, tuple) else str(value)


def _load(modules: list[TurboSSDShardedEmbeddingBagCollection], manifest: Manifest, path: Path) -> None:
    tables: dict[str, list[LocalTable]] = {}
    for module in modules:
        module.forget()
        for table in module._local():
            tables.setdefault(table.shard.table.name, []).append(table)
            if not table.on_ssd:
                _fill(table, manifest)
    # On the snapshot's own file system, where a clone is made of hard links.
    scratch = Path(tempfile.mkdtemp(prefix=".turbossd-load-", dir=path.absolute().parent))
    try:
        for part in manifest.stores:
            wanted = {key: s for key, s in part.shards.items() if any(_overlap(s, t) for t in tables.get(s.table, []))}
            if wanted:
                _load_part(path / part.directory, scratch / part.directory, part, manifest, tables)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(table: LocalTable, manifest: Manifest) -> None:
    """Give a resident table the values of rows never written, because a part holds only those that were."""
    shard = table.shard
    source = type(shard)(
        table=manifest.table(shard.table.name),
        row_offset=shard.row_offset,
        rows=shard.rows,
        col_offset=shard.col_offset,
        cols=shard.cols,
    )
    for ids in in_windows(shard.rows, _WINDOW_ROWS):
        table.write(ids, initial_rows(source, ids + shard.row_offset))


def _overlap(found: ShardRange, table: LocalTable) -> bool:
    first, stop = found.row_offset, found.row_offset + found.rows
    return first < table.shard.row_offset + table.shard.rows and table.shard.row_offset < stop


def _load_part(source: Path, clone: Path, part: Part, manifest: Manifest, tables: dict[str, list[LocalTable]]) -> None:
    # Opening a store writes to its directory.
    clone_directory(source, clone)
    sizes = {key: manifest.table(s.table).row_bytes for key, s in part.shards.items()}
    store = RocksRowStore(clone, sizes, create=False, read_only=True)
    try:
        for key, found in part.shards.items():
            for table in tables.get(found.table, []):
                if _overlap(found, table):
                    _copy(store, key, table)
    finally:
        store.close()


def _copy(store: RowStore, key: str, table: LocalTable) -> None:
    first = table.shard.row_offset
    for ids, rows in _until(store, key, first, first + table.shard.rows):
        table.write(ids - first, rows)


def _until(store: RowStore, key: str, first: int, stop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for ids, rows in store.scan(key, first, _WINDOW_ROWS):
        inside = ids < stop
        if bool(inside.any()):
            yield ids[inside], rows[inside]
        if not bool(inside.all()):
            return


__all__ = ["load_snapshot"]
