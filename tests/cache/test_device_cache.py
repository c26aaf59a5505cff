"""A device-resident cache beside a plain dict: PyTorch operators, and Triton kernels, interpreted without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cache.device_kit import BOTH, Tables, few_programs, steps_of

__all__ = ["few_programs"]


def _batch(tables: Tables, generator: torch.Generator, bags: int) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(0, 4, (len(tables.features) * bags,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = []
    for feature, table in enumerate(tables.features):
        count = int(offsets[(feature + 1) * bags] - offsets[feature * bags])
        skewed = torch.rand(count, generator=generator) ** 3 * tables.rows[table]
        ids.append(skewed.to(torch.int64))
    return torch.cat(ids), offsets


@pytest.mark.parametrize(("device", "kind"), BOTH)
@pytest.mark.parametrize("ahead", [False, True], ids=["asked", "ahead"])
@pytest.mark.parametrize("dram", [None, [30, 0, 5000]], ids=["staging", "tier"])
def test_beside_a_dict(device: str, kind: str, dram: list[int] | None, ahead: bool) -> None:
    """Rows, changed in slots as training does, are right wherever they go, and what missed is counted exactly."""
    tables = Tables((device, kind), [40, 25, 60], dram, [0, 0, 1, 2], [200, 25, 300], ahead=ahead)
    generator = torch.Generator().manual_seed(5)
    for step in range(steps_of(device, kind, 25)):
        ids, offsets = _batch(tables, generator, 6)
        if not ids.numel():
            continue
        known = [set(tables.cache.resident(table)[0].tolist()) for table in range(3)]
        batch, misses = tables.bring(ids, offsets, 6, mark=True)
        wanted: list[set[int]] = [set(), set(), set()]
        for feature, table in enumerate(tables.features):
            part = slice(int(offsets[feature * 6]), int(offsets[(feature + 1) * 6]))
            wanted[table] |= set(ids[part].tolist())
            slots = batch.slots[part].cpu()
            assert bool((slots > 0).all())
            assert torch.equal(tables.row(table, slots), tables.live[table][ids[part]])
        assert misses == [len(each - have) for each, have in zip(wanted, known, strict=True)]
        for table, each in enumerate(wanted):
            some = torch.tensor(sorted(each), dtype=torch.int64)
            slots = tables.cache.slots_of(table, some.to(tables.device)).cpu()
            tables.change(table, slots, some)
        if step % 8 == 0:
            tables.cache.check()
    tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
@pytest.mark.parametrize("ahead", [False, True], ids=["asked", "ahead"])
def test_copies_beside_a_dict(device: str, kind: str, ahead: bool) -> None:
    """Rows that do not change in slots have a place of their own in DRAM, which they get when they first leave one."""
    tables = Tables((device, kind), [40, 60], [200, 300], [0, 0, 1], [200, 300], ahead=ahead, changes=False)
    generator = torch.Generator().manual_seed(6)
    for table, each in enumerate(tables.live):
        each.random_(generator=generator)
        tables.stored[table] = each.clone()
    for step in range(30):
        ids, offsets = _batch(tables, generator, 6)
        batch, _ = tables.bring(ids, offsets, 6, mark=False)
        for feature, table in enumerate(tables.features):
            part = slice(int(offsets[feature * 6]), int(offsets[(feature + 1) * 6]))
            assert torch.equal(tables.row(table, batch.slots[part].cpu()), tables.live[table][ids[part]])
        if step % 5 == 4:
            # As a swap of versions takes slots, and as warming up fills them.
            taken = tables.cache.evict(1, 8)
            absent = torch.nonzero(tables.cache.entries_of(1, torch.arange(300, device=tables.device)) == 0).flatten()
            tables.put_in_slots(1, absent[:8].cpu(), taken[: absent.numel()])
            tables.cache.give(1, taken[absent.numel() :])
            tables.cache.check()
    there = torch.arange(300, device=tables.device)
    assert bool((tables.cache.in_dram(1, there)[0]).sum() > 60), "what was asked for once is in DRAM"


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_bad_batches_are_told(device: str, kind: str) -> None:
    """Ids outside their table and offsets that fall are flagged, and offsets that do not fall take their place."""
    tables = Tables((device, kind), [8], None, [0], [100])
    slots = torch.empty(3, dtype=torch.int64, device=tables.device)
    safe = torch.empty(3, dtype=torch.int32, device=tables.device)
    for ids, offsets, flag in (
        ([1, -1, 2], [0, 1, 3], 2),
        ([1, 100, 2], [0, 1, 3], 2),
        ([1, 1, 2], [0, 4, 3], 1),
        ([1, 1, 2], [0, 1, 2], 1),
        ([1, 1, 2], [1, 1, 3], 1),
    ):
        given = torch.tensor(ids, device=tables.device), torch.tensor(offsets, device=tables.device)
        batch = tables.cache.remap(*given, 2, slots, mark=False, safe=safe)
        tables.cache.bring_ahead(batch)
        assert tables.cache.found().flags == flag
        assert safe.tolist() == ([0, 0, 0] if flag == 1 else offsets)
        tables.cache.give_up(batch)
        tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_batch_numbers_start_anew(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fit 28 bits: when they do not, all become small, and batches in flight keep their rows."""
    monkeypatch.setattr("torchrec_turbossd.cache.entries.LAST_STAMP", 7)
    tables = Tables((device, kind), [12], [50], [0], [100])
    generator = torch.Generator().manual_seed(3)
    tables.cache._now = 5
    held, _ = tables.bring(torch.arange(4), torch.arange(5), 4, mark=True)
    pin = tables.cache.pin(held)
    for _ in range(20):
        ids = 4 + torch.randperm(96, generator=generator)[:5]
        batch, _ = tables.bring(ids, torch.arange(6), 5, mark=True)
        assert torch.equal(tables.row(0, batch.slots.cpu()), tables.live[0][ids])
        tables.change(0, batch.slots.cpu(), ids)
        assert torch.equal(tables.cache.slots_of(0, torch.arange(4, device=device)).cpu(), held.slots.cpu())
    assert tables.cache._now < 30
    assert held.stamp <= pin.stamp
    tables.cache.unpin(pin)
    tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_programs_that_work_in_rounds(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs do what many would: each has several rounds."""
    if kind == "triton":
        monkeypatch.setattr("torchrec_turbossd.cache.device_triton._PROGRAMS", 2)
    tables = Tables((device, kind), [300, 300], [5000, 5000], [0, 1, 1], [3000, 4000])
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        ids = torch.cat([torch.randint(0, n, (80,), generator=generator) for n in (3000, 4000, 4000)])
        batch, _ = tables.bring(ids, torch.arange(0, 241, 20), 4, mark=True)
        for table, part in ((0, slice(0, 80)), (1, slice(80, 240))):
            slots = batch.slots[part].cpu()
            assert torch.equal(tables.row(table, slots), tables.live[table][ids[part]])
            some, first = ids[part].unique(return_inverse=True)
            of_each = torch.zeros_like(some).scatter_(0, first, slots)
            tables.change(table, of_each, some)
        tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_slots_that_were_taken_away_are_missed(device: str, kind: str) -> None:
    """A table had slots for all of its rows, and has half of them now: what a batch reads makes no room for itself."""
    tables = Tables((device, kind), [8], None, [0], [8])
    tables.live[0].random_(generator=torch.Generator().manual_seed(1))
    tables.stored[0] = tables.live[0].clone()
    tables.bring(torch.arange(8), torch.arange(9), 8, mark=False)
    taken = tables.cache.evict(0, 4)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        ids = torch.randperm(8, generator=generator)[:4]
        batch, _ = tables.bring(ids, torch.arange(5), 4, mark=False)
        assert torch.equal(tables.row(0, batch.slots.cpu()), tables.live[0][ids])
        assert not set(batch.slots.tolist()) & set(taken.tolist())
    tables.cache.check([taken])


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_the_callers_offsets_stay_as_they_are(device: str, kind: str) -> None:
    """Also bad ones, which every program judges by itself: what one makes of them must not hide them from another."""
    tables = Tables((device, kind), [8, 8], None, [0, 1], [100, 100])
    ids = torch.tensor([1, 2, 3], device=tables.device)
    for given in ([0, 1, 2], [0, 9, 3], [0, -1, 3], [0, 2, 5], [1, 2, 3]):
        offsets = torch.tensor(given, device=tables.device)
        batch = tables.cache.remap(ids, offsets, 1, torch.empty(3, dtype=torch.int64, device=tables.device), mark=True)
        assert tables.cache.found().flags == 1, given
        assert offsets.tolist() == given
        tables.cache.give_up(batch)
        tables.cache.check()


@pytest.mark.parametrize(("device", "kind"), BOTH)
def test_free_slots_are_used_first(device: str, kind: str) -> None:
    """Also by batches that are brought ahead, which are given them before it is known how many they need."""
    tables = Tables((device, kind), [20, 8], [100, 50], [0, 1], [100, 50], ahead=True)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        tables.bring(torch.tensor([1, 2, 3, 4]), torch.arange(5), 2, mark=False)
    for table in (0, 1):
        gone = tables.cache.remove(table, torch.tensor([1 if table == 0 else 3], device=device))
        tables.cache.map.clear(torch.tensor([tables.cache.base_of[table] + (1 if table == 0 else 3)], device=device))
        tables.cache.give(table, gone)
    for _ in range(10):
        ids = torch.cat([torch.randperm(100, generator=generator)[:4], torch.randperm(50, generator=generator)[:4]])
        batch, _ = tables.bring(ids, torch.arange(9), 4, mark=True)
        assert torch.equal(tables.row(0, batch.slots[:4].cpu()), tables.live[0][ids[:4]])
        tables.change(0, batch.slots[:4].cpu(), ids[:4])
        tables.cache.check()
    assert tables.cache.free(0) == tables.cache.free(1) == 0
