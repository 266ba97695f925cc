"""Which trainer of TRL runs a recipe, and what that decides about its step.

Source: ``trl/cli`` (a command a trainer) and ``SFTConfig``, ``DPOConfig``, ``KTOConfig``, ``RewardConfig`` of 1.16.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from pytest_lora.facts.memory_choices import LIGER_LAYERS, SMOOTHING, TrainerFields
from pytest_lora.facts.recipe import Value
from pytest_lora.inspection.recipe.keys import Keys, flag, names_in, number
from pytest_lora.inspection.recipe.yaml_file import Node

_LOSSES = {
    "sft": ("nll", "dft", "chunked_nll"),
    "kto": ("kto", "apo_zero_unpaired"),
    "grpo": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "luspo", "sapo", "vespo"),
    "dpo": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sigmoid_norm",
    ),
}  # fmt: skip
"""Words of ``loss_type`` that are those of one trainer alone."""

_MARKS = {
    "grpo": ("num_generations", "reward_funcs"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "reward": ("center_rewards_coefficient",),
    "dpo": (
        "beta",
        "loss_weights",
        "precompute_ref_log_probs",
        "max_prompt_length",
        "rpo_alpha",
        "label_smoothing",
    ),
}
"""Keys of a trainer, the first that is there deciding: what stands below is read by those above it too."""

_TRAINERS = ("sft", "dpo", "kto", "reward")
"""Whose step a recipe describes whole. Prompts of GRPO have no length in it, and its keys are those of RLOO too."""

_FIELDS = {
    SMOOTHING: number,
    "beta": number,
    "label_smoothing": number,
    "ld_alpha": number,
    "precompute_ref_log_probs": flag,
    "use_weighting": flag,
    "disable_dropout": flag,
    "activation_offloading": flag,
    "use_liger_kernel": flag,
}
"""Keys that a loss of TRL reads, or that change its model before it."""

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


def objective_of(keys: Keys) -> Value:
    """What a recipe trains for: as its loss says, or keys that one trainer has."""
    for word in _losses(keys):
        for name, words in _LOSSES.items():
            if word in words:
                return _decided(keys, name, "loss_type")
    if str(keys.word("lora_task_type").value).upper() == "SEQ_CLS":
        return _decided(keys, "reward", "lora_task_type")
    for name, marks in _MARKS.items():
        found = keys.node(*marks)
        if found is not None:
            return _decided(keys, name, found[0])
    return Value("sft", "the keys of trl sft")


def _decided(keys: Keys, name: str, key: str) -> Value:
    return Value(name, f"line {keys.lines[key]}", key, keys.lines[key])


def _losses(keys: Keys) -> tuple[str, ...]:
    found = keys.value("loss_type", read=names_in).value
    return (found,) if isinstance(found, str) else found or ()


def by_trainer(keys: Keys, objective: Value, precision: Value) -> tuple[tuple[str, Any], ...]:
    """The arguments of ``estimate_memory`` that the trainer decides; none where the trainer is not known."""
    if objective.value not in _TRAINERS:
        return ()
    found: dict[str, Any] = {
        "trainer": f"trl-{objective.value}",
        "args": TrainerFields(_fields(keys, objective.value)),
        "autocast": _PRECISIONS.get(precision.value, False),
    }
    packed = keys.says("packing") and str(keys.word("packing_strategy").value or "bfd").startswith("bfd")
    if objective.value == "sft" and (packed or keys.says("padding_free")):
        found["padding_free"] = True
    if keys.says("use_liger_kernel") and not _part(keys, "liger_kernel_config", LIGER_LAYERS, switched=False):
        found["kernels"] = "liger"
    asked = keys.flag("gradient_checkpointing", default=True).value
    if asked and _part(keys, "gradient_checkpointing_kwargs", ("use_reentrant",), switched=True):
        found["gradient_checkpointing"] = "reentrant"
    return tuple(found.items())


def _fields(keys: Keys, objective: str) -> Iterator[tuple[str, Hashable]]:
    for name, read in _FIELDS.items():
        value = keys.value(name, read=read).value
        if value is not None:
            yield name, value
    losses = tuple("nll" if word == "chunked_nll" else word for word in _losses(keys))
    if losses:
        yield "loss_type", losses if objective == "dpo" else losses[0]
    weights = keys.value("loss_weights", read=_numbers).value
    if weights:
        yield "loss_weights", weights


def _numbers(node: Node) -> tuple[float, ...]:
    return tuple(found for one in node.items or () if (found := number(one)) is not None)


def _part(keys: Keys, name: str, parts: tuple[str, ...], *, switched: bool) -> bool:
    """Whether a mapping switches one of these on, or off."""
    found = keys.node(name)
    pairs = (found[1].pairs if found else None) or {}
    return any(part in pairs and flag(pairs[part]) is switched for part in parts)
