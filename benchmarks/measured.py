"""Hit rates that tables really have while they are served: of the second half of their lookups, warmed by the first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.served import store_of, torch_threads, write_tables
from benchmarks.streams import Ints
from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.metrics import TableReads
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.serving import TurboSSDIntNBitTableBatchedEmbeddingBags

_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is asked of a table, in order.

    Attributes:
        table: it.
        ids: [N] int64.
        batch: lookups of a batch; what is left over of `ids` at the end is not asked.
    """

    table: TableSpec
    ids: Ints
    batch: int

    @property
    def batches(self) -> Tensor:
        """[batches, batch] int64."""
        count = self.ids.size // self.batch
        return torch.from_numpy(self.ids[: count * self.batch]).reshape(count, self.batch)

    @property
    def asked(self) -> Ints:
        """What is asked, without what is left over."""
        return self.ids[: self.ids.size // self.batch * self.batch]

    @property
    def first_half(self) -> Ints:
        """What warms the slots."""
        return self.ids[: self.ids.size // self.batch // 2 * self.batch]


def second_halves(traffic: Sequence[Traffic], slots: Sequence[Sequence[int]], folder: Path) -> list[list[TableReads]]:
    """Reads of the second half of each traffic in caches of each of its `slots`, which start empty.

    The tables are written to SSD as a snapshot in `folder`. One serving TBE, the one within `TurboSSDInferenceModule`,
    holds all caches: each is a table of its own for it, over the same rows in the same store as others of its table,
    and sees its table's whole traffic. Unlike the module it may be given any number of slots.
    """
    tables = [each.table for each in traffic]
    owner = [place for place, sizes in enumerate(slots) for _ in sizes]
    with ExitStack() as stack:
        stack.enter_context(torch_threads(1))
        write_tables(folder / "snapshot", tables, _SEED)
        store = stack.enter_context(store_of(folder / "snapshot", folder / "clone", tables, 1))
        tbe = TurboSSDIntNBitTableBatchedEmbeddingBags(
            [TableShard.whole(tables[place]) for place in owner],
            [size for sizes in slots for size in sizes],
            range(len(owner)),
            store,
        )
        reads = iter(_second_half(tbe, [traffic[place] for place in owner]))
        return [[next(reads) for _ in sizes] for sizes in slots]


def second_half_of_module(module: TurboSSDInferenceModule, traffic: Sequence[Traffic]) -> list[TableReads]:
    """The same of a module that holds just these tables, with the slots that it has."""
    with torch_threads(1):
        return _second_half(module.tbe, traffic)


def overall(reads: Sequence[TableReads]) -> float:
    """Hits per lookup of all."""
    return sum(reads, TableReads(0, 0)).hit_rate


def expected_overall(rates: Sequence[float], traffic: Sequence[Traffic]) -> float:
    """Hits per lookup of all, where each table is hit at its own rate."""
    return float(np.average(rates, weights=[each.batch for each in traffic]))


def _second_half(tbe: TurboSSDIntNBitTableBatchedEmbeddingBags, asked: Sequence[Traffic]) -> list[TableReads]:
    batches = [each.batches for each in asked]
    (count,) = {len(each) for each in batches}
    offsets = torch.tensor([0, *np.cumsum([each.batch for each in asked]).tolist()])
    before: list[TableReads] = []
    for number in range(count):
        if number == count // 2:
            before = tbe.rows.counters.read_each()
        tbe(torch.cat([each[number] for each in batches]), offsets)
    return [
        TableReads(
            now.read_hit_count - then.read_hit_count,
            now.read_miss_count - then.read_miss_count,
        )
        for now, then in zip(tbe.rows.counters.read_each(), before, strict=True)
    ]


__all__ = ["Traffic", "expected_overall", "overall", "second_half_of_module", "second_halves"]
