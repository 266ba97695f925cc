"""YAML with lines: what is read, what is repeated, and what is refused."""

from __future__ import annotations

import pytest

from pytest_lora.inspection.recipe.yaml_file import BrokenError, read_yaml


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
