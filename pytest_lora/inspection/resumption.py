"""Whether training can go on from a saved adapter under a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.base import HEADS_BY_TASK_TYPE, TIED_BY_NAME, is_tied_by_name
from pytest_lora.facts.saved_config import FieldChange, RankChange, ResumptionFacts
from pytest_lora.facts.saved_tensors import target_of
from pytest_lora.facts.settings import Settings, is_named
from pytest_lora.inspection.checkpoint.config_file import UNJUDGED
from pytest_lora.inspection.limited.patterns import require_matchable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import LoraConfig

    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.facts.config import LayerFacts

ALIKE = (
    "use_rslora",
    "use_dora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layers_to_transform",
)
"""Fields that decide which tensors there are or how they are scaled, besides rank, alpha and targets."""

WRITTEN = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", *ALIKE)
"""Fields that are compared as they are written where the tensors of a variant are not followed."""


def resumption_facts(
    facts: CheckpointFacts,
    config: LoraConfig,
    layers: Sequence[LayerFacts] | None,
    applied: Settings | None = None,
) -> ResumptionFacts:
    """Compare a saved adapter with a configuration.

    Args:
        facts: The saved adapter.
        config: The configuration; its ``base_model_name_or_path`` is compared where it is set.
        layers: What the configuration adapts on the base; None without one, where names are compared.
        applied: The fields as PEFT rewrites them for that base.

    Raises:
        ValueError: A field of ``config`` cannot be used.
    """
    saved, wanted = facts.settings, applied or Settings.of(config)
    if saved is not None and facts.variants and facts.is_readable:
        return ResumptionFacts(
            facts.name,
            facts.weights,
            base=_bases(facts, config),
            fields=(*_changes(WRITTEN, saved, wanted), *_variants(facts.variants, config)),
            saved=saved,
        )
    method = facts.config.peft_type if facts.config else None
    if method not in (None, "", "LORA") and method == config.peft_type:  # AdaLoRA, a subclass of LoraConfig
        return ResumptionFacts(facts.name, facts.weights, base=_bases(facts, config))
    if saved is None or not facts.is_judged or not facts.adapted:
        why = next((f"{fault.file}: {fault.observed}" for fault in facts.faults), None)
        reason = why or facts.other_method or "the folder holds no readable LoRA adapter"
        return ResumptionFacts(facts.name, facts.weights, unusable=reason)
    require_matchable(config, [module.name for module in facts.adapted])
    gone, new = _targets(facts, saved, wanted, layers)
    # With a base its modules tell what is excluded; without one the names have to.
    compared = ALIKE if layers is not None or gone else (*ALIKE, "exclude_modules")
    return ResumptionFacts(
        facts.name,
        facts.weights,
        ranks=tuple(_ranks(facts, saved, wanted)),
        gone=tuple(gone),
        new=tuple(new),
        alpha=_alpha(facts, saved, wanted),
        base=_bases(facts, config),
        fields=tuple(_changes(compared, saved, wanted)),
        saved=saved,
    )


def _bases(facts: CheckpointFacts, config: LoraConfig) -> tuple[str, str] | None:
    base, named = getattr(config, "base_model_name_or_path", None), facts.config and facts.config.base
    return (base, named) if base and named and base != named else None


def _changes(names: Sequence[str], saved: Settings, wanted: Settings) -> Iterator[FieldChange]:
    for field in names:
        before, now = getattr(saved, field), getattr(wanted, field)
        if field == "modules_to_save" and wanted.ensure_weight_tying:
            before, now = _tied(before), _tied(now)
        if _differ(field, before, now):
            yield FieldChange(field, _said(now), _said(before))


def _tied(names: Sequence[str]) -> tuple[str, ...]:
    """Names with one for all embeddings: PEFT writes that to which it ties the others, under its whole name."""
    one = (TIED_BY_NAME[0] if is_tied_by_name(name) else name for name in names)
    return tuple(dict.fromkeys(one))


def _variants(before: Sequence[str], config: LoraConfig) -> Iterator[FieldChange]:
    """Variants that one side has and the other has not."""
    for field in UNJUDGED:
        had, has = field in before, bool(getattr(config, field, None))
        if had != has:
            yield FieldChange(field, *("..." if one else "None" for one in (has, had)))


def _ranks(facts: CheckpointFacts, saved: Settings, wanted: Settings) -> Iterator[RankChange]:
    differing: dict[tuple[int, int], list[str]] = {}
    for module in facts.adapted:
        now = wanted.rank_of(module.name)
        # Factors of a fused parameter stack the ranks of its experts.
        parameters = wanted.target_parameters or saved.target_parameters
        if module.rank and module.rank != now and not (parameters and module.rank % now == 0):
            differing.setdefault((now, module.rank), []).append(module.name)
    for (now, before), names in differing.items():
        yield RankChange(now, before, tuple(names))


def _targets(
    facts: CheckpointFacts, saved: Settings, wanted: Settings, layers: Sequence[LayerFacts] | None
) -> tuple[list[str], list[str]]:
    """What the checkpoint holds and the configuration does not adapt, and the other way round."""
    if layers is None and _renames_experts(saved, wanted):
        return [], []  # which parameters these names are, only a base can say
    if wanted.target_parameters or saved.target_parameters:
        now, before = wanted.target_parameters, saved.target_parameters
        return [n for n in before if n not in now], [n for n in now if n not in before]
    if layers is not None:
        held = list(dict.fromkeys(module.name.replace(".base_layer", "") for module in facts.adapted))
        adapted = {layer.module for layer in layers}
        return [m for m in held if m not in adapted], sorted(adapted - set(held))
    held = list(dict.fromkeys(target_of(module.name) for module in facts.adapted))
    if wanted.target_modules is None or str(wanted.target_modules).lower() == "all-linear":
        return [], []  # which modules these are, only a base can say
    gone = [m for m in held if not wanted.targets(m) or wanted.excludes(m)]
    names = wanted.target_modules if isinstance(wanted.target_modules, tuple) else ()
    return gone, [n for n in names if not any(is_named(m, n) for m in held)]


def _renames_experts(saved: Settings, wanted: Settings) -> bool:
    """Whether PEFT may have made parameters of target modules, as it does where newer transformers fuses experts."""
    if wanted.target_parameters or not saved.target_parameters:
        return False
    now, before = wanted.target_modules, saved.target_modules
    return not isinstance(now, tuple) or not isinstance(before, tuple) or bool(set(now) - set(before))


def _alpha(facts: CheckpointFacts, saved: Settings, wanted: Settings) -> tuple[str, float, float] | None:
    for module in facts.adapted:
        before, now = saved.alpha_of(module.name), wanted.alpha_of(module.name)
        if before != now:
            return module.name, now, before
    return None


def _differ(field: str, before: Any, now: Any) -> bool:
    if field == "modules_to_save":
        # PEFT adds the heads of a task type by itself when it builds the model.
        automatic = {head for heads in HEADS_BY_TASK_TYPE.values() for head in heads}
        return set(before) - automatic != set(now) - automatic
    if field == "target_modules" and isinstance(before, tuple):
        # PEFT saves the modules that "all-linear" meant, and a set in any order.
        return set(before) != set(now) if isinstance(now, tuple) else str(now).lower() != "all-linear"
    if field == "layers_to_transform":
        return set(before) != set(now)
    if field == "exclude_modules":
        return bool((before or None) != (now or None))
    return bool(before != now)


def _said(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
