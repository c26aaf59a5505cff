"""Rows as bytes: quantised like FBGEMM, and the rule for rows never written."""

from __future__ import annotations

import warnings

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_embedding_utils import quantize_embs
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.rows import as_row_bytes, initial_rows, initial_weights, last_of_each, quantise
from torchrec_turbossd.tables import (
    FP8_EXPONENT_BIAS,
    FP8_EXPONENT_BITS,
    FP8_LARGEST,
    InitRule,
    StateSpec,
    TableShard,
    TableSpec,
    weight_bytes,
)

RULE = InitRule(seed=3, low=-0.25, high=0.5)
PINNED = [
    [0.4330059885978699, 0.015535831451416016],
    [0.23081755638122559, 0.48400557041168213],
    [0.16277188062667847, -0.14653638005256653],
]


WIDTHS = {
    SparseType.FP8: (1, 4, 7, 8, 20, 64),
    SparseType.INT8: (1, 4, 7, 8, 20, 64),
    SparseType.INT4: (4, 8, 20, 64),
    SparseType.INT2: (8, 24, 64),
}


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(("data_type", "dim"), [(t, dim) for t, dims in WIDTHS.items() for dim in dims])
def test_quantised_as_fbgemm_does(data_type: SparseType, dim: int, rows: int) -> None:
    floats = torch.randn(rows, dim)
    # FBGEMM's converter cannot take odd widths. The last element once more changes neither scale nor bias.
    even = torch.cat([floats, floats[:, -1:].expand(rows, -dim % 4)], dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body, scale_bias = quantize_embs(even, data_type, SparseType.FP8.default_config())
    size = weight_bytes(dim, data_type)
    assert (scale_bias is None) == (data_type is SparseType.FP8)
    want = body if scale_bias is None else torch.cat([scale_bias, body], dim=1)
    assert torch.equal(quantise(floats, data_type), want[:, :size])
    table = TableSpec(name="t", rows=9, dim=dim, data_type=data_type)
    assert torch.equal(as_row_bytes(table, floats), want[:, :size])
    assert quantise(floats[:0], data_type).shape == (0, size)


def fp8_meaning() -> torch.Tensor:
    """The number that each byte means, [256] float32, as a stock module looks it up."""
    tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", 256, 4, SparseType.FP8, EmbeddingLocation.HOST)],
        output_dtype=SparseType.FP32,
        device="cpu",
        fp8_exponent_bits=FP8_EXPONENT_BITS,
        fp8_exponent_bias=FP8_EXPONENT_BIAS,
    )
    tbe.initialize_weights()
    every = torch.arange(256)
    tbe.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)[0][0].copy_(every[:, None].expand(256, 4))
    looked_up = tbe(every, torch.arange(257))
    assert (looked_up == looked_up[:, :1]).all()
    found: torch.Tensor = looked_up[:, 0]
    return found


def test_fp8_is_fbgemms_default() -> None:
    config = SparseType.FP8.default_config()
    wanted = [config.get(name) for name in ("exponent_bits", "exponent_bias", "max_position")]
    assert wanted == [FP8_EXPONENT_BITS, FP8_EXPONENT_BIAS, FP8_LARGEST]
    assert weight_bytes(7, SparseType.FP8) == 7, "no scale and no bias"


def test_fp8_bytes_mean_the_nearest_number() -> None:
    """Against the stock lookup of every byte: nearest, ties to the even mantissa, saturating, sign kept."""
    meaning = fp8_meaning()
    # Bytes 0 to 0x77 are the numbers from 0 to 240, in order.
    held = meaning[:0x78].double()
    assert (held.diff() > 0).all() and held[-1] == FP8_LARGEST and torch.equal(meaning[128:], -meaning[:128])
    assert torch.equal(quantise(meaning[:0x78, None], SparseType.FP8).flatten(), torch.arange(0x78, dtype=torch.uint8))
    halves = (held[1:] + held[:-1]) / 2
    near = torch.tensor([1 - 2**-20, 1.0, 1 + 2**-20], dtype=torch.float64)
    numbers = torch.cat([(halves[:, None] * near).flatten(), torch.rand(4000) * 250, torch.rand(4000) / 50]).float()
    distance = (numbers.double()[:, None] - held).abs()
    closest = distance == distance.min(dim=1, keepdim=True).values
    # An even byte has an even mantissa, and of two neighbours one is even.
    preferred = closest.double() + 0.5 * (closest & (torch.arange(0x78) % 2 == 0))
    want = preferred.argmax(dim=1)
    assert torch.equal(quantise(numbers[:, None], SparseType.FP8).flatten().long(), want)
    assert torch.equal(quantise(-numbers[:, None], SparseType.FP8).flatten().long(), want + 128)
    beyond = torch.tensor([[247.0, 1e30, -1e30, -300.0]])
    assert meaning[quantise(beyond, SparseType.FP8).long()].tolist() == [[240.0, 240.0, -240.0, -240.0]]


def test_fp8_rows_from_a_caller() -> None:
    table = TableSpec(name="t", rows=9, dim=3, data_type=SparseType.FP8)
    assert table.row_bytes == 3
    rows = torch.tensor([[1.0, -0.5, 1e6]], dtype=torch.float64)
    assert fp8_meaning()[as_row_bytes(table, rows).long()].tolist() == [[1.0, -0.5, 240.0]]
    for wrong in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InputError, match="finite as fp8"):
            as_row_bytes(table, torch.tensor([[1.0, wrong, 1.0]]))
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)
    assert torch.equal(as_row_bytes(table, every, (16,)), every[:, :3]), "every byte is a number"
    assert not initial_rows(TableShard.whole(table), torch.arange(9)).any()


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
