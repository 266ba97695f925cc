"""The arguments of a training script as the setting of a run."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import require_config
from pytest_lora.facts.recipe import GIVEN, RecipeFacts, RunSetting, Value
from pytest_lora.inspection.recipe import base_model
from pytest_lora.inspection.recipe.beside import OFFLOADED, fsdp_version, fsdp_version_of_arguments
from pytest_lora.values import shown

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

_STAGES = {"SFTConfig": "sft", "DPOConfig": "dpo", "KTOConfig": "kto"}


def script_facts(
    args: TrainingArguments, config: LoraConfig, base: Any, quantization: str | None
) -> RecipeFacts:
    """What a script runs, as far as its arguments say it.

    Raises:
        TypeError: ``args`` or ``config`` is not what it should be.
    """
    from transformers import TrainingArguments

    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be transformers.TrainingArguments, not {shown(args)}")
    require_config(config)
    given = _Arguments(args)
    name = type(args).__name__
    tool = "TRL" if name in _STAGES else "Trainer"
    known = base_model(base) if isinstance(base, str) else None
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else None
    setting = RunSetting(
        tool=tool,
        base=Value(base if isinstance(base, str) else type(base).__name__, GIVEN, "base"),
        adapter=Value("lora", GIVEN, "config"),
        quantization=Value(quantization, GIVEN, "quantization"),
        dtype=Value(None, "the dtype of the base", "dtype"),
        precision=given.value("fp16" if args.fp16 else "bf16", precision),
        objective=Value(next((s for n, s in _STAGES.items() if _is(args, n)), None), GIVEN, name),
        r=Value(config.r, GIVEN, "r"),
        lora_alpha=Value(config.lora_alpha, GIVEN, "lora_alpha"),
        target_modules=Value(config.target_modules, GIVEN, "target_modules"),
        modules_to_save=Value(config.modules_to_save, GIVEN, "modules_to_save"),
        use_rslora=Value(config.use_rslora, GIVEN, "use_rslora"),
        batch_size=given.value("per_device_train_batch_size"),
        accumulation=given.value("gradient_accumulation_steps"),
        seq_len=given.value("max_length"),
        packing=given.value("packing"),
        loss=Value("chunked" if tool == "TRL" else "full", GIVEN),
        gradient_checkpointing=given.value("gradient_checkpointing"),
        optimizer=given.value("optim", _word(args.optim)),
        learning_rate=given.value("learning_rate"),
        schedule=given.value(
            "lr_scheduler_type", str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        ),
        warmup_steps=given.value("warmup_steps"),
        warmup_ratio=given.value("warmup_ratio"),
        epochs=given.value("num_train_epochs"),
        max_steps=given.value("max_steps"),
        eval_strategy=given.value("eval_strategy", _word(args.eval_strategy)),
        eval_steps=given.value("eval_steps"),
        save_strategy=given.value("save_strategy", _word(args.save_strategy)),
        save_steps=given.value("save_steps"),
        load_best_model_at_end=given.value("load_best_model_at_end"),
        strategy=Value(_fsdp(args), GIVEN, "fsdp"),
    )
    return RecipeFacts(name, tool=tool, setting=setting, base=known)


def _fsdp(args: Any) -> str | None:
    if not args.fsdp:
        return None
    said = getattr(args, "fsdp_plugin_args", None) or args.fsdp_config or {}
    version = fsdp_version(said) or fsdp_version_of_arguments()
    moved = said.get("cpu_offload") or "offload" in f"{args.fsdp} {args.fsdp_config}".lower()
    return f"fsdp{version}{OFFLOADED if moved else ''}"


def _word(value: Any) -> str:
    """The value of an enumeration as text."""
    return str(getattr(value, "value", value))


def _is(args: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(args).__mro__)


class _Arguments:
    """Fields of a dataclass as values, and whether each is its default."""

    def __init__(self, args: Any) -> None:
        self._args = args
        self._defaults = {f.name: f.default for f in fields(args)}

    def value(self, name: str, value: Any = MISSING) -> Value:
        """One field, as it is or as another value."""
        found = getattr(self._args, name, None)
        default = self._defaults.get(name, MISSING)
        source = f"default of {type(self._args).__name__}" if found == default else GIVEN
        return Value(found if value is MISSING else value, source, name)
