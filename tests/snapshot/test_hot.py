"""Hot rows in a snapshot: written hottest first, found again, and used by a module that has none of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.errors import CorruptError
from torchrec_turbossd.snapshot.hot import read_hot_rows, write_hot_rows
from torchrec_turbossd.tables import TableSpec

A = TableSpec(name="a", rows=100, dim=4)
B = TableSpec(name="b/ü", rows=10, dim=2)
build = TurboSSDInferenceModule.from_embedding_specs


def rows_of(table: TableSpec, ids: torch.Tensor) -> torch.Tensor:
    return (ids[:, None] + torch.arange(table.row_bytes)).to(torch.uint8)


def test_what_is_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_turbossd.snapshot.hot._WINDOW", 3)
    ids = {A: torch.tensor([7, 3, 99, 0]), B: torch.tensor([], dtype=torch.int64)}
    write_hot_rows(tmp_path / "hot", ((t, i, lambda part, t=t: rows_of(t, part)) for t, i in ids.items()))  # type: ignore[misc]
    found = read_hot_rows(tmp_path / "hot", {"a": A, "b/ü": B})
    for table, wanted in ids.items():
        assert torch.equal(found[table.name][0], wanted)
        assert torch.equal(found[table.name][1], rows_of(table, wanted))
    assert set(read_hot_rows(tmp_path / "hot", {"a": A, "other": B})) == {"a"}
    assert read_hot_rows(tmp_path / "none", {"a": A}) == {}


@pytest.mark.parametrize(
    ("file", "holds"),
    [
        ("ids.npy", np.array([7, 100])),
        ("ids.npy", np.array([-1, 7])),
        ("ids.npy", np.array([7, 7])),
        ("ids.npy", np.array([[7], [3]])),
        ("ids.npy", np.array([7, 3], dtype=np.int32)),
        ("ids.npy", np.array(7)),
        ("rows.npy", np.zeros((2, 3), dtype=np.uint8)),
        ("rows.npy", np.zeros((2, A.row_bytes), dtype=np.int8)),
        ("ids.npy", b"no"),
        ("ids.npy", b""),
        ("ids.npy", b"PK\x03\x04 not an archive"),
        ("ids.npy", b"\x93NUMPY\x01\x00\x04\x00{'a("),
        ("rows.npy", b"\x93NUMPY\x01\x00"),
        ("rows.npy", None),
        ("name", b"\xff\xfe"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, file: str, holds: np.ndarray | bytes | None) -> None:
    ids = torch.tensor([7, 3])
    write_hot_rows(tmp_path / "hot", [(A, ids, lambda part: rows_of(A, part))])
    path = tmp_path / "hot" / f"0.{file}"
    if holds is None:
        path.unlink()
    elif isinstance(holds, bytes):
        path.write_bytes(holds)
    else:
        np.save(path, holds)
    with pytest.raises(CorruptError, match="hot rows beside"):
        read_hot_rows(tmp_path / "hot", {"a": A})


def test_a_cold_module_starts_with_the_hot_rows(tmp_path: Path) -> None:
    specs = [("a", 5000, 4, SparseType.INT8)]
    every = torch.arange(5000)
    values = torch.randn(5000, 4, generator=torch.Generator().manual_seed(1))
    hot = torch.randperm(5000, generator=torch.Generator().manual_seed(2))[:300]
    offsets = torch.arange(301)
    with build(specs, tmp_path / "one", cache_hit_rate=0.3, device="cpu") as one:
        assert one.slots["a"] == 1024
        one.streaming_update(every, values, "a")
        for _ in range(3):
            wanted = one(hot, offsets)
        one.save_snapshot(tmp_path / "snapshot")
    held = read_hot_rows(
        tmp_path / "snapshot" / "hot", {"a": TableSpec(name="a", rows=5000, dim=4, data_type=SparseType.INT8)}
    )
    assert set(held["a"][0].tolist()) <= set(hot.tolist()) and held["a"][0].numel() == 150
    with build(specs, tmp_path / "two", cache_hit_rate=0.3, device="cpu") as two:
        two.load_snapshot(tmp_path / "snapshot")
        assert torch.equal(two(hot, offsets), wanted)
        assert two.get_read_hit_rate_stats() == (150, 150, 300)
