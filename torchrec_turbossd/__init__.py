"""Embedding tables larger than memory for PyTorch and TorchRec: rows on SSD, hot rows in HBM or DRAM."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torchrec_turbossd.serving import TurboSSDInferenceModule
    from torchrec_turbossd.sizing import AccessProfile, BudgetItem, HitRateCurve, split_budget

# Imported when they are asked for: planning on paper needs neither FBGEMM's operators nor RocksDB.
_HOMES = {
    "AccessProfile": "torchrec_turbossd.sizing",
    "BudgetItem": "torchrec_turbossd.sizing",
    "HitRateCurve": "torchrec_turbossd.sizing",
    "TurboSSDInferenceModule": "torchrec_turbossd.serving",
    "split_budget": "torchrec_turbossd.sizing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


__all__ = [
    "AccessProfile",
    "BudgetItem",
    "HitRateCurve",
    "TurboSSDInferenceModule",
    "__version__",
    "split_budget",
]
