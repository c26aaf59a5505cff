"""Every rank learns what the tables on SSD were asked for on all of them, whatever their sharding type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from tests.ranks import run_ranks
from tests.sharding.models import FEATURES, batch, make_dmp, sparse_of, train
from torchrec_turbossd.errors import ClosedError, ConfigError
from torchrec_turbossd.sizing import AccessProfile

SLOTS = {"big": 120, "wide": 60}
STEPS = range(3, 8)


def asked(table: str, world: int) -> list[np.ndarray]:
    """Of each step, the sorted ids that all ranks together ask a table for."""
    steps = []
    for step in STEPS:
        batches = [batch(step, rank) for rank in range(world)]
        ids = [each[feature].values() for each in batches for feature in FEATURES[table]]
        steps.append(torch.cat(ids).sort().values.numpy())
    return steps


def _record(rank: int, world: int, directory: Path, sharding: str) -> None:
    dmp = make_dmp(world, sharding, EmbOptimType.EXACT_SGD, directory, SLOTS)
    sharded = sparse_of(dmp)
    train(dmp, rank, range(3))
    try:
        sharded.access_samples()
    except ConfigError as error:
        said = str(error)
    if "record_access" not in said:
        raise AssertionError(said)
    sharded.record_access()
    train(dmp, rank, STEPS)
    samples = sharded.access_samples()
    if set(samples) != set(SLOTS):
        raise AssertionError(f"samples of {sorted(samples)}")
    for table, sample in samples.items():
        (window,) = sample.windows()
        for number, wanted in enumerate(asked(table, world)):
            got = np.sort(window.ids[window.batches == number])
            if not np.array_equal(got, wanted):
                raise AssertionError(f"{table}, step {number}: {got} are not {wanted}")
    profiles = AccessProfile.from_cache(sharded)
    if {name: p.lookups for name, p in profiles.items()} != {name: s.lookups for name, s in samples.items()}:
        raise AssertionError(f"profiles {profiles}")
    sharded.record_access(False)
    sharded.close()
    try:
        sharded.record_access()
    except ClosedError:
        return
    raise AssertionError("a closed module records")


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_two_ranks_record_together(tmp_path: Path, sharding: str) -> None:
    run_ranks(2, _record, tmp_path, sharding)
