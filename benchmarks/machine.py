"""What the figures were measured on: machine, versions, commit and load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "rocksdict", "numpy")
_ROOT = Path(__file__).absolute().parents[1]


def describe(directory: Path) -> dict[str, Any]:
    """The machine, with the disk that `directory` is on."""
    return {
        "cpu": _first(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(int(_first(Path("/proc/meminfo"), r"MemTotal:\s*(\d+)") or 0) / (1 << 20), 1),
        "disk": _disk(directory),
        "kernel": platform.release(),
        "system": _first(Path("/etc/os-release"), r'PRETTY_NAME="?([^"\n]+)') or platform.system(),
    }


def versions() -> dict[str, str]:
    """Of Python, the packages that matter here, and the peers; what is missing is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for tool, pattern in (("db_bench", r"version\s+([\d.]+)"), ("fio", r"fio-([\d.]+)")):
        if shutil.which(tool):
            said = subprocess.run([tool, "--version"], capture_output=True, text=True)
            match = re.search(pattern, said.stdout + said.stderr)
            found[tool] = match.group(1) if match else "unknown"
    return found


def commit() -> str:
    """The commit measured, with "+" when files differ from it; "" outside a repository."""
    try:
        head, changes = (
            subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changes else "")


def load() -> float:
    """Runnable processes over the last minute: what else the machine did."""
    return round(os.getloadavg()[0], 2)


def _first(path: Path, pattern: str) -> str:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return match.group(1).strip() if match else ""


def _disk(directory: Path) -> str:
    """Block device, model, size and file system of a folder, as far as the kernel says."""
    device = os.stat(directory).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if not block.exists():
        return _file_system(directory)
    whole = block if (block / "queue").exists() else block.parent
    model = _first(whole / "device" / "model", r"(.+)")
    spins = _first(whole / "queue" / "rotational", r"(\d)") == "1"
    size = int(_first(whole / "size", r"(\d+)") or 0) * 512 / 1e9
    ahead = _first(whole / "queue" / "read_ahead_kb", r"(\d+)")
    kind = "rotating" if spins else "not rotating"
    words = [whole.name, model, f"{size:.0f} GB", kind, f"read-ahead {ahead} KiB", _file_system(directory)]
    return ", ".join(filter(None, words))


def _file_system(directory: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    parents = [str(directory.resolve()), *map(str, directory.resolve().parents)]
    above = [(point, kind) for point, kind in mounts if point in parents]
    return max(above, key=lambda pair: len(pair[0]))[1] if above else "unknown file system"


__all__ = ["commit", "describe", "load", "versions"]
