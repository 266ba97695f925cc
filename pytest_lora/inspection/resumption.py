"""Whether training can go on from a saved adapter under a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.config import Settings, is_named
from pytest_lora.findings import Finding, Report, grouped

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from pytest_lora.facts.checkpoint import CheckpointFacts
    from pytest_lora.facts.config import LayerFacts

START_FRESH = "start fresh with this configuration, or go on with that of the checkpoint"

FIXED = "LoRA shapes are fixed at initialisation"

ALIKE = (
    "use_rslora",
    "use_dora",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "layers_to_transform",
)
"""Fields that decide which tensors there are or how they are scaled, besides rank, alpha and targets."""


def check_resumable(path: str | os.PathLike[str], config: Any, base: Any = None) -> Report:
    """Compare a saved adapter with the configuration under which training is to go on.

    Returns:
        The report, with codes LORA920 to LORA925.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is nothing at ``path``, a field of ``config`` cannot be used, or the base cannot be built.
    """
    from pytest_lora.inspection.checkpoint import checkpoint_facts, folder_of
    from pytest_lora.inspection.config import config_facts
    from pytest_lora.inspection.peft_internals import LoraConfig

    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, not {type(config).__name__}")
    folder = folder_of(path)
    settings = Settings.of(config)
    layers = None if base is None else config_facts(config, base).layers
    facts = checkpoint_facts(folder)
    named = getattr(config, "base_model_name_or_path", None)
    return Report(f"resuming from {facts.name}", tuple(_findings(facts, settings, layers, named)))


def _findings(
    facts: CheckpointFacts, wanted: Settings, layers: Sequence[LayerFacts] | None, base: str | None
) -> Iterator[Finding]:
    saved = facts.settings
    if saved is None or not facts.is_judged or not facts.adapted:
        yield _unreadable(facts)
        return
    where = f"{facts.weights} in {facts.name}"
    if rank := _rank(facts, wanted):
        yield _finding("LORA920", "rank_differs_from_checkpoint", where, rank, "the rank of the checkpoint")
    if targets := _targets(facts, saved, wanted, layers):
        yield _finding(
            "LORA921", "targets_differ_from_checkpoint", where, targets, "the modules of the checkpoint"
        )
    if alpha := _alpha(facts, saved, wanted):
        yield _finding(
            "LORA922", "alpha_differs_from_checkpoint", where, alpha, "the alpha of the checkpoint"
        )
    named = facts.config.base if facts.config else None
    if base and named and base != named:
        seen = f"the configuration is for the base {base!r}, the checkpoint was trained on {named!r}"
        yield _finding("LORA923", "base_differs_from_checkpoint", where, seen, "the base of the checkpoint")
    for field in ALIKE:
        before, now = getattr(saved, field), getattr(wanted, field)
        if _differ(field, before, now):
            seen = f"{field} is {_said(now)} in the configuration and {_said(before)} in the checkpoint"
            yield _finding("LORA924", "structure_differs_from_checkpoint", where, seen, f"the same {field}")


def _finding(code: str, rule: str, where: str, observed: str, expected: str) -> Finding:
    return Finding(code, rule, "error", where, f"{observed}; {FIXED}", expected, START_FRESH)


def _unreadable(facts: CheckpointFacts) -> Finding:
    why = next((f"{fault.file}: {fault.observed}" for fault in facts.faults), None)
    return Finding(
        "LORA925",
        "checkpoint_is_not_usable",
        "error",
        facts.name,
        why or facts.other_method or "the folder holds no readable LoRA adapter",
        "a LoRA adapter that can be loaded",
        "check_checkpoint says what is wrong with it; else start fresh",
    )


def _rank(facts: CheckpointFacts, wanted: Settings) -> str | None:
    differing: dict[tuple[int, int], list[str]] = {}
    for module in facts.adapted:
        now = wanted.rank_of(module.name)
        # Factors of a fused parameter stack the ranks of its experts.
        if module.rank and module.rank != now and not (wanted.target_parameters and module.rank % now == 0):
            differing.setdefault((now, module.rank), []).append(module.name)
    return next(
        (
            f"the configuration has r={now}, the checkpoint rank {before} in {grouped(names)}"
            for (now, before), names in differing.items()
        ),
        None,
    )


def _targets(
    facts: CheckpointFacts, saved: Settings, wanted: Settings, layers: Sequence[LayerFacts] | None
) -> str | None:
    held = [module.name for module in facts.adapted]
    if layers is not None:
        now = {layer.module for layer in layers}
        gone, new = [m for m in held if m not in now], sorted(now - set(held))
    elif isinstance(wanted.target_modules, tuple):
        gone = [m for m in held if not wanted.targets(m)]
        new = [n for n in wanted.target_modules if not any(is_named(m, n) for m in held)]
    elif wanted.target_modules is None or str(wanted.target_modules).lower() == "all-linear":
        return None  # which modules these are, only a base can say
    else:
        gone = [m for m in held if not wanted.targets(m)]
        new = []
    if wanted.target_parameters or saved.target_parameters:
        gone = new = []
        if set(wanted.target_parameters) != set(saved.target_parameters):
            new = [n for n in wanted.target_parameters if n not in saved.target_parameters]
            gone = [n for n in saved.target_parameters if n not in wanted.target_parameters]
    parts = [f"the configuration does not adapt {grouped(gone)} of the checkpoint"] if gone else []
    parts += [f"the checkpoint has no tensors for {grouped(new)}"] if new else []
    return " and ".join(parts) or None


def _alpha(facts: CheckpointFacts, saved: Settings, wanted: Settings) -> str | None:
    for module in facts.adapted:
        before, now = saved.alpha_of(module.name), wanted.alpha_of(module.name)
        if before != now:
            return (
                f"the configuration has lora_alpha={now:g}, the checkpoint {before:g}, as for {module.name}: "
                "what was learned would be scaled by another factor"
            )
    return None


def _differ(field: str, before: Any, now: Any) -> bool:
    if field == "modules_to_save":
        # PEFT adds the heads of a task type by itself when it builds the model.
        automatic = {"classifier", "score", "qa_outputs"}
        return set(before) - automatic != set(now) - automatic
    if field == "layers_to_transform":
        return set(before) != set(now)
    return bool(before != now)


def _said(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
