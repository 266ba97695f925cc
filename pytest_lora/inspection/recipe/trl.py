"""Recipes of TRL's command line: a flat mapping whose values become the defaults of argparse.

Which trainer runs a recipe decides its step. Source: ``trl/cli`` (a command a trainer), ``trl/scripts/utils.py``
(TrlParser), ``trl/trainer/model_config.py``, and ``SFTConfig``, ``DPOConfig``, ``KTOConfig``, ``RewardConfig`` of 1.16.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

from pytest_lora.facts.memory_choices import HALF_PRECISIONS, LIGER_LAYERS, SMOOTHING, TrainerFields
from pytest_lora.facts.recipe import RunSetting, Value
from pytest_lora.inspection.recipe.beside import (
    Tree,
    deepspeed_strategy,
    fsdp_strategy,
    strategy_by_name,
    strategy_of_accelerate,
)
from pytest_lora.inspection.recipe.keys import Keys, flag, names_in, number, with_whole_dtype
from pytest_lora.inspection.recipe.yaml_file import Node

NAME = "TRL"
KEYS = "trl"
STOPS_AT_UNKNOWN = False
CHECKS_WORDS = True
_MARKS = (
    "use_peft", "dataset_name", "dataset_mixture", "dataset_mixer", "datasets", "lora_target_modules",
    "assistant_only_loss", "completion_only_loss", "lora_task_type", "dataset_text_field",
)  # fmt: skip
_LORA = (
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_dropout",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
_BLOCKS = ("lora", "peft", "peft_config", "lora_config")
_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "grpo": 1e-6, "reward": 1e-4}

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

_MARKS_OF_TRAINERS = {
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


def is_mine(keys: Keys) -> bool:
    """Whether a recipe is one of TRL's command line."""
    return keys.has("model_name_or_path") and keys.has(*_MARKS)


def left_alone(keys: Keys) -> str:
    """Why a recipe is no LoRA training, or empty."""
    asks = keys.says("use_peft") or keys.has(*_LORA) or any(_block(keys, name) for name in _BLOCKS)
    return "" if asks else "it trains all weights"


def _block(keys: Keys, name: str) -> bool:
    found = keys.node(name)
    return found is not None and found[1].pairs is not None


def setting(keys: Keys, tree: Tree) -> RunSetting:
    """The effective setting."""
    objective, precision = objective_of(keys), _precision(keys)
    return RunSetting(
        tool=NAME,
        base=keys.word("model_name_or_path"),
        adapter=_adapter(keys),
        quantization=_quantization(keys),
        double_quant=keys.flag("use_bnb_nested_quant", default=False),
        quant_storage=keys.word("bnb_4bit_quant_storage"),
        dtype=_dtype(keys),
        precision=precision,
        objective=objective,
        r=keys.count("lora_r", default=16),
        lora_alpha=keys.number("lora_alpha", default=32),
        lora_dropout=keys.number("lora_dropout", default=0.05),
        target_modules=_targets(keys),
        target_parameters=keys.names("lora_target_parameters"),
        modules_to_save=keys.names("lora_modules_to_save"),
        use_rslora=keys.flag("use_rslora", default=False),
        use_dora=keys.flag("use_dora", default=False),
        task_type=keys.word("lora_task_type", default="CAUSAL_LM"),
        batch_size=keys.count("per_device_train_batch_size", default=8),
        accumulation=keys.count("gradient_accumulation_steps", default=1),
        seq_len=keys.count("max_length", default=1024),
        packing=keys.flag("packing", default=False),
        attention=keys.word("attn_implementation"),
        loss=keys.default("chunked" if objective.value == "sft" else "full", "loss_type"),
        gradient_checkpointing=keys.flag("gradient_checkpointing", default=True),
        optimizer=keys.word("optim", default="adamw_torch_fused"),
        learning_rate=keys.number("learning_rate", default=_RATES.get(objective.value)),
        schedule=keys.word("lr_scheduler_type", default="linear"),
        warmup_steps=keys.number("warmup_steps", default=0),
        epochs=keys.number("num_train_epochs", default=3.0),
        max_steps=keys.count("max_steps"),
        loss_on=_loss_on(keys),
        eval_strategy=keys.word("eval_strategy", default="no"),
        eval_steps=keys.number("eval_steps"),
        save_strategy=keys.word("save_strategy", default="steps"),
        save_steps=keys.number("save_steps", default=500),
        load_best_model_at_end=keys.flag("load_best_model_at_end", default=False),
        gpus=keys.count("num_processes"),
        strategy=_strategy(keys, tree),
        by_trainer=by_trainer(keys, objective, precision),
    )


def _adapter(keys: Keys) -> Value:
    switch = keys.flag("use_peft", default=False)
    if switch.value:
        return replace(switch, value="lora")
    wanted = keys.node(*_LORA, *_BLOCKS)
    asked = "a LoRA adapter" if wanted is None else wanted[0]
    line = switch.line or (None if wanted is None else keys.lines.get(wanted[0]))
    why = "without use_peft: true TRL ignores every lora_* key and trains all weights"
    return Value(None, switch.source, "use_peft", line, asked, why)


def _quantization(keys: Keys) -> Value:
    if keys.says("load_in_4bit"):
        return keys.decided("load_in_4bit", keys.word("bnb_4bit_quant_type", default="nf4").value)
    if keys.says("load_in_8bit"):
        return keys.decided("load_in_8bit", "int8")
    return keys.default(None, "load_in_4bit")


def _dtype(keys: Keys) -> Value:
    found = keys.word("dtype", default="float32")
    if found.value == "auto":
        return replace(found, value=None)
    return with_whole_dtype(found)


def _precision(keys: Keys) -> Value:
    if keys.says("fp16"):
        return keys.decided("fp16", "fp16")
    found = keys.flag("bf16", default=True)
    return replace(found, value="bf16" if found.value else None)


def _targets(keys: Keys) -> Value:
    """A list of one becomes a text, which PEFT reads as an expression for whole names."""
    found = keys.names("lora_target_modules")
    names: Any = found.value
    if isinstance(names, tuple) and len(names) == 1:
        return replace(found, value=names[0])
    return found


def _loss_on(keys: Keys) -> Value:
    for name in ("assistant_only_loss", "completion_only_loss"):
        if keys.says(name):
            return keys.decided(name, "answers")
    return keys.default("all tokens", "assistant_only_loss")


def _strategy(keys: Keys, tree: Tree) -> Value:
    named = keys.word("accelerate_config", "config_file")
    if named.value:
        beside = strategy_of_accelerate(tree.mapping(named.value))
        return replace(named, value=beside or strategy_by_name(named.value))
    deepspeed = keys.word("deepspeed", "deepspeed_config_file")
    if deepspeed.value:
        return deepspeed_strategy(deepspeed, tree)
    stage_key = keys.node("zero_stage")
    if stage_key is not None and number(stage_key[1]) in (0, 1, 2, 3):
        return keys.decided("zero_stage", f"zero{stage_key[1].value}")
    sharded = fsdp_strategy(
        keys, "use_fsdp", "fsdp", "fsdp_config", "fsdp_version", "fsdp_sharding_strategy", tree=tree
    )
    if sharded is not None:
        return sharded
    return keys.default("ddp", "accelerate_config")


def objective_of(keys: Keys) -> Value:
    """What a recipe trains for: as its loss says, or keys that one trainer has."""
    for word in _losses(keys):
        for name, words in _LOSSES.items():
            if word in words:
                return keys.decided("loss_type", name)
    if str(keys.word("lora_task_type").value).upper() == "SEQ_CLS":
        return keys.decided("lora_task_type", "reward")
    for name, marks in _MARKS_OF_TRAINERS.items():
        found = keys.node(*marks)
        if found is not None:
            return keys.decided(found[0], name)
    return Value("sft", "the keys of trl sft")


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
        "autocast": HALF_PRECISIONS.get(precision.value, False),
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
