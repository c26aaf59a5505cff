"""What a caller gives to `streaming_update`, checked and turned into rows of bytes by table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from torchrec_turbossd.errors import InputError, RowIndexError
from torchrec_turbossd.rows import as_row_bytes, last_of_each
from torchrec_turbossd.serving.sizing import CUDA_ALIGNMENT, padded_row_bytes
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableSpec, find_table

UpdateBatch = dict[int, Rows]
"""For each table by place: (distinct local ids [N] int64, rows [N, row_bytes] uint8), on the CPU."""


def parse_update(tables: Sequence[TableSpec], indices: Tensor, weights: Tensor, table: str | None) -> UpdateBatch:
    """Rows to write, by table; of an id given more than once, the last row.

    Args:
        indices: [N] int32 or int64, on any device: ids of `table`, or, with None, ids counted through all tables.
        weights: [N, dim] floating, quantised here; or [N, width] uint8 rows in FBGEMM's inference layout, as wide as
            the table's row, that padded to 16 bytes, or the widest padded row of all tables.

    Raises:
        InputError: dtype, shape or width that does not fit, or rows that are not finite.
        RowIndexError: an id outside its table.
        UnknownTableError: no table of that name.
    """
    ids = _check_form(indices, weights)
    if table is not None:
        place = find_table(tables, table)
        parts = {place: torch.arange(ids.numel())}
        bases = [0] * len(tables)
        _check_range(ids, tables[place].rows, f"table {table!r}")
    else:
        bases = [0, *accumulate(t.rows for t in tables)]
        _check_range(ids, bases[-1], f"the whole of {len(tables)} table{'s' * (len(tables) > 1)}")
        parts = _by_table(ids, bases)
    widest = max_row_width(tables)
    weights = weights.detach().cpu()
    batch: UpdateBatch = {}
    for place, lookups in parts.items():
        spec = tables[place]
        distinct, last = last_of_each(ids[lookups] - bases[place])
        padded = padded_row_bytes(spec.dim, spec.data_type, CUDA_ALIGNMENT)
        # All rows are checked, also those that a later one replaces.
        rows = as_row_bytes(spec, weights[lookups], (padded, widest))
        batch[place] = distinct, rows[last]
    return batch


def max_row_width(tables: Sequence[TableSpec]) -> int:
    """Bytes of the widest row of all tables, padded to 16."""
    return max(padded_row_bytes(t.dim, t.data_type, CUDA_ALIGNMENT) for t in tables)


def check_version(version: int | None) -> None:
    """Raise `InputError` unless a version is an int of 0 or more, or None."""
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 0):
        raise InputError(f"a version is an int of 0 or more, got {version!r}")


def _check_form(indices: Tensor, weights: Tensor) -> Tensor:
    for what, tensor in (("indices", indices), ("weights", weights)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{what} must be a tensor, got {type(tensor).__name__}")
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise InputError(f"indices must be 1-D int32 or int64, got {indices.dim()}-D {indices.dtype}")
    if weights.dim() != 2 or weights.shape[0] != indices.numel():
        raise InputError(
            f"weights must be 2-D with a row for each of {indices.numel()} indices, got shape {tuple(weights.shape)}"
        )
    return indices.detach().to(device="cpu", dtype=torch.int64)


def _check_range(ids: Tensor, rows: int, what: str) -> None:
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise RowIndexError(f"{what} has rows 0 to {rows - 1}, got id {low if low < 0 else high}")


def _by_table(ids: Tensor, bases: Sequence[int]) -> dict[int, Tensor]:
    """For each table that `ids` name, the places of its ids among them, in order."""
    tables = torch.bucketize(ids.contiguous(), torch.tensor(bases[1:]), right=True)
    return {int(t): torch.nonzero(tables == t).flatten() for t in torch.unique(tables)}


__all__ = ["UpdateBatch", "check_version", "max_row_width", "parse_update"]
