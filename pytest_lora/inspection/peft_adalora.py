"""What AdaLoRA keeps of its allocation of ranks, which PEFT does not document as public."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.adalora import AdaLoraModel
from torch import nn

from pytest_lora.inspection.peft_internals import LoraLayer, is_adalora


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
