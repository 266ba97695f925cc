"""The arguments that all questions about memory share: their names, their types, and the order of the first two."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from pytest_lora.facts.memory import Checkpointing
from pytest_lora.memory.setting import checked_setting

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

    from pytest_lora.facts.memory import Quantization

_Function = TypeVar("_Function", bound=Callable[..., Any])


class StepArguments(TypedDict, total=False):
    """The settings of a step, batch size and sequence length aside; ``estimate_memory`` says what each means."""

    quantization: str | BitsAndBytesConfig | Quantization | None
    dtype: str | torch.dtype
    gradient_checkpointing: Checkpointing | None
    optimizer: str
    padding_mask: bool
    accumulation: int
    outputs_held: bool | None
    prepare_for_kbit: bool | None
    autocast: bool | str | None
    adapter_dtype: str | torch.dtype | None
    use_cache: bool
    empty_cache: bool
    workspace: int | str
    frozen: Sequence[str]
    images: int
    image_size: int | tuple[int, int] | None
    trainer: str | None
    args: Any
    padding_free: bool


_SPELLINGS = {
    "gradient_accumulation_steps": "accumulation=",
    "per_device_train_batch_size": "batch_size=",
    "micro_batch_size": "batch_size=",
    "max_length": "seq_len=",
    "max_seq_length": "seq_len=",
    "sequence_len": "seq_len=",
    "cutoff_len": "seq_len=",
    "optim": "optimizer=",
    "torch_dtype": "dtype=",
    "bf16": 'dtype="bfloat16"',
    "fp16": 'dtype="float16"',
    "quantization_config": "quantization=",
    "bnb_config": "quantization=",
    "load_in_4bit": 'quantization="nf4"',
    "load_in_8bit": 'quantization="int8"',
    "use_gradient_checkpointing": "gradient_checkpointing=",
    "peft_config": "config=",
    "lora_config": "config=",
    "model": "base=",
    "vram": "budget=",
}
"""What trainers and recipes call an argument of ours, and how to write it here."""


def names_settings(function: _Function) -> _Function:
    """Make a function of ``(config, base, ..., **setting: Unpack[StepArguments])`` say and check its arguments.

    Its signature shows every setting with its default; an unknown argument is refused by the name of this
    function; an adapter and a base that come in the other order are put right.
    """
    own = inspect.signature(function)
    first = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    settings = inspect.signature(checked_setting).parameters.values()
    shown = own.replace(parameters=[*first, *settings])

    @wraps(function)
    def called(config: Any, base: Any, *further: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        _refuse_unknown(function.__name__, named, shown.parameters)
        config, base = adapter_first(config, base)
        return function(config, base, *further, **named)

    vars(called)["__signature__"] = shown
    return cast(_Function, called)


def adapter_first(config: Any, base: Any) -> tuple[Any, Any]:
    """The two in the order in which they are used; only one of them can be a ``LoraConfig``.

    Raises:
        TypeError: Neither is.
    """
    from pytest_lora.inspection.peft_internals import LoraConfig

    if isinstance(config, LoraConfig):
        return config, base
    if isinstance(base, LoraConfig):
        return base, config
    raise TypeError(f"config must be a peft.LoraConfig, not {type(config).__name__}")


def _refuse_unknown(function: str, named: Collection[str], known: Collection[str]) -> None:
    for name in named:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        written = _SPELLINGS.get(name) or (f"{near[0]}=" if near else "")
        remedy = f"; write {written}" if written else f"; it has {', '.join(known)}"
        raise TypeError(f"{function} has no argument {name!r}{remedy}")
