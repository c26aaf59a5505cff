"""Serving: tables on SSD looked up, updated and exchanged under load."""

from __future__ import annotations

from torchrec_turbossd.serving.config import ServingConfig
from torchrec_turbossd.serving.module import TurboSSDInferenceModule

__all__ = ["ServingConfig", "TurboSSDInferenceModule"]
