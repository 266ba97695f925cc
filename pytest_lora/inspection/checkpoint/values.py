"""What the numbers of a file are like, read a few megabytes at a time.

Nothing is mapped into memory: a file that shrinks while it is mapped ends the process. The bits are looked at as
whole numbers, so that bfloat16 and float8 need no torch, whose import takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from io import FileIO
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from pytest_lora.facts.checkpoint import FileFault
from pytest_lora.facts.saved_tensors import Values
from pytest_lora.inspection.checkpoint.folder import UnreadableError
from pytest_lora.inspection.checkpoint.header import BITS, Stored
from pytest_lora.inspection.checkpoint.marks import Marking, Small, is_marked

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK = 4 * 2**20

MAX_BYTES = 2 * 2**30
"""Bytes of one adapter whose values are read: about a second of work. Rank 64 on all of Llama-2-70B is 1.7 GB."""


MAX_FORMS = 4096
"""Different shapes in one file, as each is looked at by itself. EVA, which gives each module a rank of its own, makes
1,120 on Llama-2-70B."""


class Layout(NamedTuple):
    """Where a floating-point format has its bits: width, exponent, and those below the exponent."""

    unsigned: type[np.unsignedinteger]
    exponent: int
    fraction: int


LAYOUTS = {
    "F64": Layout(np.uint64, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
    "F32": Layout(np.uint32, 0x7F80_0000, 0x007F_FFFF),
    "F16": Layout(np.uint16, 0x7C00, 0x03FF),
    "BF16": Layout(np.uint16, 0x7F80, 0x007F),
    "F8_E5M2": Layout(np.uint8, 0x7C, 0x03),
}
"""IEEE formats: an exponent of ones is infinity if the fraction is zero, else NaN."""

PARTS_MEASURED = (".lora_B", ".lora_embedding_B")
"""Factors that start at zero: their size is what training made of the adapter."""

NAN_ONLY = {"F8_E4M3": 0x7F}
"""Formats without infinity: all bits but the sign set is NaN."""


def read_values(file: FileIO, stored: list[Stored], name: str) -> tuple[dict[str, Values], int]:
    """Look at the values of tensors with a floating-point format, until ``MAX_BYTES`` are read.

    LoRA factors come first, so that a whole model in the same file does not use up the bound.

    Returns:
        What was seen, by tensor name, and the bytes of such tensors that were left out.

    Raises:
        UnreadableError: The file ends before its header says, or holds too many different shapes.
    """
    read = left_out = 0
    alike: dict[Form, list[Stored]] = {}
    in_order = sorted(stored, key=itemgetter(3))
    factors = [tensor for tensor in in_order if ".lora_" in tensor.name]
    others = (
        [tensor for tensor in in_order if ".lora_" not in tensor.name] if len(factors) < len(stored) else []
    )
    for tensor in chain(factors, others):
        if tensor.dtype not in LAYOUTS and tensor.dtype not in NAN_ONLY:
            continue
        size = tensor.end - tensor.begin
        if read + size > MAX_BYTES:
            left_out += size
            continue
        read += size
        alike.setdefault(Form.of(tensor), []).append(tensor)
    if len(alike) > MAX_FORMS:
        raise UnreadableError(
            FileFault(name, "size", f"its tensors are of more than {MAX_FORMS:,} different shapes and kinds")
        )
    buffer = bytearray(CHUNK)
    found: dict[str, Values] = {}
    for form, tensors in alike.items():
        at_once = max(1, CHUNK // max(1, form.size))
        for start in range(0, len(tensors), at_once):
            some = tensors[start : start + at_once]
            found.update(zip([t.name for t in some], _values(file, form, some, buffer, name), strict=True))
    return found, left_out


class Form(NamedTuple):
    """What tensors that are looked at together have in common: thousands of small ones are a matter of numpy alone.

    Attributes:
        size: Bytes of one.
        measured: Whether the size of its numbers is measured.
        marked: Whether it is a factor whose rows and columns are looked at.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    measured: bool
    marked: bool

    @classmethod
    def of(cls, tensor: Stored) -> Form:
        name, dtype, shape, begin, end = tensor
        at = name.find(".lora_")
        measured = marked = False
        if at >= 0 and dtype in LAYOUTS:
            # What a key begins with is its own, what it ends with is that of many.
            measured, marked = _looked_at(
                name[at:] if len(name) - at < 100 else name, shape, _width(dtype), CHUNK
            )
        return cls(dtype, shape, end - begin, measured, marked)


@lru_cache(4096)
def _looked_at(name: str, shape: tuple[int, ...], width: int, most: int) -> tuple[bool, bool]:
    return any(part in name for part in PARTS_MEASURED), is_marked(name, shape, width, most)


def _values(
    file: FileIO, form: Form, tensors: list[Stored], buffer: bytearray, name: str
) -> Iterator[Values]:
    """What the numbers of tensors of one form are like, which fit into the buffer together or are one."""
    count = len(tensors)
    nans, infinities, squares = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count)
    zero = np.ones(count, bool)
    small = Small(count) if form.measured and form.dtype == "F16" else None
    marking = None
    step = CHUNK
    if form.marked:
        marking = Marking(form.shape, _width(form.dtype), count)
        step -= CHUNK % marking.row_bytes
    for offset in range(0, form.size, step):
        length = min(step, form.size - offset)
        view = memoryview(buffer)
        for place, tensor in enumerate(tensors):
            _fill(file, tensor.begin + offset, view[place * length : (place + 1) * length], name)
        raw = np.frombuffer(buffer, np.uint8, count * length).reshape(count, length)
        zeros = _count(raw, form.dtype, nans, infinities)
        if marking is not None:
            marking.add(raw)
        if small is not None:
            small.add(raw)
        if form.measured and not zeros.all():
            squares += _squares(raw, form.dtype)
        zero &= zeros
    marks = repeat(None, count) if marking is None else marking.marks()
    means = _root_means(squares, form) if form.measured else [None] * count
    underflow = [None] * count if small is None else small.shares(form.size // 2)
    return map(Values, nans.tolist(), infinities.tolist(), zero.tolist(), means, marks, underflow)


def _fill(file: FileIO, start: int, part: memoryview, name: str) -> None:
    file.seek(start)
    filled = 0
    # A read may give less than was asked for; numbers must not be torn apart.
    while filled < len(part) and (count := file.readinto(part[filled:])):
        filled += count
    if filled < len(part):
        raise UnreadableError(FileFault(name, "changed", "it became shorter while it was read"))


def _squares(raw: Bytes, dtype: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The sums of the squares of the numbers of each row, of a format in ``LAYOUTS``; NaN or infinite as they are."""
    if dtype == "BF16":
        numbers = (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype == "F8_E5M2":
        numbers = (raw.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    else:
        numbers = raw.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
        numbers = numbers.astype(np.float32) if dtype == "F16" else numbers
    with np.errstate(all="ignore"):
        if len(numbers) == 1:  # the fastest there is
            return np.array([np.dot(numbers[0], numbers[0])], np.float64)
        squares: np.ndarray[Any, np.dtype[np.float64]] = np.einsum("ij,ij->i", numbers, numbers).astype(
            np.float64
        )
        return squares


def _root_means(squares: np.ndarray[Any, np.dtype[np.float64]], form: Form) -> list[float | None]:
    """The roots of the means of squares; None where there are no numbers."""
    if not form.size:
        return [None] * len(squares)
    means: list[float | None] = np.sqrt(squares * _width(form.dtype) / form.size).tolist()
    return means


def _width(dtype: str) -> int:
    return BITS[dtype] // 8


def _count(
    raw: Bytes,
    dtype: str,
    nans: np.ndarray[Any, np.dtype[np.int64]],
    infinities: np.ndarray[Any, np.dtype[np.int64]],
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Add to the counts of each row, whose numbers are whole; gives which rows are zero."""
    if dtype in NAN_ONLY:
        magnitude = raw & np.uint8(0x7F)
        nans += np.count_nonzero(magnitude == NAN_ONLY[dtype], axis=1)
        highest = magnitude.max(axis=1, initial=0)
        return np.asarray(highest == 0, np.bool_)
    layout = LAYOUTS[dtype]
    bits = raw.view(layout.unsigned)
    magnitude_bits = bits & layout.unsigned(layout.exponent | layout.fraction)
    # The bits of infinity, taken as a whole number, are above those of any number and below those of any NaN.
    highest = magnitude_bits.max(axis=1, initial=0)
    if highest.max() >= layout.exponent:
        infinities += np.count_nonzero(magnitude_bits == layout.exponent, axis=1)
        nans += np.count_nonzero(magnitude_bits > layout.exponent, axis=1)
    return np.asarray(highest == 0, np.bool_)
