"""How many parameters a LoRA has for each unit of rank, on the layers that it is put on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    Base: TypeAlias = nn.Module | PretrainedConfig | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a rank holds on these targets.

    Attributes:
        architecture: Class of the base.
        total: Parameters of the base.
        per_rank: Parameters of a LoRA for each unit of its rank: input and output width of every target added up, and
            on all linear layers of a mixture what PEFT adapts of its fused experts.
        narrowest: The smaller side of the narrowest target, above which a rank adds nothing there.
    """

    architecture: str
    total: int
    per_rank: int
    narrowest: int


_EXPERTS = 3
"""Dimensions of the weights of a mixture's fused experts, which are no modules; PEFT alone knows which it adapts."""


def capacity_of(base: Base, targets: str | Iterable[str] = "all-linear") -> Capacity:
    """The capacity of targets on a base.

    Raises:
        TypeError: ``targets`` are no names.
        ValueError: They match nothing, the base cannot be built or has an adapter, or PEFT refuses the targets.
    """
    from peft import LoraConfig

    from pytest_lora.inspection.base import base_facts, base_parameters
    from pytest_lora.inspection.parameters import adapter_sizes
    from pytest_lora.inspection.skeleton import require_no_adapter, resolve_base
    from pytest_lora.inspection.survey import survey

    model = resolve_base(base)
    require_no_adapter(model)
    found = survey(model)
    facts = base_facts(found, base_parameters(found))
    if targets == "all-linear":
        modules = [m for m in facts.modules if m.is_linear and m.name != facts.output_embeddings]
    else:
        wanted = _names(targets)
        modules = [m for m in facts.modules if _matches(m.name, wanted)]
    if not modules:
        raise ValueError(f"targets: {targets!r} match no module of {facts.architecture}")
    per_rank = sum(m.in_features + m.out_features for m in modules)
    if targets == "all-linear" and any(p.dim() == _EXPERTS for p in model.parameters()):
        sizes = adapter_sizes(LoraConfig(target_modules="all-linear"), model, {1, 2})
        per_rank = sizes[2].trainable - sizes[1].trainable
    return Capacity(
        facts.architecture,
        facts.parameters,
        per_rank,
        min(min(m.in_features, m.out_features) for m in modules),
    )


def parameters_of(base: Base) -> int:
    """Logical parameters of a base.

    Raises:
        ValueError: It cannot be built.
    """
    from pytest_lora.inspection.base import base_facts, base_parameters
    from pytest_lora.inspection.skeleton import resolve_base
    from pytest_lora.inspection.survey import survey

    found = survey(resolve_base(base))
    return base_facts(found, base_parameters(found)).parameters


def _names(targets: Any) -> tuple[str, ...]:
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"targets must be names of modules or 'all-linear', not {targets!r}")
    return names


def _matches(name: str, wanted: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in wanted)
