"""The archive that ``torch.save`` writes: a zip file whose records are stored as they are, none of it unpacked."""

from __future__ import annotations

import io
import zipfile
from io import FileIO
from typing import NamedTuple

from pytest_lora.facts.checkpoint import FileFault
from pytest_lora.inspection.checkpoint.folder import UnreadableError, exactly

MAX_DIRECTORY = 4 * 2**20
"""Bytes of the list of records that are read: some 40,000 tensors."""

_LOCAL = 30
"""Bytes of the header before each record, less its name."""


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
