"""Host memory that a GPU reads and writes in place, of just the bytes that were asked for."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor


def host_rows(rows: int, row_bytes: int, device: torch.device) -> Tensor:
    """Uninitialised rows [rows, row_bytes] uint8 in host memory, pinned where `device` is a GPU.

    PyTorch's own pinned memory comes in powers of two, up to twice what was asked for.

    Raises:
        MemoryError: there is not so much, or it cannot be pinned.
    """
    size = rows * row_bytes
    if device.type == "cpu" or not size:
        return torch.empty(rows, row_bytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {size:,} bytes of host memory: {error}") from error
    # A forked process would have them copied on the next write, and the GPU would go on with the old pages.
    memory.madvise(mmap.MADV_DONTFORK)
    held = np.frombuffer(memory, dtype=np.uint8)
    address = held.ctypes.data
    # Registering needs a context, which is made by the first use of the device.
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        failed = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if failed:
        raise MemoryError(f"cannot allocate pinned memory: {size:,} bytes of host memory, CUDA error {failed}")
    table = torch.from_numpy(held).view(rows, row_bytes)
    weakref.finalize(held, _unregister, address, memory).atexit = False
    return table


def _unregister(address: int, memory: mmap.mmap) -> None:
    """`memory` is held by the call, so that its pages are still there."""
    torch.cuda.cudart().cudaHostUnregister(address)


__all__ = ["host_rows"]
