"""The setting of a run, judged: by the rules on recipes, on configurations and on memory."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_lora.checks import NAMES_A_BASE, NotJudged, rules_of
from pytest_lora.checks.recipe_notation import placed, said_there, smaller_step
from pytest_lora.expect import Expect
from pytest_lora.facts.figures.recipes import OWN_LOSS_NOT_RUN, RecipeCard, recipe_card
from pytest_lora.facts.memory_choices import OFFLOAD_ENDING, divides_weights
from pytest_lora.facts.recipe import RecipeFacts, RunSetting, Shard
from pytest_lora.findings import Finding
from pytest_lora.rules import judge

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from pytest_lora.facts.config import ConfigFacts
    from pytest_lora.facts.memory import MemoryEstimate

OF_ALL_LAYERS = ("parameter_share_is_outside_the_band",)
"""Rules whose figures are those of the whole base; without them a few layers stand for all."""

_LONGEST = 120
"""Characters of a reason that nothing was estimated, which stands in one line of the summary."""

_STRATEGIES = {"zero0": "ddp"}
"""Those of recipes by the names of ``estimate_memory``, where these differ."""


class JudgedRun(NamedTuple):
    """What is known of a run: what the report calls it, the findings, its card, and what could not be judged."""

    subject: str
    findings: list[Finding]
    card: RecipeCard | None = None
    not_judged: NotJudged = ()


def judged(
    facts: RecipeFacts,
    base: Any,
    budget: int | None,
    gpus: int,
    expect: Expect,
    folder: Path,
    config: LoraConfig | None = None,
) -> JudgedRun:
    """Judge a run by its setting.

    Args:
        facts: The recipe.
        base: The base, or None for the one that the recipe names.
        budget: Bytes of one GPU, or None.
        gpus: How many take part.
        expect: What is meant.
        folder: Where relative paths begin.
        config: The adapter, where it is not to be made from the setting.
    """
    if facts.left_alone:
        return JudgedRun(f"{facts.name} (left alone: {facts.left_alone})", [])
    subject = f"recipe {facts.name}" + (f" of {facts.tool}" if facts.tool else "")
    setting = facts.setting
    if setting is None or setting.adapter.value is None:
        return JudgedRun(subject, list(judge([facts], expect)), recipe_card(facts))
    known = None if facts.base_is_adapter else known_base(base, facts, folder)
    cards = max(gpus, setting.gpus.value or 1)
    left = () if budget is not None else (("no card given", rules_of("memory")),)
    if known is None:
        subject = f"{subject} (not compared with its base: {setting.base.value} is not known)"
        left = ((f"base not known; {NAMES_A_BASE}", rules_of("config")), *left)
        return JudgedRun(subject, list(judge([facts], expect)), recipe_card(facts, cards, None, budget), left)
    config = config or adapter_of(setting, known)
    whole = expect.param_ratio is not None
    on_base = None if config is None else facts_on_base(config, known, whole=whole)
    if on_base is not None:
        facts = replace(facts, widened=_widened(facts, on_base))
    divided = cards > 1 and divides_weights(setting.strategy.value)
    moved = str(setting.strategy.value).endswith("_offload")
    unsized = setting.seq_len.value is None or setting.batch_size.value is None
    if budget is not None and not moved and (divided or unsized):
        facts = replace(facts, shard=_shard(facts, setting, budget, cards if divided else 1))
    findings = list(judge([facts], expect))
    if on_base is not None:
        asked = _expected(expect, setting, on_base)
        found = list(judge([on_base], asked))
        if config is not None and not whole and any(finding.rule in OF_ALL_LAYERS for finding in found):
            found = list(judge([facts_on_base(config, known, whole=True) or on_base], asked))
        findings += [placed(f, facts, setting) for f in found]
    estimate = None
    if budget is not None and config is not None and (facts.shard is None or facts.shard.fits):
        estimate, why = _estimate(facts, setting, config, known, cards)
        if estimate is None:
            left = ((why, rules_of("memory")),)
        else:
            findings += _memory(facts, setting, estimate, budget, expect)
    peak = None if estimate is None else estimate.peak_allocated
    may_fit = estimate is not None and budget is not None and _may_fit(setting, estimate, budget)
    at_most = estimate is not None and _without_its_loss(setting, estimate)
    if may_fit and at_most:
        left = (
            (f"the peak is at most: {OWN_LOSS_NOT_RUN.format(tool=setting.tool)}", "whether a step fits"),
        )
    card = recipe_card(facts, cards, peak, budget, may_fit=may_fit, at_most=at_most)
    return JudgedRun(subject, findings, card, left)


def _widened(facts: RecipeFacts, on_base: ConfigFacts) -> tuple[str, ...]:
    """Names that a recipe lists beside a switch for all linear modules, where these are more."""
    named = facts.listed
    if not named:
        return ()
    leaves = {
        m.leaf for m in on_base.base.modules if m.is_linear and m.name != on_base.base.output_embeddings
    }
    return named if leaves - set(named) else ()


def _shard(facts: RecipeFacts, setting: RunSetting, budget: int, gpus: int) -> Shard | None:
    from pytest_lora.inspection.recipe.adapter import weights_at_least

    if facts.base is None:
        return None
    return Shard(weights_at_least(setting, facts.base.parameters, facts.base.dtype), budget, gpus)


def _expected(expect: Expect, setting: RunSetting, on_base: ConfigFacts) -> Expect:
    """What the user means, and what the recipe itself says is meant."""
    changes: dict[str, Any] = {}
    tokens = setting.new_tokens.value
    if expect.new_tokens is None and isinstance(tokens, int) and tokens > 0:
        changes["new_tokens"] = tokens
    scope = setting.scope.value
    if expect.scope is None and scope and any(scope in name for name in on_base.base.module_names):
        changes["scope"] = scope
    return replace(expect, **changes) if changes else expect


def _estimate(
    facts: RecipeFacts, setting: RunSetting, config: LoraConfig, base: Any, cards: int
) -> tuple[MemoryEstimate | None, str]:
    """The memory of a step of this run; or why there is none: the setting lacks something, or it cannot be traced."""
    from pytest_lora.inspection.recipe.adapter import step_arguments, ways_of_a_step
    from pytest_lora.memory.estimate import step_memory

    arguments = step_arguments(setting, facts.base.dtype if facts.base else None)
    if arguments is None:
        return None, "batch, length, dtype or quantization of the step not known"
    arguments |= _shared(setting, cards)
    batch, length = arguments.pop("batch_size"), arguments.pop("seq_len")
    why = ""
    # TRL's loss ends there after seconds, with "Could not resolve the process group": it is not tried.
    fails_late = arguments.get("strategy") == "fsdp2" and bool(arguments.get("quantization"))
    for way in ways_of_a_step(setting):
        if fails_late and "trainer" in way.arguments:
            continue
        try:
            step = step_memory(config, base, **{**arguments, **way.arguments})
            found = step.once(batch * way.sequences, length)
            return replace(found, setting=replace(found.setting, batch_size=batch)), ""
        except (ValueError, LookupError, ArithmeticError) as error:  # sizes that no allocator has
            why = str(error).partition("\n")[0]
    return None, f"step not estimated: {textwrap.shorten(why, _LONGEST, placeholder=' ...')}"


def _memory(
    facts: RecipeFacts, setting: RunSetting, estimate: MemoryEstimate, budget: int, expect: Expect
) -> Iterator[Finding]:
    """What the rules on memory say of a step of this run."""
    from pytest_lora.facts.memory import MemoryFacts

    if _may_fit(setting, estimate, budget):
        return
    line = setting.batch_size.line or setting.base.line
    for finding in judge([MemoryFacts(estimate, budget, ())], expect):
        yield replace(
            finding,
            where=f"{facts.name}:{line}: {finding.where}" if line else f"{facts.name}: {finding.where}",
            fix=smaller_step(finding.fix, finding.changes, setting),
            changes=said_there(finding.changes, setting),
            line=line,
        )


def _shared(setting: RunSetting, cards: int) -> dict[str, Any]:
    """How several cards share the step; nothing where the recipe does not say."""
    named = setting.strategy.value
    if cards == 1 or not isinstance(named, str):
        return {}
    strategy = named.removesuffix(OFFLOAD_ENDING)
    offload = "cpu" if named.endswith(OFFLOAD_ENDING) else None
    return {"gpus": cards, "strategy": _STRATEGIES.get(strategy, strategy), "offload": offload}


def _may_fit(setting: RunSetting, estimate: MemoryEstimate, budget: int) -> bool:
    """Whether a step may fit though it is estimated with all logits: the tool holds them in part or not at all."""
    if estimate.setting.trainer:
        return False
    chunked = setting.loss.value == "chunked" and estimate.setting.loss == "full"
    partly = chunked or _without_its_loss(setting, estimate)
    saved = estimate.breakdown.get("logits and loss", 0) if partly else 0
    return budget < estimate.peak_allocated <= budget + saved


def _without_its_loss(setting: RunSetting, estimate: MemoryEstimate) -> bool:
    """Whether the tool's trainer has a loss of its own, and the step was estimated without it."""
    return bool(setting.by_trainer) and not estimate.setting.trainer


def known_base(base: Any, facts: RecipeFacts, folder: Path) -> Any:
    """The base as something that a base can be made of; None where its shape is not known."""
    from pytest_lora.inspection.public_bases import declared, find_shape
    from pytest_lora.inspection.recipe.beside import Tree
    from pytest_lora.inspection.skeleton import named_or_read

    named = base if base is not None else facts.setting and facts.setting.base.value
    if not isinstance(named, str):
        return named
    if named in declared or find_shape(named) is not None:
        return named
    if base is not None:
        named_or_read(named)  # refuses, by the argument's name, a base that is not there
        return named
    return Tree(folder).base(named)


def adapter_of(setting: RunSetting, base: Any) -> LoraConfig | None:
    """The configuration that the tool makes of the setting; None where it sets none up."""
    from pytest_lora.inspection.public_bases import find_shape
    from pytest_lora.inspection.recipe.adapter import COLLECTING, linear_names, lora_config

    shape = find_shape(base) if isinstance(base, str) else None
    several = shape is not None and "vision_config" in shape.config
    config = lora_config(setting, several_modalities=several)
    collects = setting.tool in COLLECTING and isinstance(base, str)
    if config is not None and config.target_modules == "all-linear" and collects:
        model = _built(base, str(config.task_type), cut=False)
        config.target_modules = "all-linear" if model is None else linear_names(model)
    return config


def facts_on_base(config: LoraConfig, base: Any, *, whole: bool) -> ConfigFacts | None:
    """What PEFT makes of the adapter; None where the installed transformers cannot build the base."""
    from pytest_lora.inspection.config import config_facts

    try:
        return (
            config_facts(config, base)
            if not isinstance(base, str)
            else _remembered(base, _Adapter(config), whole=whole)
        )
    except ValueError:
        return None


class _Adapter:
    """A configuration that equals another with the same fields."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        fields = {k: sorted(v) if isinstance(v, set) else v for k, v in vars(config).items()}
        self.text = repr(sorted(fields.items()))

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Adapter) and self.text == other.text


@lru_cache(maxsize=32)
def _remembered(base: str, adapter: _Adapter, *, whole: bool) -> ConfigFacts:
    from pytest_lora.inspection.config import config_facts
    from pytest_lora.inspection.memory.layer_stacks import same_in_every_layer

    cut = not whole and same_in_every_layer(adapter.config)
    model = _built(base, str(adapter.config.task_type), cut=cut)
    return config_facts(adapter.config, base if model is None else model)


@lru_cache(maxsize=8)
def _built(base: str, task_type: str, *, cut: bool) -> nn.Module | None:
    """A base by name without weights, and without the inner layers that are like their neighbours; recipes name few."""
    from pytest_lora.inspection.memory.layer_stacks import cut_stacks
    from pytest_lora.inspection.skeleton import resolve_base

    try:
        model = resolve_base(base, task_type.rpartition(".")[2])
    except ValueError:
        return None
    if cut:
        cut_stacks(model)
    return model
