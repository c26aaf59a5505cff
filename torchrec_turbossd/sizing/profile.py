"""How often each row of a table is asked for, as groups of equally popular rows."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchrec_turbossd.errors import ConfigError, CorruptError, FormatVersionError, InputError, RowIndexError

DEFAULT_ZIPF_ALPHA = 1.05
"""Exponent of the profile assumed where none is given.

It is the one that published embedding cache benchmarks use (NVIDIA's NVE and dynamicemb), so that figures compare.
Real tables are milder or steeper: measure them (`AccessProfile.from_counts`, `.from_trace`) before trusting a size
that matters.
"""

_FORMAT = "torchrec_turbossd access profile"
_VERSION = 1
_EXACT_RANKS = 512
_GROUP_RATIO = 1.02

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AccessProfile:
    """The chance that a lookup asks for each of `rows` rows, hottest first, independent of which row has which id.

    A group is `sizes[g]` rows, each asked for with probability `chances[g]` by one lookup. Groups cover all rows and
    the chances of all rows add up to 1. Iterating gives `(group size, probability of each id)` pairs. Equal profiles
    are equal and hash alike, in every process.

    Attributes:
        rows: rows of the table.
        sizes: [G] int64, read-only.
        chances: [G] float64, not rising, read-only.
    """

    rows: int
    sizes: Ints
    chances: Floats

    def __post_init__(self) -> None:
        _check_rows(self.rows)
        sizes = np.array(self.sizes, dtype=np.int64)
        chances = np.array(self.chances, dtype=np.float64)
        if sizes.ndim != 1 or sizes.shape != chances.shape or sizes.size == 0:
            raise ConfigError(f"a profile needs equally many sizes and chances, got {sizes.shape}, {chances.shape}")
        if (sizes < 1).any() or int(sizes.sum()) != self.rows:
            raise ConfigError(f"group sizes must be positive and add up to {self.rows} rows, got {int(sizes.sum())}")
        falling = bool(np.isfinite(chances).all()) and bool((np.diff(chances) <= 0).all()) and chances[-1] >= 0
        if not falling or not math.isclose(float(sizes @ chances), 1.0, rel_tol=1e-6):
            raise ConfigError("chances must be finite, not negative, not rising, and add up to 1 over all rows")
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
        array = counts.detach().cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)
        if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.number):
            raise InputError(f"counts must be 1-D numbers, one for each row, got {array.ndim}-D {array.dtype}")
        values, sizes = np.unique(array, return_counts=True)
        values = values.astype(np.float64)
        if not np.isfinite(values).all() or values[0] < 0 or values[-1] <= 0:
            raise InputError(f"counts must be finite, not negative and not all zero, got {values[0]} to {values[-1]}")
        return _grouped(array.size, sizes[::-1], values[::-1])

    @classmethod
    def from_trace(cls, ids: Tensor | npt.NDArray[Any], rows: int) -> AccessProfile:
        """A sample of lookups: [N] integer ids of a table of `rows` rows.

        Rows that the sample lacks are not impossible. Every row seen gives up the same part d of its count to them,
        d = n1 / (n1 + 2 n2) with n1 and n2 rows seen once and twice, so that hot rows keep their chance and cold ones
        do not look hotter than they are (absolute discounting: H. Ney, U. Essen, R. Kneser, "On structuring
        probabilistic dependences in stochastic language modelling", 1994). d stays small enough that no row unseen
        becomes likelier than one seen once.

        Raises:
            InputError: no ids, or not integers.
            RowIndexError: an id outside the table.
        """
        _check_rows(rows)
        array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        if array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"a trace needs at least one integer id, got {array.size} of {array.dtype}")
        if array.min() < 0 or array.max() >= rows:
            raise RowIndexError(f"the table has rows 0 to {rows - 1}, the trace has {array.min()} to {array.max()}")
        seen = np.unique(array.reshape(-1), return_counts=True)[1]
        counts, sizes = np.unique(seen, return_counts=True)
        unseen = rows - seen.size
        if not unseen:
            return _grouped(rows, sizes[::-1], counts[::-1].astype(np.float64))
        once, twice = (int(sizes[counts == times].sum()) for times in (1, 2))
        part = min(once / max(1, once + 2 * twice), unseen / rows)
        weights = np.append(counts[::-1] - part, part * seen.size / unseen)
        return _grouped(rows, np.append(sizes[::-1], unseen), weights)

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
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path` as JSON, whole or not at all."""
        target = Path(path)
        whole = {
            "format": _FORMAT,
            "version": _VERSION,
            "rows": self.rows,
            "sizes": self.sizes.tolist(),
            "chances": self.chances.tolist(),
        }
        part = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        part.write_text(json.dumps(whole))
        part.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AccessProfile:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FormatVersionError: a newer release wrote it.
            CorruptError: anything else than a whole profile.
        """
        try:
            whole = json.loads(Path(path).read_text())
            if whole["format"] != _FORMAT:
                raise CorruptError(f"{path} is not an access profile: its format is {whole['format']!r}")
            if whole["version"] > _VERSION:
                raise FormatVersionError(
                    f"{path} has version {whole['version']}; this release reads up to {_VERSION}: upgrade"
                )
            return cls(whole["rows"], whole["sizes"], whole["chances"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptError(f"{path} is not a whole access profile: {error}") from error

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
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"rows must be a positive int, got {rows!r}")


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


__all__ = ["DEFAULT_ZIPF_ALPHA", "AccessProfile"]
