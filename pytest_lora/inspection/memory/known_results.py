"""Results of operations on the meta device, remembered by the shapes of what they were given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_META = torch.device("meta")


class _UnknownError(Exception):
    """An argument that says nothing about the result's shape, or too much."""


class _Results(NamedTuple):
    """Shape, stride and dtype of each result, and whether they come as a tuple."""

    several: bool
    forms: tuple[tuple[Any, Any, torch.dtype], ...]


class KnownResults:
    """Makes the result of an operation that ran before on tensors of the same shapes, strides and dtypes.

    Many operations find out on the meta device in Python what shape they give, which takes longer than all
    else. Only those are remembered whose results have a storage of their own each, filled by it alone.

    Args:
        most: Results that are kept; then all are forgotten.
    """

    def __init__(self, most: int = 20_000) -> None:
        self._known: dict[Any, _Results] = {}
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
            made = [torch.empty_strided(*form, dtype=dtype, device=_META) for *form, dtype in known.forms]
            return tuple(made) if known.several else made[0]
        out = func(*args, **kwargs)
        several = type(out) is tuple
        results = out if several else (out,)
        if all(map(_is_of_its_own, results)) and _are_apart(results):
            if len(self._known) >= self._most:
                self._known.clear()
            forms = tuple((one.shape, one.stride(), one.dtype) for one in results)
            self._known[key] = _Results(several, forms)
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


def _are_apart(results: tuple[torch.Tensor, ...]) -> bool:
    """Whether each result has another storage."""
    return len({id(one.untyped_storage()) for one in results}) == len(results)
