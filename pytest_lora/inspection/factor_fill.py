"""Which ranks and which outputs of low-rank factors hold anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Fill(NamedTuple):
    """What is at zero in two factors whose product is not.

    Attributes:
        empty_ranks: Ranks at which both factors are zero.
        idle_ranks: Ranks at which the factor that starts at zero still is, and the random one is not.
        zero_outputs: Rows of the factor that starts at zero which still are, where they are one block at an end.
    """

    empty_ranks: int
    idle_ranks: int
    zero_outputs: int


FULL = Fill(0, 0, 0)


def fills(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Fill]:
    """The fill of pairs ``(a, b)`` of matrices, ``(rank, in)`` and ``(out, rank)``, by the id of ``b``.

    There is one transfer a device.
    """
    pending: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
    for a, b in pairs:
        if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.device == b.device:
            held = b.detach() != 0
            marks = torch.cat(((a.detach() != 0).any(1), held.any(0), held.any(1)))
            pending.setdefault(b.device, []).append((id(b), a.shape[0], marks))
    found: dict[int, Fill] = {}
    for entries in pending.values():
        found_marks: list[bool] = torch.cat([marks for _, _, marks in entries]).tolist()
        start = 0
        for key, rank, own in entries:
            found[key] = _fill(found_marks[start : start + len(own)], rank)
            start += len(own)
    return found


def _fill(marks: list[bool], rank: int) -> Fill:
    a, b, outputs = marks[:rank], marks[rank : 2 * rank], marks[2 * rank :]
    return Fill(
        empty_ranks=sum(not x and not y for x, y in zip(a, b, strict=True)),
        idle_ranks=sum(x and not y for x, y in zip(a, b, strict=True)),
        zero_outputs=_block(outputs),
    )


def _block(outputs: list[bool]) -> int:
    """How many are False, where these are the first or the last ones; else 0."""
    zero = len(outputs) - sum(outputs)
    return zero if not any(outputs[:zero]) or not any(outputs[len(outputs) - zero :]) else 0
