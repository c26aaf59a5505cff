"""The rows that a serving module serves, and everything that changes them: updates, saving, and loading a snapshot."""

from __future__ import annotations

import contextlib
import threading
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torchrec_turbossd.errors import ClosedError, SnapshotError, TurboSSDError
from torchrec_turbossd.serving.config import ServingConfig, read_threads
from torchrec_turbossd.serving.generations import (
    ROWS,
    GenerationInfo,
    Generations,
    match_tables,
    read_info,
    remove,
    write_info,
)
from torchrec_turbossd.serving.swap import CarriedUpdates, HotRows, build_generation
from torchrec_turbossd.serving.updates import UpdateBatch
from torchrec_turbossd.snapshot import (
    Manifest,
    Part,
    ShardRange,
    commit_snapshot,
    digest_part,
    read_manifest,
    staging_directory,
)
from torchrec_turbossd.store.rocks import RocksRowStore
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.serving_rows import ServingRows

_PART = "part-0"


@dataclass
class Generation:
    """One version of the rows, open."""

    folder: Path
    info: GenerationInfo
    store: RocksRowStore

    def close(self) -> None:
        self.store.close()


class LiveRows:
    """The current generation of a module's folder, and the one that is about to replace it.

    One thread at a time updates, saves or switches, and one loads; lookups wait for neither.

    Args:
        tables: as the module was given them.

    Attributes:
        tables: the same, with the rules for rows never written of the generation served.
    """

    def __init__(self, tables: Sequence[TableSpec], config: ServingConfig) -> None:
        self._config = config
        self._loading, self._updating = threading.Lock(), threading.Lock()
        self._carried: CarriedUpdates | None = None
        self._rows: ServingRows | None = None
        self._closed = self._told = False
        self._generations = Generations(config.ssd_directory, config.name)
        try:
            self._live = self._open_current(tables)
            self.tables = self._rules(self._live.info, tables)
        except BaseException:
            self._generations.close()
            raise

    def _open_current(self, tables: Sequence[TableSpec]) -> Generation:
        folder = self._generations.current()
        if folder is not None:
            info = read_info(folder)
            match_tables(info.tables, tables, str(self._generations.path))
            return self._open(folder, info, self._config.ssd_shards)
        folder = self._generations.new()
        info = GenerationInfo(tables=tuple(self._config.with_default_row(t) for t in tables))
        write_info(folder, info)
        live = self._open(folder, info, self._config.ssd_shards)
        self._generations.name_current(folder)
        return live

    def _open(self, folder: Path, info: GenerationInfo, ssd_shards: int) -> Generation:
        sizes = {t.name: t.row_bytes for t in info.tables}
        options = self._config.rocks_options
        store = RocksRowStore(folder / ROWS, sizes, read_threads=read_threads(ssd_shards), options=options)
        return Generation(folder, info, store)

    def _rules(self, info: GenerationInfo, tables: Sequence[TableSpec]) -> list[TableSpec]:
        """`tables` with the rules for rows never written of a generation, or the module's own."""
        matched = match_tables(info.tables, tables, str(self._generations.path))
        return [self._config.with_default_row(t) for t in matched]

    @property
    def store(self) -> RocksRowStore:
        return self._live.store

    @property
    def directory(self) -> Path:
        return self._generations.path

    @property
    def version(self) -> int:
        return self._live.info.version

    @property
    def rows(self) -> ServingRows:
        """The slots in front of the store, given once by `serve`."""
        if self._rows is None:
            raise ClosedError("no slots serve these rows yet")
        return self._rows

    def serve(self, rows: ServingRows) -> None:
        """From now on `rows`, made on `store`, are the slots."""
        self._rows = rows

    def update(self, batch: UpdateBatch, version: int | None) -> bool:
        """Write rows; False when the snapshot served is not older than `version` and they were left out."""
        with self._updating:
            self.check_open()
            if self._is_stale(version):
                return False
            if any(ids.numel() for ids, _ in batch.values()):
                self.rows.update(batch)
                if self._carried is not None:
                    self._carried.add(batch, version)
            if version is not None:
                self._live.info = replace(self._live.info, version=max(self.version, version))
        return True

    def _is_stale(self, version: int | None) -> bool:
        base = self._live.info.base_version
        if version is None or base is None or version > base:
            return False
        if not self._told:
            self._told = True
            warnings.warn(
                f"an update of version {version} was left out: the snapshot served has version {base} and holds it "
                "already; pass version=None to write regardless. Said once",
                RuntimeWarning,
                stacklevel=4,
            )
        return True

    def flush(self) -> None:
        """Make every update, and the version, durable."""
        with self._updating:
            self.check_open()
            self._live.store.flush()
            write_info(self._live.folder, self._live.info)

    def save(self, path: Path | str, version: int | None) -> Manifest:
        """Write a serving snapshot; updates wait while the checkpoint is taken, not while files are read."""
        if self.directory in (Path(path).absolute(), *Path(path).absolute().parents):
            raise SnapshotError(f"{path} is within the module's own folder {self.directory}; save it elsewhere")
        with staging_directory(path) as staging:
            # The most of what is to be written is written without the lock.
            self._live.store.flush()
            with self._updating:
                self.check_open()
                info, tables = self._live.info, {t.name: t for t in self.tables}
                self._live.store.flush()
                self._live.store.checkpoint(staging / _PART)
            held = tuple(tables.get(t.name, t) for t in info.tables)
            manifest = Manifest(
                kind="serving",
                id=uuid.uuid4().hex,
                version=info.version if version is None else version,
                tables=held,
                parts=(Part(directory=_PART, shards={t.name: ShardRange.of(TableShard.whole(t)) for t in held}),),
                files=digest_part(staging / _PART),
            )
            commit_snapshot(staging, path, manifest)
        return manifest

    def load(self, path: Path, ssd_shards: int | None) -> None:
        """Make the snapshot at `path` the generation that is served, or change nothing."""
        with self._loading:
            self.check_open()
            carried = CarriedUpdates(read_manifest(path).version)
            with self._updating:
                self._carried = carried
            try:
                old = self._load(path, ssd_shards or self._config.ssd_shards, carried)
            finally:
                with self._updating:
                    self._carried = None
            old.close()
            remove(old.folder)

    def _load(self, path: Path, ssd_shards: int, carried: CarriedUpdates) -> Generation:
        folder, new = self._generations.new(), None
        try:
            info = build_generation(path, folder, self.tables)
            new = self._open(folder, info, ssd_shards)
            tables = self._rules(info, self.tables)
            shards = [TableShard.whole(t) for t in tables]
            with self._updating:
                carried.attach(new.store, [s.key for s in shards])
            hot = HotRows.read(new.store, shards, self.rows.resident())
            with self._updating:
                self.check_open()
                old = self._switch(new, hot, carried)
                self.tables, self._carried = tables, None
        except BaseException:
            if new is not None:
                new.close()
            remove(folder)
            raise
        return old

    def _switch(self, new: Generation, hot: HotRows, carried: CarriedUpdates) -> Generation:
        """Make `new` the live generation in slots, here and on disk; returns the old one."""
        if carried.failure is not None:
            raise carried.failure
        for table, resident in enumerate(self.rows.resident()):
            hot.refresh(table, resident, carried.touched(table))
        new.info = replace(new.info, version=carried.newest)
        write_info(new.folder, new.info)
        old, shards = self._live, list(self.rows.shards)
        self.rows.exchange(new.store, hot.shards, hot.rows)
        try:
            self._generations.name_current(new.folder)
        except BaseException:
            self.rows.exchange(old.store, shards, [(ids[:0], data[:0]) for ids, data in hot.rows])
            # The name may have changed before the failure.
            with contextlib.suppress(TurboSSDError):
                self._generations.name_current(old.folder)
            raise
        self._live = new
        return old

    def check_open(self) -> None:
        if self._closed:
            raise ClosedError("this serving module is closed; build a new one, with the same name to resume")

    def close(self) -> None:
        """Release everything, after a load in progress. Closing twice is allowed."""
        with self._loading, self._updating:
            if self._closed:
                return
            self._closed = True
            with contextlib.ExitStack() as stack:
                stack.callback(self._generations.close)
                if self._generations.kept:
                    stack.callback(write_info, self._live.folder, self._live.info)
                self._live.close()


__all__ = ["Generation", "LiveRows"]
