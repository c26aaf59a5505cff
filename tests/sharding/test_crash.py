"""Training that is killed goes on from its last checkpoint to the very numbers that it would have reached.

`TURBOSSD_TRAIN_KILLS` makes it longer.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed import DistributedModelParallel

from tests.sharding.models import batch, make_dmp, sparse_of
from tests.sharding.shards import Held, held
from torchrec_turbossd.errors import SnapshotError
from torchrec_turbossd.sharding import load_snapshot, save_snapshot
from torchrec_turbossd.snapshot import read_manifest

KILLS = int(os.environ.get("TURBOSSD_TRAIN_KILLS", "4"))
RANKS, STEPS, EVERY = 2, 18, 3
SLOTS = {"big": 120, "wide": 60}
MOMENTS = [("save", 2, 3), ("load", 1, 1), ("save", 1, 2), ("step", 4, 8)]
"""A rank is killed as it does one of these for the first of these times to the last."""
TIME_OUT_S = 30
"""Of the process group."""


def last_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The dense part of the last step of which both parts are whole and belong together."""
    for step in range(STEPS, 0, -1):
        dense, sparse = directory / f"dense-{step}.pt", directory / f"sparse-{step}"
        if not dense.exists():
            continue
        part: dict[str, Any] = torch.load(dense)
        try:
            if read_manifest(sparse).id == part["id"]:
                return part
        except SnapshotError:
            continue
    return None


def save(dmp: DistributedModelParallel, dense: torch.optim.Optimizer, step: int, directory: Path) -> None:
    """A checkpoint of both parts; what an earlier attempt left at this step had no dense part, and goes first."""
    rank, path = dist.get_rank(), directory / f"sparse-{step}"
    if rank == 0 and path.exists():
        path.rename(directory / f"orphan-{time.monotonic_ns()}")
    manifest = save_snapshot(dmp, path, extra={"step": step})
    if rank == 0:
        linear = {n: p.detach() for n, p in dmp.named_parameters() if "linear" in n}
        part = directory / f"dense-{step}.part"
        torch.save({"step": step, "id": manifest.id, "linear": linear, "optimizer": dense.state_dict()}, part)
        part.rename(part.with_suffix(".pt"))
    dist.barrier()


def train_on(rank: int, rendezvous: str, directory: Path, events: Connection) -> None:
    """One rank, from the last checkpoint to the end; tells what it is about to do, and the loss of each step."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIME_OUT_S)
    )
    dmp = make_dmp(RANKS, "row_wise", EmbOptimType.EXACT_ROWWISE_ADAGRAD, directory / "live", SLOTS)
    linear = {n: p for n, p in dmp.named_parameters() if "linear" in n}
    dense = torch.optim.Adam(linear.values(), lr=0.01)
    part = last_checkpoint(directory)
    if part is not None:
        events.send(("load", part["step"], None))
        if load_snapshot(dmp, directory / f"sparse-{part['step']}").id != part["id"]:
            raise AssertionError("the parts of a checkpoint do not belong together")
        for name, parameter in linear.items():
            parameter.data.copy_(part["linear"][name])
        dense.load_state_dict(part["optimizer"])
    for step in range(part["step"] if part is not None else 0, STEPS):
        events.send(("step", step, None))
        for group in dmp.fused_optimizer.param_groups:
            # Of the rate of the step before, so that it must come back with the snapshot.
            group["lr"] *= 0.9
        dmp.fused_optimizer.zero_grad()
        dense.zero_grad()
        loss, _ = dmp(batch(step, rank))
        loss.backward()
        dense.step()
        events.send(("loss", step, loss.item()))
        if (step + 1) % EVERY == 0:
            events.send(("save", step + 1, None))
            save(dmp, dense, step + 1, directory)
    rates = [group["lr"] for group in dmp.fused_optimizer.param_groups]
    torch.save((held(dmp), {n: p.detach() for n, p in linear.items()}, rates), directory / f"final-{rank}.pt")
    sparse_of(dmp).close()
    dist.destroy_process_group()


def run_rank(rank: int, rendezvous: str, directory: Path, events: Connection) -> None:
    """`train_on` as a program would: what it raises ends it."""
    log = (directory / f"log-{rank}.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    train_on(rank, rendezvous, directory, events)


@dataclass
class Attempt:
    """Ranks that train, and what they told.

    losses: by step and rank. last: of each rank, what it was about to do. loaded: checkpoints that were begun with.
    """

    directory: Path
    losses: dict[tuple[int, int], float]
    loaded: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.sharding.models"])
        rendezvous = tempfile.mktemp(prefix="turbossd-crash-")
        self.last: list[tuple[str, int]] = [("start", 0)] * RANKS
        self.processes, self.events = [], []
        for rank in range(RANKS):
            receive, send = context.Pipe(duplex=False)
            self.processes.append(context.Process(target=run_rank, args=(rank, rendezvous, self.directory, send)))
            self.processes[-1].start()
            send.close()
            self.events.append(receive)

    def follow(self, victim: int = 0, what_is_begun: str = "", times: int = 0) -> bool:
        """Listen until the victim has begun that so many times, or all ranks have ended; whether it has."""
        open_: list[Any] = list(self.events)
        while open_:
            for source in wait(open_):
                rank = self.events.index(source)
                try:
                    what, step, loss = source.recv()
                except EOFError:
                    open_.remove(source)
                    continue
                if what == "loss":
                    # Every attempt must have the same.
                    assert self.losses.setdefault((step, rank), loss) == loss, f"step {step}, rank {rank}"
                    continue
                self.last[rank] = (what, step)
                self.loaded |= {step} if what == "load" else set()
                times -= (rank, what) == (victim, what_is_begun)
                if not times and (rank, what) == (victim, what_is_begun):
                    return True
        return False

    def kill(self, victim: int) -> float:
        """Kill a rank, and wait for the others to end by themselves; how long that took."""
        self.processes[victim].kill()
        killed = time.monotonic()
        self.follow()
        for process in self.processes:
            process.join(TIME_OUT_S + 30)
        return time.monotonic() - killed

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run(directory: Path, chooser: random.Random, kills: int) -> dict[str, Any]:
    """Train to the end through so many kills."""
    directory.mkdir()
    losses: dict[tuple[int, int], float] = {}
    at, longest, first = [], 0.0, chooser.randrange(RANKS)
    for number in range(kills + 1):
        before = set(directory.glob(".sparse-*.staging"))
        attempt = Attempt(directory, losses)
        try:
            if number < kills:
                victim = (first + number // 2) % RANKS
                what, *times = MOMENTS[number % len(MOMENTS)]
                if not attempt.follow(victim, what, chooser.randint(*times)):
                    break
                time.sleep(chooser.uniform(0.0, 0.1))
                took = attempt.kill(victim)
                longest = max(longest, took)
                half = " with the snapshot half written" * bool(set(directory.glob(".sparse-*.staging")) - before)
                at.append(f"rank {victim} in {what} {attempt.last[victim][1]}{half}")
                codes = [process.exitcode for process in attempt.processes]
                assert codes[victim] == -9 and codes[1 - victim] not in (None, 0), (codes, took)
            else:
                attempt.follow()
                assert attempt.loaded or not kills, "no checkpoint was gone on from"
                for process in attempt.processes:
                    process.join(60)
                assert [p.exitcode for p in attempt.processes] == [0] * RANKS, (directory / "log-0.txt").read_text()
        finally:
            attempt.end()
    final = [torch.load(directory / f"final-{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {"losses": losses, "final": final, "at": at, "longest": longest}


def check_same(wanted: list[Any], got: list[Any]) -> None:
    """The same shards, dense weights and learning rates on every rank."""
    for (shards, linear, rates), (others, dense, others_rates) in zip(wanted, got, strict=True):
        assert rates == others_rates
        assert all(torch.equal(linear[name], dense[name]) for name in linear)
        for a, b in zip(shards, others, strict=True):
            mine, theirs = ([h.weights, *h.state] for h in (a, b))
            assert isinstance(a, Held) and all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True)), a.name


LONG = [pytest.mark.slow, pytest.mark.timeout(10 * KILLS + 300)] if KILLS > 8 else []


@pytest.mark.parametrize("kills", [pytest.param(KILLS, marks=LONG)])
def test_killed_training_ends_with_the_same_numbers(kills: int, tmp_path: Path, seed: int) -> None:
    wanted = run(tmp_path / "whole", random.Random(seed), 0)
    chooser, left, found = random.Random(seed), kills, None
    rounds = 0
    while left:
        # A run of few checkpoints stands few kills.
        here = min(left, 4)
        found = run(tmp_path / f"killed-{rounds}", chooser, here)
        assert found["losses"] == wanted["losses"]
        check_same(wanted["final"], found["final"])
        print(f"killed {', '.join(found['at'])}; the other rank ended within {found['longest']:.1f} s")
        left, rounds = left - len(found["at"]), rounds + 1
        assert rounds <= kills
