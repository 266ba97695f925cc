"""Wrong calls of every public function: each parameter gets every value of a pool, the others stay right.

A wrong call may succeed, where the value means something after all. Otherwise it is refused: by a ``raise`` of this
package, with an error that its documentation knows, whose text names the argument, before any work.
"""

from __future__ import annotations

import dis
import inspect
import re
import tempfile
import types
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import pytest_lora
from pytest_lora.bases import examples
from pytest_lora.bases.examples.models import language_batch, made
from pytest_lora.bases.tiny import tiny_config
from pytest_lora.sweep.rows import TrialRow

PACKAGE = str(Path(pytest_lora.__file__).parent)

POOL: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "an object": object,
    "True": lambda: True,
    "zero": lambda: 0,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "10**9": lambda: 10**9,
    "400 digits": lambda: 10**399,
    "-400 digits": lambda: -(10**399),
    "5,000 digits": lambda: 10**4999,
    "1e308": lambda: 1e308,
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "a complex": lambda: 1j,
    "a Decimal": lambda: Decimal("NaN"),
    "a Fraction": lambda: Fraction(1, 3),
    "NumPy's NaN": lambda: np.float32("nan"),
    "an array": lambda: np.ones((2, 3)),
    "a tensor": lambda: torch.ones(2, 3),
    "a scalar tensor": lambda: torch.tensor(float("nan")),
    "an empty text": lambda: "",
    "a text": lambda: "nonsense",
    "a superscript": lambda: "\u00b2",
    "5,000 digits in a text": lambda: "9" * 5000,
    "a long text": lambda: "x" * 100_000,
    "a NUL": lambda: "a\0b",
    "a surrogate": lambda: "\ud800",
    "an escape": lambda: "\x1b[2J::error::",
    "a bracket": lambda: "(",
    "bytes": lambda: b"bytes",
    "an empty list": list,
    "an empty tuple": tuple,
    "an empty dict": dict,
    "an empty set": set,
    "a list of None": lambda: [None],
    "a list of objects": lambda: [object()],
    "a list of texts": lambda: ["", "\0"],
    "a list of 400 digits": lambda: [10**399],
    "a list of NaN": lambda: [float("nan"), 1.0],
    "a list of itself": lambda: _own_element(),
    "a dict of objects": lambda: {"x": object(), 3: None},
    "a UserDict": lambda: UserDict(x=1),
    "a generator": lambda: (one for one in ("a", None)),
    "a generator that raises": lambda: _raising(),
    "a range": lambda: range(3),
    "a function": lambda: _takes_nothing,
    "a class": lambda: nn.Linear,
    "the class of a configuration": lambda: LoraConfig,
    "the class of Expect": lambda: pytest_lora.Expect,
    "another configuration": lambda: IA3Config(target_modules=["q_proj"]),
    "a plain module": lambda: nn.Linear(2, 2),
    "an adapted module": lambda: adapted(),
    "an optimizer of nothing here": lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),
    "a path": lambda: Path("no/such/place"),
    "a folder": lambda: Path(tempfile.gettempdir()),
    "a module": lambda: types,
    "a device": lambda: torch.device("meta"),
    "a dtype": lambda: torch.int64,
    "what raises when shown": lambda: _Unshown(),
    "what has every attribute": lambda: _Everything(),
}
"""Values by a name; most fit no parameter. Made anew for each call, as some can be used once only."""


def _own_element() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _raising() -> Iterator[Any]:
    yield 1
    raise RuntimeError("of the generator")


def _takes_nothing() -> None:
    return None


class _Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


class _Everything:
    """Answers whatever it is asked for, as mocks do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Everything()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _Everything()


@cache
def adapted() -> Any:
    """One for all calls: a check leaves no trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(made("base"), LoraConfig(r=4, target_modules=["q_proj"]))


def config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])


@cache
def folder() -> Path:
    """A recipe to judge."""
    found = Path(tempfile.mkdtemp(prefix="pytest_lora_calls_"))
    (found / "recipe.yaml").write_text("model_name_or_path: Qwen/Qwen2.5-7B\nuse_peft: true\nlora_r: 8\n")
    return found


@cache
def arguments_of_a_trainer() -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(folder()), report_to=[], use_cpu=True)


def sweep_result() -> Any:
    rows = tuple(TrialRow(rank, 2 * rank, 0, metric=0.9) for rank in (4, 8))
    return pytest_lora.SweepResult("accuracy", True, 0.5, rows, {}, {})


def train(model: Any, plan: Any) -> None:
    return None


def evaluate(model: Any) -> float:
    return 0.5


@cache
def saved() -> Path:
    """A saved adapter that calls look at and none changes."""
    return examples.adapter()


def _small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


STEP: dict[str, Any] = {"batch_size": 1, "seq_len": 8}
ON_A_MODEL = {"model": adapted, "batch": language_batch}
OF_MEMORY = {"config": config, "base": tiny_config}
RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    "adapter_shapes": lambda: {"model": adapted(), "batches": language_batch()},
    "adapters_in_sync": lambda: {"model": adapted()},
    "alpha_ratio": lambda: {"model_or_config": config()},
    "checkpoint": lambda: {"path": saved()},
    "config": lambda: {"config": config(), "base": tiny_config()},
    "history": lambda: {"train_losses": [2.0, 1.0]},
    "lora_laws": lambda: {"model": adapted(), "batch": language_batch()},
    "loss_decreases": lambda: {"model": adapted(), "batches": language_batch(), "steps": 2},
    "memory": lambda: {"config": config(), "base": tiny_config(), "budget": "24GiB", **STEP},
    "merge": lambda: {"model": adapted(), "batch": language_batch()},
    "model": lambda: {"model": adapted(), "batches": language_batch()},
    "param_ratio": lambda: {"model": adapted(), "high": 0.5},
    "rank_suffices": lambda: {"result": sweep_result(), "rank": 4},
    "recipe": lambda: {"path": folder() / "recipe.yaml"},
    "reload": lambda: {"model": adapted(), "batch": language_batch()},
    "resume": lambda: {"path": saved(), "config": config()},
    "run": lambda: {"args": arguments_of_a_trainer(), "config": config(), "base": tiny_config()},
    "training": lambda: {"model": adapted(), "batches": language_batch(), "steps": 1},
}
"""Right arguments of the check of each subject, and of its assertion."""

CHECKS = {"history": "diagnose_history"}
ASSERTIONS = {
    **{name: f"assert_{name}_healthy" for name in ("checkpoint", "config", "history", "recipe", "run", "training")},
    "memory": "assert_fits_memory", "merge": "assert_merge_exact", "model": "assert_lora_healthy",
    "reload": "assert_reload_exact", "resume": "assert_resumable",
}  # fmt: skip

OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "Evaluation": lambda: {"batch_size": 4},
    "Expect": dict,
    "LoraHealthCallback": dict,
    "StepMemory.estimate": lambda: dict(STEP),
    "StepMemory.peak_allocated": lambda: dict(STEP),
    "StepMemory.peak_reserved": lambda: dict(STEP),
    "SweepResult.choose": dict,
    "SweepResult.from_json": lambda: {"text": sweep_result().to_json()},
    "SweepResult.table": dict,
    "Report.from_json": lambda: {"text": pytest_lora.Report("x").to_json()},
    "Report.measure": lambda: {"name": "loss"},
    "card_table": lambda: {"config": config(), "base": tiny_config(), "cards": ["24GiB"], **STEP},
    "count_parameters": lambda: {"model": adapted()},
    "estimate_memory": lambda: {"config": config(), "base": tiny_config(), **STEP},
    "largest_that_fits": lambda: {
        "config": config(),
        "base": tiny_config(),
        "budget": "1GiB",
        "vary": "batch_size",
        "seq_len": 8,
    },
    "oom_frontier": lambda: {"config": config(), "base": tiny_config(), "budget": "1GiB", "seq_lens": [8]},
    "price": lambda: {"utilisation": 0.5, "per_hour": 1.0, "peak_tflops": 100.0},
    "rank_prices": lambda: {"config": config(), "base": tiny_config(), "ranks": [2], **STEP},
    "rank_sweep": lambda: {
        "make_model": _small,
        "train": train,
        "evaluate": evaluate,
        "ranks": (2,),
        "progress": False,
    },
    "rank_table": lambda: {"base": tiny_config(), "ranks": [2]},
    "rule": lambda: {"code": "ACME001", "severity": "error", "needs": pytest_lora.Report},
    "run_distributed": lambda: {"fn": evaluate},
    "step_memory": lambda: {"config": config(), "base": tiny_config()},
    "suggest_learning_rate": lambda: {"base": tiny_config()},
    "suggest_rank": lambda: {"base": tiny_config()},
    "watch_training": lambda: {"model": adapted()},
}
"""Right arguments of every other public function, and of methods that take some."""

GIVEN_BY_US = frozenset(
    {"Finding", "FrontierRow", "LoraHealthError", "LoraHealthWarning", "MemoryEstimate", "OomFrontier"}
    | {
        "ParameterCount",
        "RankAdvice",
        "RankChoice",
        "RankRow",
        "RankTable",
        "RanksFailedError",
        "Report",
        "Rule",
    }
    | {
        "StepMemory",
        "SweepResult",
        "TrialRow",
        "Violation",
        "CardRow",
        "CardTable",
        "Cost",
        "Price",
        "RankLock",
    }
    | {"RankPrice", "RankPrices", "RateAdvice", "StepFlops"}
)
"""Public classes whose objects this package makes: users read them."""


@contextmanager
def _nothing_is_launched() -> Iterator[None]:
    """Ranks are processes, and cost seconds each."""
    from unittest import mock

    launched = mock.Mock(return_value=dict.fromkeys(range(1024)))
    with mock.patch("torch.distributed.launcher.api.elastic_launch", return_value=launched):
        yield


@cache
def _memory() -> Any:
    return pytest_lora.step_memory(config(), tiny_config())


def _watched(**arguments: Any) -> Any:
    with pytest_lora.watch_training(**arguments) as watch:
        return watch


def _launched(**arguments: Any) -> Any:
    with _nothing_is_launched():
        return pytest_lora.run_distributed(**arguments)


WAYS: dict[str, Callable[..., Any]] = {"watch_training": _watched, "run_distributed": _launched}
METHODS: dict[str, Callable[[], Any]] = {
    "StepMemory": _memory,
    "SweepResult": sweep_result,
    "Report": lambda: pytest_lora.Report("x"),
}


class Target(NamedTuple):
    """A public function, how it is called rightly, and its parameters."""

    name: str
    call: Callable[..., Any]
    right: Callable[[], dict[str, Any]]
    parameters: tuple[str, ...]


def targets() -> list[Target]:
    """Every public function, and the methods above."""
    found = []
    for subject, right in RIGHT.items():
        for name in (CHECKS.get(subject, f"check_{subject}"), ASSERTIONS.get(subject, f"assert_{subject}")):
            function = getattr(pytest_lora, name, None) or getattr(pytest_lora, f"assert_{subject}")
            found.append(_target(name, function, function, right))
    for name, right in OTHERS.items():
        owner, _, method = name.rpartition(".")
        function = getattr(METHODS[owner]() if owner else pytest_lora, method)
        found.append(_target(name, WAYS.get(name, function), function, right))
    return found


def _target(name: str, call: Any, function: Any, right: Callable[[], dict[str, Any]]) -> Target:
    known = inspect.signature(function).parameters.values()
    return Target(name, call, right, tuple(p.name for p in known if p.kind is not p.VAR_KEYWORD))


class WrongCall(NamedTuple):
    """One value for one parameter."""

    target: Target
    parameter: str
    value: str

    def __str__(self) -> str:
        return f"{self.target.name}({self.parameter}=<{self.value}>)"


def wrong_calls() -> list[WrongCall]:
    """All of them."""
    return [WrongCall(t, p, v) for t in targets() for p in t.parameters for v in POOL]


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        kind: ``"succeeded"``, ``"refused"``, ``"found"`` (an assertion's finding), ``"raw"``, ``"unnamed"``, or
            ``"late"``: refused after work.
        error: What was raised, in short.
    """

    kind: str
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it ended as it may."""
        return self.kind in ("succeeded", "refused", "found")


DOCUMENTED = (TypeError, ValueError, OSError, KeyError)
TRIED = frozenset({"batch", "batches", "loss_fn", "make_model", "train", "evaluate", "base", "fn"})
"""Only a try shows whether these are right."""


def outcome(call: WrongCall) -> Outcome:
    """Make the call, and judge it."""
    arguments = {**call.target.right(), call.parameter: POOL[call.value]()}
    steps: list[int] = []
    try:
        with warnings.catch_warnings(), _counted(steps), chdir(folder()):
            warnings.simplefilter("ignore")
            call.target.call(**arguments)
    except pytest_lora.LoraHealthError:
        return Outcome("found")
    except Exception as error:
        return _judged(call, error, bool(steps))
    return Outcome("succeeded")


@contextmanager
def _counted(steps: list[int]) -> Iterator[None]:
    """A run of the model is work."""
    handle = adapted().register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        yield
    finally:
        handle.remove()


def _judged(call: WrongCall, error: Exception, worked: bool) -> Outcome:
    text = _text(error)
    said = f"{type(error).__name__}: {text[:200]}"
    if said == _right_error(call.target.name):
        return Outcome("succeeded")
    if call.parameter in TRIED and any(call.parameter in note for note in getattr(error, "__notes__", ())):
        return Outcome("refused", said)
    if not isinstance(error, DOCUMENTED) or not _is_raised_here(error):
        return Outcome("raw", said)
    if not re.search(rf"\b{re.escape(call.parameter)}\b", text):
        return Outcome("unnamed", said)
    if len(text) > 2_000 or (
        not text.isprintable() and any(c not in "\n" and not c.isprintable() for c in text)
    ):
        return Outcome("unnamed", f"{len(text)} characters: {said}")
    if worked and call.parameter not in TRIED:
        return Outcome("late", said)
    return Outcome("refused", said)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:
        return f"<unshown: {other!r}>"


@cache
def _right_error(name: str) -> str:
    """What a right call raises, as one without a process group does."""
    target = next(t for t in targets() if t.name == name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.call(**target.right())
    except pytest_lora.LoraHealthError:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {_text(error)[:200]}"
    return ""


def _is_raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` of this package raised it, and no operator or other library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
        return False
    ended = next(i for i in dis.get_instructions(trace.tb_frame.f_code) if i.offset == trace.tb_lasti)
    return ended.opname in ("RAISE_VARARGS", "RERAISE")
