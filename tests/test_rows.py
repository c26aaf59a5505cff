"""Rows as bytes: quantised like FBGEMM, and the rule for rows never written."""

from __future__ import annotations

import warnings

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_embedding_utils import quantize_embs

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.rows import as_row_bytes, initial_rows, initial_weights, last_of_each, quantise
from torchrec_turbossd.tables import InitRule, StateSpec, TableShard, TableSpec, weight_bytes

RULE = InitRule(seed=3, low=-0.25, high=0.5)
PINNED = [
    [0.4330059885978699, 0.015535831451416016],
    [0.23081755638122559, 0.48400557041168213],
    [0.16277188062667847, -0.14653638005256653],
]


@pytest.mark.parametrize("dim", [4, 8, 20, 64])
@pytest.mark.parametrize("data_type", [SparseType.INT8, SparseType.INT4, SparseType.INT2])
def test_quantised_as_fbgemm_does(data_type: SparseType, dim: int) -> None:
    dim = max(dim, 8) if data_type is SparseType.INT2 else dim
    dim = dim // 8 * 8 if data_type is SparseType.INT2 else dim
    rows = torch.randn(33, dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body, scale_bias = quantize_embs(rows, data_type)
    size = weight_bytes(dim, data_type)
    assert scale_bias is not None
    assert torch.equal(quantise(rows, data_type), torch.cat([scale_bias, body], dim=1)[:, :size])
    assert quantise(rows[:0], data_type).shape == (0, size)


def test_initial_rows_are_pinned() -> None:
    """Other values would change every table never trained; the format promises these."""
    got = initial_weights(RULE, "t", torch.tensor([0, 1, 2**33 + 1]), cols=2)
    assert got.tolist() == PINNED


def test_initial_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    ids = torch.arange(1000)
    whole = initial_weights(RULE, "t", ids, cols=16)
    assert torch.equal(whole[300:400, 4:8], initial_weights(RULE, "t", ids[300:400], col_offset=4, cols=4))
    assert torch.equal(whole[ids.flip(0)], initial_weights(RULE, "t", ids.flip(0), cols=16))
    for other in (
        initial_weights(RULE, "u", ids, cols=16),
        initial_weights(InitRule(seed=4, low=-0.25, high=0.5), "t", ids, cols=16),
        initial_weights(RULE, "t", ids + 2**32, cols=16),
    ):
        assert (other == whole).float().mean() < 0.001
    assert whole.min() >= -0.25 and whole.max() < 0.5 + 1e-6
    assert abs(float(whole.mean()) - 0.125) < 0.005 and abs(float(whole.std()) - 0.75 / 12**0.5) < 0.005
    assert abs(float(torch.corrcoef(whole.T).triu(1).abs().max())) < 0.15


@pytest.mark.gpu
def test_initial_rows_are_the_same_on_cuda() -> None:
    ids = torch.cat([torch.arange(100_000), torch.arange(2**40, 2**40 + 1000)])
    for data_type in (SparseType.FP32, SparseType.FP16):
        rule = InitRule(seed=3, low=-0.013, high=0.017, data_type=data_type)
        cuda = initial_weights(rule, "t", ids, cols=33, device=torch.device("cuda"))
        assert torch.equal(cuda.cpu(), initial_weights(rule, "t", ids, cols=33))


def test_initial_row_bytes_have_state_of_zero() -> None:
    table = TableSpec(name="t", rows=9, dim=4, state=(StateSpec(name="momentum1", per_row=True),), init=RULE)
    rows = initial_rows(TableShard.whole(table), torch.tensor([5]))
    assert rows.shape == (1, 20) and not rows[:, 16:].any()
    assert torch.equal(rows[:, :16].view(torch.float32), initial_weights(RULE, "t", torch.tensor([5]), cols=4))


def test_a_served_row_never_trained_is_the_trained_one_quantised() -> None:
    rule = InitRule(seed=1, low=-1.0, high=1.0, data_type=SparseType.FP16)
    served = TableSpec(name="t", rows=50, dim=8, data_type=SparseType.INT8, init=rule)
    ids = torch.arange(50)
    trained = initial_weights(rule, "t", ids, cols=8)
    assert trained.dtype == torch.float16
    assert torch.equal(initial_rows(TableShard.whole(served), ids), quantise(trained, SparseType.INT8))


def test_last_of_each() -> None:
    ids, places = last_of_each(torch.tensor([7, 3, 7, 7, 3, 9]))
    assert ids.tolist() == [3, 7, 9] and places.tolist() == [4, 3, 5]
    assert last_of_each(torch.empty(0, dtype=torch.int64))[0].numel() == 0


def test_rows_from_a_caller() -> None:
    table = TableSpec(name="t", rows=9, dim=8, data_type=SparseType.INT8)
    rows = torch.randn(3, 8)
    assert torch.equal(as_row_bytes(table, rows), quantise(rows, SparseType.INT8))
    padded = torch.zeros(3, 16, dtype=torch.uint8)
    padded[:, :12] = quantise(rows, SparseType.INT8)
    assert torch.equal(as_row_bytes(table, padded, (16,)), quantise(rows, SparseType.INT8))
    for wrong, said in (
        (rows[0], "2-D"),
        (torch.randn(3, 9), "8 wide, got 9"),
        (torch.full((1, 8), float("inf")), "finite"),
        (torch.full((1, 8), 1e6), "too large numbers"),
        (padded, "12 bytes wide, got 16"),
        (rows.to(torch.int32), "uint8"),
    ):
        with pytest.raises(InputError, match=said):
            as_row_bytes(table, wrong)
