"""Hit rate by slots: how much of the traffic a cache of each size answers.

The rate that counts here is per lookup, not per distinct id: of all lookups, repeated ones included, the share whose
row is in a slot. A profile of a trace knows the rates that the trace had. For others lookups are taken as independent
draws, one at a time: traffic that asks again soon for what it just asked for hits more often than this says, and
batches of more lookups than a third of the slots less often (with half of the slots, by 5 points where popularity is
nearly even).
"""

from __future__ import annotations

import functools
import math
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt

from torchrec_turbossd.cache.policies import DEFAULT_POLICY
from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.sizing.presence import PRESENCE
from torchrec_turbossd.sizing.profile import AccessProfile, Floats, Ints

_SLIGHTLY = 1e-9


class Curve(Protocol):
    """Anything that tells a hit rate by slots."""

    def hit_rate(self, slots: Floats, /) -> Floats:
        """Hit rates in [0, 1] of `slots`, elementwise and never falling."""


class HitRateCurve:
    """Expected steady-state hit rate per lookup of a cache of `slots` rows.

    Args:
        profile: how often each row is asked for.
        policy: "clock", "lru" or "s3_fifo" (None: the default).

    Raises:
        ConfigError: a policy without a model.
    """

    def __init__(self, profile: AccessProfile, policy: str | None = None) -> None:
        self.profile = profile
        self.policy = policy or DEFAULT_POLICY
        self._replayed = next((curve for curve in profile.curves if curve.policy == self.policy), None)
        if self._replayed is None and self.policy not in PRESENCE:
            raise ConfigError(f"no hit-rate model of policy {policy!r}; there is one of {', '.join(sorted(PRESENCE))}")

    @overload
    def hit_rate(self, slots: float) -> float: ...
    @overload
    def hit_rate(self, slots: npt.NDArray[np.generic]) -> Floats: ...
    def hit_rate(self, slots: float | npt.NDArray[np.generic]) -> float | Floats:
        """Share of lookups that find their row in one of `slots`, a number or an array; 1 when every row has one.

        Raises:
            ConfigError: negative or not a number.
        """
        wanted = np.asarray(slots, dtype=np.float64)
        if not (wanted >= 0).all():
            raise ConfigError(f"slots must not be negative, got {slots}")
        filled, hits = self._knots
        rates = np.interp(wanted, filled, hits)
        return rates if isinstance(slots, np.ndarray) else float(rates)

    @overload
    def slots_for(self, hit_rate: float) -> int: ...
    @overload
    def slots_for(self, hit_rate: npt.NDArray[np.generic]) -> Ints: ...
    def slots_for(self, hit_rate: float | npt.NDArray[np.generic]) -> int | Ints:
        """The least slots whose hit rate is at least `hit_rate`, in [0, 1], a number or an array.

        Raises:
            ConfigError: outside [0, 1] or not a number.
        """
        wanted = np.asarray(hit_rate, dtype=np.float64)
        if not ((wanted >= 0) & (wanted <= 1)).all():
            raise ConfigError(f"a hit rate is between 0 and 1, got {hit_rate}")
        filled, hits = self._knots
        slots = np.ceil(np.interp(wanted, hits, filled))
        # Interpolation there and back may round to a neighbour.
        slots += np.interp(slots, filled, hits) < wanted
        slots -= (slots > 0) & (np.interp(np.maximum(slots - 1, 0), filled, hits) >= wanted)
        return slots.astype(np.int64) if isinstance(hit_rate, np.ndarray) else int(slots)

    @functools.cached_property
    def _knots(self) -> tuple[Floats, Floats]:
        """Rising slots and hit rates, between which the curve is straight: from (0, 0) to (rows asked for, 1)."""
        if self._replayed is not None:
            return self._ending_in_one(self._replayed.slots.astype(np.float64), self._replayed.hit_rates)
        asked = self.profile.chances > 0
        sizes, chances = self.profile.sizes[asked].astype(np.float64), self.profile.chances[asked]
        present = PRESENCE[self.policy](chances, sizes)
        filled, hits = present @ sizes, present @ (sizes * chances / (sizes @ chances))
        # A solved model may waver in the last digits.
        filled, hits = np.maximum.accumulate(filled), np.maximum.accumulate(hits)
        return _knots(filled, hits, float(sizes.sum()))

    def _ending_in_one(self, filled: Floats, hits: Floats) -> tuple[Floats, Floats]:
        """With more slots than rows were seen a trace still has its first lookups of each as misses, to the end: only
        when every row of the table has a slot there are none."""
        rows = float(self.profile.rows)
        if hits[-1] >= 1:
            return _knots(filled, hits, float(filled[np.argmax(hits >= 1)]))
        if filled[-1] < rows - 1 and hits[-1] < 1 - 2 * _SLIGHTLY:
            filled, hits = np.append(filled, rows - 1), np.append(hits, hits[-1] + _SLIGHTLY)
        return _knots(filled, hits, rows)


def _knots(filled: Floats, hits: Floats, rows: float) -> tuple[Floats, Floats]:
    """The points that rise, between (0, 0) and (rows, 1)."""
    below = (filled < rows) & (hits < 1)
    filled, hits = np.append(0.0, filled[below]), np.append(0.0, hits[below])
    rising = np.append(True, (np.diff(filled) > 0) & (np.diff(hits) > 0))
    return np.append(filled[rising], rows), np.append(hits[rising], 1.0)


class ShardCurve:
    """The curve of a shard that holds one of every `parts` rows of a table, popular and unpopular ones alike.

    Its lookups are hit as often as the whole table's would be with `parts` times the slots.
    """

    def __init__(self, whole: Curve, parts: float) -> None:
        if not (math.isfinite(parts) and parts >= 1):
            raise ConfigError(f"a shard is one of at least 1 parts of a table, got {parts}")
        self._whole, self._parts = whole, parts

    def hit_rate(self, slots: Floats, /) -> Floats:
        """Hit rates of `slots` of this shard."""
        return self._whole.hit_rate(slots * self._parts)


class TierCurve:
    """The curve of a slower tier behind a cache of `above` slots whose rows it does not hold as well.

    Lookups that the slots answer count as hits: both together hit as often as one cache of all their rows.
    """

    def __init__(self, whole: Curve, above: int) -> None:
        self._whole, self._above = whole, above

    def hit_rate(self, slots: Floats, /) -> Floats:
        """Hit rates of the slots and `slots` rows of this tier together."""
        return self._whole.hit_rate(slots + self._above)


__all__ = ["DEFAULT_POLICY", "Curve", "HitRateCurve", "ShardCurve", "TierCurve"]
