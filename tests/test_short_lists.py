"""Lists and curves in messages are cut where they get long, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError, parse_object
from pytest_lora.inspection.checkpoint.header import shown as shown_name
from pytest_lora.rules.serving_words import shown
from pytest_lora.rules.training.loss_does_not_fall import _drawn


def test_three_names_and_how_many_more() -> None:
    assert [shown(tuple("abcde"[:count])) for count in (0, 1, 3, 4, 5)] == [
        "",
        "a",
        "a, b, c",
        "a, b, c and 1 more",
        "a, b, c and 2 more",
    ]


def test_eight_points_of_a_curve_with_both_ends() -> None:
    assert _drawn((3.0, 2.5)) == "3 2.5"
    assert _drawn(tuple(map(float, range(15)))) == "0 2 4 6 8 10 12 14"


def test_names_of_strangers_are_cut_after_a_hundred_letters() -> None:
    assert shown_name("x" * 100) == repr("x" * 100)
    assert shown_name("x" * 101) == repr("x" * 100 + "...")


@pytest.mark.parametrize(("letters", "cut"), [(120, False), (121, True)])
def test_a_name_that_a_file_has_twice_is_cut(letters: int, cut: bool) -> None:
    name = "x" * letters
    with pytest.raises(UnreadableError) as caught:
        parse_object(f'{{"{name}": 1, "{name}": 2}}'.encode(), "a.json")
    assert ("..." in caught.value.fault.observed) is cut


def test_only_files_have_a_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "stray").symlink_to("/nowhere")
    found = {entry.name: (entry.kind, entry.bytes) for entry in Folder(tmp_path).entries()}
    assert found == {"file": ("file", 5), "folder": ("folder", 0), "link": ("file", 5), "stray": ("link", 0)}
