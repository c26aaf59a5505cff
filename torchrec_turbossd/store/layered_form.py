"""What a layered store's directory holds, and the rules for making and opening one.

The format is in docs/formats/layered.md.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchrec_turbossd.errors import ConfigError, CorruptError, ForeignDirectoryError, StoreError
from torchrec_turbossd.store import directory
from torchrec_turbossd.store.faults import os_errors, read_only_error

FORMAT = "torchrec_turbossd.layered"
FORMAT_VERSION = 1
BASE, UPDATES, BITS, JOURNAL = "base", "updates", "bits", "journal"


@dataclass(frozen=True, kw_only=True)
class LayeredTable:
    """One table of a layered store.

    number: names its files. row_bytes: bytes of one row. rows: ids below it have a bit each that says whether the row
    may have been updated. has_base: there is a flat table of its rows.
    """

    number: int
    row_bytes: int
    rows: int
    has_base: bool

    def base(self, path: Path) -> Path:
        """Its flat table in the store `path`."""
        return path / BASE / str(self.number)

    def bits(self, path: Path) -> Path:
        """Its file of bits in the store `path`."""
        return path / BITS / f"{self.number}.bits"


def tables_of(
    row_bytes: Mapping[str, int], rows: Mapping[str, int], with_base: frozenset[str] = frozenset()
) -> dict[str, LayeredTable]:
    """Descriptions of tables, numbered in order; raises `ConfigError` for sizes that make no sense."""
    check_sizes(row_bytes, rows)
    return {
        table: LayeredTable(number=i, row_bytes=size, rows=rows[table], has_base=table in with_base)
        for i, (table, size) in enumerate(row_bytes.items())
    }


def check_sizes(row_bytes: Mapping[str, int], rows: Mapping[str, int]) -> None:
    """Raise `ConfigError` unless every table has a name, and a positive number of bytes and of rows."""
    directory.check_sizes(row_bytes)
    for table in row_bytes:
        if not directory.is_size(rows.get(table)):
            raise ConfigError(f"table {table!r} needs a positive int of rows, got {rows.get(table)!r}")


def write_form(path: Path, tables: Mapping[str, LayeredTable]) -> None:
    """Make `path`, which is empty, the directory of a layered store without updates; the flat tables are put beside.

    Raises `OSError`.
    """
    (path / UPDATES).mkdir()
    # An empty row store, which RocksDB makes its files in when it is opened.
    directory.write_format(path / UPDATES, {t: table.row_bytes for t, table in tables.items()}, replace=False)
    write_tables(path, tables)


def write_tables(path: Path, tables: Mapping[str, LayeredTable]) -> None:
    """Write the format file of `path`, durably. Raises `OSError`."""
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tables": {name: asdict(table) for name, table in tables.items()},
    }
    directory.write_body(path, body, replace=False)


def read_form(path: Path) -> dict[str, LayeredTable]:
    """The tables of the layered store in `path`.

    Raises:
        ForeignDirectoryError: no format file, or one of another kind.
        FormatVersionError: a newer release wrote it.
        CorruptError: the file does not read as one.
    """
    body = directory.read_body(path, {FORMAT: FORMAT_VERSION})
    try:
        if body["format_version"] != FORMAT_VERSION:
            raise ValueError("no version")
        return {name: _table(item) for name, item in body["tables"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(
            f"{path / directory.FORMAT_FILE} lacks a version or tables ({error!r}); restore the store from a snapshot"
        ) from error


def _table(item: Any) -> LayeredTable:
    table = LayeredTable(**item)
    if not (
        directory.is_size(table.row_bytes) and directory.is_size(table.rows) and directory.is_size(table.number + 1)
    ):
        raise ValueError(f"sizes that cannot be: {item}")
    return table


def prepare(
    path: Path, row_bytes: Mapping[str, int], rows: Mapping[str, int], *, create: bool
) -> dict[str, LayeredTable]:
    """The tables of the store at `path`, after making it if `create` and there is none.

    Raises:
        ForeignDirectoryError: a file, or a directory with other things in it.
        FormatVersionError, CorruptError: see `read_form`.
        ReadOnlyStoreError: no permission to write.
        StoreError: not there, or with other tables, row sizes or numbers of rows.
    """
    if path.exists() and not path.is_dir():
        raise ForeignDirectoryError(f"{path} is a file; a row store needs a directory of its own")
    if not (path / directory.FORMAT_FILE).exists():
        _make(path, tables_of(row_bytes, rows), create=create)
    stored = read_form(path)
    _check_tables(path, stored, row_bytes, rows)
    if not os.access(path, os.W_OK):
        raise read_only_error(path, "it is not writable")
    return stored


def _make(path: Path, tables: Mapping[str, LayeredTable], *, create: bool) -> None:
    with os_errors(path):
        others = sorted(os.listdir(path)) if path.exists() else []
        if others:
            raise ForeignDirectoryError(
                f"{path} is not a row store and not empty (it holds {', '.join(others[:3])}); name a new or an empty "
                f"directory"
            )
        if not create:
            raise StoreError(f"there is no row store at {path}; open it with create=True to make one")
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        try:
            temp.mkdir()
            write_form(temp, tables)
            # Replaces an empty directory; whoever makes the same store at the same time may have come first.
            os.rename(temp, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        directory.sync_directory(path.parent)


def _check_tables(
    path: Path, stored: Mapping[str, LayeredTable], row_bytes: Mapping[str, int], rows: Mapping[str, int]
) -> None:
    missing = sorted(set(row_bytes) - set(stored))
    if missing:
        raise StoreError(
            f"the row store at {path} lacks tables {', '.join(map(repr, missing))}; it holds "
            f"{', '.join(map(repr, sorted(stored))) or 'none'}"
        )
    for table, size in row_bytes.items():
        there = (stored[table].row_bytes, stored[table].rows)
        if there != (size, rows[table]):
            raise StoreError(
                f"the row store at {path} has other sizes: {table!r} has rows of {there[0]} bytes, {there[1]} of them, "
                f"there; {size} bytes and {rows[table]} rows were asked for"
            )


__all__ = [
    "BASE",
    "BITS",
    "FORMAT",
    "FORMAT_VERSION",
    "JOURNAL",
    "UPDATES",
    "LayeredTable",
    "check_sizes",
    "prepare",
    "read_form",
    "tables_of",
    "write_form",
    "write_tables",
]
