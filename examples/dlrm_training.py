"""Trains a sharded DLRM on a rank's share of a day, and measures it on the samples held out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from dlrm_day import Day
from dlrm_model import Sharded
from dlrm_settings import Settings
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.optim.optimizers import in_backward_optimizer_filter
from tqdm import tqdm

from torchrec_turbossd.planner import TURBO_SSD, PlanRow

DENSE_LEARNING_RATE = 0.01
"""Of Adagrad."""

_HELD_OUT = 1 / 16
Reads = dict[str, tuple[int, int]]
"""For each table on SSD, (hits, lookups)."""


@dataclass
class Record:
    """What was seen in a run.

    losses: [ranks, steps] float32: of each rank's batch, before the step learnt from it.
    seconds: [steps] float64, of rank 0.
    aucs: (samples learnt from, area under the ROC curve of the samples held out).
    reads: of all ranks, over all steps; last_reads: since the last but one evaluation.
    fast_bytes: memory that the tables take, by rank: rows, or slots with their slot maps and bookkeeping.
    plan: of the tables.
    """

    losses: Tensor
    seconds: Tensor
    aucs: list[tuple[int, float]] = field(default_factory=list)
    reads: Reads = field(default_factory=dict)
    last_reads: Reads = field(default_factory=dict)
    fast_bytes: list[int] = field(default_factory=list)
    plan: list[PlanRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which samples are learnt from, and which are held out: the last part of the day, which comes after all others.

    first, stop: samples to learn from, whole steps of all ranks.
    held_out: first sample held out, and how many of each rank.
    """

    first: int
    stop: int
    step: int
    held_out: tuple[int, int]

    @classmethod
    def of(cls, settings: Settings, samples: int, done: int = 0) -> Schedule:
        """For a day of so many samples, of which the first `done` were learnt from; none is learnt from twice."""
        step, ranks = settings.global_batch, settings.ranks
        held_out = max(ranks, int(samples * _HELD_OUT)) // ranks * ranks
        last = samples - held_out
        stop = last if settings.steps is None else min(last, settings.steps * step)
        steps = max(0, stop - done) // step
        return cls(first=done, stop=done + steps * step, step=step, held_out=(last, held_out // ranks))

    @property
    def steps(self) -> int:
        return (self.stop - self.first) // self.step

    def phases(self, evaluations: int) -> list[range]:
        """The first samples of the steps between evaluations, as equally long as can be."""
        ends = [self.first + self.step * round(self.steps * n / evaluations) for n in range(evaluations + 1)]
        phases = [range(first, stop, self.step) for first, stop in itertools.pairwise(ends)]
        return [phase for phase in phases if phase]


class Trainer:
    """Trains in TorchRec's ordinary way, by one of its pipelines.

    Args:
        sharded: the model.
        day: the samples.
        settings: of the run.
        label: of the progress bar.
    """

    def __init__(self, sharded: Sharded, day: Day, settings: Settings, label: str) -> None:
        self.sharded, self.model, self.day, self.settings = sharded, sharded.model, day, settings
        self.rank = dist.get_rank()
        # The tables learn inside their backward; the rest has an optimizer of its own.
        self.dense = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        self.optimizer = torch.optim.Adagrad(self.dense.values(), lr=DENSE_LEARNING_RATE)
        # TorchRec's prefetching pipeline needs CUDA streams.
        pipeline: Any = PrefetchTrainPipelineSparseDist if settings.device == "cuda" else TrainPipelineSparseDist
        self._pipeline = pipeline(self.model, self.optimizer, self.model.device, execute_all_batches=True)
        self._label = label
        self._losses: list[Tensor] = []
        self._seconds: list[float] = []
        self._aucs: list[tuple[int, float]] = []
        self._reads: list[Reads] = []

    def run(self, schedule: Schedule) -> None:
        """Learn from the samples of `schedule`, evaluating along the way. Collective."""
        bar = tqdm(total=schedule.steps, desc=self._label, unit="step", disable=self.rank != 0, mininterval=0.5)
        self._aucs.append((schedule.first, self.evaluate(schedule)))
        for phase in schedule.phases(self.settings.evaluations):
            before = self._counted()
            self._train(phase, bar)
            after = self._counted()
            self._reads.append({t: (hit - before[t][0], n - before[t][1]) for t, (hit, n) in after.items()})
            self._aucs.append((phase.stop, self.evaluate(schedule)))
            self._say(bar)
        bar.close()

    def _train(self, phase: range, bar: Any) -> None:
        self.model.train()
        batches = self._batches(phase, self.settings.batch_size)
        for _ in phase:
            started = time.perf_counter()
            loss, _, _ = self._pipeline.progress(batches)
            self._losses.append(loss.detach().cpu())
            self._seconds.append(time.perf_counter() - started)
            self._say(bar)
            bar.update()

    def evaluate(self, schedule: Schedule) -> float:
        """The area under the ROC curve of the samples held out; on other ranks than 0, nan. Collective."""
        self.model.eval()
        first, each = schedule.held_out
        size = min(each, self.settings.batch_size)
        starts = range(first, first + each // size * size * self.settings.ranks, size * self.settings.ranks)
        batches = self._batches(starts, size)
        logits, labels = [], []
        with torch.no_grad():
            for _ in starts:
                _, batch_logits, batch_labels = self._pipeline.progress(batches)
                logits.append(batch_logits)
                labels.append(batch_labels)
        found = _of_all_ranks(torch.cat(logits)), _of_all_ranks(torch.cat(labels))
        return float(binary_auroc(found[0], found[1].long())) if self.rank == 0 else float("nan")

    def _batches(self, starts: range, size: int) -> Iterator[Batch]:
        """This rank's part of each step."""
        for start in starts:
            batch = self.day.batch(start + self.rank * size, size)
            yield batch.pin_memory() if self.settings.device == "cuda" else batch

    def _say(self, bar: Any) -> None:
        bar.set_postfix_str(f"loss {self._losses[-1]:.3f}, AUC {self._aucs[-1][1]:.4f}", refresh=False)

    def _counted(self) -> Reads:
        """Hits and lookups so far of this rank's shards on SSD."""
        stats = self.sharded.tables.read_stats() if hasattr(self.sharded.tables, "read_stats") else {}
        return {table: (reads.read_hit_count, reads.read_total_count) for table, reads in stats.items()}

    def record(self) -> Record:
        """What was seen, of all ranks, when training is over. Collective."""
        every: list[Any] = [None] * self.settings.ranks
        dist.all_gather_object(every, (torch.stack(self._losses), self._fast_bytes(), self._reads))
        return Record(
            losses=torch.stack([losses for losses, *_ in every]),
            seconds=torch.tensor(self._seconds, dtype=torch.float64),
            aucs=self._aucs,
            reads=_summed([phase for *_, phases in every for phase in phases]),
            last_reads=_summed([phases[-1] for *_, phases in every if phases]),
            fast_bytes=[size for _, size, _ in every],
            plan=self.sharded.described,
        )

    def _fast_bytes(self) -> int:
        resident = [r for r in self.sharded.described if r.compute_kernel != TURBO_SSD and r.rank == self.rank]
        return getattr(self.sharded.tables, "fast_bytes", 0) + sum(row.fast_bytes or 0 for row in resident)


def _summed(parts: list[Reads]) -> Reads:
    tables = sorted({table for part in parts for table in part})
    return {
        table: (sum(p[table][0] for p in parts if table in p), sum(p[table][1] for p in parts if table in p))
        for table in tables
    }


def _of_all_ranks(values: Tensor) -> Tensor:
    """Equally many [N] of each rank, on the CPU: [ranks x N]."""
    every = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(every, values.contiguous())
    return torch.cat(every).cpu()


__all__ = ["DENSE_LEARNING_RATE", "Record", "Schedule", "Trainer"]
