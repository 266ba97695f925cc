"""Wrong arguments are refused by name, before any work, by every check and assertion."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

import pytest_lora
from pytest_lora.bases import examples
from pytest_lora.bases.examples.models import language_batch
from tests import wrong_calls as generated
from tests.state.observed import plain
from tests.wrong_calls import ASSERTIONS, CHECKS, GIVEN_BY_US, OTHERS, RIGHT, Target, adapted, config

COUNTS = (0, -1, 1.5, "4", None, True, [])
NUMBERS = (-1, "x", math.nan, None, [], True)
CODES = ("LORA1", 3, ["NOPE"], [1], None, [""])
WRONG: dict[str, tuple[Any, ...]] = {
    "accumulation": COUNTS,
    "advise": (1, "no", None),
    "atol": (-1, "x", [], True),
    "base": (3, [], "no/such-base", 3.5),
    "base_snapshot": (3, "weights", [1]),
    "batch": (3, "text", None),
    "batch_size": COUNTS,
    "batches": (3, "text", 3.5),
    "budget": ("24", -1, "lots", None, [], 1.5),
    "by": (-1, "x", math.nan, []),
    "config": ({}, None, "x", 3),
    "dtype": ("int3", 7, []),
    "expect": ({}, 3, "x"),
    "expected": (0, -1, "2", math.nan, None, math.inf),
    "gradient_checkpointing": ("yes", 3),
    "high": NUMBERS,
    "history": ("text", 3, [None]),
    "ignore": CODES,
    "learning_rate": (-1, "x", math.nan, []),
    "loss_fn": (3, "x"),
    "low": NUMBERS,
    "max_grad_norm": (-1, "x", []),
    "model": (None, 3, "x"),
    "model_or_config": (None, 3, "x"),
    "optimizer": ("adam", 3),
    "path": (3, "no/such/place", None),
    "quantization": ("nf8", 4, []),
    "rtol": (-1, "x", [], True),
    "scaler": (3, "x"),
    "scheduler": (3, "x"),
    "select": CODES,
    "seq_len": COUNTS,
    "steps": (0, -1, 1.5, "4", True, []),
    "steps_per_loss": COUNTS,
    "targets": (3, [], [1], "(", [""]),
    "total_steps": (0, -1, 1.5, "4", True),
    "train_losses": ("text", 3, [], [None]),
}
"""Values that an argument cannot have, whatever the function."""


def functions() -> Iterator[tuple[str, Any]]:
    for subject in RIGHT:
        for name in (CHECKS.get(subject, f"check_{subject}"), ASSERTIONS.get(subject, f"assert_{subject}")):
            yield subject, getattr(pytest_lora, name)


def wrong_calls(number: int, seed: int) -> list[Any]:
    every = [
        (subject, function, name, value)
        for subject, function in functions()
        for name in inspect.signature(function).parameters
        for value in WRONG.get(name, ())
        if not (subject == "reload" and name == "base")
        and not (subject in ("recipe", "resume", "run") and value == "no/such-base")
        and not (subject in ("recipe", "run") and name == "budget" and value is None)
    ]
    chosen = random.Random(seed).sample(every, number)
    return [pytest.param(*one, id=f"{one[1].__name__}-{one[2]}={one[3]!r}"[:60]) for one in chosen]


@pytest.fixture
def _no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of an optimizer is work."""
    import torch

    def step(*_: Any, **__: Any) -> None:
        raise RuntimeError("a step was taken before the arguments were checked")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.usefixtures("_no_steps")
@pytest.mark.parametrize(("subject", "function", "name", "value"), wrong_calls(200, seed=15))
def test_a_wrong_argument_is_named(subject: str, function: Any, name: str, value: Any) -> None:
    arguments = {**RIGHT[subject](), name: value}
    with pytest.raises((TypeError, ValueError)) as raised:
        function(**arguments)
    assert name in str(raised.value), f"{function.__name__}({name}={value!r}): {raised.value}"


EACH = 2
"""Values that a parameter gets here; ``benchmarks/wrong_calls.py`` gives it all of them."""


@pytest.mark.parametrize("target", generated.targets(), ids=lambda target: target.name)
def test_any_value_for_any_parameter_is_refused_by_name_or_means_something(target: Target) -> None:
    draw = random.Random(target.name)
    calls = [
        generated.WrongCall(target, parameter, value)
        for parameter in target.parameters
        for value in draw.sample([*generated.POOL], EACH)
    ]
    outcomes = {str(call): generated.outcome(call) for call in calls}
    assert {call: one for call, one in outcomes.items() if not one.is_right} == {}


def test_wrong_calls_leave_the_model_as_it_was() -> None:
    before = {name: plain(tensor) for name, tensor in adapted().named_parameters()}
    draw = random.Random(0)
    calls = [call for call in generated.wrong_calls() if call.target.name == "check_training"]
    for call in draw.sample(calls, 20):
        generated.outcome(call)
    assert {name: plain(tensor) for name, tensor in adapted().named_parameters()} == before


def test_every_public_name_is_called_or_made_by_us() -> None:
    called = {*OTHERS, *(target.name for target in generated.targets())}
    assert {*pytest_lora.__all__} == {name for name in called if "." not in name} | GIVEN_BY_US
    assert not called & GIVEN_BY_US


@pytest.mark.parametrize(("subject", "function"), [pytest.param(*f, id=f[1].__name__) for f in functions()])
def test_an_unknown_argument_is_refused_by_the_name_of_the_function(subject: str, function: Any) -> None:
    with pytest.raises(TypeError, match=f"^{function.__name__} has no argument 'ignor'; write ignore=$"):
        function(**RIGHT[subject](), ignor=["LORA1"])
    name = next(iter(RIGHT[subject]()))
    arguments = {key: value for key, value in RIGHT[subject]().items() if key != name}
    with pytest.raises(TypeError, match=f"{function.__name__}.*'{name}'"):
        function(**arguments)


def test_what_is_called_otherwise_elsewhere_is_answered_with_our_name() -> None:
    with pytest.raises(TypeError, match=r"^assert_lora_healthy has no argument 'batch'; write batches=$"):
        pytest_lora.assert_lora_healthy(adapted(), batch=language_batch())
    with pytest.raises(
        TypeError, match=r"^assert_loss_decreases has no argument 'lr'; write learning_rate=$"
    ):
        pytest_lora.assert_loss_decreases(adapted(), language_batch(), lr=1.0)


def test_every_check_has_its_assertion_with_the_same_arguments() -> None:
    pairs = list(functions())
    for (_, check), (_, assertion) in zip(pairs[::2], pairs[1::2], strict=True):
        assert inspect.signature(check) == inspect.signature(assertion)
        assert inspect.unwrap(assertion) is inspect.unwrap(check)
        for name in ("expect", "select", "ignore"):
            assert inspect.signature(check).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_configuration_and_its_base_are_understood_in_either_order() -> None:
    first = pytest_lora.check_config(config(), examples.llama_7b)
    second = pytest_lora.check_config(examples.llama_7b, config())
    assert first == second


class _Unread(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("not to be read")


class _Endless(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(int, 1)


def test_an_argument_that_raises_is_among_those_named_and_one_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^config or base or upcast: step_memory cannot work with this: Ru"):
        pytest_lora.step_memory(config(), examples.llama_7b, upcast=_Unread())
    with pytest.raises(ValueError, match=r"^batch must have at most 10,000 elements$"):
        pytest_lora.check_lora_laws(adapted(), _Endless())
