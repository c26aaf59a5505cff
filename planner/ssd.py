"""What a row that is not in a slot costs to read: by the SSD's reads or bytes a second, or the link from DRAM."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchrec.distributed.planner.types import Topology

from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.sizing.memory import has_dram_tier

SSD_BLOCK_BYTES = 4096
"""What an SSD reads at the least: a smaller row still moves a whole block."""


@dataclass(frozen=True, kw_only=True)
class SsdSpeed:
    """How fast one rank's SSD is, or its share of one that several ranks use.

    TorchRec's `Topology` has a bandwidth and no reads a second; rows are small, so that it is those that run out.

    Attributes:
        reads_per_s: random reads of a block (4 KiB) a second.
        bytes_per_s: bytes a second of large reads.
        writes_per_read: rows written for each row read. 1: training whose slots are full, where every row that leaves
            its slot has been updated and goes back. 0: tables that are only looked up. Such rows are counted as bytes
            and not as reads, since the store writes many at once, in the background; what it writes again when it
            merges its files is not counted, and writing is taken to be as fast as reading.

    Raises:
        ConfigError: a speed that is not above 0, writes below 0, or a number that is not finite.
    """

    reads_per_s: float
    bytes_per_s: float
    writes_per_read: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("reads_per_s", self.reads_per_s), ("bytes_per_s", self.bytes_per_s)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} of an SSD must be finite and above 0, got {value}")
        if not (math.isfinite(self.writes_per_read) and self.writes_per_read >= 0):
            raise ConfigError(f"writes_per_read must be finite and not negative, got {self.writes_per_read}")

    @classmethod
    def of(cls, topology: Topology) -> SsdSpeed:
        """What `topology.ssd_mem_bw` (bytes a ms) says: as many reads of 4 KiB as make up that bandwidth, and no
        writes. TorchRec's default of 100 MiB/s is a hard disk's."""
        bandwidth = float(topology.ssd_mem_bw) * 1000
        return cls(reads_per_s=bandwidth / SSD_BLOCK_BYTES, bytes_per_s=bandwidth, writes_per_read=0.0)

    def miss_ms(self, row_bytes: int) -> float:
        """Milliseconds that one miss of a row of `row_bytes` takes, while many are under way: the longer of one read's
        share of the reads a second, and of its bytes (and those written in turn) in the bytes a second."""
        moved = max(row_bytes, SSD_BLOCK_BYTES) + self.writes_per_read * row_bytes
        return 1000 * max(1 / self.reads_per_s, moved / self.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class MissPrice:
    """What lookups cost whose row is not in a slot: the SSD, or the way from DRAM to a GPU.

    Attributes:
        ssd: of one rank.
        link_bytes_per_ms: between host and accelerator, each way; infinite where slots are in DRAM.
    """

    ssd: SsdSpeed
    link_bytes_per_ms: float = math.inf

    @classmethod
    def of(cls, topology: Topology, ssd: SsdSpeed | None = None) -> MissPrice:
        """Of a rank of `topology`; `ssd` None: as that says."""
        link = float(topology.hbm_to_ddr_mem_bw) if has_dram_tier(topology.compute_device) else math.inf
        return cls(ssd=ssd or SsdSpeed.of(topology), link_bytes_per_ms=link)

    def dram_ms(self, row_bytes: int) -> float:
        """Milliseconds of a row of `row_bytes` from the DRAM tier. Another one leaves its slot for it and goes the
        other way at the same time, which takes no longer."""
        return row_bytes / self.link_bytes_per_ms

    def ssd_ms(self, row_bytes: int) -> float:
        """Milliseconds of a row of `row_bytes` from SSD; its way to the GPU is not counted on top."""
        return self.ssd.miss_ms(row_bytes)

    def saved_ms(self, row_bytes: int) -> float:
        """Milliseconds that the DRAM tier spares a lookup of a row of `row_bytes`; not below 0."""
        return max(0.0, self.ssd_ms(row_bytes) - self.dram_ms(row_bytes))

    def ms(self, lookups: float, row_bytes: int, hit_rate: float, dram_hit_rate: float = 0.0) -> float:
        """Milliseconds of the misses of `lookups`.

        Args:
            lookups: of one batch.
            row_bytes: weights and optimizer state.
            hit_rate: share of lookups whose row is in a slot.
            dram_hit_rate: share of them whose row is in the DRAM tier.
        """
        on_ssd = max(0.0, 1.0 - hit_rate - dram_hit_rate)
        return lookups * (dram_hit_rate * self.dram_ms(row_bytes) + on_ssd * self.ssd_ms(row_bytes))


__all__ = ["SSD_BLOCK_BYTES", "MissPrice", "SsdSpeed"]
