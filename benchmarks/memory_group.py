"""A control group that limits a child process's memory, page cache included."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import SkipRow

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class MemoryGroup:
    """The files of a group: a process joins by writing its id to `procs`, and sets the limit by bytes to `limit`."""

    procs: Path
    limit: Path


@dataclass(frozen=True)
class _Kind:
    limit: str
    swap: str
    empty: str = ""


_V1 = _Kind("memory.limit_in_bytes", "memory.swappiness", "memory.force_empty")
_V2 = _Kind("memory.max", "memory.swap.max")
_NO_LIMIT = 1 << 40


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A group within this process's own, without a limit yet, removed at the end.

    What a process took before it joins is not counted.

    Raises `SkipRow` where none can be made, with the reason.
    """
    kind, parent = _own_group()
    group = parent / f"turbossd-bench-{os.getpid()}-{next(_NUMBERS)}"
    try:
        group.mkdir()
    except OSError as error:
        raise SkipRow(f"memory cannot be limited: {error}; run as root where control groups are writable") from error
    try:
        try:
            (group / kind.limit).write_text(str(_NO_LIMIT))
        except OSError as error:
            raise SkipRow(f"memory cannot be limited: {error}; the memory controller is not on for {parent}") from error
        with contextlib.suppress(OSError):
            (group / kind.swap).write_text("0")
        yield MemoryGroup(group / "cgroup.procs", group / kind.limit)
    finally:
        _remove(group, kind)


def set_limit(file: Path, limit_bytes: int) -> None:
    """Limit a group to which this process belongs; pages of files beyond it go.

    Raises `OSError` when more than that is held otherwise.
    """
    for attempt in range(20):
        try:
            file.write_text(str(limit_bytes))
            return
        except OSError:
            # Pages that are just being read cannot go yet.
            if attempt == 19:
                raise
            time.sleep(0.1)


def _own_group() -> tuple[_Kind, Path]:
    """The memory group that this process is in."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, point, system, options, *_ in mounts:
        if system == "cgroup" and "memory" in options.split(","):
            return _V1, _within(Path(point), [path for _, names, path in own if "memory" in names.split(",")])
    for _, point, system, *_ in mounts:
        if system == "cgroup2":
            return _V2, _within(Path(point), [path for number, _, path in own if number == "0"])
    raise SkipRow("memory cannot be limited: this machine mounts no control group with a memory controller")


def _within(point: Path, paths: list[str]) -> Path:
    """The group's folder; the mount itself where it shows only a part of the tree, as containers' do."""
    for path in paths:
        if (point / path.lstrip("/")).is_dir():
            return point / path.lstrip("/")
    return point


def _remove(group: Path, kind: _Kind) -> None:
    for _ in range(50):
        with contextlib.suppress(OSError):
            if kind.empty:
                (group / kind.empty).write_text("0")
        try:
            group.rmdir()
            return
        except OSError:
            # The process that left it is still being taken down.
            time.sleep(0.1)


__all__ = ["MemoryGroup", "memory_group", "set_limit"]
