"""The header of a safetensors file: names, dtypes, shapes and places of the tensors.

The safetensors library maps the file into memory, and a file that shrinks while it is mapped ends the process
(SIGBUS); it takes headers of 100 MB, and of a name that stands there twice it keeps one. So the header, a length
and a JSON object, is read here, with the library's own rules on top: no gaps, no overlaps, nothing left over.
"""

from __future__ import annotations

from io import FileIO
from itertools import chain
from typing import Any, NamedTuple

from pytest_lora.facts.checkpoint import FileFault
from pytest_lora.inspection.checkpoint.folder import FIRST, UnreadableError, exactly, mistaken, parse_object

MAX_HEADER = 12 * 2**20
"""Bytes of a header. LoRA on each of the 128 experts in 94 layers needs about 10 MB."""

MAX_TENSORS = 75_000
"""LoRA on these experts has 72,192, about the largest number that anybody has a use for."""

MAX_NAME = 1000
"""Characters of the name of a tensor; PEFT's have about a hundred."""

MAX_SIZE = 2**63

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Dtypes of the format (``safetensors::tensor::Dtype``) and their bits."""


class Stored(NamedTuple):
    """A tensor and the bytes of the file that hold it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: FileIO, size: int, name: str) -> list[Stored]:
    """The tensors of an open file, in the order of their bytes.

    Args:
        file: Open for reading.
        size: Bytes of the file.
        name: What the file is called in faults.

    Raises:
        UnreadableError: The header is no header, or does not fit the file.
    """
    if size < 8:
        raise _fault(name, f"it is {size} bytes long, shorter than the length of a safetensors header")
    first = exactly(file, 0, FIRST)
    length = int.from_bytes(first[:8], "little")
    if length > size - 8:
        if other := mistaken(first, name):
            raise UnreadableError(other)
        raise _fault(name, f"its header claims {length:,} bytes, but the file has {size:,}")
    if length > MAX_HEADER:
        raise _too_large(name, f"its header is {length:,} bytes long, and at most {MAX_HEADER:,} are read")
    content = exactly(file, 8, length)
    if content.count(b"{") > MAX_TENSORS:
        raise _too_large(name, f"its header names more than {MAX_TENSORS:,} tensors")
    named = parse_object(content, name)
    named.pop("__metadata__", None)
    stored = _all_stored(named, 8 + length)
    stored = stored or [_stored(key, value, 8 + length, name) for key, value in named.items()]
    stored.sort(key=lambda tensor: tensor[3:])
    _require_seamless(stored, 8 + length, size, name)
    return stored


def _all_stored(named: dict[str, Any], start: int) -> list[Stored] | None:
    """All tensors at once, where there is nothing wrong with any; None where ``_stored`` has to say what is."""
    try:
        rows = [(key, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for key, v in named.items()]
    except (TypeError, KeyError):
        return None
    if set(map(len, rows)) - {5} or {type(n) for row in rows for n in chain(row[2], row[3:])} - {int}:
        return None
    if max(map(len, named), default=0) > MAX_NAME or not {type(row[1]) for row in rows} <= {str}:
        return None
    needed = {form: _bits(*form) for form in {row[1:3] for row in rows}}
    if not all(0 <= b <= e < MAX_SIZE and (e - b) * 8 == needed[d, shape] for _, d, shape, b, e in rows):
        return None
    return [Stored(key, dtype, shape, start + b, start + e) for key, dtype, shape, b, e in rows]


def _bits(dtype: str, shape: tuple[int, ...]) -> int | None:
    """What tensors of this shape take; None where nothing can be of it."""
    if dtype not in BITS or not _are_sizes(list(shape)):
        return None
    bits = BITS[dtype]
    for length in shape:
        bits *= length
        if bits > 8 * MAX_SIZE:
            return None
    return bits


def _stored(key: str, value: Any, start: int, name: str) -> Stored:
    if len(key) > MAX_NAME:
        raise _too_large(
            name, f"{shown(key)} is {len(key):,} characters long, and names of {MAX_NAME:,} are read"
        )
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _fault(name, f"its header does not say dtype, shape and data_offsets of {shown(key)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _fault(name, f"{shown(key)} has the unknown dtype {shown(str(dtype))}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _fault(name, f"shape or data_offsets of {shown(key)} are no sizes")
    bits = _bits(dtype, tuple(shape))
    if bits is None:
        raise _fault(name, f"{shown(key)} claims more numbers than any file can hold")
    if (offsets[1] - offsets[0]) * 8 != bits:
        took = offsets[1] - offsets[0]
        raise _fault(name, f"{shown(key)} takes {took:,} bytes, but its shape and dtype need {bits // 8:,}")
    return Stored(key, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _require_seamless(stored: list[Stored], start: int, size: int, name: str) -> None:
    for tensor in stored:
        if tensor.begin < start:
            raise _fault(name, f"{shown(tensor.name)} overlaps the tensor before it")
        if tensor.begin > start:
            raise _fault(
                name, f"{tensor.begin - start:,} bytes before {shown(tensor.name)} belong to no tensor"
            )
        start = tensor.end
    if start > size:
        raise _fault(name, f"it is cut off: its tensors end at byte {start:,}, the file at {size:,}")
    if start < size:
        raise _fault(name, f"{size - start:,} bytes after the last tensor belong to none")


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 64:
        return False
    return all(type(n) is int and 0 <= n < MAX_SIZE for n in value)


def shown(text: str, limit: int = 100) -> str:
    """A name of a file that nobody vouches for, fit to print."""
    clean = text.encode("utf-8", "replace").decode()
    return repr(clean if len(clean) <= limit else f"{clean[:limit]}...")


def _fault(name: str, observed: str) -> UnreadableError:
    return UnreadableError(FileFault(name, "format", observed))


def _too_large(name: str, observed: str) -> UnreadableError:
    return UnreadableError(FileFault(name, "size", observed))
