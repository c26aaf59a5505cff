"""How many slots a table needs: access profiles, hit-rate curves, budgets."""

from __future__ import annotations

from torchrec_turbossd.sizing.budget import BudgetItem, explain_split, split_budget
from torchrec_turbossd.sizing.curve import DEFAULT_POLICY, Curve, HitRateCurve, ShardCurve, TierCurve
from torchrec_turbossd.sizing.memory import BYTES_PER_SLOT, SLOT_MAP_BYTES_PER_ROW, shard_fast_bytes, slot_bytes
from torchrec_turbossd.sizing.profile import DEFAULT_ZIPF_ALPHA, AccessProfile, Recorded, ReplayedCurve
from torchrec_turbossd.sizing.sample import DEFAULT_EVENTS, RECORDED_EVENTS, AccessSample

__all__ = [
    "BYTES_PER_SLOT",
    "DEFAULT_EVENTS",
    "DEFAULT_POLICY",
    "DEFAULT_ZIPF_ALPHA",
    "RECORDED_EVENTS",
    "SLOT_MAP_BYTES_PER_ROW",
    "AccessProfile",
    "AccessSample",
    "BudgetItem",
    "Curve",
    "HitRateCurve",
    "Recorded",
    "ReplayedCurve",
    "ShardCurve",
    "TierCurve",
    "explain_split",
    "shard_fast_bytes",
    "slot_bytes",
    "split_budget",
]
