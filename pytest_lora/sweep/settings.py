"""The arguments of a sweep: checked before any trial, and described for journal and record."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pytest_lora.facts.sweep import rate_text
from pytest_lora.sweep import TrialPlan
from pytest_lora.sweep.digest import Reader
from pytest_lora.sweep.evidence import more_is_better
from pytest_lora.sweep.halving import budgets, require_optuna
from pytest_lora.values import (
    MOST_ITEMS,
    require_flag,
    require_items,
    require_number,
    require_share,
    require_text,
    require_whole,
    shown,
)

MOST = {"ranks": 2**16, "seeds": 2**64 - 1}
"""No matrix of a language model has a rank above its hidden size; torch's generators take a seed of 64 bits."""

MOST_ALPHA = 1e9
"""Of ``lora_alpha``, or what it is of the rank; PEFT documents it as a whole number."""

ALPHA_RATIO = 2.0
"""``lora_alpha`` for each rank where the user gives none: what the QLoRA examples of PEFT and TRL use."""


@dataclass(frozen=True)
class SweepSettings:
    """Checked arguments; ``rank_sweep`` documents them."""

    functions: dict[str, Any]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    halving: int | None
    alpha_ratio: float | None
    alpha: float | None
    fraction: float
    epochs: int
    config: Any
    metric: str
    maximise: bool
    data: str
    version: str
    executor: Executor | None

    @property
    def rates(self) -> tuple[float | None, ...]:
        """The rates of the grid; None alone in a sweep over ranks."""
        return self.learning_rates or (None,)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Share of the full training in each round; the last is 1."""
        return (1.0,) if self.halving is None else budgets(len(self.rates), self.halving)

    def plans(self, budget: float, rates: Mapping[int, Sequence[float | None]]) -> list[TrialPlan]:
        """One a trial of a round, for some rates of each rank: seed by seed, so that each has a result early."""
        seeds = self.seeds if budget == 1 else self.seeds[:1]
        return [
            self.plan(rank, seed, rate, budget) for seed in seeds for rank in rates for rate in rates[rank]
        ]

    def plan(self, rank: int, seed: int, rate: float | None = None, budget: float = 1.0) -> TrialPlan:
        """The plan of a trial."""
        alpha = self.alpha if self.alpha_ratio is None else self.alpha_ratio * rank
        assert alpha is not None
        # PEFT documents lora_alpha as an integer, and saves what it is given.
        alpha = int(alpha) if alpha == int(alpha) else alpha
        return TrialPlan(rank, alpha, seed, self.fraction * budget, self.epochs, rate, budget)

    def before(self) -> TrialPlan:
        """The plan of the measurement before training."""
        return replace(self.plan(self.ranks[0], self.seeds[0]), epochs=0)

    def recorded(self) -> dict[str, str]:
        """What the result says of itself: ``described``, and the grid's rates."""
        grid = (
            {}
            if not self.learning_rates
            else {"learning_rates": ", ".join(map(rate_text, self.learning_rates))}
        )
        return self.described() | grid | ({} if self.halving is None else {"halving": str(self.halving)})

    def described(self) -> dict[str, str]:
        """What all trials share, as readable text; a sweep whose text differs is another sweep."""
        return {
            "alpha": f"{self.alpha:g}" if self.alpha_ratio is None else f"{self.alpha_ratio:g} r",
            "fraction": f"{self.fraction:g}",
            "epochs": str(self.epochs),
            "metric": self.metric,
            "maximise": str(self.maximise),
            "config": _config_text(self.config),
            "data": self.data,
            "version": self.version,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            **self._held[0],
        }

    @property
    def unread(self) -> tuple[str, ...]:
        """What the functions hold that cannot be compared with that of another sweep."""
        return self._held[1]

    @cached_property
    def _held(self) -> tuple[dict[str, str], tuple[str, ...]]:
        reader = Reader()
        settings: dict[str, str] = {}
        for name, function in self.functions.items():
            settings |= reader.function(name, function)
        return settings, tuple(reader.unread)


def checked(
    make_model: Any,
    train: Any,
    evaluate: Any,
    *,
    ranks: Any,
    learning_rates: Any,
    halving: Any,
    alpha_ratio: Any,
    alpha: Any,
    fraction: Any,
    epochs: Any,
    seeds: Any,
    config: Any,
    metric: Any,
    maximise: Any,
    data: Any,
    version: Any,
    executor: Any,
) -> SweepSettings:
    """The arguments of ``rank_sweep``, all of them checked.

    Raises:
        TypeError, ValueError: One is wrong; the message names it.
    """
    functions = {"make_model": make_model, "train": train, "evaluate": evaluate}
    for name, function in functions.items():
        _require_function(name, function)
    _require_executor(executor, functions)
    if alpha is not None and alpha_ratio is not None:
        raise ValueError("alpha fixes what alpha_ratio ties to the rank; give one of them")
    if alpha is None and alpha_ratio is None:
        alpha_ratio = ALPHA_RATIO
    for name, value in (("alpha_ratio", alpha_ratio), ("alpha", alpha)):
        if value is not None:
            require_number(name, value, above=0.0, most=MOST_ALPHA)
    if maximise is not None:
        require_flag("maximise", maximise)
    rates = _rates(learning_rates)
    for name, text in (("metric", metric), ("data", data), ("version", version)):
        require_text(name, text)
    return SweepSettings(
        functions=functions,
        ranks=tuple(sorted(_whole_numbers("ranks", ranks, least=1))),
        seeds=_seeds(seeds),
        learning_rates=rates,
        halving=_halving(halving, rates),
        alpha_ratio=alpha_ratio,
        alpha=alpha,
        fraction=require_share("fraction", fraction),
        epochs=require_whole("epochs", epochs, least=1),
        config=_config(config),
        metric=metric,
        maximise=more_is_better(metric) is not False if maximise is None else maximise,
        data=data,
        version=version,
        executor=executor,
    )


def _rates(values: Any) -> tuple[float, ...]:
    if values is None:
        return ()
    given = require_items("learning_rates", values, "numbers such as (1e-4, 3e-4, 1e-3)")
    rates = [require_number("learning_rates", value, above=0.0) for value in given]
    if not rates:
        raise ValueError("learning_rates must not be empty; None sweeps over ranks alone")
    if twice := sorted({rate for rate in rates if rates.count(rate) > 1}):
        raise ValueError(f"learning_rates must differ, but {rate_text(twice[0])} is there twice")
    return tuple(sorted(rates))


def _halving(halving: Any, rates: Sequence[float]) -> int | None:
    if halving is None:
        return None
    require_whole("halving", halving, least=2, most=MOST_ITEMS)
    if len(rates) < 2:
        raise ValueError("halving drops learning rates, of which there must be two; give learning_rates")
    require_optuna()
    return int(halving)


def _require_function(name: str, function: Any) -> None:
    if callable(function) and not isinstance(function, type):
        return
    hint = ""
    if name == "train" and isinstance(function, (list, tuple)):
        hint = "; for a list of batches: TrainOn(batches, lr=...) from pytest_lora.sweep"
    raise TypeError(f"{name} must be a function, not {type(function).__name__}{hint}")


def _require_executor(executor: Any, functions: Mapping[str, Any]) -> None:
    if executor is None:
        return
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor must be a concurrent.futures.Executor, not {type(executor).__name__}")
    if not isinstance(executor, ProcessPoolExecutor):
        return
    for name, function in functions.items():
        try:
            pickle.dumps(function)
        except Exception as error:
            raise TypeError(
                f"{name} cannot be sent to the processes of executor ({error}); "
                "make it a function at the top of a module, or a functools.partial of one"
            ) from error


def _config(config: Any) -> Any:
    from peft import LoraConfig

    if config is None:
        return None
    if isinstance(config, Mapping):
        for name, instead in (("r", "ranks"), ("lora_alpha", "alpha_ratio")):
            if name in config:
                raise ValueError(f"config: {name} is what {instead} is for; leave it out")
        try:
            made: Any = LoraConfig(**config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"config: peft refuses it: {error}") from error
    elif isinstance(config, LoraConfig):
        made = config
    else:
        raise TypeError(
            f"config must be a peft.LoraConfig, a dict of its fields or None, not {shown(config)}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(made, name):
            raise ValueError(f"config: {name} fixes values that the sweep is to vary; leave it out")
    return dict(config) if isinstance(config, Mapping) else config


def _whole_numbers(name: str, values: Any, least: int) -> tuple[int, ...]:
    given = require_items(name, values, "whole numbers such as (4, 8, 16)")
    numbers = tuple(require_whole(name, value, least=least, most=MOST[name]) for value in given)
    if not numbers:
        raise ValueError(f"{name} must not be empty")
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise ValueError(f"{name} must differ, but {twice[0]} is there twice")
    return numbers


def _seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int):
        return tuple(range(require_whole("seeds", seeds, least=1, most=MOST_ITEMS)))
    return _whole_numbers("seeds", seeds, least=0)


def _config_text(config: Any) -> str:
    if config is None:
        return "all linear layers"
    fields = dict(config) if isinstance(config, Mapping) else _changed_fields(config)
    plain = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in fields.items()}
    return ", ".join(f"{name}={plain[name]!r}" for name in sorted(plain))


def _changed_fields(config: Any) -> dict[str, Any]:
    defaults = vars(type(config)())
    return {
        name: value
        for name, value in vars(config).items()
        if name not in ("r", "lora_alpha") and value != defaults.get(name)
    }
