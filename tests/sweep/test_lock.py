"""A locked rank: written whole, read back, compared with what is in use and with what is new."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from pytest_lora import (
    LoraHealthError,
    RankLock,
    SweepResult,
    TrialRow,
    assert_rank_suffices,
    check_rank_suffices,
)
from pytest_lora.sweep.runner import versions
from pytest_lora.sweep.trackers import provenance


def sweep(values: dict[int, float], data: str = "reviews", **more: Any) -> SweepResult:
    trials = tuple(
        TrialRow(rank, 2 * rank, 0, metric=value, losses=(2.0, 1.0), data="40 of 400")
        for rank, value in values.items()
    )
    return SweepResult("accuracy", True, 0.5, trials, {"data": data}, {**versions(), **more})


GOOD = sweep({4: 0.70, 8: 0.90, 16: 0.905})


def codes(*args: Any, **kwargs: Any) -> list[tuple[str, str]]:
    return [(found.code, found.severity) for found in check_rank_suffices(*args, **kwargs).findings]


def test_a_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rank.json"
    lock = GOOD.lock(path)
    assert RankLock.read(path) == lock
    assert os.listdir(path.parent) == ["rank.json"]
    assert (lock.rank, lock.alpha, lock.learning_rate, lock.data) == (8, 16, None, "reviews, 40 of 400")
    written = json.loads(path.read_text())
    assert (written["rank_lock"], written["rank"], written["versions"]) == (1, 8, versions())
    evidence = SweepResult.from_json(lock.evidence)
    assert [row.metric for row in evidence.rows] == [0.70, 0.90, 0.905]
    assert {row.losses for row in evidence.trials} == {()}
    assert str(lock).startswith("r=8, alpha=16: it has 98.8 % of the best")
    assert lock == GOOD.lock(path, choice=GOOD.choose())
    assert GOOD.lock(path, choice=GOOD.choose(min_gain=0.0)).rank == 16


def test_a_lock_holds_a_training_to_its_rank(tmp_path: Path) -> None:
    path = tmp_path / "rank.json"
    lock = GOOD.lock(path)
    assert assert_rank_suffices(path, config=LoraConfig(r=8, lora_alpha=16)).ok
    assert codes(lock) == codes(str(path)) == []
    with pytest.raises(LoraHealthError) as failure:
        assert_rank_suffices(path, config=LoraConfig(r=16, lora_alpha=16))
    assert str(failure.value).partition("\n\n")[2] == (
        "error[LORA942]: training leaves the locked rank\n"
        f"  --> {path}, r=8\n"
        "  observed: r is 16\n"
        "  expected: r=8, as locked\n"
        "  fix:      set r=8; or sweep again and lock what that chooses"
    )
    assert codes(lock, config=LoraConfig(r=8, lora_alpha=32)) == [("LORA942", "error")]
    rated = replace(lock, learning_rate=3e-4)
    assert codes(rated, learning_rate=3e-4) == codes(lock, learning_rate=1e-3) == []
    assert codes(rated, learning_rate=1e-3) == [("LORA942", "error")]
    assert codes(replace(lock, rank=4, alpha=8)) == [("LORA940", "error")]  # its own evidence


def test_a_lock_has_the_rate_that_its_rank_was_best_at() -> None:
    rows = tuple(
        TrialRow(
            rank, 2 * rank, 0, metric=0.9 - abs(rate - 3e-4) * 100 - 0.2 * (rank < 8), learning_rate=rate
        )
        for rank in (4, 8)
        for rate in (1e-4, 3e-4, 1e-3)
    )
    lock = RankLock.of(SweepResult("accuracy", True, 0.5, rows, {}, {}))
    assert (lock.rank, lock.learning_rate) == (8, 3e-4)
    assert str(lock).startswith("r=8, alpha=16 at 0.0003: ")
    assert codes(lock, config=LoraConfig(r=8, lora_alpha=16), learning_rate=1e-4) == [("LORA942", "error")]


def test_a_fresh_sweep_is_judged_at_the_locked_rank(tmp_path: Path) -> None:
    path = tmp_path / "rank.json"
    GOOD.lock(path)
    assert codes(GOOD, path) == []
    assert codes(sweep({8: 0.70, 32: 0.95}), path) == [("LORA940", "error")]
    assert codes(sweep({8: 0.9, 16: 0.9}, data="other"), path) == [("LORA943", "info")]
    with pytest.raises(ValueError, match=r"^rank: r=8 was not measured; the sweep has 4, 16$"):
        check_rank_suffices(sweep({4: 0.9, 16: 0.9}), path)


def test_versions_that_moved_are_said() -> None:
    other = sweep({8: 0.9, 16: 0.9}, torch="1.2.3", no_such_package="1")
    (found,) = check_rank_suffices(RankLock.of(other)).findings
    assert (found.code, found.severity) == ("LORA943", "info")
    assert found.observed == f"torch '1.2.3' is now {versions()['torch']!r}"
    major, minor, *_ = versions()["torch"].split(".")
    assert codes(RankLock.of(sweep({8: 0.9, 16: 0.9}, torch=f"{major}.{minor}.99"))) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is no lock of a rank"),
        ("[]", "this is no lock of a rank"),
        ("{}", "this is no lock of a rank"),
        ('{"rank_lock": 1, "evidence": {}, "verdicts": [], "unsettled": []}', "this is no lock of a rank"),
    ],
)
def test_a_file_that_is_no_lock_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rank.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"rank\.json: {message}"):
        check_rank_suffices(path)


def test_a_lock_of_a_later_format_is_refused() -> None:
    later = RankLock.of(GOOD).to_json().replace('"rank_lock": 1', '"rank_lock": 2')
    with pytest.raises(ValueError, match="this lock has format 2, and this version of pytest-lora reads 1"):
        RankLock.from_json(later)


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((GOOD,), {}, "rank is missing"),
        ((RankLock.of(GOOD), 8), {}, "rank is in the lock already"),
        ((GOOD, 8), {"config": LoraConfig()}, "config= and learning_rate= are compared with a lock"),
        ((RankLock.of(GOOD),), {"config": 8}, "config must be a peft.LoraConfig, not int"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: Any, named: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        check_rank_suffices(*arguments, **named)


def test_the_record_of_a_tracker_points_to_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "rank.json"
    lock = GOOD.lock(path)
    record = provenance(GOOD, GOOD.choose(), str(path))
    assert (record["rank_lock"], record["rank_lock_sha256"]) == (str(path), lock.digest)
    import hashlib

    assert lock.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "rank_lock" not in provenance(GOOD, GOOD.choose())
