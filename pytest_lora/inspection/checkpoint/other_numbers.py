"""Two files of weights side by side: whether they hold the same numbers, without unpickling one of them.

``torch.save`` writes the bytes of each storage as a record of its own, as they are. So the bytes can be compared
whatever the pickle calls them.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from io import FileIO

from pytest_lora.inspection.checkpoint.archive import Archive, Record
from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError, exactly
from pytest_lora.inspection.checkpoint.header import read_header
from pytest_lora.inspection.checkpoint.values import CHUNK, MAX_BYTES


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
