"""What operations answer on the meta device: known results, and what stands in where values would be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from pytest_lora.inspection.quiet import alone

_aten = torch.ops.aten
_PACKED_SCALES = 7
"""Place of ``absmax_8bit`` among the arguments of bitsandbytes' ``gemm_4bit``, given with double quantization."""

_META = torch.device("meta")


class StandIns:
    """Answers for tensors on the meta device.

    - ``all()`` of a mask is true unless the batch is padded, ``any()`` is false: nothing is infinite or packed.
    - A mask selects everything, where it is asked for what it selects; neighbours that are counted are all equal.
    - Experts get equal shares of the tokens; in float32 they multiply as in bfloat16, which the meta kernel asks for.

    Args:
        padded: Whether batches hold padding.
        experts: Experts of a mixture, if the model is one.
        images: Images in each sequence, which is what a model counts when it asks the host for whole numbers.
        logs: Whether a trainer asks for numbers to write them down; they are 0.
    """

    def __init__(self, *, padded: bool, experts: int | None, images: int = 1, logs: bool = False) -> None:
        self._padded = padded
        self._logs = logs
        self._images = images
        self._experts = experts
        self._asked = 0
        packet = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
        self._gemm_4bit = packet and packet.default
        answers: dict[Any, Callable[..., Any]] = {
            _aten.all.default: lambda mask: torch.tensor(not self._padded),
            _aten.any.default: lambda mask: torch.tensor(False),
            _aten.histc.default: lambda values, bins=100, *limits, **named: values.new_empty(bins),
            _aten.nonzero.default: self._nonzero,
            _aten._is_all_true.default: lambda mask: torch.tensor(True),
            _aten.index.Tensor: _masked,
            _aten._to_copy.default: self._counted,
            _aten._local_scalar_dense.default: self._scalar,
            _aten.split_with_sizes.default: _split,
            _aten.masked_select.default: lambda values, mask: values.new_empty(values.numel()),
            _aten.unique_consecutive.default: _all_equal,
            _aten._ctc_loss.Tensor: _ctc_loss,
            _aten._ctc_loss_backward.Tensor: lambda grad, log_probs, *rest: torch.empty_like(log_probs),
            _aten._grouped_mm.default: _grouped_mm,
        }
        self._answers = {id(func): answer for func, answer in answers.items()}

    def knows(self, func: Any) -> bool:
        """Whether there is a stand-in for an operation's result, for some of its arguments."""
        return id(func) in self._answers

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stand-in for an operation's result; None where it can run."""
        known = self._answers.get(id(func))
        return known(*args, **kwargs) if known is not None and args[0].is_meta else None

    def held_by_the_kernel(self, func: Any, args: tuple[Any, ...]) -> list[tuple[str, torch.Tensor]]:
        """What an operation's kernel on CUDA holds while it runs and its meta kernel does not: maker and tensor.

        bitsandbytes' ``gemm_4bit`` unpacks the weight, and of double quantization the scales, twice. For at most 1,536
        rows it has kernels without that, on some GPUs and for some shapes; they are not counted on.
        """
        if func is not self._gemm_4bit or not args[0].is_meta:
            return []
        inputs, _, shape, *_ = args
        held = [inputs.new_empty(shape)]
        if len(args) > _PACKED_SCALES:
            held += [torch.empty_like(args[_PACKED_SCALES], dtype=torch.float32) for _ in range(2)]
        return [("bitsandbytes.dequantize_4bit in gemm_4bit", tensor) for tensor in held]

    def _scalar(self, index: torch.Tensor) -> float | None:
        """What raises if it is true is false; a loop over experts asks for the number of one: each in turn."""
        if index.dtype == torch.bool:
            return False
        if self._logs and index.is_floating_point():
            return 0.0
        if self._experts is None or index.is_floating_point():
            return None
        self._asked += 1
        return (self._asked - 1) % self._experts

    def _counted(self, values: torch.Tensor, **how: Any) -> torch.Tensor | None:
        if values.is_floating_point() or how.get("device") != torch.device("cpu"):
            return None
        return torch.full(values.shape, self._images)

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Every expert is hit, and each by its share of the (choice, token) pairs; any other mask is all true."""
        if self._experts is None:
            return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.long)
        hits = mask.numel() if mask.dim() == 1 else -(-mask.numel() // self._experts)
        return mask.new_empty(hits, mask.dim(), dtype=torch.long)


def _split(values: torch.Tensor, sizes: list[int], dim: int = 0) -> Any:
    """Images whose sizes are not known get equal shares of the features."""
    length = values.shape[dim]
    if sum(sizes) == length or length % len(sizes):
        return None
    return list(_aten.split.Tensor(values, length // len(sizes), dim))


def _all_equal(values: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, ...]:
    """Every row has as many ends of sequences as another, which is what classifiers of T5 and BART ask."""
    places = torch.empty_like(values, dtype=torch.long)
    return values.new_empty(1), places, places.new_empty(1)


def _ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    lengths: torch.Tensor,
    targets_of: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row and its forward variables (aten/src/ATen/native/cuda/LossCTC.cu)."""
    frames, rows = log_probs.shape[:2]
    longest = targets.shape[-1] if targets.dim() == 2 else -(-targets.numel() // rows)
    return log_probs.new_empty(rows), log_probs.new_empty(rows, frames, 2 * longest + 1)


def _masked(values: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor | None:
    """What a mask selects: all, as nothing says less."""
    mask = indices[0] if len(indices) == 1 else None
    if mask is None or mask.dtype != torch.bool:
        return None
    return values.new_empty(mask.numel(), *values.shape[mask.dim() :])


def _grouped_mm(
    left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor | None = None, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    if left.dtype == torch.bfloat16 or left.dim() != 2 or offs is None:
        return None
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(offs.shape[0], left.shape[0], right.shape[1])


@contextmanager
def swapped(replaced: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put functions in the place of others, by module or class and name; what was inherited is so again afterwards."""
    missing = object()
    with alone:
        before = [(home, name, vars(home).get(name, missing)) for home, name, _ in replaced]
        try:
            for home, name, function in replaced:
                setattr(home, name, function)
            yield
        finally:
            for home, name, function in before:
                if function is missing:
                    delattr(home, name)
                else:
                    setattr(home, name, function)


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
