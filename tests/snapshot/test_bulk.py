"""Serving snapshots from a user's own rows equal those that come through training stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from tests.snapshot.snapshot_kit import one_table_snapshot
from torchrec_turbossd.errors import (
    ConfigError,
    CorruptError,
    InputError,
    SnapshotError,
    TurboSSDError,
    UnknownTableError,
    UnsupportedError,
)
from torchrec_turbossd.rows import quantise
from torchrec_turbossd.snapshot import Manifest, convert_to_serving, verify, write_serving_snapshot
from torchrec_turbossd.store import LayeredRowStore, clone_directory
from torchrec_turbossd.tables import TableSpec

ROWS = 300
WEIGHTS = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))


def rows_in(snapshot: Path, scratch: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """All rows of a snapshot, by table."""
    manifest = verify(snapshot)
    (part,) = manifest.parts
    assert part.store == "layered"
    clone_directory(snapshot / part.directory, scratch)
    sizes, counts = {t.name: t.row_bytes for t in manifest.tables}, {t.name: t.rows for t in manifest.tables}
    store = LayeredRowStore(scratch, sizes, counts, create=False)
    found = {}
    for table in sizes:
        windows = list(store.scan(table))
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *(ids for ids, _ in windows)])
        found[table] = ids, torch.cat([torch.empty(0, sizes[table]).byte(), *(rows for _, rows in windows)])
    store.close()
    return found


def streamed(step: int) -> Iterator[tuple[Any, Any]]:
    for first in range(0, ROWS, 64):
        ids = np.arange(first, min(first + 64, ROWS), step, dtype=np.int32)
        yield ids, WEIGHTS[ids].double()


def mapped(tmp_path: Path) -> np.ndarray:
    np.save(tmp_path / "w.npy", WEIGHTS.numpy())
    return np.load(tmp_path / "w.npy", mmap_mode="r")


FORMS: dict[str, Callable[[Path], Any]] = {
    "tensor": lambda _: WEIGHTS,
    "strided tensor": lambda _: WEIGHTS.repeat(2, 2)[:ROWS, :8],
    "array": lambda _: WEIGHTS.numpy(),
    "memory map": mapped,
    "double": lambda _: WEIGHTS.double().numpy(),
    "stream": lambda _: streamed(1),
    "bytes": lambda _: quantise(WEIGHTS, SparseType.INT8).numpy(),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_rows_of_every_form_are_written(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_turbossd.snapshot.bulk._WINDOW_BYTES", 700)
    seen: list[tuple[int, int]] = []
    manifest = write_serving_snapshot(
        tmp_path / "snap",
        [("a", ROWS, 8, SparseType.INT8)],
        {"a": FORMS[form](tmp_path)},
        version=7,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (manifest.kind, manifest.version, manifest) == ("serving", 7, verify(tmp_path / "snap"))
    ids, rows = rows_in(tmp_path / "snap", tmp_path / "open")["a"]
    assert torch.equal(ids, torch.arange(ROWS)) and torch.equal(rows, quantise(WEIGHTS, SparseType.INT8))
    assert seen == sorted(seen) and seen[-1] == (ROWS, ROWS)


@pytest.mark.parametrize("data_type", [SparseType.FP32, SparseType.FP16, SparseType.INT8, SparseType.INT4])
def test_rows_equal_those_of_a_converted_training_snapshot(data_type: SparseType, tmp_path: Path) -> None:
    table = TableSpec(name="a", rows=ROWS, dim=8)
    ids = torch.arange(0, ROWS, 3)
    one_table_snapshot(tmp_path / "trained", table, (ids, WEIGHTS[ids].view(torch.uint8)))
    convert_to_serving(tmp_path / "trained", tmp_path / "converted", data_type)
    tables = [("a", ROWS, 8, data_type), ("b", 5, 4, SparseType.INT8)]
    write_serving_snapshot(tmp_path / "bulk", tables, {"b": [], "a": [(ids, WEIGHTS[ids])]})
    one, other = rows_in(tmp_path / "converted", tmp_path / "1"), rows_in(tmp_path / "bulk", tmp_path / "2")
    assert torch.equal(one["a"][0], ids) and all(map(torch.equal, one["a"], other["a"]))
    assert other["b"][0].numel() == 0


def test_an_old_serving_snapshot_is_brought_to_the_new_form(tmp_path: Path) -> None:
    table = TableSpec(name="a", rows=ROWS, dim=8, data_type=SparseType.INT8)
    ids, rows = torch.arange(5, 200), quantise(WEIGHTS[5:200], SparseType.INT8)
    old = one_table_snapshot(tmp_path / "old", table, (ids, rows), kind="serving", version=4)
    assert old.parts[0].store == "rocks"
    new = convert_to_serving(tmp_path / "old", tmp_path / "new", SparseType.INT8)
    assert (new.version, new.tables) == (4, old.tables)
    got = rows_in(tmp_path / "new", tmp_path / "open")["a"]
    assert torch.equal(got[0], ids) and torch.equal(got[1], rows)
    # And a layered one again, by the same way.
    convert_to_serving(tmp_path / "new", tmp_path / "again", {"a": SparseType.INT8})
    assert all(map(torch.equal, got, rows_in(tmp_path / "again", tmp_path / "open again")["a"]))


def test_a_bar_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_serving_snapshot(tmp_path / "s", [("a", ROWS, 8, SparseType.INT8)], {"a": WEIGHTS}, progress=True)
    assert "300/300" in capsys.readouterr().err


def twice() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.arange(9), WEIGHTS[:9]
    yield torch.arange(8, 12), WEIGHTS[:4]


def failing() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.arange(9), WEIGHTS[:9]
    raise RuntimeError("the user's own")


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ({"a": WEIGHTS[:299]}, InputError, "'a' has 300 rows"),
        ({"a": WEIGHTS[0]}, InputError, "shape"),
        ({"a": WEIGHTS[:, :7]}, InputError, "8 wide, got 7"),
        ({"a": WEIGHTS.int()}, InputError, "floating rows or uint8"),
        ({"a": WEIGHTS * float("nan")}, InputError, "finite"),
        ({"a": 5}, InputError, "iterable"),
        ({"a": [5]}, InputError, "pair"),
        ({"a": [(torch.arange(3), WEIGHTS[:4])]}, InputError, "window has ids"),
        ({"a": [(torch.tensor([3, 300]), WEIGHTS[:2])]}, InputError, "0 to 299"),
        ({"a": [(torch.tensor([-1, 3]), WEIGHTS[:2])]}, InputError, "ascend"),
        ({"a": twice()}, InputError, "each once"),
        ({"a": failing()}, RuntimeError, "own"),
        ({}, InputError, "no rows are given of 'a'"),
        ({"a": WEIGHTS, "c": WEIGHTS}, UnknownTableError, "'c'"),
    ],
)
def test_rows_that_do_not_fit_leave_nothing(
    rows: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        write_serving_snapshot(tmp_path / "s", [("a", ROWS, 8, SparseType.INT8)], rows)
    assert list(tmp_path.iterdir()) == []


def test_declarations_and_paths_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        write_serving_snapshot(tmp_path / "s", [("a", ROWS, 8, SparseType.BF16)], {"a": WEIGHTS})
    with pytest.raises(ConfigError, match="multiple of 8"):
        write_serving_snapshot(tmp_path / "s", [("a", ROWS, 4, SparseType.INT2)], {"a": WEIGHTS[:, :4]})
    with pytest.raises(ConfigError, match="version"):
        write_serving_snapshot(tmp_path / "s", [("a", ROWS, 8, SparseType.INT8)], {"a": WEIGHTS}, version=-1)
    (tmp_path / "s").write_text("taken")
    with pytest.raises(SnapshotError, match="not a directory"):
        write_serving_snapshot(tmp_path / "s", [("a", ROWS, 8, SparseType.INT8)], {"a": WEIGHTS})


def test_damage_to_any_file_of_a_layered_snapshot_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_serving_snapshot(path, [("a", ROWS, 8, SparseType.INT8)], {"a": streamed(2)})
    files = [f for f in path.rglob("*") if f.is_file()]
    assert {f.relative_to(path).as_posix() for f in files} >= {"part-0/base/0.rows", "part-0/base/0.ids"}
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises((CorruptError, SnapshotError)):
            verify(path)
        file.write_bytes(data)
    (path / "part-0" / "base" / "extra").write_text("x")
    with pytest.raises(SnapshotError, match="base/extra"):
        verify(path)


def test_a_manifest_names_the_kind_of_store(tmp_path: Path) -> None:
    manifest = write_serving_snapshot(tmp_path / "s", [("a", ROWS, 8, SparseType.INT8)], {"a": WEIGHTS})
    assert Manifest.loads(manifest.dumps(), "here").parts[0].store == "layered"
    body = manifest.to_json()
    del body["parts"][0]["store"]
    assert Manifest._from_json(body).parts[0].store == "rocks"
    body["parts"][0]["store"] = "paper"
    with pytest.raises(TurboSSDError, match="rocks or layered"):
        Manifest._from_json(body)
