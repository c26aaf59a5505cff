"""How a serving module is built: every argument of `from_embedding_specs` but the tables, checked."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.sizing import AccessProfile
from torchrec_turbossd.store.rocks_options import RocksOptions
from torchrec_turbossd.tables import InitRule, TableSpec, find_table

DefaultRow = float | InitRule | Mapping[str, float | InitRule]


@dataclass(frozen=True)
class ServingConfig:
    """Arguments of a serving module, in the order of FBGEMM's own module and then by keyword.

    Attributes:
        ssd_directory: where modules keep their rows, each in a folder of its own.
        hbm_budget_gb: GiB for slots, slot map and bookkeeping together (DRAM on a CPU machine); 0 for no limit.
        cache_hit_rate: share of lookups, in (0, 1], to be answered from slots.
        pooling_mode: SUM, MEAN or NONE.
        ssd_shards: how many threads read from SSD at once, at most as many as there are CPU cores; there is one
            RocksDB for all tables.
        ssd_write_buffer_size: bytes of a RocksDB write buffer; None for this package's default.
        ssd_max_write_buffer_num: write buffers of one table; None for this package's default.
        ssd_rate_limit_mbps: MiB/s for RocksDB's background writes; 0 for no limit.
        enable_cache_locking: accepted for FBGEMM's sake. A row never leaves its slot while a lookup uses it, whatever
            this says.
        name: the module's folder; opening it again resumes what it served. None: a new name, removed by `close`.
        feature_table_map: for each feature, its table; None: one for each of a TorchRec config's `feature_names`, one
            for a table declared otherwise.
        output_dtype: FP32, FP16 or BF16.
        device: where the slots are; None: the current CUDA device where there is one, else the CPU.
        dram_budget_gb: GiB of DRAM that hold more rows, beyond the target hit rate, where they save the most misses. On
            a GPU it is host memory between slots and SSD, for rows without a slot; 4096 rows of each table (or all)
            are there in any case, on top where this is 0, else within it. On a CPU machine it is more slots.
        access: what is really asked for, by table; others are taken as Zipf 1.05 (`DEFAULT_ZIPF_ALPHA`).
        default_row: the value of rows never written, a number for every element or an `InitRule`, for all tables or by
            name. It overrides the snapshot's; None: the snapshot's, and zeros in a new store.
    """

    ssd_directory: str | Path = "/tmp"
    hbm_budget_gb: float = 0.0
    cache_hit_rate: float = 0.90
    pooling_mode: PoolingMode = PoolingMode.SUM
    ssd_shards: int = 8
    ssd_write_buffer_size: int | None = None
    ssd_max_write_buffer_num: int | None = None
    ssd_rate_limit_mbps: int = 0
    enable_cache_locking: bool = False
    _: KW_ONLY
    name: str | None = None
    feature_table_map: Sequence[int] | None = None
    output_dtype: SparseType = SparseType.FP16
    device: torch.device | str | None = None
    dram_budget_gb: float = 0.0
    access: Mapping[str, AccessProfile] | None = None
    default_row: DefaultRow | None = None

    def __post_init__(self) -> None:
        check_hit_rate(self.cache_hit_rate)
        if not isinstance(self.pooling_mode, PoolingMode):
            raise ConfigError(f"pooling_mode must be FBGEMM's PoolingMode, got {self.pooling_mode!r}")
        for what, budget in (("hbm_budget_gb", self.hbm_budget_gb), ("dram_budget_gb", self.dram_budget_gb)):
            if not (math.isfinite(budget) and budget >= 0):
                raise BudgetError(f"{what} must be finite GiB, 0 or more, got {budget}")
        if self.ssd_shards < 1:
            raise ConfigError(f"ssd_shards must be at least 1, got {self.ssd_shards}")
        if self.name is not None:
            _check_name(self.name)

    @property
    def rocks_options(self) -> RocksOptions:
        """RocksDB's settings; the limit over all tables grows with what one table was given."""
        options = RocksOptions(rate_limit_bytes_per_s=self.ssd_rate_limit_mbps << 20)
        size = options.write_buffer_bytes if self.ssd_write_buffer_size is None else self.ssd_write_buffer_size
        count = options.max_write_buffers if self.ssd_max_write_buffer_num is None else self.ssd_max_write_buffer_num
        options = replace(options, write_buffer_bytes=size, max_write_buffers=count)
        if self.ssd_write_buffer_size is None and self.ssd_max_write_buffer_num is None:
            return options
        return replace(options, total_write_buffer_bytes=max(options.total_write_buffer_bytes, size * count))

    def resolved_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def with_default_row(self, table: TableSpec) -> TableSpec:
        """`table` with this module's rule for rows never written, where it has one."""
        value = self.default_row
        if isinstance(value, Mapping):
            value = value.get(table.name)
        if value is None:
            return table
        rule = value if isinstance(value, InitRule) else InitRule(low=float(value), high=float(value))
        return replace(table, init=rule)

    def check_tables(self, tables: Sequence[TableSpec]) -> None:
        """Raise `UnknownTableError` or `ConfigError` for options by table that do not fit the tables."""
        if isinstance(self.default_row, Mapping):
            for name in self.default_row:
                find_table(tables, name)
        check_access(tables, self.access)
        if self.feature_table_map is not None and not self.feature_table_map:
            raise ConfigError("feature_table_map must name a table for each feature, got none; pass None for one each")


def for_specs(config: ServingConfig, specs: Sequence[Any]) -> ServingConfig:
    """`config` with the features that TorchRec configs among `specs` name, where it names none itself.

    Raises `ConfigError` for an `EmbeddingBagConfig` whose pooling is not `pooling_mode`.
    """
    for spec in specs:
        pooling = getattr(spec, "pooling", None)
        if pooling is not None and pooling.name != config.pooling_mode.name:
            raise ConfigError(
                f"table {spec.name!r} asks for {pooling.name} pooling, pooling_mode is {config.pooling_mode.name}; "
                "pass the same, and one module for each kind of pooling"
            )
    if config.feature_table_map is not None:
        return config
    # A table with several feature names is looked up once for each; other declarations name none.
    counts = [len(getattr(spec, "feature_names", None) or [""]) for spec in specs]
    return replace(config, feature_table_map=[table for table, count in enumerate(counts) for _ in range(count)])


def read_threads(ssd_shards: int) -> int:
    """Threads that read from SSD at once."""
    return min(ssd_shards, os.cpu_count() or 1)


def check_hit_rate(rate: float) -> None:
    """Raise `ConfigError` unless `rate` is in (0, 1]."""
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"cache_hit_rate must be in (0, 1], got {rate}")


def check_access(tables: Sequence[TableSpec], access: Mapping[str, AccessProfile] | None) -> None:
    """Raise unless each access profile is of a known table and has as many rows."""
    for name, profile in (access or {}).items():
        rows = tables[find_table(tables, name)].rows
        if profile.rows != rows:
            raise ConfigError(f"table {name!r} has {rows} rows, its access profile {profile.rows}")


def _check_name(name: str) -> None:
    if not name or name != Path(name).name or name.startswith("."):
        raise ConfigError(f"a module's name is a folder's: not empty, no '/', no leading '.', got {name!r}")


__all__ = ["DefaultRow", "ServingConfig", "check_access", "check_hit_rate", "for_specs", "read_threads"]
