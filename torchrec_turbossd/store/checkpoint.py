"""Cloning a store's directory: files that never change are linked, those that an open rewrites are copied."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torchrec_turbossd.errors import StoreFullError
from torchrec_turbossd.store.directory import FORMAT_FILE, read_format, staged
from torchrec_turbossd.store.faults import os_errors

_IMMUTABLE = (".sst",)
_LEFT_OUT = ("LOCK", "LOG", f".{FORMAT_FILE}.")
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)
_SPARE_BYTES = 4 << 20


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
    read_format(src)
    with os_errors(src):
        files = sorted(f for f in src.iterdir() if f.is_file() and not f.name.startswith(_LEFT_OUT))
    with staged(dst) as temp:
        temp.mkdir()
        rows = [f for f in files if f.suffix in _IMMUTABLE]
        linked = _link_all(rows, temp)
        _copy_all([f for f in files if not linked or f not in rows], temp, progress)
    return linked


def _link_all(files: list[Path], target: Path) -> bool:
    for file in files:
        try:
            os.link(file, target / file.name)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            for done in target.iterdir():
                done.unlink()
            return False
    return True


def _copy_all(files: list[Path], target: Path, progress: Callable[[int, int], None] | None) -> None:
    total = sum(f.stat().st_size for f in files)
    free = shutil.disk_usage(target).free
    if free < total + _SPARE_BYTES:
        raise StoreFullError(
            f"cloning to {target.parent} copies {total} bytes and leaves {_SPARE_BYTES} spare, {free} are free; "
            f"free some space or clone within one file system"
        )
    done = 0
    for file in files:
        with file.open("rb") as source, (target / file.name).open("xb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
            done += copy.tell()
        if progress is not None:
            progress(done, total)


__all__ = ["clone_directory"]
