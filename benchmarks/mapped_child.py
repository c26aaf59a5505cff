"""One side of the memory-mapped comparison, in a process of its own: `python -m benchmarks.mapped_child JOB`."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory_group import set_limit
from benchmarks.readers import Latencies, LookUp, read_once
from benchmarks.served import int8_tables, reads_of, stock_module
from benchmarks.streams import bag_offsets
from benchmarks.timing import percentiles
from torchrec_turbossd import TurboSSDInferenceModule

BATCHES, MAPPED, MODULE = "batches.npy", "rows.bin", "served"
SIDES = ("slots", "mapped")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to serve, from where, and how long.

    side: "slots" or "mapped". budget_bytes: of slots and slot map. warm_batches: looked up before memory is limited to
    limit_bytes. settle_batches, batches: looked up then by each number of readers, untimed and timed, each for at most
    `seconds`. procs, limit: files of the memory group.
    """

    side: str
    folder: str
    rows: list[int]
    dim: int
    bags: int
    length: int
    budget_bytes: int
    limit_bytes: int
    warm_batches: int
    settle_batches: int
    batches: int
    seconds: float
    readers: list[int]
    procs: str
    limit: str

    def dumps(self) -> str:
        return json.dumps(asdict(self))


Stats = dict[str, float]


def main(arguments: list[str]) -> int:
    """Serve, and print the figures as one line of JSON."""
    job = Job(**json.loads(arguments[0]))
    torch.set_num_threads(1)
    batches = list(torch.from_numpy(np.load(Path(job.folder) / BATCHES)))
    offsets = bag_offsets(len(job.rows), job.bags, job.length)
    # Only from here on is memory counted: libraries and batches are no part of the comparison.
    Path(job.procs).write_text(str(os.getpid()))
    _read_ahead(Path(job.folder) / (MAPPED if job.side == "mapped" else MODULE))
    with _side(job) as (look_up, stats):
        print(json.dumps(_measure(job, look_up, stats, batches, offsets)))
    return 0


def _read_ahead(path: Path) -> None:
    """Bring files into the page cache in order, so that warming takes seconds."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb", buffering=0) as data:
                while data.read(1 << 22):
                    pass


def _measure(job: Job, look_up: LookUp, stats: Any, batches: list[Tensor], offsets: Tensor) -> dict[str, Any]:
    first = look_up(batches[0], offsets)
    digest = hashlib.sha256(first.numpy().tobytes()).hexdigest()  # type: ignore[attr-defined]
    left = iter(batches)
    for ids in itertools.islice(left, job.warm_batches):
        look_up(ids, offsets)
    set_limit(Path(job.limit), job.limit_bytes)
    results = []
    for readers in job.readers:
        # No batch is served twice: the rows of one that was are in slots.
        _serve(look_up, list(itertools.islice(left, job.settle_batches)), offsets, readers, job.seconds)
        before = stats()
        taken = _serve(look_up, list(itertools.islice(left, job.batches)), offsets, readers, job.seconds)
        results.append(
            {
                "readers": readers,
                "lookups/s": taken.seconds.size * batches[0].numel() / taken.wall_s,
                "ms": percentiles(taken.seconds),
                **_hits(before, stats()),
            }
        )
    return {"digest": digest, "readers": results}


def _serve(look_up: LookUp, batches: list[Tensor], offsets: Tensor, readers: int, seconds: float) -> Latencies:
    taken = read_once(look_up, batches, offsets, readers, seconds)
    if taken.failures:
        raise RuntimeError(taken.failures[0])
    return taken


def _hits(before: Stats, after: Stats) -> Stats:
    if not after:
        return {}
    reads = after["reads"] - before["reads"]
    return {
        "hit rate": 1 - (after["misses"] - before["misses"]) / max(1.0, reads),
        "slots of rows": after["slots of rows"],
    }


@contextmanager
def _side(job: Job) -> Iterator[tuple[LookUp, Any]]:
    """(look up a batch, cumulative counts) of a side."""
    tables = int8_tables(job.rows, [job.dim] * len(job.rows))
    if job.side == "mapped":
        stock = stock_module(tables)
        with (Path(job.folder) / MAPPED).open("r+b") as file, mmap.mmap(file.fileno(), 0) as rows:
            # Without it a fault reads the disk's whole read-ahead for one row.
            rows.madvise(mmap.MADV_RANDOM)
            stock.weights_host = torch.frombuffer(rows, dtype=torch.uint8)
            yield stock, dict
            stock.weights_host = torch.empty(0, dtype=torch.uint8)
        return
    with TurboSSDInferenceModule.from_embedding_specs(
        tables,
        ssd_directory=job.folder,
        name=MODULE,
        hbm_budget_gb=job.budget_bytes / 2**30,
        cache_hit_rate=0.999,
        device="cpu",
    ) as module:
        share = sum(module.slots.values()) / sum(job.rows)

        def stats() -> Stats:
            reads, misses = reads_of(module)
            return {"reads": reads, "misses": misses, "slots of rows": share}

        yield module, stats


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))


__all__ = ["BATCHES", "MAPPED", "MODULE", "SIDES", "Job"]
