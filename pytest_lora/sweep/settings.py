"""The arguments of a sweep: checked before any trial, and described for journal and record."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from pytest_lora.arguments import require_share
from pytest_lora.sweep.plan import TrialPlan


@dataclass(frozen=True)
class SweepSettings:
    """Checked arguments; ``rank_sweep`` documents them."""

    functions: dict[str, Any]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    alpha_ratio: float
    fraction: float
    epochs: int
    config: Any
    metric: str
    maximise: bool
    data: str
    executor: Executor | None

    def plans(self) -> list[TrialPlan]:
        """One a trial: seed by seed, so that every rank has a result early."""
        return [self.plan(rank, seed) for seed in self.seeds for rank in self.ranks]

    def plan(self, rank: int, seed: int, epochs: int | None = None) -> TrialPlan:
        """The plan of a trial."""
        alpha = self.alpha_ratio * rank
        # PEFT documents lora_alpha as an integer, and saves what it is given.
        alpha = int(alpha) if alpha == int(alpha) else alpha
        return TrialPlan(rank, alpha, seed, self.fraction, self.epochs if epochs is None else epochs)

    def described(self) -> dict[str, str]:
        """What all trials share, as readable text; a sweep whose text differs is another sweep."""
        return {
            "alpha_ratio": f"{self.alpha_ratio:g}",
            "fraction": f"{self.fraction:g}",
            "epochs": str(self.epochs),
            "metric": self.metric,
            "maximise": str(self.maximise),
            "config": _config_text(self.config),
            "data": self.data,
            **{name: function_text(function) for name, function in self.functions.items()},
        }


def checked(
    make_model: Any,
    train: Any,
    evaluate: Any,
    *,
    ranks: Any,
    alpha_ratio: Any,
    fraction: Any,
    epochs: Any,
    seeds: Any,
    config: Any,
    metric: Any,
    maximise: Any,
    data: Any,
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
    if isinstance(alpha_ratio, bool) or not isinstance(alpha_ratio, (int, float)):
        raise TypeError(f"alpha_ratio must be a number, not {alpha_ratio!r}")
    if not 0 < alpha_ratio < math.inf:
        raise ValueError(f"alpha_ratio must be a finite number above 0, not {alpha_ratio!r}")
    if not isinstance(maximise, bool):
        raise TypeError(f"maximise must be True or False, not {maximise!r}")
    for name, text in (("metric", metric), ("data", data)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be text, not {text!r}")
    return SweepSettings(
        functions=functions,
        ranks=tuple(sorted(_whole_numbers("ranks", ranks, least=1))),
        seeds=_seeds(seeds),
        alpha_ratio=alpha_ratio,
        fraction=require_share("fraction", fraction),
        epochs=_whole_number("epochs", epochs, least=1),
        config=_config(config),
        metric=metric,
        maximise=maximise,
        data=data,
        executor=executor,
    )


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
        raise TypeError(f"config must be a peft.LoraConfig, a dict of its fields or None, not {config!r:.60}")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(made, name):
            raise ValueError(f"config: {name} fixes values that the sweep is to vary; leave it out")
    return dict(config) if isinstance(config, Mapping) else config


def _whole_numbers(name: str, values: Any, least: int) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be whole numbers such as (4, 8, 16), not {values!r}")
    numbers = tuple(_whole_number(name, value, least) for value in values)
    if not numbers:
        raise ValueError(f"{name} must not be empty")
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise ValueError(f"{name} must differ, but {twice[0]} is there twice")
    return numbers


def _whole_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be whole, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def _seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int):
        return tuple(range(_whole_number("seeds", seeds, least=1)))
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


def function_text(function: Any) -> str:
    """A function's name with a digest of its source, of arguments of a ``partial``, of what a callable object holds."""
    if isinstance(function, functools.partial):
        given = [*map(_value_text, function.args)]
        given += [f"{name}={_value_text(value)}" for name, value in sorted(function.keywords.items())]
        return f"{function_text(function.func)}({', '.join(given)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    text = f"{named.__module__}.{named.__qualname__}"
    try:
        source = inspect.getsource(inspect.unwrap(named))
    except (OSError, TypeError):
        return text
    text += f"@{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if named is function:
        return text
    values = ", ".join(f"{name}={_value_text(value)}" for name, value in sorted(vars(function).items()))
    return f"{text}({values})" if values else text


def _value_text(value: Any) -> str:
    """A short value as it is; of a long one its type and a digest of what can be digested."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) < 80 else f"{type(value).__name__}@{_digest(value)}"
    if callable(value):
        return function_text(value)
    return f"{type(value).__name__}@{_digest(value)}"


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:12]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in value:
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "numpy") and hasattr(value, "detach"):
        tensor = value.detach().cpu()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
