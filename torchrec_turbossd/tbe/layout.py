"""Where each lookup of a batch belongs: from ids and offsets to slot map positions, with every input checked."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_turbossd.errors import InputError, RowIndexError

_ID_TYPES = (torch.int32, torch.int64)


class Bounds(enum.Enum):
    """What happens to an id outside its table: RAISE, or answer with row 0 as FBGEMM's WARNING and IGNORE do."""

    RAISE = "raise"
    WARN = "warn"
    IGNORE = "ignore"


@dataclass(frozen=True)
class Run:
    """The lookups [start, stop) of a batch, which all belong to one table."""

    table: int
    start: int
    stop: int


class Batch:
    """A batch whose form was checked, and which lookups belong to which table.

    Args:
        ids: [N] int64, as they were given.
        positions: [N] int64 in the slot map; or what finds them and raises `RowIndexError` out of bounds.
    """

    def __init__(self, *, runs: list[Run], positions: Tensor | Callable[[], Tensor], ids: Tensor | None = None) -> None:
        self._runs, self.ids = runs, ids
        self._positions = positions

    @property
    def runs(self) -> list[Run]:
        """Which lookups belong to which table."""
        return self._runs

    @property
    def positions(self) -> Tensor:
        """[N] int64 slot map positions, in bounds."""
        if not isinstance(self._positions, Tensor):
            self._positions = self._positions()
        return self._positions

    def lookups(self, tables: int) -> list[int]:
        """Lookups of each table."""
        counts = [0] * tables
        for run in self.runs:
            counts[run.table] += run.stop - run.start
        return counts


class UnplacedBatch(Batch):
    """A batch of which a kernel has found, or will find, the slots; its positions are looked for when asked for.

    Args:
        layout: where it belongs. ids, offsets: as they were given. bags: of each feature.
    """

    def __init__(self, layout: Layout, ids: Tensor, offsets: Tensor, bags: int) -> None:
        self._layout, self.indices, self.offsets, self.bags = layout, ids.contiguous(), offsets.contiguous(), bags
        self._placed: Batch | None = None

    @property
    def lookups_and_bags(self) -> bool:
        """There is something to find and to answer."""
        return self.indices.numel() > 0 and self.bags > 0

    def keep_for_current_stream(self) -> None:
        """Its memory may come from another stream, and is not used again before this one has come past here."""
        if self.indices.device.type == "cuda":
            for tensor in (self.indices, self.offsets):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def place(self) -> Batch:
        """The batch with its ids judged; raises and warns as `Layout.place`."""
        if self._placed is None:
            self._placed = self._layout.place(self.indices, self.offsets)
        return self._placed

    @property
    def runs(self) -> list[Run]:
        return self.place().runs

    @property
    def positions(self) -> Tensor:
        return self.place().positions


class Layout:
    """Tables and features of a TBE: `feature_table[f]` is the table that feature f looks up.

    Args:
        names, rows: of each local table.
        bases: [tables + 1] int64, first slot map position of each table.
        table_rows: rows of each whole table, where `rows` are those of a row shard.
    """

    def __init__(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        feature_table: Sequence[int],
        bases: Tensor,
        bounds: Bounds = Bounds.RAISE,
        *,
        table_rows: Sequence[int] | None = None,
    ) -> None:
        self.names, self.rows, self.feature_table = list(names), list(rows), list(feature_table)
        self._table_rows = list(rows if table_rows is None else table_rows)
        self.bounds, self.device = bounds, bases.device
        self._bases: list[int] = bases.tolist()
        self._feature_rows = torch.tensor([rows[t] for t in feature_table], device=self.device)
        self._feature_bases = torch.tensor([self._bases[t] for t in feature_table], device=self.device)

    def place(self, ids: Tensor, offsets: Tensor, *, later: bool = False) -> Batch:
        """Check a batch in TBE convention (ids [N], offsets [features * B + 1]) and find each lookup's position.

        With `later` ids are checked, on the CPU, only when positions are asked for: by then the slot map may have done.

        Raises `InputError` for dtype, shape, device or offsets that do not fit, `RowIndexError` for an id outside its
        table when bounds are RAISE. The caller's tensors are never changed.
        """
        size = self.check_form(ids, offsets)
        if self.device.type == "cpu":
            runs, ids = self._runs(self._ends(offsets, size, ids.numel())), ids.to(torch.int64)
            if later:
                return Batch(runs=runs, ids=ids, positions=lambda: self._place_runs(ids, runs))
            return Batch(runs=runs, ids=ids, positions=self._place_runs(ids, runs))
        return self._place_on_device(ids.to(torch.int64), offsets.to(torch.int64), size)

    def check_form(self, ids: Tensor, offsets: Tensor) -> int:
        """Raise `InputError` for what is wrong whatever the tensors hold; returns the bags of each feature."""
        for what, tensor in (("indices", ids), ("offsets", offsets)):
            if not isinstance(tensor, Tensor):
                raise InputError(f"{what} must be a tensor, got {type(tensor).__name__}")
            if tensor.dim() != 1 or tensor.dtype not in _ID_TYPES:
                raise InputError(f"{what} must be 1-D int32 or int64, got {tensor.dim()}-D {tensor.dtype}")
            if tensor.device != self.device:
                raise InputError(f"{what} must be on {self.device}, got {tensor.device}; move them with .to()")
        features = len(self.feature_table)
        if offsets.numel() == 0 or (offsets.numel() - 1) % features:
            raise InputError(f"offsets must have {features} features x batch size + 1 entries, got {offsets.numel()}")
        return (offsets.numel() - 1) // features

    def _ends(self, offsets: Tensor, size: int, lookups: int) -> list[int]:
        """Where each feature's lookups end."""
        features = len(self.feature_table)
        if size == 0:
            if lookups:
                raise InputError(f"offsets describe an empty batch, but there are {lookups} indices")
            return [0] * features
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != lookups or bool((offsets[1:] < offsets[:-1]).any()):
            raise InputError(
                f"offsets must rise from 0 to the {lookups} indices, got {first} to {last}"
                + ("" if first != 0 or last != lookups else ", falling in between")
            )
        ends: list[int] = offsets[size::size].tolist()
        return ends

    def _runs(self, ends: list[int]) -> list[Run]:
        runs: list[Run] = []
        start = 0
        for table, stop in zip(self.feature_table, ends, strict=True):
            if runs and runs[-1].table == table:
                runs[-1] = Run(table, runs[-1].start, stop)
            elif stop > start:
                runs.append(Run(table, start, stop))
            start = stop
        return runs

    def _place_runs(self, ids: Tensor, runs: list[Run]) -> Tensor:
        positions = torch.empty_like(ids)
        for run in runs:
            part, rows = ids[run.start : run.stop], self.rows[run.table]
            low, high = torch.aminmax(part)
            if int(low) < 0 or int(high) >= rows:
                self._out_of_bounds(run.table, int(low) if int(low) < 0 else int(high))
                part = torch.where((part < 0) | (part >= rows), 0, part)
            torch.add(part, self._bases[run.table], out=positions[run.start : run.stop])
        return positions

    def _place_on_device(self, ids: Tensor, offsets: Tensor, size: int) -> Batch:
        """The same with one wait for the device: everything to be judged comes back in one small copy."""
        lookups, features = ids.numel(), len(self.feature_table)
        if size == 0 or lookups == 0:
            return Batch(positions=ids, runs=self._runs(self._ends(offsets, size, lookups)))
        ends = offsets[size::size].contiguous()
        # bucketize stays inside the features whatever the offsets hold; repeat_interleave would write out of bounds.
        each = torch.arange(lookups, dtype=torch.int64, device=self.device)
        feature = torch.bucketize(each, ends, right=True).clamp_(max=features - 1)
        outside = (ids < 0) | (ids >= self._feature_rows[feature])
        positions = torch.where(outside, 0, ids) + self._feature_bases[feature]
        wrong = (offsets[0] != 0) | (offsets[-1] != lookups) | (offsets[1:] < offsets[:-1]).any()
        report = torch.cat([ends, torch.stack([wrong, outside.any()]).to(ends.dtype)]).tolist()
        if report[-2]:
            self._ends(offsets, size, lookups)
        if report[-1]:
            bad = int(torch.nonzero(outside)[0])
            self._out_of_bounds(self.feature_table[int(feature[bad])], int(ids[bad]))
        return Batch(positions=positions, runs=self._runs([int(e) for e in report[:-2]]))

    def _out_of_bounds(self, table: int, row_id: int) -> None:
        name, rows, whole = self.names[table], self.rows[table], self._table_rows[table]
        said = f"table {name!r} has rows 0 to {whole - 1}, got id {row_id}"
        if rows != whole:
            # Ids were dealt out to row shards before they came here, and bad ones are dealt out as well.
            said = (
                f"table {name!r} has rows 0 to {whole - 1}, and a rank looked up an id beyond them (it reached this "
                f"row shard of {rows} rows as its row {row_id})"
            )
        if self.bounds is Bounds.RAISE:
            raise RowIndexError(f"{said}; hash or clamp ids before the lookup")
        if self.bounds is Bounds.WARN:
            warnings.warn(f"{said}; row 0 answers for it", RuntimeWarning, stacklevel=2)


__all__ = ["Batch", "Bounds", "Layout", "Run", "UnplacedBatch"]
