"""Publishing by updates into a fresh generation, beside the one that is served."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.errors import ClosedError, ConfigError, RowIndexError, StoreError

build = TurboSSDInferenceModule.from_embedding_specs
ROWS, DIM = 40, 4
EVERY = torch.arange(ROWS)
OFFSETS = torch.arange(ROWS + 1)


def values(base: float) -> torch.Tensor:
    return torch.full((ROWS, DIM), float(base)) + EVERY[:, None]


def answers(module: TurboSSDInferenceModule) -> torch.Tensor:
    return module(EVERY, OFFSETS)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[TurboSSDInferenceModule]:
    specs = [("a", ROWS, DIM, SparseType.FP32)]
    with build(specs, tmp_path / "ssd", device="cpu", name="m", default_row=7.0, output_dtype=SparseType.FP32) as made:
        made.streaming_update(EVERY, values(100), "a", version=3)
        answers(made)
        yield made


def folders(module: TurboSSDInferenceModule) -> list[str]:
    return sorted(p.name for p in module.directory.iterdir())


def test_rows_are_served_at_the_commit_and_not_before(module: TurboSSDInferenceModule) -> None:
    with module.begin_generation(5) as generation:
        assert module.streaming_update(EVERY[:30], values(200)[:30], "a", generation=generation)
        assert module.streaming_update(EVERY[:1], torch.zeros(1, DIM), generation=generation)
        assert torch.equal(answers(module), values(100))
        generation.commit()
    want = values(200)
    want[0], want[30:] = 0, 7
    assert torch.equal(answers(module), want)
    assert module.version == 5
    assert folders(module) == ["CURRENT", "LOCK", "gen-2"]
    module.tbe.rows.cache.check()
    with pytest.warns(RuntimeWarning, match="left out"):
        assert not module.streaming_update(EVERY[:1], torch.ones(1, DIM), "a", version=5)
    module.flush()


@pytest.mark.parametrize("first", ["live", "own"])
@pytest.mark.parametrize(("version", "carried"), [(None, True), (6, True), (5, False)])
def test_updates_meanwhile_stay(
    module: TurboSSDInferenceModule, first: str, version: int | None, carried: bool
) -> None:
    generation = module.begin_generation(5)

    def own() -> None:
        module.streaming_update(EVERY, values(200), "a", generation=generation)

    if first == "own":
        own()
    module.streaming_update(EVERY[7:8], torch.ones(1, DIM), "a", version=version)
    if first == "live":
        own()
    generation.commit()
    want = values(200)
    if carried:
        want[7] = 1
    assert torch.equal(answers(module), want)
    assert module.version == max(5, version or 0)


def test_aborted_generations_leave_nothing(module: TurboSSDInferenceModule) -> None:
    with module.begin_generation() as generation:
        module.streaming_update(EVERY, values(200), "a", generation=generation)
        assert folders(module) == ["CURRENT", "LOCK", "gen-1", "gen-2"]
    assert folders(module) == ["CURRENT", "LOCK", "gen-1"]
    assert torch.equal(answers(module), values(100))
    for use in (generation.commit, lambda: module.streaming_update(EVERY[:1], values(0)[:1], generation=generation)):
        with pytest.raises(ClosedError, match="begin another"):
            use()
    generation.abort()
    module.begin_generation()
    module.close()
    assert folders(module) == ["CURRENT", "LOCK", "gen-1"]


def test_one_at_a_time(module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    module.save_snapshot(tmp_path / "snapshot")
    with module.begin_generation():
        with pytest.raises(StoreError, match="wait for that, commit it or abort it"):
            module.begin_generation()
        with pytest.raises(StoreError, match="commit or abort it"):
            module.load_snapshot(tmp_path / "snapshot")
    module.load_snapshot(tmp_path / "snapshot")
    with module.begin_generation():
        pass


def test_bad_input_changes_nothing(module: TurboSSDInferenceModule) -> None:
    with module.begin_generation() as generation:
        with pytest.raises(RowIndexError):
            module.streaming_update(EVERY + 1, values(200), "a", generation=generation)
        with pytest.raises(ConfigError, match="begin_generation"):
            module.streaming_update(EVERY, values(200), "a", 4, generation=generation)
        generation.commit()
    assert torch.equal(answers(module), torch.full((ROWS, DIM), 7.0))


def test_a_commit_that_fails_changes_nothing(module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StoreError("planted")

    generation = module.begin_generation()
    module.streaming_update(EVERY, values(200), "a", generation=generation)
    with monkeypatch.context() as patch:
        patch.setattr("torchrec_turbossd.serving.generations.write_durably", fail)
        with pytest.raises(StoreError, match="planted"):
            generation.commit()
    assert torch.equal(answers(module), values(100))
    assert folders(module) == ["CURRENT", "LOCK", "gen-1"]
    module.tbe.rows.cache.check()
    with module.begin_generation() as generation:
        module.streaming_update(EVERY, values(300), "a", generation=generation)
        generation.commit()
    assert torch.equal(answers(module), values(300))


def test_closing_while_one_begins(module: TurboSSDInferenceModule, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, proceed = threading.Event(), threading.Event()
    usual = type(module._live)._open

    def wait_and_open(*arguments: Any) -> Any:
        opening.set()
        assert proceed.wait(30)
        return usual(*arguments)

    monkeypatch.setattr(type(module._live), "_open", wait_and_open)
    failures: list[BaseException] = []

    def begin() -> None:
        try:
            module.begin_generation()
        except ClosedError as error:
            failures.append(error)

    beginning, closing = threading.Thread(target=begin), threading.Thread(target=module.close)
    beginning.start()
    assert opening.wait(30)
    closing.start()
    proceed.set()
    beginning.join(30)
    closing.join(30)
    assert not closing.is_alive() and not beginning.is_alive()
    assert folders(module) == ["CURRENT", "LOCK", "gen-1"]
