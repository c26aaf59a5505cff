"""Where a training TBE runs: on the CPU, there with the tiers of a GPU, and on a GPU with and without a DRAM tier."""

from __future__ import annotations

import pytest

from tests.tbe import pair


@pytest.fixture(
    params=[
        "cpu",
        "cpu-tiers",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("cuda-tiers", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device for `Pair`."""
    kind, _, tiers = str(request.param).partition("-")
    # Else every row has a place there.
    monkeypatch.setattr("torchrec_turbossd.cache.device_cache.LEAST_DRAM_ROWS", 32)
    if tiers:
        monkeypatch.setattr(pair, "DRAM_SLOTS", (40, 30))
    return kind if kind == "cpu" else f"{kind}:0"
