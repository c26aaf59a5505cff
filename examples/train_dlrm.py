"""Train TorchRec's DLRM on Criteo's click logs, or on a generated day like them, with its big tables on SSD.

    python examples/train_dlrm.py                                # two ranks, some two minutes on two CPU cores
    python examples/train_dlrm.py --criteo train.txt.gz --rows 5000000 --budget-mb 200
    torchrun --nproc_per_node=2 examples/train_dlrm.py
    python examples/train_dlrm.py --steps 100                    # leaves a checkpoint
    python examples/train_dlrm.py --resume demo-out/dlrm/checkpoint-204800

The planner gets a memory budget and puts on SSD the tables that do not fit it. Then the same model is trained on the
same samples with all tables in memory, and both are compared; on a CPU their losses must be equal bit for bit. Exits
with 0 only when every check held. How the generated day was calibrated, and how well, stands in `dlrm_generate`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from demo_settings import quiet_libraries
from dlrm_checkpoint import load_checkpoint, save_checkpoint
from dlrm_criteo import read_criteo
from dlrm_day import Day
from dlrm_generate import generate_day
from dlrm_model import in_memory, on_ssd
from dlrm_popularity import Reuse
from dlrm_ranks import on_every_rank, together
from dlrm_report import tell
from dlrm_settings import Settings, parse_arguments
from dlrm_training import Schedule, Trainer

from torchrec_turbossd.errors import ConfigError, TurboSSDError
from torchrec_turbossd.planner import format_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compare; returns the exit status."""
    settings = parse_arguments(arguments)
    try:
        return 0 if on_every_rank(settings, train) else 1
    except TurboSSDError as error:
        # On every rank that a launcher started, because it ends the others as soon as one has ended.
        print(f"error: {error}", file=sys.stderr)
        return 1


def train(settings: Settings, scratch: Path) -> bool:
    """What every rank does; returns whether every check held."""
    quiet_libraries()
    started = time.perf_counter()
    together(lambda: _make_day(settings, scratch / "day"))
    day = Day.map(scratch / "day")
    _say(_described(settings, day) + f"; took {time.perf_counter() - started:.1f} s")
    sharded = on_ssd(settings, day)
    # All tables are of one module, whose path would fill half a line.
    _say(format_plan(replace(row, module="") for row in sharded.described))
    ssd = Trainer(sharded, day, settings, "tables on SSD")
    schedule = _start(ssd)
    ssd.run(schedule)
    ssd_record = ssd.record()
    checkpoint = settings.out / f"checkpoint-{schedule.stop}"
    save_checkpoint(ssd, checkpoint, schedule.stop)
    _say(f"Checkpoint: {checkpoint}")
    sharded.tables.close()
    memory_record = None
    if settings.compare:
        memory = Trainer(in_memory(settings, day, sharded.plan), day, settings, "all in memory")
        memory.run(_start(memory))
        memory_record = memory.record()
    held: bool = together(lambda: tell(settings, day.name, ssd_record, memory_record))
    return held


def _make_day(settings: Settings, directory: Path) -> None:
    if settings.criteo is None:
        generate_day(directory, settings.samples, settings.most_rows, settings.seed)
    else:
        read_criteo(settings.criteo, directory, settings.samples, settings.most_rows)


def _start(trainer: Trainer) -> Schedule:
    """From the checkpoint, or from the beginning."""
    resume = trainer.settings.resume
    done = load_checkpoint(trainer, resume) if resume else 0
    schedule = Schedule.of(trainer.settings, len(trainer.day), done)
    if not schedule.steps:
        raise ConfigError(
            f"nothing is left to learn from: {len(trainer.day):,} samples, some held out, {done:,} learnt from before, "
            f"{trainer.settings.global_batch:,} to a step; give more --samples or --steps, or a smaller --batch-size"
        )
    return schedule


def _described(settings: Settings, day: Day) -> str:
    size = sum(day.rows) * (settings.dim + 1) * 4
    text = (
        f"{day.name}: {day.labels.mean():.1%} clicks; {len(day.rows)} tables of {sum(day.rows):,} rows, "
        f"{size / (1 << 20):,.0f} MiB with optimizer state; budget {settings.ranks} x {settings.budget_mb} MiB on "
        f"{settings.device.upper()}"
    )
    if day.unfolded:
        counts = np.concatenate([np.bincount(day.ids[:, column]) for column in day.unfolded])
        rows, lookups = Reuse.of(counts).distance(Reuse.calibrated())
        text += (
            f"; of the {len(day.unfolded)} tables with rows enough, {rows:.1%} of the rows and {lookups:.1%} of the "
            "lookups are not as often reused as in real tables"
        )
    return text


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
