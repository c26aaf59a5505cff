"""Rows on SSD as a tensor that reads and writes them a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchrec_turbossd.errors import InputError
from torchrec_turbossd.sharding.row_columns import RowColumns
from torchrec_turbossd.sharding.row_copy import as_copy
from torchrec_turbossd.sharding.windows import check_memory, window_rows, windows

_aten = torch.ops.aten


class LazyRows(Tensor):
    """Rows `rows` and columns `cols` (ranges; default: all) of `columns`, on the CPU.

    Slices along rows or columns, `detach` and `copy_` into it or out of it stay lazy; rows picked by index are read
    alone; operators in place that treat each number by itself (`zero_`, `mul_`, `uniform_`, ...) go window by window;
    any other operator reads all that it is given. What is read does not follow later training, and what would be a view
    of a tensor is a copy that refuses to be written. Other operators in place raise `InputError`. Reading more than the
    memory that is free raises `BudgetError`.
    """

    _columns: RowColumns
    _rows: range
    _cols: range

    @staticmethod
    def __new__(cls, columns: RowColumns, rows: range | None = None, cols: range | None = None) -> LazyRows:
        rows = range(columns.rows) if rows is None else rows
        cols = range(*columns.row_shape or (1,)) if cols is None else cols
        made: LazyRows = torch.Tensor._make_wrapper_subclass(
            cls,
            [len(rows), len(cols)] if columns.row_shape else [len(rows)],
            dtype=columns.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        made._columns, made._rows, made._cols = columns, rows, cols
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyRows({self._what()}, {tuple(self.shape)})"

    def _what(self) -> str:
        return f"rows {self._rows.start} to {self._rows.stop - 1} of the shard's {self._columns.name}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        # A copy must keep what the rows are now.
        return memo.setdefault(id(self), self.materialise())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)

    def __setitem__(self, index: Any, value: Any) -> None:
        # PyTorch would write a row, or every other row, to a copy of it.
        if isinstance(index, int):
            row = range(self.shape[0])[index]
            index = slice(row, row + 1)
        if not isinstance(index, slice) or index.step not in (None, 1):
            raise InputError(_refusal(f"[{index!r}] = ..."))
        target = self[index]
        whole = torch.as_tensor(value, dtype=self.dtype).expand(target.shape)
        target.copy_(whole.clone(memory_format=torch.contiguous_format))

    def materialise(self) -> Tensor:
        """The rows as a plain tensor, all of them in memory; raises `BudgetError` when they do not fit."""
        check_memory(self.numel() * self.element_size(), self._what())
        return self._columns.read(self._rows, self._cols)

    def same_rows(self, other: Any) -> bool:
        """Whether `other` is the very same rows and columns."""
        if not isinstance(other, LazyRows) or (self._rows, self._cols) != (other._rows, other._cols):
            return False
        mine, theirs = self._columns, other._columns
        return mine.source == theirs.source and mine.part == theirs.part

    @property
    def window_rows(self) -> int:
        """Rows in one window."""
        return window_rows(self.element_size() * len(self._cols))

    def window(self, first: int, count: int) -> LazyRows:
        """`count` of its rows from `first` on, lazily."""
        return LazyRows(self._columns, self._rows[first : first + count], self._cols)

    def _pick(self, index: Tensor) -> Tensor:
        """The rows at places `index` [N], each read alone."""
        count = len(self._rows)
        places = torch.where(index < 0, index + count, index).cpu().to(torch.int64)
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < count:
            raise IndexError(f"index out of range for {count} rows")
        distinct, back = torch.unique(places, return_inverse=True)
        return self._columns.read(distinct + self._rows.start, self._cols)[back]

    def _write(self, values: Callable[[int, int], Tensor]) -> None:
        self._columns.write(self._rows.start, self._cols, values, len(self._rows))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        made = handler(*args, **kwargs) if handler is not None else NotImplemented
        if made is not NotImplemented:
            return made
        if any(_is_lazy(value) for value in _written(func, args, kwargs)):
            return _in_place(func, args, kwargs)
        plain = tree_map_only(LazyRows, LazyRows.materialise, (args, kwargs))
        made = func(*plain[0], **plain[1])
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        return tree_map_only(Tensor, as_copy, made) if is_view else made


def _is_lazy(value: Any) -> bool:
    return isinstance(value, LazyRows) or (isinstance(value, list | tuple) and any(map(_is_lazy, value)))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


def _in_place(func: Any, args: Any, kwargs: Any) -> LazyRows:
    name = func._schema.name.removeprefix("aten::")
    if name not in _BY_NUMBER or not isinstance(args[0], LazyRows):
        raise InputError(_refusal(name))
    return _in_windows(func, args[0], args, kwargs)


def _refusal(what: str) -> str:
    return (
        f"{what} cannot write rows on SSD in place; read rows with a slice, and write them with "
        "tensor[first:stop].copy_(values)"
    )


def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if isinstance(target, LazyRows):
        if target.same_rows(source):
            return target
        if source.shape != target.shape:
            source = (source.materialise() if isinstance(source, LazyRows) else source).expand(target.shape)
        target._write(lambda first, count: _plain(source, first, count))
    elif source.shape != target.shape:
        return NotImplemented
    else:
        for first, count in windows(source.shape[0], source.window_rows):
            target[first : first + count].copy_(_plain(source, first, count), non_blocking)
    return target


def _plain(values: Tensor, first: int, count: int) -> Tensor:
    """Some rows of a tensor, lazy or not, in memory."""
    return values.window(first, count).materialise() if isinstance(values, LazyRows) else values[first : first + count]


def _same(rows: LazyRows) -> LazyRows:
    return rows.window(0, len(rows._rows))


def _slice(rows: LazyRows, dim: int = 0, first: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    if step != 1:
        return NotImplemented
    if dim % rows.dim() == 0:
        return LazyRows(rows._columns, rows._rows[first:stop], rows._cols)
    return LazyRows(rows._columns, rows._rows, rows._cols[first:stop])


def _select(rows: LazyRows, dim: int, index: int) -> Any:
    return as_copy(rows._pick(torch.tensor([index]))[0]) if dim % rows.dim() == 0 else NotImplemented


def _index(rows: Any, indices: Sequence[Tensor | None]) -> Any:
    whole = len(indices) == 1 and indices[0] is not None and not isinstance(indices[0], LazyRows)
    if not whole or not isinstance(rows, LazyRows) or indices[0].dtype not in (torch.int32, torch.int64):  # type: ignore[union-attr]
        return NotImplemented
    index: Tensor = indices[0]  # type: ignore[assignment]
    return rows._pick(index.flatten()).view(*index.shape, *rows.shape[1:])


def _index_select(rows: Any, dim: int, index: Tensor) -> Any:
    lazy = isinstance(rows, LazyRows) and dim % rows.dim() == 0 and not isinstance(index, LazyRows)
    return rows._pick(index) if lazy else NotImplemented


def _view(rows: LazyRows, shape: Sequence[int]) -> Any:
    wanted = list(shape)
    keeps = wanted == list(rows.shape) or wanted == [-1, *rows.shape[1:]]
    return _same(rows) if keeps else NotImplemented


def _as_strided(rows: LazyRows, *args: Any) -> Any:
    raise InputError(_refusal("as_strided"))


def _clone(rows: LazyRows, *, memory_format: Any = None) -> Tensor:
    return rows.materialise()


def _is_pinned(rows: LazyRows, device: Any = None) -> bool:
    return False


def _resize(rows: LazyRows, size: Sequence[int], *, memory_format: Any = None) -> LazyRows:
    if list(size) != list(rows.shape):
        raise InputError(f"{rows._what()} cannot change shape from {tuple(rows.shape)} to {tuple(size)}")
    return rows


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.copy_.default: _copy,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.view.default: _view,
    _aten.as_strided.default: _as_strided,
    _aten.clone.default: _clone,
    _aten.is_pinned.default: _is_pinned,
    _aten.resize_.default: _resize,
}
"""Operators that do not read every row, called with the operator's own arguments; `NotImplemented` reads them all."""


_BY_NUMBER = frozenset({
    "abs_", "add_", "addcdiv_", "addcmul_", "bernoulli_", "clamp_", "clamp_max_", "clamp_min_", "div_", "exp_", "fill_",
    "lerp_", "log_", "masked_fill_", "mul_", "nan_to_num_", "neg_", "normal_", "pow_", "random_", "reciprocal_",
    "sqrt_", "square_", "sub_", "uniform_", "zero_",
})  # fmt: skip
"""Operators in place that treat each number by itself, so that windows change nothing."""


def _in_windows(func: Any, target: LazyRows, args: Any, kwargs: Any) -> LazyRows:
    """An operator in place, a window at a time."""

    def values(first: int, count: int) -> Tensor:
        def part(value: Tensor) -> Tensor:
            by_row = value.dim() == target.dim() and value.shape[0] == target.shape[0]
            if by_row:
                return _plain(value, first, count)
            return value.materialise() if isinstance(value, LazyRows) else value

        made = _plain(target, first, count)
        rest, named = tree_map_only(Tensor, part, (args[1:], kwargs))
        func(made, *rest, **named)
        return made

    target._write(values)
    return target


__all__ = ["LazyRows"]
