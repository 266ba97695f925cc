"""Baselines compared: directions, tolerances, parts of a session, and files that are none."""

from __future__ import annotations

import contextlib
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.report.baseline import (
    SCHEMA,
    TOLERANCES,
    BaselineError,
    Row,
    compare,
    diff,
    from_json,
    merged,
    table,
    to_json,
    verdict,
)

NUMBERS = st.one_of(st.integers(0, 2**62), st.floats(0, 1e12, allow_nan=False))
CODES = st.lists(st.sampled_from(["LORA104", "LORA203", "LORA316", "LORA502"]), unique=True).map(
    lambda codes: tuple(sorted(codes))
)
NUMERIC = [name for name in TOLERANCES if name != "findings"]
QUANTITIES = st.dictionaries(
    st.sampled_from(NUMERIC).flatmap(
        lambda name: st.sampled_from(["", " of q_proj", " #2"]).map(name.__add__)
    ),
    NUMBERS,
    max_size=4,
)
TESTS = st.builds(
    lambda numbers, codes: {**numbers, "findings": codes},
    QUANTITIES,
    CODES,
)
MEASURED = st.dictionaries(st.text(max_size=4), TESTS, max_size=3)


@settings(max_examples=40)
@given(MEASURED)
def test_what_did_not_change_is_the_same(measured: dict[str, dict[str, object]]) -> None:
    assert {row.verdict for row in compare(measured, measured)} <= {"same"}
    assert not list(diff(measured, measured))


@settings(max_examples=40)
@given(MEASURED)
def test_a_file_holds_what_was_measured(measured: dict[str, dict[str, object]]) -> None:
    assert from_json(to_json(measured)) == measured


@settings(max_examples=40)
@given(MEASURED, st.randoms(use_true_random=False))
def test_the_order_of_tests_and_quantities_is_nothing(
    measured: dict[str, dict[str, object]], chance: random.Random
) -> None:
    def shuffled(mapping: dict[str, object]) -> dict[str, object]:
        return dict(chance.sample(list(mapping.items()), len(mapping)))

    other = shuffled({test: shuffled(found) for test, found in measured.items()})
    assert to_json(other) == to_json(measured)
    assert compare(other, measured) == compare(measured, other)


@settings(max_examples=40)
@given(MEASURED, MEASURED)
def test_an_update_leaves_nothing_to_regress_and_keeps_the_rest(
    before: dict[str, dict[str, object]], now: dict[str, dict[str, object]]
) -> None:
    after = merged(before, now)
    assert {row.verdict for row in compare(after, now)} <= {"same"}
    assert all(after[test] == before[test] for test in before.keys() - now.keys())
    assert merged(after, now) == after
    assert list(after) == sorted(after)


@settings(max_examples=40)
@given(MEASURED, MEASURED)
def test_only_what_ran_is_compared(
    before: dict[str, dict[str, object]], now: dict[str, dict[str, object]]
) -> None:
    rows = compare(before, now)
    assert {row.test for row in rows} == set(now)
    assert {(row.test, row.quantity) for row in rows} == {
        (test, quantity) for test in now for quantity in {*before.get(test, {}), *now[test]}
    }
    assert len(table(rows)) == len(rows) + 1


@given(st.sampled_from(NUMERIC), NUMBERS, NUMBERS)
def test_directions_and_tolerances(quantity: str, before: float, now: float) -> None:
    tolerance = TOLERANCES[quantity]
    got = verdict(quantity, before, now)
    if abs(now - before) <= tolerance.allows(before):
        assert got == "same"
    elif tolerance.worse == "either":
        assert got == "regression"
    else:
        assert got == ("regression" if (now > before) == (tolerance.worse == "up") else "improved")
    # What is better one way is worse the other, unless the tolerance of the larger value covers it.
    if got == "improved":
        assert verdict(quantity, now, before) in ("regression", "same")


@given(CODES, CODES)
def test_new_codes_are_a_regression_and_fewer_are_none(before: tuple[str, ...], now: tuple[str, ...]) -> None:
    got = verdict("findings", before, now)
    assert (got == "regression") == bool(set(now) - set(before))
    assert (got == "same") == (set(now) == set(before))


@pytest.mark.parametrize(
    ("quantity", "before", "now", "expected"),
    [
        ("trainable parameters with default", 1000, 1001, "regression"),
        ("trainable parameters with default", 1000, 999, "regression"),
        ("scaling of q_proj in default", 2.0, 1.0, "regression"),
        ("predicted peak", 100, 102, "same"),
        ("predicted peak", 100, 103, "regression"),
        ("predicted peak", 100, 50, "improved"),
        ("measured peak", 100, 105, "same"),
        ("measured peak", 100, 106, "regression"),
        ("loss drop within 20 steps", 0.5, 0.46, "same"),
        ("loss drop within 20 steps", 0.5, 0.4, "regression"),
        ("loss drop within 20 steps", 0.5, 0.9, "improved"),
        ("loss drop within 20 steps", 0.5, math.nan, "regression"),
        ("loss drop within 20 steps", 0.5, None, "regression"),
        ("loss drop within 20 steps", None, 0.5, "new"),
        ("findings", ("LORA104",), (), "improved"),
        ("findings", ("LORA104",), ("LORA203",), "regression"),
        ("findings", (), 1, "regression"),
    ],
)
def test_verdicts(quantity: str, before: object, now: object, expected: str) -> None:
    assert verdict(quantity, before, now) == expected


def test_the_table_is_side_by_side() -> None:
    rows = [
        Row("test_a.py::test_it", "findings", (), ("LORA104",), "regression"),
        Row("test_a.py::test_it", "predicted peak", 25_000_000_000, 20_000_000_000, "improved"),
        Row("test_b.py::test_it", "loss drop within 20 steps", None, 0.25, "new"),
    ]
    assert table(rows) == [
        "test                quantity                   baseline        now             tolerance     verdict",
        "test_a.py::test_it  findings                   none            LORA104         exact         regression",
        "                    predicted peak             25,000,000,000  20,000,000,000  2 %           improved",
        "test_b.py::test_it  loss drop within 20 steps  -               0.25            10 % or 0.01  new",
    ]


def test_the_diff_names_what_changes() -> None:
    before = {"a": {"findings": ("LORA104",), "predicted peak": 10}, "gone": {"findings": ()}}
    after = {"a": {"findings": (), "predicted peak": 10}, "b": {"predicted peak": 1_000_000}}
    assert list(diff(before, after)) == [
        "a  findings: LORA104 -> none",
        "b  predicted peak: - -> 1,000,000",
        "gone  findings: none -> -",
    ]


def test_a_file_is_sorted_and_has_a_line_a_quantity() -> None:
    text = to_json({"b": {"scaling of q": 2.0}, "a": {"predicted peak": 5, "findings": ("LORA104",)}})
    assert text.splitlines()[1:] == [
        f' "pytest-lora baseline": {SCHEMA},',
        ' "tests": {',
        '  "a": {',
        '   "findings": ["LORA104"],',
        '   "predicted peak": 5',
        "  },",
        '  "b": {',
        '   "scaling of q": 2.0',
        "  }",
        " }",
        "}",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no baseline of pytest-lora"),
        ('{"tests": {}}', "is no baseline of pytest-lora"),
        (
            '{"pytest-lora baseline": 99, "tests": {}}',
            "has version 99, and this pytest-lora reads 1; delete it",
        ),
        ('{"pytest-lora baseline": 1}', 'has no "tests"'),
        ('{"pytest-lora baseline": 1, "tests": {"a": 1}}', 'has no "tests"'),
        (
            '{"pytest-lora baseline": 1, "tests": {"a": {"b": "c"}}}',
            "has 'c' as 'b' of 'a', which is neither",
        ),
        (
            '{"pytest-lora baseline": 1, "tests": {"a": {"b": true}}}',
            "has True as 'b' of 'a', which is neither",
        ),
    ],
)
def test_what_is_no_baseline_says_what_to_do(text: str, message: str) -> None:
    with pytest.raises(BaselineError) as refused:
        from_json(text)
    assert str(refused.value).startswith(message)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["pytest-lora baseline", "tests", "a"]), inner)
        ),
    )
)
def test_any_json_is_read_or_refused(data: object) -> None:
    with contextlib.suppress(BaselineError):
        from_json(json.dumps(data))
