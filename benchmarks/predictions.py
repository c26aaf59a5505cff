"""Hit-rate curves of the same traffic from a sample of it, from a smaller one, from its past, and from its formula."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measured import Traffic
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve

SMALL_SAMPLE = 1 << 15
"""Lookups that a window of the small sample keeps."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Curves from the whole traffic, from a small sample of it, from its first half, and from its known popularity."""

    whole: HitRateCurve
    small: HitRateCurve
    past: HitRateCurve
    known: HitRateCurve | None


def predict(traffic: Traffic, alpha: float | None) -> Predictions:
    """All of them; `alpha` is the Zipf exponent where there is one."""
    rows, batch = traffic.table.rows, traffic.batch
    return Predictions(
        whole=HitRateCurve(AccessProfile.from_trace(traffic.asked, rows, batch=batch)),
        small=HitRateCurve(AccessProfile.from_trace(traffic.asked, rows, batch=batch, events=SMALL_SAMPLE)),
        past=HitRateCurve(AccessProfile.from_trace(traffic.first_half, rows, batch=batch)),
        known=None if alpha is None else HitRateCurve(AccessProfile.zipf(rows, alpha)),
    )


__all__ = ["SMALL_SAMPLE", "Predictions", "predict"]
