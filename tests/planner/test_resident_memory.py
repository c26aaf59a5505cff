"""What is planned is what a process really takes, within 2 %: resident memory on a CPU machine, HBM on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.planner.models import MB, Model, planner, topology
from tests.ranks import run_ranks
from torchrec_turbossd.planner import describe_plan
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.serving.sizing import CPU_ALIGNMENT, GIB, fast_bytes
from torchrec_turbossd.sharding import get_turbo_ssd_sharders
from torchrec_turbossd.sizing.memory import shard_host_bytes, store_bytes
from torchrec_turbossd.store import RocksOptions, RocksRowStore
from torchrec_turbossd.tables import specs_from

BATCH = 8192
WITHIN = 0.02
Measure = Callable[[], int]


@dataclass
class Taken:
    """Bytes. planned: of slots, slot map and bookkeeping. measured: growth once every slot and row was touched."""

    planned: int
    measured: int


def resident() -> int:
    """Bytes of this process in memory, without what the allocator holds for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024


def allocated() -> int:
    """Bytes of tensors on the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


def meter(device: str) -> Measure:
    return allocated if device == "cuda" else resident


def shard(device: str, rows: int, fast: int, directory: Path) -> tuple[DistributedModelParallel, int]:
    """A table of `rows` in slots that fill `fast` bytes, and the bytes planned."""
    model = Model(("t", rows, 64))
    sharders = get_turbo_ssd_sharders(directory, {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    constraints = {"t": ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["key_value"])}
    made = planner(topology(device, 1, fast=fast), BATCH, constraints)
    plan = made.plan(model, sharders)
    dmp = DistributedModelParallel(model, device=torch.device(device), plan=plan, sharders=sharders)
    (row,) = describe_plan(plan, model, sharders)
    on_host = row.host_bytes if device == "cpu" else 0
    return dmp, (row.fast_bytes or 0) + on_host


def look_up(model: DistributedModelParallel, device: str, ids: torch.Tensor) -> torch.Tensor:
    features = KeyedJaggedTensor(keys=["f_t"], values=ids, lengths=torch.ones(ids.numel(), dtype=torch.int64))
    out: torch.Tensor = model.module.ebc(features.to(torch.device(device))).values()
    return out


def exercise(model: DistributedModelParallel, device: str, ids: torch.Tensor) -> None:
    """Bring every row into a slot once, most of them over others, and train the last ones."""
    parts = ids.split(BATCH)
    with torch.no_grad():
        for part in parts:
            look_up(model, device, part)
    for part in parts[-3:]:
        look_up(model, device, part).sum().backward()
    # Reads are noted aside until slots are wanted again.
    with torch.no_grad():
        look_up(model, device, parts[0])


def train(rank: int, world: int, device: str, rows: int, fast: int, directory: Path) -> dict[str, int]:
    measure = meter(device)
    generator = torch.Generator().manual_seed(7)
    # Threads, libraries and the first pages of everything are there before the first measure.
    small, _ = shard(device, 50_000, 10 * MB, directory / "small")
    exercise(small, device, torch.randperm(50_000, generator=generator))
    small.module.ebc.close()
    del small
    ids = torch.randperm(rows, generator=generator)
    before = measure()
    model, planned = shard(device, rows, fast, directory / "large")
    exercise(model, device, ids)
    taken = Taken(planned=planned, measured=measure() - before)
    model.module.ebc.close()
    return asdict(taken)


def serve(rank: int, world: int, device: str, rows: int, budget: int, directory: Path) -> dict[str, int]:
    measure = meter(device)
    ids = torch.randperm(rows, generator=torch.Generator().manual_seed(7)).to(device)
    opened(device, 30_000, 5 * MB, directory / "small", ids[ids < 30_000])[0].close()
    before = measure()
    module, planned = opened(device, rows, budget, directory / "large", ids)
    taken = Taken(planned=planned, measured=measure() - before)
    module.close()
    return asdict(taken)


def opened(
    device: str, rows: int, budget: int, directory: Path, ids: torch.Tensor
) -> tuple[TurboSSDInferenceModule, int]:
    """A serving module that was asked for every row, and the bytes planned; without a budget by its estimate."""
    specs: list[Any] = [("t", rows, 128, SparseType.INT8)]
    rate = 1.0 if budget else 0.9
    module = TurboSSDInferenceModule.from_embedding_specs(specs, directory, budget / GIB, rate, device=device)
    for part in ids.split(BATCH):
        module(part, torch.arange(part.numel() + 1, device=device))
    if not budget:
        return module, int(TurboSSDInferenceModule.estimate_hbm_gb(specs) * GIB)
    slots = [module.slots["t"]]
    planned = fast_bytes(specs_from(specs), slots, CPU_ALIGNMENT) + shard_host_bytes(rows, 132)
    return module, planned


def store(rank: int, world: int, device: str, rows: int, size: int, directory: Path) -> dict[str, int]:
    """The most that a row store of `rows` takes while they are written and read, beside rows on their way."""
    options = RocksOptions(
        write_buffer_bytes=size,
        max_write_buffers=2,
        total_write_buffer_bytes=2 * size,
        block_cache_bytes=size,
        hash_write_buffers=True,
    )
    written = RocksRowStore(directory / "store", {"t": 260}, wal=False, options=options)
    before, most, generator = resident(), 0, torch.Generator().manual_seed(7)
    for number, ids in enumerate(torch.randperm(rows, generator=generator).split(BATCH)):
        written.write({"t": (ids, torch.zeros(ids.numel(), 260, dtype=torch.uint8))})
        written.read("t", ids[:512])
        most = max(most, resident() - before) if number % 4 == 3 else most
    written.close()
    return asdict(Taken(planned=store_bytes(1, rows, options, pending_bytes=0), measured=most))


def run(function: Callable[..., dict[str, int]], device: str, rows: int, size: int, directory: Path) -> Taken:
    """In a process of its own."""
    backend = "nccl" if device == "cuda" else "gloo"
    (found,) = run_ranks(1, function, device, rows, size, directory, backend=backend)
    taken = Taken(**found)
    print(f"{function.__name__} on {device}: {taken}, measured / planned {taken.measured / taken.planned:.4f}")
    return taken


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.slow
@DEVICES
def test_training_takes_what_is_planned(device: str, tmp_path: Path) -> None:
    taken = run(train, device, 1_300_000, 300 * MB, tmp_path)
    assert taken.planned > 290 * MB
    assert taken.measured == pytest.approx(taken.planned, rel=WITHIN)


@pytest.mark.slow
def test_serving_takes_what_is_planned(tmp_path: Path) -> None:
    taken = run(serve, "cpu", 2_000_000, 240 * MB, tmp_path)
    assert taken.planned > 235 * MB
    assert taken.measured == pytest.approx(taken.planned, rel=WITHIN)


@pytest.mark.gpu
@pytest.mark.slow
def test_serving_takes_the_hbm_that_is_estimated(tmp_path: Path) -> None:
    taken = run(serve, "cuda", 8_000_000, 0, tmp_path)
    assert taken.planned > 100 * MB
    assert taken.measured == pytest.approx(taken.planned, rel=WITHIN)


@pytest.mark.slow
def test_a_store_takes_at_most_what_is_reported(tmp_path: Path) -> None:
    taken = run(store, "cpu", 250_000, 16 << 20, tmp_path)
    assert taken.planned / 2 < taken.measured < taken.planned * 1.125
