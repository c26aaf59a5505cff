"""Measuring this host: capacities from the system, speeds by moving rows, notes on what was done and what was not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.planner.disk import READS_AT_ONCE, DiskSpeed, free_bytes, measure_disk
from torchrec_turbossd.planner.machine import MOST_RANKS_OF_A_HOST, Machine
from torchrec_turbossd.planner.memory_limit import dram_bytes
from torchrec_turbossd.planner.shortfall import human

_COLS = 128
_ROW_BYTES = 4 * _COLS
_TABLE_BYTES = 1 << 30
_LEAST_TABLE_BYTES = 1 << 20
_CACHES_BYTES = 256 << 20
"""Tables smaller than this may sit in a processor's caches."""
_COPIED_BYTES = 256 << 20


def measure_machine(
    ssd_directory: str | os.PathLike[str],
    *,
    compute_device: str | None = None,
    local_world_size: int | None = None,
    seconds: float = 10.0,
    file_bytes: int = 1 << 30,
) -> Machine:
    """This host as a `Machine`, whose notes say what was measured and what was assumed.

    Call it in one process of a host while the host is otherwise idle: several at once would halve each other's figures.
    What ranks share (DRAM, its bandwidth, the disk) is measured once and divided by `local_world_size`; HBM and its
    link belong to one rank, the current CUDA device's.

    * Capacities: DRAM is MemTotal, or the limit of a control group; SSD, what is free on the file system; HBM, all of
      the device's. Planners keep some of each back (`storage_reservation`).
    * DRAM and HBM: rows of 512 bytes gathered at random from a table larger than caches, in bytes read and written;
      between the two, copies from pinned memory to the device.
    * SSD: a file of `file_bytes`, less where there is less room or the disk is slow to write, read 32 at a time past
      the page cache; random reads of 4 KiB, and reads of 1 MiB in order. The file never outlives the call.

    Meanwhile it takes 1.3 GiB of DRAM and of HBM each, at most a twelfth of DRAM and a third of the HBM that is free.

    Args:
        ssd_directory: where tables will be.
        compute_device: "cpu" or "cuda"; None: "cuda" where there is one.
        local_world_size: ranks of this host that will share it; None: one for each CUDA device, on a CPU 1.
        seconds: how long it takes, about.
        file_bytes: size of the file, at least 16 MiB.

    Raises:
        ConfigError: an argument that makes no sense, or CUDA where there is none.
        StoreError: the directory cannot be written, is full, or fails.
    """
    _check(local_world_size, seconds, file_bytes)
    device = _device(compute_device)
    ranks = local_world_size or (torch.cuda.device_count() if device.type == "cuda" else 1)
    directory, (dram, said), room = Path(ssd_directory), dram_bytes(), free_bytes(Path(ssd_directory))
    hbm = _measure_hbm(device, seconds * 0.1) if device.type == "cuda" else _Hbm()
    table = min(_TABLE_BYTES, dram // 16)
    memory = _gathered_per_ms(torch.device("cpu"), table, seconds * 0.1)
    disk = measure_disk(directory, file_bytes=file_bytes, seconds=seconds * 0.7)
    return Machine(
        compute_device=device.type,
        local_world_size=ranks,
        hbm_cap=hbm.cap,
        ddr_cap=dram // ranks,
        ssd_cap=room // ranks,
        ssd_reads_per_s=disk.reads_per_s / ranks,
        ssd_bytes_per_s=disk.bytes_per_s / ranks,
        hbm_mem_bw=hbm.speed,
        ddr_mem_bw=memory / ranks,
        hbm_to_ddr_mem_bw=hbm.link,
        notes=(
            f"DRAM: {human(dram)}, from {said}, all of it; {_memory_note(memory, table)}",
            *hbm.notes,
            *_disk_notes(disk, directory, room),
            *_shared_notes(ranks),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Hbm:
    """Bytes, and bytes a ms of gathered rows and of copies from the host."""

    cap: int = 0
    speed: float | None = None
    link: float | None = None
    notes: tuple[str, ...] = ()


def _check(local_world_size: int | None, seconds: float, file_bytes: int) -> None:
    ranks = 1 if local_world_size is None else local_world_size
    for name, value, least, most in (
        ("local_world_size", ranks, 1, MOST_RANKS_OF_A_HOST),
        ("file_bytes", file_bytes, 16 << 20, 1 << 60),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{name} must be an int of at least {least:,} and at most {most:,}, got {value!r}")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds must be finite and above 0, got {seconds}")


def _device(compute_device: str | None) -> torch.device:
    if compute_device not in (None, "cpu", "cuda"):
        raise ConfigError(f"compute_device must be 'cpu' or 'cuda' to be measured, got {compute_device!r}")
    there = torch.cuda.is_available()
    if compute_device == "cuda" and not there:
        raise ConfigError("compute_device is 'cuda', and this host has none; measure where it is, or make a Machine")
    if compute_device == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _measure_hbm(device: torch.device, seconds: float) -> _Hbm:
    free, total = torch.cuda.mem_get_info(device)
    table = min(_TABLE_BYTES, free // 4)
    speed = _gathered_per_ms(device, table, seconds)
    link = _copied_per_ms(device, min(_COPIED_BYTES, free // 4), seconds)
    # Others may want the memory that PyTorch keeps for this process.
    torch.cuda.empty_cache()
    notes = (
        f"HBM: {human(total)} of {torch.cuda.get_device_name(device)}, of which {human(free)} were free",
        f"HBM bandwidth: {human(1000 * speed)}/s, rows of {_ROW_BYTES} bytes gathered from {human(table)}",
        f"host to device: {human(1000 * link)}/s, copies from pinned memory on one device; that ranks do not share it "
        "is assumed",
    )
    return _Hbm(cap=total, speed=speed, link=link, notes=notes)


def _gathered_per_ms(device: torch.device, table_bytes: int, seconds: float) -> float:
    """Bytes a ms, read and written, of gathering rows at random from a table of `table_bytes`."""
    rows = max(_LEAST_TABLE_BYTES, table_bytes) // _ROW_BYTES
    count = rows // 4
    # Ones and not zeros, which the system would not give memory of its own.
    table = torch.ones(rows, _COLS, device=device)
    ids = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.ones(count, _COLS, device=device)
    ms = _median_ms(lambda: torch.index_select(table, 0, ids, out=out), device, seconds)
    return 2 * count * _ROW_BYTES / ms


def _copied_per_ms(device: torch.device, size: int, seconds: float) -> float:
    """Bytes a ms of copying from pinned memory to a device."""
    host = torch.ones(size, dtype=torch.uint8).pin_memory()
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _median_ms(lambda: there.copy_(host, non_blocking=True), device, seconds)


def _median_ms(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Milliseconds of one `action`, the median of as many rounds as fit into `seconds`, at least 3."""
    repeats = 10 if device.type == "cuda" else 1
    action()
    _finish(device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            action()
        _finish(device)
        times.append((time.perf_counter() - start) * 1000 / repeats)
    return median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory_note(per_ms: float, table: int) -> str:
    note = (
        f"bandwidth: {human(1000 * per_ms)}/s, rows of {_ROW_BYTES} bytes gathered from {human(table)} by "
        f"{torch.get_num_threads()} threads"
    )
    return note if table >= _CACHES_BYTES else f"{note}; so small a table may sit in caches"


def _shared_notes(ranks: int) -> tuple[str, ...]:
    return (
        f"divided among {ranks} ranks of a host: DRAM and SSD, their capacities and speeds",
        "assumed: intra_host_bw and inter_host_bw, as TorchRec has them; that other hosts are like this one; that the "
        "processor keeps up with the SSD",
    )


def _disk_notes(disk: DiskSpeed, directory: Path, room: int) -> tuple[str, ...]:
    how = "past the page cache" if disk.direct else "not past the page cache, which may flatter it"
    if disk.in_memory:
        how = "which is memory and not an SSD"
    return (
        f"SSD: {human(room)} free in {directory} on {disk.file_system}",
        f"SSD speed: {disk.reads_per_s:,.0f} random reads of 4 KiB a second, {human(disk.bytes_per_s)}/s in reads of "
        f"1 MiB, {READS_AT_ONCE} at a time from a file of {human(disk.file_bytes)}, {how}; caches of the disk itself, "
        "or of the host of a virtual machine, cannot be told apart from it",
        f"SSD writes: {human(disk.written_bytes_per_s)}/s while the file was made; plans count them as reads",
    )


__all__ = ["measure_machine"]
