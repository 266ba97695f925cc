"""What enters a trial is read by value: another value is another sweep, the same value is the same one."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from pytest_lora import rank_sweep
from pytest_lora.bases.tiny.known_rank import KnownRankTask
from pytest_lora.plugin import lora_settings
from pytest_lora.sweep import runner
from pytest_lora.sweep.digest import Reader
from tests.sweep import toys


def held(function: Any) -> dict[str, str]:
    reader = Reader()
    said = reader.function("train", function)
    assert reader.unread == []
    return said


@dataclass
class Setup:
    """A configuration of the user's."""

    rate: float
    names: tuple[str, ...] = ()

    def train(self, model: Any, plan: Any) -> float:
        return self.rate


class Trainer:
    factor = 1

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @functools.cached_property
    def loaded(self) -> list[int]:
        return [1]

    def __call__(self, model: Any, plan: Any) -> float:
        return self.setup.rate * self.factor


def closure(value: Any) -> Callable[..., Any]:
    def train(model: Any, plan: Any) -> Any:
        return value

    return train


def default(value: Any) -> Callable[..., Any]:
    def train(model: Any, plan: Any, rate: Any = value, *, again: Any = 1) -> Any:
        return rate

    return train


def keyword(value: Any) -> Callable[..., Any]:
    def train(model: Any, plan: Any, *, rate: Any = value) -> Any:
        return rate

    return train


def of_module(value: Any, name: str = "mine") -> Callable[..., Any]:
    """A function of a module of the user's, which calls another one that reads a global."""
    code = (
        "def helper():\n    return RATE\n\ndef train(model, plan):\n    return [helper() for _ in range(2)]\n"
    )
    module = types.ModuleType(name)
    module.__dict__["RATE"] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        exec(code, module.__dict__)
        return _Held(module.train, held(module.train))


class _Held:
    """A function whose module is gone, with what was read of it while it was there."""

    def __init__(self, function: Any, said: dict[str, str]) -> None:
        self.function, self.said = function, said


def said_of(function: Any) -> dict[str, str]:
    return function.said if isinstance(function, _Held) else held(function)


WAYS: dict[str, Callable[[Any], Any]] = {
    "closure": closure,
    "default": default,
    "keyword": keyword,
    "global of a module": of_module,
    "bound method": lambda value: Setup(value).train,
    "callable object": lambda value: Trainer(Setup(value)),
    "configuration in a closure": lambda value: closure(Setup(value)),
    "partial": lambda value: functools.partial(toys.train, value),
    "partial by name": lambda value: functools.partial(toys.train, plan=value),
    "object in a list": lambda value: closure([1, {"a": Setup(value)}]),
    "function in a closure": lambda value: closure(closure(value)),
    "class in a closure": lambda value: closure(type("Local", (), {"rate": value})),
    "namespace": lambda value: closure(types.SimpleNamespace(rate=value)),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_value_is_another_sweep_whichever_way_it_comes_in(way: str) -> None:
    make = WAYS[way]
    one, same, other = said_of(make(1e-3)), said_of(make(1e-3)), said_of(make(1e-1))
    assert one == same
    assert one != other
    assert one["train"] == other["train"]  # the value is named, and the code is the same


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.full((3,), n),
        lambda n: torch.full((30_000,), n, dtype=torch.bfloat16),
        lambda n: np.full((3, 4), n),
        lambda n: np.array([n, "x"], dtype=object),
        lambda n: {"a": [torch.tensor(n)]},
        lambda n: {n, "b"},
        lambda n: "x" * 100 + str(n),
        lambda n: list(range(50_000)) + [0] * n,
        lambda n: nn.Sequential(nn.Linear(2, 2), nn.Dropout(n / 10)),
        lambda n: torch.Generator().manual_seed(int(n)),
        lambda n: np.random.default_rng(int(n)),
        lambda n: Path("data") / str(n),
    ],
)
def test_values_of_every_kind_are_read(make: Callable[[int], Any]) -> None:
    torch.manual_seed(0)
    one = held(closure(make(1)))
    torch.manual_seed(0)
    assert held(closure(make(1))) == one
    torch.manual_seed(0)
    assert held(closure(make(2))) != one


def test_a_base_is_read_by_a_sample_of_its_weights() -> None:
    base = toys.make_model()
    one = held(lambda: copy.deepcopy(base))
    assert held(lambda: copy.deepcopy(base)) == one
    with torch.no_grad():
        base[2].weight[1, 1] += 1e-3
    assert held(lambda: copy.deepcopy(base)) != one


def test_the_fixture_looks_at_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(runner, "rank_sweep", lambda make_model, *_, **__: made.append(make_model))
    monkeypatch.setattr(lora_settings, "options_of", lambda _: types.SimpleNamespace(ranks=(4,)))
    monkeypatch.setattr(lora_settings, "fitted", lambda config, *_: config)
    one, other = toys.make_model(), toys.make_model()
    with torch.no_grad():
        other[0].bias[3] += 1
    node: Any = types.SimpleNamespace(config=None)
    for base in (one, one, other):
        lora_settings.sweeper(node, base, LoraConfig())(toys.train, toys.evaluate)
    first, second, changed = map(held, made)
    assert first == second
    assert first["train.base"] != changed["train.base"]


def test_the_same_function_is_the_same_in_a_script_and_in_a_module() -> None:
    assert of_module(1, "__main__").said == of_module(1, "package.train").said


def test_a_script_and_what_it_becomes_when_it_is_imported(tmp_path: Path) -> None:
    """A module is the user's by its place, also where its name is one of Python's."""
    (tmp_path / "this.py").write_text(
        "from dataclasses import dataclass\nfrom functools import partial\nimport json, pytest\n"
        "from pytest_lora.sweep.digest import Reader\n"
        "@dataclass\nclass Setup:\n    rate: float = 1e-3\n\n"
        "def step(setup):\n    return setup.rate\n\n"
        "def train(setup, model, plan):\n    return [step(setup), pytest.approx(1)]\n\n"
        "reader = Reader()\n"
        "said = reader.function('train', partial(train, Setup()))\n"
        "print(json.dumps([said, reader.unread]))\n"
    )
    script, module = (
        subprocess.run(
            [sys.executable, *how], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()
        for how in (["this.py"], ["-c", "import sys; sys.path.insert(0, ''); import this"])
    )
    assert script == module
    assert json.loads(script) == [
        {"train": "train@" + script.split("train@")[1][:12], "train.0": ANY, "train.step": ANY},
        [],
    ]


def test_code_is_read_and_its_layout_is_not() -> None:
    def made(code: str) -> dict[str, str]:
        names: dict[str, Any] = {"__name__": "somewhere"}
        exec(code, names)
        return held(names["train"])

    one = made("def train(model, plan): return [1, (2, 3)]")
    assert made("# a remark\n\ndef train( model,plan ):\n    return [1, (2, 3)]  # so") == one
    assert made("def train(model, plan): return [1, (2, 4)]") != one
    attribute = made("def train(model, plan): return plan.rank")
    assert made("def train(model, plan): return plan.seed") != attribute
    nested = made("def train(model, plan): return [lambda: 1]")
    assert made("def train(model, plan): return [lambda: 2]") != nested


def test_a_function_that_is_wrapped_is_read() -> None:
    one = held(functools.cache(closure(1)))
    assert held(functools.cache(closure(1))) == one != held(functools.cache(closure(2)))


@pytest.mark.parametrize("line", ["from rates_of_mine import RATE", "import rates_of_mine.peak"])
def test_a_module_that_is_imported_when_the_function_runs_is_read(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rates_of_mine").mkdir()
    for file in ("__init__", "peak"):
        (tmp_path / "rates_of_mine" / f"{file}.py").write_text("RATE = 1e-3")
    names: dict[str, Any] = {"__name__": "mine"}
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    exec(f"def train(model, plan):\n    {line}\n    import json, torch.nn\n", names)
    one = held(names["train"])
    assert held(names["train"]) == one
    for file in ("__init__", "peak"):
        (tmp_path / "rates_of_mine" / f"{file}.py").write_text("RATE = 1e-1")
    assert held(names["train"]) != one
    assert "rates_of_mine" not in sys.modules
    assert not any("json" in part or "torch" in part for part in one)


def test_what_an_object_has_cached_is_no_value() -> None:
    trainer = Trainer(Setup(1.0))
    one = held(trainer)
    assert trainer.loaded == [1]
    assert held(trainer) == one
    task = KnownRankTask(2, seed=1)
    one = held(task.train)
    task.make_model()
    assert held(task.train) == one != held(KnownRankTask(2, seed=2).train)


def test_reading_ends_in_cycles_and_leaves_no_trace() -> None:
    cycle: list[Any] = [1]
    cycle.append({"back": cycle})
    lock = threading.Lock()
    state = torch.get_rng_state()
    assert held(closure((cycle, lock))) == held(closure((cycle, threading.Lock())))
    assert torch.equal(torch.get_rng_state(), state)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(VALUES, VALUES)
def test_values_read_alike_exactly_where_they_are_the_same(one: Any, other: Any) -> None:
    assert held(closure(one)) == held(closure(copy.deepcopy(one)))
    assert (held(closure(one)) == held(closure(other))) == (repr(one) == repr(other))


def test_what_cannot_be_read_is_named_and_asked_for(tmp_path: Path) -> None:
    stream = (n for n in range(3))

    def train(model: nn.Module, plan: Any) -> None:
        assert stream

    def sweep(**more: Any) -> None:
        rank_sweep(
            toys.make_model,
            train,
            toys.evaluate,
            ranks=(2,),
            config=toys.CONFIG,
            progress=False,
            journal=tmp_path / "j",
            **more,
        )

    with pytest.raises(ValueError, match=r"^journal: train\.stream \(generator\) cannot be compared"):
        sweep()
    sweep(version="numbers up to 3")
    with pytest.raises(ValueError, match="version was numbers up to 3 and is now numbers up to 4"):
        sweep(version="numbers up to 4")
