"""What PEFT keeps of an adapter: the tensors that it saves and loads, and the allocation of ranks of AdaLoRA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.adalora import AdaLoraModel
from torch import nn

from pytest_lora.inspection.peft_internals import LoraLayer, is_adalora

if TYPE_CHECKING:
    from torch import Tensor


def saved_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes for one adapter of a model whose vocabulary was not resized.

    PEFT would ask the hub whether it was; a configuration without the base's name keeps it from doing so.
    """
    configs: Any = model.peft_config
    config = configs[adapter]
    named, config.base_model_name_or_path = config.base_model_name_or_path, None
    try:
        state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    finally:
        config.base_model_name_or_path = named
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], adapter: str) -> tuple[list[str], list[str]]:
    """Put tensors of an adapter file, on whatever device, in the place of a model's own.

    Returns:
        The names that the model has and the file has not, and those that the file has and the model has not.

    Raises:
        Exception: Whatever PEFT and torch raise where a shape or a head does not fit.
    """
    result: Any = set_peft_model_state_dict(model, state, adapter_name=adapter, low_cpu_mem_usage=True)
    return list(result.missing_keys), list(result.unexpected_keys)


def save_adapters(model: Any, folder: str, **how: Any) -> None:
    """PEFT's ``save_pretrained`` without the model card, whose template takes longer than all the rest."""
    vars(model)["create_or_update_model_card"] = lambda output_dir: None
    try:
        model.save_pretrained(folder, **how)
    finally:
        del vars(model)["create_or_update_model_card"]


def loading_device(model: nn.Module) -> str:
    """The ``torch_device`` for PEFT to load an adapter onto a model.

    Left to itself PEFT takes a GPU if there is one, which a check on the CPU would start.
    """
    first = next(model.parameters(), None)
    return "cpu" if first is None else str(first.device)


def allocation_begins(model: nn.Module, layers: Iterable[LoraLayer]) -> int | None:
    """Step at which AdaLoRA first takes ranks away, where nothing has ever called its allocator; None elsewhere.

    ``update_and_allocate`` gathers the importance of each weight from its first call on, and leaves the ranks that it
    chose in ``rank_pattern``, which is saved with the adapter.
    """
    if not any(map(is_adalora, layers)):
        return None
    tuner: Any = next((module for module in model.modules() if isinstance(module, AdaLoraModel)), None)
    config = getattr(tuner, "peft_config", {}).get(getattr(tuner, "trainable_adapter_name", None))
    allocator = getattr(tuner, "rankallocator", None)
    if config is None or allocator is None or allocator.ipt or config.rank_pattern:
        return None
    return int(config.tinit) + int(config.deltaT)
