"""The choice of a rank: the rules of practitioners, exact for every kind of metric."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pytest_lora.sweep.choice import RankChoice, choose
from pytest_lora.sweep.rows import Failure, RankOutcome, TrialRow, outcomes
from pytest_lora.sweep.verdicts import metric_shares

SECONDS = {4: 98.9, 8: 99.3, 16: 100.0}


def rows(values: dict[int, list[float]], seconds: dict[int, float] | None = None) -> tuple[RankOutcome, ...]:
    return outcomes(
        TrialRow(rank, 2 * rank, seed, metric=value, seconds=(seconds or {}).get(rank))
        for rank, metrics in values.items()
        for seed, value in enumerate(metrics)
    )


def chosen(values: dict[int, float], before: float | None = None, maximise: bool = True) -> RankChoice:
    return choose(rows({r: [v] for r, v in values.items()}), before=before, maximise=maximise)


@pytest.mark.parametrize("before", [None, 0.0, 25.0, 50.0, 80.0, 90.0])
def test_stops_where_doubling_stops_paying(before: float | None) -> None:
    """92 -> 94 -> 94.1 chooses the middle, whatever the metric was before training."""
    assert chosen({4: 92.0, 8: 94.0, 16: 94.1}, before).rank == 8


def test_the_smallest_rank_with_enough() -> None:
    assert chosen({4: 94.0, 8: 94.1, 16: 94.2}).rank == 4
    assert chosen({4: 60.0, 8: 94.0, 16: 94.2}).rank == 8
    assert chosen({4: 0.60, 8: 0.70, 16: 0.95}, 0.5).rank == 16


def test_no_gain_pays_nothing_even_where_nothing_is_asked_for() -> None:
    choice = choose(rows({4: [0.5], 8: [0.5], 16: [0.5]}), before=0.0, maximise=True, min_gain=0.0)
    assert choice.rank == 4


def test_never_nothing_because_of_the_time_rule() -> None:
    choice = choose(rows({4: [92.0], 8: [94.0], 16: [94.1]}, SECONDS), before=50.0, maximise=True)
    assert choice.rank == 8
    time = choice.verdicts[2]
    assert (time.rule, time.rank, time.holds) == ("time", None, False)
    assert time.reason == (
        "r=8 takes 99.3 % of the time of r=16; under 70 % is asked for, which at equal steps hardly any rank does; "
        "it does not decide"
    )


def test_contradicting_rules_are_all_told() -> None:
    seconds = {4: 50.0, 8: 80.0, 16: 100.0}
    choice = choose(rows({4: [92.0], 8: [94.0], 16: [94.1]}, seconds), before=None, maximise=True)
    assert str(choice) == (
        "Choose r=8 (one seed): it has 99.9 % of the best; r=4 has enough too, but doubling pays up to here.\n"
        "  metric    holds          4: 97.8 %, 8: 99.9 %, 16: 100 % of the best metric; 95 % is enough\n"
        "  doubling  holds          4 -> 8 gains 2.13 %, 8 -> 16 gains 0.106 %; a doubling is to gain 1 %\n"
        "  time      does not hold  r=8 takes 80 % of the time of r=16; under 70 % is asked for, as r=4 does; "
        "it does not decide\n"
        "Runner-up r=4: the metric rule alone would take it, with 97.8 % of the best.\n"
        "The evidence does not settle:\n"
        "  - one seed a rank shows no noise: differences between ranks may be chance (seeds=3 or more tells)\n"
        "  - one learning rate for all ranks: a rank that wants another one looks worse than it is "
        "(learning_rates=(...) tells)"
    )


def test_the_time_rule_holds_where_it_can() -> None:
    choice = choose(rows({4: [94.0], 16: [94.1]}, {4: 60.0, 16: 100.0}), before=50.0, maximise=True)
    assert (choice.verdicts[2].rank, choice.verdicts[2].holds) == (4, True)


@pytest.mark.parametrize(
    ("values", "before", "maximise", "shares"),
    [
        ({4: 2.0, 8: 1.0}, 3.0, False, {4: 0.5, 8: 1.0}),  # a loss
        ({4: -100.0, 8: -60.0}, -140.0, True, {4: 0.5, 8: 1.0}),  # a log-likelihood
        ({4: 0.0, 8: 1.0}, -1.0, True, {4: 0.5, 8: 1.0}),  # a correlation, zero in between
        ({4: 0.5, 8: 0.0}, 1.0, False, {4: 0.5, 8: 1.0}),  # an error rate whose best is zero
        ({4: 46.0, 8: 92.0}, 0.0, True, {4: 0.5, 8: 1.0}),  # nothing before: the plain ratio
        ({4: 46.0, 8: 92.0}, None, True, {4: 0.5, 8: 1.0}),
        ({4: 2.0, 8: 1.0}, None, False, {4: 0.5, 8: 1.0}),
        ({4: -2.0, 8: 1.0}, None, True, {}),  # no ratio means anything
        ({4: 1.0, 8: 2.0}, 3.0, True, {}),  # worse than before
    ],
)
def test_shares(
    values: dict[int, float], before: float | None, maximise: bool, shares: dict[int, float]
) -> None:
    assert metric_shares(rows({r: [v] for r, v in values.items()}), before, maximise) == shares


def test_nothing_learned_is_told() -> None:
    choice = chosen({4: 1.0, 8: 1.0}, before=3.0)
    assert choice.rank == 4
    assert choice.verdicts[0].holds is None
    assert (
        "no rank is better than the metric before training: if less is better, say maximise=False; "
        "else look at the training before the rank" in choice.unsettled
    )


def test_noise_is_told_apart_by_seed() -> None:
    """Seeds share the slice: what both ranks have in common is no noise."""
    steady = choose(rows({4: [0.5, 0.7, 0.9], 8: [0.6, 0.8, 1.0]}), before=0.0, maximise=True)
    assert steady.rank == 8
    assert not any("cannot be told apart" in said for said in steady.unsettled)
    noisy = choose(rows({4: [0.5, 0.9, 0.7], 8: [0.6, 0.8, 1.0]}), before=0.0, maximise=True)
    assert noisy.unsettled[0] == (
        "r=8 and r=4 cannot be told apart over 3 seeds: they differ by 0.1, and less than 0.497 may be chance"
    )


def test_a_share_in_doubt_is_told() -> None:
    choice = choose(
        rows({4: [0.97, 0.85, 0.99], 8: [0.97, 0.97, 0.96]}), before=0.0, maximise=True, min_gain=0.1
    )
    assert choice.rank == 4
    assert "95 % of the best lies within the spread of r=4: 96.9 % +- 7.8 %" in choice.unsettled
    wide = choose(rows({4: [0.99, 0.96, 0.99], 8: [0.99, 1.0, 1.0]}), before=0.0, maximise=True)
    assert wide.rank == 8
    tight = choose(rows({4: [0.96, 0.98], 8: [0.99, 0.98]}), before=0.0, maximise=True, min_gain=0.1)
    assert tight.rank == 4
    assert "r=4 may have less than 95 % of the best: it may be as much as 0.206 behind r=8" in tight.unsettled


def test_ends_of_the_sweep_are_told() -> None:
    assert any("r=16 is the largest rank measured" in s for s in chosen({8: 0.5, 16: 0.9}, 0.0).unsettled)
    assert any("r=8 is the smallest rank measured" in s for s in chosen({8: 0.9, 16: 0.9}, 0.0).unsettled)
    assert "one rank only was measured" in chosen({8: 0.9}, 0.0).unsettled


def test_failed_trials_are_told_and_not_chosen() -> None:
    failed = TrialRow(16, 32, 0, failure=Failure("out of memory", "much", "less"))
    done = [TrialRow(4, 8, 0, metric=0.5), TrialRow(8, 16, 0, metric=0.9)]
    choice = choose(outcomes([*done, failed]), before=0.0, maximise=True)
    assert choice.rank == 8
    assert "r=16 lacks 1 of 1 trials (out of memory)" in choice.unsettled
    with pytest.raises(ValueError, match="no trial has a metric\n  r=16: out of memory: much; less"):
        choose(outcomes([failed]), before=0.0, maximise=True)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        (
            {"metric_share": 95},
            ValueError,
            "metric_share must be a finite number above 0 and at most 1, not 95",
        ),
        ({"time_share": 0}, ValueError, "time_share must be a finite number above 0 and at most 1, not 0"),
        ({"min_gain": -1}, ValueError, "min_gain must be a finite number at least 0, not -1"),
        ({"min_gain": math.nan}, ValueError, "min_gain must be a finite number at least 0, not nan"),
        ({"metric_share": "95 %"}, TypeError, "metric_share must be a number, not '95 %'"),
    ],
)
def test_thresholds_out_of_range(setting: dict[str, float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose(rows({4: [1.0]}), before=None, maximise=True, **setting)


METRICS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))
LAW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A machine under load draws slowly."""
SWEEPS = st.dictionaries(
    st.sampled_from([1, 2, 4, 8, 12, 16, 64]), st.lists(METRICS, min_size=1, max_size=4), min_size=1
)
BEFORE = st.none() | METRICS


@LAW
@given(SWEEPS, BEFORE, st.booleans())
def test_there_is_always_a_measured_rank_and_a_text(
    values: dict[int, list[float]], before: float | None, maximise: bool
) -> None:
    choice = choose(rows(values, dict.fromkeys(values, 1.0)), before=before, maximise=maximise)
    assert choice.rank in values
    assert [verdict.rule for verdict in choice.verdicts] == ["metric", "doubling", "time"]
    assert (choice.runner_up is None) == (len(values) == 1)
    assert choice.runner_up != choice.rank
    assert f"r={choice.rank}" in str(choice)


@LAW
@given(SWEEPS, BEFORE, st.booleans())
def test_the_chosen_rank_has_its_share_wherever_shares_mean_something(
    values: dict[int, list[float]], before: float | None, maximise: bool
) -> None:
    choice = choose(rows(values), before=before, maximise=maximise)
    shares = dict(choice.shares)
    if shares:
        assert max(shares.values()) == pytest.approx(1)
        smaller = [r for r in shares if r < choice.rank and shares[r] >= 0.95]
        assert shares[choice.rank] >= 0.95 or choice.verdicts[1].holds
        assert not smaller or choice.verdicts[1].rank == choice.rank


@LAW
@given(SWEEPS, METRICS, st.booleans())
def test_minimising_is_maximising_the_negative(
    values: dict[int, list[float]], before: float, maximise: bool
) -> None:
    negative = {rank: [-value for value in metrics] for rank, metrics in values.items()}
    one = choose(rows(values), before=before, maximise=maximise)
    other = choose(rows(negative), before=-before, maximise=not maximise)
    turned = {"less is": "more is", f"maximise={not maximise}": f"maximise={maximise}"}
    turned = (
        turned if maximise else {"more is": "less is", f"maximise={not maximise}": f"maximise={maximise}"}
    )
    for word, opposite in turned.items():
        said = tuple(text.replace(word, opposite) for text in one.unsettled)
        one = dataclasses.replace(one, unsettled=said)
    assert one == other


@LAW
@given(SWEEPS, METRICS, st.integers(-3, 3))
def test_the_unit_of_the_metric_does_not_matter(
    values: dict[int, list[float]], before: float, power: int
) -> None:
    scaled = {rank: [value * 2.0**power for value in metrics] for rank, metrics in values.items()}
    one = choose(rows(values), before=before, maximise=True)
    other = choose(rows(scaled), before=before * 2.0**power, maximise=True)
    assert (one.rank, one.verdicts, one.shares) == (other.rank, other.verdicts, other.shares)


@LAW
@given(st.lists(METRICS, min_size=2, max_size=4), METRICS)
def test_a_rank_that_gains_nothing_is_not_chosen_over_a_smaller_one(
    metrics: list[float], before: float
) -> None:
    assume(sum(metrics) / len(metrics) > before)
    assert choose(rows({4: metrics, 8: metrics, 16: metrics}), before=before, maximise=True).rank == 4


def test_choice_rows_and_advice_need_no_torch() -> None:
    code = (
        "import sys, pytest_lora.sweep.result, pytest_lora.sweep.advice, pytest_lora.sweep.choice; "
        "print(*{'torch', 'numpy', 'peft', 'matplotlib', 'accelerate'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
