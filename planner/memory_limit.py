"""How much DRAM this process may take: the machine's, or less where a control group limits it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_FILES = {"cgroup": "memory.limit_in_bytes", "cgroup2": "memory.max"}


def dram_bytes(proc: Path = Path("/proc")) -> tuple[int, str]:
    """Bytes of DRAM, and what says so: "MemTotal" or "the control group's limit".

    The least of MemTotal and the limits of this process's control groups and those above, version 1 and 2.
    """
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read(proc / "meminfo"), re.MULTILINE)
    total = int(found.group(1)) << 10 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min(_limits(proc), default=total)
    return (limit, "the control group's limit") if limit < total else (total, "MemTotal")


def _limits(proc: Path) -> Iterator[int]:
    own = [line.split(":", 2) for line in _read(proc / "self" / "cgroup").splitlines()]
    for line in _read(proc / "self" / "mounts").splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            paths = [path for _, names, path in own if "memory" in names.split(",")]
        elif kind == "cgroup2":
            paths = [path for number, _, path in own if number == "0"]
        else:
            continue
        for path in paths:
            yield from _upwards(Path(point), path, _FILES[kind])


def _upwards(point: Path, path: str, name: str) -> Iterator[int]:
    """Limits of a group and those above it, up to the mount; a container may see the mount alone, as its own."""
    group = point / path.lstrip("/")
    for folder in (group, *group.parents):
        said = _read(folder / name).strip()
        # A group without a limit says "max".
        if said.isdigit():
            yield int(said)
        if folder == point:
            return


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


__all__ = ["dram_bytes"]
