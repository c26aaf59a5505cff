"""Rows as bytes: quantising float rows, and the value of rows never written.

The value of a row never written is a function of (seed, table, global row, global column) alone, made of integer
operations and two correctly rounded float32 ones, so that it is bit-equal on CPU and CUDA, under any sharding.
"""

from __future__ import annotations

import hashlib

import fbgemm_gpu  # noqa: F401 (registers the quantising operators)
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.tables import (
    FP8_EXPONENT_BIAS,
    FP8_EXPONENT_BITS,
    FP8_LARGEST,
    TRAINING_TYPES,
    InitRule,
    TableShard,
    TableSpec,
    weight_bytes,
)

_MASK32 = 0xFFFFFFFF
_BLOCK = 32768
"""Numbers computed at once on a CPU: few enough to stay in its cache, and for PyTorch not to wake a team of threads."""


def table_key(seed: int, name: str) -> int:
    """A 32-bit key of (seed, table name): the first four bytes of a BLAKE2b digest."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _mix(x: Tensor) -> Tensor:
    """A 32-bit avalanche in int64 lanes, so that no product overflows: the "lowbias32" constants of C. Wellons'
    hash-prospector (public domain, 2018)."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)


def initial_weights(
    rule: InitRule, name: str, row_ids: Tensor, *, col_offset: int = 0, cols: int, device: torch.device | None = None
) -> Tensor:
    """Weights of rows never written: [N, cols] of the rule's data type.

    Args:
        rule: seed and range.
        name: the table's name.
        row_ids: [N] int64, global row ids.
        col_offset: first global column.
        cols: columns to return.
        device: where to compute; default: that of `row_ids`.
    """
    device = device or row_ids.device
    dtype = TRAINING_TYPES[rule.data_type]
    if rule.is_zero:
        return torch.zeros(row_ids.numel(), cols, dtype=dtype, device=device)
    ids = row_ids.to(device=device, dtype=torch.int64)
    if device.type != "cpu" or ids.numel() * cols <= _BLOCK:
        return _hashed(rule, name, ids, col_offset, cols)
    blocks = ids.split(max(1, _BLOCK // cols))
    return torch.cat([_hashed(rule, name, block, col_offset, cols) for block in blocks])


def _hashed(rule: InitRule, name: str, ids: Tensor, col_offset: int, cols: int) -> Tensor:
    device, dtype = ids.device, TRAINING_TYPES[rule.data_type]
    # The two halves of the id are mixed in turn, so that ids 2**32 apart differ.
    row = _mix((ids & _MASK32) ^ table_key(rule.seed, name))
    row = _mix(row ^ ((ids >> 32) & _MASK32) ^ 0x9E3779B9)
    col = _mix(torch.arange(col_offset, col_offset + cols, dtype=torch.int64, device=device) + 0x7F4A7C15)
    bits = _mix(row[:, None] ^ col[None, :]) >> 8
    # 24 bits fit a float32 exactly; mul and add stay separate ops, so that no device fuses them into one rounding.
    unit = bits.to(torch.float32) * (1.0 / (1 << 24))
    scaled = unit * torch.tensor(rule.high - rule.low, dtype=torch.float32, device=device)
    return (scaled + torch.tensor(rule.low, dtype=torch.float32, device=device)).to(dtype)


def quantise(weights: Tensor, data_type: SparseType) -> Tensor:
    """Float rows [N, D] to [N, row bytes] uint8 in FBGEMM's inference layout (scale and bias first), on the CPU.

    By FBGEMM's own operators, so that bytes equal those of its converter. FP8 has no scale: each element becomes the
    nearest number that a byte can mean, of two equally near ones that with an even mantissa, and what lies beyond 240
    becomes 240.
    """
    weights = weights.detach().cpu().contiguous()
    if data_type in TRAINING_TYPES:
        return weights.to(TRAINING_TYPES[data_type]).contiguous().view(torch.uint8)
    size = weight_bytes(weights.shape[1], data_type)
    if weights.shape[0] == 0:
        return torch.empty(0, size, dtype=torch.uint8)
    if data_type is SparseType.FP8:
        body: Tensor = torch.ops.fbgemm.FloatToHFP8Quantized(
            weights.float(), FP8_EXPONENT_BITS, FP8_EXPONENT_BIAS, FP8_LARGEST
        )
        return body
    if data_type is SparseType.INT8:
        fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weights.float())
        # The op gives scale and bias in float32; the inference layout has them in float16.
        body, scale_bias = fused[:, :-8], _packed(fused[:, -8:]).view(torch.float32).half().view(torch.uint8)
    else:
        fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weights.float(), data_type.bit_rate())
        body, scale_bias = fused[:, :-4], fused[:, -4:]
    # The ops pad the body of odd widths; the layout does not.
    return torch.cat([scale_bias, body[:, : size - scale_bias.shape[1]]], dim=1).contiguous()


def initial_rows(shard: TableShard, row_ids: Tensor) -> Tensor:
    """Bytes of rows never written of a shard: [N, row_bytes] uint8 on the CPU; state starts at zero.

    `row_ids` are global. A serving table's value is the rule's, rounded to the trained type, then quantised; a
    quantised table is never column-sharded, because scale and bias belong to a whole row.
    """
    table, n = shard.table, row_ids.numel()
    out = torch.zeros(n, shard.row_bytes, dtype=torch.uint8)
    if table.init.is_zero and table.data_type in TRAINING_TYPES:
        return out
    weights = initial_weights(table.init, table.name, row_ids.cpu(), col_offset=shard.col_offset, cols=shard.cols)
    body = quantise(weights, table.data_type)
    out[:, : body.shape[1]] = body
    return out


def _floats_in(rows: Tensor, data_type: SparseType) -> Tensor:
    """The floating numbers of row bytes that may fail to be finite: all of them, or scale and bias; none of FP8."""
    if data_type in TRAINING_TYPES:
        return rows.view(TRAINING_TYPES[data_type])
    if data_type is SparseType.FP8:
        return rows[:, :0]
    return _packed(rows[:, :4]).view(torch.float16)


def _packed(rows: Tensor) -> Tensor:
    """A copy that can be viewed as wider numbers: `contiguous` copies no single row, wherever that lies."""
    return rows.clone(memory_format=torch.contiguous_format)


def as_row_bytes(table: TableSpec, weights: Tensor, widths: tuple[int, ...] = ()) -> Tensor:
    """Rows given by a caller to [N, row weights bytes] uint8: float [N, dim] are quantised, uint8 are cut to width.

    Args:
        table: whose rows these are.
        weights: [N, dim] floating, or [N, W] uint8 with W the row's own width or one of `widths`.
        widths: other accepted widths of uint8 rows, whose tail is ignored.

    Raises:
        InputError: wrong rank, dtype or width, or float rows that are not finite.
    """
    size = weight_bytes(table.dim, table.data_type)
    if weights.dim() != 2:
        raise InputError(f"table {table.name!r}: weights must be 2-D [N, width], got shape {tuple(weights.shape)}")
    if weights.is_floating_point():
        if weights.shape[1] != table.dim:
            raise InputError(f"table {table.name!r}: float rows must be {table.dim} wide, got {weights.shape[1]}")
        rows = quantise(weights, table.data_type)
        # Finite numbers too may lie beyond float16, in which FP16 rows and every quantised scale and bias are.
        for numbers in (weights, _floats_in(rows, table.data_type)):
            if not bool(torch.isfinite(numbers).all()):
                raise InputError(
                    f"table {table.name!r}: rows must be finite as {table.data_type}, got NaN, infinity or too large "
                    "numbers"
                )
        return rows
    if weights.dtype != torch.uint8:
        raise InputError(f"table {table.name!r}: weights must be floating rows or uint8 row bytes, got {weights.dtype}")
    accepted = (size, *widths)
    if weights.shape[1] not in accepted:
        raise InputError(
            f"table {table.name!r}: uint8 rows must be {' or '.join(map(str, sorted(set(accepted))))} bytes wide, "
            f"got {weights.shape[1]}"
        )
    return weights[:, :size].detach().cpu().contiguous()


def last_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct `ids` [N], ascending, and for each the place of its last occurrence: ([M] int64, [M] int64)."""
    distinct, place = torch.unique(ids, return_inverse=True)
    order = torch.arange(ids.numel(), device=ids.device)
    last = torch.zeros(distinct.numel(), dtype=torch.int64, device=ids.device)
    return distinct, last.scatter_reduce_(0, place, order, "amax", include_self=False)


__all__ = ["as_row_bytes", "initial_rows", "initial_weights", "last_of_each", "quantise", "table_key"]
