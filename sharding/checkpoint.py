"""Snapshots of a whole sharded model: every rank writes its part, one manifest makes them true."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn

from torchrec_turbossd.errors import ConfigError, SnapshotError, UnsupportedError
from torchrec_turbossd.sharding.collective import everywhere, together
from torchrec_turbossd.sharding.local_tables import LocalTable, in_windows
from torchrec_turbossd.sharding.module import TurboSSDShardedModule
from torchrec_turbossd.sharding.progress import fused_kernels, merge_progress, optimizer_progress
from torchrec_turbossd.snapshot import (
    FileDigest,
    Manifest,
    OptimizerProgress,
    Part,
    ShardRange,
    check_data_types,
    commit_snapshot,
    convert_to_serving,
    new_staging,
    remove_staging,
    snapshot_part,
)
from torchrec_turbossd.snapshot.files import check_space, file_errors
from torchrec_turbossd.snapshot.merge import check_cover
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.store.rocks import RocksRowStore
from torchrec_turbossd.tables import TableSpec

_WINDOW_ROWS = 65536


@dataclass
class _RankPart:
    """What one rank has written."""

    parts: list[Part] = field(default_factory=list)
    files: dict[str, FileDigest] = field(default_factory=dict)
    tables: dict[tuple[str, str], TableSpec] = field(default_factory=dict)
    """By module and table name."""
    optimizer: list[dict[str, OptimizerProgress]] = field(default_factory=list)
    """Of each module, by table name."""


def save_snapshot(
    model: nn.Module,
    path: str | os.PathLike[str],
    kind: str = "training",
    *,
    data_types: SparseType | Mapping[str, SparseType] | None = None,
    version: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write every sharded table of `model` to a snapshot. Collective: all ranks call it, between steps.

    Tables on SSD are hard-linked (copied across file systems); resident tables of the same modules are written out, so
    that a server finds them all. The step count and learning rate of the fused optimizers go along, by table.
    Data-parallel tables and dense layers are the caller's to save, with the `id` of the manifest: after a crash the
    snapshot and the dense part of one id belong together.

    Args:
        path: must not exist, or be an empty directory, on a file system that all ranks share.
        kind: "training" (weights and optimizer state) or "serving" (weights in `data_types`, without state).
        data_types: needed for "serving", and only there: the type of all tables, such as `SparseType.INT8`, or of
            each; tables that a mapping leaves out are left out.
        version: a number that rises from one snapshot of the model to the next.
        extra: anything JSON holds, for the reader (the step, ...).

    Returns:
        The manifest, the same on every rank.

    Raises:
        ConfigError: a kind or `data_types` that makes no sense. SnapshotError: `path` is taken, shards of a table are
            at different steps or learning rates, or another rank failed. UnsupportedError: two modules have a table of
            the same name. StoreFullError: too little space for what is copied; found before it is. StoreError: the
            file system refuses.
            On any of them nothing is left at `path`. What the process group raises when another rank has ended is
            raised as it is; the snapshot may be there then, or not, but never in part.
    """
    _check_arguments(kind, data_types, version, extra)
    modules = sharded_modules(model)
    group = modules[0][1]._env.process_group
    final = Path(path).absolute()
    target = final if kind == "training" else final.with_name(f".{final.name}.training")
    final, target, staging = together(group, lambda: (final, target, _new_staging(final, target)), only=0)
    try:
        parts = everywhere(group, lambda: _write_parts(modules, staging, dist.get_rank(group)))
        manifest = together(group, lambda: _commit(staging, target, parts, version, extra or {}), only=0)
        if kind == "serving":
            types = data_types if data_types is not None else SparseType.FP32
            manifest = together(group, lambda: convert_to_serving(target, final, types), only=0)
    finally:
        if dist.get_rank(group) == 0:
            shutil.rmtree(staging, ignore_errors=True)
            if kind == "serving":
                shutil.rmtree(target, ignore_errors=True)
    return manifest


def _check_arguments(kind: str, data_types: Any, version: int, extra: Mapping[str, Any] | None) -> None:
    if kind not in ("training", "serving"):
        raise ConfigError(f"kind must be 'training' or 'serving', got {kind!r}")
    if kind == "serving":
        check_data_types(data_types)
    elif data_types is not None:
        raise ConfigError(
            f"data_types goes with kind='serving'; a training snapshot keeps its types, got {data_types!r}"
        )
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ConfigError(f"a version is an int of 0 or more, got {version!r}")
    for key, value in (extra or {}).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"extra[{key!r}] must be what JSON holds, got {type(value).__name__}: {error}") from error


def _new_staging(final: Path, target: Path) -> Path:
    if target != final:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise SnapshotError(f"{final} is taken; a snapshot needs a path of its own")
        remove_staging(target)
        shutil.rmtree(target, ignore_errors=True)
    remove_staging(final)
    return new_staging(target)


def sharded_modules(model: nn.Module) -> list[tuple[str, TurboSSDShardedModule]]:
    """The modules of `model` that this package sharded, by name; raises `ConfigError` when there is none."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TurboSSDShardedModule)]
    if not found:
        raise ConfigError("the model has no module sharded by a sharder of get_turbo_ssd_sharders; shard it first")
    return found


def _write_parts(modules: list[tuple[str, TurboSSDShardedModule]], staging: Path, rank: int) -> _RankPart:
    written = _RankPart()
    for number, (fqn, module) in enumerate(modules):
        module.flush()
        # Some ranks have no row of a small row-wise table.
        local = [t for t in module._local() if t.shard.rows]
        for table in local:
            written.tables[fqn, table.shard.table.name] = table.shard.table
        written.optimizer.append(optimizer_progress(fused_kernels(module._lookups)))
        name = f"part-{rank}-{number}"
        on_ssd = {t.shard.key: ShardRange.of(t.shard) for t in local if t.on_ssd}
        for place, (live, store) in enumerate(module._stores.each() if module._stores is not None else ()):
            shards = {key: on_ssd[key] for key in store.row_bytes if key in on_ssd}
            if shards:
                _check_copy(live, staging)
                _write_part(written, store, staging / f"{name}-{place}", shards)
        resident = [t for t in local if not t.on_ssd]
        if resident:
            _write_resident(written, resident, staging / f"{name}-resident")
    return written


def _check_copy(live: Path, staging: Path) -> None:
    """Raise `StoreFullError` where a live store's files must be copied without room; elsewhere they are links."""
    with file_errors(live):
        if live.stat().st_dev != staging.stat().st_dev:
            check_space(staging, sum(file.stat().st_size for file in live.glob("*.sst")))


def _write_part(written: _RankPart, store: RowStore, directory: Path, shards: Mapping[str, ShardRange]) -> None:
    written.files.update(snapshot_part(store, directory))
    written.parts.append(Part(directory=directory.name, shards=shards))


def _write_resident(written: _RankPart, tables: list[LocalTable], directory: Path) -> None:
    check_space(directory.parent, sum(t.shard.rows * t.shard.row_bytes for t in tables))
    scratch = directory.with_name(f".{directory.name}.scratch")
    store = RocksRowStore(scratch, {t.shard.key: t.shard.row_bytes for t in tables}, wal=False)
    try:
        for table in tables:
            for ids in in_windows(table.shard.rows, _WINDOW_ROWS):
                store.write({table.shard.key: (ids + table.shard.row_offset, table.read(ids))})
        _write_part(written, store, directory, {t.shard.key: ShardRange.of(t.shard) for t in tables})
    finally:
        store.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _by_name(ranks: list[_RankPart]) -> dict[str, TableSpec]:
    """The tables of all ranks; raises `UnsupportedError` when modules share a name, which is all a snapshot knows."""
    owners: dict[str, str] = {}
    tables: dict[str, TableSpec] = {}
    for (fqn, name), spec in sorted((item for rank in ranks for item in rank.tables.items()), key=lambda item: item[0]):
        if owners.setdefault(name, fqn) != fqn:
            raise UnsupportedError(
                f"modules {owners[name]!r} and {fqn!r} both have a table {name!r}; rename one, because a snapshot goes "
                "by table name"
            )
        tables[name] = spec
    return tables


def _commit(staging: Path, target: Path, ranks: list[_RankPart], version: int, extra: Mapping[str, Any]) -> Manifest:
    tables = _by_name(ranks)
    optimizer: dict[str, OptimizerProgress] = {}
    for progress in (found for rank in ranks for found in rank.optimizer):
        merge_progress(optimizer, progress)
    manifest = Manifest(
        kind="training",
        id=uuid.uuid4().hex,
        version=version,
        tables=tuple(tables.values()),
        parts=tuple(part for rank in ranks for part in rank.parts),
        files={name: digest for rank in ranks for name, digest in rank.files.items()},
        optimizer=optimizer,
        extra=extra,
    )
    for table in manifest.tables:
        check_cover(manifest, table)
    commit_snapshot(staging, target, manifest)
    return manifest


__all__ = ["save_snapshot", "sharded_modules"]
