"""Is this directory a whole snapshot? Its manifest, then its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torchrec_turbossd.errors import SnapshotError
from torchrec_turbossd.snapshot.files import check_files, file_errors, list_files
from torchrec_turbossd.snapshot.manifest import MANIFEST_FILE, Manifest, Part


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of the snapshot at `path`; its files are not looked at.

    Raises:
        SnapshotError: nothing there, no manifest (torn, or another thing), or a manifest of another product.
        FormatVersionError: a newer release wrote it.
        CorruptError: the manifest's bytes fail its digest.
        StoreError: it cannot be read.
    """
    path = Path(path)
    manifest = path / MANIFEST_FILE
    with file_errors(path):
        if not path.is_dir():
            raise SnapshotError(f"there is no snapshot at {path}: it is not a directory")
        if not manifest.is_file():
            raise SnapshotError(
                f"{path} is not a whole snapshot: it has no {MANIFEST_FILE}; writing it was cut short, or it is "
                "something else"
            )
        text = manifest.read_bytes()
    return Manifest.loads(text, str(manifest))


def verify(path: Path | str, *, deep: bool = True) -> Manifest:
    """The manifest of the snapshot at `path`, after comparing every file with it; `deep=False` reads no row file.

    Raises:
        SnapshotError, FormatVersionError, CorruptError, StoreError: as `read_manifest`.
        SnapshotError: a file is missing or was added.
        CorruptError: a file has another size or other bytes than when the snapshot was written.
    """
    path = Path(path)
    manifest = read_manifest(path)
    with file_errors(path):
        others = {f for f in list_files(path) if "/" not in f} - {MANIFEST_FILE} - set(manifest.files)
        if others:
            raise SnapshotError(f"{path} holds {', '.join(sorted(others)[:3])}, which its manifest does not name")
        folders = {f.name for f in path.iterdir() if f.is_dir()}
        unknown = sorted(folders - {p.directory for p in manifest.parts})
        if unknown:
            raise SnapshotError(f"{path} holds the folders {', '.join(unknown[:3])}, which its manifest does not name")
    verify_parts(path, manifest, manifest.parts, deep=deep)
    return manifest


def verify_parts(path: Path | str, manifest: Manifest, parts: Iterable[Part], *, deep: bool = True) -> None:
    """Compare the files of some parts of the snapshot at `path` with its manifest; raises as `verify` does.

    For several readers that share the work: one calls `verify(path, deep=False)`, and each this for its parts.
    """
    path = Path(path)
    with file_errors(path):
        for part in parts:
            check_files(path / part.directory, manifest.files_of(part), deep=deep)


__all__ = ["read_manifest", "verify", "verify_parts"]
