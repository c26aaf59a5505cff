"""Rows of a device-resident cache that stay in their slots: of batches in flight, and of batches that are held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cache.device_kit import BOTH, Tables, few_programs
from torchrec_turbossd.cache import device_cache
from torchrec_turbossd.errors import CacheFullError

__all__ = ["few_programs"]


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_rows_of_batches_in_flight_stay(device: str, kind: str) -> None:
    """A batch that does not fit beside those in flight is refused, and fits when they have ended."""
    tables = Tables((device, kind), [8], None, [0], [100])
    ids, offsets = torch.arange(6), torch.arange(7)
    batch, _ = tables.bring(ids, offsets, 6, mark=True)
    pin = tables.cache.pin(batch)
    assert tables.cache.pinned_slots == 6
    with pytest.raises(CacheFullError, match="those in flight leave"):
        tables.bring(torch.arange(10, 16), offsets, 6, mark=True)
    tables.cache.check()
    assert torch.equal(tables.cache.slots_of(0, ids.to(tables.device)).cpu(), batch.slots.cpu())
    tables.cache.unpin(pin)
    _, misses = tables.bring(torch.arange(10, 16), offsets, 6, mark=True)
    assert misses == [6]
    tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_batches_in_flight_stay_counted(device: str, kind: str) -> None:
    """Slots of an old batch in flight are known to be taken after the batches since it were let go."""
    tables = Tables((device, kind), [100], [500], [0], [500])

    def bring(first: int, count: int) -> device_cache.Batch:
        ids = torch.arange(first, first + count)
        return tables.bring(ids, torch.arange(count + 1), count, mark=True)[0]

    held = [tables.cache.pin(bring(0, 70))]
    bring(100, 25)
    held.append(tables.cache.pin(bring(200, 28)))
    with pytest.raises(CacheFullError):
        bring(300, 10)
    tables.cache.check()
    for pin in held:
        tables.cache.unpin(pin)
    assert bool((bring(300, 10).slots > 0).all())
    tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_held_rows_stay(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches that share rows, each until it is let go; slots that they leave are used by all others."""
    monkeypatch.setattr("torchrec_turbossd.cache.entries.LAST_STAMP", 7)
    tables = Tables((device, kind), [16], [100], [0], [100], changes=False)
    generator = torch.Generator().manual_seed(3)
    held = []
    for ids in (torch.arange(4), torch.arange(2, 6)):
        held.append(tables.bring(ids, torch.arange(5), 4, mark=False)[0])
        tables.cache.hold(held[-1])

    def slots(ids: Tensor) -> Tensor:
        return tables.cache.slots_of(0, ids.to(device)).cpu()

    def bring_others(count: int) -> None:
        for _ in range(12):
            ids = 6 + torch.randperm(94, generator=generator)[:count]
            batch, _ = tables.bring(ids, torch.arange(count + 1), count, mark=False)
            assert torch.equal(tables.row(0, batch.slots.cpu()), tables.live[0][ids])

    places = slots(torch.arange(6))
    bring_others(8)
    assert torch.equal(slots(torch.arange(6)), places)
    tables.cache.let_go(held[0])
    bring_others(12)
    assert torch.equal(slots(torch.arange(2, 6)), places[2:])
    assert not bool(slots(torch.arange(2)).any())
    with pytest.raises(CacheFullError):
        tables.bring(torch.arange(10, 23), torch.arange(14), 13, mark=False)
    tables.cache.let_go(held[1])
    bring_others(16)
    assert not bool(slots(torch.arange(6)).any())
    tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
@pytest.mark.parametrize("ahead", [False, True], ids=["asked", "ahead"])
def test_what_a_bad_batch_touched_is_counted(device: str, kind: str, ahead: bool) -> None:
    """It marks slots as used before it is known to be bad; with a batch in flight they stay, as the next sees."""
    tables = Tables((device, kind), [10], [100], [0], [100], ahead=ahead)

    def bring(ids: list[int]) -> device_cache.Batch:
        return tables.bring(torch.tensor(ids), torch.arange(len(ids) + 1), len(ids), mark=True)[0]

    bring([50, 51, 52, 53])
    bring(list(range(10)))
    pin = tables.cache.pin(bring([0, 1]))
    falling = torch.tensor([0, 9, *[8] * 7], device=device)
    slots = torch.empty(8, dtype=torch.int64, device=device)
    bad = tables.cache.remap(torch.arange(2, 10, device=device), falling, 8, slots, mark=True)
    assert tables.cache.found().flags == 1
    tables.cache.give_up(bad)
    batch = bring([50, 51, 52, 53])
    assert bool((batch.slots > 0).all())
    tables.cache.unpin(pin)
    tables.cache.check()
