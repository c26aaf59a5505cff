"""The training TBE: stock FBGEMM forward, backward and fused optimizer on slots in front of a row store."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from torchrec_turbossd.errors import CacheFullError, ClosedError, ConfigError, InputError, UnsupportedError
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.cached_rows import CachedRows
from torchrec_turbossd.tbe.device_rows import DeviceRows
from torchrec_turbossd.tbe.prefetching import Prefetcher, TrainingRun
from torchrec_turbossd.tbe.slot_memory import TrainingMemory
from torchrec_turbossd.tbe.table_rows import TableRows
from torchrec_turbossd.tbe.training_options import ROW_STATE, TrainingOptions, check_training_tables, row_state


class _Token:
    """Dies with the autograd graph that holds it."""

    __slots__ = ("__weakref__",)


class TurboSSDTableBatchedEmbeddingBags(nn.Module):
    """Embedding bags of tables whose rows live in a row store; the rows in use are in slots.

    Called like the stock module: `forward(indices [N], offsets [features * B + 1], per_sample_weights [N])` gives
    [B, sum of dims], or [N, D] with `PoolingMode.NONE`. Numbers are those of the stock module holding whole tables.

    Args:
        shards: local tables; each table's `state` must be that of the optimizer (`row_state`).
        slots: usable slots of each table, between 1 and its rows.
        feature_table_map: for each feature, its table.
        store: holds rows by `TableShard.key`; the caller closes it.
        dram_slots: on a GPU, for each table, rows that host memory holds beside the slots. None: only rows on
            their way to and from the store.
    """

    def __init__(
        self,
        shards: Sequence[TableShard],
        slots: Sequence[int],
        feature_table_map: Sequence[int],
        store: RowStore,
        *,
        device: torch.device | str = "cpu",
        options: TrainingOptions | None = None,
        dram_slots: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.options = options or TrainingOptions()
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        check_training_tables(shards, slots, self.options, self.device)
        if list(feature_table_map) != sorted(feature_table_map):
            # Stock CPU backward fails on a table whose features are not adjacent.
            raise ConfigError(f"feature_table_map must be ascending, got {list(feature_table_map)}")
        self.shards, self._feature_table_map = list(shards), list(feature_table_map)
        self.tbe = self._stock(slots)
        self.rows = self._rows(slots, store, dram_slots)
        # One caller at a time but for backward in slots, which only lets rows go.
        self._alone = threading.RLock()
        self._prefetched = Prefetcher(self.rows, self.device, functools.partial(_end, self.rows))
        self._orphans: deque[TrainingRun] = deque()
        self._closed = False
        self._warned = False

    def _rows(self, slots: Sequence[int], store: RowStore, dram_slots: Sequence[int] | None) -> CachedRows | DeviceRows:
        memory, options = TrainingMemory(self.tbe), self.options
        settings: dict[str, Any] = {"policy": options.policy, "bounds": options.bounds}
        args = self.shards, slots, self._feature_table_map, memory, store
        if self.device.type == "cpu" and dram_slots is None:
            return CachedRows(*args, **settings)
        return DeviceRows(*args, dram_slots=dram_slots, **settings)

    def _stock(self, slots: Sequence[int]) -> SplitTableBatchedEmbeddingBagsCodegen:
        """A stock TBE with `slots` rows a table and the reserved row before them."""
        cuda = self.device.type == "cuda"
        where = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(n + 1, s.cols, *where) for n, s in zip(slots, self.shards, strict=True)],
            feature_table_map=self._feature_table_map,
            pooling_mode=self.options.pooling_mode,
            weights_precision=self.shards[0].table.data_type,
            # Bounds are checked on row ids, before they become slots.
            bounds_check_mode=BoundsCheckMode.NONE,
            device=self.device,
            **self.options.tbe_args,
        )
        for weights in tbe.split_embedding_weights():
            weights.data[0].zero_()
        return tbe

    def prefetch(self, indices: Tensor, offsets: Tensor, forward_stream: Any = None) -> None:
        """Bring a batch's rows into slots ahead of its `forward`, which must get the same `indices` and `offsets`.

        A batch that does not fit beside those in flight is left to its forward.
        """
        with self._alone:
            self._check_open()
            self._retire_orphans()
            self._prefetched.start(indices, offsets)

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        **refused: Any,
    ) -> Tensor:
        """Look a batch up; see the class. Rows stay in their slots until backward ends or the graph is gone."""
        self._check_open()
        for name, value in refused.items():
            if value is not None:
                raise UnsupportedError(
                    f"{name} (variable batch size per feature) is not supported on SSD-backed tables"
                )
        _check_weights(per_sample_weights, indices)
        with self._alone:
            self._retire_orphans()
            run = self._prefetched.take(indices, offsets)
            if torch.is_grad_enabled():
                run = run or self._start(indices, offsets, pin=True)
                return self._forward(run, offsets, per_sample_weights, feature_requires_grad)
            # Without a backward to wait for, holding the lock is cheaper than pins.
            with self.rows.lock:
                run = run or self._start(indices, offsets, pin=False)
                return self._forward(run, offsets, per_sample_weights, feature_requires_grad)

    def _forward(
        self, run: TrainingRun, offsets: Tensor, per_sample_weights: Tensor | None, feature_requires_grad: Tensor | None
    ) -> Tensor:
        try:
            # Rows that were fetched on another stream.
            self.rows.order.after_account()
            if run.fetched is not None:
                out = self._call(self.tbe, run.fetched.slots, offsets, per_sample_weights, feature_requires_grad)
            else:
                out = self._run_outside(run, offsets, per_sample_weights, feature_requires_grad)
            self.rows.order.rows_used()
            self._follow(out, run)
        except BaseException:
            self._end(run, changed=False)
            raise
        return out

    def _call(
        self,
        tbe: SplitTableBatchedEmbeddingBagsCodegen,
        slots: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        feature_requires_grad: Tensor | None,
    ) -> Tensor:
        if slots.is_inference() and torch.is_grad_enabled():
            # Prefetched in inference mode, trained out of it.
            slots = slots.clone()
        out: Tensor = tbe(slots, offsets.to(torch.int64), per_sample_weights, feature_requires_grad)
        return out

    def _start(self, indices: Tensor, offsets: Tensor, *, pin: bool) -> TrainingRun:
        batch = self.rows.place(indices, offsets)
        try:
            return TrainingRun(batch, self.rows.fetch(batch, pin=pin))
        except CacheFullError as full:
            if len(self._prefetched):
                # Batches that wait for their forward must not stand in the way of one that is here.
                self._prefetched.end_all()
                return self._start(indices, offsets, pin=pin)
            self._warn_outside(full)
            return TrainingRun(batch, None)

    def _warn_outside(self, full: CacheFullError) -> None:
        if not self._warned:
            self._warned = True
            names = ", ".join(f"{s.table.name}: {n}" for s, n in zip(self.shards, self.rows.cache.slots, strict=True))
            warnings.warn(
                f"a batch did not fit in the slots ({full}) and runs outside them, slower; raise the cache budget or "
                f"lower the batch size (slots: {names})",
                RuntimeWarning,
                stacklevel=4,
            )

    def _run_outside(
        self, run: TrainingRun, offsets: Tensor, per_sample_weights: Tensor | None, feature_requires_grad: Tensor | None
    ) -> Tensor:
        """Run a batch on a TBE of just its distinct rows, in one piece: two chunks would give other numbers."""
        self.rows.order.after_rows()
        distinct = self.rows.take_out(run.batch)
        tbe = self._stock([max(1, each.numel()) for each in distinct.ids])
        memory = TrainingMemory(tbe)
        for table, rows in enumerate(distinct.rows):
            places = torch.arange(1, rows.shape[0] + 1, device=self.device)
            memory.write(table, places, rows)
        self._copy_progress(self.tbe, tbe)
        out = self._call(tbe, distinct.slots, offsets, per_sample_weights, feature_requires_grad)
        self._copy_progress(tbe, self.tbe)
        run.distinct, run.outside = distinct, memory
        self.rows.outside += 1
        return out

    @staticmethod
    def _copy_progress(source: nn.Module, target: nn.Module) -> None:
        """Carry the step count and the learning rate from one stock TBE to another."""
        for name in ("iter", "iter_cpu", "learning_rate_tensor"):
            value = getattr(source, name, None)
            if isinstance(value, Tensor):
                getattr(target, name).data.copy_(value)
        target.optimizer_args = source.optimizer_args

    def _follow(self, out: Tensor, run: TrainingRun) -> None:
        """End the run when its backward has updated the rows, or when its graph dies without one."""
        node = out.grad_fn
        if node is None:
            self._end(run, changed=False)
            return
        token = _Token()
        orphaned = weakref.finalize(token, self._orphans.append, run)
        orphaned.atexit = False

        def before(grad_outputs: Any) -> None:
            if run.ended:
                raise CacheFullError(
                    "backward ran a second time through an SSD-backed lookup, whose rows may have left their slots; "
                    "run forward again instead of retaining the graph"
                )
            if run.distinct is not None and run.outside is not None:
                # Other batches may have trained the rows since; the update comes on top, as it does in one table.
                with self._settled():
                    self.rows.refresh(run.distinct, run.outside)

        def after(grad_inputs: Any, grad_outputs: Any, token: _Token = token) -> None:
            orphaned.detach()
            if run.distinct is None:
                self.rows.order.rows_used()
                self._end(run, changed=True)
            else:
                with self._settled():
                    self._end(run, changed=True)

        # A tensor hook would fire before the fused update; this one fires after the node has run.
        node.register_prehook(before)
        node.register_hook(after)

    def _end(self, run: TrainingRun, *, changed: bool) -> None:
        _end(self.rows, run, changed=changed)

    def _retire_orphans(self) -> None:
        # Finalisers only queue: they may run anywhere, also inside the cache's lock.
        while self._orphans:
            self._end(self._orphans.popleft(), changed=False)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this embedding module is closed; build a new one")

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Where rows can be read and written: none on their way, none held by a dead graph, nobody else here."""
        with self._alone:
            self._prefetched.settle()
            self._retire_orphans()
            order = self.rows.order
            order.after_account()
            order.after_rows()
            try:
                yield
            finally:
                order.account_changed()
                order.rows_used()

    def read_rows(self, table: int, ids: Tensor) -> Tensor:
        """Current bytes (weights, then state) of local `ids` [N]: [N, row_bytes] uint8 on the CPU."""
        self._check_open()
        with self._settled():
            return self.rows.read_rows(table, ids)

    def write_rows(self, table: int, ids: Tensor, rows: Tensor) -> None:
        """Overwrite local `ids` [N], distinct, with `rows` [N, row_bytes] uint8."""
        self._check_open()
        with self._settled():
            self.rows.write_rows(table, ids, rows)

    def check_idle(self) -> None:
        """Raise `CacheFullError` when a batch is in flight; prefetched ones are not, and let their rows go."""
        self._check_open()
        with self._settled():
            self._prefetched.end_all()
            self.rows.check_idle()

    def forget(self) -> None:
        """Empty every slot without writing back; raises `CacheFullError` when a batch is in flight."""
        with self._alone:
            self.check_idle()
            self.rows.forget()

    def flush(self) -> None:
        """Write rows that training changed to the store and make it durable."""
        self._check_open()
        with self._settled():
            self.rows.flush()

    def reset_embedding_weight_momentum(self, *args: Any, **kwargs: Any) -> None:
        """Refused: managed collisions and in-training pruning reset rows, and then write them by row id."""
        names = ", ".join(s.table.name for s in self.shards)
        raise UnsupportedError(
            f"rows of SSD-backed tables {names} cannot be reset by managed-collision eviction or in-training pruning; "
            "keep these tables in memory (FUSED), or use a managed collision module that evicts nothing"
        )

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the fused optimizer."""
        self.tbe.set_learning_rate(learning_rate)

    def get_learning_rate(self) -> float:
        return float(self.tbe.get_learning_rate())

    def close(self) -> None:
        """End every prefetched batch, and the threads; rows that were not flushed are lost. The store stays open."""
        with self._alone:
            self._prefetched.close()
            self.rows.close()
            self._closed = True


def _end(rows: TableRows, run: TrainingRun, *, changed: bool = False) -> None:
    if run.ended:
        return
    run.ended = True
    if run.fetched is not None:
        rows.release(run.fetched, dirty=changed)
    elif run.distinct is not None and run.outside is not None:
        rows.outside -= 1
        if changed:
            rows.put_back(run.distinct, run.outside)
    run.outside = None


def _check_weights(weights: Tensor | None, indices: Tensor) -> None:
    if weights is not None and (weights.shape != indices.shape or not weights.is_floating_point()):
        raise InputError(
            f"per_sample_weights must be floating of shape {tuple(indices.shape)}, got {weights.dtype} "
            f"{tuple(weights.shape)}"
        )


__all__ = ["ROW_STATE", "TrainingOptions", "TurboSSDTableBatchedEmbeddingBags", "row_state"]
