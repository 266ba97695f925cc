"""Recipes of ms-swift: a flat mapping whose values are passed on as text, as if on the command line.

Source: ``swift/cli/main.py`` (parse_yaml_args) and ``swift/arguments``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pytest_lora.facts.recipe import RunSetting, Value
from pytest_lora.inspection.recipe.beside import Tree, strategy_of_arguments
from pytest_lora.inspection.recipe.keys import ALL, LANGUAGE, VISION, Keys, count, with_whole_dtype

NAME = "ms-swift"
KEYS = "ms-swift"
STOPS_AT_UNKNOWN = True
CHECKS_WORDS = True
_MARKS = ("tuner_type", "train_type", "sft_type", "split_dataset_ratio", "quant_method", "rlhf_type")


def is_mine(keys: Keys) -> bool:
    """Whether a recipe is one of ms-swift."""
    found = keys.node("model")
    return found is not None and found[1].pairs is None and keys.has(*_MARKS, "lora_rank", "quant_bits")


def left_alone(keys: Keys) -> str:
    """Why a recipe is no LoRA training, or empty."""
    kind = keys.word("tuner_type", "train_type", "sft_type", default="lora").value
    if keys.has("tensor_model_parallel_size", "micro_batch_size", "global_batch_size"):
        return "it is one of Megatron-SWIFT"
    if kind != "lora":
        return f"its tuner_type is {kind}"
    if keys.has("export_dir", "merge_lora", "infer_backend", "quant_n_samples") and not keys.has(
        "learning_rate"
    ):
        return "it trains nothing"
    if not keys.has("dataset", "learning_rate", "num_train_epochs", "cached_dataset"):
        return "it trains nothing: it names no dataset"
    return ""


def setting(keys: Keys, tree: Tree) -> RunSetting:
    """The effective setting."""
    batch = keys.count("per_device_train_batch_size", default=1)
    gpus = _gpus(keys)
    kind = keys.word("rlhf_type", default="sft")
    targets = keys.names("target_modules", default="all-linear")
    if keys.has("target_regex"):
        targets = keys.names("target_regex")  # in place of target_modules, whatever those are
    elif targets.value == ("all-linear",):
        targets = replace(targets, value="all-linear")
    frozen = keys.flag("freeze_vit", default=True)
    whole = targets.value == "all-linear"
    excluded = replace(frozen, value=VISION if whole and frozen.value else None)
    if whole and keys.says("freeze_llm"):
        excluded = replace(keys.flag("freeze_llm"), value=ALL if frozen.value else LANGUAGE)
    return RunSetting(
        tool=NAME,
        base=keys.word("model"),
        adapter=replace(keys.word("tuner_type", default="lora"), value="lora"),
        quantization=_quantization(keys),
        double_quant=keys.flag("bnb_4bit_use_double_quant", default=True),
        quant_storage=keys.word("bnb_4bit_quant_storage"),
        dtype=_dtype(keys),
        precision=_precision(keys),
        objective=kind,
        r=keys.count("lora_rank", default=8),
        lora_alpha=keys.number("lora_alpha", default=32),
        lora_dropout=keys.number("lora_dropout", default=0.05),
        target_modules=targets,
        exclude_modules=excluded,
        target_parameters=keys.names("target_parameters"),
        modules_to_save=keys.names("modules_to_save"),
        use_rslora=keys.flag("use_rslora", default=False),
        use_dora=keys.flag("use_dora", default=False),
        bias=keys.word("lora_bias", default="none"),
        batch_size=batch,
        accumulation=_accumulation(keys, batch, gpus),
        seq_len=keys.count("max_length"),
        packing=keys.flag("packing", default=False),
        attention=keys.word("attn_impl"),
        loss=_loss(keys),
        gradient_checkpointing=keys.flag("gradient_checkpointing", default=True),
        optimizer=keys.word("optim", default="adamw_torch_fused"),
        learning_rate=keys.number("learning_rate", default=1e-4),
        schedule=keys.word("lr_scheduler_type", default="cosine"),
        warmup_steps=keys.number("warmup_steps"),
        warmup_ratio=keys.number("warmup_ratio"),
        epochs=keys.number("num_train_epochs", default=3.0),
        max_steps=keys.count("max_steps"),
        eval_strategy=keys.word("eval_strategy"),
        eval_steps=keys.number("eval_steps"),
        save_strategy=keys.word("save_strategy", default="steps"),
        save_steps=keys.number("save_steps", default=500),
        load_best_model_at_end=keys.flag("load_best_model_at_end", default=False),
        gpus=gpus,
        strategy=strategy_of_arguments(keys, tree),
        continues=_continues(keys),
        new_tokens=keys.value("new_special_tokens", read=lambda node: len(node.items or (node,))),
        scope=replace(frozen, value="language_model")
        if frozen.stated and frozen.value and not whole
        else Value(),
    )


def _continues(keys: Keys) -> Value:
    """The adapter that is trained on; ms-swift refuses more than one."""
    found = keys.names("adapters")
    return replace(
        found, value=found.value[0] if isinstance(found.value, tuple) and found.value else found.value
    )


def _gpus(keys: Keys) -> Value:
    env = keys.node("ENV")
    found = (env[1].pairs or {}).get("NPROC_PER_NODE") if env else None
    return Value() if found is None else Value(count(found), f"line {found.line}", "ENV", found.line)


def _accumulation(keys: Keys, batch: Value, gpus: Value) -> Value:
    stated = keys.count("gradient_accumulation_steps")
    if stated.stated or not batch.value:
        return stated
    steps = math.ceil(16 / max(1, batch.value) / max(1, gpus.value or 1))
    return Value(steps, "16 / per_device_train_batch_size / GPUs", "gradient_accumulation_steps")


def _quantization(keys: Keys) -> Value:
    bits, method = keys.word("quant_bits"), keys.word("quant_method")
    if method.value is None and bits.value is not None:
        why = "ms-swift quantizes only where quant_method says how, as in quant_method: bnb"
        return Value(
            None,
            bits.source,
            "quant_bits",
            bits.line,
            f"quant_bits: {bits.value} ({bits.value}-bit weights)",
            why,
        )
    if method.value is None:
        return keys.default(None, "quant_bits")
    if bits.value is None and method.value != "fp8":
        why = "ms-swift stops: quant_method needs quant_bits beside it"
        return Value(None, method.source, "quant_bits", method.line, f"quant_method: {method.value}", why)
    if method.value != "bnb":
        return method
    kind = keys.word("bnb_4bit_quant_type", default="nf4").value
    return replace(method, value={"4": kind, "8": "int8"}.get(bits.value))


def _dtype(keys: Keys) -> Value:
    found = keys.word("torch_dtype")
    if found.value is None:
        return Value(None, "the dtype of the base", "torch_dtype")
    return with_whole_dtype(found)


def _precision(keys: Keys) -> Value:
    for name in ("bf16", "fp16"):
        if keys.says(name):
            return keys.decided(name, name)
    dtype = _dtype(keys)
    names = {"bfloat16": "bf16", "float16": "fp16"}
    return replace(
        dtype, value=names.get(dtype.value), source="follows torch_dtype" if dtype.value else dtype.source
    )


def _loss(keys: Keys) -> Value:
    if keys.says("use_liger_kernel") or keys.word("tuner_backend").value == "unsloth":
        return Value("chunked", "the kernels that it names", "use_liger_kernel")
    return keys.default("full")
