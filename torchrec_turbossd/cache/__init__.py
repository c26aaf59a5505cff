"""Slots of fast memory and which rows are in them."""

from torchrec_turbossd.cache.eviction import EvictionPolicy
from torchrec_turbossd.cache.policies import BYTES_PER_SLOT, DEFAULT_POLICY, POLICIES
from torchrec_turbossd.cache.slot_cache import Reservation, SlotCache
from torchrec_turbossd.cache.slot_map import SLOT_MAP_BYTES_PER_ROW, SlotMap

__all__ = [
    "BYTES_PER_SLOT",
    "DEFAULT_POLICY",
    "POLICIES",
    "SLOT_MAP_BYTES_PER_ROW",
    "EvictionPolicy",
    "Reservation",
    "SlotCache",
    "SlotMap",
]
