"""Wrong arguments are refused by name, before any work, by every check and assertion."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

import pytest_lora
from pytest_lora.bases import examples
from pytest_lora.bases.examples.models import language_batch, made

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
    "path": (3, "/nowhere", None),
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


def adapted() -> Any:
    return get_peft_model(made("base"), LoraConfig(r=4, target_modules=["q_proj"]))


def config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])


STEP = {"batch_size": 1, "seq_len": 8}
RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    "adapter_shapes": lambda: {"model": adapted(), "batches": language_batch()},
    "alpha_ratio": lambda: {"model_or_config": config()},
    "checkpoint": lambda: {"path": examples.adapter()},
    "config": lambda: {"config": config(), "base": examples.llama_7b},
    "history": lambda: {"train_losses": [2.0, 1.0]},
    "lora_laws": lambda: {"model": adapted(), "batch": language_batch()},
    "loss_decreases": lambda: {"model": adapted(), "batches": language_batch()},
    "memory": lambda: {"config": config(), "base": examples.llama_7b, "budget": "24GiB", **STEP},
    "merge": lambda: {"model": adapted(), "batch": language_batch()},
    "model": lambda: {"model": adapted(), "batches": language_batch()},
    "param_ratio": lambda: {"model": adapted()},
    "reload": lambda: {"model": adapted(), "batch": language_batch()},
    "resume": lambda: {"path": examples.adapter(), "config": config()},
    "training": lambda: {"model": adapted(), "batches": language_batch()},
}
"""Right arguments of the check of each subject, and of its assertion."""

ASSERTIONS = {
    "checkpoint": "assert_checkpoint_healthy",
    "config": "assert_config_healthy",
    "history": "assert_history_healthy",
    "memory": "assert_fits_memory",
    "merge": "assert_merge_exact",
    "model": "assert_lora_healthy",
    "reload": "assert_reload_exact",
    "resume": "assert_resumable",
    "training": "assert_training_healthy",
}


def functions() -> Iterator[tuple[str, Any]]:
    for subject in RIGHT:
        check = "diagnose_history" if subject == "history" else f"check_{subject}"
        for name in (check, ASSERTIONS.get(subject, f"assert_{subject}")):
            yield subject, getattr(pytest_lora, name)


def wrong_calls(number: int, seed: int) -> list[Any]:
    every = [
        (subject, function, name, value)
        for subject, function in functions()
        for name in inspect.signature(function).parameters
        for value in WRONG.get(name, ())
        if not (subject == "reload" and name == "base")
        and not (subject == "resume" and value == "no/such-base")
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
        pytest_lora.assert_lora_healthy(adapted(), batch=language_batch())  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"^assert_loss_decreases has no argument 'lr'; write learning_rate=$"
    ):
        pytest_lora.assert_loss_decreases(adapted(), language_batch(), lr=1.0)  # type: ignore[call-arg]


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
