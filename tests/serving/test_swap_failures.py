"""Loads that fail before or after the switch: what was served goes on, and nothing is left behind or lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.test_swap import (
    EVERY,
    SQUEEZED,
    WARMED,
    answers,
    assert_serves_on,
    during,
    fail_with,
    generations,
    reopened,
    saved,
    serving,
    values,
)
from torchrec_turbossd.errors import StoreError
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.tbe.successor import Successor


@pytest.fixture
def module(tmp_path: Path) -> Iterator[TurboSSDInferenceModule]:
    with serving(tmp_path) as module:
        yield module


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return saved(tmp_path)


@pytest.mark.parametrize("step", ["retire", "warm"])
def test_a_failure_after_the_switch_keeps_the_new_generation(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    answers(module)
    with monkeypatch.context() as patch:
        patch.setattr(Successor if step == "retire" else type(module.tbe.rows), step, fail_with)
        with contextlib.suppress(StoreError):
            module.load_snapshot(snapshot)
    assert torch.equal(answers(module), values(2000))
    assert generations(module) == ["CURRENT", "LOCK", "gen-2"]
    module.streaming_update(EVERY[:1], torch.ones(1, 4), "a")
    want = values(2000)
    want[0] = 1
    assert torch.equal(answers(module), want)
    assert torch.equal(reopened(module), want)


def test_failed_loads_keep_all_slots(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(module)
    usual, calls = module.tbe.rows.memory.write, [0]

    def fail_late(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError("planted")
        usual(*arguments)

    monkeypatch.setattr("torchrec_turbossd.tbe.successor._STEPS", {"cpu": 4})
    for _ in range(3):
        calls[0] = 0
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(module.tbe.rows.memory, "write", fail_late)
            module.load_snapshot(snapshot)
        assert not module.tbe.rows.squeezed
        module.tbe.rows.cache.check()
    assert_serves_on(module)


def test_an_update_is_not_lost_where_it_cannot_be_carried(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("planted")

    def act() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("torchrec_turbossd.serving.live.Successor.carry", fail)
            module.streaming_update(EVERY[7:8], torch.ones(1, 4), "a")

    during(SQUEEZED, monkeypatch, act)
    with pytest.raises(StoreError, match="planted"):
        module.load_snapshot(snapshot)
    want = values(1000)
    want[7] = 1
    assert torch.equal(answers(module), want)


def test_a_load_that_fails_at_once_carries_nothing(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torchrec_turbossd.serving.live.Generations.new", fail_with)
        with pytest.raises(StoreError, match="planted"):
            module.load_snapshot(snapshot)
        with pytest.raises(StoreError, match="planted"):
            module.begin_generation()
    assert module._live._carried is None
    module.load_snapshot(snapshot)


def test_a_carried_update_that_fails_fails_the_load_alone(
    module: TurboSSDInferenceModule, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(module)

    def act() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("torchrec_turbossd.serving.live.Successor.carry", fail_with)
            module.streaming_update(EVERY[7:8], torch.ones(1, 4), "a")

    during(WARMED, monkeypatch, act)
    with pytest.raises(StoreError, match="planted"):
        module.load_snapshot(snapshot)
    want = values(1000)
    want[7] = 1
    assert torch.equal(answers(module), want)
    assert generations(module) == ["CURRENT", "LOCK", "gen-1"]
    module.load_snapshot(snapshot)
    assert torch.equal(answers(module), values(2000))
