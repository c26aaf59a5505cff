"""A serving TBE with its slots accounted for as on a GPU, beside a plain dict: random calls in random order."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tbe.test_held import ROWS, Served, Store
from torchrec_turbossd.errors import CacheFullError, InputError, RowIndexError, StoreError
from torchrec_turbossd.tbe.held import HeldBatch
from torchrec_turbossd.tbe.successor import Successor

STEPS = 200
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Player:
    """Calls, and what they should give."""

    def __init__(self, device: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random, self.patch = random.Random(seed), monkeypatch
        self.slots = self.random.choice([20, 60, 200, ROWS])
        self.served = Served(device, self.random.choice([0, 100, ROWS]), self.slots)
        self.want = {row: float(row) for row in range(ROWS)}
        self.held: list[tuple[HeldBatch, list[int], dict[int, float] | None]] = []
        self.version = 0.0

    def ids(self, most: int) -> list[int]:
        skew = self.random.choice([1, 3])
        return [int(self.random.random() ** skew * ROWS) for _ in range(self.random.randint(1, most))]

    def look_up(self) -> None:
        ids = self.ids(min(70, self.slots + 10))
        assert self.served.give(ids) == [self.want[row] for row in ids]

    def prefetch(self) -> None:
        self.served.tbe.prefetch(*self.served.args(self.ids(self.slots)))

    def hold(self) -> None:
        if len(self.held) == 3:
            self.held.pop(self.random.randrange(3))[0].release()
        ids = self.ids(self.slots // 4)
        self.held.append((self.served.tbe.hold(*self.served.args(ids)), ids, None))

    def look_at_held(self) -> None:
        for number, (batch, ids, old) in enumerate(self.held):
            try:
                found = batch.lookup()[:, 0].tolist()
            except StoreError:
                batch.bring(*self.served.args(ids))
                self.held[number] = batch, ids, None
                continue
            assert found == [(old or self.want)[row] for row in ids]

    def update(self) -> None:
        ids = sorted(set(self.ids(30)))
        plus = self.random.random()
        numbers = torch.tensor(ids).to(torch.float32) + plus
        self.served.set(torch.tensor(ids), plus)
        self.want.update(zip(ids, numbers.tolist(), strict=True))

    def update_in_vain(self) -> None:
        """What cannot be written into slots is written all the same."""

        def fail(*args: Any) -> None:
            raise MemoryError("planted")

        with self.patch.context() as patch:
            patch.setattr(self.served.tbe.rows.memory, "write", fail)
            self.update()

    def warm(self) -> None:
        ids = torch.tensor(sorted(set(self.ids(40))))
        self.served.tbe.rows.warm(0, ids)

    def swap(self) -> None:
        """Another version: what is held stays of the old one."""
        self.version += 1000
        rows, old = self.served.tbe.rows, dict(self.want)
        following = Successor(rows, Store(self.version), [self.served.shard])
        following.squeeze()
        following.warm(0, torch.tensor(sorted(set(self.ids(40)))))
        if self.random.random() < 0.3:
            following.abandon()
            return
        following.take_over()
        following.retire()
        self.want = {row: row + self.version for row in range(ROWS)}
        self.held = [(batch, ids, before or old) for batch, ids, before in self.held]

    def ask_badly(self) -> None:
        ids, offsets = self.served.args(self.ids(5))
        bad: list[tuple[Tensor, Tensor]] = [(ids + ROWS, offsets), (ids, offsets + 1), (ids, offsets.flip(0))]
        with pytest.raises((InputError, RowIndexError)):
            self.served.tbe(*self.random.choice(bad))

    def step(self) -> None:
        common: list[Callable[[], None]] = [self.look_up] * 6 + [self.prefetch, self.look_at_held, self.update]
        rare: list[Callable[[], None]] = [self.hold, self.update_in_vain, self.warm, self.swap, self.ask_badly]
        call = self.random.choice([*common, *common, *rare])
        try:
            call()
        except CacheFullError:
            # Half of the slots are another version's, or held.
            assert call == self.hold


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:a batch did not fit in the slots")
def test_beside_a_dict(device: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_turbossd.tbe.in_flight._LONGEST_BREAK_S", 0.0)
    if seed % 2:
        # Batch numbers start anew again and again.
        monkeypatch.setattr("torchrec_turbossd.cache.entries.LAST_STAMP", 20)
    player = Player(device, seed, monkeypatch)
    for _ in range(STEPS):
        player.step()
    for batch, *_ in player.held:
        batch.release()
    rows = player.served.tbe.rows
    rows.cache.check()
    assert rows.served.capacity == [player.slots]
