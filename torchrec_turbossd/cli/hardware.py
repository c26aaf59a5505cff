"""The machines of a plan: what a file says of them, as TorchRec's topology and the speed of an SSD."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import StorageReservation, Topology

from torchrec_turbossd.cli.spec import Hardware
from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.planner import Machine, SsdSpeed
from torchrec_turbossd.planner.machine import MOST_RANKS_OF_A_HOST

# Taken from the planner, the only part beside `sharding` that imports TorchRec's distributed code.
from torchrec_turbossd.planner.ssd import SSD_BLOCK_BYTES

DEFAULT_DRAM = 128 << 30
"""DRAM of a rank beside HBM where nothing is said: TorchRec's."""

_SIZES = {"hbm": "hbm_cap", "dram": "ddr_cap", "ssd": "ssd_cap"}
_BANDWIDTHS = {
    "hbm_bandwidth": "hbm_mem_bw",
    "dram_bandwidth": "ddr_mem_bw",
    "host_to_device_bandwidth": "hbm_to_ddr_mem_bw",
    "intra_host_bandwidth": "intra_host_bw",
    "inter_host_bandwidth": "inter_host_bw",
}
"""Ours, in bytes a second, and TorchRec's, in bytes a millisecond."""

_SHARED_SIZES = ("ddr_cap", "ssd_cap")
_SHARED_SPEEDS = ("ddr_mem_bw", "ssd_reads_per_s", "ssd_bytes_per_s")
_MISSING_SSD = (
    "ssd_reads_per_second or ssd_bandwidth missing: what one rank's SSD, or its share of one, does; measure yours "
    "with `torchrec-turbossd plan --measure`, or look for random reads of 4 KiB in its data sheet (NVMe SSDs: 500,000 "
    "and more)"
)


class Reserve(StorageReservation):
    """Keeps a share of every rank's fast memory (HBM; DRAM on a CPU topology) from the tables.

    On CUDA that is what TorchRec's `FixedPercentageStorageReservation` does.
    """

    def __init__(self, share: float) -> None:
        # TorchRec's planner names this one in its message when nothing fits.
        self._percentage = share
        self._reserved: Topology | None = None

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[Any],
        constraints: dict[str, Any] | None = None,
    ) -> Topology:
        """A copy of `topology` with less memory."""
        reserved = copy.deepcopy(topology)
        for device in reserved.devices:
            kind = "hbm" if reserved.compute_device != "cpu" else "ddr"
            setattr(device.storage, kind, int((1 - self._percentage) * getattr(device.storage, kind)))
        self._reserved = reserved
        return reserved

    @property
    def last_reserved_topology(self) -> Topology | None:
        """What `reserve` returned last."""
        return self._reserved


def make_machine(hardware: Hardware, measured: Machine | None, where: str) -> Machine:
    """The machines of a plan: those measured, where there are some, changed as `hardware` says.

    Where other ranks per host are wanted than were measured, what they share is divided among them anew.

    Args:
        hardware: sizes of a rank in bytes, speeds in bytes a second.
        measured: of a file, or of this host.
        where: the file to name in errors.

    Raises:
        ConfigError: something is missing, or makes no sense.
    """
    device = hardware.device if measured is None else hardware.device or measured.compute_device
    if device == "cpu" and hardware.hbm is not None:
        raise ConfigError(f"{where}: hbm (--hbm): a cpu has none: its slots are in dram (--dram)")
    if measured is not None:
        _check_measured(measured, hardware, where)
        return dataclasses.replace(_divided(measured, hardware.ranks_per_host), **_said(hardware))
    missing = [name for name in ("device", "ranks", "hbm", "dram", "ssd") if getattr(hardware, name) is None]
    optional = {"cpu": "hbm", "cuda": "dram"}.get(device or "")
    missing = [name for name in missing if name != optional and (device or name not in ("hbm", "dram"))]
    if missing:
        raise ConfigError(
            f"{where}: topology: {', '.join(missing)} missing; the file, a measured machine (--machine) or an option "
            "of that name says it"
        )
    if hardware.ssd_reads_per_second is None and hardware.ssd_bandwidth is None:
        raise ConfigError(f"{where}: topology: {_MISSING_SSD}")
    reads, bandwidth = hardware.ssd_reads_per_second, hardware.ssd_bandwidth
    if hardware.ranks_per_host is None and (hardware.ranks or 1) > MOST_RANKS_OF_A_HOST:
        raise ConfigError(
            f"{where}: {hardware.ranks:,} ranks on one host, which has at most {MOST_RANKS_OF_A_HOST}; say how many a "
            "host has (ranks_per_host, --ranks-per-host)"
        )
    stated = {
        "local_world_size": hardware.ranks,
        "hbm_cap": 0,
        "ddr_cap": DEFAULT_DRAM,
        "ssd_reads_per_s": (bandwidth or 0) / SSD_BLOCK_BYTES,
        "ssd_bytes_per_s": (reads or 0) * SSD_BLOCK_BYTES,
        **_said(hardware),
    }
    return Machine(**stated)


def make_topology(machine: Machine, hardware: Hardware) -> tuple[Topology, SsdSpeed]:
    """TorchRec's topology of as many ranks as `hardware` says, else of one host, and the speed of a rank's SSD.

    Raises:
        ConfigError: the ranks are not so many whole hosts.
    """
    ranks = machine.local_world_size if hardware.ranks is None else hardware.ranks
    if ranks % machine.local_world_size:
        raise ConfigError(
            f"{ranks} ranks are not whole hosts of {machine.local_world_size}; say how many a host has "
            "(ranks_per_host, --ranks-per-host)"
        )
    ssd, writes = machine.ssd, hardware.ssd_writes_per_read
    return machine.topology(ranks), ssd if writes is None else dataclasses.replace(ssd, writes_per_read=writes)


def _check_measured(machine: Machine, hardware: Hardware, where: str) -> None:
    """Raise where what is said of the machines leaves open what was measured, or is about others."""
    if hardware.device not in (None, machine.compute_device):
        raise ConfigError(
            f"{where}: device {hardware.device!r} was said of a machine that was measured as "
            f"{machine.compute_device!r}; measure one of that kind, or leave the machine file out and say all of it"
        )
    hosts, ranks = machine.local_world_size, hardware.ranks
    if ranks not in (None, hosts) and hardware.ranks_per_host is None:
        raise ConfigError(
            f"{where}: {ranks} ranks on how many hosts? The machine was measured for {hosts} on a host: say "
            f"ranks_per_host (--ranks-per-host), such as {min(ranks or 1, MOST_RANKS_OF_A_HOST)} or {hosts}; what a "
            "host has is divided among its ranks"
        )


def _said(hardware: Hardware) -> dict[str, Any]:
    """What the user says of the machines, by the names of `Machine`."""
    said: dict[str, Any] = {theirs: getattr(hardware, ours) for ours, theirs in _SIZES.items()}
    said |= {"compute_device": hardware.device, "local_world_size": hardware.ranks_per_host}
    said |= {"ssd_reads_per_s": hardware.ssd_reads_per_second, "ssd_bytes_per_s": hardware.ssd_bandwidth}
    speeds = {theirs: getattr(hardware, ours) for ours, theirs in _BANDWIDTHS.items()}
    said |= {name: speed / 1000 for name, speed in speeds.items() if speed is not None}
    return {name: value for name, value in said.items() if value is not None}


def _divided(machine: Machine, ranks: int | None) -> Machine:
    if ranks is None or ranks == machine.local_world_size:
        return machine
    share = machine.local_world_size / ranks
    shared: dict[str, Any] = {name: int(getattr(machine, name) * share) for name in _SHARED_SIZES}
    speeds = {name: getattr(machine, name) for name in _SHARED_SPEEDS}
    shared |= {name: speed * share for name, speed in speeds.items() if speed is not None}
    note = f"divided anew, among {ranks} ranks of a host instead of {machine.local_world_size}"
    return dataclasses.replace(machine, local_world_size=ranks, notes=(*machine.notes, note), **shared)


__all__ = ["DEFAULT_DRAM", "Reserve", "make_machine", "make_topology"]
