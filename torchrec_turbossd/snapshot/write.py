"""Writing a snapshot: parts into a staging directory, then one rename that makes it true."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_turbossd.errors import SnapshotError
from torchrec_turbossd.snapshot.files import (
    check_files,
    digest_files,
    file_errors,
    list_files,
    sync_file,
    sync_tree,
    write_durably,
)
from torchrec_turbossd.snapshot.manifest import MANIFEST_FILE, FileDigest, Manifest
from torchrec_turbossd.store.contract import RowStore


def new_staging(path: Path | str) -> Path:
    """Make an empty directory beside `path`, on its file system, for the snapshot that will be there.

    Raises:
        SnapshotError: `path` is taken.
        StoreError: the directory cannot be made.
    """
    path = Path(path).absolute()
    with file_errors(path):
        _check_free(path)
        staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.staging")
        staging.mkdir(parents=True)
    return staging


def remove_staging(path: Path | str) -> None:
    """Remove what writers of a snapshot at `path` left that were killed; there must be none at work."""
    path = Path(path).absolute()
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.staging")
    with file_errors(path):
        for found in path.parent.iterdir() if path.parent.is_dir() else ():
            if left.fullmatch(found.name):
                shutil.rmtree(found)


@contextmanager
def staging_directory(path: Path | str) -> Iterator[Path]:
    """`new_staging`, removed at the end whatever is left of it."""
    staging = new_staging(path)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def snapshot_part(store: RowStore, directory: Path | str) -> dict[str, FileDigest]:
    """Checkpoint `store` into `directory`, which must not exist yet, durably.

    Returns:
        (bytes, SHA-256) of each file by its path from the parent of `directory` ("part-0/000012.sst"), so that what
        all ranks return is, put together, the manifest's `files`.
    """
    store.flush()
    store.checkpoint(Path(directory).absolute())
    return digest_part(directory)


def digest_part(directory: Path | str) -> dict[str, FileDigest]:
    """The second half of `snapshot_part`, for a caller that took the checkpoint itself, under a lock of its own."""
    directory = Path(directory).absolute()
    with file_errors(directory):
        sync_tree(directory)
        digests = digest_files(directory, list_files(directory))
    return {f"{directory.name}/{name}": digest for name, digest in digests.items()}


def commit_snapshot(staging: Path | str, path: Path | str, manifest: Manifest) -> None:
    """Make the parts in `staging` the snapshot at `path`: write the manifest last, then rename.

    Before the rename there is nothing at `path`; after it everything, durably.

    Args:
        staging: what `new_staging(path)` gave.
        path: must not exist, or be an empty directory.

    Raises:
        SnapshotError: `path` is taken, or `staging` lacks a file of the manifest or holds another.
        CorruptError: a file has another size than the manifest says.
        StoreError: the file system refuses.
    """
    staging, path = Path(staging).absolute(), Path(path).absolute()
    with file_errors(path):
        _check_free(path)
        for part in manifest.parts:
            check_files(staging / part.directory, manifest.files_of(part), deep=False)
        sync_tree(staging)
        write_durably(staging / MANIFEST_FILE, manifest.dumps())
        # Replaces an empty directory, and fails on any other: whoever came first wins.
        os.rename(staging, path)
        sync_file(path.parent)


def _check_free(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise SnapshotError(f"{path} is not empty; a snapshot needs a path of its own")
    elif os.path.lexists(path):
        raise SnapshotError(f"{path} is not a directory; a snapshot needs a path of its own")


__all__ = [
    "commit_snapshot",
    "digest_part",
    "new_staging",
    "remove_staging",
    "snapshot_part",
    "staging_directory",
]
