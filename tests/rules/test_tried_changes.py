"""Which changes of a step that does not fit are tried, and which are joined."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pytest_lora.memory.what_if import _Change, _Storage, _together, _Tried, _until_one_fits

NOW = _Change((), None, {}, 1, 64, 8)


@pytest.mark.parametrize(
    ("peaks", "found", "tried"),
    [
        ([9, 8, 7, 6], [9], [0, 3]),
        ([9, 8, 4, 3], [9, 4], [0, 3, 1, 2]),
        ([9, 8, 7, 3], [9, 3], [0, 3, 1, 2]),
        ([4, 3], [4], [0]),
        ([9, 4, None], [9, 4], [0, 2, 1]),
        ([9, 8, None], [9], [0, 2, 1]),
        ([], [], []),
    ],
)
def test_the_end_of_a_series_decides_whether_the_rest_is_tried(
    peaks: list[int | None], found: list[int], tried: list[int]
) -> None:
    asked: list[int] = []

    def estimated(changes: Iterable[_Change]) -> list[_Tried]:
        rows = []
        for change in changes:
            asked.append(change.length)
            peak = peaks[change.length]
            rows += [] if peak is None else [_Tried(change, peak, 0)]
        return rows

    series = (NOW._replace(length=number) for number in range(len(peaks)))
    assert [one.peak for one in _until_one_fits(estimated, series, 5)] == found
    assert asked == tried


def test_two_changes_of_the_same_setting_are_not_joined() -> None:
    of = {"zero3": {"strategy": "zero3"}, "fsdp": {"strategy": "fsdp"}, "nf4": {"quantization": "nf4"}}
    storage = [_Storage(text, fields, "same batch") for text, fields in of.items()]
    singly = [_Tried(NOW._replace(texts=(text,)), peak, 0) for text, peak in zip(of, (6, 5, 7), strict=True)]
    assert [change.texts for change in _together(1, storage, singly, 9, NOW)] == [("fsdp", "nf4")]
