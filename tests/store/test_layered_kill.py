"""A layered store is killed at any moment: no update that was acknowledged is lost, none is half there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests.store.store_kit import child_environment, rows_of
from torchrec_turbossd.store import LayeredRowStore
from torchrec_turbossd.store.layered_writer import LayeredWriter

GROUPS, GROUP_ROWS = 12, 300
SIZES = {"a": 24, "b": 9}
ROWS = dict.fromkeys(SIZES, GROUPS * GROUP_ROWS)

WRITER = """
    import random, sys, threading, torch
    from torchrec_turbossd.store import LayeredRowStore, RocksOptions, layered
    path, first, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    layered.SEGMENT_BYTES = 50_000
    sizes, groups, width = {"a": 24, "b": 9}, 12, 300
    chooser = random.Random(seed)
    options = RocksOptions(write_buffer_bytes=1 << 16)
    store = LayeredRowStore(path, sizes, dict.fromkeys(sizes, groups * width), options=options)
    print("open", flush=True)
    for update in range(first, 1 << 30):
        ids = torch.arange(width) + width * (update % groups)
        rows = {t: (ids, torch.full((width, w), update % 251, dtype=torch.uint8)) for t, w in sizes.items()}
        sys.stdout.write(f"begin {update}\\n")
        sys.stdout.flush()
        committed = store.commit(rows)
        sys.stdout.write(f"done {update}\\n")
        sys.stdout.flush()
        store.publish(committed)
        if chooser.random() < 0.1:
            store.flush()
        if chooser.random() < 0.05:
            store.scan("a")
"""


def base(path: Path) -> None:
    ids = torch.arange(GROUPS * GROUP_ROWS)
    with LayeredWriter(path, SIZES, ROWS) as writer:
        for table, width in SIZES.items():
            writer.append(table, ids, rows_of(ids, width))
        writer.finish()


def killed_once(path: Path, first: int, chooser: random.Random) -> tuple[int, int]:
    """Let a child write from update `first` on and kill it; (updates acknowledged, updates begun), both as ends."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(first), str(chooser.random())[2:8]]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    assert child.stdout is not None and child.stdout.readline() == "open\n"
    time.sleep(chooser.choice([0.002, 0.02, 0.1, 0.4]) * chooser.random())
    child.send_signal(signal.SIGKILL)
    lines = [line.split() for line in child.stdout.read().split("\n")[:-1]]
    child.wait()
    begun = [int(n) + 1 for word, n in lines if word == "begin"]
    done = [int(n) + 1 for word, n in lines if word == "done"]
    return max(done, default=first), max(begun, default=first)


def values(store: LayeredRowStore, group: int) -> set[int | str]:
    """What the rows of a group hold: one number where they are of one update."""
    ids = torch.arange(GROUP_ROWS) + GROUP_ROWS * group
    found: set[int | str] = set()
    for table, width in SIZES.items():
        rows, is_there = store.read(table, ids)
        assert bool(is_there.all())
        if torch.equal(rows, rows_of(ids, width)):
            found.add("base")
        else:
            found.update(rows.flatten().tolist())
    return found


def check(path: Path, acknowledged: int, begun: int) -> None:
    store = LayeredRowStore(path, SIZES, ROWS, create=False)
    for group in range(GROUPS):
        updates = [u for u in range(begun) if u % GROUPS == group]
        sure = [u for u in updates if u < acknowledged]
        allowed = {u % 251 for u in updates if not sure or u >= sure[-1]} | ({"base"} if not sure else set())
        got = values(store, group)
        assert len(got) == 1 and got <= allowed, (group, got, allowed)
    store.close()


def kill_often(path: Path, times: int, seed: int) -> None:
    base(path)
    chooser, first, begun = random.Random(seed), 0, 0
    for number in range(times):
        acknowledged, latest = killed_once(path, first, chooser)
        begun = max(begun, latest)
        if number % 3 == 2 or number == times - 1:
            check(path, acknowledged, begun)
        # Of what was begun but not acknowledged nobody knows; the next child begins those updates again.
        first = acknowledged


def test_no_kill_loses_or_tears_an_update(tmp_path: Path) -> None:
    kill_often(tmp_path / "a", 3, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_kill_of_many_loses_or_tears_an_update(tmp_path: Path) -> None:
    kill_often(tmp_path / "a", int(os.environ.get("TURBOSSD_KILLS", "10")), seed=2)
