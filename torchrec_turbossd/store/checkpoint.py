"""Cloning a store's directory: files that never change are linked, those that an open rewrites are copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchrec_turbossd.store import directory, linking
from torchrec_turbossd.store.faults import os_errors
from torchrec_turbossd.store.flat import IDS_SUFFIX, ROWS_SUFFIX
from torchrec_turbossd.store.layered_form import FORMAT, FORMAT_VERSION, read_form

_IMMUTABLE = (".sst", ROWS_SUFFIX, IDS_SUFFIX)
_LEFT_OUT = ("LOCK", "LOG", f".{directory.FORMAT_FILE}.")


def clone_directory(src: Path, dst: Path, *, progress: Callable[[int, int], None] | None = None) -> bool:
    """Clone the closed row store or checkpoint `src` to `dst`, which appears as a whole or not at all.

    Row files are hard links where the file system allows, so that a clone takes no space; everything else is copied,
    because RocksDB appends to it or writes it anew. A later change of either directory does not reach the other.

    Args:
        src: a closed store, or a checkpoint. One that is open for writing may be cloned torn.
        dst: must not exist yet.
        progress: called with (bytes copied, bytes to copy).

    Returns:
        True if the row files are links, False if they had to be copied.

    Raises:
        ForeignDirectoryError, FormatVersionError, CorruptError: `src` is not a row store of this release.
        StoreFullError: too little space for the files to copy; found before any is copied.
        StoreError: `dst` exists, or a file cannot be read or written.
    """
    src, dst = Path(src).absolute(), Path(dst).absolute()
    body = directory.read_body(src, {directory.FORMAT: directory.FORMAT_VERSION, FORMAT: FORMAT_VERSION})
    is_layered = body["format"] == FORMAT
    (read_form if is_layered else directory.read_format)(src)
    with os_errors(src):
        folders = sorted(f for f in src.rglob("*") if f.is_dir()) if is_layered else []
        found = [f for folder in (src, *folders) for f in sorted(folder.iterdir())]
        files = [f for f in found if f.is_file() and not f.name.startswith(_LEFT_OUT)]
    with directory.staged(dst) as temp:
        for folder in (src, *folders):
            (temp / folder.relative_to(src)).mkdir()
        rows = [f for f in files if f.suffix in _IMMUTABLE]
        linked = linking.link_all(rows, [temp / f.relative_to(src) for f in rows])
        copies = [f for f in files if not linked or f not in rows]
        linking.copy_all(copies, [temp / f.relative_to(src) for f in copies], progress)
        for folder in folders:
            directory.sync_directory(temp / folder.relative_to(src))
    return linked


__all__ = ["clone_directory"]
