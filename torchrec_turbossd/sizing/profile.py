"""How often each row of a table is asked for, as groups of equally popular rows."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchrec_turbossd.cache.policies import DEFAULT_POLICY, POLICIES
from torchrec_turbossd.errors import ConfigError, InputError
from torchrec_turbossd.sizing.json_file import (
    INT64_END,
    check_keys,
    check_numbers,
    only_corrupt,
    read_json,
    write_whole,
)
from torchrec_turbossd.sizing.popularity import popularity
from torchrec_turbossd.sizing.replay import replayed
from torchrec_turbossd.sizing.sample import DEFAULT_EVENTS, AccessSample, sample_trace

DEFAULT_ZIPF_ALPHA = 1.05
"""Exponent of the profile assumed where none is given.

It is the one that published embedding cache benchmarks use (NVIDIA's NVE and dynamicemb), so that figures compare.
Real tables are milder or steeper: measure them (`AccessProfile.from_counts`, `.from_trace`) before trusting a size
that matters.
"""

_FORMAT = "torchrec_turbossd access profile"
_VERSION = 2
_MOST_ROWS = 1 << 62
_FIELDS_OF_1 = {"rows", "sizes", "chances"}
_FIELDS = _FIELDS_OF_1 | {"lookups", "curves"}
_LEAST_REPLAYED = 1 << 16
_EXACT_RANKS = 512
_GROUP_RATIO = 1.02

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Recorded(Protocol):
    """A module that records what its tables are asked for."""

    def access_samples(self) -> Mapping[str, AccessSample]:
        """A sample for each table."""


@dataclass(frozen=True, eq=False)
class ReplayedCurve:
    """Hit rates per lookup that a trace had in caches of several sizes.

    Attributes:
        policy: the eviction policy.
        slots: [K] int64, rising, read-only.
        hit_rates: [K] float64, not falling, in [0, 1], read-only.

    Raises:
        ConfigError: anything else.
    """

    policy: str
    slots: Ints
    hit_rates: Floats

    def __post_init__(self) -> None:
        slots, rates = _array(self.slots, np.int64, "slots"), _array(self.hit_rates, np.float64, "hit rates")
        if not isinstance(self.policy, str) or slots.ndim != 1 or slots.shape != rates.shape or slots.size == 0:
            raise ConfigError(
                f"a curve needs a policy and as many slots as hit rates, got {slots.shape}, {rates.shape}"
            )
        if slots[0] < 1 or (np.diff(slots) <= 0).any():
            raise ConfigError("slots of a curve must be positive and rise")
        if not (np.diff(rates) >= 0).all() or not 0 <= rates[0] <= rates[-1] <= 1:
            raise ConfigError("hit rates of a curve must be between 0 and 1 and never fall")
        slots.flags.writeable = rates.flags.writeable = False
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "hit_rates", rates)


@dataclass(frozen=True, eq=False)
class AccessProfile:
    """The chance that a lookup asks for each of `rows` rows, hottest first, independent of which row has which id.

    One that comes from a trace also knows what hit rates its order of lookups had, and how many lookups it had.

    A group is `sizes[g]` rows, each asked for with probability `chances[g]` by one lookup. Groups cover all rows and
    the chances of all rows add up to 1. Iterating gives `(group size, probability of each id)` pairs. Equal profiles
    are equal and hash alike, in every process.

    Attributes:
        rows: rows of the table.
        sizes: [G] int64, read-only.
        chances: [G] float64, not rising, read-only.
        curves: of a trace, at most one for each policy.
        lookups: that it was made from; 0 where unknown. Profiles of the same time tell by it how busy tables are.
    """

    rows: int
    sizes: Ints
    chances: Floats
    curves: tuple[ReplayedCurve, ...] = ()
    lookups: int = 0

    def __post_init__(self) -> None:
        _check_rows(self.rows)
        sizes, chances = _array(self.sizes, np.int64, "sizes"), _array(self.chances, np.float64, "chances")
        if sizes.ndim != 1 or sizes.shape != chances.shape or sizes.size == 0:
            raise ConfigError(f"a profile needs equally many sizes and chances, got {sizes.shape}, {chances.shape}")
        # In Python's integers, which have no end.
        total = sum(sizes.tolist())
        if (sizes < 1).any() or total != self.rows:
            raise ConfigError(f"group sizes must be positive and add up to {self.rows} rows, got {total}")
        falling = bool(np.isfinite(chances).all()) and bool((np.diff(chances) <= 0).all()) and chances[-1] >= 0
        if not falling or not math.isclose(float(sizes @ chances), 1.0, rel_tol=1e-6):
            raise ConfigError("chances must be finite, not negative, not rising, and add up to 1 over all rows")
        lookups = self.lookups
        if isinstance(lookups, bool) or not isinstance(lookups, int) or not 0 <= lookups < INT64_END:
            raise ConfigError(f"lookups must be an int of 64 bits, not negative, got {lookups!r}")
        object.__setattr__(self, "curves", _checked_curves(self.curves, self.rows))
        sizes.flags.writeable = chances.flags.writeable = False
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "chances", chances)

    @classmethod
    def zipf(cls, rows: int, alpha: float = DEFAULT_ZIPF_ALPHA) -> AccessProfile:
        """The row of rank r (from 1) is asked for in proportion to r ** -alpha; alpha 0 is uniform.

        The first ranks are exact; later ones are grouped by 2 % of their rank, each group keeping its mass (the
        integral of x ** -alpha, by the midpoint rule), so that 1.6 billion rows take about a thousand groups.

        Raises:
            ConfigError: rows is not a positive int, or alpha is negative or not finite.
        """
        _check_rows(rows)
        if not math.isfinite(alpha) or alpha < 0:
            raise ConfigError(f"a Zipf exponent is finite and not negative, got {alpha}")
        ends = _rank_ends(rows)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        sizes = ends - starts
        masses = _power_mass(starts + 0.5, ends + 0.5, alpha)
        singles = sizes == 1
        masses[singles] = ends[singles].astype(np.float64) ** -alpha
        return cls(rows, sizes, _falling(masses / sizes / masses.sum()))

    @classmethod
    def from_counts(cls, counts: Tensor | npt.NDArray[Any]) -> AccessProfile:
        """Row i was asked for `counts[i]` times: [rows] of any real type, taken as exact.

        Raises:
            InputError: not 1-D, empty, negative, not finite, or all zero.
        """
        if isinstance(counts, Tensor):
            # NumPy lacks bfloat16.
            counts = (counts.double() if counts.is_floating_point() else counts).detach().cpu().numpy()
        array = np.asarray(counts)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iuf":
            raise InputError(f"counts must be 1-D real numbers, one for each row, got {array.ndim}-D {array.dtype}")
        values, sizes = np.unique(array, return_counts=True)
        values = values.astype(np.float64)
        if not np.isfinite(values).all() or values[0] < 0 or values[-1] <= 0:
            raise InputError(f"counts must be finite, not negative and not all zero, got {values[0]} to {values[-1]}")
        return _grouped(array.size, sizes[::-1], values[::-1])

    @classmethod
    def from_trace(
        cls,
        ids: Tensor | npt.NDArray[Any] | Iterable[Tensor],
        rows: int,
        *,
        batch: int = 1024,
        events: int = DEFAULT_EVENTS,
        policies: Sequence[str] = (DEFAULT_POLICY,),
    ) -> AccessProfile:
        """Of the lookups of a table of `rows` rows, in order: a sample of its traffic, of any length.

        Popularity is estimated so that rows which the trace lacks are not impossible. Traces of 65,536 lookups and more
        are also replayed through caches of several sizes, so that hit rates know about sessions and drift: a few
        seconds. Of long traces both are done on a sample, which takes some MiB, and may be a memory-mapped array.

        Args:
            ids: integers, [N] in order, or an iterable of batches.
            rows: of the table.
            batch: lookups of a batch, where `ids` is one array.
            events: lookups that each window of the sample keeps; see `AccessSample`.
            policies: eviction policies to replay with.

        Raises:
            ConfigError: another argument that makes no sense.
            InputError: no ids, or not integers.
            RowIndexError: an id outside the table.
        """
        return cls.from_sample(sample_trace(ids, rows, batch=batch, events=events), policies=policies)

    @classmethod
    def from_sample(cls, sample: AccessSample, *, policies: Sequence[str] = (DEFAULT_POLICY,)) -> AccessProfile:
        """The same from a sample.

        Raises:
            ConfigError: an unknown policy.
            InputError: a sample without lookups.
        """
        unknown = sorted(set(policies) - set(POLICIES))
        if unknown:
            raise ConfigError(f"no eviction policy {unknown[0]!r}; the policies are {', '.join(POLICIES)}")
        if not sample.lookups:
            raise InputError(f"the sample of a table of {sample.rows:,} rows has no lookups; record some first")
        enough = sample.lookups >= _LEAST_REPLAYED and sample.batches > 1
        points = [(policy, *replayed(sample, policy)) for policy in policies] if enough else []
        curves = [ReplayedCurve(policy, slots, rates) for policy, slots, rates in points if slots.size]
        grouped = _grouped(sample.rows, *popularity(sample))
        return cls(sample.rows, grouped.sizes, grouped.chances, tuple(curves), sample.lookups)

    @classmethod
    def from_cache(cls, module: Recorded, *, policies: Sequence[str] = (DEFAULT_POLICY,)) -> dict[str, AccessProfile]:
        """Profiles by table of what a module was asked for since its `record_access()`.

        Tables without lookups are left out.
        """
        samples = module.access_samples()
        return {name: cls.from_sample(s, policies=policies) for name, s in samples.items() if s.lookups}

    def distinct(self, lookups: float) -> float:
        """Expected number of distinct rows among `lookups` independent lookups."""
        if lookups <= 0:
            return 0.0
        # log1p keeps the chance of a cold row, which 1 - p would round away.
        with np.errstate(divide="ignore"):
            return float(self.sizes @ -np.expm1(lookups * np.log1p(-np.minimum(self.chances, 1.0))))

    @functools.cached_property
    def fingerprint(self) -> str:
        """128 bits of the contents, in hexadecimal."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (np.int64(self.rows), self.sizes, self.chances):
            digest.update(part.tobytes())
        for curve in self.curves:
            digest.update(curve.policy.encode() + curve.slots.tobytes() + curve.hit_rates.tobytes())
        if self.lookups:
            digest.update(np.int64(self.lookups).tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path` as JSON, whole or not at all."""
        whole = {
            "format": _FORMAT,
            "version": _VERSION,
            "rows": self.rows,
            "sizes": self.sizes.tolist(),
            "chances": self.chances.tolist(),
            "lookups": self.lookups,
            "curves": [
                {"policy": curve.policy, "slots": curve.slots.tolist(), "hit_rates": curve.hit_rates.tolist()}
                for curve in self.curves
            ],
        }
        write_whole(path, json.dumps(whole).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AccessProfile:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FormatVersionError: a newer release wrote it.
            CorruptError: anything else than a whole profile.
        """
        whole, version = read_json(path, format=_FORMAT, newest=_VERSION)
        with only_corrupt(path, _FORMAT):
            check_keys(whole, _FIELDS if version > 1 else _FIELDS_OF_1, "it")
            check_numbers(whole["sizes"], "sizes", whole=True)
            check_numbers(whole["chances"], "chances", whole=False)
            curves = tuple(_curve(curve) for curve in _list(whole.pop("curves", [])))
            return cls(**whole, curves=curves)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.sizes.tolist(), self.chances.tolist(), strict=True)

    def __len__(self) -> int:
        return int(self.sizes.size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AccessProfile) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return int(self.fingerprint, 16) & (2**61 - 1)

    def __repr__(self) -> str:
        return f"AccessProfile({self.rows} rows in {len(self)} groups)"


def _check_rows(rows: int) -> None:
    if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= _MOST_ROWS:
        raise ConfigError(f"rows must be a positive int up to 2**62, got {rows!r}")


def _array(values: npt.ArrayLike, dtype: type[np.generic], what: str) -> npt.NDArray[Any]:
    """A copy; integers that are none, or too large, are not made to fit."""
    given = np.asarray(values)
    whole = np.issubdtype(dtype, np.integer)
    if given.size and (given.dtype.kind not in ("iu" if whole else "iuf") or (whole and given.max() >= INT64_END)):
        raise ConfigError(f"{what} must be {'whole ' if whole else ''}numbers of 64 bits, got {given.dtype}")
    return np.array(given, dtype=dtype)


def _checked_curves(curves: Sequence[ReplayedCurve], rows: int) -> tuple[ReplayedCurve, ...]:
    policies = [curve.policy for curve in curves]
    if len(set(policies)) < len(policies):
        raise ConfigError(f"a profile has one curve for a policy at most, got {', '.join(policies)}")
    for curve in curves:
        if int(curve.slots[-1]) > rows:
            raise ConfigError(f"a curve of {rows:,} rows cannot have {int(curve.slots[-1]):,} slots")
    return tuple(curves)


def _list(found: object) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError("curves must be a list")
    return found


def _curve(whole: dict[str, Any]) -> ReplayedCurve:
    """From a file."""
    check_keys(whole, {"policy", "slots", "hit_rates"}, "a curve")
    if whole["policy"] not in POLICIES:
        raise ValueError(f"a curve has no eviction policy {whole['policy']!r}; the policies are {', '.join(POLICIES)}")
    check_numbers(whole["slots"], "slots", whole=True)
    check_numbers(whole["hit_rates"], "hit_rates", whole=False)
    return ReplayedCurve(**whole)


def _rank_ends(count: int) -> Ints:
    """Last ranks of the groups that split ranks 1 to `count`: single ones first, then 2 % wide."""
    singles = np.arange(1, min(count, _EXACT_RANKS) + 1, dtype=np.int64)
    if count <= _EXACT_RANKS:
        return singles
    steps = math.ceil(math.log(count / _EXACT_RANKS) / math.log(_GROUP_RATIO))
    wide = np.unique(np.geomspace(_EXACT_RANKS, count, steps + 1)[1:].round().astype(np.int64))
    wide[-1] = count
    return np.unique(np.concatenate([singles, wide]))


def _power_mass(low: npt.NDArray[Any], high: npt.NDArray[Any], alpha: float) -> Floats:
    """The integral of x ** -alpha over [low, high), which stays exact as alpha nears 1."""
    span, slope = np.log(high / low), 1.0 - alpha
    ratio = span if slope == 0.0 else np.expm1(slope * span) / slope
    mass: Floats = low**slope * ratio
    return mass


def _falling(chances: Floats) -> Floats:
    """Remove the last-digit rises that rounding leaves between groups of equal chance."""
    return np.minimum.accumulate(chances)


def _grouped(rows: int, sizes: npt.NDArray[Any], weights: Floats) -> AccessProfile:
    """A profile of groups given hottest first; where there are too many, neighbours merge and keep their mass."""
    sizes = sizes.astype(np.int64)
    if sizes.size > 2 * _EXACT_RANKS:
        ends = np.cumsum(sizes)
        # A group goes where its last rank falls, so that no group is split.
        bins = np.searchsorted(_rank_ends(rows), ends)
        firsts = np.flatnonzero(np.diff(bins, prepend=-1))
        masses = np.add.reduceat(sizes * weights, firsts)
        sizes = np.add.reduceat(sizes, firsts)
        weights = masses / sizes
    return AccessProfile(rows, sizes, _falling(weights / float(sizes @ weights)))


__all__ = ["DEFAULT_ZIPF_ALPHA", "AccessProfile", "Recorded", "ReplayedCurve"]
