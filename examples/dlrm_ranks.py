"""Runs one function on every rank: on processes that it starts, or that torchrun has started."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from dlrm_settings import Settings, launched

from torchrec_turbossd.errors import TurboSSDError

_PATIENCE = timedelta(hours=2)
"""How long ranks wait for the first one to read a long file."""
_RESULT = "result"
_Folders = tuple[Path, Path]
"""Scratch, and live tables."""

Work = Callable[[Settings, Path], bool]
"""What a rank does with its settings and the scratch folder, inside a process group; an importable function."""


def on_every_rank(settings: Settings, work: Work) -> bool:
    """Call `work` on all ranks; returns what it returned on rank 0.

    The scratch folder, and one for live tables that `settings.ssd_directory` names then, go in the end.

    Raises:
        TurboSSDError: what a rank raised, if it was one of those.
        torch.multiprocessing.ProcessRaisedException: any other failure of a process started here.
    """
    if launched():
        with _process_group(settings), _shared(settings) as (folder, live):
            return work(replace(settings, ssd_directory=live), folder)
    with _folders(settings) as (folder, live):
        try:
            torch.multiprocessing.spawn(
                _rank, (replace(settings, ssd_directory=live), folder, work), nprocs=settings.ranks
            )
        except torch.multiprocessing.ProcessRaisedException as failure:
            last = str(failure).rstrip().rpartition("\n")[2]
            if not last.startswith(TurboSSDError.__module__):
                raise
            raise TurboSSDError(last.partition(": ")[2]) from None
        return (folder / _RESULT).read_text() == str(True)


def together(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank; where it raises, all do, and none is left waiting."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _rank(rank: int, settings: Settings, folder: Path, work: Work) -> None:
    # Ranks share the machine's cores, and one thread each makes steps comparable.
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(settings.ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(settings.ranks),
    )
    # A file, so that no port has to be free.
    with _process_group(settings, init_method=f"file://{folder / 'rendezvous'}"):
        result = work(settings, folder)
        if rank == 0:
            (folder / _RESULT).write_text(str(result))


@contextmanager
def _process_group(settings: Settings, **how: Any) -> Iterator[None]:
    if settings.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "nccl" if settings.device == "cuda" else "gloo",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_PATIENCE,
        **how,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _folders(settings: Settings) -> Iterator[_Folders]:
    """New ones in the folders that the user chose, which go in the end and take nothing else with them."""
    with _new(settings.out) as scratch, _new(settings.ssd_directory or scratch) as live:
        yield scratch, live


@contextmanager
def _new(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="run-", dir=parent)).resolve()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _shared(settings: Settings) -> Iterator[_Folders]:
    """Rank 0's, for all ranks, which must share the file system."""
    with _folders(settings) if dist.get_rank() == 0 else nullcontext() as folders:
        yield together(lambda: folders)
        dist.barrier()


__all__ = ["Work", "on_every_rank", "together"]
