"""Numbers as people write and read them: sizes of memory, and tables under a head."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pytest_lora.values import shown

_UNITS: dict[str, int] = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d{1,30})(?:\.(\d{1,30}))?\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)
_MOST = 2**50
"""A thousand TiB, above all machines; sums of sizes stay within 64 bits."""


def parse_bytes(value: object, argument: str) -> int:
    """A size in bytes.

    Args:
        value: Whole bytes as an int, or a string with a unit: ``"24GiB"`` is 24 * 2**30 bytes, ``"24GB"`` is
            24 * 10**9. B, KB, MB, GB, TB, KiB, MiB, GiB and TiB are known, in any case; fractions and a space
            before the unit are fine. A fraction of a byte is dropped.
        argument: What the user calls the value, for the errors.

    Returns:
        The size in bytes, at least 1.

    Raises:
        TypeError: The value is neither.
        ValueError: The string has no unit or is no size, or the size is less than a byte.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(
            f'{argument} must be a size such as "24GiB" (or "24GB") or whole bytes, not {shown(value)}'
        )
    size = value if isinstance(value, int) else _parsed(value, argument)
    if size > _MOST:
        raise ValueError(f"{argument} must be at most a thousand TiB, got {_quoted(value)}")
    if size < 1:
        raise ValueError(f"{argument} must be at least 1 byte, got {_quoted(value)}")
    return size


def format_bytes(size: int) -> str:
    """A size in bytes as a reader wants it: ``"12.3 GiB"``, in the largest binary unit of which there is one.

    Args:
        size: Bytes; negative for a difference.
    """
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size < 1024:
        return f"{sign}{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.95:  # above, one decimal would say 1024.0
            return f"{sign}{value:.1f} {unit}"
    return f"{sign}{value / 1024:.1f} TiB"


def _parsed(text: str, argument: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f'{argument} must be a size such as "24GiB" (or "24GB"), got {_quoted(text)}')
    whole, fraction, unit = match[1], match[2] or "", match[3].lower()
    number = f"{whole}.{fraction}" if fraction else whole
    if not unit or f"{unit}b" in _UNITS:
        prefix = unit[:1].upper() or "G"
        raise ValueError(
            f'{argument} must carry a unit: "{number}{prefix}iB" (or "{number}{prefix}B"), got {_quoted(text)}'
        )
    if unit not in _UNITS:
        raise ValueError(
            f"{argument} has the unknown unit {_quoted(match[3])}: write B, KiB, MiB, GiB or TiB (or KB, MB, GB, TB), "
            f"got {_quoted(text)}"
        )
    scale: int = 10 ** len(fraction)
    return int(whole + fraction) * _UNITS[unit] // scale


def _quoted(value: object) -> str:
    text = shown(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) else text


Cells = Sequence[tuple[str, ...]]
"""The head, then the rows, all of one length."""


def text_lines(cells: Cells) -> list[str]:
    """A line a row, the columns flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]


def markdown_lines(cells: Cells) -> list[str]:
    """The same in Markdown."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return [head, f"|{' ---: |' * len(cells[0])}", *rows]
