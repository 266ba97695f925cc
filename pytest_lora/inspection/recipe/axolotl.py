"""Recipes of Axolotl: a flat mapping that pydantic reads; keys that its schema does not have are dropped.

Source: ``axolotl/utils/schemas``, ``axolotl/loaders/model.py`` and ``axolotl/loaders/adapter.py``.
"""

from __future__ import annotations

import re
from dataclasses import replace

from pytest_lora.facts.memory_choices import HALF_PRECISIONS
from pytest_lora.facts.recipe import UNKNOWN, RunSetting, Value
from pytest_lora.inspection.recipe.beside import FSDP_OF_ACCELERATE, Tree, deepspeed_strategy, fsdp_strategy
from pytest_lora.inspection.recipe.keys import Keys, numbers_by_name

NAME = "Axolotl"
KEYS = "axolotl"
STOPS_AT_UNKNOWN = False
CHECKS_WORDS = True
_MARKS = (
    "adapter", "micro_batch_size", "sequence_len", "lora_target_linear", "lora_model_dir", "val_set_size",
    "sample_packing", "datasets", "pretraining_dataset",
)  # fmt: skip
_LORA = (
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_linear",
    "peft_use_rslora",
    "peft_use_dora",
)
_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "xformers_attention": "xformers",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
_LOW_MEMORY = ("liger_fused_linear_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy")

_CHAT_MARK = re.compile(r"<\|.*\|>|\[/?INST\]|</?s>|</?think>")
"""Tokens that chat templates use and that bases have."""


def is_mine(keys: Keys) -> bool:
    """Whether a recipe is one of Axolotl."""
    return keys.has("base_model") and keys.has(*_MARKS) and not keys.has("model_name_or_path")


def left_alone(keys: Keys) -> str:
    """Why a recipe is no LoRA training, or empty."""
    adapter = keys.word("adapter").value
    if adapter in ("lora", "qlora"):
        return ""
    if adapter:
        return f"its adapter is {adapter}"
    if "adapter" in keys.pairs:
        return "its adapter is empty: it trains all weights"
    asks = any(keys.has(name) for name in ("lora_r", "lora_alpha"))
    return "" if asks else "it trains all weights"


def setting(keys: Keys, tree: Tree) -> RunSetting:
    """The effective setting."""
    adapter = keys.word("adapter")
    wanted = next((found for found in map(keys.node, _LORA) if found), None)
    if adapter.value is None and wanted is not None:
        adapter = Value(
            None, f"default of {NAME}", "adapter", keys.lines.get(wanted[0]), f"{wanted[0]}",
            "Axolotl makes an adapter only where `adapter` says lora or qlora; without it all weights are trained",
        )  # fmt: skip
    kind = adapter.value
    return RunSetting(
        tool=NAME,
        base=keys.word("base_model"),
        adapter=replace(adapter, value=kind if kind in ("lora", "qlora") else None),
        quantization=_quantization(keys, kind),
        double_quant=keys.default(True),
        quant_storage=keys.default("bfloat16"),  # loaders/model.py, whatever else is asked
        dtype=_dtype(keys),
        precision=_precision(keys),
        upcast=_upcast(keys),
        adapter_dtype=_adapter_dtype(keys),
        objective=keys.word("rl", default="sft"),
        r=keys.count("lora_r"),
        lora_alpha=keys.number("lora_alpha"),
        lora_dropout=keys.number("lora_dropout", default=0.0),
        target_modules=_targets(keys),
        target_parameters=keys.names("lora_target_parameters"),
        layers_to_transform=keys.value("peft_layers_to_transform", read=lambda node: node.unwrapped()),
        rank_pattern=keys.value("lora_rank_pattern", read=numbers_by_name),
        alpha_pattern=keys.value("lora_alpha_pattern", read=numbers_by_name),
        modules_to_save=keys.names("lora_modules_to_save"),
        use_rslora=keys.flag("peft_use_rslora", default=False),
        use_dora=keys.flag("peft_use_dora", default=False),
        batch_size=keys.count("micro_batch_size", default=1),
        accumulation=keys.count("gradient_accumulation_steps", default=1),
        seq_len=keys.count("sequence_len", default=512),
        packing=keys.flag("sample_packing", default=False),
        attention=_attention(keys),
        loss=_loss(keys),
        kernels=_kernels(keys, kind),
        gradient_checkpointing=_checkpointing(keys),
        optimizer=keys.word("optimizer", default="adamw_torch_fused"),
        learning_rate=keys.number("learning_rate"),
        schedule=keys.word("lr_scheduler", default="cosine"),
        warmup_steps=keys.count("warmup_steps"),
        warmup_ratio=keys.number("warmup_ratio"),
        epochs=keys.number("num_epochs", default=1.0),
        max_steps=keys.count("max_steps"),
        eval_strategy=keys.word("eval_strategy"),
        eval_steps=keys.number("eval_steps"),
        save_strategy=keys.word("save_strategy"),
        save_steps=keys.number("save_steps"),
        load_best_model_at_end=keys.flag("load_best_model_at_end", default=False),
        strategy=_strategy(keys, tree),
        continues=keys.word("lora_model_dir"),
        new_tokens=_new_tokens(keys),
    )


def _new_tokens(keys: Keys) -> Value:
    """How many tokens are added: ``tokens``, and ``additional_special_tokens`` that are no marks of a chat template.

    Tokens such as ``<|im_end|>`` are in the vocabulary of most bases, and adding them once more adds none.
    """
    found = keys.value("tokens", read=lambda node: len(node.items or ()))
    special = keys.node("special_tokens")
    added = (special[1].pairs or {}).get("additional_special_tokens") if special else None
    new = [one for one in (added.items or ()) if not _CHAT_MARK.fullmatch(str(one.written))] if added else []
    if found.value or not new or added is None:
        return found
    return Value(len(new), f"line {added.line}", "additional_special_tokens", added.line)


def _quantization(keys: Keys, adapter: str | None) -> Value:
    in_4 = keys.says("load_in_4bit")
    if adapter == "qlora":
        if in_4 or keys.says("gptq"):
            return keys.decided("adapter", "nf4")
        why = "Axolotl stops: adapter: qlora requires load_in_4bit: true"
        line = keys.lines["load_in_4bit" if keys.has("load_in_4bit") else "adapter"]
        return Value(None, f"default of {NAME}", "load_in_4bit", line, "adapter: qlora (4 bits)", why)
    if in_4:
        why = "Axolotl quantizes to 4 bits only under adapter: qlora"
        return keys.decided("load_in_4bit", None, asked="load_in_4bit: true (4-bit weights)", why=why)
    if adapter == "lora" and keys.says("load_in_8bit"):
        return keys.decided("load_in_8bit", "int8")
    return keys.default(None, "load_in_4bit")


def _upcast(keys: Keys) -> Value:
    """What ``prepare_model_for_kbit_training`` casts and nothing casts back under ``embeddings_skip_upcast``.

    The key spares parameters called embed_tokens and lm_head (``PATCHED_PREPARE_CODE`` in
    monkeypatch/peft/utils.py), and leaves out the cast back of all embeddings (``_configure_embedding_dtypes`` in
    loaders/model.py).
    """
    skips = keys.flag("embeddings_skip_upcast", default=False)
    return replace(skips, value=_OTHER_EMBEDDINGS if skips.value and keys.says("load_in_4bit") else None)


_OTHER_EMBEDDINGS = ("embed_in", "embed_out", "word_embeddings")
"""Of GPT-NeoX and Falcon (``get_linear_embedding_layers`` in loaders/utils.py)."""


def _adapter_dtype(keys: Keys) -> Value:
    """PEFT casts adapters to float32 unless ``peft_autocast_adapter_dtype`` says no (``load_lora``)."""
    casts = keys.flag("peft_autocast_adapter_dtype", default=True)
    return replace(casts, value=_dtype(keys).value if casts.value is False else None)


def _precision(keys: Keys) -> Value:
    for name, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("float16", "fp16")):
        found = keys.node(name)
        gives_way = found is not None and found[1].written == "auto" and keys.says("fp16")
        if found and not gives_way and (keys.says(name) or found[1].written in ("auto", "full")):
            return keys.decided(name, precision)
    return keys.decided("bf16", None) if keys.has("bf16") else keys.default("bf16", "bf16")


def _dtype(keys: Keys) -> Value:
    precision = _precision(keys)
    if keys.says("load_in_8bit"):
        return Value("float16", "follows load_in_8bit", "load_in_8bit")
    dtype = HALF_PRECISIONS.get(precision.value, "float32")
    return replace(precision, value=dtype, source=f"follows {precision.key}", line=None)


def _targets(keys: Keys) -> Value:
    if keys.says("lora_target_linear"):
        return keys.decided("lora_target_linear", "all-linear")
    return keys.names("lora_target_modules")


def _attention(keys: Keys) -> Value:
    stated = keys.word("attn_implementation")
    if stated.value is not None:
        return stated
    for name, attention in _ATTENTION.items():
        if keys.says(name):
            return keys.decided(name, attention)
    return Value(None, "", "attn_implementation")


def _loss(keys: Keys) -> Value:
    found = next((name for name in _LOW_MEMORY if keys.says(name)), None)
    if found is not None:
        return keys.decided(found, "chunked")
    plugins = keys.names("plugins").value or ()
    if any("cut_cross_entropy" in str(one) for one in plugins):
        return keys.decided("plugins", "chunked")
    return keys.default("full")


def _kernels(keys: Keys, adapter: str | None) -> Value:
    """Whether all of its kernels for LoRA run, which it takes by itself where no key says anything about one.

    A key that is set leaves the others at false, and in 8 bits, beside reinforcement learning and with code of
    the checkpoint's own none is taken by itself (``check_auto_enable_lora_kernels`` in
    axolotl/utils/schemas/config.py). The kernel of embeddings is not modelled.
    """
    given = [name for name in (*_KERNELS, "lora_embedding_kernel") if keys.has(name)]
    if given:
        return keys.decided(given[0], all(map(keys.says, _KERNELS)))
    other = (
        keys.has("rl") or keys.says("trust_remote_code") or (adapter == "lora" and keys.says("load_in_8bit"))
    )
    return keys.default(not other, _KERNELS[0])


def _checkpointing(keys: Keys) -> Value:
    found = keys.value(
        "gradient_checkpointing",
        read=lambda node: node.written not in ("false", "False", "no"),
        default=False,
    )
    if found.value is not True:
        return found
    arguments = keys.node("gradient_checkpointing_kwargs")
    reentrant = (arguments[1].pairs or {}).get("use_reentrant") if arguments else None
    default = not keys.has("rl")
    return replace(
        found, value="reentrant" if (default if reentrant is None else reentrant.value is True) else True
    )


def _strategy(keys: Keys, tree: Tree) -> Value:
    deepspeed = keys.word("deepspeed")
    if deepspeed.value:
        return deepspeed_strategy(deepspeed, tree)
    sharded = fsdp_strategy(keys, "fsdp_config", "fsdp", "fsdp_version", version=FSDP_OF_ACCELERATE)
    if sharded is not None:
        return sharded
    if keys.has("tensor_parallel_size", "dp_shard_size"):
        return UNKNOWN
    return keys.default("ddp", "deepspeed")
