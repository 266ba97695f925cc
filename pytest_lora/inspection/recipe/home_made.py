"""Recipes of one's own: flat or nested, with the names that PEFT and transformers have made usual.

Nothing is known of the script that reads them: no defaults are assumed, and no key is unknown.
"""

from __future__ import annotations

from dataclasses import replace

from pytest_lora.facts.recipe import RunSetting, Value
from pytest_lora.inspection.recipe.beside import Tree, deepspeed_strategy, fsdp_strategy
from pytest_lora.inspection.recipe.keys import Keys, comma_separated, numbers_by_name, with_whole_dtype
from pytest_lora.inspection.recipe.yaml_file import Node

NAME = "your own script"
KEYS = ""
STOPS_AT_UNKNOWN = False
CHECKS_WORDS = False

_BASE = (
    "model_name_or_path", "base_model", "pretrained_model_name_or_path", "model_name", "model_id", "model_path",
    "base_model_name_or_path", "base_model_id", "name_or_path",
)  # fmt: skip
_ADAPTER = ("lora_r", "lora_rank", "lora_alpha", "lora_target_modules")
_BLOCKS = ("lora", "peft", "lora_config", "peft_config", "adapter", "qlora")
_FROZEN = (
    "freeze_vision_tower",
    "freeze_vision",
    "freeze_vit",
    "freeze_vision_encoder",
    "freeze_visual",
    "freeze_tower",
)
_MAPPINGS = ("tokens", "rank_pattern", "alpha_pattern")
"""Keys whose mappings are values and no blocks."""
MAX_LEVELS = 4

_SHORT = {"r": "lora_r", "rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""Keys that leave out the word where LoRA is meant."""


def flattened(root: Node) -> Keys:
    """Keys at every level under their own names: the outermost of equal ones, and ``r`` only where LoRA is meant."""
    pairs: dict[str, Node] = {}
    lines: dict[str, int] = {}
    written: dict[str, str] = {}
    level: list[tuple[str, Node]] = [("", root)]
    for _ in range(MAX_LEVELS):
        inner: list[tuple[str, Node]] = []
        for block, node in level:
            found = node.pairs or {}
            of_lora = block in _BLOCKS or bool({"lora_alpha", "target_modules"} & set(found))
            for name, value in found.items():
                if value.pairs is not None and name not in _MAPPINGS:
                    inner.append((name, value))
                    continue
                plain = _whole_name(name, block, of_lora=of_lora)
                if plain not in pairs:
                    pairs[plain], lines[plain] = value, node.lines.get(name, value.line)
                    written[plain] = name
        level = inner
    model = pairs.get("model")
    if model is not None and model.items is None and not set(_BASE) & set(pairs):
        pairs["model_name"], lines["model_name"] = model, lines["model"]
    keys = Keys(Node(root.line, pairs=pairs, lines=lines), NAME)
    keys.written = written
    return keys


def _whole_name(name: str, block: str, *, of_lora: bool) -> str:
    """What a key means outside its block."""
    if block in ("model", "base") and name in ("name", "id", "path"):
        return "model_name"
    return _SHORT.get(name, name) if of_lora else name


def is_mine(keys: Keys) -> bool:
    """Whether a mapping, flattened, is a recipe for a LoRA adapter."""
    marks = sum(keys.has(name) for name in (*_ADAPTER, "target_modules"))
    return keys.has(*_BASE) and (
        marks > 1 or (keys.has("lora_r", "lora_rank") and keys.has("learning_rate", "lr"))
    )


def left_alone(keys: Keys) -> str:
    """Why a recipe is no LoRA training, or empty."""
    for switch in ("use_lora", "use_peft", "lora_enable"):
        if keys.has(switch) and not keys.says(switch):
            return f"{switch} is off"
    return ""


def setting(keys: Keys, tree: Tree) -> RunSetting:
    """The effective setting, as far as the recipe states it."""
    targets = keys.names("lora_target_modules", "target_modules", "lora_targets")
    saved = keys.names("lora_modules_to_save", "modules_to_save")
    frozen = next((keys.flag(name) for name in _FROZEN if keys.says(name)), Value())
    return RunSetting(
        tool=NAME,
        base=keys.word(*_BASE),
        adapter=Value("lora", "its LoRA keys", "lora_r"),
        quantization=_quantization(keys),
        double_quant=keys.flag("bnb_4bit_use_double_quant", "use_nested_quant", default=False),
        quant_storage=keys.word("bnb_4bit_quant_storage", "bnb_4bit_quant_storage_dtype"),
        dtype=_dtype(keys),
        precision=_precision(keys),
        objective=replace(keys.word("objective", "stage"), value=_objective(keys)),
        r=keys.count("lora_r", "lora_rank"),
        lora_alpha=keys.number("lora_alpha"),
        lora_dropout=keys.number("lora_dropout"),
        target_modules=replace(targets, value=_targets(targets.value)),
        layers_to_transform=keys.value("layers_to_transform", read=lambda node: node.unwrapped()),
        rank_pattern=keys.value("rank_pattern", read=numbers_by_name),
        alpha_pattern=keys.value("alpha_pattern", read=numbers_by_name),
        modules_to_save=replace(saved, value=(saved.value,) if isinstance(saved.value, str) else saved.value),
        use_rslora=keys.flag("use_rslora"),
        use_dora=keys.flag("use_dora"),
        bias=keys.word("lora_bias", "bias"),
        task_type=keys.word("task_type"),
        batch_size=keys.count(
            "per_device_train_batch_size",
            "micro_batch_size",
            "train_batch_size",
            "per_device_batch_size",
            "batch_size",
        ),
        accumulation=keys.count(
            "gradient_accumulation_steps", "grad_accumulation_steps", "accumulation_steps"
        ),
        seq_len=keys.count(
            "max_seq_length",
            "max_seq_len",
            "max_length",
            "sequence_length",
            "sequence_len",
            "seq_len",
            "cutoff_len",
        ),
        packing=keys.flag("packing"),
        attention=keys.word("attn_implementation"),
        gradient_checkpointing=keys.flag("gradient_checkpointing", "use_gradient_checkpointing"),
        optimizer=keys.word("optim", "optimizer"),
        learning_rate=keys.number("learning_rate", "lr"),
        schedule=keys.word("lr_scheduler_type", "lr_scheduler", "scheduler"),
        warmup_steps=keys.number("warmup_steps", "num_warmup_steps"),
        warmup_ratio=keys.number("warmup_ratio"),
        epochs=keys.number("num_train_epochs", "num_epochs", "epochs"),
        max_steps=keys.count("max_steps", "max_train_steps"),
        eval_strategy=keys.word("eval_strategy", "evaluation_strategy"),
        eval_steps=keys.number("eval_steps"),
        save_strategy=keys.word("save_strategy"),
        save_steps=keys.number("save_steps"),
        load_best_model_at_end=keys.flag("load_best_model_at_end", default=False),
        gpus=keys.count("num_gpus", "num_processes", "nproc_per_node"),
        strategy=_strategy(keys, tree),
        continues=keys.word(
            "adapter_name_or_path", "adapter_path", "lora_path", "resume_adapter", "adapter_weights"
        ),
        new_tokens=keys.value(
            "new_tokens", "add_tokens", "additional_tokens", read=lambda node: len(node.items or ())
        ),
        scope=replace(frozen, value="language_model") if frozen.value else Value(),
    )


def _targets(value: object) -> object:
    """Names; a script that takes ``all`` means all linear modules, as PEFT itself has no such word."""
    return "all-linear" if value in ("all", ("all",), ("all-linear",)) else comma_separated(value)


def _objective(keys: Keys) -> str | None:
    stated = keys.word("objective", "stage", "training_type", "method").value
    return stated.lower() if stated else None


def _quantization(keys: Keys) -> Value:
    for name, kind in (("load_in_4bit", "nf4"), ("use_4bit", "nf4"), ("load_in_8bit", "int8")):
        if keys.says(name):
            found = keys.word("bnb_4bit_quant_type", default=kind).value if kind == "nf4" else kind
            return keys.decided(name, found)
    return Value(None, "", "load_in_4bit")


def _dtype(keys: Keys) -> Value:
    found = keys.word("torch_dtype", "dtype")
    if not found.value:
        return found
    return with_whole_dtype(replace(found, value=str(found.value).removeprefix("torch.")))


def _precision(keys: Keys) -> Value:
    for name in ("bf16", "fp16"):
        if keys.says(name):
            return keys.decided(name, name)
    return Value(None, "", "bf16")


def _strategy(keys: Keys, tree: Tree) -> Value:
    deepspeed = keys.word("deepspeed", "deepspeed_config")
    if deepspeed.value:
        return deepspeed_strategy(deepspeed, tree)
    sharded = fsdp_strategy(keys, "fsdp", tree=tree)
    if sharded is not None:
        return sharded
    return Value(None, "", "deepspeed")
