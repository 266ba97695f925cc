"""Settings of a recipe that do not go together, or not without another, as the checks of the tools' own parsers say."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from pytest_lora.facts.recipe import RunSetting
from pytest_lora.facts.recipe_lines import Clash
from pytest_lora.inspection.recipe.keys import Keys, is_filled_in, is_on
from pytest_lora.inspection.recipe.yaml_file import Node


class _Pair(NamedTuple):
    """Keys that do not go together: the first is the one to remove."""

    key: str
    other: str
    why: str
    stops: bool = True


class _Need(NamedTuple):
    """A key that, where its word is one of some, is refused without one of others; defaults of these are off."""

    key: str
    words: tuple[str, ...]
    others: tuple[str, ...]
    why: str


_PRECISION = "transformers stops: at most one of fp16 and bf16 can be true"
_BITS = "at most one of load_in_4bit and load_in_8bit can be true"
_KERNELS = "Axolotl stops: its LoRA kernels do not go with code of the checkpoint's own"
_OF_8_BITS = "Axolotl stops: its LoRA kernels do not go with 8-bit weights"

PAIRS: dict[str, tuple[_Pair, ...]] = {
    # axolotl/utils/schemas/validation.py and peft.py; of fp16 beside bf16, utils/config (normalize_config)
    "axolotl": (
        _Pair("evals_per_epoch", "eval_steps", "Axolotl stops: it takes one of them"),
        _Pair("saves_per_epoch", "save_steps", "Axolotl stops: it takes one of them"),
        _Pair("batch_size", "gradient_accumulation_steps", "Axolotl stops: it takes one of them"),
        _Pair("warmup_ratio", "warmup_steps", "Axolotl stops: it takes one of them"),
        _Pair("gpu_memory_limit", "max_memory", "Axolotl stops: it takes one of them"),
        _Pair("fsdp", "deepspeed", "Axolotl stops: deepspeed and fsdp cannot be used together"),
        _Pair("fsdp_config", "deepspeed", "Axolotl stops: deepspeed and fsdp cannot be used together"),
        _Pair("loraplus_lr_ratio", "lr_groups", "Axolotl stops: it takes one of them"),
        _Pair("peft_layers_to_transform", "unfrozen_parameters", "Axolotl stops: it takes one of them"),
        _Pair("val_set_size", "test_datasets", "Axolotl stops: it evaluates on one of them"),
        _Pair("sample_packing", "rl", "Axolotl stops: sample_packing does not work with RLHF training"),
        _Pair("lora_dropout", "lora_target_parameters", "Axolotl stops: PEFT has no dropout on parameters"),
        _Pair("lora_mlp_kernel", "trust_remote_code", _KERNELS),
        _Pair("lora_qkv_kernel", "trust_remote_code", _KERNELS),
        _Pair("lora_o_kernel", "trust_remote_code", _KERNELS),
        _Pair("lora_mlp_kernel", "load_in_8bit", _OF_8_BITS),
        _Pair("lora_qkv_kernel", "load_in_8bit", _OF_8_BITS),
        _Pair("lora_o_kernel", "load_in_8bit", _OF_8_BITS),
        _Pair("fp16", "bf16", "Axolotl trains in bf16 and leaves fp16 out", stops=False),
    ),
    # llamafactory/hparams/parser.py (_verify_model_args) and finetuning_args.py
    "llamafactory": (
        _Pair("fp16", "bf16", _PRECISION),
        _Pair(
            "pissa_init",
            "quantization_bit",
            "LLaMA-Factory stops: PiSSA needs weights that are not quantized",
        ),
        _Pair("resize_vocab", "quantization_bit", "LLaMA-Factory stops: a quantized base cannot be resized"),
        _Pair("mask_history", "train_on_prompt", "LLaMA-Factory stops: it masks one or the other"),
        _Pair("val_size", "eval_dataset", "LLaMA-Factory stops: it evaluates on one of them"),
        _Pair("use_galore", "lora_rank", "LLaMA-Factory stops: GaLore does not go with LoRA"),
        _Pair("use_apollo", "lora_rank", "LLaMA-Factory stops: APOLLO does not go with LoRA"),
        _Pair("use_badam", "lora_rank", "LLaMA-Factory stops: BAdam does not go with LoRA"),
    ),
    # trl/trainer/model_config.py (__post_init__), transformers' TrainingArguments
    "trl": (_Pair("fp16", "bf16", _PRECISION), _Pair("load_in_8bit", "load_in_4bit", f"TRL stops: {_BITS}")),
    "ms-swift": (_Pair("fp16", "bf16", _PRECISION),),
    # transformers' TrainingArguments and BitsAndBytesConfig
    "": (_Pair("fp16", "bf16", _PRECISION), _Pair("load_in_8bit", "load_in_4bit", f"bitsandbytes: {_BITS}")),
}
"""Of each tool, those that say something about a run with LoRA."""

NEEDS: dict[str, tuple[_Need, ...]] = {
    # transformers' Trainer.__init__, which LLaMA-Factory gives no evaluation data unless one of the two is there
    "llamafactory": (
        _Need(
            "eval_strategy",
            ("steps", "epoch"),
            ("val_size", "eval_dataset"),
            "transformers stops: there is nothing to evaluate on",
        ),
        _Need("stage", ("ppo",), ("reward_model",), "LLaMA-Factory stops: PPO needs a reward model"),
    ),
}

_WHOLE_WEIGHTS = ("zero3", "fsdp")


def clashes(keys: Keys, tool: ModuleType, setting: RunSetting | None = None) -> Iterator[Clash]:
    """Pairs of keys that are both there and on, and keys without those that they need.

    Args:
        keys: The recipe's keys.
        tool: Whose recipe it is.
        setting: The setting in effect, for what a file beside the recipe decides.
    """
    for pair in PAIRS.get(tool.KEYS, ()):
        found, other = keys.node(pair.key), keys.node(pair.other)
        if found is None or other is None or not is_on(found[1]) or not is_on(other[1]):
            continue
        line = keys.lines.get(pair.key, found[1].line)
        yield Clash(pair.key, line, pair.other, pair.why, pair.stops)
    for need in NEEDS.get(tool.KEYS, ()):
        found = keys.node(need.key)
        if found is None or found[1].written not in need.words:
            continue
        others = [keys.node(name) for name in need.others]
        if not any(other is not None and _may_be_on(other) for other in others):
            line = keys.lines.get(need.key, found[1].line)
            yield Clash(need.key, line, need.others[0], need.why, True, need.others)
    if tool.KEYS == "llamafactory" and setting is not None:
        yield from _sharded(keys, setting)


def _may_be_on(found: tuple[str, Node]) -> bool:
    return is_on(found[1]) or is_filled_in(found[1])


def _sharded(keys: Keys, setting: RunSetting) -> Iterator[Clash]:
    """What LLaMA-Factory refuses where weights are divided (``model_utils/quantization.py``, ``hparams/parser.py``)."""
    strategy = setting.strategy
    if not str(strategy.value).startswith(_WHOLE_WEIGHTS):
        return
    bits, method = setting.quantization, keys.word("quantization_method", default="bnb").value
    zero3 = str(strategy.value).startswith("zero3")
    if bits.value == "int8" and method == "bnb":
        why = f"LLaMA-Factory stops: under {'ZeRO-3' if zero3 else 'FSDP'} it quantizes to 4 bits alone"
        yield Clash(bits.key, bits.line or 1, strategy.key, why, True)
    for name in ("pissa_init", "pure_bf16", "use_unsloth", "predict_with_generate") if zero3 else ():
        found = keys.node(name)
        if found is not None and is_on(found[1]):
            why = "LLaMA-Factory stops: it does not go with ZeRO-3"
            yield Clash(name, keys.lines.get(name, found[1].line), strategy.key, why, True)
