"""Pickled adapters: the archive that ``torch.save`` writes, none of it unpacked, and the bytes of its tensors.

On request a process with limits reads the names, and the numbers are read where they lie. Nothing is built but names,
shapes and places, so that what a file claims to hold takes no memory. Without a request nothing is unpickled:
``torch.save`` writes the bytes of each storage as a record of its own, as they are, so they can be compared with the
safetensors beside them whatever the pickle calls them.
"""

from __future__ import annotations

import base64
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from io import FileIO
from math import prod
from typing import NamedTuple

from pytest_lora.facts.checkpoint import FileFault
from pytest_lora.facts.saved_tensors import TensorFacts
from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError, exactly
from pytest_lora.inspection.checkpoint.header import BITS, Stored, read_header, shown
from pytest_lora.inspection.checkpoint.values import CHUNK, MAX_BYTES, read_values
from pytest_lora.inspection.limited import LimitError, WorkError, limited

MAX_DIRECTORY = 4 * 2**20
"""Bytes of the list of records that are read: some 40,000 tensors."""

_LOCAL = 30
"""Bytes of the header before each record, less its name."""

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


class Record(NamedTuple):
    """Where a record lies in the file, in bytes."""

    begin: int
    size: int


class Archive:
    """The records of an archive by their names, without the folder that they are in."""

    def __init__(self, file: FileIO, size: int, name: str) -> None:
        """Read the list of records.

        Args:
            file: Open for reading.
            size: Bytes of the file.
            name: What it is called in faults.

        Raises:
            UnreadableError: It is no such archive.
        """
        self._file, self._size, self._name = file, size, name
        try:
            with zipfile.ZipFile(_Bounded(file, name)) as archive:
                entries = archive.infolist()
        except UnreadableError:
            raise
        except Exception as error:  # damaged lists raise many kinds
            raise self.fault(
                f"it is no archive of torch.save, as PyTorch writes since 1.6: {error}"
            ) from error
        names = [entry.filename for entry in entries]
        top = next((one.removesuffix("data.pkl") for one in names if one.endswith("/data.pkl")), None)
        if top is None or len(set(names)) != len(names):
            raise self.fault("it is no archive of torch.save: it has no data.pkl, or a record twice")
        self._entries = {e.filename.removeprefix(top): e for e in entries if e.filename.startswith(top)}

    @property
    def names(self) -> tuple[str, ...]:
        """Its records, without the folder that they are in."""
        return tuple(self._entries)

    def fault(self, observed: str) -> UnreadableError:
        """A fault of this file."""
        return UnreadableError(FileFault(self._name, "format", observed[:300]))

    def record(self, name: str) -> Record:
        """Where a record lies.

        Raises:
            UnreadableError: There is none, or it is packed, and so may be of any size.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise self.fault(f"its record {name[:60]!r} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise self.fault(f"its record {name[:60]!r} is packed, which torch.save does not do")
        local = exactly(self._file, entry.header_offset, _LOCAL)
        begin = (
            entry.header_offset
            + _LOCAL
            + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
        )
        if local[:4] != b"PK\x03\x04" or begin + entry.file_size > self._size:
            raise self.fault(f"its record {name[:60]!r} lies beyond its end")
        return Record(begin, entry.file_size)

    def read(self, name: str, limit: int) -> bytes:
        """A record of at most ``limit`` bytes.

        Raises:
            UnreadableError: As ``record``, or it is larger.
        """
        record = self.record(name)
        if record.size > limit:
            raise UnreadableError(
                FileFault(
                    self._name,
                    "size",
                    f"its record {name!r} is {record.size:,} bytes long; {limit:,} are read",
                )
            )
        return exactly(self._file, record.begin, record.size)


class _Bounded(io.RawIOBase):
    """A file of which no more is read than a list of records takes."""

    def __init__(self, file: FileIO, name: str) -> None:
        super().__init__()
        self._file, self._name, self._left = file, name, MAX_DIRECTORY

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1) -> bytes:
        count = self._left if size is None or size < 0 else size
        if count > self._left:
            raise UnreadableError(
                FileFault(self._name, "size", f"its list of records takes more than {MAX_DIRECTORY:,} bytes")
            )
        found = exactly(self._file, self._file.tell(), count)
        self._left -= len(found)
        return found


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


def holds_other_numbers(folder: Folder, weights: str, pickled: str) -> bool | None:
    """Whether a pickle holds other numbers than the safetensors beside it.

    Returns:
        None where that cannot be told: one is unreadable or too large, or tensors lie in storages of another size.
    """
    try:
        with folder.opened(weights) as (ours, size), folder.opened(pickled) as (theirs, other_size):
            tensors = [Record(t.begin, t.end - t.begin) for t in read_header(ours, size, weights)]
            records = list(_records(Archive(theirs, other_size, pickled)))
            if sum(r.size for r in tensors) > MAX_BYTES or _sizes(tensors) != _sizes(records):
                return None
            return _marks(ours, tensors) != _marks(theirs, records)
    except UnreadableError:
        return None


def _records(archive: Archive) -> Iterator[Record]:
    return (archive.record(name) for name in archive.names if name.startswith("data/"))


def _sizes(records: Iterable[Record]) -> Counter[int]:
    return Counter(record.size for record in records if record.size)


def _marks(file: FileIO, records: Iterable[Record]) -> Counter[tuple[int, int]]:
    """How often each content is there, by its size and checksum."""
    return Counter((record.size, _checksum(file, record)) for record in records if record.size)


def _checksum(file: FileIO, record: Record) -> int:
    found = 0
    for offset in range(0, record.size, CHUNK):
        found = zlib.crc32(exactly(file, record.begin + offset, min(CHUNK, record.size - offset)), found)
    return found
