"""What a planner has to know of the machines that will train: capacities and speeds of each rank, in a file."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, Topology, TopologyFactory, TrainerConfig

from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.planner.kernel import HBM_DEVICES
from torchrec_turbossd.planner.ssd import SSD_BLOCK_BYTES, SsdSpeed
from torchrec_turbossd.sizing.json_file import only_corrupt, read_json, write_whole

FORMAT = "torchrec_turbossd machine"
VERSION = 1

MOST_RANKS_OF_A_HOST = 128
"""PyTorch counts the devices of a host no further."""

_MOST_BYTES = (1 << 63) - 1
_SLOWEST, _FASTEST = 1e-3, 1e18
_SPEEDS = ("hbm_mem_bw", "ddr_mem_bw", "hbm_to_ddr_mem_bw", "intra_host_bw", "inter_host_bw")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One host, as each of its ranks sees it: what ranks share is divided among them.

    Bandwidths are in bytes a ms, as TorchRec counts; None is TorchRec's default.

    Attributes:
        compute_device: "cpu", "cuda" or "mtia".
        local_world_size: ranks of the host, at most 128.
        hbm_cap: bytes of HBM of a rank; 0 without an accelerator.
        ddr_cap: bytes of DRAM of a rank.
        ssd_cap: bytes of SSD of a rank.
        ssd_reads_per_s: random reads of 4 KiB a second of a rank.
        ssd_bytes_per_s: bytes a second (not a ms) of large reads of a rank.
        hbm_mem_bw: of HBM.
        ddr_mem_bw: of a rank's share of DRAM.
        hbm_to_ddr_mem_bw: between the two.
        intra_host_bw: between ranks of a host.
        inter_host_bw: between hosts.
        notes: what was measured and how, and what was assumed.

    Raises:
        ConfigError: a field of another type, or a number that makes no sense.
    """

    compute_device: str
    local_world_size: int
    hbm_cap: int
    ddr_cap: int
    ssd_cap: int
    ssd_reads_per_s: float
    ssd_bytes_per_s: float
    hbm_mem_bw: float | None = None
    ddr_mem_bw: float | None = None
    hbm_to_ddr_mem_bw: float | None = None
    intra_host_bw: float | None = None
    inter_host_bw: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.compute_device not in ("cpu", *HBM_DEVICES):
            raise ConfigError(f"compute_device must be 'cpu', 'cuda' or 'mtia', got {self.compute_device!r}")
        least_hbm = 1 if self.compute_device in HBM_DEVICES else 0
        for name, least, most in (
            ("local_world_size", 1, MOST_RANKS_OF_A_HOST),
            *((name, least, _MOST_BYTES) for name, least in (("hbm_cap", least_hbm), ("ddr_cap", 1), ("ssd_cap", 0))),
        ):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
                raise ConfigError(f"{name} must be an int of at least {least} and at most {most}, got {count!r}")
        for name in ("ssd_reads_per_s", "ssd_bytes_per_s", *(s for s in _SPEEDS if getattr(self, s) is not None)):
            speed = getattr(self, name)
            number = isinstance(speed, int | float) and not isinstance(speed, bool)
            if not (number and _SLOWEST <= speed <= _FASTEST):
                raise ConfigError(f"{name} must be a number from {_SLOWEST:g} to {_FASTEST:g}, got {speed!r}")
        if not isinstance(self.notes, tuple) or not all(isinstance(note, str) for note in self.notes):
            raise ConfigError(f"notes must be a tuple of str, got {self.notes!r}")

    @property
    def ssd(self) -> SsdSpeed:
        """For `turbo_ssd_planner(ssd=...)`; every row read is taken to push out one that has to be written."""
        return SsdSpeed(reads_per_s=self.ssd_reads_per_s, bytes_per_s=self.ssd_bytes_per_s)

    def topology(self, world_size: int) -> Topology:
        """TorchRec's `Topology` of `world_size` ranks on hosts like this one.

        Its `ssd_mem_bw` is what random reads of 4 KiB make, so that a planner that is not given `ssd` is not promised
        the bandwidth of large reads.

        Raises:
            ConfigError: not a positive number of whole hosts.
        """
        if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
            raise ConfigError(f"world_size must be a positive int, got {world_size!r}")
        if world_size % self.local_world_size:
            raise ConfigError(
                f"world_size must be a multiple of the {self.local_world_size} ranks of a host, got {world_size}"
            )
        blocks = min(self.ssd_reads_per_s * SSD_BLOCK_BYTES, self.ssd_bytes_per_s)
        hardware = HardwareConfig(
            hbm_cap_bytes=self.hbm_cap,
            ddr_cap_bytes=self.ddr_cap,
            # To TorchRec 1.6 none at all would mean its default.
            ssd_cap_bytes=max(1, self.ssd_cap),
            ssd_mem_bw=blocks / 1000,
            **{name: getattr(self, name) for name in _SPEEDS},
        )
        return TopologyFactory.create_topology(
            TrainerConfig(world_size=world_size, local_world_size=self.local_world_size),
            hardware,
            KernelConfig(compute_device=self.compute_device, use_hardware_based_bandwidth=True),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the machine to `path` as JSON, whole or not at all."""
        whole = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_whole(path, (json.dumps(whole, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Machine:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FormatVersionError: a newer release wrote it.
            CorruptError: anything else than a whole machine.
        """
        whole, _ = read_json(path, format=FORMAT, newest=VERSION)
        with only_corrupt(path, FORMAT):
            notes = whole["notes"]
            if not isinstance(notes, list):
                raise ValueError(f"notes must be a list of sentences, got {notes!r}")
            return cls(**{**whole, "notes": tuple(notes)})


__all__ = ["FORMAT", "MOST_RANKS_OF_A_HOST", "VERSION", "Machine"]
