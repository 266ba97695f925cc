"""A recipe, or the arguments of a training script, as facts.

Which tool it is for, what nothing in it is read by, and the setting of the run it describes.

The file and those beside it that it names are read and never executed; nothing outside its folder is read.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import require_config
from pytest_lora.facts.recipe import GIVEN, BaseModel, RecipeFacts, RunSetting, SavedAdapter, Value
from pytest_lora.facts.recipe_lines import Flaw
from pytest_lora.files import start_of
from pytest_lora.inspection.recipe import axolotl, home_made, llamafactory, ms_swift, trl
from pytest_lora.inspection.recipe.beside import OFFLOADED, Tree, fsdp_version, fsdp_version_of_arguments
from pytest_lora.inspection.recipe.clashes import clashes
from pytest_lora.inspection.recipe.keys import Keys, resolved
from pytest_lora.inspection.recipe.schema import no_choices, reads_more, unknown_keys, wrong_kinds
from pytest_lora.inspection.recipe.yaml_file import MAX_BYTES, BrokenError, YamlFile, read_yaml
from pytest_lora.values import shown

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

TOOLS = (axolotl, llamafactory, ms_swift, trl)
"""In the order in which they are asked; each knows its recipes by keys that no other has."""

SUFFIXES = (".yaml", ".yml", ".json")

MOST_UNKNOWN = 60
"""Keys that nothing reads which are looked up among those that there are, at some milliseconds each: more than a rule
tells of."""

_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
"""Fields in which two bases agree that can carry one adapter."""

_LIKELY = re.compile(
    rb"\b(lora_r|lora_rank|lora_alpha|finetuning_type|use_peft|tuner_type|adapter:\s*q?lora)\b"
)

_STAGES = {"SFTConfig": "sft", "DPOConfig": "dpo", "KTOConfig": "kto"}


def recipe_facts(path: Path, base: str | None = None) -> RecipeFacts:
    """Read a recipe; what is no YAML is a flaw, and what is no LoRA training is left alone.

    Args:
        path: The file.
        base: Name or path of the base, where the recipe's own is not to be taken.
    """
    try:
        file = read_yaml(start_of(path, MAX_BYTES))
    except OSError as error:
        return RecipeFacts(path.name, flaw=Flaw("unreadable", 1, str(error.strerror or error)))
    except BrokenError as error:
        return RecipeFacts(path.name, flaw=error.flaw)
    if file.root.pairs is None:
        return RecipeFacts(path.name, left_alone="it is no mapping of keys")
    found = recognised(file)
    if found is None:
        return RecipeFacts(path.name, left_alone="it is no recipe of a tool that is known")
    tool, keys = found
    reason = tool.left_alone(keys)
    if reason:
        return RecipeFacts(path.name, tool=tool.NAME, left_alone=reason)
    return _facts(path, file, tool, keys, base)


def recognised(file: YamlFile) -> tuple[ModuleType, Keys] | None:
    """The tool that a file is a recipe of, and its keys as that tool sees them."""
    plain = Keys(file.root, "")
    tool = next((tool for tool in TOOLS if tool.is_mine(plain)), None)
    if tool is None or (tool is trl and reads_more(plain)):
        flat = home_made.flattened(resolved(file.root))
        if home_made.is_mine(flat):
            return home_made, flat
    if tool is None:
        return None
    return tool, Keys(resolved(file.root) if tool is llamafactory else file.root, tool.NAME)


def is_likely(path: Path) -> bool:
    """Whether a file that may be no YAML speaks of LoRA in the words of a recipe."""
    try:
        return _LIKELY.search(start_of(path, MAX_BYTES)) is not None
    except OSError:
        return False


def _facts(path: Path, file: YamlFile, tool: ModuleType, keys: Keys, base: str | None) -> RecipeFacts:
    tree = Tree(path.parent)
    setting: RunSetting = tool.setting(keys, tree)
    named = base or setting.base.value
    continued = setting.continues.value
    return RecipeFacts(
        name=path.name,
        tool=tool.NAME,
        repeated=tuple(file.repeated),
        unknown=tuple(islice(unknown_keys(keys, tool, file), MOST_UNKNOWN)),
        wrong=(*wrong_kinds(file, tool), *no_choices(keys, tool)),
        clashes=tuple(clashes(keys, tool, setting)),
        setting=setting,
        base=None if named is None else base_model(str(named)),
        base_is_adapter=tree.adapter(setting.base.value),
        continued=_continued(tree, continued, named),
        listed=_listed(keys, tool),
        conversational=_conversations(keys, tree, tool),
    )


def _continued(tree: Tree, folder: object, base: object) -> SavedAdapter | None:
    """The adapter folder that training goes on from, compared with the base as far as the shapes of both are known."""
    from pytest_lora.inspection.public_bases import find_shape

    found = tree.adapter(folder)
    if found is None or not isinstance(found.base, str) or not isinstance(base, str):
        return found
    own, other = find_shape(base), find_shape(found.base)
    if own is None or other is None:
        return found
    return replace(found, same_shape=all(own.text(field) == other.text(field) for field in _SIZES))


def base_model(name: str) -> BaseModel | None:
    """What the data of public models says of a base; None where it is not among them."""
    from pytest_lora.inspection.public_bases import find_shape

    shape = find_shape(name)
    if shape is None:
        return None
    length = shape.text("max_position_embeddings")
    return BaseModel(
        shape.name, shape.config.get("dtype"), shape.parameters, length if isinstance(length, int) else None
    )


def _listed(keys: Keys, tool: ModuleType) -> tuple[str, ...]:
    """Modules that a recipe of Axolotl lists beside ``lora_target_linear``, which are united with all linear ones."""
    if tool is not axolotl or not keys.says("lora_target_linear"):
        return ()
    names = keys.names("lora_target_modules").value
    return names if isinstance(names, tuple) else ()


def _conversations(keys: Keys, tree: Tree, tool: ModuleType) -> str | None:
    """The first data file beside a recipe of TRL that holds conversations."""
    if tool is not trl:
        return None
    names = [keys.word("dataset_name").value]
    found = keys.node("datasets")
    for one in (found[1].items or ()) if found else ():
        data = (one.pairs or {}).get("data_files") or (one.pairs or {}).get("path")
        names.extend(
            [data.written]
            if data is not None and data.items is None
            else [i.written for i in data.items or ()]
            if data
            else []
        )
    return next((name for name in names if name and tree.holds_conversations(name)), None)


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
    objective = next((stage for kind, stage in _STAGES.items() if _is(args, kind)), None)
    tool = "Trainer" if objective is None else "TRL"
    known = base_model(base) if isinstance(base, str) else None
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else None
    setting = RunSetting(
        tool=tool,
        base=Value(base if isinstance(base, str) else type(base).__name__, GIVEN, "base"),
        adapter=Value("lora", GIVEN, "config"),
        quantization=Value(quantization, GIVEN, "quantization"),
        dtype=Value(None, "the dtype of the base", "dtype"),
        precision=given.value("fp16" if args.fp16 else "bf16", precision),
        objective=Value(objective, GIVEN, name),
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
