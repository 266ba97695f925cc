"""Who may begin on shared GPUs, and the file in which processes say so: simulated processes, damaged files."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.plugin.gpu import ledger, locks
from pytest_lora.plugin.gpu.ledger import Entry, may_begin
from tests.forked import run_forked
from tests.plugin.simulated import machine, shared

TOTAL = 24
TOTALS = {"a": TOTAL, "b": TOTAL}


Test = tuple[dict[str, int], dict[str, int], int]
"""Shares, needs, and bytes that it leaves with its process."""


class Machine:
    """Processes with tests to run, each of which leaves memory with its process; one step at a time."""

    def __init__(self, plans: list[list[Test]]) -> None:
        self.plans = plans
        self.entries: list[Entry] = []
        self.left = [list(plan) for plan in plans]
        self.overfull = 0

    def moves(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = []
        for process in range(len(self.plans)):
            own = [entry for entry in self.entries if entry.owner == str(process) and entry.state != "keeps"]
            if own and own[0].state == "runs":
                found.append(lambda p=process, e=own[0]: self.end(p, e))
            elif own and may_begin(self.entries, own[0], TOTALS):
                found.append(lambda e=own[0]: self.begin(e))
            elif not own and self.left[process]:
                found.append(lambda p=process: self.ask(p))
            elif not own and any(entry.owner == str(process) for entry in self.entries):
                found.append(lambda p=process: self.leave(p))
        return found

    def ask(self, process: int) -> None:
        shares, needs, _ = self.left[process][0]
        self.entries.append(Entry(f"{process}", str(process), "", "waits", shares, needs))

    def begin(self, entry: Entry) -> None:
        self.entries[self.entries.index(entry)] = replace(entry, state="runs")
        taken: defaultdict[str, int] = defaultdict(int)
        running = [one for one in self.entries if one.state == "runs"]
        for one in running:
            for key, size in one.shares.items():
                taken[key] += size
        assert all(size <= TOTAL for size in taken.values())
        busy = {one.owner for one in running}
        for one in self.entries:
            for key, size in one.shares.items():
                taken[key] += size if one.state == "keeps" and one.owner not in busy else 0
        for key, size in entry.shares.items():
            taken[key] -= size - entry.needs[key]
        if any(taken[key] > TOTAL for key in entry.shares):
            self.overfull += 1
            waiting = {one.owner for one in self.entries if one.state == "waits"} | {entry.owner}
            assert {one.owner for one in self.entries if one.state == "keeps"} <= waiting
            assert running == [replace(entry, state="runs")]

    def end(self, process: int, entry: Entry) -> None:
        _, _, keeps = self.left[process].pop(0)
        self.entries = [one for one in self.entries if one.owner != str(process)]
        if keeps:
            kept = {key: min(keeps, size) for key, size in entry.shares.items()}
            self.entries.append(Entry(f"k{process}", str(process), "", "keeps", kept, {}))

    def leave(self, process: int) -> None:
        self.entries = [one for one in self.entries if one.owner != str(process)]


def test_of(size: int, device: str, declared: bool, keeps: int) -> Test:
    return (
        ({device: size}, {device: size}, keeps)
        if declared
        else ({device: TOTAL}, {device: TOTAL // 2}, keeps)
    )


test_of.__test__ = False
one_test = st.builds(
    test_of, st.integers(1, TOTAL), st.sampled_from("ab"), st.booleans(), st.sampled_from([0, 0, 8, 14])
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(one_test, min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_everything_ends_and_nothing_takes_what_another_holds(
    plans: list[list[Test]], data: st.DataObject
) -> None:
    played = Machine(plans)
    while moves := played.moves():
        data.draw(st.sampled_from(moves))()
    assert not any(played.left), "they wait for each other"


def test_a_base_of_session_scope_is_not_forgotten_between_tests() -> None:
    """Four workers, one card of 24 GB, tests that declare 16 on a base of 14: one worker after the other."""
    played = Machine([[test_of(16, "a", True, 14)] * 3 for _ in range(4)])
    order: list[str] = []
    while moves := played.moves():
        before = [entry.owner for entry in played.entries if entry.state == "runs"]
        moves[0]()
        order += [e.owner for e in played.entries if e.state == "runs" and e.owner not in before]
    assert order == [str(process) for process in range(4) for _ in range(3)]
    assert not played.overfull


def entry(
    number: int, state: Any, shares: dict[str, int], owner: str = "", needs: dict[str, int] | None = None
) -> Entry:
    return Entry(f"{number:032x}", owner or str(number), f"test {number}", state, shares, needs or shares)


def test_who_came_first_is_served_first() -> None:
    running, large, small = (
        entry(0, "runs", {"a": 20}),
        entry(1, "waits", {"a": 24}),
        entry(2, "waits", {"a": 1}),
    )
    assert not may_begin([running, large, small], small, TOTALS)
    assert may_begin([running, small, large], small, TOTALS)
    other = entry(3, "waits", {"b": 24})
    assert may_begin([running, large, other], other, TOTALS)


def test_who_declares_nothing_shares_with_idle_workers_only() -> None:
    whole = entry(1, "waits", {"a": TOTAL}, needs={"a": TOTAL // 2})
    assert may_begin([entry(0, "keeps", {"a": 12}), whole], whole, TOTALS)
    assert not may_begin([entry(0, "keeps", {"a": 14}), whole], whole, TOTALS)
    assert not may_begin([entry(0, "runs", {"a": 1}), whole], whole, TOTALS)


def test_nobody_waits_for_what_it_keeps_itself() -> None:
    kept = entry(0, "keeps", {"a": 14}, owner="me")
    own, other = entry(1, "waits", {"a": 16}, owner="me"), entry(2, "waits", {"a": 16})
    assert may_begin([kept, other, own], own, TOTALS)
    assert not may_begin([kept, other, own], other, TOTALS)


# ---------------------------------------------------------------------------------------- the file


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    shared(monkeypatch, tmp_path)
    return ledger.folder()


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
damaged_entry = st.builds(
    lambda told, changes: {**told, **changes},
    st.just(asdict(entry(1, "runs", {"a": 24}))),
    st.dictionaries(st.sampled_from(sorted(Entry.__dataclass_fields__)), junk, min_size=1, max_size=2),
)
contents = (
    st.binary(max_size=200)
    | junk.map(lambda value: json.dumps(value).encode())
    | st.lists(damaged_entry | junk, max_size=3).map(lambda value: json.dumps(value).encode())
)


@settings(max_examples=300, deadline=None)
@given(contents)
def test_a_damaged_ledger_stops_nobody(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    home = tmp_path_factory.mktemp("ledger")
    (home / "ledger.json").write_bytes(content)
    victim = home.parent / "victim.alive"
    victim.touch()
    with ledger.opened(home, set()) as entries:
        assert all(isinstance(one, Entry) for one in entries)
        entries[:] = [entry(7, "waits", {"a": 1})]
    assert victim.exists()
    assert json.loads((home / "ledger.json").read_text()) == [asdict(entry(7, "waits", {"a": 1}))]


@pytest.mark.parametrize("ticket", ["../victim", "/tmp/victim", "", "x" * 32, "0" * 31, "0" * 32 + "\n"])
def test_a_ticket_names_no_file_outside(home: Path, ticket: str) -> None:
    victim = home.parent / "victim.alive"
    victim.touch()
    told = {**asdict(entry(1, "runs", {"a": 24})), "ticket": ticket}
    (home / "ledger.json").write_text(json.dumps([told]))
    with locks.held({"a": 24}, TOTALS, "this", patience=1):
        assert victim.exists()


def test_an_entry_that_somebody_removes_is_made_again(home: Path) -> None:
    (home / "ledger.json").write_text("[")
    with locks.held({"a": 24}, TOTALS, "this", patience=1):
        (home / "ledger.json").write_text("nonsense")
    with locks.held({"a": 24}, TOTALS, "again", patience=1):
        pass


def test_what_is_kept_goes_with_its_process_or_its_word(home: Path) -> None:
    locks.keep({"a": 14}, "gw0")
    locks.keep({"a": 15}, "gw0")
    with ledger.opened(home, set()) as entries:
        assert [(one.state, one.shares) for one in entries] == [("keeps", {"a": 15})]
    locks.keep({}, "gw0")
    with ledger.opened(home, set()) as entries:
        assert entries == []
    assert {path.name for path in home.iterdir()} <= {"ledger.json", "ledger.lock"}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no owners of this kind")
@pytest.mark.parametrize("kind", ["link", "writable", "file", "foreign"])
def test_a_folder_of_somebody_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.delenv(ledger.FOLDER, raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    place = tmp_path / f"pytest-lora-gpu-{os.getuid()}"
    if kind == "link":
        (tmp_path / "theirs").mkdir()
        place.symlink_to(tmp_path / "theirs")
    elif kind == "file":
        place.touch()
    else:
        place.mkdir(mode=0o700)
    if kind == "writable":
        place.chmod(0o777)
    if kind == "foreign":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        place.rename(tmp_path / f"pytest-lora-gpu-{os.getuid()}")
    with pytest.raises(ledger.NotSharedError, match=rf"{tmp_path}.*; .*{ledger.FOLDER}"):
        ledger.folder()


def test_a_session_says_what_is_wrong_with_the_folder(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    (pytester.path / "taken").touch()
    monkeypatch.setenv(ledger.FOLDER, str(pytester.path / "taken"))
    pytester.makepyfile("import pytest\n@pytest.mark.lora_gpu\ndef test_it(): ...")
    result = run_forked(pytester, "-n", "1")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*taken cannot be used to share GPUs: *; set {ledger.FOLDER} to a folder"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_log_that_cannot_be_written_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ledger.LOG, str(home))
    with (
        pytest.raises(ledger.NotSharedError, match=rf"^{ledger.LOG}: .* cannot be written: "),
        locks.held({"a": 1}, TOTALS, "this", patience=1),
    ):
        pass
    monkeypatch.delenv(ledger.LOG)
    with locks.held({"a": 24}, TOTALS, "next", patience=1):
        pass


def test_what_cannot_be_given_back_keeps_nobody_waiting_and_ends_no_session(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 24)
    shared(monkeypatch, pytester.path)
    pytester.makepyfile(f"""
        import os
        import pytest

        @pytest.mark.lora_gpu
        def test_first(monkeypatch): os.environ["{ledger.LOG}"] = "/"

        @pytest.mark.lora_gpu
        def test_second(): ...

        def test_third(): del os.environ["{ledger.LOG}"]

        @pytest.mark.lora_gpu
        def test_fourth(): ...
    """)
    result = run_forked(pytester, "-n", "1")
    result.assert_outcomes(passed=3, errors=1, warnings=1)
    result.stdout.fnmatch_lines(["*PytestWarning: GPUs could not be given back: *cannot be written: *"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
