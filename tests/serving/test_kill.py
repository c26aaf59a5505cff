"""A process that is killed while it updates loses no call that returned, and leaves none in part.

`TURBOSSD_KILL_POINTS` makes it longer.
"""

from __future__ import annotations

import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.serving.stamped import GROUPS, Group, look_at_all, members, opened, write, write_all

KILL_POINTS = int(os.environ.get("TURBOSSD_KILL_POINTS", "4"))


def groups_of_call(number: int) -> set[Group]:
    """What the update call of this number writes."""
    chooser = random.Random(number)
    names = chooser.choice([["first"], ["second"], ["first", "second"], ["first", "second"]])
    return {(name, chooser.randrange(GROUPS[name])) for name in names for _ in range(chooser.choice([1, 4, 8]))}


def update_for_ever(directory: Path, done: int, acknowledged: Connection) -> None:
    """Apply the calls after `done`, and say after each that it has returned."""
    torch.set_num_threads(1)
    with opened(directory) as module:
        while True:
            done += 1
            groups = sorted(groups_of_call(done))
            ids = {name: torch.cat([members(g) for g in groups if g[0] == name]) for name in {g[0] for g in groups}}
            write(module, ids, 0, done)
            acknowledged.send(done)
            if done % 40 == 0:
                module.flush()


def run_and_kill(directory: Path, done: int, chooser: random.Random) -> int:
    """Let a process update from `done` on and kill it at some moment; returns the last call that it acknowledged."""
    # The same process is the parent of the ranks of other tests, so it imports what they do.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.sharding.models"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=update_for_ever, args=(directory, done, send), daemon=True)
    process.start()
    send.close()
    last = done
    try:
        if chooser.random() < 0.1:
            # As it opens what the one before has left.
            time.sleep(chooser.uniform(0.0, 0.2))
        else:
            for _ in range(chooser.randint(1, 60)):
                last = receive.recv()
            time.sleep(chooser.uniform(0.0, 0.004))
        process.kill()
        while True:
            last = receive.recv()
    except EOFError:
        process.join(30)
    assert process.exitcode == -9, f"the updater ended by itself with exit code {process.exitcode}"
    return last


LONG = [pytest.mark.slow, pytest.mark.timeout(2 * KILL_POINTS + 300)] if KILL_POINTS > 10 else []


@pytest.mark.filterwarnings("ignore:a batch did not fit")
@pytest.mark.parametrize("points", [pytest.param(KILL_POINTS, marks=LONG)])
def test_a_killed_updater(points: int, tmp_path: Path, seed: int) -> None:
    """Every call that returned is there, and of the one that did not all or nothing."""
    with opened(tmp_path) as module:
        write_all(module, 0)
    chooser, done, in_flight = random.Random(seed), 0, 0
    wanted = {(name, group): (0, 0) for name in GROUPS for group in range(GROUPS[name])}
    for _ in range(points):
        acknowledged = run_and_kill(tmp_path, done, chooser)
        for number in range(done + 1, acknowledged + 1):
            wanted |= dict.fromkeys(groups_of_call(number), (0, number))
        with_next = wanted | dict.fromkeys(groups_of_call(acknowledged + 1), (0, acknowledged + 1))
        with opened(tmp_path) as module:
            held = look_at_all(module)
        assert held in (wanted, with_next), f"after {acknowledged} was acknowledged"
        done, in_flight = acknowledged + (held == with_next), in_flight + (held == with_next)
        wanted = held
    print(f"{points} kills, {done} calls, {in_flight} of them made but not acknowledged")
    assert done > 0
