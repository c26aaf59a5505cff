"""Work of all ranks together: it may take long, and it fails on all of them."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from torchrec_turbossd.errors import ConfigError, SnapshotError
from torchrec_turbossd.sharding import collective


def _long_work(rank: int, world: int) -> list[int]:
    collective.HEARTBEAT_S = 0.3
    group = dist.new_group(timeout=timedelta(seconds=2))

    def work() -> int:
        time.sleep(4 if rank == 0 else 0)
        return rank

    return collective.everywhere(group, work)


def test_work_may_outlast_the_time_out_of_a_collective() -> None:
    assert run_ranks(2, _long_work) == [[0, 1], [0, 1]]


def _alone(rank: int, world: int) -> tuple[list[str], float]:
    collective.HEARTBEAT_S = 0.2
    group, ended = dist.new_group(timeout=timedelta(seconds=1)), []
    start = time.monotonic()
    if rank == 1:
        time.sleep(5)
        return ended, 0.0

    def work() -> None:
        time.sleep(2)
        ended.append("work")

    with pytest.raises(RuntimeError):
        collective.everywhere(group, work)
    return ended, time.monotonic() - start


def test_a_rank_that_does_not_answer_is_not_waited_for() -> None:
    (ended, took), _ = run_ranks(2, _alone)
    # Its own work has ended, so that what it wrote can be removed.
    assert ended == ["work"] and took < 4.5


def _failing(rank: int, world: int) -> None:
    def work() -> None:
        if rank == 1:
            raise ConfigError("planted")

    with pytest.raises(ConfigError if rank == 1 else SnapshotError, match="planted"):
        collective.everywhere(None, work)
    with pytest.raises(ConfigError if rank == 1 else SnapshotError, match="planted"):
        collective.together(None, work, only=1)
    assert collective.together(None, lambda: rank + 10, only=1) == 11


def test_failures_are_shared() -> None:
    run_ranks(2, _failing)
