"""Copies of rows on SSD that stand where PyTorch would give a view, and say so when they are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchrec_turbossd.errors import InputError

_HARMLESS = frozenset({"requires_grad_", "share_memory_"})


class RowCopy(Tensor):
    """A copy that raises `InputError` when it, or a view of it, is written in place: the rows would not change."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
        if isinstance(kwargs.get("out"), RowCopy) or (in_place and args and isinstance(args[0], RowCopy)):
            raise InputError(
                f"{name} would write to a copy of rows on SSD, and be lost; write rows with "
                "tensor[first:stop].copy_(values) on the state dict's own tensor"
            )
        with torch._C.DisableTorchFunctionSubclass():
            held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, RowCopy)}

            def kind(made: Tensor) -> Tensor:
                is_view = made.untyped_storage().data_ptr() in held
                return made.as_subclass(RowCopy if is_view else Tensor)

            return tree_map_only(Tensor, kind, func(*args, **kwargs))


def as_copy(rows: Tensor) -> Tensor:
    """`rows`, a tensor of its own, as a `RowCopy`."""
    return rows.as_subclass(RowCopy)


__all__ = ["RowCopy", "as_copy"]
