"""Rank by rate: each rank at its own best rate, what is said of the grid, and fewer runs by halving."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from pytest_lora import SweepResult, rank_sweep
from pytest_lora.facts.sweep import percent, rate_text
from pytest_lora.sweep import TrainOn, TrialPlan
from pytest_lora.sweep.evidence import more_is_better
from pytest_lora.sweep.halving import budgets, going_on
from pytest_lora.sweep.rows import Failure, TrialRow, outcomes
from tests.sweep import toys

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def sweep(train: Any, evaluate: Any = toys.evaluate, **more: Any) -> SweepResult:
    given = {"ranks": (2, 4), "config": toys.CONFIG, "progress": False, "learning_rates": RATES}
    return rank_sweep(toys.make_model, train, evaluate, **given | more)


def test_every_rank_is_trained_at_every_rate_and_compared_at_its_best() -> None:
    result = sweep(TrainOn(toys.data(), loss_fn=toys.loss), fraction=0.2, seeds=2)
    assert [(row.rank, row.learning_rate, row.seed) for row in result.trials] == [
        (rank, rate, seed) for rank in (2, 4) for rate in RATES for seed in (0, 1)
    ]
    assert len({row.losses[-1] for row in result.trials}) == 16
    for row in result.rows:
        means = {rate.learning_rate: rate.metric for rate in row.rates}
        assert row.metric == max(means.values())
        assert row.learning_rate == max(means, key=means.get)
        assert row.step == 2 * row.learning_rate
    table = result.table().splitlines()
    assert table[0].startswith("metric by rank, each at its best rate (more is better, ")
    assert table[0].endswith(" before training; 2 seeds; alpha 2 r)")
    assert table[1].split()[:5] == ["rank", "rate", "rate", "x", "scaling"]
    assert table[2].split()[:3] == ["2", "0.03", "0.06"]
    assert result.choose().headline.startswith("r=4 at 0.03 (the largest rate tried: try 0.09")
    assert result.settings["learning_rates"] == "1e-3, 3e-3, 0.01, 0.03"
    assert SweepResult.from_json(result.to_json()) == result


def test_alpha_tied_to_the_rank_or_fixed() -> None:
    def scalings(**more: Any) -> list[tuple[float, float | None]]:
        rows = sweep(toys.train, learning_rates=(1e-3,), **more).rows
        return [(row.alpha, row.scaling) for row in rows]

    assert scalings() == [(4, 2), (8, 2)]
    assert scalings(alpha=16) == [(16, 8), (16, 4)]
    stabilised = scalings(config=LoraConfig(target_modules=["0"], use_rslora=True))
    assert stabilised == [(4, pytest.approx(4 / 2**0.5)), (8, 4)]


def test_a_train_that_does_not_look_at_the_rate_is_found_out() -> None:
    unsettled = sweep(toys.train).choose().unsettled
    assert (
        "several rates gave the same numbers to the last digit at r=2, r=4: does train use plan.learning_rate?"
        in unsettled
    )


def test_a_rate_that_fails_for_one_seed_is_not_the_best() -> None:
    def row(rate: float, seed: int, metric: float | None) -> TrialRow:
        failure = None if metric is not None else Failure("diverged", "loss 3 of 9 is nan", "lower it")
        return TrialRow(8, 16, seed, metric=metric, learning_rate=rate, failure=failure)

    rows = [row(1e-3, 0, 0.8), row(1e-3, 1, 0.8), row(1e-2, 0, 0.9), row(1e-2, 1, None), row(1e-1, 0, None)]
    (one,) = outcomes(rows)
    assert (one.learning_rate, one.metric, one.failures) == (1e-3, 0.8, ())
    assert [rate.metric for rate in one.rates] == [0.8, 0.9, None]
    assert outcomes(rows, maximise=False)[0].learning_rate == 1e-3
    (none,) = outcomes(rows[-1:])
    assert (none.metric, none.learning_rate, len(none.failures)) == (None, None, 1)


# --------------------------------------------------------------------------------------------------- halving


@pytest.mark.parametrize(
    ("rates", "factor", "wanted"),
    [(1, 2, [1]), (2, 2, [1 / 2, 1]), (3, 4, [1 / 4, 1]), (4, 4, [1 / 4, 1]), (4, 2, [1 / 4, 1 / 2, 1])],
)
def test_rounds(rates: int, factor: int, wanted: list[float]) -> None:
    assert list(budgets(rates, factor)) == wanted


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9, unique=True), st.integers(2, 4), st.booleans())
def test_the_best_one_in_so_many_goes_on(metrics: list[float], factor: int, maximise: bool) -> None:
    pytest.importorskip("optuna")
    by_rate = dict(enumerate(metrics, 1))
    best = sorted(metrics, reverse=maximise)[: max(1, len(metrics) // factor)]
    assert going_on(by_rate, factor, maximise) == tuple(r for r, metric in by_rate.items() if metric in best)


def test_halving_takes_half_the_steps_and_is_resumed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna = pytest.importorskip("optuna")
    level = optuna.logging.get_verbosity()

    def train(model: nn.Module, plan: TrialPlan) -> list[float]:
        with (tmp_path / "log").open("a") as log:
            log.write(f"{plan.rank} {plan.learning_rate} {plan.seed} {plan.budget} {plan.fraction}\n")
        return [1.0] * len(plan.share(range(100)))

    def fit(model: nn.Module) -> float:
        *_, last = (
            (tmp_path / "log").read_text().split("\n")[:-1] if (tmp_path / "log").exists() else ["0 1 0 0 0"]
        )
        return -abs(float(last.split()[1]) - 1e-2)

    first = sweep(train, fit, fraction=0.8, halving=4, journal=tmp_path / "j")
    assert sum(len(row.losses) for row in first.trials) == 2 * (4 * 20 + 80)  # of 2 * 4 * 80
    assert [(row.rank, row.learning_rate, row.budget) for row in first.rows[0].rates and first.trials] == [
        *((2, rate, budget) for rate in RATES for budget in ((0.25, 1.0) if rate == 1e-2 else (0.25,))),
        *((4, rate, budget) for rate in RATES for budget in ((0.25, 1.0) if rate == 1e-2 else (0.25,))),
    ]
    assert [row.learning_rate for row in first.rows] == [1e-2, 1e-2]
    assert any(
        said
        == "3 of 4 rates of r=2 were dropped after 25 % of the training, and short trainings favour large rates"
        for said in first.choose().unsettled
    )
    again = sweep(train, fit, fraction=0.8, halving=4, seeds=2, journal=tmp_path / "j")
    assert len((tmp_path / "log").read_text().splitlines()) == 10 + 2  # the second seed, at full length alone
    assert [row for row in again.trials if row.seed == 0] == list(first.trials)
    assert optuna.logging.get_verbosity() == level
    assert "study" not in capfd.readouterr().err


def test_a_train_that_does_not_look_at_its_share_is_found_out() -> None:
    rows = [
        TrialRow(rank, 2 * rank, 0, metric=rate, losses=(1.0,) * steps, learning_rate=rate, budget=budget)
        for rank in (4, 8)
        for rate, budget, steps in ((1e-3, 0.25, 40), (3e-3, 0.25, 40), (3e-3, 1.0, 40))
    ]
    said = "the short trainings had as many steps as the full ones: does train use plan.share?"
    assert said in SweepResult("fit", True, 0.0, tuple(rows), {}, {}).choose().unsettled
    shorter = tuple(dataclasses.replace(row, losses=row.losses[: int(40 * row.budget)]) for row in rows)
    assert said not in SweepResult("fit", True, 0.0, shorter, {}, {}).choose().unsettled


def test_a_rank_whose_rates_all_fail_early_is_a_failed_row() -> None:
    pytest.importorskip("optuna")

    def train(model: nn.Module, plan: TrialPlan) -> list[float]:
        return [float("nan")] if plan.rank == 2 else [1.0]

    result = sweep(train, halving=4)
    assert [(row.rank, row.metric is None, len(row.failures)) for row in result.rows] == [
        (2, True, 4),
        (4, False, 0),
    ]
    assert "r=2 at 1e-3, seed 0: diverged" in result.table()


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"^halving needs Optuna: pip install 'pytest-lora\[optuna\]'$"):
        sweep(toys.train, halving=4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"learning_rates": 1e-3},
            TypeError,
            r"learning_rates must be numbers such as \(1e-4, 3e-4, 1e-3\), not 0.001",
        ),
        (
            {"learning_rates": ()},
            ValueError,
            "learning_rates must not be empty; None sweeps over ranks alone",
        ),
        ({"learning_rates": (1e-3, 1e-3)}, ValueError, "learning_rates must differ, but 1e-3 is there twice"),
        ({"learning_rates": (0,)}, ValueError, "learning_rates must be a finite number above 0, not 0"),
        ({"learning_rates": ("1e-3",)}, TypeError, "learning_rates must be a number, not '1e-3'"),
        ({"halving": 1}, ValueError, "halving must be at least 2, not 1"),
        (
            {"halving": 2, "learning_rates": (1e-3,)},
            ValueError,
            "halving drops learning rates, of which there must be",
        ),
        (
            {"alpha": 16, "alpha_ratio": 1},
            ValueError,
            "alpha fixes what alpha_ratio ties to the rank; give one",
        ),
        ({"alpha": 0}, ValueError, "alpha must be a finite number above 0 .*, not 0"),
        ({"version": 1}, TypeError, "version must be text, not 1"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        sweep(toys.train, **given)


# --------------------------------------------------------------------------------------------- numbers and names


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-3, "1e-3"), (2.5e-5, "2.5e-5"), (0.03, "0.03"), (3e-4, "3e-4"), (1.0, "1")]
)
def test_rates_are_written_as_people_write_them(rate: float, text: str) -> None:
    assert rate_text(rate) == text
    assert float(text) == rate


@given(st.floats(0.5, 1.5), st.floats(0.5, 1.0))
def test_a_share_is_printed_on_its_side_of_the_limit(share: float, limit: float) -> None:
    printed = float(percent(share, limit).removesuffix(" %")) / 100
    if abs(share - limit) > 1e-9:
        assert (printed > limit) == (share > limit) or abs(printed - limit) < 1e-11
    assert abs(printed - share) < 0.01


@pytest.mark.parametrize(
    ("metric", "more"),
    [
        *(
            (name, False)
            for name in ("loss", "eval_loss", "eval/loss", "Perplexity", "valLoss", "wer", "rmse")
        ),
        *(
            (name, True)
            for name in ("accuracy", "eval_f1", "rougeL", "rouge1", "exact-match/em", "rewards/mean")
        ),
        *((name, None) for name in ("metric", "fit", "explained", "closs", "loss and accuracy", "")),
    ],
)
def test_what_a_name_says(metric: str, more: bool | None) -> None:
    assert more_is_better(metric) is more


def test_the_direction_follows_the_name_unless_it_is_given() -> None:
    for metric, given_direction, wanted in (("loss", None, False), ("fit", None, True), ("loss", True, True)):
        result = sweep(toys.train, learning_rates=None, ranks=(1,), metric=metric, maximise=given_direction)
        assert result.maximise is wanted
