"""The rows of a serving snapshot that were in use when it was taken, in sequential files, the hottest first."""

from __future__ import annotations

import tokenize
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.errors import CorruptError
from torchrec_turbossd.snapshot.files import file_errors
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableSpec

_WINDOW = 65536
_DAMAGED = (ValueError, EOFError, OverflowError, SyntaxError, TypeError, tokenize.TokenError, FileNotFoundError)
"""What NumPy raises for a file that is not one of its own, by where it is damaged."""


def write_hot_rows(directory: Path, hot: Iterable[tuple[TableSpec, Tensor, Callable[[Tensor], Tensor]]]) -> None:
    """Write rows to a new directory, a file of ids and one of rows for each table.

    Args:
        hot: for each table its distinct ids [N] int64, the hottest first, and what reads rows of ids
            ([M, row_bytes] uint8), which is asked for some at a time.
    """
    with file_errors(directory):
        directory.mkdir()
        for place, (table, ids, read) in enumerate(hot):
            np.save(directory / f"{place}.ids.npy", ids.numpy())
            shape = (ids.numel(), table.row_bytes)
            file = np.lib.format.open_memmap(directory / f"{place}.rows.npy", mode="w+", dtype=np.uint8, shape=shape)
            for first in range(0, ids.numel(), _WINDOW):
                file[first : first + _WINDOW] = read(ids[first : first + _WINDOW]).numpy()
            file.flush()
            (directory / f"{place}.name").write_text(table.name, encoding="utf-8")


def read_hot_rows(directory: Path, tables: Mapping[str, TableSpec]) -> dict[str, Rows]:
    """What `write_hot_rows` wrote of these tables, memory-mapped; nothing where there is no such directory.

    Raises:
        CorruptError: files that are damaged, missing or do not fit the tables. The rows are only a hint of what to
            warm, so a caller may go on without them.
        StoreError: the file system refuses.
    """
    found: dict[str, Rows] = {}
    with file_errors(directory):
        for named in sorted(directory.glob("*.name")):
            name = _name(named)
            if name in tables:
                found[name] = _read(named, tables[name])
    return found


def _name(named: Path) -> str:
    try:
        return named.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptError(
            f"hot rows beside {named} have no name: {error}; restore the snapshot from a copy"
        ) from error


def _read(named: Path, table: TableSpec) -> Rows:
    try:
        ids, rows = (np.lib.format.open_memmap(named.with_suffix(f".{kind}.npy"), mode="c") for kind in ("ids", "rows"))
    except _DAMAGED as error:
        raise CorruptError(f"hot rows beside {named} are damaged: {error}; restore the snapshot from a copy") from error
    if ids.ndim != 1 or ids.dtype != np.int64 or rows.shape != (ids.size, table.row_bytes) or rows.dtype != np.uint8:
        raise CorruptError(f"hot rows beside {named} are not rows of table {table.name!r}")
    if ids.size and not (ids.min() >= 0 and ids.max() < table.rows):
        raise CorruptError(f"hot rows beside {named} have ids outside table {table.name!r}")
    if np.unique(ids).size != ids.size:
        raise CorruptError(f"hot rows beside {named} have an id of table {table.name!r} twice")
    return torch.from_numpy(ids), torch.from_numpy(rows)


__all__ = ["read_hot_rows", "write_hot_rows"]
