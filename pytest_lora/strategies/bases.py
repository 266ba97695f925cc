"""What a base offers to a configuration: names to target, their sizes, blocks, and what it needs besides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_lora.facts.base import BaseFacts, BaseModule

LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
ADAPTABLE = (*LINEAR, "Embedding", "Conv2d")
"""Classes whose modules PEFT adapts under every variant that is drawn for them."""

HEADS_SAVED_BY_PEFT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types for which PEFT puts the head into ``modules_to_save`` by itself."""

LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of Llama's blocks; Mistral, Qwen, Gemma and many others have the same."""


@dataclass(frozen=True, slots=True)
class Target:
    """All modules of a base that share the last part of their name.

    Attributes:
        name: That last part.
        kinds: Their classes.
        size: The largest rank at which no adapter holds more numbers than the matrix that it adapts.
        smallest: Their smallest dimension.
        layers: Numbers of the blocks that hold one, as PEFT counts; empty where that is not clear.
        quantized: Whether one of them is quantized.
    """

    name: str
    kinds: frozenset[str]
    size: int
    smallest: int
    layers: frozenset[int]
    quantized: bool

    @property
    def plain(self) -> bool:
        """Whether all of them are linear layers with weights that are not quantized."""
        return self.kinds == {"Linear"} and not self.quantized

    @property
    def linear(self) -> bool:
        """Whether all of them are linear layers."""
        return self.kinds <= set(LINEAR)


@dataclass(frozen=True, slots=True)
class BaseTargets:
    """A base, as far as a configuration has to know it.

    Attributes:
        targets: What can be named in ``target_modules``, linear layers first.
        all_linear: The modules that "all-linear" takes as one target, or None where that is not to be used.
        blocks: Numbers of the blocks that hold targets.
        saveable: Names that can be put into ``modules_to_save``.
        needs: Fields that every configuration for this base has, such as the task type that saves a new head.
        biases: Whether the base has biases that could be trained.
        facts: The base itself; None where none was given.
    """

    targets: tuple[Target, ...]
    all_linear: Target | None
    blocks: tuple[int, ...]
    saveable: tuple[str, ...]
    needs: tuple[tuple[str, Any], ...]
    biases: bool
    facts: BaseFacts | None

    def named(self, names: Iterable[str]) -> tuple[Target, ...]:
        """The targets with these names.

        Raises:
            ValueError: One of them is no name of a module that can be adapted.
        """
        known = {target.name: target for target in self.targets}
        wanted = tuple(dict.fromkeys(names))
        if self.facts is None:
            return tuple(known.get(name, replace(_unknown(), name=name)) for name in wanted)
        if lost := [name for name in wanted if name not in known]:
            raise ValueError(f"targets: {lost} are not among the names of this base: {', '.join(known)}")
        return tuple(known[name] for name in wanted)


def targets_of(base: Any) -> BaseTargets:
    """Look at a base: a live model, a ``PretrainedConfig``, the path of one, or None.

    Raises:
        TypeError: ``base`` is none of these.
        ValueError: It cannot be built, carries an adapter, or has nothing that could be adapted.
    """
    if base is None:
        return _without_base()
    from pytest_lora.inspection.base import base_facts, base_parameters
    from pytest_lora.inspection.skeleton import resolve_base
    from pytest_lora.inspection.survey import survey

    found = survey(resolve_base(base))
    facts = base_facts(found, base_parameters(found))
    if facts.carries_adapter:
        raise ValueError(f"base: this {facts.architecture} carries an adapter; give the model without it")
    targets = _targets(facts)
    if not targets:
        raise ValueError(f"base: {facts.architecture} has no module that LoRA could adapt")
    return BaseTargets(
        targets=targets,
        all_linear=_all_linear(facts),
        blocks=tuple(sorted(frozenset().union(*(target.layers for target in targets)))),
        saveable=_saveable(facts),
        needs=_needs(facts),
        biases=facts.has_biases,
        facts=facts,
    )


def _unknown() -> Target:
    return Target("", frozenset({"Linear"}), 2**14, 2**14, frozenset(), quantized=True)


def _without_base() -> BaseTargets:
    """Nothing is known of weights and blocks, so nothing is drawn that depends on them."""
    targets = tuple(replace(_unknown(), name=name) for name in LLAMA_NAMES)
    return BaseTargets(targets, replace(_unknown(), name="all-linear"), (), (), (), biases=False, facts=None)


def _targets(facts: BaseFacts) -> tuple[Target, ...]:
    by_leaf: dict[str, list[BaseModule]] = {}
    for module in facts.modules:
        by_leaf.setdefault(module.leaf, []).append(module)
    modules = {module.name for module in facts.modules}
    others = {name.rpartition(".")[2] for name in facts.module_names if name not in modules}
    tied = {name for group in facts.tied for name in group}
    heads = tuple(f"{head.name}." for head in facts.heads)
    found = [
        _target(leaf, members)
        for leaf, members in by_leaf.items()
        if not leaf.isdigit()
        and leaf not in others
        and all(m.kind in ADAPTABLE and m.name not in tied for m in members)
        and not any(f"{m.name}.".startswith(heads) for m in members)
    ]
    return tuple(sorted(found, key=lambda t: not t.linear or t.name == _leaf(facts.output_embeddings)))


def _target(leaf: str, members: list[BaseModule]) -> Target:
    blocks = [_block(m.name) for m in members]
    return Target(
        name=leaf,
        kinds=frozenset(m.kind for m in members),
        size=min(map(_largest_rank, members)),
        smallest=min(min(m.in_features, m.out_features) for m in members),
        layers=frozenset(b for b in blocks if b is not None) if None not in blocks else frozenset(),
        quantized=any(m.quantization for m in members),
    )


def _largest_rank(module: BaseModule) -> int:
    inputs, outputs = module.in_features, module.out_features
    return max(1, inputs * outputs // (inputs + outputs))


def _block(module: str) -> int | None:
    """The one number in a module's name; with several, PEFT takes another one than people do."""
    numbers = [part for part in module.split(".")[:-1] if part.isdigit()]
    return int(numbers[0]) if len(numbers) == 1 and re.search(r"\.[^.]+\.\d+\.", f".{module}") else None


def _leaf(module: str | None) -> str | None:
    return None if module is None else module.rpartition(".")[2]


def _all_linear(facts: BaseFacts) -> Target | None:
    """What "all-linear" takes; None where that differs between versions of PEFT, as with fused experts."""
    heads = tuple(f"{head.name}." for head in facts.heads)
    taken = [m for m in facts.modules if m.is_linear and m.name != facts.output_embeddings]
    taken = [m for m in taken if not f"{m.name}.".startswith(heads)]
    tied = {name for group in facts.tied for name in group}
    usable = taken and not facts.fused and all(m.kind in LINEAR and m.name not in tied for m in taken)
    unclear = facts.heads and facts.task_type not in HEADS_SAVED_BY_PEFT
    return _target("all-linear", taken) if usable and not unclear and facts.task_type else None


def _saveable(facts: BaseFacts) -> tuple[str, ...]:
    modules = {m.name: m for m in facts.modules}
    tied = {name for group in facts.tied for name in group}
    ends = [facts.output_embeddings, facts.input_embeddings]
    return tuple(
        modules[name].leaf
        for name in ends
        if name in modules and name not in tied and modules[name].quantization is None
    )


def _needs(facts: BaseFacts) -> tuple[tuple[str, Any], ...]:
    needs: dict[str, Any] = {}
    if facts.heads and facts.task_type in HEADS_SAVED_BY_PEFT:
        needs["task_type"] = facts.task_type
    elif facts.heads:
        needs["modules_to_save"] = [head.name for head in facts.heads]
    return tuple(needs.items())
