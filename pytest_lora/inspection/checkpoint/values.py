"""What the numbers of a file are like, read a few megabytes at a time.

Nothing is mapped into memory: a file that shrinks while it is mapped ends the process. The bits are looked at as
whole numbers, so that bfloat16 and float8 need no torch, whose import takes seconds.
"""

from __future__ import annotations

from io import FileIO
from typing import NamedTuple

import numpy as np

from pytest_lora.facts.checkpoint import FileFault, Values
from pytest_lora.inspection.checkpoint.folder import UnreadableError
from pytest_lora.inspection.checkpoint.header import Stored

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
    file.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        part = memoryview(buffer)[: min(left, CHUNK)]
        filled = 0
        # A read may give less than was asked for; numbers must not be torn apart.
        while filled < len(part) and (count := file.readinto(part[filled:])):
            filled += count
        if filled < len(part):
            raise UnreadableError(FileFault(name, "changed", "it became shorter while it was read"))
        left -= filled
        seen = bits_like(np.frombuffer(buffer, np.uint8, filled), tensor.dtype)
        nans, infinities, zero = nans + seen.nans, infinities + seen.infinities, zero and seen.zero
    return Values(nans, infinities, zero)


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
