"""TorchRec planning for tables on SSD: kernel name, estimators, proposer, cache budget."""

from __future__ import annotations

from torchrec_turbossd.planner.access import ProfileStatistics
from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams, slots_of
from torchrec_turbossd.planner.machine import Machine
from torchrec_turbossd.planner.measure import measure_machine
from torchrec_turbossd.planner.planner import TurboSSDPlanner, turbo_ssd_planner
from torchrec_turbossd.planner.report import PlanRow, describe_plan, format_plan
from torchrec_turbossd.planner.ssd import SsdSpeed
from torchrec_turbossd.sizing.memory import shard_fast_bytes

__all__ = [
    "TURBO_SSD",
    "Machine",
    "PlanRow",
    "ProfileStatistics",
    "SsdSpeed",
    "TurboCacheParams",
    "TurboSSDPlanner",
    "describe_plan",
    "format_plan",
    "measure_machine",
    "shard_fast_bytes",
    "slots_of",
    "turbo_ssd_planner",
]
