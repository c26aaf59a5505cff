"""One training process: the model on SSD, then the same in memory, with what each step cost and gave."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from demo_model import DENSE_LEARNING_RATE, in_memory, on_ssd
from demo_settings import Settings, quiet_libraries
from fbgemm_gpu.split_embedding_configs import SparseType
from source_tokens import FEATURES, TABLES, Corpus, SampleStream
from stock_training import local_shards
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter
from tqdm import tqdm

from torchrec_turbossd.planner import PlanRow
from torchrec_turbossd.sharding import save_snapshot

SERVED_TYPE = SparseType.INT8

ChangedRows = dict[str, tuple[Tensor, Tensor]]
"""For each table, rows that training changed: (ids [N] int64 ascending, rows [N, dim] float32)."""

_LOOKUP_ROWS = 4096


@dataclass
class Record:
    """What was seen in a run.

    losses, accuracies: [ranks, steps] float32: of each rank's batch, before the step learnt from it.
    seconds: [steps] float64, of rank 0.
    hits, reads: for each table on SSD, lookups of all ranks by step: [steps] int64.
    slot_bytes: memory that the tables on SSD take, slot maps and bookkeeping included, by rank.
    plan: of the tables, with the budget.
    """

    losses: Tensor
    accuracies: Tensor
    seconds: Tensor
    hits: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, Tensor] = field(default_factory=dict)
    slot_bytes: list[int] = field(default_factory=list)
    plan: list[PlanRow] = field(default_factory=list)


class Trainer:
    """Trains a sharded model on its rank's share of a stream, in TorchRec's ordinary way."""

    def __init__(self, model: DistributedModelParallel, stream: SampleStream, settings: Settings, label: str) -> None:
        self.model, self.stream, self.settings = model, stream, settings
        self.rank = dist.get_rank()
        # The tables learn inside their backward; the rest has an optimizer of its own.
        dense = dict(in_backward_optimizer_filter(model.named_parameters()))
        self._dense = torch.optim.Adam(dense.values(), lr=DENSE_LEARNING_RATE)
        total = sum(len(steps) for steps in settings.phases.values())
        self._bar = tqdm(total=total, desc=label, unit="step", disable=self.rank != 0, mininterval=0.5)
        self._losses: list[Tensor] = []
        self._accuracies: list[Tensor] = []
        self._seconds: list[float] = []
        self._counts: list[dict[str, tuple[int, int]]] = []

    def train(self, steps: range) -> None:
        """Train these steps. Collective."""
        for step in steps:
            before = self._reads()
            started = time.perf_counter()
            loss, accuracy = self._step(step)
            self._seconds.append(time.perf_counter() - started)
            self._losses.append(loss)
            self._accuracies.append(accuracy)
            after = self._reads()
            self._counts.append({t: (hit - before[t][0], read - before[t][1]) for t, (hit, read) in after.items()})
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update()

    def _step(self, step: int) -> tuple[Tensor, Tensor]:
        places = self.stream.places(step * self.settings.ranks + self.rank, self.settings.batch_size)
        features = self.stream.features(places).to(self.settings.device)
        labels = self.stream.labels(places).to(self.settings.device)
        self._dense.zero_grad()
        scores = self.model(features)
        loss = torch.nn.functional.cross_entropy(scores, labels)
        loss.backward()
        self._dense.step()
        return loss.detach().cpu(), (scores.argmax(1) == labels).float().mean().cpu()

    def _reads(self) -> dict[str, tuple[int, int]]:
        """(hits, reads) so far of this rank's shards on SSD."""
        bags = self.model.module.bags
        stats = bags.read_stats() if hasattr(bags, "read_stats") else {}
        return {table: (reads.read_hit_count, reads.read_total_count) for table, reads in stats.items()}

    def changed_rows(self, steps: range) -> ChangedRows:
        """The present rows that any rank's batches of `steps` asked for; on other ranks than 0 nothing. Collective."""
        ranks = self.settings.ranks
        batches = range(steps.start * ranks, steps.stop * ranks)
        changed = {}
        for table in TABLES:
            ids = self.stream.used_rows(table, batches, self.settings.batch_size)
            changed[table] = ids, self._look_up(table, ids)
        return changed

    def _look_up(self, table: str, ids: Tensor) -> Tensor:
        """Rows of a table, wherever its shards are: a bag of one row is that row. Collective."""
        feature = next(f.name for f in FEATURES if f.table == table)
        found = []
        for window in ids.split(_LOOKUP_ROWS):
            # On every rank the same ids, as every rank must bring a batch of one size.
            lengths = [torch.full_like(window, int(f.name == feature)) for f in FEATURES]
            bags = KeyedJaggedTensor(keys=[f.name for f in FEATURES], values=window, lengths=torch.cat(lengths))
            with torch.no_grad():
                looked_up = self.model.module.bags(bags.to(self.settings.device))
                found.append(looked_up[feature].cpu())
        return torch.cat(found)

    def record(self, plan: list[PlanRow] | None = None) -> Record:
        """What was seen, of all ranks, when training is over. Collective."""
        self._bar.close()
        every: list[Any] = [None] * self.settings.ranks
        size = getattr(self.model.module.bags, "fast_bytes", 0)
        dist.all_gather_object(every, (size, torch.stack(self._losses), torch.stack(self._accuracies), self._counts))
        tables = sorted({table for *_, counts in every for table in counts[0]})
        summed = {
            table: torch.tensor([[step.get(table, (0, 0)) for step in counts] for *_, counts in every]).sum(0)
            for table in tables
        }
        return Record(
            losses=torch.stack([losses for _, losses, *_ in every]),
            accuracies=torch.stack([accuracies for *_, accuracies, _ in every]),
            seconds=torch.tensor(self._seconds, dtype=torch.float64),
            hits={table: counts[:, 0] for table, counts in summed.items()},
            reads={table: counts[:, 1] for table, counts in summed.items()},
            slot_bytes=[size for size, *_ in every],
            plan=plan or [],
        )


def train_rank(rank: int, settings: Settings) -> None:
    """What one process does; rank 0 leaves records, snapshots and changed rows in the scratch folder."""
    torch.set_num_threads(1)
    quiet_libraries()
    with _process_group(rank, settings):
        stream = SampleStream(Corpus.load(settings.scratch / "corpus"), settings.seed)
        model, plan, described = on_ssd(settings, stream.corpus, settings.ssd_directory / "training")
        trainer = Trainer(model, stream, settings, "tables on SSD")
        _run(trainer, settings.scratch / "ssd")
        _keep(trainer.record(described), settings.scratch / "ssd" / "record.pt")
        model.module.bags.close()
        del model, trainer
        reference = Trainer(in_memory(settings, plan), stream, settings, "all in memory")
        _run(reference, settings.scratch / "memory")
        _keep(reference.record(), settings.scratch / "memory" / "record.pt")


def _run(trainer: Trainer, directory: Path) -> None:
    """Train all phases; keep what a server gets after each."""
    directory.mkdir(exist_ok=True)
    bags = trainer.model.module.bags
    for version, (phase, steps) in enumerate(trainer.settings.phases.items(), 1):
        trainer.train(steps)
        if phase != "train":
            _keep(trainer.changed_rows(steps), directory / f"{phase}.pt")
        if hasattr(bags, "streaming_update"):
            if phase != "update":
                save_snapshot(trainer.model, directory / phase, kind="serving", data_types=SERVED_TYPE, version=version)
        elif phase == "train":
            state = trainer.model.state_dict()
            for table in TABLES:
                torch.save(local_shards(state, "bags", table), directory / f"{table}-{trainer.rank}.pt")


def _keep(what: Any, path: Path) -> None:
    """Save on rank 0, and let no rank go on before it is there."""
    if dist.get_rank() == 0:
        torch.save(what, path)
    dist.barrier()


@contextmanager
def _process_group(rank: int, settings: Settings) -> Iterator[None]:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(settings.ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(settings.ranks),
    )
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if settings.device == "cuda" else "gloo",
        # A file, so that no port has to be free.
        init_method=f"file://{settings.scratch / 'rendezvous'}",
        rank=rank,
        world_size=settings.ranks,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


__all__ = ["SERVED_TYPE", "ChangedRows", "Record", "Trainer", "train_rank"]
