"""The eviction policies by name, and the one that is taken where none is named.

S3-FIFO is the default: of the four it hits most, or as much as the best within a point, on every trace tried.
"""

from __future__ import annotations

from torchrec_turbossd.cache.clock import Clock
from torchrec_turbossd.cache.eviction import EvictionPolicy
from torchrec_turbossd.cache.lru import Lru
from torchrec_turbossd.cache.s3_fifo import S3Fifo
from torchrec_turbossd.cache.sieve import Sieve

POLICIES: dict[str, type[EvictionPolicy]] = {"clock": Clock, "lru": Lru, "s3_fifo": S3Fifo, "sieve": Sieve}
DEFAULT_POLICY = "s3_fifo"
BYTES_PER_SLOT = 8 + 4 + 1 + POLICIES[DEFAULT_POLICY].bytes_per_slot
"""Owner (8), pin count (4), dirty mark (1) and what the default policy keeps."""

__all__ = ["BYTES_PER_SLOT", "DEFAULT_POLICY", "POLICIES"]
