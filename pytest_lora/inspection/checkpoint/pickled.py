"""Pickled adapters, on request only: a process with limits reads the names, and the numbers are read where they lie.

Nothing is built but names, shapes and places, so that what a file claims to hold takes no memory.
"""

from __future__ import annotations

import base64
from math import prod

from pytest_lora.facts.saved_tensors import TensorFacts
from pytest_lora.inspection.checkpoint.archive import Archive, Record
from pytest_lora.inspection.checkpoint.folder import Folder
from pytest_lora.inspection.checkpoint.header import BITS, Stored, shown
from pytest_lora.inspection.checkpoint.values import read_values
from pytest_lora.inspection.limited.process import LimitError, WorkError, limited

MAX_PICKLE = 8 * 2**20
"""Bytes of the names and shapes of one file: some 40,000 tensors."""

DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
"""What ``torch.save`` calls its types, and how safetensors does."""


def read_pickled(folder: Folder, name: str) -> tuple[tuple[TensorFacts, ...], int]:
    """The tensors of a pickled state dict, and the bytes of those whose values were not looked at.

    Raises:
        UnreadableError: It cannot be read, or holds anything but tensors.
    """
    with folder.opened(name) as (file, size):
        archive = Archive(file, size, name)
        content = base64.b64encode(archive.read("data.pkl", MAX_PICKLE)).decode()
        try:
            found, _ = limited.do("unpickle", content)
        except LimitError as error:
            raise archive.fault(f"it is not unpickled: {error}") from error
        except WorkError as error:
            raise archive.fault(f"it is no state dict: {error}") from error
        records: dict[str, Record] = {}
        read: list[Stored] = []
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        unread = 0
        for tensor, kind, key, offset, shape, strides in found:
            if key not in records:
                records[key] = archive.record(f"data/{key}")
            dtype = DTYPES.get(kind)
            if dtype is None:
                raise archive.fault(f"{shown(tensor)} holds numbers of the unknown type {kind[:40]}")
            tensors.append((tensor, dtype, tuple(shape)))
            place = _place(offset, shape, strides, BITS[dtype] // 8)
            if place.begin + place.size > records[key].size:
                raise archive.fault(f"{shown(tensor)} claims more numbers than the file has")
            begin = records[key].begin + place.begin
            if _is_dense(shape, strides):
                # Rows that are not stored one after another cannot be told apart there.
                rows = tuple(shape) if _in_order(shape, strides) else ()
                read.append(Stored(tensor, dtype, rows, begin, begin + place.size))
            else:
                unread += place.size
        values, left_out = read_values(file, read, name)
    return tuple(
        TensorFacts(n, dtype, shape, values.get(n)) for n, dtype, shape in tensors
    ), unread + left_out


def _place(offset: int, shape: list[int], strides: list[int], width: int) -> Record:
    """Where a tensor lies within its storage, in bytes."""
    if 0 in shape:
        return Record(0, 0)
    count = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return Record(offset * width, count * width)


def _is_dense(shape: list[int], strides: list[int]) -> bool:
    """Whether the numbers lie side by side, in whatever order, each once."""
    lengths = sorted((s, n) for n, s in zip(shape, strides, strict=True) if n != 1)
    steps = [1, *(stride * length for stride, length in lengths)]
    return 0 in shape or all(step == stride for step, (stride, _) in zip(steps, lengths, strict=False))


def _in_order(shape: list[int], strides: list[int]) -> bool:
    """Whether they lie in the order of the shape."""
    inner = [prod(shape[at + 1 :]) for at in range(len(shape))]
    return all(
        length == 1 or stride == step for length, stride, step in zip(shape, strides, inner, strict=True)
    )
