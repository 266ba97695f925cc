"""Keys of a recipe that its tool does not take beside each other, as the checks of the tools' own parsers say."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from pytest_lora.facts.recipe_lines import Clash
from pytest_lora.inspection.recipe.keys import Keys, is_filled_in
from pytest_lora.inspection.recipe.yaml_file import Node


class _Pair(NamedTuple):
    """Keys that do not go together: the first is the one to remove."""

    key: str
    other: str
    why: str
    stops: bool = True


_PRECISION = "transformers stops: at most one of fp16 and bf16 can be true"
_BITS = "at most one of load_in_4bit and load_in_8bit can be true"
_KERNELS = "Axolotl stops: its LoRA kernels do not go with code of the checkpoint's own"

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

_OFF = ("", "false", "no", "off", "0", "0.0", "none", "auto")
"""Values, in lower case, that leave a key without effect; ``auto`` gives way to what is stated."""


def clashes(keys: Keys, tool: ModuleType) -> Iterator[Clash]:
    """Pairs of keys that are both there and on."""
    for pair in PAIRS.get(tool.KEYS, ()):
        found, other = keys.node(pair.key), keys.node(pair.other)
        if found is None or other is None or not _is_on(found[1]) or not _is_on(other[1]):
            continue
        line = keys.lines.get(pair.key, found[1].line)
        yield Clash(pair.key, line, pair.other, pair.why, pair.stops)


def _is_on(node: Node) -> bool:
    if node.items is not None or node.pairs is not None:
        return bool(node.items or node.pairs)
    return not is_filled_in(node) and node.written.strip().lower() not in _OFF
