"""How many numbers an adapter of a given rank has: PEFT puts it on a skeleton, and they are counted there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from pytest_lora.inspection.base import base_parameters
from pytest_lora.inspection.config import ADAPTER, dry_run
from pytest_lora.inspection.limited.patterns import require_matchable
from pytest_lora.inspection.parameters import count
from pytest_lora.inspection.peft_internals import LoraConfig
from pytest_lora.inspection.peft_state import saved_state
from pytest_lora.inspection.skeleton import skeleton
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.inspection.survey import Survey, survey
from pytest_lora.values import in_short


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """Logical numbers of one adapter.

    Attributes:
        trainable: Numbers that train, those of the base among them (``bias="all"``).
        added: Numbers that the model has more than its base.
        saved: Numbers in the file that PEFT's ``save_pretrained`` writes.
    """

    trainable: int
    added: int
    saved: int

    def between(self, other: AdapterSize, share: int, of: int) -> AdapterSize:
        """The size at ``share / of`` of the way from here to ``other``; all sizes are linear in the rank."""
        return AdapterSize(
            *(
                (start := getattr(self, f.name)) + (getattr(other, f.name) - start) * share // of
                for f in fields(self)
            )
        )


@leaves_no_trace
def adapter_sizes(config: LoraConfig, model: nn.Module, ranks: Collection[int]) -> dict[int, AdapterSize]:
    """Sizes by rank. PEFT is asked at the smallest and the largest rank; in between, sizes are linear.

    Where the rank itself may be refused (grouped convolutions, LoRA variants with a configuration of their
    own), PEFT is asked at every rank.

    Raises:
        ValueError: PEFT refuses the configuration; the message has its reason.
    """
    low, high = min(ranks), max(ranks)
    found = {low: _adapter_size(config, model, low)}
    found[high] = found[low] if high == low else _adapter_size(config, model, high)
    picky = _asks_something_of_the_rank(config, model)
    for rank in set(ranks) - {low, high}:
        found[rank] = (
            _adapter_size(config, model, rank)
            if picky
            else found[low].between(found[high], rank - low, high - low)
        )
    return found


def _asks_something_of_the_rank(config: LoraConfig, model: nn.Module) -> bool:
    names = (f.name for f in fields(config) if f.name.endswith("_config") and f.name != "runtime_config")
    return any(getattr(config, name) for name in names) or any(
        _is_grouped(module) for module in model.modules()
    )


def _is_grouped(module: nn.Module) -> bool:
    groups: Any = getattr(module, "groups", None)
    return isinstance(groups, int) and groups > 1


def _adapter_size(config: LoraConfig, model: nn.Module, rank: int) -> AdapterSize:
    config = copy.deepcopy(config)
    config.r = rank
    require_matchable(config, dict(model.named_modules()))
    injected, error = dry_run(config, skeleton(model))
    if injected is None:
        raise ValueError(
            f"lora_kwargs: PEFT refuses them on this base at r={rank}: {in_short(error)}"
        ) from error
    found: Survey = survey(injected)
    counted = count(injected, found, base_parameters(found))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = saved_state(injected, ADAPTER)
    return AdapterSize(counted.trainable, counted.adapter, sum(t.numel() for t in saved.values()))
