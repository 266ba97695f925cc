"""Results of operations on the meta device, remembered by the shapes of what they were given."""

from __future__ import annotations

from typing import Any

import torch

_META = torch.device("meta")


class _UnknownError(Exception):
    """An argument that says nothing about the result's shape, or too much."""


class KnownResults:
    """Makes the result of an operation that ran before on tensors of the same shapes, strides and dtypes.

    Many operations find out on the meta device in Python what shape they give, which takes longer than all
    else. Only those are remembered whose one result has a storage of its own, filled by it alone.

    Args:
        most: Results that are kept; then all are forgotten.
    """

    def __init__(self, most: int = 20_000) -> None:
        self._known: dict[Any, tuple[Any, Any, torch.dtype]] = {}
        self._most = most

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result, computed where it is not known."""
        if not _makes_new(func):
            return func(*args, **kwargs)
        try:
            # By its id, as torch computes an operation's hash in Python; it stays, as `_makes_new` keeps it.
            named = _described(tuple(kwargs.items())) if kwargs else ()
            key = (id(func), torch.get_default_dtype(), _described(args), named)
            known = self._known.get(key)
        except (_UnknownError, TypeError):
            return func(*args, **kwargs)
        if known is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device=_META)
        out = func(*args, **kwargs)
        if _is_of_its_own(out):
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[key] = (out.shape, out.stride(), out.dtype)
        return out


def _described(value: Any) -> Any:
    """What decides the result's shape, of an argument or several; 1, 1.0 and True are not the same."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise _UnknownError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_described(part) for part in value])
    return type(value), value


_MAKES_NEW: dict[int, tuple[Any, bool]] = {}


def _makes_new(func: Any) -> bool:
    """Whether an operation gives neither views nor what it was given, changed in place."""
    known = _MAKES_NEW.get(id(func))
    if known is None:
        known = _MAKES_NEW[id(func)] = func, _is_fresh(func)
    return known[1]


def _is_fresh(func: Any) -> bool:
    schema = func._schema
    aliases = any(part.alias_info is not None for part in (*schema.arguments, *schema.returns))
    return not aliases and func is not torch.ops.aten._unsafe_view.default


def _is_of_its_own(out: Any) -> bool:
    """Whether a result is one tensor with no larger storage behind it."""
    if type(out) is not torch.Tensor or out.device != _META or out.storage_offset() or not out.numel():
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))
    return bool(out.untyped_storage().nbytes() == extent * out.element_size())
