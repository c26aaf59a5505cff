"""What rides in a plan survives copying and pickling, and says what it is."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
from torchrec.distributed.types import CacheAlgorithm, CacheParams, ParameterSharding

from torchrec_turbossd.errors import ConfigError, UnsupportedError
from torchrec_turbossd.planner import TURBO_SSD, TurboCacheParams, slots_of
from torchrec_turbossd.planner.kernel import PLAN_VERSION, dram_slots_of


def params(**changes: object) -> TurboCacheParams:
    given = {"slots": (3, 4), "row_bytes": (8, 8), "hit_rates": (0.5, 0.75), "algorithm": CacheAlgorithm.LRU}
    return TurboCacheParams(**{**given, **changes})  # type: ignore[arg-type]


def test_the_name_is_torchrecs_own_extension_point() -> None:
    assert TURBO_SSD == "customized_kernel"


def test_copies_are_equal_and_hash_alike() -> None:
    one = params()
    hash(one)
    for twin in (params(), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one and hash(twin) == hash(one) and isinstance(twin, CacheParams)
    assert one != params(slots=(3, 5)) and hash(one) != hash(params(slots=(3, 5)))


def test_a_kept_hash_follows_changes() -> None:
    one = params()
    before = hash(one)
    one.load_factor = 0.5
    assert hash(one) != before and hash(one) == hash(params(load_factor=0.5))


@pytest.mark.slow
def test_a_pickled_hash_is_not_believed_by_another_process() -> None:
    one = params()
    hash(one)
    code = (
        "import pickle, sys; p = pickle.loads(sys.stdin.buffer.read());"
        "from torchrec_turbossd.planner import TurboCacheParams as T;"
        "assert hash(p) == hash(T(slots=p.slots, row_bytes=p.row_bytes, hit_rates=p.hit_rates, algorithm=p.algorithm))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(one), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_fingerprints_tell_sizes_apart() -> None:
    assert params().stable_fingerprint() == params().stable_fingerprint()
    assert params().stable_fingerprint() != params(slots=(3, 5)).stable_fingerprint()


def test_slots_of_a_planned_table() -> None:
    assert slots_of(ParameterSharding("row_wise", TURBO_SSD, cache_params=params())) == (3, 4)
    for none in (None, CacheParams(load_factor=0.5), TurboCacheParams()):
        assert slots_of(ParameterSharding("row_wise", TURBO_SSD, cache_params=none)) is None


def test_the_tier_of_a_planned_table() -> None:
    tier = params(dram_slots=(5, 0), dram_hit_rates=(0.1, 0.0))
    assert dram_slots_of(ParameterSharding("row_wise", TURBO_SSD, cache_params=tier)) == (5, 0)
    assert dram_slots_of(ParameterSharding("row_wise", TURBO_SSD, cache_params=params())) is None
    assert tier != params() and hash(tier) != hash(params())
    assert tier.stable_fingerprint() != params(dram_slots=(5, 1), dram_hit_rates=(0.1, 0.0)).stable_fingerprint()
    assert tier.of_shards([1, 0, 1]) == params(
        slots=(4, 3, 4),
        row_bytes=(8, 8, 8),
        hit_rates=(0.75, 0.5, 0.75),
        dram_slots=(0, 5, 0),
        dram_hit_rates=(0.0, 0.1, 0.0),
    )
    with pytest.raises(ConfigError, match="dram_slots needs one entry"):
        params(dram_slots=(1,))


def test_newer_plans_are_refused() -> None:
    newer = ParameterSharding("row_wise", TURBO_SSD, cache_params=params(version=PLAN_VERSION + 1))
    with pytest.raises(UnsupportedError, match="upgrade"):
        slots_of(newer)


def test_lengths_must_agree() -> None:
    assert TurboCacheParams(slots=(1, 2)).row_bytes == ()
    with pytest.raises(ConfigError, match="row_bytes needs one entry"):
        params(row_bytes=(8,))


def test_the_hash_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = params()
    made: list[int] = []

    def hashed(self: CacheParams) -> int:
        made.append(1)
        return 7

    monkeypatch.setattr(CacheParams, "__hash__", hashed)
    assert hash(one) == hash(one) and len(made) == 1
