"""Fixtures of the row store's tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.store_kit import KINDS, Maker
from torchrec_turbossd.store import RowStore


@pytest.fixture(params=KINDS)
def maker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(request.param, tmp_path)
    yield maker
    for store in maker.made:
        store.close()


@pytest.fixture
def store(maker: Maker) -> RowStore:
    return maker.make()


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command here")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    path = tmp_path / "small_disk"
    path.mkdir()
    _mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def read_only_mount(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(a directory, the same one mounted read-only)."""
    path, mounted = tmp_path / "writable", tmp_path / "read_only"
    path.mkdir()
    mounted.mkdir()
    _mount("--bind", str(path), str(mounted))
    try:
        _mount("-o", "remount,ro,bind", str(mounted))
        yield path, mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)
