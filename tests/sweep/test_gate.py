"""The gate on a locked rank."""

from __future__ import annotations

import pytest

from pytest_lora import LoraHealthError, Report, SweepResult, assert_rank_suffices
from pytest_lora.facts.figures import RankSweep
from pytest_lora.sweep.rows import Failure, TrialRow


def result(
    values: dict[int, list[float | None]], before: float | None = 0.5, maximise: bool = True
) -> SweepResult:
    trials = tuple(
        TrialRow(rank, 2 * rank, seed, metric=value)
        if value is not None
        else TrialRow(rank, 2 * rank, seed, failure=Failure("out of memory", "much", "take less"))
        for rank, metrics in values.items()
        for seed, value in enumerate(metrics)
    )
    return SweepResult("accuracy", maximise, before, trials, {}, {})


def test_a_rank_that_suffices() -> None:
    report = assert_rank_suffices(result({4: [0.6], 8: [0.9], 16: [0.91]}), 8)
    assert str(report) == "rank 8 for accuracy: healthy"
    assert_rank_suffices(result({8: [0.6]}), 8)


def test_a_rank_that_no_longer_suffices() -> None:
    with pytest.raises(LoraHealthError) as failure:
        assert_rank_suffices(result({4: [0.70, 0.72], 8: [0.88, 0.90], 16: [0.90, 0.92]}), 4)
    assert str(failure.value) == (
        "LORA940: rank 4 for accuracy: 1 error\n"
        "\n"
        "error[LORA940]: rank no longer suffices\n"
        "  --> r=4 of a sweep over r=4, r=8, r=16\n"
        "  observed: accuracy is 0.71 +- 0.014 at r=4 and 0.91 +- 0.014 at r=16, 51.2 % of the best, counted from 0.5 "
        "before\n"
        "  expected: at least 95 % of the best\n"
        "  fix:      r=8 has 95.1 %: lock that, or look at what changed in the data"
    )
    assert_rank_suffices(
        result({4: [0.70], 8: [0.88], 16: [0.90]}), 4, metric_share=0.5
    )  # 0.5, but for rounding


@pytest.mark.parametrize(
    ("sweep", "observed"),
    [
        (result({4: [0.9], 8: [None]}), "no trial of this rank has a metric: out of memory: much; take less"),
        (result({4: [0.4], 8: [0.5]}), "no rank is better than the 0.5 before training"),
        (
            result({4: [-1.0], 8: [0.5]}, None),
            "the metric before training is not known, and not all metrics are",
        ),
    ],
)
def test_what_cannot_be_judged_does_not_pass(sweep: SweepResult, observed: str) -> None:
    with pytest.raises(LoraHealthError, match="LORA941") as failure:
        assert_rank_suffices(sweep, 8)
    assert observed in str(failure.value)


def test_bad_arguments() -> None:
    sweep = result({4: [0.9], 8: [0.9]})
    with pytest.raises(ValueError, match=r"^rank: r=16 was not measured; the sweep has 4, 8$"):
        assert_rank_suffices(sweep, 16)
    with pytest.raises(TypeError, match=r"^rank must be a whole number, not 8\.0$"):
        assert_rank_suffices(sweep, 8.0)
    with pytest.raises(
        ValueError, match=r"^rank: 8: it cannot be read \(No such file or directory\); write it with"
    ):
        assert_rank_suffices(sweep, "8")
    with pytest.raises(
        TypeError, match=r"^result must be a SweepResult, a RankLock or the path of one, not \{\}$"
    ):
        assert_rank_suffices({}, 8)
    with pytest.raises(
        ValueError, match=r"^metric_share must be a finite number above 0 and at most 1, not 95"
    ):
        assert_rank_suffices(sweep, 8, metric_share=95)


def test_the_report_shows_the_whole_sweep() -> None:
    report = assert_rank_suffices(result({4: [0.6, 0.7], 8: [0.9, 0.9], 16: [None]}), 8)
    (shown,) = Report.from_json(report.to_json()).figures
    assert isinstance(shown, RankSweep)
    assert (shown.metric, shown.maximise, shown.chosen) == ("accuracy", True, 8)
    assert shown.enough == pytest.approx(0.5 + 0.95 * (0.9 - 0.5))
    assert [(trial.rank, trial.metric, trial.problem) for trial in shown.trials] == [
        (4, pytest.approx(0.65), ""),
        (8, 0.9, ""),
        (16, None, "out of memory: much; take less"),
    ]
    assert (
        shown.reasons[0]
        == "r=8 (not told apart from r=4 over 2 seeds): it has 100 % of the best, no smaller rank has enough, "
        "and no larger one was measured"
    )
