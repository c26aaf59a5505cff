"""How far fused optimizers are: step counts and learning rates out of the kernels of a model, and back into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from torchrec_turbossd.errors import SnapshotError
from torchrec_turbossd.snapshot import OptimizerProgress
from torchrec_turbossd.tbe.training import TurboSSDTableBatchedEmbeddingBags


def fused_kernels(lookups: Iterable[nn.Module]) -> Iterator[Any]:
    """TorchRec's kernels that update their tables in backward, ours and stock ones alike: not data-parallel ones."""
    for lookup in lookups:
        for kernel in getattr(lookup, "_emb_modules", []):
            if kernel.config.compute_kernel != EmbeddingComputeKernel.DENSE:
                yield kernel


def optimizer_progress(kernels: Iterable[Any]) -> dict[str, OptimizerProgress]:
    """The progress of each local table by name.

    Raises `SnapshotError` where shards of a table differ, because a snapshot knows tables only.
    """
    found: dict[str, OptimizerProgress] = {}
    for kernel in kernels:
        progress = _progress_of(kernel)
        merge_progress(found, dict.fromkeys(_tables_of(kernel), progress))
    return found


def merge_progress(found: dict[str, OptimizerProgress], more: Mapping[str, OptimizerProgress]) -> None:
    """Add `more` to `found`; raises `SnapshotError` where they differ on a table."""
    for name, progress in more.items():
        if found.setdefault(name, progress) != progress:
            raise SnapshotError(
                f"shards of table {name!r} are not at one step and learning rate: {_said(found[name])}, and "
                f"{_said(progress)}; set the learning rate alike on all ranks"
            )


def saved_progress(kernel: Any, saved: Mapping[str, OptimizerProgress]) -> OptimizerProgress | None:
    """What the tables of a kernel were at; None where a snapshot does not say.

    Raises `SnapshotError` where they were at different steps or learning rates, of which one kernel has but one.
    """
    known = {name: saved[name] for name in _tables_of(kernel) if name in saved}
    if len(set(known.values())) > 1:
        raise SnapshotError(
            "tables that train in one group here were at different steps or learning rates when they were saved: "
            + "; ".join(f"{name!r} {_said(progress)}" for name, progress in known.items())
            + "; give one of them other fused_params, which puts it into a group of its own"
        )
    return next(iter(known.values()), None)


def restore_progress(kernel: Any, progress: OptimizerProgress) -> None:
    """Put a kernel, and the parameter groups of its optimizer, where `progress` says."""
    tbe = _stock(kernel)
    # FBGEMM counts twice, and `set_optimizer_step` leaves the one that it computes with alone once that has begun.
    for name in ("iter", "iter_cpu"):
        counter = getattr(tbe, name, None)
        if isinstance(counter, Tensor):
            counter.data.fill_(progress.iter)
    tbe.set_learning_rate(progress.learning_rate)
    _group(kernel)["lr"] = progress.next_learning_rate


def _progress_of(kernel: Any) -> OptimizerProgress:
    tbe = _stock(kernel)
    counters = [getattr(tbe, name, None) for name in ("iter_cpu", "iter")]
    steps = [int(c.item()) for c in counters if isinstance(c, Tensor)]
    return OptimizerProgress(
        # One that has not begun yet follows the other.
        iter=next((step for step in steps if step), 0),
        learning_rate=float(tbe.get_learning_rate()),
        next_learning_rate=float(_group(kernel)["lr"]),
    )


def _group(kernel: Any) -> dict[str, Any]:
    """The one parameter group that TorchRec's fused optimizers have."""
    found: dict[str, Any] = next(iter(kernel.fused_optimizer.param_groups))
    return found


def _tables_of(kernel: Any) -> list[str]:
    return list(dict.fromkeys(table.name for table in kernel.config.embedding_tables))


def _stock(kernel: Any) -> Any:
    module = kernel.emb_module
    return module.tbe if isinstance(module, TurboSSDTableBatchedEmbeddingBags) else module


def _said(progress: OptimizerProgress) -> str:
    return f"at step {progress.iter} with learning rate {progress.learning_rate}, next {progress.next_learning_rate}"


__all__ = ["fused_kernels", "merge_progress", "optimizer_progress", "restore_progress", "saved_progress"]
