"""What a model has of the properties that a test may pin down: scaling, shapes of the factors, adapted modules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pytest_lora.facts.behaviour import ModuleScaling, ScalingFacts, ShapeFacts, ShapeMisfit, TargetFacts
from pytest_lora.facts.settings import alpha_divisor
from pytest_lora.findings import grouped
from pytest_lora.inspection.base import base_facts, base_parameters, logical_shape
from pytest_lora.inspection.layers import layer_states
from pytest_lora.inspection.model import adapted_survey
from pytest_lora.inspection.peft_internals import LoraConfig
from pytest_lora.values import shown

if TYPE_CHECKING:
    from pytest_lora.facts.model_parts import Factor
    from pytest_lora.inspection.survey import Survey


def subject_of(model: nn.Module) -> str:
    """How a report names a model: ``"PeftModel of LlamaForCausalLM"``.

    Raises:
        TypeError: ``model`` carries no LoRA layers.
    """
    return f"{type(model).__name__} of {type(adapted_survey(model).root).__name__}"


def scaling_facts(model_or_config: nn.Module | LoraConfig, expected: float) -> ScalingFacts:
    """The effective scaling of every adapted module, or of all that a configuration can give.

    Raises:
        TypeError: ``model_or_config`` is neither a ``LoraConfig`` nor a model with LoRA layers.
        ValueError: A configured rank is below 1.
    """
    if isinstance(model_or_config, LoraConfig):
        return ScalingFacts(tuple(_configured(model_or_config)), expected)
    if not isinstance(model_or_config, nn.Module):
        raise TypeError(
            f"model_or_config must be a model with LoRA layers or a LoraConfig, not {shown(model_or_config)}"
        )
    found: dict[tuple[float, float, int, bool], list[str]] = {}
    for layer in layer_states(adapted_survey(model_or_config, "model_or_config").layers):
        key = layer.scaling, layer.alpha, layer.rank, layer.use_rslora
        found.setdefault(key, []).append(layer.module)
    scalings = (ModuleScaling(grouped(dict.fromkeys(modules)), *key) for key, modules in found.items())
    return ScalingFacts(tuple(scalings), expected)


def _configured(config: LoraConfig) -> Iterator[ModuleScaling]:
    """The scaling without a pattern, and that of every pattern key; a key in one pattern has one default."""
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    names: dict[tuple[float, float, int, bool], list[str]] = {}
    for key in (None, *dict.fromkeys([*ranks, *alphas])):
        rank = int(config.r if key is None else ranks.get(key, config.r))
        alpha = float(config.lora_alpha if key is None else alphas.get(key, config.lora_alpha))
        if rank < 1:
            raise ValueError(f"model_or_config: a rank must be at least 1, but one is {rank}")
        rslora = bool(config.use_rslora)
        scaling = alpha / alpha_divisor(rank, rslora=rslora)
        name = "modules without a pattern" if key is None else f"modules of pattern {key!r}"
        names.setdefault((scaling, alpha, rank, rslora), []).append(
            name if ranks or alphas else "all modules"
        )
    for value, where in names.items():
        yield ModuleScaling(", ".join(dict.fromkeys(where)), *value)


def shape_facts(model: nn.Module) -> ShapeFacts:
    """The factors that do not have the shape that rank and base weight ask for.

    Raises:
        TypeError: ``model`` carries no LoRA layers.
    """
    wrong: dict[tuple[str, str], list[str]] = {}
    for layer in layer_states(adapted_survey(model).layers):
        for factor, expected in ((layer.a, layer.expected_a), (layer.b, layer.expected_b)):
            if factor.shape[:2] != expected or len(factor.shape) < 2:
                asked = (
                    f"{expected[0]} x {expected[1]}: rank {layer.rank}"
                    + (f" for each of {layer.experts} experts" if layer.experts > 1 else "")
                    + f", base {layer.in_features} -> {layer.out_features}"
                )
                wrong.setdefault((_shape(factor), asked), []).append(layer.module)
    return ShapeFacts(tuple(ShapeMisfit(tuple(names), *shapes) for shapes, names in wrong.items()))


def _shape(factor: Factor) -> str:
    return f"{factor.name} is {' x '.join(map(str, factor.shape))}"


def target_facts(model: nn.Module, targets: str | tuple[str, ...]) -> TargetFacts:
    """The modules that are adapted, beside a regular expression, "all-linear", or names.

    Raises:
        TypeError: ``model`` carries no LoRA layers.
    """
    found = adapted_survey(model)
    adapted = {layer.module for layer in layer_states(found.layers)}
    names = list(dict.fromkeys([*(name for name in found.modules if name), *adapted]))
    meant, unknown = _meant(found, adapted, names, targets)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return TargetFacts(
        targets=f"targets={targets!r}" if isinstance(targets, str) else f"targets={list(targets)!r}",
        unknown=tuple(
            (word, tuple(difflib.get_close_matches(word.rpartition(".")[2], leaves))) for word in unknown
        ),
        missing=tuple(name for name in meant if name not in adapted),
        unexpected=tuple(name for name in names if name in adapted and name not in set(meant)),
        adapted=_named(adapted, names),
    )


def _named(modules: Collection[str], names: Sequence[str]) -> tuple[str, ...]:
    """The last parts of modules, or their whole names where others end so too."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names if name in modules)
    others = any(name.rpartition(".")[2] in leaves for name in names if name not in modules)
    return tuple(name for name in names if name in modules) if others else tuple(leaves)


def _meant(
    found: Survey, adapted: Collection[str], names: Sequence[str], targets: str | tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """The modules that the targets name, and the names among them that fit no module."""
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return list(_all_linear(found)), []
    if isinstance(targets, str):
        pattern = re.compile(targets)
        meant = [name for name in names if _adaptable(found, adapted, name) and pattern.fullmatch(name)]
        return meant, [] if meant else [targets]
    by_name = {w: [name for name in names if name == w or name.endswith(f".{w}")] for w in targets}
    meant = list(dict.fromkeys(name for members in by_name.values() for name in members))
    return meant, [w for w, members in by_name.items() if not members]


def _all_linear(found: Survey) -> Iterator[str]:
    """What PEFT's "all-linear" takes: every linear module but the output embedding and trained heads."""
    facts = base_facts(found, base_parameters(found))
    kept = {facts.output_embeddings, *found.saved}
    yield from (m.name for m in facts.modules if m.is_linear and m.name not in kept)


def _adaptable(found: Survey, adapted: Collection[str], name: str) -> bool:
    module: Any = found.modules[name] if name not in adapted else None
    return name in adapted or logical_shape(module) is not None
