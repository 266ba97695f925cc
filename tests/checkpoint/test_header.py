"""The header of a safetensors file, at each of its bounds; the library says which files are sound."""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from pytest_lora.facts import saved_tensors
from pytest_lora.inspection.checkpoint import header
from pytest_lora.inspection.checkpoint.folder import UnreadableError
from pytest_lora.inspection.checkpoint.header import BITS, Stored, read_header, shown


def read(
    folder: Path, header: dict[str, Any] | bytes, body: int, *, length: int | None = None
) -> list[Stored]:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    claimed = len(content) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + content + bytes(body))
    with FileIO(str(path)) as file:
        return read_header(file, path.stat().st_size, path.name)


def refusal(folder: Path, header: dict[str, Any] | bytes, body: int, **settings: Any) -> tuple[str, str]:
    with pytest.raises(UnreadableError) as raised:
        read(folder, header, body, **settings)
    return raised.value.fault.kind, raised.value.fault.observed


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", BITS)
def test_bytes_of_a_dtype_are_those_of_the_library(tmp_path: Path, dtype: str) -> None:
    size = 8 * BITS[dtype] // 8
    (stored,) = read(tmp_path, {"a": tensor([2, 4], 0, size, dtype)}, size)
    assert (stored.dtype, stored.shape, stored.end - stored.begin) == (dtype, (2, 4), size)
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        assert list(opened.keys()) == ["a"]
    for wrong in (size - 1, size + 1):
        kind, observed = refusal(tmp_path, {"a": tensor([2, 4], 0, wrong, dtype)}, wrong)
        assert (kind, observed) == ("format", f"'a' takes {wrong} bytes, but its shape and dtype need {size}")
        with pytest.raises(SafetensorError), safe_open(tmp_path / "model.safetensors", "np"):
            pass


def test_tensors_are_read_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "b": tensor([3], 2, 5),
        "none": tensor([0], 2, 2),
        "a": tensor([2], 0, 2),
        "__metadata__": {"a": "b"},
    }
    found = read(tmp_path, header, 5)
    start = 8 + len(json.dumps(header))
    assert [(one.name, one.begin - start, one.end - start) for one in found] == [
        ("a", 0, 2),
        ("none", 2, 2),
        ("b", 2, 5),
    ]


@pytest.mark.parametrize(
    ("header", "body", "observed"),
    [
        ({"a": tensor([1], 1, 2)}, 2, "1 bytes before 'a' belong to no tensor"),
        ({"a": tensor([2], 0, 2), "b": tensor([2], 1, 3)}, 3, "'b' overlaps the tensor before it"),
        ({"a": tensor([2], 0, 2)}, 1, "it is cut off: its tensors end at byte 70, the file at 69"),
        ({"a": tensor([2], 0, 2)}, 3, "1 bytes after the last tensor belong to none"),
        ({}, 1, "1 bytes after the last tensor belong to none"),
        ({"a": 1}, 0, "its header does not say dtype, shape and data_offsets of 'a'"),
        ({"a": tensor([2], 0, 2), "b": tensor([1], 2, 3), "c": tensor([1], 3, 4, "I3")}, 4, "'c' has the unknown dtype "
         "'I3'"),
        ({"a": {"dtype": "U8", "shape": [0]}}, 0, "its header does not say dtype, shape and data_offsets of 'a'"),
        ({"a": tensor([1], 0, 1, "I3")}, 1, "'a' has the unknown dtype 'I3'"),
        ({"a": tensor([1], 0, 1, ["U8"])}, 1, "'a' has the unknown dtype \"['U8']\""),
        ({"a": tensor([True], 0, 1)}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": tensor([1.0], 0, 1)}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": tensor([-1], 0, 1)}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": tensor([0], 1, 0)}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": tensor([1], "0", 1)}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": {**tensor([1], 0, 1), "data_offsets": [0, 1, 1]}}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": tensor([1] * 65, 0, 1)}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": tensor([2**63], 0, 1)}, 1, "shape or data_offsets of 'a' are no sizes"),
        ({"a": tensor([2**62, 4], 0, 1)}, 1, "'a' claims more numbers than any file can hold"),
        ({"a": tensor([2**62, 2], 0, 1)}, 1, f"'a' takes 1 bytes, but its shape and dtype need {2**63:,}"),
    ],
)  # fmt: skip
def test_what_fits_no_file(tmp_path: Path, header: dict[str, Any], body: int, observed: str) -> None:
    assert refusal(tmp_path, header, body) == ("format", observed)


def test_what_just_fits(tmp_path: Path) -> None:
    assert read(tmp_path, {"a": tensor([1] * 64, 0, 1)}, 1)
    assert read(tmp_path, {"a": tensor([], 0, 1)}, 1)
    assert read(tmp_path, {"n" * 1000: tensor([1], 0, 1)}, 1)
    assert read(tmp_path, b"{}", 0) == []


def test_a_file_that_is_shorter_than_its_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(7))
    with FileIO(str(path)) as file, pytest.raises(UnreadableError, match="it is 7 bytes long, shorter than"):
        read_header(file, 7, path.name)
    assert refusal(tmp_path, b"{}", 0, length=3) == (
        "format",
        "its header claims 3 bytes, but the file has 10",
    )
    assert refusal(tmp_path, b"", 0)[1] == "it is empty"


def test_what_is_more_than_is_read(tmp_path: Path) -> None:
    kind, observed = refusal(tmp_path, {"n" * 1001: tensor([1], 0, 1)}, 1)
    assert kind == "size"
    assert observed.endswith("is 1,001 characters long, and names of 1,000 are read")
    many = b"{" * 75_000
    assert refusal(tmp_path, many + b"{", 0) == ("size", "its header names more than 75,000 tensors")
    assert refusal(tmp_path, many, 0)[0] == "format"
    large = b" " * (12 * 2**20)
    assert refusal(tmp_path, large + b" ", 0) == (
        "size",
        "its header is 12,582,913 bytes long, and at most 12,582,912 are read",
    )
    assert read(tmp_path, large[:-2] + b"{}", 0) == []


def test_names_are_shown_in_a_hundred_characters() -> None:
    assert shown("a" * 100) == repr("a" * 100)
    assert shown("a" * 101) == repr("a" * 100 + "...")
    assert shown("a\ud800") == "'a?'"


parts = st.sampled_from(
    [
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_magnitude_vector",
        "lora_x",
        "weight",
        "bias",
        "default",
        "q",
        "",
        "\n",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(parts, max_size=7).map(".".join))
def test_the_end_of_a_key_is_what_the_expression_for_whole_keys_says(key: str) -> None:
    found = saved_tensors._LORA.match(key)
    module, end = saved_tensors._ending(key)
    assert (end is None) == (found is None)
    if found is not None and end is not None:
        assert (module, end.part, end.adapter) == (
            found["module"] or "",
            found["part"],
            found["adapter"] or "",
        )
        assert end.is_cut == (found["kind"] is None and found["part"] in ("lora_A", "lora_B"))


odd = st.sampled_from([0, 1, 2, 8, -1, 2**63, 2.0, True, None, "8", [8]])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["U8", "F32", "F4", "none", 3, None]),
        "shape": st.lists(odd, max_size=3) | odd,
        "data_offsets": st.lists(odd, min_size=1, max_size=3) | odd,
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), entries | odd, max_size=2))
def test_headers_that_are_taken_at_once_are_those_of_which_each_tensor_is_sound(
    named: dict[str, Any],
) -> None:
    try:
        one_by_one = [header._stored(name, value, 8, "file") for name, value in named.items()]
    except UnreadableError:
        one_by_one = None
    assert header._all_stored(named, 8) == one_by_one


SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("wrong", "at_once"),
    [
        ({}, True),
        ({"dtype": "F8"}, False),
        ({"dtype": ["F32"]}, False),
        ({"dtype": None}, False),
        ({"shape": [2.0]}, False),
        ({"shape": [True, 2]}, False),
        ({"shape": 2}, False),
        ({"shape": [3]}, False),
        ({"data_offsets": [0]}, False),
        ({"data_offsets": [0, 4, 8]}, False),
        ({"data_offsets": [-8, 0]}, False),
        ({"data_offsets": [8, 0]}, False),
        ({"data_offsets": [0, 8.0]}, False),
        ({"data_offsets": None}, False),
    ],
)
def test_tensors_are_taken_at_once_where_nothing_is_wrong_with_any(wrong: Any, at_once: bool) -> None:
    found = header._all_stored({"a": {**SOUND, **wrong}, "b": SOUND}, 100)
    assert found == ([("a", "F32", (2,), 100, 108), ("b", "F32", (2,), 100, 108)] if at_once else None)


def test_no_more_is_taken_at_once_than_names_and_empty_tensors_may_be() -> None:
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]}
    longest = "n" * header.MAX_NAME
    assert header._all_stored({longest: empty}, 0) == [(longest, "F32", (0, 5), 8, 8)]
    assert header._all_stored({f"{longest}n": empty}, 0) is None
    assert header._all_stored({}, 0) == []
