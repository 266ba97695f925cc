"""How many numbers a model holds: logical, trainable, of its adapters, and as they are stored; and how many an adapter
of a given rank has, which PEFT puts on a skeleton for that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import nn

from pytest_lora.facts.base import BaseFacts
from pytest_lora.inspection.base import BaseParameter, base_parameters, own_parameters
from pytest_lora.inspection.config import ADAPTER, dry_run
from pytest_lora.inspection.limited.patterns import require_matchable
from pytest_lora.inspection.peft_internals import WRAPPERS, LoraConfig
from pytest_lora.inspection.peft_state import saved_state
from pytest_lora.inspection.skeleton import skeleton
from pytest_lora.inspection.state import leaves_no_trace
from pytest_lora.inspection.survey import Survey, every_module, survey
from pytest_lora.values import in_short


class Totals(NamedTuple):
    """Numbers in a model; tied parameters count once.

    Attributes:
        trainable: Logical numbers that require gradients.
        total: Logical numbers, adapters included.
        base: Logical numbers that belong to no adapter; a value head around the model is among them.
        stored: What ``sum(p.numel() for p in model.parameters())`` gives; packed 4-bit bytes count once.
        stored_bytes: Bytes of all parameters as they are stored.
    """

    trainable: int
    total: int
    base: int
    stored: int
    stored_bytes: int

    @property
    def adapter(self) -> int:
        """Logical numbers of all adapters."""
        return self.total - self.base


def count(model: nn.Module, found: Survey, base: tuple[BaseParameter, ...]) -> Totals:
    """Count a model whose survey and base parameters are known."""
    plain = {id(p.tensor): p.numbers for p in (*_outside(model, found.root), *base)}
    copies = {id(p.tensor): p.numbers for p in _copies(found)}
    trainable = total = in_base = stored = stored_bytes = 0
    for parameter in _stored(model):
        numel = parameter.numel()
        stored += numel
        stored_bytes += numel * parameter.element_size()
        numbers = plain.get(id(parameter))
        if numbers is not None:
            in_base += numbers
        else:
            numbers = copies.get(id(parameter), numel)
        total += numbers
        if parameter.requires_grad:
            trainable += numbers
    return Totals(trainable, total, in_base, stored, stored_bytes)


def _stored(model: nn.Module) -> Iterable[nn.Parameter]:
    """What ``model.parameters()`` yields.

    That call itself would make PEFT's LoRA layer for ``nn.MultiheadAttention`` replace parameters by equal
    ones (its ``_restore_weights``), which could then no longer be told by identity.
    """
    parameters = (p for module in every_module(model) for p in module._parameters.values() if p is not None)
    return {id(p): p for p in parameters}.values()


def _outside(module: nn.Module, root: nn.Module, name: str = "") -> Iterator[BaseParameter]:
    """Parameters of what is wrapped around the base but is no PEFT model, such as a value head."""
    if module is root or isinstance(module, WRAPPERS):
        return
    yield from own_parameters(name, module)
    for child_name, child in module.named_children():
        yield from _outside(child, root, f"{name}.{child_name}" if name else child_name)


def _copies(found: Survey) -> Iterator[BaseParameter]:
    """Parameters of the copies that ``modules_to_save`` made; a copy of a packed layer is packed too."""
    for name, wrapper in found.saved.items():
        for module in wrapper.modules_to_save.modules():
            yield from own_parameters(name, module)


PACKABLE = ("Linear", "Conv1D", "Linear8bitLt")
"""Kinds of modules that transformers packs when it loads a model with ``load_in_4bit``."""


def stored_in_4bit(facts: BaseFacts, parameters: tuple[BaseParameter, ...]) -> int:
    """What ``sum(p.numel())`` gives for a base whose linear layers are packed, two numbers a byte.

    Where the base is in 4 bits already, its own storage counts. Where it is not, the layers count that
    transformers would pack (``get_keys_to_not_convert``): all linear ones but the output embedding, those
    that share their weight, and the one that holds the last parameter.
    """
    packed = {p.module for p in parameters if p.quantization == "4bit"} or _would_be_packed(facts, parameters)
    total = 0
    for parameter in parameters:
        numel = parameter.tensor.numel()
        unpacked = parameter.name == "weight" and parameter.module in packed and numel == parameter.numbers
        total += (numel + 1) // 2 if unpacked else numel
    return total


def _would_be_packed(facts: BaseFacts, parameters: tuple[BaseParameter, ...]) -> set[str]:
    kept = {facts.output_embeddings, *(name for group in facts.tied for name in group)}
    if parameters and parameters[-1].name == "weight":
        kept.add(parameters[-1].module)
    return {m.name for m in facts.modules if m.kind in PACKABLE} - kept


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
