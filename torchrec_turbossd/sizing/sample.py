"""A bounded sample of the lookups of one table, from which popularity and hit rates are estimated."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_turbossd.errors import ConfigError, InputError, RowIndexError

DEFAULT_EVENTS = 1 << 18
"""Lookups that a window of a trace's sample keeps, 6 to 12 MiB; there is one more each time the lookups double."""

RECORDED_EVENTS = 1 << 15
"""The same where lookups are recorded while they are served: 0.8 to 1.5 MiB a window. For small caches, which the
first windows size, such a sample then tells of the latest lookups only."""

LEAST_EVENTS = 1 << 10

_HASH_BITS, _MOST_WINDOWS = 32, 31
_HELD_BACK, _BATCHES_HELD_BACK = 1 << 13, 256
_HOT_PART = 32
_PARTS_OF_A_BATCH = 1 << 20
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_ID_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Of Fibonacci hashing and of the SplitMix64 generator, as signed numbers.
_SPREAD, _STIR = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Window:
    """The latest lookups of a share of the rows.

    Attributes:
        share: of the table's rows; a hash of the id says which.
        ids: [N] int64, in order.
        batches: [N] int64, not falling: the number of the batch of each.
        places: [N] int64, not falling: how many lookups, of whatever row, came before each.
        whole: it spans all that was sampled.
        left_out: rows of this share that are left out because they are asked for all the time, [H] int64.
    """

    share: float
    ids: Ints
    batches: Ints
    places: Ints
    whole: bool
    left_out: Ints


class AccessSample:
    """What was asked of a table, in some MiB however long it runs.

    Window l keeps the last `events` lookups of one row in 2**l, chosen by a hash of the id (spatial sampling: C.
    Waldspurger, N. Park, A. Garthwaite, I. Ahmad, "Efficient MRC Construction with SHARDS", FAST 2015). So the first
    has every row for a short time, which is all that a small cache remembers, and the last has few rows, for as long
    as a large one does. Windows are added until one spans all that was seen: a short trace is kept whole. A row that
    has more than one in 32 lookups of a window is left out of those added after it, which would soon hold little else.

    Not thread-safe. Pickles, for `merged` over ranks.

    Args:
        rows: of the table.
        events: lookups that a window keeps, at least `LEAST_EVENTS`.

    Attributes:
        lookups, batches: in all.

    Raises:
        ConfigError: rows or events that make no sense.
    """

    def __init__(self, rows: int, *, events: int = DEFAULT_EVENTS) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(f"rows must be a positive int, got {rows!r}")
        if isinstance(events, bool) or not isinstance(events, int) or events < LEAST_EVENTS:
            raise ConfigError(f"a sample keeps at least {LEAST_EVENTS:,} events, got {events!r}")
        self.rows, self.lookups, self.batches = rows, 0, 0
        self._events = events
        self._kept = [_Kept(events)]
        # Number of each batch held back, and its ids.
        self._held: list[tuple[int, Tensor]] = []
        self._held_lookups = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(kept.nbytes for kept in self._kept) + 8 * self._held_lookups

    def windows(self) -> list[Window]:
        """The window of every row, of every other one, and so on to the first that spans the whole sample."""
        self._settle()
        return [kept.window(0.5**level) for level, kept in enumerate(self._kept)]

    def add(self, ids: Tensor | npt.NDArray[np.integer]) -> None:
        """One batch: integer ids of any shape, on any device.

        Raises:
            InputError: not integers, signed or not.
            RowIndexError: an id outside the table; then nothing is kept.
        """
        flat = _signed(ids)
        if flat.numel():
            least, most = int(flat.amin()), int(flat.amax())
            if least < 0 or most >= self.rows:
                raise RowIndexError(f"the table has rows 0 to {self.rows - 1}, the trace has {least} to {most}")
            self._held.append((self.batches, flat.to("cpu", torch.int64, copy=True)))
            self._held_lookups += flat.numel()
            self.lookups += flat.numel()
        self.batches += 1
        if self._held_lookups >= _HELD_BACK or len(self._held) >= _BATCHES_HELD_BACK:
            self._settle()

    def _settle(self) -> None:
        """Hand on what was held back, because a batch alone may be too little to be worth the while."""
        if not self._held:
            return
        # Within a batch the time goes on too, so that the parts of one that several shards have can be put together.
        times = [
            number * _PARTS_OF_A_BATCH + torch.arange(ids.numel()) * _PARTS_OF_A_BATCH // ids.numel()
            for number, ids in self._held
        ]
        places = torch.arange(self.lookups - self._held_lookups, self.lookups)
        columns = torch.stack((torch.cat([ids for _, ids in self._held]), torch.cat(times), places)).numpy()
        self._held, self._held_lookups = [], 0
        level = 0
        while columns.shape[1] and level < len(self._kept):
            kept = self._kept[level]
            # What the next one begins with must still be here.
            if kept.would_lose(columns) and level + 1 == len(self._kept) < _MOST_WINDOWS:
                self._kept.append(kept.next(level + 1, columns[0]))
            kept.append(columns)
            level += 1
            if level < len(self._kept):
                columns = self._kept[level].wanted(columns, level)

    def copy(self) -> AccessSample:
        """One that goes its own way."""
        return copy.deepcopy(self)

    def thinned(self, parts: int) -> AccessSample:
        """A copy with as much of the latest as one of so many parts of a sample needs, for `merged`."""
        self._settle()
        fewer = AccessSample(self.rows, events=max(LEAST_EVENTS, min(self._events, 2 * self._events // parts)))
        fewer.lookups, fewer.batches = self.lookups, self.batches
        fewer._kept = []
        while not fewer._kept or (fewer._kept[-1].lost and len(fewer._kept) < _MOST_WINDOWS):
            level = len(fewer._kept)
            kept = self._kept[level] if level < len(self._kept) else self._kept[-1].next(level)
            fewer._kept.append(kept.latest(fewer._events))
        return fewer

    @classmethod
    def merged(cls, parts: Sequence[AccessSample]) -> AccessSample:
        """Samples of the same batches in several places, such as the row shards of a table, as one. It keeps as much of
        each window as the part that keeps the most, or as half of all parts.

        Raises:
            ConfigError: no sample, or tables of different sizes.
        """
        if not parts or len({part.rows for part in parts}) != 1:
            raise ConfigError(f"samples of one table are needed, got tables of {[part.rows for part in parts]} rows")
        for part in parts:
            part._settle()
        sizes = [part._events for part in parts]
        whole = cls(parts[0].rows, events=max(*sizes, min(sum(sizes) // 2, DEFAULT_EVENTS)))
        whole.lookups, whole.batches = sum(part.lookups for part in parts), max(part.batches for part in parts)
        whole._kept = []
        while not whole._kept or (whole._kept[-1].lost and len(whole._kept) < _MOST_WINDOWS):
            level = len(whole._kept)
            # The last window of a part spans all of it, so that fewer rows of it are what the next ones would have.
            kept = [p._kept[level] if level < len(p._kept) else p._kept[-1].next(level) for p in parts]
            whole._kept.append(_Kept.joined(kept, [part.lookups for part in parts], whole._events))
        return whole


def sample_trace(
    ids: Tensor | npt.NDArray[np.integer] | Iterable[Tensor], rows: int, *, batch: int, events: int = DEFAULT_EVENTS
) -> AccessSample:
    """A sample of a trace: one array of ids, taken as batches of `batch` lookups, or an iterable of batches.

    Raises:
        ConfigError: `batch` is not a positive int.
        InputError: no lookups at all.
        RowIndexError: an id outside the table.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"a batch has a positive number of lookups, got {batch!r}")
    sample = AccessSample(rows, events=events)
    if isinstance(ids, (Tensor, np.ndarray)):
        flat = ids.reshape(-1)
        for start in range(0, len(flat), batch):
            sample.add(flat[start : start + batch])
    else:
        for each in ids:
            sample.add(each)
    if not sample.lookups:
        raise InputError("a trace needs at least one integer id, got none")
    return sample


def row_hash(ids: Tensor) -> Tensor:
    """A number of 32 bits for each row id [N] int64: [N] int64.

    Two rounds of multiply and shift, so that regular ids do not make regular samples.
    """
    mixed = (ids + 1) * _SPREAD
    mixed = (mixed ^ (mixed >> 29)) * _STIR
    return (mixed >> (63 - _HASH_BITS)) & ((1 << _HASH_BITS) - 1)


def _signed(ids: Tensor | npt.NDArray[Any]) -> Tensor:
    """Ids in one row, of a signed type or uint8; those of an array are a copy, which the caller may fill again."""
    if isinstance(ids, Tensor):
        if ids.dtype not in (*_ID_TYPES, *_UNSIGNED):
            raise InputError(f"a trace needs integer ids, got {ids.dtype}")
        if ids.dtype not in _UNSIGNED:
            return ids.detach().reshape(-1)
        # PyTorch cannot compare these.
        ids = ids.detach().cpu().numpy()
    array = np.asarray(ids).reshape(-1)
    if array.dtype.kind not in "iu":
        raise InputError(f"a trace needs integer ids, got {array.dtype}")
    if array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise RowIndexError(f"the trace has a row id of {int(array.max())}, which no table has")
    # Whatever the order of its bytes is.
    return torch.from_numpy(array.astype(np.int64))


class _Kept:
    """The last so many lookups of some of the rows: ids, times and places, [3, N] int64.

    A time is the number of the batch and, in the last 20 bits, how far into it.
    """

    def __init__(self, most: int, left_out: Ints | None = None) -> None:
        self._most, self._end, self.lost = most, 0, False
        self._left_out: Ints = np.empty(0, dtype=np.int64) if left_out is None else left_out
        self._space: Ints = np.empty((3, LEAST_EVENTS), dtype=np.int64)

    @property
    def size(self) -> int:
        return min(self._end, self._most)

    @property
    def nbytes(self) -> int:
        return self._space.nbytes

    @property
    def columns(self) -> Ints:
        return self._space[:, self._end - self.size : self._end]

    def window(self, share: float) -> Window:
        """A copy."""
        ids, times, places = self.columns.copy()
        return Window(
            share=share,
            ids=ids,
            batches=times // _PARTS_OF_A_BATCH,
            places=places,
            whole=not self.lost,
            left_out=self._left_out.copy(),
        )

    def would_lose(self, columns: Ints) -> bool:
        """Whether there is no room for all of these and what is here."""
        return self.size + columns.shape[1] > self._most

    def append(self, columns: Ints) -> None:
        self.lost = self.lost or self.would_lose(columns)
        columns = columns[:, -self._most :]
        if self._end + columns.shape[1] > self._space.shape[1]:
            held = self.columns
            # Twice the most, so that what is kept moves to the front only once in so many lookups.
            room = min(2 * (held.shape[1] + columns.shape[1]), 2 * self._most)
            self._space, self._end = np.empty((3, room), dtype=np.int64), held.shape[1]
            self._space[:, : self._end] = held
        self._space[:, self._end : self._end + columns.shape[1]] = columns
        self._end += columns.shape[1]

    def wanted(self, columns: Ints, level: int) -> Ints:
        """What of columns [3, N] is of the one row in 2**level that is sampled here. Each level is part of the one
        before."""
        sampled = row_hash(torch.from_numpy(columns[0])) < 1 << (_HASH_BITS - level)
        columns = columns[:, sampled.numpy()]
        return columns[:, ~np.isin(columns[0], self._left_out)] if self._left_out.size else columns

    def next(self, level: int, coming: Ints | None = None) -> _Kept:
        """What of this is of one in 2**level rows, without the hottest where more ids are `coming` [N] than fit."""
        left_out = self._left_out
        if coming is not None:
            rows, counts = np.unique(np.concatenate((self.columns[0], coming)), return_counts=True)
            left_out = np.union1d(left_out, rows[counts * _HOT_PART > counts.sum()])
        fewer = _Kept(self._most, left_out)
        fewer.append(fewer.wanted(self.columns, level))
        fewer.lost = self.lost
        return fewer

    def latest(self, most: int) -> _Kept:
        """The last so many of them."""
        fewer = _Kept(most, self._left_out)
        fewer.append(self.columns)
        fewer.lost = fewer.lost or self.lost
        return fewer

    @classmethod
    def joined(cls, parts: Sequence[_Kept], lookups: Sequence[int], most: int) -> _Kept:
        """The lookups of all parts, of which each has had so many, in order of time, from the first one on since which
        all of them are whole."""
        first = max((int(part.columns[1, 0]) for part in parts if part.lost), default=0)
        left_out = np.unique(np.concatenate([part._left_out for part in parts]))
        columns = [part.columns[:, part.columns[1] >= first] for part in parts]
        columns = [each[:, ~np.isin(each[0], left_out)] for each in columns]
        # Every lookup moves the place on by as much as it did in its own part.
        steps = np.concatenate([np.diff(each[2], prepend=each[2, :1]) for each in columns])
        joined = np.concatenate(columns, axis=1)
        order = np.argsort(joined[1], kind="stable")
        joined = joined[:, order]
        since = sum(count - int(each[2, 0]) for count, each in zip(lookups, columns, strict=True) if each.shape[1])
        joined[2] = sum(lookups) - since + np.cumsum(steps[order])
        whole = cls(most, left_out)
        whole.append(joined)
        whole.lost = whole.lost or any(part.lost for part in parts)
        return whole


__all__ = ["DEFAULT_EVENTS", "LEAST_EVENTS", "RECORDED_EVENTS", "AccessSample", "Window", "row_hash", "sample_trace"]
