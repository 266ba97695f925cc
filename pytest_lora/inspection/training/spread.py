"""Losses of two tensors that torch spreads over each other, as its warning says."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pytest_lora.facts.steps import SpreadFacts

_SAYS = "Using a target size"
_SIZES = re.compile(
    r"target size \(torch\.Size\(\[([\d, ]*)\]\)\) that is different to the input size "
    r"\(torch\.Size\(\[([\d, ]*)\]\)\)"
)


@contextmanager
def listening(heard: list[SpreadFacts]) -> Iterator[None]:
    """Note what torch says inside of sizes that differ; all warnings are shown afterwards as they would have been.

    Torch warns once a place, so that a run before may have used its warning up: here it speaks always.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", message=_SAYS, category=UserWarning)
        try:
            yield
        finally:
            seen = list(said)
    for one in seen:
        heard.extend(_spread(str(one.message)))
        warnings.showwarning(one.message, one.category, one.filename, one.lineno)


def _spread(message: str) -> Iterator[SpreadFacts]:
    found = _SIZES.search(message)
    if found:
        target, given = (tuple(int(n) for n in sizes.split(",") if n.strip()) for sizes in found.groups())
        whole = math.prod(_together(target, given))
        if whole > max(math.prod(target), math.prod(given)):
            yield SpreadFacts(target=target, given=given)


def _together(left: tuple[int, ...], right: tuple[int, ...]) -> Iterator[int]:
    """The shape that two are spread to."""
    length = max(len(left), len(right))
    for one, other in zip(*((1,) * (length - len(s)) + s for s in (left, right)), strict=True):
        yield max(one, other)
