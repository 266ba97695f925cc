"""What an optimizer holds for each parameter, asked of the installed optimizer itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pytest_lora.inspection.skeleton import META

PAGED_FROM = 100_000
"""Numbers from which bitsandbytes pages a state (``Optimizer2State.get_state_buffer``)."""


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer by the name that ``TrainingArguments`` gives it.

    Attributes:
        make: Makes it for a list of parameters.
        temporaries: Bytes a number of the parameter that a step needs beside its states, for all
            parameters at once.
        paged: Whether large states live in unified memory, outside of the allocator.
        frozen: Factors that it freezes.
    """

    make: Callable[[list[torch.nn.Parameter]], Any]
    temporaries: int = 0
    paged: bool = False
    frozen: tuple[str, ...] = ()


def _torch(name: str, **arguments: Any) -> Callable[[list[torch.nn.Parameter]], Any]:
    return lambda parameters: getattr(torch.optim, name)(parameters, **arguments)


def _bitsandbytes(name: str, **arguments: Any) -> Callable[[list[torch.nn.Parameter]], Any]:
    def make(parameters: list[torch.nn.Parameter]) -> Any:
        import bitsandbytes as bnb

        return getattr(bnb.optim, name)(parameters, **arguments)

    return make


def _lora_fa(parameters: list[torch.nn.Parameter]) -> Any:
    """PEFT's LoRA-FA, which asks for each B together with its frozen A; of that, its rank matters alone."""
    from peft.optimizers.lorafa import LoraFAOptimizer

    groups: Any = []
    for factor in parameters:
        frozen = torch.nn.Parameter(factor.new_empty(factor.shape[-1], 1), requires_grad=False)
        names = ["factor.lora_A", "factor.lora_B"]
        scaling = {
            "scaling_factors": [1.0, 1.0],
            "scaling_factor": 1.0,
        }  # new PEFT reads the first, old the second
        groups.append({"params": [frozen, factor], "names": names, **scaling})
    return LoraFAOptimizer(groups)


def _adafactor(parameters: list[torch.nn.Parameter]) -> Any:
    import transformers

    adafactor: Any = transformers.Adafactor
    return adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-3)


_FLOAT = 4
_SHARED = "qmap"
"""Code books of 8-bit states; all parameters share them."""

OPTIMIZERS: Mapping[str, OptimizerKind] = {
    "adamw_torch": OptimizerKind(_torch("AdamW", foreach=False), temporaries=_FLOAT),
    "adamw_torch_fused": OptimizerKind(_torch("AdamW", foreach=False)),
    "sgd": OptimizerKind(_torch("SGD", lr=1e-3, foreach=False)),
    "adagrad": OptimizerKind(_torch("Adagrad", foreach=False), temporaries=2 * _FLOAT),
    "rmsprop": OptimizerKind(_torch("RMSprop", foreach=False), temporaries=_FLOAT),
    "adafactor": OptimizerKind(_adafactor),
    "adamw_8bit": OptimizerKind(_bitsandbytes("AdamW8bit")),
    "adamw_bnb_8bit": OptimizerKind(_bitsandbytes("AdamW8bit")),
    "paged_adamw_32bit": OptimizerKind(_bitsandbytes("AdamW32bit"), paged=True),
    "paged_adamw_8bit": OptimizerKind(_bitsandbytes("AdamW8bit"), paged=True),
    "lion_32bit": OptimizerKind(_bitsandbytes("Lion32bit")),
    "lion_8bit": OptimizerKind(_bitsandbytes("Lion8bit")),
    "paged_lion_32bit": OptimizerKind(_bitsandbytes("Lion32bit"), paged=True),
    "paged_lion_8bit": OptimizerKind(_bitsandbytes("Lion8bit"), paged=True),
    "ademamix": OptimizerKind(_bitsandbytes("AdEMAMix32bit")),
    "ademamix_8bit": OptimizerKind(_bitsandbytes("AdEMAMix8bit")),
    "paged_ademamix_32bit": OptimizerKind(_bitsandbytes("AdEMAMix32bit"), paged=True),
    "paged_ademamix_8bit": OptimizerKind(_bitsandbytes("AdEMAMix8bit"), paged=True),
    "rmsprop_bnb": OptimizerKind(_bitsandbytes("RMSprop32bit")),
    "rmsprop_bnb_32bit": OptimizerKind(_bitsandbytes("RMSprop32bit")),
    "rmsprop_bnb_8bit": OptimizerKind(_bitsandbytes("RMSprop8bit")),
    "lorafa": OptimizerKind(_lora_fa, frozen=("lora_A",)),
}
"""Optimizers by name. torch's take the foreach path on CUDA unless fused: a square root of the second moment
for all parameters at once (``torch.optim.adamw._multi_tensor_adamw``, ``rmsprop``, ``adagrad``)."""


@lru_cache(maxsize=4096)
def state_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Bytes of each state tensor that an optimizer keeps for one parameter on the device.

    Raises:
        ValueError: The installed optimizer cannot be asked; the message says why.
    """
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=META))
    parameter.grad = torch.empty_like(parameter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = OPTIMIZERS[name].make([parameter])
            _fill_state(optimizer, parameter)
    except Exception as error:
        raise ValueError(f"optimizer: {name!r} cannot be asked for its state: {error}") from error
    # LoRA-FA keeps its state by the name of a layer, the others by the parameter.
    state: dict[str, Any] = optimizer.state.get(parameter) or next(iter(optimizer.state.values()), {})
    return tuple(
        value.untyped_storage().nbytes()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.is_meta and not key.startswith(_SHARED)
    )


def _fill_state(optimizer: Any, parameter: torch.nn.Parameter) -> None:
    """Let the optimizer make its state; bitsandbytes' steps need a GPU, its states do not."""
    if hasattr(optimizer, "init_state"):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    else:
        optimizer.step()
