"""What the numbers of a file are like, read a few megabytes at a time.

Nothing is mapped into memory: a file that shrinks while it is mapped ends the process. The bits are looked at as
whole numbers, so that bfloat16 and float8 need no torch, whose import takes seconds.
"""

from __future__ import annotations

from io import FileIO
from typing import NamedTuple

import numpy as np

from pytest_lora.facts.checkpoint import FileFault
from pytest_lora.facts.saved_tensors import Values
from pytest_lora.inspection.checkpoint.folder import UnreadableError
from pytest_lora.inspection.checkpoint.header import Stored
from pytest_lora.inspection.checkpoint.marks import Marking, marking

CHUNK = 4 * 2**20

MAX_BYTES = 2 * 2**30
"""Bytes of one adapter whose values are read: about a second of work. Rank 64 on all of Llama-2-70B is 1.7 GB."""


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
        UnreadableError: The file ends before its header says.
    """
    found: dict[str, Values] = {}
    read = left_out = 0
    buffer = bytearray(CHUNK)
    for tensor in sorted(stored, key=lambda t: (".lora_" not in t.name, t.begin)):
        if tensor.dtype not in LAYOUTS and tensor.dtype not in NAN_ONLY:
            continue
        size = tensor.end - tensor.begin
        if read + size > MAX_BYTES:
            left_out += size
            continue
        read += size
        found[tensor.name] = _values(file, tensor, buffer, name)
    return found, left_out


def _values(file: FileIO, tensor: Stored, buffer: bytearray, name: str) -> Values:
    nans = infinities = 0
    zero = True
    squares = 0.0 if is_measured(tensor.name, tensor.dtype) else None
    marked = marks_of(tensor.name, tensor.dtype, tensor.shape)
    most = CHUNK - CHUNK % marked.row_bytes if marked else CHUNK
    file.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        part = memoryview(buffer)[: min(left, most)]
        filled = 0
        # A read may give less than was asked for; numbers must not be torn apart.
        while filled < len(part) and (count := file.readinto(part[filled:])):
            filled += count
        if filled < len(part):
            raise UnreadableError(FileFault(name, "changed", "it became shorter while it was read"))
        left -= filled
        raw = np.frombuffer(buffer, np.uint8, filled)
        seen = bits_like(raw, tensor.dtype)
        if marked:
            marked.add(raw)
        nans, infinities, zero = nans + seen.nans, infinities + seen.infinities, zero and seen.zero
        if squares is not None and not seen.zero:
            squares += sum_of_squares(raw, tensor.dtype)
    mean = root_mean(squares, tensor.end - tensor.begin, tensor.dtype)
    return Values(nans, infinities, zero, mean, marked.marks() if marked else None)


def marks_of(name: str, dtype: str, shape: tuple[int, ...]) -> Marking | None:
    """A marking for a tensor of this name, format and shape; None for what is no factor."""
    return (
        marking(name, shape, np.dtype(LAYOUTS[dtype].unsigned).itemsize, CHUNK) if dtype in LAYOUTS else None
    )


def is_measured(name: str, dtype: str) -> bool:
    """Whether the size of a tensor of this name and format is measured."""
    return dtype in LAYOUTS and any(part in name for part in PARTS_MEASURED)


def sum_of_squares(raw: np.ndarray[tuple[int], np.dtype[np.uint8]], dtype: str) -> float:
    """The sum of the squares of the numbers in some bytes, of a format in ``LAYOUTS``; NaN or infinite as they are."""
    if dtype == "BF16":
        numbers = (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif dtype == "F8_E5M2":
        numbers = (raw.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    else:
        numbers = raw.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
        numbers = numbers.astype(np.float32) if dtype == "F16" else numbers
    with np.errstate(all="ignore"):
        return float(np.dot(numbers, numbers))


def root_mean(squares: float | None, size: int, dtype: str) -> float | None:
    """The root of the mean of squares over so many bytes of a format; None where they were not measured."""
    if squares is None or not size:
        return None
    return float(np.sqrt(squares * np.dtype(LAYOUTS[dtype].unsigned).itemsize / size))


def bits_like(raw: np.ndarray[tuple[int], np.dtype[np.uint8]], dtype: str) -> Values:
    """What the numbers in some bytes are like; their count is whole."""
    if dtype in NAN_ONLY:
        magnitude = raw & np.uint8(0x7F)
        return Values(int(np.count_nonzero(magnitude == NAN_ONLY[dtype])), 0, not magnitude.any())
    layout = LAYOUTS[dtype]
    bits = raw.view(layout.unsigned)
    magnitude_bits = bits & layout.unsigned(layout.exponent | layout.fraction)
    # The bits of infinity, taken as a whole number, are above those of any number and below those of any NaN.
    highest = int(magnitude_bits.max(initial=0))
    if highest < layout.exponent:
        return Values(0, 0, highest == 0)
    infinities = int(np.count_nonzero(magnitude_bits == layout.exponent))
    nans = int(np.count_nonzero(magnitude_bits > layout.exponent))
    return Values(nans, infinities, False)
