"""What a user asks of GPU memory: estimate, budget, what-if, frontier; here the arguments that all questions share.

How a step is traced is in inspection/memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from pytest_lora.arguments import adapter_and_base, refusing
from pytest_lora.facts.memory import Checkpointing
from pytest_lora.facts.memory_choices import Attention, Evaluation, Kernels, Loss, Offload
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
    upcast: Sequence[str]
    autocast: bool | str | None
    adapter_dtype: str | torch.dtype | None
    use_cache: bool
    empty_cache: bool
    workspace: int | str | None
    attention: Attention | None
    frozen: Sequence[str]
    images: int
    image_size: int | tuple[int, int] | None
    trainer: str | None
    args: Any
    padding_free: bool
    gpus: int | None
    strategy: str | None
    offload: Offload | None
    reshard_after_forward: bool | None
    wrap: Sequence[str]
    shard_size: int | None
    parallel: Any
    evaluation: Evaluation | None
    loss: Loss | None
    kernels: Kernels | None


def names_settings(function: _Function) -> _Function:
    """Make a function of ``(config, base, ..., **setting: Unpack[StepArguments])`` say and check its arguments.

    Its signature shows every setting with its default; an unknown argument is refused by the name of this
    function; an adapter and a base that come in the other order are put right.
    """
    own = inspect.signature(function)
    first = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    settings = inspect.signature(checked_setting).parameters.values()

    @wraps(function)
    def called(config: Any, base: Any, *further: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        config, base = adapter_and_base(config, base)
        return function(config, base, *further, **named)

    vars(called)["__signature__"] = own.replace(parameters=[*first, *settings])
    return cast(_Function, refusing(called))
