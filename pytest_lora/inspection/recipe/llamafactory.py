"""Recipes of LLaMA-Factory: a flat mapping that OmegaConf loads and transformers' parser takes.

Source: ``llamafactory/hparams`` and ``llamafactory/model``.
"""

from __future__ import annotations

from dataclasses import replace

from pytest_lora.facts.memory_choices import HALF_PRECISIONS
from pytest_lora.facts.recipe import RunSetting, Value
from pytest_lora.inspection.recipe.beside import Tree, strategy_of_arguments
from pytest_lora.inspection.recipe.keys import VISION, Keys, comma_separated

NAME = "LLaMA-Factory"
KEYS = "llamafactory"
STOPS_AT_UNKNOWN = True
CHECKS_WORDS = False
_MARKS = ("stage", "finetuning_type", "lora_target", "cutoff_len", "dataset_dir")
_METHODS = ("bnb", "gptq", "awq", "aqlm", "quanto", "eetq", "hqq", "mxfp4", "fp8")


def is_mine(keys: Keys) -> bool:
    """Whether a recipe is one of LLaMA-Factory."""
    if not keys.has("model_name_or_path"):
        return False
    exports = keys.has("export_dir") and keys.has("template", "adapter_name_or_path")
    return (
        exports
        or keys.has(*_MARKS)
        or (keys.has("template") and keys.has("adapter_name_or_path", "infer_backend"))
    )


def left_alone(keys: Keys) -> str:
    """Why a recipe is no LoRA training, or empty."""
    method = keys.word("finetuning_type", default="lora").value
    if method != "lora":
        return f"its finetuning_type is {method}"
    if keys.has("export_dir") and not keys.says("do_train"):
        return "it exports a model"
    if not keys.says("do_train"):
        return "it trains nothing: do_train is not true"
    return ""


def setting(keys: Keys, tree: Tree) -> RunSetting:
    """The effective setting."""
    rank = keys.count("lora_rank", default=8)
    alpha = keys.number("lora_alpha")
    if alpha.value is None and not alpha.stated and rank.value is not None:
        alpha = Value(2 * rank.value, "2 x lora_rank", "lora_alpha")
    targets = keys.names("lora_target", default="all")
    targets = replace(targets, value=_listed(comma_separated(targets.value)))  # never an expression
    if targets.value == ("all",):
        targets = replace(targets, value="all-linear")
    tower = keys.flag("freeze_vision_tower", default=True)
    saved = keys.names("additional_target")
    return RunSetting(
        tool=NAME,
        base=keys.word("model_name_or_path"),
        adapter=replace(keys.word("finetuning_type", default="lora"), value="lora"),
        quantization=_quantization(keys),
        double_quant=keys.flag("double_quantization", default=True),
        quant_storage=_dtype(keys),  # model_utils/quantization.py: the dtype that is computed in
        dtype=_dtype(keys),
        precision=_precision(keys),
        upcast=_upcast(keys),
        objective=keys.word("stage", default="sft"),
        r=rank,
        lora_alpha=alpha,
        lora_dropout=keys.number("lora_dropout", default=0.0),
        target_modules=targets,
        exclude_modules=replace(tower, value=VISION if tower.value else None),
        modules_to_save=replace(saved, value=_listed(comma_separated(saved.value))),
        use_rslora=keys.flag("use_rslora", default=False),
        use_dora=keys.flag("use_dora", default=False),
        batch_size=keys.count("per_device_train_batch_size", default=8),
        accumulation=keys.count("gradient_accumulation_steps", default=1),
        seq_len=keys.count("cutoff_len", default=2048),
        packing=_packing(keys),
        attention=keys.word("flash_attn", default="auto"),
        loss=_loss(keys),
        gradient_checkpointing=_checkpointing(keys),
        optimizer=keys.word("optim", default="adamw_torch_fused"),
        learning_rate=keys.number("learning_rate", default=5e-5),
        schedule=keys.word("lr_scheduler_type", default="linear"),
        warmup_steps=keys.number("warmup_steps"),
        warmup_ratio=keys.number("warmup_ratio"),
        epochs=keys.number("num_train_epochs", default=3.0),
        max_steps=keys.count("max_steps"),
        loss_on=_loss_on(keys),
        eval_strategy=keys.word("eval_strategy", default="no"),
        eval_steps=keys.number("eval_steps"),
        save_strategy=keys.word("save_strategy", default="steps"),
        save_steps=keys.number("save_steps", default=500),
        load_best_model_at_end=keys.flag("load_best_model_at_end", default=False),
        strategy=strategy_of_arguments(keys, tree),
        continues=_continues(keys, tree),
    )


def _continues(keys: Keys, tree: Tree) -> Value:
    """The adapter that is trained on: the last one, unless all are merged and a new one is made.

    Adapters are not merged into a quantized base, under ZeRO-3 or by Unsloth (``model/adapter.py``), whatever
    ``create_new_adapter`` says.
    """
    found = keys.names("adapter_name_or_path")
    folders = _listed(comma_separated(found.value))
    last = folders[-1] if isinstance(folders, tuple) and folders else None
    kept = keys.has("quantization_bit") or keys.says("use_unsloth")
    kept = kept or str(strategy_of_arguments(keys, tree).value).startswith("zero3")
    return replace(found, value=None if keys.says("create_new_adapter") and not kept else last)


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _quantization(keys: Keys) -> Value:
    bits, method = keys.count("quantization_bit"), keys.word("quantization_method", default="bnb")
    if bits.value is None:
        if method.stated and method.value in ("bnb", "hqq", "eetq", "bitsandbytes"):
            why = "LLaMA-Factory quantizes on the fly only where quantization_bit says to how many bits"
            return Value(
                None,
                method.source,
                "quantization_bit",
                method.line,
                f"quantization_method: {method.value}",
                why,
            )
        return keys.default(None, "quantization_bit")
    if method.value not in _METHODS:
        why = (
            f"LLaMA-Factory knows no quantization_method {method.value!r}: the base stays unquantized; the method is "
            "called bnb"
        )
        return Value(
            None, method.source, "quantization_method", method.line, f"{bits.value}-bit weights", why
        )
    kind = keys.word("quantization_type", default="nf4").value
    found = {4: kind, 8: "int8"}.get(bits.value) if method.value == "bnb" else method.value
    return replace(bits, value=found)


def _upcast(keys: Keys) -> Value:
    """Norms, by the parts of names that ``prepare_model_for_training`` looks for (``LAYERNORM_NAMES``)."""
    norms = keys.flag("upcast_layernorm", default=False)
    return replace(norms, value=("norm", "ln") if norms.value else None)


def _precision(keys: Keys) -> Value:
    for name, precision in (("bf16", "bf16"), ("pure_bf16", "bf16"), ("fp16", "fp16")):
        if keys.says(name):
            return keys.decided(name, precision)
    return keys.default(None, "bf16")


def _dtype(keys: Keys) -> Value:
    precision = _precision(keys)
    if precision.value is None:
        return Value(None, "the dtype of the base", "bf16")
    return Value(HALF_PRECISIONS[precision.value], f"follows {precision.key}", precision.key)


def _loss(keys: Keys) -> Value:
    found = next((name for name in ("enable_liger_kernel", "use_unsloth") if keys.says(name)), None)
    if found is None:
        return keys.default("full")
    return keys.decided(found, "chunked")


def _checkpointing(keys: Keys) -> Value:
    off = keys.flag("disable_gradient_checkpointing", default=False)
    reentrant = keys.flag("use_reentrant_gc", default=True).value
    return replace(off, value=False if off.value else "reentrant" if reentrant else True)


def _packing(keys: Keys) -> Value:
    if keys.says("neat_packing"):
        return keys.decided("neat_packing", "separate")
    return keys.flag("packing", default=False)


def _loss_on(keys: Keys) -> Value:
    found = keys.flag("train_on_prompt", default=False)
    return replace(found, value="all tokens" if found.value else "answers")
