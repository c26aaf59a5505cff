"""The rows that a serving module serves, and everything that changes them: updates, saving, and loading a snapshot."""

from __future__ import annotations

import contextlib
import threading
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchrec_turbossd.errors import ClosedError, SnapshotError, StoreError, TurboSSDError
from torchrec_turbossd.serving.builder import GenerationBuilder
from torchrec_turbossd.serving.carried import CarriedUpdates
from torchrec_turbossd.serving.config import ServingConfig, read_threads
from torchrec_turbossd.serving.following import Following, OpenGeneration
from torchrec_turbossd.serving.generations import (
    ROWS,
    GenerationInfo,
    Generations,
    match_tables,
    read_info,
    remove,
    write_info,
)
from torchrec_turbossd.serving.swap import build_generation
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
from torchrec_turbossd.snapshot.hot import read_hot_rows, write_hot_rows
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.store.layered import LayeredRowStore
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.served_rows import ServedRows
from torchrec_turbossd.tbe.successor import Successor

_PART, _HOT = "part-0", "hot"


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
        self._building: GenerationBuilder | None = None
        self._plain = list(tables)
        self._rows: ServedRows | None = None
        self._closed = self._told = False
        self._generations = Generations(config.ssd_directory, config.name)
        try:
            self._live = self._open_current(tables)
            self.tables = self._rules(self._live.info, tables)
        except BaseException:
            self._generations.close()
            raise

    def _open_current(self, tables: Sequence[TableSpec]) -> OpenGeneration:
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

    def _open(self, folder: Path, info: GenerationInfo, ssd_shards: int) -> OpenGeneration:
        sizes = {t.name: t.row_bytes for t in info.tables}
        options = self._config.rocks_options
        rows = {t.name: t.rows for t in info.tables}
        threads = read_threads(ssd_shards)
        store = LayeredRowStore(folder / ROWS, sizes, rows, read_threads=threads, options=options)
        return OpenGeneration(folder, info, store)

    def _rules(self, info: GenerationInfo, tables: Sequence[TableSpec]) -> list[TableSpec]:
        """`tables` with the rules for rows never written of a generation, or the module's own."""
        matched = match_tables(info.tables, tables, str(self._generations.path))
        return [self._config.with_default_row(t) for t in matched]

    @property
    def store(self) -> LayeredRowStore:
        return self._live.store

    @property
    def directory(self) -> Path:
        return self._generations.path

    @property
    def version(self) -> int:
        return self._live.info.version

    @property
    def rows(self) -> ServedRows:
        """The slots in front of the store, given once by `serve`."""
        if self._rows is None:
            raise ClosedError("no slots serve these rows yet")
        return self._rows

    def serve(self, rows: ServedRows) -> None:
        """From now on `rows`, made on `store`, are the slots."""
        self._rows = rows

    def update(self, batch: UpdateBatch, version: int | None) -> bool:
        """Write rows; False when the snapshot served is not older than `version` and they were left out."""
        with self._updating:
            self.check_open()
            if self._is_stale(version):
                return False
            if any(ids.numel() for ids, _ in batch.values()):
                with contextlib.nullcontext() if self._carried is None else self._carried.carrying(batch, version):
                    self.rows.update(batch)
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
            # Without the lock: most of what is pending is applied while updates go on.
            with contextlib.suppress(ClosedError):
                self._live.store.drain()
            with self._updating:
                self.check_open()
                info, tables = self._live.info, {t.name: t for t in self.tables}
                self._live.store.flush()
                self._live.store.checkpoint(staging / _PART)
                self._write_hot(staging / _HOT)
            held = tuple(tables.get(t.name, t) for t in info.tables)
            shards = {t.name: ShardRange.of(TableShard.whole(t)) for t in held}
            manifest = Manifest(
                kind="serving",
                id=uuid.uuid4().hex,
                version=info.version if version is None else version,
                tables=held,
                parts=(
                    Part(directory=_PART, shards=shards, store="layered"),
                    Part(directory=_HOT, shards={}, store="hot"),
                ),
                files=digest_part(staging / _PART) | digest_part(staging / _HOT),
            )
            commit_snapshot(staging, path, manifest)
        return manifest

    def _write_hot(self, directory: Path) -> None:
        """Write the hotter half of the rows in slots: a swap can have so many ready before it serves them."""
        hot = enumerate(zip(self.tables, self.rows.resident(), strict=True))
        write_hot_rows(
            directory,
            ((spec, ids[: (ids.numel() + 1) // 2], partial(self.rows.read_rows, place)) for place, (spec, ids) in hot),
        )

    def load(self, path: Path, ssd_shards: int | None) -> None:
        """Make the snapshot at `path` the generation that is served, or change nothing."""
        if self._building is not None:
            raise StoreError("a generation is being built; commit or abort it before a snapshot is loaded")
        with self._loading:
            self.check_open()
            following = Following(CarriedUpdates(read_manifest(path).version))
            try:
                self._carry(following)
                info = build_generation(path, following.begin(self._generations.new()), self.tables)
                self._attach(following, info, ssd_shards or self._config.ssd_shards)
                self._put_in_place(following, _hot_rows(path / _HOT, info))
            except BaseException:
                self._undo(following)
                raise

    def begin(self, version: int) -> GenerationBuilder:
        """Begin a generation without rows, which is filled by updates of its own."""
        if not self._loading.acquire(blocking=False):
            raise StoreError("another generation is being loaded or built; wait for that, commit it or abort it")
        following = Following(CarriedUpdates(version))
        try:
            self.check_open()
            self._carry(following)
            tables = tuple(self._config.with_default_row(t) for t in self._plain)
            info = GenerationInfo(tables=tables, version=version, base_version=version)
            write_info(following.begin(self._generations.new()), info)
            successor = self._attach(following, info, self._config.ssd_shards)
        except BaseException:
            self._undo(following)
            self._loading.release()
            raise
        self._building = builder = GenerationBuilder(
            successor,
            commit=lambda: self._put_in_place(following, {}),
            discard=lambda: self._undo(following),
            end=self._end_building,
        )
        if self._closed:
            # Who closes did not see this builder, and waits for it.
            builder.abort()
            self.check_open()
        return builder

    def _end_building(self) -> None:
        self._building = None
        self._loading.release()

    def _carry(self, following: Following) -> None:
        with self._updating:
            self._carried = following.carried

    def _attach(self, following: Following, info: GenerationInfo, ssd_shards: int) -> Successor:
        """Open a generation that lies in its folder, and bring it what is updated from now on."""
        new = following.generation = self._open(following.open_folder, info, ssd_shards)
        shards = [TableShard.whole(t) for t in self._rules(info, self.tables)]
        successor = following.successor = Successor(self.rows, new.store, shards)
        with self._updating:
            following.carried.attach(successor)
        return successor

    def _undo(self, following: Following) -> None:
        """Leave nothing of a generation, unless it is served already."""
        if following.generation is not None and following.generation is self._live:
            return
        with self._updating:
            # First of all: an update must not be carried into slots that are given back.
            self._carried = None
        if following.successor is not None:
            following.successor.abandon()
        if following.generation is not None:
            following.generation.store.discard()
        if following.folder is not None and following.folder != self._generations.current():
            remove(following.folder)

    def _put_in_place(self, following: Following, stored: Mapping[str, Rows]) -> None:
        """Warm a generation and serve it; what fails before it is served leaves the old one served.

        The rows in slots are the hottest here; `stored` ones, hot where the snapshot was taken, come after them.
        """
        successor, hot = following.open_successor, self.rows.resident()
        successor.squeeze()
        hot = [_first_then(now, before) for now, before in zip(self.rows.resident(), hot, strict=True)]
        for table, spec in enumerate(self.tables):
            successor.warm(table, hot[table])
            if spec.name in stored:
                successor.warm(table, *stored[spec.name])
                hot[table] = _first_then(hot[table], stored[spec.name][0])
        following.open_generation.store.flush()
        with self._updating:
            self.check_open()
            old = self._switch(following)
        try:
            successor.retire()
            # The rest of the slots were the old generation's until now. Rows that cannot be read are not warm.
            with contextlib.suppress(TurboSSDError):
                for table, ids in enumerate(hot):
                    self.rows.warm(table, ids)
        finally:
            old.store.discard()
            remove(old.folder)

    def _switch(self, following: Following) -> OpenGeneration:
        """Make a generation the live one, on disk and in slots; returns the old one."""
        following.carried.raise_failure()
        new = following.open_generation
        new.info = replace(new.info, version=following.carried.newest)
        write_info(new.folder, new.info)
        new.store.flush()
        old, tables = self._live, self._rules(new.info, self.tables)
        try:
            self._generations.name_current(new.folder)
        except TurboSSDError:
            # The name may have changed before the failure. What is named is what is served.
            with contextlib.suppress(TurboSSDError):
                self._generations.name_current(old.folder)
            if self._generations.current() != new.folder:
                raise
        following.open_successor.take_over()
        self._live, self.tables, self._carried = new, tables, None
        return old

    def check_open(self) -> None:
        if self._closed:
            raise ClosedError("this serving module is closed; build a new one, with the same name to resume")

    def close(self) -> None:
        """Release everything, after a load in progress. Closing twice is allowed."""
        first, self._closed = not self._closed, True
        builder = self._building
        if builder is not None:
            builder.abort()
        with self._loading, self._updating:
            if not first:
                return
            with contextlib.ExitStack() as stack:
                stack.callback(self._generations.close)
                if self._generations.kept:
                    stack.callback(write_info, self._live.folder, self._live.info)
                # Where closing fails, the journal keeps what could not be applied for the next opening.
                stack.callback(self._live.store.discard)
                self._live.close()


def _hot_rows(path: Path, info: GenerationInfo) -> dict[str, Rows]:
    """Hot rows of a snapshot; those that do not fit are left out, since they only save time."""
    try:
        return read_hot_rows(path, {t.name: t for t in info.tables})
    except TurboSSDError as error:
        warnings.warn(f"the snapshot's hot rows are not used: {error}", RuntimeWarning, stacklevel=5)
        return {}


def _first_then(first: Tensor, then: Tensor) -> Tensor:
    """Ids [N] and those of another order that are not among them."""
    return torch.cat([first, then[~torch.isin(then, first)]])


__all__ = ["LiveRows"]
