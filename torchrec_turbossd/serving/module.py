"""`TurboSSDInferenceModule`: FBGEMM's serving module for tables on SSD, with updates and snapshots under load."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor, nn

from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.metrics import TableReads
from torchrec_turbossd.serving.builder import GenerationBuilder
from torchrec_turbossd.serving.config import ServingConfig, check_access, check_hit_rate, for_specs
from torchrec_turbossd.serving.live import LiveRows
from torchrec_turbossd.serving.sizing import (
    CUDA_ALIGNMENT,
    GIB,
    fast_bytes,
    plan_dram_slots,
    plan_slots,
    slots_for_hit_rate,
)
from torchrec_turbossd.serving.updates import check_version, max_row_width, parse_update
from torchrec_turbossd.sizing import RECORDED_EVENTS, AccessProfile, AccessSample
from torchrec_turbossd.sizing.memory import has_dram_tier
from torchrec_turbossd.sizing.shortage import named_budgets
from torchrec_turbossd.snapshot import Manifest
from torchrec_turbossd.tables import TableShard, TableSpec, specs_from
from torchrec_turbossd.tbe.held import HeldBatch
from torchrec_turbossd.tbe.recording import of_whole_tables
from torchrec_turbossd.tbe.serving import ServingOptions, TurboSSDIntNBitTableBatchedEmbeddingBags

_FEWER_SLOTS = "lower hbm_budget_gb (0 sets no limit), cache_hit_rate or, on a CPU machine, dram_budget_gb"
_FEWER_ROWS = "lower dram_budget_gb"


class TurboSSDInferenceModule(nn.Module):
    """Embedding tables on SSD, served from slots in fast memory, and changed while they are served.

    Made by `from_embedding_specs`. Several threads may look up at once; updates and snapshots do not stop them. One
    lookup sees all rows of an update or none, and rows of one snapshot only. An update that has returned survives the
    end of the process; `flush` and `save_snapshot` are durable when they return.

    Attributes:
        config: what it was built with.
        tbe: the TBE that looks up.
    """

    def __init__(self, tables: Sequence[TableSpec], config: ServingConfig) -> None:
        super().__init__()
        config.check_tables(tables)
        device = config.resolved_device()
        slots = plan_slots(tables, config, device)
        on_gpu = has_dram_tier(device.type)
        self._dram_slots = plan_dram_slots(tables, slots, config) if on_gpu else None
        tier: dict[str, Any] = {"dram_slots": self._dram_slots} if on_gpu else {}
        self.config = config
        self._live = LiveRows(tables, config)
        # Also when the module is dropped without `close`, or the process ends.
        weakref.finalize(self, self._live.close)
        try:
            with named_budgets(device, _FEWER_SLOTS, _FEWER_ROWS):
                self.tbe = TurboSSDIntNBitTableBatchedEmbeddingBags(
                    [TableShard.whole(t) for t in self._live.tables],
                    slots,
                    range(len(tables)) if config.feature_table_map is None else config.feature_table_map,
                    self._live.store,
                    device=device,
                    options=ServingOptions(pooling_mode=config.pooling_mode, output_dtype=config.output_dtype),
                    **tier,
                )
        except BaseException:
            self._live.close()
            raise
        self._live.serve(self.tbe.rows)

    @classmethod
    def from_embedding_specs(cls, specs: Sequence[Any], *args: Any, **kwargs: Any) -> TurboSSDInferenceModule:
        """A module for `specs`: `(name, rows, dim, SparseType)` each, or TorchRec embedding configs.

        The other arguments are `ServingConfig`'s, by position in FBGEMM's order or by name. Slots are the least that
        reach `cache_hit_rate` on the access profiles, capped by `hbm_budget_gb`, with 1024 (or all rows) of each table
        at least.

        Raises:
            ConfigError, UnsupportedError: an argument that cannot be honoured; or `name` lacks one of the tables, or
                has it in another size or type (tables of `name` that are not asked for are kept).
            BudgetError: `hbm_budget_gb` does not hold the least slots, `dram_budget_gb` on a GPU the least rows, or
                memory ran out: it says which of them to lower.
            UnknownTableError: `access` or `default_row` names no table.
            StoreError, StoreLockedError, ForeignDirectoryError, CorruptError: the directory.
        """
        tables = specs_from(specs)
        return cls(tables, for_specs(ServingConfig(*args, **kwargs), specs))

    @staticmethod
    def estimate_hbm_gb(
        specs: Sequence[Any], cache_hit_rate: float = 0.90, access: Mapping[str, AccessProfile] | None = None
    ) -> float:
        """GiB of HBM that a module without a budget takes: slots, bookkeeping, and 4 bytes a row of slot map.

        Pure arithmetic; needs no device.
        """
        tables = specs_from(specs)
        check_hit_rate(cache_hit_rate)
        check_access(tables, access)
        slots = slots_for_hit_rate(tables, cache_hit_rate, access, CUDA_ALIGNMENT)
        return fast_bytes(tables, slots, CUDA_ALIGNMENT) / GIB

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look a batch up in TBE convention.

        Args:
            indices: [N] int32 or int64 row ids, feature by feature, on the module's device.
            offsets: [features * B + 1], of the same kinds.
            per_sample_weights: [N] floating, with SUM and MEAN.

        Returns:
            [B, sum of dims], or [N, D] with `PoolingMode.NONE`, of the output type.

        Raises:
            InputError, RowIndexError: tensors or ids that do not fit; nothing has changed.
        """
        self._live.check_open()
        out: Tensor = self.tbe(indices, offsets, per_sample_weights)
        return out

    def prefetch(self, indices: Tensor, offsets: Tensor) -> None:
        """Bring the rows of a batch that comes soon into slots.

        As `TurboSSDIntNBitTableBatchedEmbeddingBags.prefetch`.
        """
        self._live.check_open()
        self.tbe.prefetch(indices, offsets)

    def hold(self, indices: Tensor, offsets: Tensor) -> HeldBatch:
        """On a GPU hold the rows of a batch in slots, to capture its lookup in a CUDA graph.

        As `TurboSSDIntNBitTableBatchedEmbeddingBags.hold`.
        """
        self._live.check_open()
        return self.tbe.hold(indices, offsets)

    def streaming_update(
        self,
        indices: Tensor,
        weights: Tensor,
        table: str | None = None,
        version: int | None = None,
        *,
        generation: GenerationBuilder | None = None,
    ) -> bool:
        """Set rows; when it returns, every later lookup sees them, and they survive the end of the process.

        All rows of a call change at once, or none when it raises. Of an id given twice the last row counts.

        Args:
            indices: [N] int32 or int64: ids of `table`, or, with None, ids counted through all tables in order.
            weights: [N, dim] floating, quantised here; or [N, width] uint8 rows in FBGEMM's inference layout (scale and
                bias first), as wide as the table's row, that padded to 16 bytes, or `max_D_cache` (the tail ignored).
            version: of the model that the rows belong to; a generation that is built has one of its own.
            generation: what `begin_generation` gave, to set rows there; None: where they are served.

        Returns:
            False when the rows were left out because the snapshot served is not older than `version`.

        Raises:
            InputError, RowIndexError, UnknownTableError, ConfigError: nothing has changed.
            StoreError: the store could not be written; nothing has changed.
            ClosedError: `generation` was committed or aborted.
        """
        self._live.check_open()
        check_version(version)
        batch = parse_update(self._live.tables, indices, weights, table)
        if generation is None:
            return self._live.update(batch, version)
        if version is not None:
            raise ConfigError("rows of a generation that is built have its version; pass version to begin_generation")
        generation.update(batch)
        return True

    def begin_generation(self, version: int = 0) -> GenerationBuilder:
        """Begin a generation without rows, to publish by updates: fill it, then `commit` serves it at once.

        Until then lookups and updates go on in the generation served. One at a time is loaded or built.

        Args:
            version: of the model that its rows belong to; updates that are not newer stay out of it.

        Raises:
            StoreError: another one is being loaded or built, or the directory cannot be written.
        """
        self._live.check_open()
        check_version(version)
        return self._live.begin(version)

    def save_snapshot(self, path: Path | str, *, version: int | None = None) -> Manifest:
        """Write what is served now to `path`, durably, as a serving snapshot; updates wait only while it is taken.

        Args:
            path: must not exist, or be an empty directory.
            version: of the snapshot; None: the module's.

        Raises:
            SnapshotError: `path` is taken. StoreError: the file system refuses; nothing is left there.
        """
        self._live.check_open()
        check_version(version)
        return self._live.save(path, version)

    def load_snapshot(self, ssd_storage_directory: Path | str, ssd_shards: int | None = None) -> None:
        """Serve the snapshot at `ssd_storage_directory` from now on; lookups go on all the while.

        It is verified and cloned into a new generation of this module's folder (a training snapshot is converted), the
        rows now in slots are read from it, then one switch exchanges them. The snapshot itself is never opened, and
        may be deleted afterwards. Updates that arrive meanwhile are carried over, unless their version is not newer
        than the snapshot's. Loads take turns.

        Args:
            ssd_storage_directory: what `save_snapshot` wrote.
            ssd_shards: as `ServingConfig.ssd_shards`, for the new generation; None: as before.

        Raises:
            SnapshotError, FormatVersionError, CorruptError, StoreError: why it could not be loaded. The module goes on
                serving what it served, and nothing of the attempt is left.
        """
        self._live.check_open()
        if ssd_shards is not None and ssd_shards < 1:
            raise ConfigError(f"ssd_shards must be at least 1, got {ssd_shards}")
        self._live.load(Path(ssd_storage_directory), ssd_shards)

    def get_read_hit_rate_stats(self) -> tuple[int, int, int]:
        """(hits, misses, reads) of all tables since the last call, of one moment, as FBGEMM's module counts them."""
        return self.tbe.rows.counters.take()

    def read_stats(self) -> dict[str, TableReads]:
        """Reads of each table since the module was made: from slots (hits) and from SSD (misses)."""
        return self.tbe.rows.counters.read()

    def record_access(self, on: bool = True, *, events: int = RECORDED_EVENTS) -> None:
        """Record which rows are asked for, from now on and with nothing from before, or stop and forget.

        `AccessProfile.from_cache(module)` makes profiles of what was recorded, to plan with. It costs lookups some time
        and the host some MiB a table, both for as long as it is on.

        Args:
            events: lookups of a table that each window of its sample keeps; see `AccessSample`.
        """
        self._live.check_open()
        if on:
            self.tbe.rows.recorder.start(events)
        else:
            self.tbe.rows.recorder.stop()

    def access_samples(self) -> dict[str, AccessSample]:
        """What was recorded since `record_access()`, by table.

        Raises:
            ConfigError: nothing is being recorded.
        """
        return of_whole_tables(self.tbe.rows.recorder.samples())

    @property
    def slots(self) -> dict[str, int]:
        """Rows of each table that fit in fast memory."""
        return {t.name: n for t, n in zip(self._live.tables, self.tbe.rows.cache.slots, strict=True)}

    @property
    def dram_slots(self) -> dict[str, int]:
        """Rows of each table that the DRAM tier of a GPU keeps besides those in slots; 0 without `dram_budget_gb`, and
        on a CPU machine."""
        return {t.name: self._dram_slots[n] if self._dram_slots else 0 for n, t in enumerate(self._live.tables)}

    @property
    def embedding_specs(self) -> list[tuple[str, int, int, SparseType]]:
        """(name, rows, dim, type) of each table."""
        return [(t.name, t.rows, t.dim, t.data_type) for t in self._live.tables]

    @property
    def max_D_cache(self) -> int:
        """Bytes of the widest row of all tables, padded to 16."""
        return max_row_width(self._live.tables)

    @property
    def directory(self) -> Path:
        """The module's own folder."""
        return self._live.directory

    @property
    def version(self) -> int:
        """The newest version of rows that is served; 0 where none was ever given."""
        return self._live.version

    def flush(self) -> None:
        """Make every update durable; returns when it is."""
        self._live.flush()

    def close(self) -> None:
        """Release everything; later calls raise `ClosedError`. Waits for a load in progress. Closing twice is allowed.

        A module without a name removes its folder.
        """
        self._live.close()

    def __enter__(self) -> TurboSSDInferenceModule:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _full_signature() -> inspect.Signature:
    """`from_embedding_specs` with every argument by its name, for `help` and editors."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter("cls", kind), inspect.Parameter("specs", kind, annotation="Sequence[Any]")]
    rest = inspect.signature(ServingConfig).parameters.values()
    return inspect.Signature([*first, *rest], return_annotation="TurboSSDInferenceModule")


vars(TurboSSDInferenceModule)["from_embedding_specs"].__func__.__signature__ = _full_signature()

__all__ = ["TurboSSDInferenceModule"]
