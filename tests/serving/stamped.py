"""Rows that say what they are, in a module whose tables do not fit in slots."""

from __future__ import annotations

from pathlib import Path

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_turbossd.rows import quantise
from torchrec_turbossd.serving import TurboSSDInferenceModule

TYPES = {"first": SparseType.FP32, "second": SparseType.INT8, "fixed": SparseType.FP16}
ROWS = {"first": 3008, "second": 2000, "fixed": 1500}
"""More rows than slots. In the stress test `fixed` is changed by snapshots alone."""
DIM, MEMBERS = 8, 16
GROUPS = {name: ROWS[name] // MEMBERS for name in ("first", "second")}

Group = tuple[str, int]
"""Rows of a table that are always written together: (table, number)."""


def rows_of(ids: Tensor, generation: int | Tensor, update: int | Tensor) -> Tensor:
    """Rows that say what they are: the snapshot that they came with or the update, and their id.

    Digits of base 256 beside a 0 and a 255: then INT8 rows too are exact, with scale 1 and bias 0.
    """
    digits = [0, 255, generation, update & 255, update >> 8 & 255, update >> 16, ids & 255, ids >> 8]
    return torch.stack([torch.as_tensor(d).expand(ids.numel()) for d in digits], dim=1).float()


def members(group: Group) -> Tensor:
    """Ids of a group, far from each other."""
    name, number = group
    return torch.arange(number, ROWS[name], GROUPS[name])


def opened(directory: Path, device: str = "cpu") -> TurboSSDInferenceModule:
    specs = [(name, ROWS[name], DIM, data_type) for name, data_type in TYPES.items()]
    return TurboSSDInferenceModule.from_embedding_specs(
        specs,
        directory,
        cache_hit_rate=0.01,
        pooling_mode=PoolingMode.NONE,
        ssd_shards=2,
        name="m",
        output_dtype=SparseType.FP32,
        device=device,
    )


def write(module: TurboSSDInferenceModule, ids: dict[str, Tensor], generation: int, update: int) -> None:
    """Rows of one table as floats, of several in one call as bytes by linear id."""
    if len(ids) == 1:
        ((name, only),) = ids.items()
        module.streaming_update(only, rows_of(only, generation, update), name)
        return
    linear, rows, base = [], [], 0
    for name, count in ROWS.items():
        if name in ids:
            linear.append(ids[name] + base)
            row_bytes = quantise(rows_of(ids[name], generation, update), TYPES[name])
            rows.append(torch.nn.functional.pad(row_bytes, (0, module.max_D_cache - row_bytes.shape[1])))
        base += count
    module.streaming_update(torch.cat(linear), torch.cat(rows))


def write_all(module: TurboSSDInferenceModule, generation: int) -> None:
    write(module, {name: torch.arange(rows) for name, rows in ROWS.items()}, generation, 0)


def look(module: TurboSSDInferenceModule, ids: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """One lookup. For each table the (generation, update) [N] of its rows, after checking that they are these rows."""
    parts = [ids[name] for name in ROWS]
    sizes = [part.numel() for part in parts]
    device = module.tbe.device
    out = module(torch.cat(parts).to(device), torch.tensor([0, *sizes]).cumsum(0).to(device)).cpu()
    found = {}
    for name, part, rows in zip(ROWS, parts, out.split(sizes), strict=True):
        digits = rows.long()
        generation, update = digits[:, 2], digits[:, 3] + (digits[:, 4] << 8) + (digits[:, 5] << 16)
        assert torch.equal(rows, rows_of(part, generation, update)), f"table {name}: not these rows: {rows.tolist()}"
        found[name] = generation, update
    return found


def look_at_groups(
    module: TurboSSDInferenceModule, chosen: dict[str, list[int]], fixed: Tensor
) -> tuple[dict[Group, tuple[int, int]], tuple[Tensor, Tensor]]:
    """One lookup of whole groups and some rows of `fixed`: (generation, update) of each, [N] of those rows."""
    none = torch.empty(0, dtype=torch.int64)
    ids = {name: torch.cat([none, *(members((name, g)) for g in chosen[name])]) for name in GROUPS}
    found = look(module, ids | {"fixed": fixed})
    groups: dict[Group, tuple[int, int]] = {}
    for name in GROUPS:
        stamps = torch.stack(found[name], dim=1).view(-1, MEMBERS, 2)
        assert bool((stamps == stamps[:, :1]).all()), f"half of an update in table {name}: {stamps.tolist()}"
        for group, (generation, update) in zip(chosen[name], stamps[:, 0].tolist(), strict=True):
            groups[name, group] = generation, update
    return groups, found["fixed"]


def look_at_all(module: TurboSSDInferenceModule) -> dict[Group, tuple[int, int]]:
    """(generation, update) of every group."""
    return look_at_groups(module, {n: list(range(GROUPS[n])) for n in GROUPS}, torch.arange(ROWS["fixed"]))[0]
