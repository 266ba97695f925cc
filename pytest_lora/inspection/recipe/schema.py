"""What the tool of a recipe does not take: unknown keys, and values of another kind."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from types import ModuleType
from typing import Any

from pytest_lora.facts.recipe_lines import UnknownKey, UnknownKind, WrongKind
from pytest_lora.inspection.recipe.keys import Keys, is_filled_in, is_on
from pytest_lora.inspection.recipe.yaml_file import Node, YamlFile

_OF_FULL = "under tuner_type: full alone"
DROPPED: dict[str, dict[str, str]] = {
    "axolotl": {"lora_exclude_modules": ""},
    "ms-swift": dict.fromkeys(
        (
            "trainable_parameters",
            "trainable_parameters_regex",
            "freeze_parameters",
            "freeze_parameters_regex",
        ),
        _OF_FULL,
    ),
}
"""Keys that the schema does not let through to the code that reads them, or that it reads elsewhere alone, and where.

Source: Axolotl's ``utils/schemas``; ms-swift's ``pipelines/train/tuner.py`` (``TunerMixin.prepare_model``).
"""

OWN_KEYS = 4
"""From so many keys on that TRL never had, a recipe is one of a script that reads more than TRL does: recipes of such
scripts have five and more, and nobody misspells as many."""

OF_SCRIPTS = ("dataset_prompt_column", "system_prompt")
"""Keys of scripts that build on TRL's parser, open-r1's above all (``configs.py``, ``GRPOScriptArguments``)."""

SWITCHES = frozenset(["use_lora", "use_qlora", "use_peft"])
"""Keys of one's own that are near a field of LoRA and mean another thing."""

LAUNCHED = {"trl": ("accelerate_config",)}
"""Keys that the tool's launcher takes before anything else sees them (``trl/cli/accelerate_config.py``)."""

UNHEEDED = {"llamafactory": ("gradient_checkpointing",)}
"""Keys that are taken and change nothing where they are false, as another key decides."""

NUMBERS = frozenset(
    ["learning_rate", "lr", "lora_alpha", "r", "lora_r", "lora_rank", "lora_dropout", "warmup_ratio", "weight_decay",
     "num_train_epochs", "num_epochs", "max_steps", "warmup_steps", "micro_batch_size", "per_device_train_batch_size",
     "gradient_accumulation_steps", "sequence_len", "cutoff_len", "max_length", "max_seq_length", "max_grad_norm",
     "adam_beta1", "adam_beta2", "adam_epsilon", "adam_eps", "logging_steps", "save_steps", "eval_steps", "val_size",
     "val_set_size", "loraplus_lr_ratio", "neftune_noise_alpha", "pref_beta", "beta", "rl_beta"]
)  # fmt: skip
"""Keys that take a number in every tool that has them."""

WORDS = frozenset(
    [
        "eval_strategy",
        "save_strategy",
        "evaluation_strategy",
        "logging_strategy",
        "report_to",
        "lr_scheduler_type",
    ]
)
"""Keys that take a word, of which ``no`` is one."""

PATHS = frozenset(
    ["base_model", "model_name_or_path", "model", "model_name", "model_id", "adapter_name_or_path", "adapters",
     "lora_model_dir", "resume_from_checkpoint", "dataset_dir", "deepspeed", "train_file", "dataset_name",
     "pretrained_model_name_or_path", "model_path", "data_files", "data_path", "dataset_prepared_path", "dataset",
     "path", "tokenizer_name_or_path", "name"]
)  # fmt: skip
"""Keys that take a path from which something is read."""

FIELDS = (
    "target_modules", "lora_alpha", "lora_dropout", "lora_target_modules", "modules_to_save", "use_rslora", "use_dora",
    "learning_rate", "gradient_checkpointing", "gradient_accumulation_steps", "load_in_4bit", "load_in_8bit",
)  # fmt: skip
"""Names that no script of its own would call nearly the same and mean something else."""

_TEXT_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
OWN_PLUGINS = {"pytest_lora.runs.axolotl": ("lora_health",)}
"""Keys that this package's own plugins bring."""

_QUOTED = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")

_COMMA = re.compile(r"[-+]?\d+,\d+([eE][-+]?\d+)?")


@cache
def known_keys() -> dict[str, Any]:
    """What each tool's keys are: ``version``, ``keys``, ``removed``, ``renamed``, ``choices``, ``plugins``."""
    text = (files("pytest_lora.inspection.recipe") / "known_keys.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return {tool: {**one, "keys": frozenset(one["keys"])} for tool, one in found.items()}


def unknown_keys(keys: Keys, tool: ModuleType, file: YamlFile) -> Iterator[UnknownKey]:
    """Keys at the top that the tool does not have, and those of blocks where it reads none."""
    known = known_keys().get(tool.KEYS)
    if known is None:
        yield from _misspelt(keys, file)
        return
    plugins = _plugin_keys(keys, known)
    if plugins is None:
        return  # a plugin that is not known may bring any key
    for name, node, line in keys.numbered():
        if name in UNHEEDED.get(tool.KEYS, ()) and node.value is False:
            yield UnknownKey(name, line, _text(file, line, name), "dropped", None, "", False)
        dropped = DROPPED.get(tool.KEYS, {}).get(name)
        if dropped and is_on(node):
            yield UnknownKey(name, line, _text(file, line, name), "dropped", None, dropped, False)
        if (
            name in known["keys"]
            or name in LAUNCHED.get(tool.KEYS, ())
            or name in plugins
            or name.startswith(("_", "x-", "."))
        ):
            continue
        if node.written == "" and node.items is None and node.pairs is None:
            continue  # left empty, it asks for nothing
        yield _unknown(name, node, line, _text(file, line, name), known, tool)


def reads_more(keys: Keys) -> bool:
    """Whether what reads a recipe for TRL reads many keys that TRL never had."""
    if keys.has(*OF_SCRIPTS):
        return True
    known = known_keys()["trl"]
    every = known["keys"] | known["renamed"].keys() | known["removed"].keys() | set(LAUNCHED["trl"])
    foreign = [name for name, node, _ in keys.numbered() if name not in every and node.pairs is None]
    return len(foreign) >= OWN_KEYS


def _text(file: YamlFile, line: int, name: str) -> str:
    return file.lines[line - 1].strip() if 0 < line <= len(file.lines) else name


def _misspelt(keys: Keys, file: YamlFile) -> Iterator[UnknownKey]:
    """Keys of a recipe of one's own that are nearly a field of LoRA that it does not have."""
    for name, _, line in keys.numbered():
        near = difflib.get_close_matches(name, FIELDS, cutoff=0.88)
        if name not in (*FIELDS, *SWITCHES) and near and not keys.has(near[0]):
            yield UnknownKey(name, line, _text(file, line, name), "unknown", near[0], "", False)


def _unknown(
    name: str, node: Node, line: int, text: str, known: dict[str, Any], tool: ModuleType
) -> UnknownKey:
    meant, since = known["renamed"].get(name), known["removed"].get(name, "")
    if name in DROPPED.get(tool.KEYS, {}):
        return UnknownKey(name, line, text, "dropped", None, "", False)
    kind: UnknownKind = "renamed" if meant else "removed" if since else "block" if node.pairs else "unknown"
    if meant is None and not since:
        near = difflib.get_close_matches(name, known["keys"], cutoff=0.8)
        meant = near[0] if near else None
    # With a command of its own TRL passes unknown keys to accelerate, which stops; its scripts drop them.
    return UnknownKey(name, line, text, kind, meant, since, tool.STOPS_AT_UNKNOWN)


def _plugin_keys(keys: Keys, known: dict[str, Any]) -> frozenset[str] | None:
    found: set[str] = set()
    every = {**known.get("plugins", {}), **OWN_PLUGINS}
    plugins = keys.names("plugins").value if keys.has("plugins") else ()
    for plugin in (plugins,) if isinstance(plugins, str) else plugins or ():
        home = plugin.rpartition(".")[0]
        brought = next((own for name, own in every.items() if home.startswith(name)), None)
        if brought is None:
            return None
        found.update(brought)
    return frozenset(found)


def wrong_kinds(file: YamlFile, tool: ModuleType) -> Iterator[WrongKind]:
    """Values anywhere in the file that are not of the kind that their key takes."""
    waiting = [file.root]
    seen: set[int] = set()
    own = tool.KEYS == "" and not _reads_floats(file.root)
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        waiting.extend(node.items or ())
        for name, value in (node.pairs or {}).items():
            waiting.append(value)
            line = node.lines.get(name, value.line)
            listed = value.items or () if name in PATHS else ()
            for one in (value, *listed):
                found = _wrong(name, one, line if one is value else one.line or line, tool, own)
                if found is not None:
                    yield found


def _reads_floats(root: Node) -> bool:
    """Whether a file is for a loader that makes numbers of text: it names classes to be made, or other values.

    NeMo Automodel (``_target_``; ``translate_value`` of its ``config/loader.py``), torchtune (``_component_``) and
    Hydra, which read YAML by OmegaConf, and litgpt (``class_path``), by jsonargparse.
    """
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        pairs = node.pairs or {}
        if not pairs.keys().isdisjoint(("_target_", "_component_", "class_path")):
            return True
        waiting.extend((*(node.items or ()), *pairs.values()))
    return False


def _wrong(name: str, node: Node, line: int, tool: ModuleType, own: bool) -> WrongKind | None:
    text = node.written
    if name in NUMBERS and isinstance(node.value, str):
        if node.plain and _TEXT_NUMBER.fullmatch(text) and own:
            mended = _with_dot(text)
            became = f"the text {text!r}: YAML 1.1 reads a float only with a dot"
            return WrongKind(name, line, text, became, "a number", mended, True)
        if own and not node.plain and _QUOTED.fullmatch(text):
            return WrongKind(name, line, text, f"the text {text!r}: it is quoted", "a number", text, True)
        if _COMMA.fullmatch(text):
            return WrongKind(
                name, line, text, f"the text {text!r}", "a number with a dot", text.replace(",", "."), True
            )
    if name in WORDS and isinstance(node.value, bool) and text.lower() in ("no", "off", "yes", "on"):
        became = f"the bool {str(node.value).lower()}: YAML 1.1 reads a bare {text} so"
        return WrongKind(name, line, text, became, "a word", f'"{text}"', tool.KEYS != "axolotl")
    if name in PATHS and isinstance(node.value, str) and text.startswith("~"):
        became = f"the path {text!r} as it stands: nobody expands ~"
        return WrongKind(
            name,
            line,
            text,
            became,
            "an absolute path, or one relative to where the run starts",
            f"/home/USER{text[1:]}",
            True,
        )
    return None


JUDGED_APART = frozenset(["quantization_method", "quant_method", "finetuning_type", "bnb_4bit_compute_dtype"])
"""Keys whose words other rules judge, or that tools also take in other spellings."""

_NEAR = 0.5
"""How alike a word has to be to the one that is proposed (``difflib``'s ratio): ``bf16`` and ``bfloat16`` are 0.67."""


def no_choices(keys: Keys, tool: ModuleType) -> Iterator[WrongKind]:
    """Words at the top that are none of those that the tool takes for their key."""
    choices = known_keys().get(tool.KEYS, {}).get("choices", {})
    for name, node, line in keys.numbered():
        words = choices.get(name)
        text = node.written
        if words is None or name in JUDGED_APART or not isinstance(node.value, str) or text in words:
            continue
        if is_filled_in(node):
            continue
        near = difflib.get_close_matches(text.lower(), words, n=1, cutoff=_NEAR)
        became = f"none of the words that {tool.NAME} takes"
        wanted = f"one of {', '.join(words)}"
        yield WrongKind(name, line, text, became, wanted, near[0] if near else "", tool.CHECKS_WORDS)


def _with_dot(text: str) -> str:
    mantissa, exponent = re.split("[eE]", text)
    return (
        f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"
        if exponent[0] in "+-"
        else f"{float(text):g}"
    )
