"""Batches of Zipf ids made on the device that looks them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.streams import bag_offsets

ALPHA = 1.05


def zipf_edges(count: int, alpha: float, device: torch.device) -> Tensor:
    """[count] float64, ascending to 1: the chance of a rank up to and with this one, the first the most popular."""
    edges = torch.arange(1, count + 1, dtype=torch.float64, device=device).pow_(-alpha).cumsum_(0)
    return edges / edges[-1]


class DeviceZipf:
    """Ids of which the one of rank r is asked for in proportion to (r + 1) ** -alpha.

    Args:
        edges: `zipf_edges` of as many ranks as there are ids to ask for; tables of equal size share them.
        ids: [ranks] int64, the id of each rank; None: a random order of all ids below the number of ranks.
        seed: of that order and of what is drawn.
    """

    def __init__(self, edges: Tensor, *, seed: int, ids: Tensor | None = None) -> None:
        self._edges = edges
        self._generator = torch.Generator(edges.device).manual_seed(seed)
        if ids is None:
            ids = torch.randperm(edges.numel(), generator=self._generator, device=edges.device)
        self.ids = ids

    def draw(self, count: int) -> Tensor:
        """[count] int64 ids."""
        chances = torch.rand(count, dtype=torch.float64, device=self._edges.device, generator=self._generator)
        return self.ids[torch.searchsorted(self._edges, chances).clamp_(max=self._edges.numel() - 1)]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is looked up: `tables` of `rows` rows, `bags` of `length` lookups each in every table."""

    tables: int
    rows: int
    bags: int
    length: int

    @property
    def each(self) -> int:
        """Lookups of one table in a batch."""
        return self.bags * self.length

    @property
    def lookups(self) -> int:
        """Lookups in a batch."""
        return self.tables * self.each

    def __str__(self) -> str:
        return f"{self.tables} x {self.rows:,} rows, {self.bags:,} bags x {self.length}"


class Stream:
    """Batches of a shape, drawn from one Zipf popularity a table. `hot`: at most so many ids a table are asked for.

    Attributes:
        asked: ids of a table that may be asked for.
    """

    def __init__(self, shape: Shape, *, device: torch.device, seed: int, hot: int | None = None) -> None:
        self.shape, self.device = shape, device
        self.asked = min(shape.rows, hot or shape.rows)
        edges = zipf_edges(self.asked, ALPHA, device)
        self._tables = []
        for table in range(shape.tables):
            ids = None
            if edges.numel() < shape.rows:
                ids = _spread(shape.rows, edges.numel(), device, seed + table)
            self._tables.append(DeviceZipf(edges, seed=seed + table, ids=ids))
        self.offsets = bag_offsets(shape.tables, shape.bags, shape.length).to(device)

    def batches(self, count: int) -> list[Tensor]:
        """`count` batches of [tables x bags x length] int64 ids in TBE convention, one feature for each table."""
        return [torch.cat([table.draw(self.shape.each) for table in self._tables]) for _ in range(count)]


def _spread(rows: int, count: int, device: torch.device, seed: int) -> Tensor:
    """`count` different ids below `rows`, in random order."""
    generator = torch.Generator(device).manual_seed(seed)
    # Each of `count` equal ranges gives one.
    width = rows // count
    ids = torch.arange(count, device=device) * width
    ids += torch.randint(width, (count,), generator=generator, device=device)
    return ids[torch.randperm(count, generator=generator, device=device)]


def distinct_ids(batches: Sequence[Tensor], tables: int) -> list[Tensor]:
    """For each table the different ids of all batches, those asked for most often last: [M] int64."""
    parts = torch.stack([batch.view(tables, -1) for batch in batches])
    found = []
    for table in range(tables):
        ids, counts = torch.unique(parts[:, table], return_counts=True)
        found.append(ids[counts.argsort()])
    return found


def warming_batches(ids: Sequence[Tensor], chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, offsets) that ask for all `ids` of each table, in order, at most `chunk` of a table at once.

    Each id is a bag of its own; a table that has fewer ids left asks for its last one again, because bags are as many
    in every table.
    """
    most = max(each.numel() for each in ids)
    for start in range(0, most, chunk):
        parts = []
        width = min(chunk, most - start)
        for each in ids:
            part = each[start : start + width]
            parts.append(torch.cat([part, each[-1:].expand(width - part.numel())]))
        batch = torch.cat(parts)
        yield batch, torch.arange(batch.numel() + 1, device=batch.device)


__all__ = ["ALPHA", "DeviceZipf", "Shape", "Stream", "distinct_ids", "warming_batches", "zipf_edges"]
