"""Hit-rate curves of a model's tables, whoever measured them: access profiles or TorchRec's cache statistics."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import numpy as np
from torchrec.distributed.planner.types import Shard, ShardingOption
from torchrec.distributed.types import CacheStatistics

from torchrec_turbossd.errors import ConfigError, UnknownTableError
from torchrec_turbossd.sizing.curve import Curve, HitRateCurve, ShardCurve
from torchrec_turbossd.sizing.profile import AccessProfile, Floats


class ProfileStatistics(CacheStatistics):
    """An access profile as TorchRec's `CacheStatistics`, for `CacheParams(stats=...)` of any kernel.

    Args:
        profile: how often each row is asked for.
        lookups: lookups of one global batch.
        policy: eviction policy; None: the default.
    """

    def __init__(self, profile: AccessProfile, lookups: float, policy: str | None = None) -> None:
        self._curve = HitRateCurve(profile, policy)
        self._lookups = lookups

    @property
    def expected_lookups(self) -> float:
        """Expected distinct rows of one global batch."""
        return self._curve.profile.distinct(self._lookups)

    def expected_miss_rate(self, clf: float) -> float:
        """Expected misses per lookup with `clf` of the rows in slots."""
        return 1.0 - self._curve.hit_rate(clf * self._curve.profile.rows)

    @property
    def cacheability(self) -> float:
        """Mean miss rate over all load factors: 0 is easy to cache, 1 is hard."""
        grid = np.linspace(0.0, 1.0, 1001)
        misses = 1.0 - self._curve.hit_rate(grid * self._curve.profile.rows)
        return float(((misses[1:] + misses[:-1]) / 2).mean())

    def stable_fingerprint(self) -> tuple[object, ...]:
        """Contents, for TorchRec 1.9.2 and later."""
        return ("turbo_ssd_profile", 1, self._curve.profile.fingerprint, self._lookups, self._curve.policy)


class StatisticsCurve:
    """TorchRec's `CacheStatistics` of a table of `rows` rows as a hit-rate curve."""

    def __init__(self, statistics: CacheStatistics, rows: int) -> None:
        self._statistics, self._rows = statistics, rows

    def hit_rate(self, slots: Floats, /) -> Floats:
        """Hit rates of `slots`."""
        shares = np.minimum(np.asarray(slots, dtype=np.float64) / self._rows, 1.0)
        misses = [self._statistics.expected_miss_rate(share) if share < 1 else 0.0 for share in shares.ravel().tolist()]
        rates: Floats = np.clip(1.0 - np.array(misses), 0.0, 1.0).reshape(shares.shape)
        return rates


class Access:
    """Curves of a model's tables.

    A table's curve comes from the `stats` of its cache constraints, else from its profile here, else from the
    documented default, Zipf with exponent `DEFAULT_ZIPF_ALPHA`.
    """

    def __init__(self, profiles: Mapping[str, AccessProfile] | None = None, policy: str | None = None) -> None:
        self._profiles = dict(profiles or {})
        self._policy = policy
        self._curve = functools.lru_cache(maxsize=None)(self._build)
        # Most shards of a table have the same rows and slots.
        self._known_rate = functools.lru_cache(maxsize=1 << 16)(self._rate)

    def curve(self, option: ShardingOption, shard: Shard) -> Curve:
        """Hit rates by slots of one shard.

        Raises:
            ConfigError: a profile of a table with another number of rows.
        """
        rows = int(option.tensor.shape[0])
        stats = option.cache_params.stats if option.cache_params is not None else None
        named = option.name if option.name in self._profiles else None
        whole = StatisticsCurve(stats, rows) if stats is not None else self._curve(named, rows)
        return ShardCurve(whole, rows / max(1, shard.size[0]))

    def hit_rate(self, option: ShardingOption, shard: Shard, slots: int) -> float:
        """Predicted hit rate per lookup of one shard; 1 for a shard without rows, which is never asked."""
        if shard.size[0] == 0:
            return 1.0
        if option.cache_params is not None and option.cache_params.stats is not None:
            return _rate(self.curve(option, shard), slots)
        named = option.name if option.name in self._profiles else None
        return self._known_rate(named, int(option.tensor.shape[0]), int(shard.size[0]), slots)

    def check_names(self, tables: Iterable[str]) -> None:
        """Raise `UnknownTableError` for a profile of a table that is not one of `tables`."""
        known = sorted(set(tables))
        unknown = sorted(set(self._profiles) - set(known))
        if unknown:
            raise UnknownTableError(
                f"access has profiles of {', '.join(map(repr, unknown))}, which the model lacks; its tables are "
                f"{', '.join(map(repr, known))}"
            )

    def _rate(self, table: str | None, rows: int, shard_rows: int, slots: int) -> float:
        """The hit rate of a shard of `shard_rows` of the `rows` of a table with a profile, its own or the default."""
        if slots >= shard_rows and table is None:
            # A curve takes a while to work out.
            return 1.0
        return _rate(ShardCurve(self._curve(table, rows), rows / shard_rows), slots)

    def _build(self, table: str | None, rows: int) -> HitRateCurve:
        """The curve of a table's own profile, or the default one that tables of equally many rows share."""
        profile = AccessProfile.zipf(rows) if table is None else self._profiles[table]
        if profile.rows != rows:
            raise ConfigError(f"table {table!r} has {rows:,} rows, its access profile {profile.rows:,}")
        return HitRateCurve(profile, self._policy)


def _rate(curve: Curve, slots: int) -> float:
    return float(curve.hit_rate(np.array([slots], dtype=np.float64))[0])


__all__ = ["Access", "ProfileStatistics", "StatisticsCurve"]
