"""Which CUDA stream this thread works on, asked often."""

from __future__ import annotations

from collections.abc import Callable

import torch

_raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class CurrentStream:
    """The current stream of a device, whose object is made when it is another than the last one.

    To make it takes longer than to launch a kernel.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._known: dict[int, torch.cuda.Stream] = {}

    def handle(self) -> int:
        """Its `cudaStream_t`."""
        return int(torch.cuda.current_stream(self._index).cuda_stream) if _raw is None else _raw(self._index)

    def __call__(self) -> torch.cuda.Stream:
        if _raw is None:
            return torch.cuda.current_stream(self._index)
        handle = _raw(self._index)
        stream = self._known.get(handle)
        if stream is None:
            stream = self._known[handle] = torch.cuda.current_stream(self._index)
        return stream


__all__ = ["CurrentStream"]
