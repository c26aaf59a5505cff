"""A training snapshot back into a sharded model, under whatever plan the model has now."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import nn

from torchrec_turbossd.errors import SnapshotError, StoreError
from torchrec_turbossd.rows import initial_rows
from torchrec_turbossd.sharding.checkpoint import sharded_modules
from torchrec_turbossd.sharding.collective import everywhere, together
from torchrec_turbossd.sharding.local_tables import LocalTable, in_windows
from torchrec_turbossd.sharding.module import TurboSSDShardedModule
from torchrec_turbossd.sharding.progress import fused_kernels, restore_progress, saved_progress
from torchrec_turbossd.sharding.rank_store import clone_beside, remove_clones
from torchrec_turbossd.snapshot import Manifest, ShardRange, verify, verify_parts
from torchrec_turbossd.snapshot.files import check_space, file_errors
from torchrec_turbossd.snapshot.merge import Source, check_cover, merged_rows, overlaps
from torchrec_turbossd.snapshot.parts import open_parts
from torchrec_turbossd.tables import TableShard

_WINDOW_ROWS = 65536


def load_snapshot(model: nn.Module, path: str | os.PathLike[str]) -> Manifest:
    """Give every sharded table of `model` the rows and optimizer state of a training snapshot. Collective.

    World size, sharding types, tiers and slots may differ from those that saved it. Where a rank's tables on SSD are
    sharded as those of one part of the snapshot, their live store is made of hard links to it (copied across file
    systems); other rows pass through memory a window at a time. Column shards are joined and cut; see
    `torchrec_turbossd.snapshot.merge` for a row-wise state, which only unchanged columns get back exactly.

    The step count and learning rate of the fused optimizers come back too, also in `fused_optimizer.param_groups`; a
    snapshot of 0.1.0 has none, and leaves them as they are. Data-parallel tables and dense layers are the caller's
    to load: `Manifest.id` says with which snapshot they belong.

    Args:
        path: on a file system that all ranks share; it is verified first, and not changed.

    Returns:
        The manifest, with what the writer left in `extra`.

    Raises:
        SnapshotError: not a training snapshot, one without a table of the model, or one whose tables differ in rows,
            width, type, optimizer state or rule for rows never written; tables that are one group here, but were at
            different steps or learning rates; or another rank failed.
        FormatVersionError, CorruptError: see `torchrec_turbossd.snapshot.verify`.
        StoreFullError: too little space to copy a store. CacheFullError: a batch is in flight.
        ConfigError: the model has no module of this package.
            On all of these the model is unchanged.
        StoreError: a disk failed or filled while rows were copied, here or on another rank; the model must be loaded
            again.
    """
    modules = [module for _, module in sharded_modules(model)]
    group = modules[0]._env.process_group
    path = Path(path).absolute()
    manifest = together(group, lambda: verify(path, deep=False), only=0)
    # Every rank reads its share of the files.
    share = manifest.parts[dist.get_rank(group) :: dist.get_world_size(group)]
    everywhere(group, lambda: verify_parts(path, manifest, share))
    loading = _Loading(modules, manifest, path)
    try:
        everywhere(group, loading.prepare)
        try:
            everywhere(group, loading.load)
        except Exception as error:
            raise StoreError(f"the model is half loaded from {path}: load again before it is used ({error})") from error
    finally:
        loading.clean_up()
    dist.barrier(group=group)
    return manifest


@dataclass
class _Loading:
    """One load on one rank.

    clones: of each module, by the directory of a live store, what takes its place.
    left: the tables that are filled window by window, each with the directory of its live store; sources: their rows.
    """

    modules: list[TurboSSDShardedModule]
    manifest: Manifest
    path: Path
    clones: list[dict[Path, Path]] = field(default_factory=list)
    left: list[tuple[LocalTable, Path | None]] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    def prepare(self) -> None:
        """Check everything, and clone what the rows come from; changes nothing of the model."""
        if self.manifest.kind != "training":
            said = f"{self.path} is a {self.manifest.kind} snapshot"
            raise SnapshotError(f"{said}; training goes on from one of kind 'training'")
        for module in self.modules:
            self._check(module)
        for module in self.modules:
            self.clones.append({})
            for directory, shards in _live_shards(module):
                part = next((p for p in self.manifest.stores if p.shards == shards and p.store == "rocks"), None)
                if shards and part is not None:
                    self.clones[-1][directory] = clone_beside(directory, self.path / part.directory)
            self.left += _not_in(self.clones[-1], module)
        if not self.left:
            return
        # On the snapshot's own file system, where a clone is made of hard links.
        with file_errors(self.path.parent):
            scratch = Path(tempfile.mkdtemp(prefix=".turbossd-load-", dir=self.path.parent))
        self.stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        self.sources = open_parts(
            self.manifest, self.path, scratch, self.stack, lambda s: any(overlaps(s, t.shard) for t, _ in self.left)
        )

    def _check(self, module: TurboSSDShardedModule) -> None:
        module._check_open()
        for table in module._local():
            _check_table(table, self.manifest, self.path)
        for kernel in module._kernels():
            kernel.emb_module.check_idle()
        for kernel in fused_kernels(module._lookups):
            saved_progress(kernel, self.manifest.optimizer)

    def load(self) -> None:
        """Change the model."""
        for module, clones in zip(self.modules, self.clones, strict=True):
            for kernel in module._kernels():
                kernel.emb_module.forget()
            if module._stores is not None:
                module._stores.clear(clones)
            for kernel in fused_kernels(module._lookups):
                progress = saved_progress(kernel, self.manifest.optimizer)
                if progress is not None:
                    restore_progress(kernel, progress)
        for table, directory in self.left:
            _fill(table, directory, self.manifest, self.sources)

    def clean_up(self) -> None:
        """Remove every clone that took no store's place."""
        self.stack.close()
        for clones in self.clones:
            remove_clones(clones)


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
    check_cover(manifest, theirs)


def _said(value: object) -> str:
    """A field of a table in words: its optimizer state by name and kind."""
    if not isinstance(value, tuple):
        return str(value)
    return " and ".join(f"{s.name} for each {'row' if s.per_row else 'element'}" for s in value) or "nothing"


def _live_shards(module: TurboSSDShardedModule) -> Iterable[tuple[Path, dict[str, ShardRange]]]:
    """The live stores of a module: directory, and what each key holds."""
    if module._stores is None:
        return
    ranges = {t.shard.key: ShardRange.of(t.shard) for t in module._local() if t.on_ssd and t.shard.rows}
    for directory, store in module._stores.each():
        yield directory, {key: ranges[key] for key in store.row_bytes if key in ranges}


def _not_in(clones: dict[Path, Path], module: TurboSSDShardedModule) -> Iterable[tuple[LocalTable, Path | None]]:
    """The tables of a module that no clone holds, each with the directory of its live store."""
    places = {key: directory for directory, shards in _live_shards(module) for key in shards}
    for table in module._local():
        directory = places.get(table.shard.key) if table.on_ssd else None
        if table.shard.rows and (directory is None or directory not in clones):
            yield table, directory


def _fill(table: LocalTable, directory: Path | None, manifest: Manifest, sources: list[Source]) -> None:
    """Give a table its rows; one on SSD is empty."""
    shard, saved = table.shard, manifest.table(table.shard.table.name)
    if not table.on_ssd:
        # Of the values of rows never written, because a part holds only those that were.
        whole = TableShard(
            table=saved, row_offset=shard.row_offset, rows=shard.rows, col_offset=shard.col_offset, cols=shard.cols
        )
        for ids in in_windows(shard.rows, _WINDOW_ROWS):
            table.write(ids, initial_rows(whole, ids + shard.row_offset))
    for ids, rows in merged_rows(saved, sources, shard):
        if directory is not None:
            check_space(directory, rows.numel())
        table.write(ids - shard.row_offset, rows)


__all__ = ["load_snapshot"]
