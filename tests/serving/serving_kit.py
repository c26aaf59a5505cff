"""A serving module beside whole tables in memory, and the actions that tests take on both."""

from __future__ import annotations

import random
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

TYPES = (SparseType.FP32, SparseType.FP16, SparseType.INT8, SparseType.INT4, SparseType.INT2)
POOLINGS = (PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE)


SPECS = [("a", 50, 8, SparseType.INT8), ("b", 20, 4, SparseType.FP32)]
"""Two tables for tests that need no more."""


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def every_row(module: TurboSSDInferenceModule) -> Tensor:
    """All rows of the tables of `SPECS`, as bags of one."""
    padded = torch.cat([torch.arange(50), torch.arange(20), torch.zeros(30, dtype=torch.int64)])
    out: Tensor = module(padded, torch.arange(101))
    return out


class WholeTables:
    """Stock FBGEMM with every row in memory: what each answer must equal, bit for bit."""

    def __init__(self, tables: list[TableSpec], features: list[int], pooling: PoolingMode, device: str = "cpu") -> None:
        self.tables = tables
        # FBGEMM's CUDA kernels take int32 ids.
        self.id_type = torch.int64 if device == "cpu" else torch.int32
        where = EmbeddingLocation.HOST if device == "cpu" else EmbeddingLocation.DEVICE
        self.rows = [initial_rows(TableShard.whole(t), torch.arange(t.rows)) for t in tables]
        self.tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(t.name, t.rows, t.dim, t.data_type, where) for t in tables],
            feature_table_map=features,
            pooling_mode=pooling,
            bounds_check_mode=BoundsCheckMode.NONE,
            device=device,
        )
        self.tbe.initialize_weights()

    def __call__(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        whole = self.tbe.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)
        for (held, _, _), rows in zip(whole, self.rows, strict=True):
            held[:, : rows.shape[1]].copy_(rows)
        out: Tensor = self.tbe(ids.to(self.id_type), offsets.to(self.id_type), weights)
        return out

    def set(self, table: int, ids: Tensor, rows: Tensor) -> None:
        for row_id, row in zip(ids.tolist(), rows, strict=True):
            self.rows[table][row_id] = row

    def copy(self) -> list[Tensor]:
        return [rows.clone() for rows in self.rows]


@dataclass
class Saved:
    path: Path
    rows: list[Tensor]


@dataclass
class World:
    """A module with a few slots, whole tables beside it, and one random generator for all."""

    seed: int
    root: Path
    tables: list[TableSpec]
    features: list[int]
    pooling: PoolingMode
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.whole = WholeTables(self.tables, self.features, self.pooling, self.device)
        self.saved: list[Saved] = []
        self.reads = [0] * len(self.tables)
        self.misses = [0] * len(self.tables)
        self.module = self.open()

    def open(self) -> TurboSSDInferenceModule:
        return TurboSSDInferenceModule.from_embedding_specs(
            self.tables,
            self.root / "ssd",
            cache_hit_rate=0.2,
            pooling_mode=self.pooling,
            ssd_shards=1,
            name="model",
            feature_table_map=self.features,
            default_row={t.name: t.init for t in self.tables},
            device=self.device,
            **self.options,
        )

    def close(self) -> None:
        self.module.close()

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        size = self.random.choice([0, 1, 1, 2, 3, 5])
        lengths = [self.random.choice([0, 0, 1, 1, 2, 4]) for _ in range(size * len(self.features))]
        ids: list[int] = []
        for place, length in enumerate(lengths):
            rows = self.tables[self.features[place // size]].rows
            # Squaring makes low ids hot, so that there are hits.
            ids += [int(rows * self.random.random() ** 2) for _ in range(length)]
        kind = self.random.choice([torch.int32, torch.int64])
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(kind)
        weights = None
        if self.pooling != PoolingMode.NONE and self.random.random() < 0.3:
            weights = torch.randn(len(ids), generator=self.generator)
        return torch.tensor(ids, dtype=kind), offsets, weights

    def look_up(self) -> None:
        ids, offsets, weights = (None if part is None else part.to(self.device) for part in self.batch())
        assert ids is not None and offsets is not None
        self._count(ids, offsets)
        held = ids.clone(), offsets.clone()
        got = self.module(ids, offsets, weights)
        want = self.whole(ids, offsets, weights)
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got, want), f"seed {self.seed}: {ids.tolist()}"
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
            ids, weights, rows = self._new_rows(table, self.random.choice([1, 3, 8]))
            self.module.streaming_update(ids, weights, self.tables[table].name)
            self.whole.set(table, ids, rows)
            return
        # Linear ids of several tables need one width: bytes padded to the widest.
        parts, widest, base = [], self.module.max_D_cache, 0
        for table, spec in enumerate(self.tables):
            ids, _, rows = self._new_rows(table, self.random.choice([0, 2, 5]))
            padded = torch.full((ids.numel(), widest), 255, dtype=torch.uint8)
            padded[:, : rows.shape[1]] = rows
            parts.append((ids + base, padded))
            self.whole.set(table, ids, rows)
            base += spec.rows
        order = self.random.sample(range(len(parts)), len(parts))
        self.module.streaming_update(torch.cat([parts[i][0] for i in order]), torch.cat([parts[i][1] for i in order]))

    def _new_rows(self, table: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids with repeats, what to give, the row bytes that it means)."""
        spec = self.tables[table]
        ids = torch.tensor([self.random.randrange(spec.rows) for _ in range(count)], dtype=torch.int64)
        floats = torch.randn(count, spec.dim, generator=self.generator)
        rows = quantise(floats, spec.data_type)
        return ids, floats if self.random.random() < 0.5 else rows, rows

    def save(self) -> None:
        path = self.root / f"snapshot-{len(self.saved)}"
        self.module.save_snapshot(path)
        self.saved.append(Saved(path, self.whole.copy()))

    def load(self) -> None:
        if self.saved:
            chosen = self.random.choice(self.saved)
            self.module.load_snapshot(chosen.path)
            self.whole.rows = [rows.clone() for rows in chosen.rows]

    def reopen(self) -> None:
        self.module.close()
        self.module = self.open()
        self.reads, self.misses = [0] * len(self.tables), [0] * len(self.tables)

    def flush(self) -> None:
        self.module.flush()

    def check(self) -> None:
        self.module.tbe.rows.cache.check()
        stats = self.module.read_stats()
        for place, table in enumerate(self.tables):
            reads = stats[table.name]
            assert reads.read_total_count == self.reads[place]
            assert reads.read_miss_count == self.misses[place]


def tables_for(seed: int, pooling: PoolingMode, first: SparseType) -> list[TableSpec]:
    """Three small tables, the first of type `first`; of one width without pooling."""
    chooser = random.Random(seed)
    rule = InitRule(seed=seed, low=-0.5, high=0.5)
    types = [first, chooser.choice(TYPES), first]
    dims = [8, 8, 8] if pooling == PoolingMode.NONE else [chooser.choice(_widths(t)) for t in types]
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


def _widths(data_type: SparseType) -> list[int]:
    return [8, 16, 24] if data_type in (SparseType.INT4, SparseType.INT2) else [4, 8, 12, 20]
