"""The sweep under pytest: the fixture, the option, and the gate in the summary."""

from __future__ import annotations

import pytest

SWEEP = """
import pytest
from torch import nn
from pytest_lora import assert_rank_suffices
from tests.sweep import toys

@pytest.fixture(scope="session")
def lora_base_model():
    return toys.make_model()

@pytest.mark.lora(target_modules=["0"])
def test_ranks(lora_rank_sweep, lora_base_model):
    before = {name: value.clone() for name, value in lora_base_model.state_dict().items()}
    result = lora_rank_sweep(toys.train, toys.evaluate, fraction=1.0, epochs=3)
    assert all((before[name] == value).all() for name, value in lora_base_model.state_dict().items())
    assert [row.trainable for row in result.trials] == [24 * row.rank for row in result.trials]
    print("RANKS", [row.rank for row in result.rows], [str(row.failure) for row in result.failed])
    assert [row.rank for row in lora_rank_sweep(toys.train, toys.evaluate, ranks=[3]).rows] == [3]

def test_gate():
    from pytest_lora.sweep.rows import TrialRow
    from pytest_lora import SweepResult
    trials = (TrialRow(4, 8, 0, metric=0.7), TrialRow(8, 16, 0, metric=0.9))
    assert_rank_suffices(SweepResult("accuracy", True, 0.5, trials, {}, {}), 4)
"""


@pytest.mark.parametrize(
    ("args", "ranks"),
    [((), "[4, 8, 16]"), (("--lora-ranks", "2, 1"), "[1, 2]"), (("-o", "lora_ranks=1,5"), "[1, 5]")],
)
def test_the_fixture_sweeps_the_ranks_of_the_option(
    pytester: pytest.Pytester, args: tuple[str, ...], ranks: str
) -> None:
    pytester.makepyfile(test_it=SWEEP)
    outcome = pytester.runpytest_inprocess("-s", "test_it.py::test_ranks", *args)
    outcome.assert_outcomes(passed=1)
    outcome.stdout.fnmatch_lines([f"*RANKS {ranks.replace('[', '[[]')} [[]]"])


def test_a_rank_that_no_longer_suffices_is_in_the_summary(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=SWEEP)
    outcome = pytester.runpytest_inprocess("test_it.py::test_gate")
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(
        [
            "E   *error[[]LORA940[]]: rank no longer suffices",
            "rank 4 for accuracy: healthy in 0 of 1 test",
            "LORA940 error   rank no longer suffices  1 finding in 1 test",
        ]
    )


@pytest.mark.parametrize("ranks", ["4,x", "0", "4,4", "4,,8", "-1"])
def test_ranks_that_are_none_are_a_usage_error(pytester: pytest.Pytester, ranks: str) -> None:
    pytester.makepyfile(test_it=SWEEP)
    outcome = pytester.runpytest_inprocess(f"--lora-ranks={ranks}")
    assert outcome.ret == pytest.ExitCode.USAGE_ERROR
    outcome.stderr.fnmatch_lines(
        [f"ERROR: --lora-ranks: '{ranks}' are no ranks; write different ones, as in 4,8,16"]
    )
