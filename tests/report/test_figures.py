"""What travels with findings: every figure survives JSON, whatever is in it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.facts.figures import (
    AdapterMap,
    Figure,
    LossCurve,
    MemoryBudget,
    RankSweep,
    RankTrial,
    RatePoint,
    WhatIf,
    from_plain,
    to_plain,
)
from pytest_lora.findings import Finding, Report

WORDS = st.text(max_size=8)
COUNTS = st.integers(0, 10**12)
NUMBERS = st.floats()


@st.composite
def maps(draw: st.DrawFn) -> AdapterMap:
    rows, columns = (tuple(draw(st.lists(WORDS, min_size=1, max_size=4, unique=True))) for _ in range(2))
    size = len(rows) * len(columns)

    def cells(values: st.SearchStrategy[Any]) -> Any:
        return tuple(draw(st.lists(st.none() | values, min_size=size, max_size=size)))

    states = cells(st.sampled_from(["live", "frozen", "idle", "dead", "missing"]))
    measured = draw(st.booleans())
    return AdapterMap(
        draw(WORDS),
        draw(WORDS),
        rows,
        columns,
        states,
        cells(st.integers(1, 512)),
        cells(NUMBERS),
        cells(NUMBERS) if measured else (),
        cells(NUMBERS) if measured else (),
        draw(COUNTS),
        draw(COUNTS),
        draw(st.booleans()),
    )


CURVES = st.builds(
    LossCurve,
    title=WORDS,
    steps=st.lists(COUNTS, max_size=5).map(tuple),
    losses=st.lists(NUMBERS, max_size=5).map(tuple),
    eval_steps=st.lists(COUNTS, max_size=2).map(tuple),
    eval_losses=st.lists(NUMBERS, max_size=2).map(tuple),
    window=st.tuples(COUNTS, COUNTS),
    before=st.none() | NUMBERS,
    after=st.none() | NUMBERS,
    wanted=st.none() | st.floats(0, 1),
)
BUDGETS = st.builds(
    MemoryBudget,
    title=WORDS,
    breakdown=st.lists(st.tuples(WORDS, COUNTS), max_size=3).map(tuple),
    peak_allocated=COUNTS,
    peak_reserved=COUNTS,
    budget=COUNTS,
    peak_at=WORDS,
    what_if=st.lists(st.builds(WhatIf, WORDS, COUNTS, st.booleans()), max_size=3).map(tuple),
    measured=st.none() | COUNTS,
)
TRIALS = st.builds(
    RankTrial,
    rank=st.integers(1, 64),
    metric=st.none() | NUMBERS,
    spread=st.none() | NUMBERS,
    seconds=NUMBERS,
    flops=st.none() | NUMBERS,
    peak_bytes=st.none() | COUNTS,
    trainable_parameters=COUNTS,
    problem=WORDS,
    rate=st.none() | NUMBERS,
    rates=st.lists(
        st.builds(RatePoint, NUMBERS, st.none() | NUMBERS, st.none() | NUMBERS, st.booleans()), max_size=3
    ).map(tuple),
)
SWEEPS = st.builds(
    RankSweep,
    title=WORDS,
    metric=st.sampled_from(["accuracy", "nan"]),
    maximise=st.booleans(),
    trials=st.lists(TRIALS, max_size=3).map(tuple),
    chosen=st.none() | st.integers(1, 64),
    reasons=st.lists(WORDS, max_size=2).map(tuple),
    enough=st.none() | NUMBERS,
)


@given(maps() | CURVES | BUDGETS | SWEEPS)
def test_every_figure_survives_strict_json(figure: Figure) -> None:
    text = json.dumps(to_plain(figure), allow_nan=False)
    back = from_plain(json.loads(text))
    assert type(back) is type(figure)
    assert repr(back) == repr(figure)  # NaN is not equal to itself


def test_a_uniform_map_is_small_and_a_full_one_still_fits() -> None:
    rows = tuple(f"model.layers.{n}" for n in range(80))
    columns = tuple(f"self_attn.m{n}_proj" for n in range(7))
    size = len(rows) * len(columns)
    same = AdapterMap("b", "a", rows, columns, ("live",) * size, (16,) * size, (2.0,) * size, (), (), 1, 2)
    norms = tuple(float(f"{math.sin(n) ** 2:.4g}") for n in range(size))
    full = AdapterMap(
        "b", "a", rows, columns, ("live",) * size, (16,) * size, (2.0,) * size, norms, norms, 1, 2
    )
    assert len(json.dumps(to_plain(same))) < 2_200
    assert len(json.dumps(to_plain(full))) < 17_000
    assert same.column(columns[3], tuple(range(size)))[:2] == (3, 10)


def test_a_report_carries_them_and_old_json_still_reads() -> None:
    finding = Finding("LORA203", "adapter_left_merged", "error", "here", "seen", "wanted", "mend")
    curve = LossCurve("run", (0, 1), (math.nan, 1.0), (), (), (0, 2), 2.0, 1.0, 0.01)
    report = Report("model", (finding,), (curve,))
    assert repr(Report.from_json(report.to_json()).figures) == repr((curve,))
    assert Report.from_json(report.without_figures().to_json()) == Report("model", (finding,))
    assert "figures" not in report.without_figures().to_json()
    old = json.dumps({"subject": "model", "ok": False, "findings": [asdict(finding)]})
    assert Report.from_json(old) == Report("model", (finding,))
    assert report.with_findings(()) == Report("model", (), (curve,))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(
        ValueError, match="there is no figure of kind 'pie'; known are adapter_map, loss_curve"
    ):
        from_plain({"kind": "pie"})


@pytest.mark.parametrize(
    ("before", "after", "drop"),
    [(2.0, 1.0, 0.5), (1.0, 1.5, -0.5), (0.0, 1.0, None), (None, 1.0, None), (math.nan, 1.0, None)],
)
def test_drop(before: float | None, after: float | None, drop: float | None) -> None:
    assert LossCurve("run", (), (), (), (), (0, 1), before, after, None).drop == drop
