"""What the limited process does, here in this one: what it takes from a pickle, matches, and is limited to."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from pytest_lora.inspection.limited import LimitError, patterns, worker
from pytest_lora.inspection.limited.patterns import unmatchable

resource: Any = pytest.importorskip("resource")


class Stored:
    """Numbers in the archive."""

    def __init__(self, *pid: Any) -> None:
        self.pid = pid


class Rebuilt:
    """A call in the pickle."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Stored) else None


def unpickled(state: Any) -> list[Any]:
    file = io.BytesIO()
    Pickler(file, 2).dump(state)
    return worker.unpickle(base64.b64encode(file.getvalue()).decode())


def test_tensors_that_torch_saved() -> None:
    file = io.BytesIO()
    whole = torch.zeros(3, 4)
    state = {
        "a": whole,
        "turned": whole.t(),
        "part": whole[1:],
        "trained": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        "typed": torch.zeros(2, dtype=torch.uint16),
    }
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith("data.pkl"))
        content = base64.b64encode(archive.read(name)).decode()
    assert worker.unpickle(content) == [
        ["a", "FloatStorage", "0", 0, (3, 4), (4, 1)],
        ["turned", "FloatStorage", "0", 0, (4, 3), (1, 4)],
        ["part", "FloatStorage", "0", 4, (2, 4), (4, 1)],
        ["trained", "BFloat16Storage", "1", 0, (2,), (1,)],
        ["typed", "uint16", "2", 0, (2,), (1,)],
    ]


NUMBERS = Stored("storage", torch.FloatStorage, "0", "cpu", 1)


def tensor(offset: Any = 0, shape: Any = (1,), strides: Any = (1,), storage: Any = NUMBERS) -> Rebuilt:
    return Rebuilt(_rebuild_tensor_v2, storage, offset, shape, strides, False, {})


def typed(kind: Any) -> Rebuilt:
    return Rebuilt(_rebuild_tensor_v3, NUMBERS, 0, (1,), (1,), False, {}, kind)


def test_what_just_is_a_state_dict() -> None:
    most = 2**63 - 1
    assert unpickled({"a": tensor(most, (most,), (0,))}) == [["a", "FloatStorage", "0", most, (most,), (0,)]]
    assert unpickled({"a": tensor(0, (1,) * 64, (1,) * 64)})[0][4] == (1,) * 64
    assert unpickled({"n" * 1000: tensor(0, (), ())})[0][0] == "n" * 1000
    assert unpickled({"a": typed(torch.uint16)}) == [["a", "uint16", "0", 0, (1,), (1,)]]
    assert unpickled({}) == []
    one = tensor()
    assert len(unpickled({str(number): one for number in range(75_000)})) == 75_000


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": os.system}, r"it asks for \w+\.system"),
        ([tensor()], "something else than named tensors, or too many"),
        (dict.fromkeys(map(str, range(75_001)), tensor()), "something else than named tensors, or too many"),
        ({1: tensor()}, "something else than named tensors$"),
        ({"a": "b"}, "something else than named tensors$"),
        ({"a": NUMBERS}, "something else than named tensors$"),
        ({"a": tensor(storage="0")}, "something else than named tensors$"),
        ({"model": {"a": tensor()}}, "one level deeper, in 'model'$"),
        ({"n" * 1001: {"a": tensor()}}, f"one level deeper, in '{'n' * 40}'$"),
        ({"model": {"a": 1}}, "something else than named tensors$"),
        ({"n" * 1001: tensor()}, "a name of 1,001 characters"),
        ({"a": tensor(0, (1, 1), (1,))}, "shapes that are none"),
        ({"a": tensor(0, (1,) * 65, (1,) * 65)}, "shapes that are none"),
        ({"a": tensor(-1)}, "sizes that are none"),
        ({"a": tensor(0, (2**63,), (1,))}, "sizes that are none"),
        ({"a": tensor(0, (1.0,), (1,))}, "sizes that are none"),
        ({"a": tensor(True)}, "sizes that are none"),
        ({"a": typed(3)}, "sizes that are none"),
        ({"a": tensor(storage=Stored("else", torch.FloatStorage, "0"))}, "refers to something else"),
        ({"a": tensor(storage=Stored("storage", "FloatStorage", "0"))}, "refers to something else"),
        ({"a": tensor(storage=Stored("storage", torch.FloatStorage, 0))}, "refers to something else"),
    ],
)
def test_what_is_no_state_dict(state: Any, words: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=words):
        unpickled(state)


def test_lists_are_shortened_as_peft_does_it() -> None:
    names = ["a.q", "a.k", "b.q", "b.k.q", "q", "c.a.q"]
    for count in range(1, 5):
        for texts in map(list, combinations([*names, "x"], count)):
            rest = [n for n in names if not any(n == text or n.endswith(f".{text}") for text in texts)]
            assert worker.shortened(texts, names) == _find_minimal_target_modules(texts, rest), texts


def test_each_field_is_tried_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(
        worker, "matched", lambda pattern, names, match: tried.append((pattern, *names, match))
    )
    monkeypatch.setattr(worker, "shortened", lambda *given: tried.append(given))
    worker.rehearse("exclude_modules", "a|b", ["x", "y"])
    worker.rehearse("rank_pattern", ["a", "b"], ["x"])
    worker.rehearse("modules_to_save", ["a"], ["x"])
    worker.rehearse("target_modules", ["a"], ["x"])
    worker.rehearse("target_parameters", ["b"], ["x"])
    assert tried == [
        ("a|b", "x", "y", re.fullmatch),
        (r"(.*\.)?(a)$", "x", re.match),
        (r"(.*\.)?(b)$", "x", re.match),
        (r"(^|.*\.)a($|\..*)", "x", re.match),
        (["a"], ["x"]),
    ]


def test_requests_are_answered_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(what: str) -> str:
        if what == "much":
            raise MemoryError
        if what == "long":
            raise ValueError("x" * 500)
        return what

    limits: list[Any] = []
    monkeypatch.setattr(worker, "limit_process", lambda: limits.append("process"))
    monkeypatch.setattr(worker, "limit_time", limits.append)
    monkeypatch.setitem(worker.WORK, "work", work)
    asked = [{"work": "work", "arguments": [what], "seconds": 0.5} for what in ("fine", "much", "long")]
    given = "".join(f"{json.dumps(one)}\n" for one in asked).encode()
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=told))
    began = time.process_time()
    worker.main()
    took = time.process_time() - began
    monkeypatch.undo()
    answers = [json.loads(line) for line in told.getvalue().splitlines()]
    assert 0 <= sum(one.pop("seconds") for one in answers) <= took
    assert answers == [
        {"result": "fine"},
        {"limit": "MemoryError"},
        {"error": ("ValueError: " + "x" * 500)[:300]},
    ]
    assert limits == ["process", *[0.5, 0] * 3]


def test_what_the_process_is_limited_to(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[Any, Any] = {}
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    monkeypatch.setattr(sys, "setrecursionlimit", lambda depth: limits.__setitem__("depth", depth))
    monkeypatch.setattr(signal, "signal", limits.__setitem__)
    monkeypatch.setattr(signal, "setitimer", limits.__setitem__)
    monkeypatch.setattr(re, "_MAXCACHE", re._MAXCACHE)
    worker.limit_process()
    worker.limit_time(0.5)
    assert re._MAXCACHE == 100_000
    assert limits == {
        "depth": 300,
        signal.SIGINT: signal.SIG_IGN,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_AS: (268_435_456, 268_435_456),
        signal.ITIMER_PROF: 0.5,
    }


# ------------------------------------------------------------------ what is asked of it


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Fields that the process is asked about, and the seconds that it is given; each takes 0.4 of them."""
    found: list[tuple[str, float]] = []

    def do(work: str, field: str, value: Any, names: list[str], seconds: float) -> tuple[list[Any], float]:
        found.append((field, seconds))
        return [[[], True] for _ in ([value] if isinstance(value, str) else value)], 0.4

    monkeypatch.setattr(patterns, "limited", SimpleNamespace(do=do))
    return found


NAMES = ["a" * 5] * 1 + [f"{number:05}" for number in range(399)]
"""Four hundred names of five characters, which count as 10,000."""


@pytest.mark.parametrize(
    ("value", "names", "is_asked"),
    [
        ("q_proj", ["a"], False),
        ("q|v", ["a"], True),
        ("n" * 999, ["a"], False),
        ("n" * 1000, ["a"], True),
        (["q"] * 512, ["a"], False),
        (["q"] * 513, ["a"], True),
        (["q", "v*"], ["a"], True),
        (["q", 3], ["a"], False),
        ({"q*": 8}, ["a"], True),
        ([], NAMES * 2000, False),
        (["q"] * 500, NAMES, False),
        (["q"] * 500, [*NAMES[1:], "a" * 6], True),
        (["q"] * 500, [*NAMES, *NAMES], False),
        (None, ["a"], False),
        (3, ["a"], False),
    ],
)
def test_only_what_may_take_long_is_tried_elsewhere(
    asked: list[tuple[str, float]], value: Any, names: list[str], is_asked: bool
) -> None:
    assert unmatchable({"target_modules": value}, names) is None
    assert bool(asked) is is_asked


def test_all_fields_share_the_seconds(asked: list[tuple[str, float]]) -> None:
    config = {
        "alpha_pattern": {"a*": 1}, "target_modules": "a*", "exclude_modules": ["a*"], "modules_to_save": ["a*"],
        "rank_pattern": {"a": 1}, "other": "a*",
    }  # fmt: skip
    assert unmatchable(config, ["a"]) is None
    assert [field for field, _ in asked] == [
        "target_modules", "exclude_modules", "modules_to_save", "alpha_pattern",
    ]  # fmt: skip
    assert [seconds for _, seconds in asked] == pytest.approx([0.3, 0.2, 0.006, 0.006])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("*" * 100, repr("*" * 100)),
        ("*" * 101, repr("*" * 100 + "...")),
        (["*"], "'*'"),
        (["*", "*"], "its 2 names"),
    ],
)
def test_what_was_not_tried_is_said(monkeypatch: pytest.MonkeyPatch, value: Any, words: str) -> None:
    def do(*given: Any, **settings: Any) -> None:
        raise LimitError("why")

    monkeypatch.setattr(patterns, "limited", SimpleNamespace(do=do))
    said = unmatchable({"modules_to_save": value}, ["a", "b", "a"])
    assert said == f"modules_to_save: matching {words} with 2 modules is not tried: why"
