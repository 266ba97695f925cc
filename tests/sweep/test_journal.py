"""The journal: nothing is lost when sweeps meet in it or die, and nothing of anybody else is touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_lora.files import add_json_line
from pytest_lora.sweep import journal as module
from pytest_lora.sweep.journal import Journal
from pytest_lora.sweep.rows import Failure, TrialRow

SETTINGS = {"epochs": "1", "metric": "loss"}
FORK = multiprocessing.get_context("fork")
HEADER = json.dumps({"format": module.FORMAT, "settings": SETTINGS, "not compared": []}).encode()
PROPERTY = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))

ROWS = st.builds(
    TrialRow,
    rank=st.integers(1, 64),
    alpha=st.floats(0.5, 128),
    seed=st.integers(0, 9),
    metric=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    losses=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    data=st.text(max_size=8),
    failure=st.none() | st.just(Failure("diverged", "loss 1 is nan", "lower the rate")),
    learning_rate=st.none() | st.floats(1e-6, 1),
    budget=st.sampled_from([0.25, 1.0]),
)


def row(rank: int, seed: int = 0) -> TrialRow:
    return TrialRow(rank, 2 * rank, seed, metric=rank / 100)


@PROPERTY
@given(rows=st.lists(ROWS, max_size=6), cut=st.integers(0, 2000))
def test_a_journal_cut_anywhere_keeps_every_whole_line_and_goes_on(
    rows: list[TrialRow], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "j"
    Journal(path, SETTINGS)
    header = path.read_bytes()
    lines = [json.dumps({"trial": each.to_dict()}).encode() + b"\n" for each in rows]
    path.write_bytes(header + b"".join(lines))
    data = path.read_bytes()[: len(header) + cut]
    path.write_bytes(data)
    texts = data[len(header) :].split(b"\n")
    whole = [t for t in texts if t.endswith(b"}}")]
    assert len(whole) >= len(texts) - 1
    wanted = {each.key: each for each in rows[: len(whole)]}
    opened = Journal(path, SETTINGS)
    assert opened.rows == wanted
    opened.add(row(99))
    assert Journal(path, SETTINGS).rows == {**wanted, row(99).key: row(99)}


def test_a_line_that_is_whole_but_for_its_end_is_kept(tmp_path: Path) -> None:
    Journal(tmp_path / "j", SETTINGS).add(row(4))
    (tmp_path / "j").write_bytes((tmp_path / "j").read_bytes()[:-1])
    Journal(tmp_path / "j", SETTINGS).add(row(8))
    assert list(Journal(tmp_path / "j", SETTINGS).rows) == [row(4).key, row(8).key]


@PROPERTY
@given(
    text=st.binary(min_size=1, max_size=60)
    | st.just(HEADER)
    | st.integers(1, len(HEADER)).map(lambda length: HEADER[:length])
)
def test_what_has_no_whole_first_line_of_ours_is_refused_and_left_alone(
    text: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("other") / "j"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="is no journal of a rank sweep; name another file"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == text


def test_what_somebody_wrote_below_our_lines_is_left_alone(tmp_path: Path) -> None:
    Journal(tmp_path / "j", SETTINGS).add(row(4))
    text = (tmp_path / "j").read_text() + "remember the milk"
    (tmp_path / "j").write_text(text)
    with pytest.raises(ValueError, match=r"^journal: line 3 of .*j cannot be read"):
        Journal(tmp_path / "j", SETTINGS)
    assert (tmp_path / "j").read_text() == text


ODD = st.one_of(
    *(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.text(max_size=3),
        st.just("\x1b[2J"),
    ),
    *(st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.none(), max_size=2)),
)
NUMBERS = (
    "rank",
    "alpha",
    "seed",
    "metric",
    "seconds",
    "flops",
    "peak_bytes",
    "trainable",
    "learning_rate",
    "budget",
)
FAILED = {"kind": "error", "message": "m", "advice": "a"}
FOUND = {**dict.fromkeys(("code", "rule", "where", "observed", "expected", "fix"), "x"), "severity": "info"}


@PROPERTY
@given(
    name=st.sampled_from([*row(4).to_dict()]),
    value=ODD,
    inner=st.sampled_from(["kind", "message", "severity", "fix"]),
)
def test_whatever_another_wrote_into_a_row_is_a_row_or_names_the_line(
    name: str, value: Any, inner: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("odd") / "j"
    Journal(path, SETTINGS)
    header = path.read_text()
    nested = {"failure": {**FAILED, inner: value}, "findings": [{**FOUND, inner: value}]}
    for one in (value, nested.get(name, value)):
        path.write_text(header)
        add_json_line(path, {"trial": {**row(4).to_dict(), name: one}})
        try:
            kept = Journal(path, SETTINGS).rows.values()
        except ValueError as error:
            if (
                not str(error).startswith(f"journal: line 2 of {path} cannot be read: ")
                or not str(error).isprintable()
            ):
                raise
            continue
        for each in kept:
            numbers = [getattr(each, field) for field in NUMBERS]
            assert all(number is None or float(number) is not None for number in numbers)
            assert TrialRow.from_dict(json.loads(json.dumps(each.to_dict()))).rank == each.rank


def test_more_than_a_journal_holds_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path / "j", SETTINGS).add(row(4))
    monkeypatch.setattr(module, "MOST_BYTES", 200)
    with pytest.raises(ValueError, match=r"^journal: .*j has more than 200 bytes; name another file$"):
        Journal(tmp_path / "j", SETTINGS)


def test_a_folder_and_a_device_are_no_journals(tmp_path: Path) -> None:
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises((ValueError, OSError), match=r"^journal: "):
            Journal(path, SETTINGS)
    assert Path(os.devnull).is_char_device()


def test_a_file_that_took_the_place_of_the_journal_is_left_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    (tmp_path / "j").write_text("diary\n")
    with pytest.raises(ValueError, match="is no journal"):
        journal.add(row(4))
    assert (tmp_path / "j").read_text() == "diary\n"
    (tmp_path / "j").unlink()
    journal.add(row(4))
    assert Journal(tmp_path / "j", SETTINGS).rows == {row(4).key: row(4)}


def _open_and_add(barrier: Any, path: Path, seed: int, epochs: str, said: Any) -> None:
    barrier.wait()
    try:
        journal = Journal(path, SETTINGS | {"epochs": epochs})
        for rank in range(1, 20):
            journal.add(row(rank, seed))
    except ValueError as error:
        said.put(str(error))
    else:
        said.put("")


@pytest.mark.parametrize("other", ["1", "2"])
def test_sweeps_that_start_together(other: str, tmp_path: Path) -> None:
    """Those of the same settings join; of different ones the first has the file, and the other is refused."""
    barrier, said = FORK.Barrier(2), FORK.Queue()
    both = [
        FORK.Process(target=_open_and_add, args=(barrier, tmp_path / "j", seed, epochs, said))
        for seed, epochs in enumerate(("1", other))
    ]
    for process in both:
        process.start()
    answers = sorted(said.get(timeout=60) for _ in both)
    for process in both:
        process.join()
    lines = (tmp_path / "j").read_text().splitlines()
    assert [json.loads(line).get("format") for line in lines] == [module.FORMAT] + [None] * (len(lines) - 1)
    first = json.loads(lines[0])["settings"]
    kept = Journal(tmp_path / "j", first).rows
    if other == "1":
        assert answers == ["", ""]
        assert set(kept) == {row(rank, seed).key for rank in range(1, 20) for seed in (0, 1)}
    else:
        assert answers[0] == ""
        assert "is of another sweep: epochs was" in answers[1]
        assert len(kept) == 19


def _die_while_writing(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    journal.add(row(1))

    def cut(file: Path, entry: dict[str, Any]) -> None:
        with file.open("ab", buffering=0) as opened:
            opened.write(json.dumps(entry).encode()[:25])
        os.kill(os.getpid(), signal.SIGKILL)

    module.add_json_line = cut
    journal.add(row(2))


def test_a_sweep_goes_on_beside_one_that_is_killed_while_it_holds_the_lock(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    process = FORK.Process(target=_die_while_writing, args=(tmp_path / "j",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    journal.add(row(3))
    assert list(Journal(tmp_path / "j", SETTINGS).rows) == [row(1).key, row(3).key]


def test_a_full_disk_is_one_line_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    journal.add(row(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"^journal: .*j cannot be written: No space left on device$"):
            journal.add(row(2))
        with pytest.raises(OSError, match=r"^journal: .*new cannot be written: No space left on device$"):
            Journal(tmp_path / "new", SETTINGS)
    assert not (tmp_path / "new").exists()
    assert list(Journal(tmp_path / "j", SETTINGS).rows) == [row(1).key]


def test_lines_are_added_to_a_file_that_ends_in_a_long_line_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"[1]\n" + b'{"a": "' + b"x" * 200_000)
    add_json_line(tmp_path / "j", [2])
    assert (tmp_path / "j").read_bytes() == b"[1]\n[2]\n"


def test_what_cannot_be_compared_is_named_and_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^journal: train.stream \(generator\) cannot be compared .*version='1'"
    ):
        Journal(tmp_path / "j", SETTINGS, ("train.stream (generator)",))
    assert not (tmp_path / "j").exists()
    Journal(tmp_path / "j", SETTINGS | {"version": "1"}, ("train.stream (generator)",))
    assert json.loads((tmp_path / "j").read_text())["not compared"] == ["train.stream (generator)"]
    with pytest.raises(ValueError, match="version was 1 and is now 2"):
        Journal(tmp_path / "j", SETTINGS | {"version": "2"}, ("train.stream (generator)",))
