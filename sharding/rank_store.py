"""The live row stores of one sharded module on one rank: scratch databases, made new each time."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrec_turbossd.errors import ConfigError, StoreError
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.store.rocks import RocksRowStore, remove_store
from torchrec_turbossd.store.routed import RoutedStore
from torchrec_turbossd.store.write_back import WriteBackStore
from torchrec_turbossd.tables import TableShard

_MOST_PENDING_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where the rows of SSD-backed tables live, and how they are read.

    ssd_directory: base directory, on a local SSD; each rank and module takes a sub-directory of its own. A table's
        `KeyValueParams.ssd_storage_directory` comes before it; `@local_rank` in either becomes the local rank.
    read_threads: threads that read rows, for each store.
    """

    ssd_directory: str | os.PathLike[str] | None = None
    read_threads: int = 2


class RankStores:
    """The stores of a rank's shards, one for each SSD directory that they name.

    The live store of training is scratch: it is emptied on open and never resumed; checkpoints are what is kept.

    Args:
        module: name of the sharded module in the model.
        shards: this rank's SSD-backed shards, each with its table's own SSD directory or None.
    """

    def __init__(
        self,
        options: StoreOptions,
        module: str,
        ranks: tuple[int, int],
        shards: Sequence[tuple[TableShard, str | None]],
    ) -> None:
        self._options, (self._rank, self._local_rank) = options, ranks
        self._module = re.sub(r"[^A-Za-z0-9_.-]", "_", module) or "module"
        self._stores: dict[Path, WriteBackStore] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._stores)
        tables: dict[Path, dict[str, int]] = {}
        for shard, own in shards:
            tables.setdefault(self._directory(own), {})[shard.key] = shard.row_bytes
        try:
            for path, row_bytes in tables.items():
                self._stores[path] = self._open(path, row_bytes)
        except BaseException:
            self.close()
            raise
        self._tables = tables
        self.store = RoutedStore(self._by_key())

    def _by_key(self) -> dict[str, RowStore]:
        return {key: self._stores[path] for path, keys in self._tables.items() for key in keys}

    def clear(self) -> None:
        """Remove every row."""
        for path, row_bytes in self._tables.items():
            with contextlib.suppress(StoreError):
                self._stores[path].discard()
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
        if path.is_dir() and any(path.iterdir()):
            remove_store(path)
        inner = RocksRowStore(path, row_bytes, wal=False, read_threads=self._options.read_threads)
        return WriteBackStore(inner, max_pending_bytes=_MOST_PENDING_BYTES)

    def close(self) -> None:
        """Close every store; the directories stay until the next open."""
        self._finalizer()


def _close_all(stores: dict[Path, WriteBackStore]) -> None:
    for store in stores.values():
        # Scratch: what could not be written is not wanted any more.
        with contextlib.suppress(StoreError):
            store.discard()


__all__ = ["RankStores", "StoreOptions"]
