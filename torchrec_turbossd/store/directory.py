"""The format file that marks a directory as a row store, and the rules for opening one.

`TURBOSSD.json` is one JSON object: `format` ("torchrec_turbossd.store"), `format_version` (1) and `row_bytes`, the
bytes of one row by table. It is written before any row, and replaced as a whole when tables are added.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrec_turbossd.errors import (
    ConfigError,
    CorruptError,
    ForeignDirectoryError,
    FormatVersionError,
    StoreError,
)
from torchrec_turbossd.store.faults import os_errors, read_only_error

FORMAT_FILE = "TURBOSSD.json"
FORMAT = "torchrec_turbossd.store"
FORMAT_VERSION = 1
_TEMP_PREFIX = f".{FORMAT_FILE}."


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A directory under construction beside `path`, which is renamed to it when the body ends and removed if it fails.

    The body makes the directory. Raises `StoreError` where `path` exists or cannot be made.
    """
    with os_errors(path):
        if os.path.lexists(path):
            raise StoreError(f"{path} exists already; name a path that does not")
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            yield temp
            sync_directory(temp)
            os.rename(temp, path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def write_format(path: Path, row_bytes: Mapping[str, int], *, replace: bool) -> None:
    """Write the format file of `path` as a whole, durably; with `replace=False` one that exists is kept."""
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, "row_bytes": dict(row_bytes)}
    write_body(path, body, replace=replace)


def write_body(path: Path, body: Mapping[str, Any], *, replace: bool) -> None:
    """Write `body` as the format file of `path`, as `write_format` does."""
    handle, temp = tempfile.mkstemp(prefix=_TEMP_PREFIX, dir=path)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(body, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temp, 0o644)
        if replace:
            os.replace(temp, path / FORMAT_FILE)
        else:
            _link_new(temp, path / FORMAT_FILE)
    finally:
        if os.path.exists(temp):
            os.unlink(temp)
    sync_directory(path)


def _link_new(temp: str, target: Path) -> None:
    # A link fails where a rename would replace the file of whoever opens the same new directory at the same time.
    try:
        os.link(temp, target)
    except FileExistsError:
        return


def read_format(path: Path) -> dict[str, int]:
    """Bytes of one row by table of the store in `path`.

    Raises:
        ForeignDirectoryError: no format file, or one of another product.
        FormatVersionError: a newer release wrote it.
        CorruptError: the file does not read as one.
    """
    body = read_body(path, {FORMAT: FORMAT_VERSION})
    sizes = body.get("row_bytes")
    if (
        body.get("format_version") != FORMAT_VERSION
        or not isinstance(sizes, dict)
        or not all(map(is_size, sizes.values()))
    ):
        raise CorruptError(f"{path / FORMAT_FILE} lacks a version or row sizes; restore the store from a snapshot")
    return dict(sizes)


def read_body(path: Path, formats: Mapping[str, int]) -> dict[str, Any]:
    """The format file of `path`, which is one of `formats`: the newest version that this release reads by name.

    Raises as `read_format` does.
    """
    try:
        with os_errors(path):
            text = (path / FORMAT_FILE).read_bytes()
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise ForeignDirectoryError(f"{path} is not a row store: it has no {FORMAT_FILE}") from error
        raise
    try:
        body: Any = json.loads(text)
    except ValueError as error:
        raise CorruptError(f"{path / FORMAT_FILE} is not JSON ({error}); restore the store from a snapshot") from error
    newest = formats.get(str(body.get("format"))) if isinstance(body, dict) else None
    if newest is None:
        raise ForeignDirectoryError(f"{path} is not a row store: its {FORMAT_FILE} is of another format")
    version = body.get("format_version")
    if isinstance(version, int) and version > newest:
        raise FormatVersionError(
            f"{path} has store format {version}, this release reads up to {newest}; use a newer release"
        )
    return dict(body)


def is_size(value: Any) -> bool:
    """Whether `value` is a positive int."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_sizes(row_bytes: Mapping[str, int]) -> None:
    """Raise `ConfigError` unless every table has a name and a positive number of bytes."""
    for table, size in row_bytes.items():
        if not table or "\0" in table or not is_size(size):
            raise ConfigError(f"a table needs a name and a positive int of row bytes, got {table!r}: {size!r}")


def prepare(path: Path, row_bytes: Mapping[str, int], *, create: bool, read_only: bool) -> dict[str, int]:
    """Bytes of one row by table of the store at `path`, after making its directory if `create` and it is new.

    Raises:
        ForeignDirectoryError: a file, or a directory with other things in it.
        FormatVersionError, CorruptError: see `read_format`.
        ReadOnlyStoreError: no permission to write.
        StoreError: not there, or with tables or row sizes that differ from `row_bytes`.
    """
    if path.exists() and not path.is_dir():
        raise ForeignDirectoryError(f"{path} is a file; a row store needs a directory of its own")
    if not (path / FORMAT_FILE).exists():
        _make(path, row_bytes, create=create and not read_only)
    stored = read_format(path)
    _check_tables(path, stored, row_bytes, may_add=create and not read_only)
    if not os.access(path, os.W_OK):
        raise read_only_error(path, "it is not writable, which opening needs even for reading")
    return stored


def _make(path: Path, row_bytes: Mapping[str, int], *, create: bool) -> None:
    with os_errors(path):
        others = [n for n in os.listdir(path) if not n.startswith(_TEMP_PREFIX)] if path.exists() else []
        if others:
            raise ForeignDirectoryError(
                f"{path} is not a row store and not empty (it holds {', '.join(sorted(others)[:3])}); "
                f"name a new or an empty directory"
            )
        if not create:
            raise StoreError(f"there is no row store at {path}; open it with create=True to make one")
        path.mkdir(parents=True, exist_ok=True)
        write_format(path, row_bytes, replace=False)
        sync_directory(path.parent)


def _check_tables(path: Path, stored: Mapping[str, int], wanted: Mapping[str, int], *, may_add: bool) -> None:
    differ = [t for t, size in wanted.items() if stored.get(t, size) != size]
    if differ:
        raise StoreError(
            f"the row store at {path} has other row sizes: "
            + ", ".join(f"{t!r} has {stored[t]} bytes there, {wanted[t]} were asked for" for t in differ)
        )
    missing = sorted(set(wanted) - set(stored))
    if missing and not may_add:
        raise StoreError(
            f"the row store at {path} lacks tables {', '.join(map(repr, missing))}; "
            f"it holds {', '.join(map(repr, sorted(stored))) or 'none'}"
        )


__all__ = [
    "FORMAT",
    "FORMAT_FILE",
    "FORMAT_VERSION",
    "check_sizes",
    "is_size",
    "prepare",
    "read_body",
    "read_format",
    "staged",
    "sync_directory",
    "write_body",
    "write_format",
]
