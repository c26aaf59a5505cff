"""What the tables of a TBE are asked for, recorded while they serve or train."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

import torch

from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.sizing import RECORDED_EVENTS, AccessSample
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.layout import Batch


class AccessRecorder:
    """A sample of the lookups of each table, by global row id; it keeps none until told to.

    Safe from several threads.

    Args:
        shards: the tables, in the TBE's order.
        bases: first slot map position of each.
    """

    def __init__(self, shards: Sequence[TableShard], bases: Sequence[int]) -> None:
        self._shards, self._bases = list(shards), list(bases)
        self._lock = threading.Lock()
        self._samples: list[AccessSample] | None = None

    def start(self, events: int = RECORDED_EVENTS) -> None:
        """Record from now on, with nothing from before. `events`: as `AccessSample` takes them."""
        samples = [AccessSample(shard.table.rows, events=events) for shard in self._shards]
        with self._lock:
            self._samples = samples

    def stop(self) -> None:
        """Record no more, and forget what was."""
        with self._lock:
            self._samples = None

    def add(self, batch: Batch) -> None:
        """The lookups of a batch that is used."""
        # Without the lock, which a lookup would wait for: that it may see the last batch or one more does no harm.
        if self._samples is None:
            return
        with self._lock:
            for table, sample in enumerate(self._samples or ()):
                runs = [batch.positions[run.start : run.stop] for run in batch.runs if run.table == table]
                # A batch without lookups of a table counts too, so that the shards of a table agree on its number.
                ids = torch.cat(runs) if runs else batch.positions[:0]
                sample.add(ids - self._bases[table] + self._shards[table].row_offset)

    def samples(self) -> list[tuple[TableShard, AccessSample]]:
        """A copy of what was recorded, by shard; of a shard of the rows as much as the whole table's sample will keep.

        Raises:
            ConfigError: nothing is being recorded.
        """
        with self._lock:
            if self._samples is None:
                raise ConfigError("nothing was recorded: call record_access() before the lookups that shall count")
            return [
                (shard, sample.copy() if shard.rows == shard.table.rows else sample.thinned(_parts(shard)))
                for shard, sample in zip(self._shards, self._samples, strict=True)
            ]


def _parts(shard: TableShard) -> int:
    """How many shards of its size have the rows of a table."""
    return -(-shard.table.rows // max(1, shard.rows))


def of_whole_tables(recorded: Iterable[tuple[TableShard, AccessSample]]) -> dict[str, AccessSample]:
    """Samples of shards, wherever they are, by table.

    Row shards have a part of the lookups each and are joined. Column shards of the same rows all have the same ones, so
    that the first columns' count.
    """
    parts: dict[str, dict[int, tuple[int, AccessSample]]] = {}
    for shard, sample in recorded:
        by_row = parts.setdefault(shard.table.name, {})
        known = by_row.get(shard.row_offset)
        if known is None or shard.col_offset < known[0]:
            by_row[shard.row_offset] = (shard.col_offset, sample)
    return {table: _joined(by_row) for table, by_row in parts.items()}


def _joined(by_row: Mapping[int, tuple[int, AccessSample]]) -> AccessSample:
    samples = [by_row[offset][1] for offset in sorted(by_row)]
    return samples[0] if len(samples) == 1 else AccessSample.merged(samples)


__all__ = ["AccessRecorder", "of_whole_tables"]
