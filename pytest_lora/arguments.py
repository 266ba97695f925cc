"""Refuses arguments: the one place that checks types, ranges and forms, and names the argument that is wrong."""

from __future__ import annotations

import difflib
import dis
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from pytest_lora.expect import Expect, is_lora_config
from pytest_lora.values import MOST_LOSSES, PLAIN, in_short, require_items, require_whole, shown

P = ParamSpec("P")
R = TypeVar("R")

MOST_STEPS = 100_000
"""What each step shows is kept until the end; so many are a training run, and no check of one."""

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
    subjects = [p.name for p in signature.parameters.values() if _is_subject(p)]

    @wraps(function)
    def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        for key in kwargs:
            if key not in signature.parameters:
                raise TypeError(
                    f"{called} has no argument {shown(key)}; {_meant(key, [*signature.parameters])}"
                )
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{called}: {error}") from None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            odd = [one for one, value in {**given, **kwargs}.items() if type(value) not in PLAIN]
            subject = " or ".join(dict.fromkeys((*subjects, *odd)))
            if not subject or is_meant(error):
                raise
            raise ValueError(f"{subject}: {called} cannot work with this: {_cause(error)}") from error

    asked.__name__ = asked.__qualname__ = called
    return asked


def _is_subject(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty


_OF_LIBRARIES = {
    "accelerate", "bitsandbytes", "builtins", "huggingface_hub", "numpy", "peft", "pydantic", "pydantic_core",
    "safetensors", "safetensors_rust", "tokenizers", "torch", "transformers", "trl", "yaml",
}  # fmt: skip
"""Packages whose errors say nothing of the argument; an error of any other class is the user's own."""

_RAISING = (dis.opmap["RAISE_VARARGS"], dis.opmap["RERAISE"])


def is_meant(error: Exception) -> bool:
    """Whether an error says what it has to: raised on purpose here, or by what is the user's own.

    Anything else comes from a library, or from a line of this package, that something odd in what was given took by
    surprise. What is the user's own has a note that says where it was called; out of memory is what it is.
    """
    home = type(error).__module__.partition(".")[0]
    if home not in _OF_LIBRARIES and home not in sys.stdlib_module_names:
        return True
    passing = isinstance(error, Warning) or type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    if passing or hasattr(error, "__notes__"):
        return True
    return raised_on_purpose(error, "pytest_lora")


def raised_on_purpose(error: Exception, package: str) -> bool:
    """Whether a line of this package says ``raise``, and took no error of another one by surprise."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] != package:
        return False
    # A conversion or an index that fails has the same frame, and another instruction.
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] in _RAISING


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it contains itself, or is nested too deeply (RecursionError)"
    return f"{type(error).__name__}: {in_short(error)}"


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
    if not is_lora_config(config) and is_lora_config(base):
        config, base = base, config
    require_config(config)
    return config, base


def require_config(config: Any) -> None:
    """Raise unless this is a configuration of a LoRA.

    Raises:
        TypeError: It is something else.
    """
    if not is_lora_config(config):
        raise TypeError(f"config must be a peft.LoraConfig, not {shown(config)}")


def require_expect(expect: Any) -> Expect:
    """What is meant, the defaults for None.

    Raises:
        TypeError: It is something else.
    """
    if expect is None:
        return Expect()
    if not isinstance(expect, Expect):
        raise TypeError(f"expect must be an Expect, not {shown(expect)}")
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
            f"{name} must be a mapping, a tuple or a tensor that the model takes, not {shown(batch)}"
        )
    values = batch.values() if isinstance(batch, Mapping) else (batch,) if is_tensor else batch
    values = require_items(name, values, "a mapping, a tuple or a tensor that the model takes")
    if any(getattr(value, "is_meta", False) for value in values):
        raise ValueError(f"{name} is on the meta device and has no values")


def require_steps(steps: Any) -> int:
    """A number of optimizer steps, at least 1 and few enough for a check."""
    return require_whole("steps", steps, least=1, most=MOST_STEPS)


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
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {shown(optimizer)}")
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must be a learning-rate scheduler, not {shown(scheduler)}")
    if scheduler is not None and optimizer is None:
        raise ValueError("scheduler needs the optimizer whose learning rate it sets; give optimizer too")
    if scaler is not None and not callable(getattr(scaler, "unscale_", None)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, not {shown(scaler)}")


def require_history(history: Any) -> tuple[float, ...]:
    """Losses as numbers; none for None.

    Raises:
        TypeError: They are no numbers.
    """
    if history is None:
        return ()
    if isinstance(history, Mapping):
        raise TypeError(f"history must be a sequence of losses, not {shown(history)}")
    losses = require_items("history", history, "a sequence of losses", most=MOST_LOSSES)
    try:
        return tuple(map(float, losses))
    except Exception as error:  # what stands for a number raises what it likes
        raise TypeError(f"history must hold numbers: {in_short(error)}") from error


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
