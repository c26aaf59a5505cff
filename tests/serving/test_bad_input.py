"""Whatever is wrong with an input, its error says so and nothing has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from tests.serving.serving_kit import SPECS, every_row, ids
from torchrec_turbossd.errors import InputError, RowIndexError, UnknownTableError, UnsupportedError
from torchrec_turbossd.serving import TurboSSDInferenceModule

build = TurboSSDInferenceModule.from_embedding_specs

LOOKUPS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "float ids": ((torch.ones(1), ids(0, 1, 1)), InputError, "int32 or int64"),
    "2-D ids": ((ids(1).view(1, 1), ids(0, 1, 1)), InputError, "1-D"),
    "a list": (([1], ids(0, 1, 1)), InputError, "tensor"),
    "float offsets": ((ids(1), torch.tensor([0.0, 1.0, 1.0])), InputError, "offsets"),
    "odd offsets": ((ids(1), ids(0, 1)), InputError, "2 features"),
    "no offsets": ((ids(), ids()), InputError, "offsets"),
    "offsets past the end": ((ids(1), ids(0, 1, 2)), InputError, "rise from 0"),
    "offsets that fall": ((ids(1, 2), ids(0, 2, 1, 2, 2)), InputError, "falling"),
    "offsets from 1": ((ids(1), ids(1, 1, 1)), InputError, "rise from 0"),
    "id too large": ((ids(50), ids(0, 1, 1)), RowIndexError, "table 'a' has rows 0 to 49"),
    "id of another table": ((ids(20), ids(0, 0, 1)), RowIndexError, "table 'b' has rows 0 to 19"),
    "negative id": ((ids(-1), ids(0, 1, 1)), RowIndexError, "-1"),
    "id that int32 would wrap": ((ids(2**32 + 3), ids(0, 1, 1)), RowIndexError, str(2**32 + 3)),
    "too few weights": ((ids(1, 2), ids(0, 2, 2), torch.ones(1)), InputError, "per_sample_weights"),
    "integer weights": ((ids(1), ids(0, 1, 1), ids(1)), InputError, "floating"),
    "meta ids": ((ids(1).to("meta"), ids(0, 1, 1)), InputError, "on cpu"),
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_bad_lookups_change_nothing(case: str, module: TurboSSDInferenceModule) -> None:
    arguments, error, said = LOOKUPS[case]
    before, stats = every_row(module), module.read_stats()
    with pytest.raises(error, match=said):
        module(*arguments)
    assert module.read_stats() == stats
    assert torch.equal(every_row(module), before)
    module.tbe.rows.cache.check()


UPDATES: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "float ids": ((torch.ones(1), torch.ones(1, 8), "a"), InputError, "int32 or int64"),
    "a list": (([1], torch.ones(1, 8), "a"), InputError, "tensor"),
    "no rows": ((ids(1), None, "a"), InputError, "weights must be a tensor"),
    "too few rows": ((ids(1, 2), torch.ones(1, 8), "a"), InputError, "a row for each of 2"),
    "1-D rows": ((ids(1), torch.ones(8), "a"), InputError, "2-D"),
    "narrow floats": ((ids(1), torch.ones(1, 7), "a"), InputError, "8 wide"),
    "narrow bytes": ((ids(1), torch.ones(1, 11).byte(), "a"), InputError, "12 or 16 bytes"),
    "integers": ((ids(1), torch.ones(1, 8).int(), "a"), InputError, "uint8"),
    "not a number": ((ids(1, 2), torch.tensor([[1.0] * 8, [float("nan")] * 8]), "a"), InputError, "finite"),
    "a replaced row": ((ids(1, 1), torch.tensor([[float("inf")] * 8, [1.0] * 8]), "a"), InputError, "finite"),
    "id too large": ((ids(0, 50), torch.ones(2, 8), "a"), RowIndexError, "table 'a' has rows 0 to 49"),
    "negative id": ((ids(0, -1), torch.ones(2, 8), "a"), RowIndexError, "-1"),
    "linear id too large": ((ids(70), torch.ones(1, 4)), RowIndexError, "whole of 2 tables has rows 0 to 69"),
    "linear ids, one width wrong": ((ids(0, 60), torch.ones(2, 8)), InputError, "4 wide"),
    "unknown table": ((ids(0), torch.ones(1, 8), "z"), UnknownTableError, "no table 'z'"),
    "version below zero": ((ids(0), torch.ones(1, 8), "a", -1), InputError, "version"),
    "version of another type": ((ids(0), torch.ones(1, 8), "a", 1.5), InputError, "version"),
}


@pytest.mark.parametrize("case", UPDATES)
def test_bad_updates_change_nothing(case: str, module: TurboSSDInferenceModule, tmp_path: Path) -> None:
    arguments, error, said = UPDATES[case]
    before = every_row(module)
    with pytest.raises(error, match=said):
        module.streaming_update(*arguments)
    assert torch.equal(every_row(module), before)
    module.close()
    with build(SPECS, tmp_path, device="cpu", name="m", output_dtype=SparseType.FP32) as again:
        assert torch.equal(every_row(again), before)


@pytest.mark.gpu
def test_int2_rows_in_fp32_on_a_gpu(tmp_path: Path) -> None:
    specs = [("a", 30, 16, SparseType.INT2)]
    with pytest.raises(UnsupportedError, match="FP16 or BF16"):
        build(specs, tmp_path, device="cuda", output_dtype=SparseType.FP32)
    with build(specs, tmp_path, device="cuda", output_dtype=SparseType.BF16):
        pass
