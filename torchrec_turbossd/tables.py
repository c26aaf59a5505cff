"""What a table is: rows, width, data type, optimizer state, and the bytes of one row.

A row's bytes are its weights in FBGEMM's inference layout (INT8, INT4 and INT2: fp16 scale and bias first; FP8: one
byte an element and nothing else), then its optimizer state. Serving tables carry no state, so one description serves
training and serving.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes

from torchrec_turbossd.errors import ConfigError, UnknownTableError, UnsupportedError

TRAINING_TYPES = {SparseType.FP32: torch.float32, SparseType.FP16: torch.float16}
SERVING_TYPES = (
    SparseType.FP32,
    SparseType.FP16,
    SparseType.FP8,
    SparseType.INT8,
    SparseType.INT4,
    SparseType.INT2,
)
FP8_EXPONENT_BITS, FP8_EXPONENT_BIAS, FP8_LARGEST = 4, 7, 240.0
"""FBGEMM's default FP8, in which rows are kept: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity and no
NaN. Quantised numbers go up to 240; bytes beyond it mean numbers up to 480."""
MAX_SLOTS = 2**31 - 2


def weight_bytes(cols: int, data_type: SparseType) -> int:
    """Bytes of `cols` weights of one row in FBGEMM's inference layout, unpadded."""
    return int(rounded_row_size_in_bytes(cols, data_type, 1))


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """One optimizer state tensor: a float32 for each row (`per_row`) or for each element."""

    name: str
    per_row: bool

    def row_bytes(self, cols: int) -> int:
        return 4 if self.per_row else 4 * cols


@dataclass(frozen=True, kw_only=True)
class InitRule:
    """The value of rows never written: zeros (`high == low == 0`), or uniform in [low, high) from a hash.

    `data_type` is the type the value is rounded to first, so that a quantised server of a trained table answers
    as if the trained rows had been in memory.
    """

    seed: int = 0
    low: float = 0.0
    high: float = 0.0
    data_type: SparseType = SparseType.FP32

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ConfigError(f"an init range needs finite low <= high, got [{self.low}, {self.high})")
        if self.data_type not in TRAINING_TYPES:
            raise UnsupportedError(f"init data type must be FP32 or FP16, got {self.data_type}")

    @property
    def is_zero(self) -> bool:
        return self.low == 0.0 and self.high == 0.0

    def to_json(self) -> dict[str, Any]:
        return {"seed": self.seed, "low": self.low, "high": self.high, "data_type": self.data_type.value}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> InitRule:
        return cls(
            seed=int(value["seed"]),
            low=float(value["low"]),
            high=float(value["high"]),
            data_type=SparseType(value["data_type"]),
        )


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A whole table, as declared: `rows` x `dim` of `data_type`, `state` for each row when it is trained."""

    name: str
    rows: int
    dim: int
    data_type: SparseType = SparseType.FP32
    state: tuple[StateSpec, ...] = ()
    init: InitRule = field(default_factory=InitRule)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"a table needs a non-empty name, got {self.name!r}")
        for what, value in (("rows", self.rows), ("dim", self.dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ConfigError(f"table {self.name!r}: {what} must be a positive int, got {value!r}")
        if self.data_type not in SERVING_TYPES:
            raise UnsupportedError(
                f"table {self.name!r}: data type {self.data_type} is not supported; use one of "
                f"{', '.join(t.name for t in SERVING_TYPES)}"
            )
        if self.state and self.data_type not in TRAINING_TYPES:
            raise UnsupportedError(f"table {self.name!r}: only FP32 and FP16 tables train, got {self.data_type}")

    @property
    def row_bytes(self) -> int:
        return self.row_bytes_of(self.dim)

    def row_bytes_of(self, cols: int) -> int:
        """Bytes of one row of a shard that holds `cols` of the columns."""
        return weight_bytes(cols, self.data_type) + sum(s.row_bytes(cols) for s in self.state)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rows": self.rows,
            "dim": self.dim,
            "data_type": self.data_type.value,
            "state": [{"name": s.name, "per_row": s.per_row} for s in self.state],
            "init": self.init.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TableSpec:
        return cls(
            name=value["name"],
            rows=int(value["rows"]),
            dim=int(value["dim"]),
            data_type=SparseType(value["data_type"]),
            state=tuple(StateSpec(name=s["name"], per_row=bool(s["per_row"])) for s in value["state"]),
            init=InitRule.from_json(value["init"]),
        )


@dataclass(frozen=True, kw_only=True)
class TableShard:
    """The rows [row_offset, row_offset + rows) and columns [col_offset, col_offset + cols) of a table on one rank."""

    table: TableSpec
    row_offset: int = 0
    rows: int
    col_offset: int = 0
    cols: int

    @classmethod
    def whole(cls, table: TableSpec) -> TableShard:
        return cls(table=table, rows=table.rows, cols=table.dim)

    @property
    def row_bytes(self) -> int:
        return self.table.row_bytes_of(self.cols)

    @property
    def key(self) -> str:
        """Name of its column family: the table's, with the column range where columns are sharded."""
        if self.cols == self.table.dim:
            return self.table.name
        return f"{self.table.name}@{self.col_offset}+{self.cols}"


def specs_from(specs: Sequence[Any]) -> list[TableSpec]:
    """Read table declarations: `TableSpec`, `(name, rows, dim, SparseType)`, or TorchRec embedding configs.

    Raises `ConfigError` for an empty list, a duplicate name or a declaration of another kind.
    """
    tables = [_spec_from(spec) for spec in specs]
    if not tables:
        raise ConfigError("specs must name at least one table, got none")
    names = [t.name for t in tables]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"table names must differ, got {', '.join(map(repr, twice))} more than once")
    return tables


def _spec_from(spec: Any) -> TableSpec:
    if isinstance(spec, TableSpec):
        return spec
    if isinstance(spec, tuple) and len(spec) == 4:
        name, rows, dim, data_type = spec
        if not isinstance(data_type, SparseType):
            raise ConfigError(f"table {name!r}: the fourth field must be a SparseType, got {data_type!r}")
        return TableSpec(name=name, rows=rows, dim=dim, data_type=data_type)
    if all(hasattr(spec, a) for a in ("name", "num_embeddings", "embedding_dim", "data_type")):
        try:
            data_type = SparseType(str(spec.data_type.value).lower())
        except ValueError as error:
            raise UnsupportedError(f"table {spec.name!r}: data type {spec.data_type} is not supported") from error
        return TableSpec(name=spec.name, rows=spec.num_embeddings, dim=spec.embedding_dim, data_type=data_type)
    raise ConfigError(
        "a table is declared as (name, rows, dim, SparseType), a TableSpec or a TorchRec EmbeddingBagConfig / "
        f"EmbeddingConfig, got {type(spec).__name__}: {spec!r}"
    )


def find_table(tables: Iterable[TableSpec], name: str) -> int:
    """Position of a table by name; raises `UnknownTableError` that lists the known ones."""
    names = [t.name for t in tables]
    if name not in names:
        raise UnknownTableError(f"no table {name!r}; the tables are {', '.join(map(repr, names))}")
    return names.index(name)


def with_type(table: TableSpec, data_type: SparseType) -> TableSpec:
    """The serving form of a table: the same rows without state, in `data_type`."""
    return replace(table, data_type=data_type, state=())


__all__ = [
    "FP8_EXPONENT_BIAS",
    "FP8_EXPONENT_BITS",
    "FP8_LARGEST",
    "MAX_SLOTS",
    "SERVING_TYPES",
    "TRAINING_TYPES",
    "InitRule",
    "StateSpec",
    "TableShard",
    "TableSpec",
    "find_table",
    "specs_from",
    "weight_bytes",
    "with_type",
]
