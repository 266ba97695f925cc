"""Refuses arguments: the one place that checks types, ranges and forms, and names the argument that is wrong."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from pytest_lora.expect import Expect

P = ParamSpec("P")
R = TypeVar("R")

ELSEWHERE = {
    "batch": "batches=",
    "bf16": 'dtype="bfloat16"',
    "bnb_config": "quantization=",
    "base_model": "base=",
    "cutoff_len": "seq_len=",
    "fp16": 'dtype="float16"',
    "gradient_accumulation_steps": "accumulation=",
    "load_in_4bit": 'quantization="nf4"',
    "load_in_8bit": 'quantization="int8"',
    "lora_config": "config=",
    "lr": "learning_rate=",
    "max_length": "seq_len=",
    "max_seq_length": "seq_len=",
    "micro_batch_size": "batch_size=",
    "model": "base=",
    "model_name_or_path": "base=",
    "optim": "optimizer=",
    "peft_config": "config=",
    "per_device_train_batch_size": "batch_size=",
    "quantization_config": "quantization=",
    "sequence_len": "seq_len=",
    "torch_dtype": "dtype=",
    "use_gradient_checkpointing": "gradient_checkpointing=",
    "vram": "budget=",
}
"""What trainers and recipes call an argument of ours, and how to write it here."""


_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def hub_hint(given: str) -> str:
    """What to do where a path is meant and the name of a repository on the Hugging Face Hub is given; else empty."""
    if not _ON_HUB.fullmatch(given) or given.startswith("."):
        return ""
    folder = given.partition("/")[2]
    return f"; if it is a name on the Hub: hf download {given} --local-dir {folder}, and give that folder"


def refusing(function: Callable[P, R], name: str | None = None) -> Callable[P, R]:
    """The function, which says in its own name, or in this one, which argument it does not have or lacks.

    Raises:
        TypeError: An argument is unknown (the message suggests one), missing, or given twice.
    """
    signature = inspect.signature(function)
    called = name or function.__name__

    @wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        for key in kwargs:
            if key not in signature.parameters:
                raise TypeError(f"{called} has no argument {key!r}; {_meant(key, [*signature.parameters])}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{called}: {error}") from None
        return function(*args, **kwargs)

    asked.__name__ = asked.__qualname__ = called
    return asked


def _meant(key: str, known: list[str]) -> str:
    elsewhere = ELSEWHERE.get(key, "")
    if elsewhere.partition("=")[0] in known:
        return f"write {elsewhere}"
    close = difflib.get_close_matches(key, known, n=1)
    return f"write {close[0]}=" if close else f"it has {', '.join(known)}"


def adapter_and_base(config: Any, base: Any) -> tuple[Any, Any]:
    """The configuration and the base, whichever came first: a ``LoraConfig`` is not to be mistaken.

    Raises:
        TypeError: Neither is a configuration of an adapter.
    """
    if not _is_adapter_config(config) and _is_adapter_config(base):
        config, base = base, config
    if not _is_adapter_config(config):
        raise TypeError(f"config must be a peft.LoraConfig, not {type(config).__name__}")
    return config, base


def _is_adapter_config(value: Any) -> bool:
    return any(cls.__name__ == "LoraConfig" for cls in type(value).__mro__)


def require_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    finite: bool = True,
) -> float:
    """A number within these bounds.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    number = require_real(name, value)
    within = least <= number <= most and number > above
    if not within or (finite and math.isinf(number)):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"{name} must be {kind}{_bounds(least, most, above)}, not {value!r}")
    return number


def require_real(name: str, value: Any) -> float:
    """Any number.

    Raises:
        TypeError: It is none; the message has the name.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def _bounds(least: float, most: float, above: float) -> str:
    parts = [f"above {above:g}"] if above > -math.inf else []
    parts += [f"at least {least:g}"] if least > -math.inf else []
    parts += [f"at most {most:g}"] if most < math.inf else []
    return f" {' and '.join(parts)}" if parts else ""


def require_whole(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number, of at least ``least``.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def require_share(name: str, value: Any) -> float:
    """A number above 0 and at most 1.

    Raises:
        TypeError, ValueError: It is none; the message has the name.
    """
    return require_number(name, value, above=0.0, most=1.0)


def require_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: It is neither; the message has the name.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def require_expect(expect: Any) -> Expect:
    """What is meant, the defaults for None.

    Raises:
        TypeError: It is something else.
    """
    if expect is None:
        return Expect()
    if not isinstance(expect, Expect):
        raise TypeError(f"expect must be an Expect, not {type(expect).__name__}")
    return expect


def require_batch(name: str, batch: Any) -> None:
    """Raise unless ``batch`` has a form that a model can be called with, and values.

    Raises:
        TypeError: It is no mapping, tuple, list or tensor.
        ValueError: It is on the meta device.
    """
    is_tensor = hasattr(batch, "is_meta")
    if not is_tensor and not isinstance(batch, (Mapping, tuple, list)):
        raise TypeError(
            f"{name} must be a mapping, a tuple or a tensor that the model takes, not {type(batch).__name__}"
        )
    values = batch.values() if isinstance(batch, Mapping) else (batch,) if is_tensor else batch
    if any(getattr(value, "is_meta", False) for value in values):
        raise ValueError(f"{name} is on the meta device and has no values")


def require_steps(steps: Any) -> int:
    """A number of optimizer steps, at least 1."""
    return require_whole("steps", steps, least=1)


def require_loss_fn(loss_fn: Any) -> None:
    """Raise where ``loss_fn`` cannot be called.

    Raises:
        TypeError: It cannot.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be called with a model and a batch; {type(loss_fn).__name__} cannot be"
        )


def require_trainers(optimizer: Any, scheduler: Any, scaler: Any) -> None:
    """Raise where one of these is nothing of its kind.

    Raises:
        TypeError: One is something else.
        ValueError: There is a scheduler without its optimizer.
    """
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must be a learning-rate scheduler, not {type(scheduler).__name__}")
    if scheduler is not None and optimizer is None:
        raise ValueError("scheduler needs the optimizer whose learning rate it sets; give optimizer too")
    if scaler is not None and not callable(getattr(scaler, "unscale_", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")


def require_history(history: Any) -> tuple[float, ...]:
    """Losses as numbers; none for None.

    Raises:
        TypeError: They are no numbers.
    """
    if history is None:
        return ()
    if isinstance(history, (str, bytes, Mapping)) or not isinstance(history, Iterable):
        raise TypeError(f"history must be a sequence of losses, not {type(history).__name__}")
    try:
        return tuple(float(loss) for loss in history)
    except (TypeError, ValueError) as error:
        raise TypeError(f"history must hold numbers: {error}") from error


def require_snapshot(snapshot: Any) -> Mapping[str, Any] | None:
    """Weights by their names, or None.

    Raises:
        TypeError: It is something else.
    """
    if snapshot is not None and not isinstance(snapshot, Mapping):
        raise TypeError(
            f"base_snapshot must map names to tensors, as state_dict() does, not {type(snapshot).__name__}"
        )
    return snapshot
