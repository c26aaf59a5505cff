"""A serving module beside whole tables in memory, and the actions that tests take on both."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from torchrec_turbossd.rows import initial_rows, quantise
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.tables import InitRule, TableShard, TableSpec

TYPES = (SparseType.FP32, SparseType.FP16, SparseType.FP8, SparseType.INT8, SparseType.INT4, SparseType.INT2)
POOLINGS = (PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE)
OUTPUTS = (SparseType.FP32, SparseType.FP16, SparseType.BF16)

SPECS = [("a", 50, 8, SparseType.INT8), ("b", 20, 4, SparseType.FP32)]
"""Two tables for tests that need no more."""

Written = dict[tuple[int, int], Tensor]
"""(table by place, row id) to the row's bytes [row bytes] uint8, for every row that was ever written."""


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def every_row(module: TurboSSDInferenceModule) -> Tensor:
    """All rows of the tables of `SPECS`, as bags of one."""
    padded = torch.cat([torch.arange(50), torch.arange(20), torch.zeros(30, dtype=torch.int64)])
    out: Tensor = module(padded, torch.arange(101))
    return out


class WholeTables:
    """Stock FBGEMM with every row in memory: what each answer must equal, bit for bit.

    Attributes:
        rows: for each table, the bytes of all its rows; at first those of rows never written.
    """

    def __init__(
        self,
        tables: list[TableSpec],
        features: list[int],
        pooling: PoolingMode,
        device: str = "cpu",
        output: SparseType = SparseType.FP16,
    ) -> None:
        # FBGEMM's CUDA kernels take int32 ids.
        self.id_type = torch.int64 if device == "cpu" else torch.int32
        where = EmbeddingLocation.HOST if device == "cpu" else EmbeddingLocation.DEVICE
        self.initial = [initial_rows(TableShard.whole(t), torch.arange(t.rows)) for t in tables]
        self.rows = self.initial
        self.tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(t.name, t.rows, t.dim, t.data_type, where) for t in tables],
            feature_table_map=features,
            pooling_mode=pooling,
            output_dtype=output,
            bounds_check_mode=BoundsCheckMode.NONE,
            device=device,
        )
        self.tbe.initialize_weights()

    def hold(self, written: Mapping[tuple[int, int], Tensor]) -> None:
        """Hold these rows, and every other one as never written."""
        self.rows = [rows.clone() for rows in self.initial]
        for (table, row_id), row in written.items():
            self.rows[table][row_id] = row

    def __call__(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        whole = self.tbe.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)
        for (held, _, _), rows in zip(whole, self.rows, strict=True):
            held[:, : rows.shape[1]].copy_(rows)
        ids, offsets = ids.to(self.id_type).contiguous(), offsets.to(self.id_type).contiguous()
        out: Tensor = self.tbe(ids, offsets, None if weights is None else weights.contiguous())
        return out


@dataclass
class Saved:
    path: Path
    written: Written


@dataclass
class World:
    """A module with a few slots, a plain dict of what was written beside it, and one random generator for all."""

    seed: int
    root: Path
    tables: list[TableSpec]
    features: list[int]
    pooling: PoolingMode
    output: SparseType
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.whole = WholeTables(self.tables, self.features, self.pooling, self.device, self.output)
        self.written: Written = {}
        self.saved: list[Saved] = []
        self.module = self.open()

    def open(self) -> TurboSSDInferenceModule:
        self.reads, self.misses, self.taken = [0] * len(self.tables), [0] * len(self.tables), (0, 0)
        return TurboSSDInferenceModule.from_embedding_specs(
            self.tables,
            self.root / "ssd",
            cache_hit_rate=0.2,
            pooling_mode=self.pooling,
            ssd_shards=1,
            name="model",
            feature_table_map=self.features,
            output_dtype=self.output,
            default_row={t.name: t.init for t in self.tables},
            device=self.device,
            **self.options,
        )

    def close(self) -> None:
        self.module.close()

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids with repeats, some bags empty, now and then all bags, those of one table, or the whole batch."""
        size = self.random.choice([0, 1, 1, 2, 3, 5])
        silent = self.random.choice([*range(len(self.tables)), *[None] * len(self.tables)])
        longest = self.random.choice([0, *[4] * 9])
        lengths: list[int] = []
        ids: list[int] = []
        for table in self.features:
            rows = self.tables[table].rows
            for _ in range(size):
                length = 0 if table == silent else min(longest, self.random.choice([0, 0, 1, 1, 2, 4]))
                # Squaring makes low ids hot, so that there are hits.
                ids += [int(rows * self.random.random() ** 2) for _ in range(length)]
                lengths.append(length)
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        weights = None
        if self.pooling != PoolingMode.NONE and self.random.random() < 0.3:
            weights = self._as_given(torch.randn(len(ids), generator=self.generator))
        kind = self.random.choice([torch.int32, torch.int64])
        return self._as_given(torch.tensor(ids, dtype=kind)), self._as_given(offsets.to(kind)), weights

    def _as_given(self, tensor: Tensor) -> Tensor:
        """The same numbers, now and then as a view with a stride."""
        if self.random.random() < 0.9:
            return tensor
        return torch.stack([tensor, torch.full_like(tensor, 3)], dim=1)[:, 0]

    def look_up(self) -> None:
        ids, offsets, weights = (None if part is None else part.to(self.device) for part in self.batch())
        assert ids is not None and offsets is not None
        self._count(ids, offsets)
        held = ids.clone(), offsets.clone()
        self.whole.hold(self.written)
        got = self.module(ids, offsets, weights)
        want = self.whole(ids, offsets, weights)
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got, want), f"seed {self.seed}: {ids.tolist()}, {offsets.tolist()}"
        assert torch.equal(ids, held[0]) and torch.equal(offsets, held[1])

    def _count(self, ids: Tensor, offsets: Tensor) -> None:
        size = (offsets.numel() - 1) // len(self.features)
        resident = [set(each.tolist()) for each in self.module.tbe.rows.resident()]
        asked: list[list[int]] = [[] for _ in self.tables]
        for feature, table in enumerate(self.features):
            asked[table] += ids[int(offsets[feature * size]) : int(offsets[(feature + 1) * size])].tolist()
        for table, each in enumerate(asked):
            self.reads[table] += len(each)
            self.misses[table] += len(set(each) - resident[table])

    def update(self) -> None:
        """Random rows of one table by name, or of all by linear id, as floats or as bytes of an accepted width."""
        if self.random.random() < 0.6:
            table = self.random.randrange(len(self.tables))
            ids, floats, rows = self._new_rows(table, self.random.choice([1, 3, 8]))
            self._set(table, ids, rows)
            self.module.streaming_update(ids, self._form(floats, rows), self.tables[table].name)
            return
        parts: list[tuple[Tensor, Tensor]] = []
        base, widest = 0, self.module.max_D_cache
        # Linear ids of several tables need one width: floats where all are of one, else bytes padded to the widest.
        as_floats = len({t.dim for t in self.tables}) == 1 and self.random.random() < 0.5
        for table, spec in enumerate(self.tables):
            ids, floats, rows = self._new_rows(table, self.random.choice([0, 2, 5]))
            padded = torch.full((ids.numel(), widest), 255, dtype=torch.uint8)
            padded[:, : rows.shape[1]] = rows
            parts.append((ids + base, floats if as_floats else padded))
            self._set(table, ids, rows)
            base += spec.rows
        self.random.shuffle(parts)
        self.module.streaming_update(torch.cat([ids for ids, _ in parts]), torch.cat([rows for _, rows in parts]))

    def _new_rows(self, table: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids with repeats, floats [N, dim], the row bytes that they mean)."""
        spec = self.tables[table]
        kind = self.random.choice([torch.int32, torch.int64])
        ids = torch.tensor([self.random.randrange(spec.rows) for _ in range(count)], dtype=kind)
        floats = torch.randn(count, spec.dim, generator=self.generator)
        return ids, floats, quantise(floats, spec.data_type)

    def _form(self, floats: Tensor, rows: Tensor) -> Tensor:
        return floats if self.random.random() < 0.5 else rows

    def _set(self, table: int, ids: Tensor, rows: Tensor) -> None:
        for row_id, row in zip(ids.tolist(), rows, strict=True):
            self.written[table, row_id] = row

    def save(self) -> None:
        path = self.root / f"snapshot-{len(self.saved)}"
        self.module.save_snapshot(path)
        self.saved.append(Saved(path, dict(self.written)))

    def load(self) -> None:
        if self.saved:
            chosen = self.random.choice(self.saved)
            self.module.load_snapshot(chosen.path)
            self.written = dict(chosen.written)

    def reopen(self) -> None:
        self.module.close()
        self.module = self.open()

    def flush(self) -> None:
        self.module.flush()

    def take_counts(self) -> None:
        reads, misses = sum(self.reads), sum(self.misses)
        total, missed = reads - self.taken[0], misses - self.taken[1]
        assert self.module.get_read_hit_rate_stats() == (total - missed, missed, total)
        self.taken = reads, misses

    def check(self) -> None:
        self.module.tbe.rows.cache.check()
        stats = self.module.read_stats()
        for place, table in enumerate(self.tables):
            reads = stats[table.name]
            assert reads.read_total_count == self.reads[place]
            assert reads.read_miss_count == self.misses[place]


def tables_for(
    seed: int, pooling: PoolingMode, first: SparseType, device: str, others: Sequence[SparseType] = TYPES
) -> list[TableSpec]:
    """Four small tables, the first and the last of type `first`; of one width without pooling."""
    chooser = random.Random(seed)
    rule = InitRule(seed=seed, low=-0.5, high=0.5)
    types = [first, *chooser.sample(list(others), 2), first]
    dims = [8] * 4 if pooling == PoolingMode.NONE else [chooser.choice(_widths(t, device)) for t in types]
    return [
        TableSpec(
            name=f"t{place}",
            rows=chooser.choice([7, 30, 60]),
            dim=dim,
            data_type=data_type,
            init=rule if place else InitRule(),
        )
        for place, (dim, data_type) in enumerate(zip(dims, types, strict=True))
    ]


def _widths(data_type: SparseType, device: str) -> list[int]:
    if data_type is SparseType.INT2:
        return [8, 16, 24]
    # FBGEMM's CUDA kernels write four columns at a time.
    odd = [1, 7] if device == "cpu" and data_type is not SparseType.INT4 else []
    return [*odd, 4, 8, 12, 20]
