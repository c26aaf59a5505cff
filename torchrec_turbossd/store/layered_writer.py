"""A layered store is made of whole tables at once: rows straight into its base, nothing through RocksDB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.store import layered_form
from torchrec_turbossd.store.directory import sync_directory
from torchrec_turbossd.store.faults import os_errors
from torchrec_turbossd.store.flat import FlatWriter
from torchrec_turbossd.store.layered_form import LayeredTable


class LayeredWriter:
    """Writes the directory of a closed layered store, from the first to the last row of each table.

    There is no store before `finish`. As a context manager it lets go of its files at the end; what was not finished is
    the caller's to delete.

    Args:
        path: must not exist; its parent must.
        row_bytes: bytes of one row by table.
        rows: rows of each table.

    Raises:
        ConfigError: sizes that make no sense.
        StoreFullError, ReadOnlyStoreError, StoreError: what the file system says, here and in every method.
    """

    def __init__(self, path: Path | str, row_bytes: Mapping[str, int], rows: Mapping[str, int]) -> None:
        self.path = Path(path).absolute()
        self._tables = layered_form.tables_of(row_bytes, rows, frozenset(row_bytes))
        self._writers: dict[str, FlatWriter] = {}
        with os_errors(self.path):
            self.path.mkdir()
            (self.path / layered_form.BASE).mkdir()

    def append(self, table: str, ids: Tensor, rows: Tensor) -> None:
        """Write rows [N, row_bytes] uint8 of `ids` [N] int64, ascending and above those of the table so far.

        Raises `InputError`, having written nothing, where they do not ascend or the table has no such row.
        """
        if ids.numel() == 0:
            return
        described = self._tables[table]
        if int(ids.max()) >= described.rows or int(ids.min()) < 0:
            raise InputError(
                f"table {table!r} has rows 0 to {described.rows - 1}, got ids {int(ids.min())} to {int(ids.max())}"
            )
        self._writer(table, described).append(ids, rows)

    def _writer(self, table: str, described: LayeredTable) -> FlatWriter:
        if table not in self._writers:
            self._writers[table] = FlatWriter(described.base(self.path), described.row_bytes)
        return self._writers[table]

    def finish(self) -> None:
        """Make the store whole and durable."""
        for table, described in self._tables.items():
            self._writer(table, described).finish()
        with os_errors(self.path):
            sync_directory(self.path / layered_form.BASE)
            layered_form.write_form(self.path, self._tables)

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> LayeredWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["LayeredWriter"]
