"""YAML with lines: what is read, what is repeated, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.inspection.recipe import yaml_file
from pytest_lora.inspection.recipe.yaml_file import BrokenError, Node, _size, read_yaml


def test_values_are_those_of_yaml_1_1() -> None:
    file = read_yaml(
        b"rate: 1e-4\ndotted: 1.0e-4\nno: no\nnull: ~\ncount: 1_000\nquoted: '8'\nlist: [1, two]\n"
    )
    assert file.root.unwrapped() == {
        "rate": "1e-4",
        "dotted": 0.0001,
        "no": False,
        "null": None,
        "count": 1000,
        "quoted": "8",
        "list": [1, "two"],
    }
    assert file.root.lines["quoted"] == 6


def test_repeated_keys_are_named_with_both_lines_and_the_last_counts() -> None:
    file = read_yaml(b"r: 64\nalpha: 8\nr: 8\n")
    (one,) = file.repeated
    assert (one.key, one.first, one.last, one.first_text, one.last_text) == ("r", 1, 3, "r: 64", "r: 8")
    assert file.root.unwrapped()["r"] == 8


def test_merged_keys_are_overridden_and_not_repeated() -> None:
    file = read_yaml(b"a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  p: 3\nc:\n  p: 4\n  <<: [*x]\n")
    assert file.repeated == []
    assert file.root.unwrapped()["b"] == {"p": 3, "q": 2}
    assert file.root.unwrapped()["c"] == {"p": 4, "q": 2}


BOMB = b"a: &a [1, 1]\n" + b"".join(
    b"b%d: &b%d [*%s, *%s, *%s]\n" % (i, i, *([b"a" if i == 0 else b"b%d" % (i - 1)] * 3)) for i in range(40)
)


@pytest.mark.parametrize(
    ("data", "kind", "line"),
    [
        (b"a:\n\tb: 1\n", "tab", 2),
        (b"a: [1\nb: 2\n", "syntax", 2),
        (b"a: \xff", "syntax", 1),
        (b"x: 1\na: !!python/object/apply:os.system ['true']\n", "tag", 2),
        (b"a: !!python/name:os.system x\n", "tag", 1),
        (b"[" * 5000, "limit", 1),
        (b"a: " + b"x" * 300_000, "limit", 1),
        (b"a: *nowhere\n", "syntax", 1),
        (b"a: &a [*a]\n", "limit", 1),
        (BOMB, "limit", 9),
    ],
)
def test_what_is_no_yaml_is_a_flaw_with_its_line(data: bytes, kind: str, line: int) -> None:
    with pytest.raises(BrokenError) as error:
        read_yaml(data)
    assert (error.value.flaw.kind, error.value.flaw.line) == (kind, line)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(-1e6, 1e6),
    st.text("abc01:-#'\" \n.~é", max_size=8),
    st.sampled_from(["no", "1e-4", "0x1F", "017", "1_000", "2001-01-01", "null", "~", "<<", "="]),
)
names = st.text("abc_-01 ", min_size=1, max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=20)
@given(st.dictionaries(names, values, max_size=4), st.booleans())
def test_what_pyyaml_writes_is_read_as_it_was(data: dict[str, Any], flow: bool) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow, allow_unicode=True)
    file = read_yaml(text.encode())
    assert file.root.unwrapped() == yaml.safe_load(text) == data
    assert file.repeated == []
    if not flow:
        assert all(
            file.lines[line - 1].lstrip("? ")[:1] in (name[0], "'", '"')
            for name, line in file.root.lines.items()
        )


def flaw(data: bytes) -> tuple[str, int, str]:
    with pytest.raises(BrokenError) as error:
        read_yaml(data)
    return error.value.flaw.kind, error.value.flaw.line, error.value.flaw.message


def test_a_depth_of_32_is_read_and_one_of_33_is_a_flaw() -> None:
    assert read_yaml(b"[" * 33 + b"]" * 33).root.items
    assert flaw(b"[" * 34 + b"]" * 34) == ("limit", 1, "nested deeper than 32 levels")


def test_two_hundred_aliases_are_read_and_one_more_is_a_flaw() -> None:
    assert read_yaml(b"a: &a 1\nb: [" + b"*a, " * 200 + b"]").root.pairs
    assert flaw(b"a: &a 1\nb: [" + b"*a, " * 201 + b"]") == ("limit", 2, "more than 200 aliases")


def test_so_many_bytes_are_read_and_one_more_is_a_flaw() -> None:
    long = b"a: " + b"x" * (256 * 1024 - 4) + b"\n"
    assert read_yaml(long).root.unwrapped()
    assert flaw(long + b"\n") == ("limit", 1, "the file has 262145 bytes, more than 262144")


def test_so_many_values_are_read_and_one_more_is_a_flaw() -> None:
    assert read_yaml(b"[" + b"1,\n" * 19_999 + b"]").root.items
    assert flaw(b"[" + b"1,\n" * 20_000 + b"]") == ("limit", 20_000, "more than 20000 values")


def test_values_that_aliases_stand_for_count() -> None:
    # 105 values and those given stand before the aliases, and each of these stands for a hundred and one.
    many = b"a: &a [" + b"1, " * 100 + b"]\nb: ["
    assert read_yaml(many + b"1, " * 99 + b"*a, " * 196 + b"]").root.pairs
    told = ("limit", 2, "aliases that stand for more than 20000 values")
    assert flaw(many + b"1, " * 100 + b"*a, " * 196 + b"]") == told


def test_flaws_lie_in_the_lines_around() -> None:
    assert flaw(b"a: 1\nb:\n\t- 1\n")[:2] == ("tab", 3)
    assert flaw(b"a: 1\n\tb: [1\n")[:2] == ("tab", 2)
    kind, line, problem = flaw(b"a: 1\n\nb: [1\nc: 2\n")
    assert (kind, line) == ("syntax", 4)
    assert "expected ',' or ']'" in problem
    assert flaw(b"a: 1\n@: 2\nb:\n\tc: 3\n")[:2] == (
        "syntax",
        2,
    )  # a tab two lines below is not what is wrong
    assert flaw(b"\n\na: \xff\n") == ("syntax", 3, "byte 5 is not UTF-8")
    assert flaw(b"a: 1\nb: *nowhere\n")[:2] == ("syntax", 2)
    assert read_yaml(b"\xef\xbb\xbfa: 1\n").root.unwrapped() == {"a": 1}
    kind, line, problem = flaw(b"b: 1\na: \x00\n")
    assert (kind, line) == ("syntax", 1)  # the parser does not say where
    assert problem.startswith("unacceptable character #x0000")
    assert read_yaml(b"").root == Node(1)
    assert read_yaml(b"a: 1\n---\nb: 2\n").root.unwrapped() == {"a": 1}


@pytest.mark.parametrize("loader", [yaml.SafeLoader, yaml_file._LOADER])
def test_a_tab_is_told_in_its_line_by_either_parser(monkeypatch: pytest.MonkeyPatch, loader: Any) -> None:
    monkeypatch.setattr(yaml_file, "_LOADER", loader)
    assert flaw(b"a: 1\nb:\n\t- 1\nc: 2\nd: 3\n")[:2] == ("tab", 3)
    assert flaw(b"a: 1\n\nb: 2\nc:\n  -\tx: 1\n\ty: 2\nd: 3\n")[:2] == ("tab", 6)
    if loader is yaml.SafeLoader:  # libyaml reads a tab between two members as a space
        assert flaw(b"a: 1\nb: 2\nc: [1,\t2]\nd: 3\ne: 4\n")[:2] == ("tab", 3)


def test_keys_that_were_merged_and_stand_twice_are_repeated_once() -> None:
    file = read_yaml(b"a: &x {p: 1}\nb:\n  <<: *x\n  p: 3\n  p: 4\n")
    assert [(one.key, one.first, one.last) for one in file.repeated] == [("p", 4, 5)]
    assert file.root.pairs is not None
    assert file.root.pairs["b"].lines == {"p": 5}
    merged = read_yaml(b"a: &x\n  p: 1\nb:\n  <<: *x\n  q: 2\n").root.pairs
    assert merged is not None
    assert merged["b"].lines == {"p": 2, "q": 5}


@pytest.mark.parametrize(("limit", "counted"), [(5, 4), (4, 4), (3, 4), (2, 3), (0, 1)])
def test_values_are_counted_to_one_above_a_limit(limit: int, counted: int) -> None:
    assert _size(Node(1, 1, items=[Node(2, 1), Node(3, 1), Node(4, 1)]), limit) == counted
