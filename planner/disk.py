"""How fast the disk below a directory reads: at random in blocks of 4 KiB, and in order in blocks of 1 MiB."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from torchrec_turbossd.errors import ConfigError, ReadOnlyStoreError, StoreError, StoreFullError
from torchrec_turbossd.planner import disk_reader
from torchrec_turbossd.planner.ssd import SSD_BLOCK_BYTES

READS_AT_ONCE = 32
_LARGE = 1 << 20
_CHUNK = 16 << 20
_MOST_PROCESSES = 8
_START_S = 0.15
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """What a disk did for all processes that read it, together.

    Attributes:
        reads_per_s: random reads of 4 KiB a second.
        bytes_per_s: bytes a second of reads of 1 MiB in order.
        written_bytes_per_s: of writing the file, brought to the disk every 16 MiB.
        file_bytes: of the file that was read.
        direct: whether the reads went past the page cache.
        file_system: its kind, as far as the system says.
    """

    reads_per_s: float
    bytes_per_s: float
    written_bytes_per_s: float
    file_bytes: int
    direct: bool
    file_system: str

    @property
    def in_memory(self) -> bool:
        """Whether it is no disk at all."""
        return self.file_system in _IN_MEMORY


def free_bytes(directory: Path) -> int:
    """Bytes free for this user on the file system of a directory.

    Raises:
        ConfigError: no such directory.
    """
    if not directory.is_dir():
        raise ConfigError(f"ssd_directory must be a directory that exists, got {str(directory)!r}")
    return shutil.disk_usage(directory).free


def measure_disk(directory: Path, *, file_bytes: int, seconds: float) -> DiskSpeed:
    """Write a file of at most `file_bytes` in `directory`, and read it with 32 reads under way at a time.

    The file has no name where the file system allows that, and else loses it at once, so that nothing is left however
    the process ends. Half of `seconds` are for writing, which ends early where the disk is slow; the file is then
    smaller. Reads go past the page cache (O_DIRECT); where the file system refuses that, its pages are dropped first,
    and what is read twice may come from the cache.

    Raises:
        ConfigError: no such directory.
        ReadOnlyStoreError: a directory that may not be written.
        StoreFullError: less than 32 MiB free.
        StoreError: the disk fails.
    """
    # Half of what is free is left alone.
    size = min(file_bytes, free_bytes(directory) // 2) // _LARGE * _LARGE
    if size < _CHUNK:
        raise StoreFullError(
            errno.ENOSPC, f"{directory} has {2 * size:,} bytes free; measuring it needs {2 * _CHUNK:,}: free some"
        )
    with _nameless(directory) as file:
        start = time.monotonic()
        size = _fill(file, size, seconds / 2)
        written = size / (time.monotonic() - start)
        direct = _past_the_cache(file)
        reads = _rate(file, size, SSD_BLOCK_BYTES, disk_reader.RANDOM, seconds * 0.3)
        if not direct:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        large = _rate(file, size, _LARGE, disk_reader.IN_ORDER, seconds * 0.2)
    return DiskSpeed(
        reads_per_s=reads,
        bytes_per_s=large * _LARGE,
        written_bytes_per_s=written,
        file_bytes=size,
        direct=direct,
        file_system=_file_system(directory),
    )


def _nameless(directory: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=directory, buffering=0)
    except OSError as error:
        kind = ReadOnlyStoreError if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else StoreError
        raise kind(error.errno, f"no file can be made in {directory}: {error.strerror}") from error


def _fill(file: IO[bytes], size: int, seconds: float) -> int:
    """Write up to `size` bytes that no disk can shorten, all on the disk when it returns; returns how many."""
    draw, end, done = np.random.default_rng(0), time.monotonic() + seconds, 0
    try:
        while done < size and (done == 0 or time.monotonic() < end):
            chunk = memoryview(draw.bytes(min(_CHUNK, size - done)))
            done += len(chunk)
            while chunk:
                chunk = chunk[os.write(file.fileno(), chunk) :]
            os.fdatasync(file.fileno())
    except OSError as error:
        kind = StoreFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
        raise kind(error.errno, f"writing {size:,} bytes to measure the disk failed: {error.strerror}") from error
    return done


def _past_the_cache(file: IO[bytes]) -> bool:
    """Have all later reads of `file` go past the page cache; False where that cannot be."""
    number = file.fileno()
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    try:
        fcntl.fcntl(number, fcntl.F_SETFL, flags | os.O_DIRECT)
        # Some file systems take the flag and refuse the read.
        with mmap.mmap(-1, SSD_BLOCK_BYTES) as page:
            os.preadv(number, [page], 0)
    except OSError:
        fcntl.fcntl(number, fcntl.F_SETFL, flags)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
        return False
    return True


def _rate(file: IO[bytes], size: int, block: int, order: str, seconds: float) -> float:
    """Reads a second of all processes, which share the reads under way among them."""
    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    threads = -(-READS_AT_ONCE // processes)
    start = time.monotonic() + _START_S
    command = [sys.executable, "-I", "-S", disk_reader.__file__, os.getpid(), file.fileno(), size, block, threads]
    with contextlib.ExitStack() as stack:
        children = []
        for number in range(processes):
            words = [str(word) for word in (*command, number, processes, order, seconds, start)]
            child = subprocess.Popen(
                words, pass_fds=[file.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            children.append(stack.enter_context(child))
            # Comes before the wait for its end, so that nobody reads on when this is interrupted.
            stack.callback(child.kill)
        said = [child.communicate() for child in children]
    rates = []
    for child, (out, error) in zip(children, said, strict=True):
        if child.returncode != 0:
            raise StoreError(errno.EIO, f"reading the file that measures the disk failed: {error.strip()[-300:]}")
        count, took = out.split()
        rates.append(int(count) / float(took))
    return sum(rates)


def _file_system(directory: Path) -> str:
    """Kind of the file system that a directory is on."""
    parents = [str(parent) for parent in (directory.resolve(), *directory.resolve().parents)]
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown file system"
    # Of two mounts on one point, the later one is seen.
    kinds = {point: kind for point, kind in mounts if point in parents}
    return kinds[max(kinds, key=len)] if kinds else "an unknown file system"


__all__ = ["READS_AT_ONCE", "DiskSpeed", "free_bytes", "measure_disk"]
