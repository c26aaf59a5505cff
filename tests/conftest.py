"""What every test shares: fixed seeds, one torch thread, and CUDA tests skipped where there is no CUDA device."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings

SEED = 20260101

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """One thread: the machine's cores are shared, and small tensors gain nothing from more."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    why = "no CUDA device" if torch.version.cuda else "this torch is a build without CUDA"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed `random` and torch before every test; the value is for generators of a test's own."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED
