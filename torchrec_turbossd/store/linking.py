"""Files that never change get another name by a hard link, or by a copy where the file system has none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torchrec_turbossd.errors import StoreFullError

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)
_SPARE_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20


def link_all(files: Sequence[Path], targets: Sequence[Path]) -> bool:
    """Link `files` to `targets`; False, and nothing is there, where they cannot be linked. Raises `OSError`."""
    for file, target in zip(files, targets, strict=True):
        try:
            os.link(file, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            for made in targets:
                made.unlink(missing_ok=True)
            return False
    return True


def copy_all(
    files: Sequence[Path], targets: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> None:
    """Copy `files` to `targets`, durably.

    Args:
        progress: called with (bytes copied, bytes to copy).

    Raises:
        StoreFullError: too little space; found before any is copied.
        OSError: a file cannot be read or written.
    """
    if not files:
        return
    total = sum(min(f.stat().st_size, f.stat().st_blocks * 512) for f in files)
    free = shutil.disk_usage(targets[0].parent).free
    if free < total + _SPARE_BYTES:
        raise StoreFullError(
            f"copying to {targets[0].parent} takes {total} bytes and leaves {_SPARE_BYTES} spare, {free} are free; "
            f"free some space or stay within one file system"
        )
    done = 0
    for file, target in zip(files, targets, strict=True):
        done += _copy(file, target)
        if progress is not None:
            progress(total if file is files[-1] else min(done, total), total)


def _copy(file: Path, target: Path) -> int:
    """Copy what is not a hole of `file`, durably; returns its bytes."""
    done = 0
    # Without a buffer, whose place in the file the search for holes would change unnoticed.
    with file.open("rb", buffering=0) as source, target.open("xb") as copy:
        for start, end in written_ranges(source.fileno()):
            source.seek(start)
            copy.seek(start)
            while start < end:
                piece = source.read(min(_PIECE_BYTES, end - start))
                if not piece:
                    break
                copy.write(piece)
                start, done = start + len(piece), done + len(piece)
        copy.truncate(os.fstat(source.fileno()).st_size)
        copy.flush()
        os.fsync(copy.fileno())
    return done


def written_ranges(handle: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of an open file that are not holes, in bytes."""
    at, end = 0, os.fstat(handle).st_size
    while at < end:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # Nothing but a hole from here on.
            return
        at = os.lseek(handle, start, os.SEEK_HOLE)
        yield start, at


def link_or_copy(files: Sequence[Path], folder: Path) -> bool:
    """Give `files` the same names in `folder`; whether they are links. Raises as `copy_all` does."""
    targets = [folder / f.name for f in files]
    linked = link_all(files, targets)
    if not linked:
        copy_all(files, targets)
    return linked


__all__ = ["copy_all", "link_all", "link_or_copy", "written_ranges"]
