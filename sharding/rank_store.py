"""The live row stores of one sharded module on one rank: scratch databases, made new each time."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import glob
import os
import re
import shutil
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.types import KeyValueParams

from torchrec_turbossd.errors import ConfigError, StoreError, StoreLockedError
from torchrec_turbossd.planner.storage import store_options
from torchrec_turbossd.store.checkpoint import clone_directory
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.store.faults import os_errors
from torchrec_turbossd.store.known_rows import KnownRowsStore
from torchrec_turbossd.store.rocks import RocksRowStore, remove_store
from torchrec_turbossd.store.rocks_options import RocksOptions
from torchrec_turbossd.store.routed import RoutedStore
from torchrec_turbossd.store.write_back import WriteBackStore
from torchrec_turbossd.tables import TableShard

_MOST_PENDING_BYTES = 256 << 20
_HONOURED = ("ssd_storage_directory", "l2_cache_size", "ssd_rocksdb_write_buffer_size")
"""Fields of TorchRec's `KeyValueParams` that say something about stores of ours."""


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where the rows of SSD-backed tables live, and how they are read.

    ssd_directory: base directory, on a local SSD; each rank and module takes a sub-directory of its own. A table's
        `KeyValueParams.ssd_storage_directory` comes before it; `@local_rank` in either becomes the local rank.
    read_threads: threads that read rows, for each store; None: a rank's share of the machine's cores, 2 to 8.
    """

    ssd_directory: str | os.PathLike[str] | None = None
    read_threads: int | None = None

    def threads(self) -> int:
        """`read_threads`, or what it stands for."""
        if self.read_threads is not None:
            return self.read_threads
        ranks = get_local_size(dist.get_world_size()) if dist.is_initialized() else 1
        return min(8, max(2, len(os.sched_getaffinity(0)) // ranks))


class RankStores:
    """The stores of a rank's shards, one for each SSD directory that they name.

    The live store of training is scratch: it is emptied on open and never resumed; checkpoints are what is kept.

    Args:
        module: name of the sharded module in the model.
        shards: this rank's SSD-backed shards, each with its table's `KeyValueParams` or None. Of these the directory,
            `l2_cache_size` (GB; on a CPU machine the block cache of the store, on a GPU the table's DRAM tier, which is
            not here) and `ssd_rocksdb_write_buffer_size` (bytes) are honoured; tables of one store get the largest. A
            warning names others that are set.
        compute_device: where slots are, a device type.
    """

    def __init__(
        self,
        options: StoreOptions,
        module: str,
        ranks: tuple[int, int],
        shards: Sequence[tuple[TableShard, KeyValueParams | None]],
        compute_device: str = "cpu",
    ) -> None:
        self._options, (self._rank, self._local_rank) = options, ranks
        self._module = re.sub(r"[^A-Za-z0-9_.-]", "_", module) or "module"
        self._stores: dict[Path, WriteBackStore] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._stores)
        tables: dict[Path, dict[str, int]] = {}
        self._rows = {shard.key: shard.table.rows for shard, _ in shards}
        self._settings: dict[Path, RocksOptions] = {}
        for shard, given in shards:
            path = self._directory(given.ssd_storage_directory if given is not None else None)
            tables.setdefault(path, {})[shard.key] = shard.row_bytes
            known = self._settings.get(path, RocksOptions(hash_write_buffers=True))
            _warn_of_unused(shard, given)
            self._settings[path] = store_options(known, given, compute_device)
        try:
            for path, row_bytes in tables.items():
                self._stores[path] = self._open(path, row_bytes)
        except BaseException:
            self.close()
            raise
        # Only now, because these directories are this process's own.
        remove_clones(tables)
        self._tables = tables
        self.store = RoutedStore(self._by_key())

    def _by_key(self) -> dict[str, RowStore]:
        return {key: self._stores[path] for path, keys in self._tables.items() for key in keys}

    def each(self) -> Iterator[tuple[Path, RowStore]]:
        """The live stores and their directories."""
        yield from self._stores.items()

    def clear(self, clones: Mapping[Path, Path] | None = None) -> None:
        """Remove every row.

        Args:
            clones: by directory of a store, what takes its place: a row store beside it, made by `clone_beside`.
        """
        for path, row_bytes in self._tables.items():
            with contextlib.suppress(StoreError):
                self._stores[path].discard()
            if clones is not None and path in clones:
                _remove(path)
                with os_errors(path):
                    os.rename(clones[path], path)
                self._stores[path] = self._opened(path, row_bytes, empty=False)
            else:
                self._stores[path] = self._open(path, row_bytes)
        self.store.replace(self._by_key())

    def _directory(self, own: str | None) -> Path:
        base = own or self._options.ssd_directory
        if not base:
            raise ConfigError(
                "tables on SSD need a directory: give the sharder ssd_directory=..., or the table "
                "KeyValueParams(ssd_storage_directory=...)"
            )
        expanded = os.fspath(base).replace("@local_rank", str(self._local_rank))
        return Path(expanded) / f"rank_{self._rank}" / self._module

    def _open(self, path: Path, row_bytes: dict[str, int]) -> WriteBackStore:
        try:
            _remove(path)
        except StoreLockedError:
            # A model that nobody can reach any more may still hold it: sharded models are cycles.
            gc.collect()
            _remove(path)
        return self._opened(path, row_bytes, empty=True)

    def _opened(self, path: Path, row_bytes: dict[str, int], *, empty: bool) -> WriteBackStore:
        rocks = RocksRowStore(
            path, row_bytes, wal=False, read_threads=self._options.threads(), options=self._settings[path]
        )
        known = KnownRowsStore(rocks, {key: self._rows[key] for key in row_bytes}, empty=empty)
        return WriteBackStore(known, max_pending_bytes=_MOST_PENDING_BYTES)

    def close(self) -> None:
        """Close every store; the directories stay until the next open."""
        self._finalizer()


def _warn_of_unused(shard: TableShard, given: KeyValueParams | None) -> None:
    unused = [
        item.name
        for item in (dataclasses.fields(given) if given is not None else ())
        if item.name not in _HONOURED and getattr(given, item.name) != item.default
    ]
    if unused:
        warnings.warn(
            f"table {shard.table.name!r}: KeyValueParams {', '.join(unused)} have no meaning for tables on SSD here; "
            f"{', '.join(_HONOURED)} do",
            stacklevel=2,
        )


def clone_beside(path: Path, source: Path) -> Path:
    """Clone the row store `source` beside the live store at `path`, for `RankStores.clear`; returns where it is.

    Made of hard links where both are on one file system. Raises as `clone_directory` does.
    """
    remove_clones([path])
    clone = _clone_of(path)
    clone_directory(source, clone)
    return clone


def remove_clones(paths: Iterable[Path]) -> None:
    """Remove what `clone_beside` made beside these stores, and what a process left that ended while it did."""
    for path in paths:
        clone = _clone_of(path)
        for found in (clone, *clone.parent.glob(f".{glob.escape(clone.name)}.*.tmp")):
            shutil.rmtree(found, ignore_errors=True)


def _clone_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.loaded")


def _remove(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        remove_store(path)


def _close_all(stores: dict[Path, WriteBackStore]) -> None:
    for store in stores.values():
        # Scratch: what could not be written is not wanted any more.
        with contextlib.suppress(StoreError):
            store.discard()


__all__ = ["RankStores", "StoreOptions", "clone_beside", "remove_clones"]
