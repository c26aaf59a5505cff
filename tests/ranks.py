"""Runs a function on several ranks, one process each."""

from __future__ import annotations

import io
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT_S = 240
GPU_RANKS = max(1, min(2, torch.cuda.device_count()))
"""Ranks of tests over NCCL: one for each GPU, at most two."""


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, backend: str = "gloo", local: int | None = None
) -> list[Any]:
    """Call `function(rank, world, *args)` on `world` fresh processes; returns what each returned, by rank.

    A rank that raises makes this raise with its traceback. With `local` each host has so many ranks.
    """
    # Ranks are forked from one process that has done the slow imports, and nothing else. CUDA survives no fork, and
    # those imports may look for it.
    forked = backend != "nccl" and not torch.cuda.is_available()
    context = mp.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(["tests.sharding.models"])
    results: Any = context.Queue()
    rendezvous = tempfile.mktemp(prefix="turbossd-ranks-")
    processes = [
        context.Process(
            target=_rank, args=((rank, world, local or world), rendezvous, backend, function, args, results)
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, failure = results.get(timeout=LIMIT_S)
            if failure is not None:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            found[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=5 if len(found) == world else 0)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world)]


def _rank(place: tuple[int, int, int], rendezvous: str, backend: str, function: Any, args: Any, results: Any) -> None:
    rank, world, local = place
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank % local), LOCAL_WORLD_SIZE=str(local),
        MASTER_ADDR="localhost", MASTER_PORT="0",
    )  # fmt: skip
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        # As bytes: a tensor would be shared memory that dies with its process.
        saved = io.BytesIO()
        torch.save(function(rank, world, *args), saved)
        results.put((rank, saved.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
