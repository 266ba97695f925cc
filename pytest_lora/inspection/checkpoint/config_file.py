"""``adapter_config.json`` as facts, and as a LoraConfig for a dry run; nothing that it names is imported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pytest_lora.facts.checkpoint import ConfigFile
from pytest_lora.facts.settings import Settings
from pytest_lora.inspection.checkpoint.header import shown

if TYPE_CHECKING:
    from peft import LoraConfig

MAX_CONFIG = 2 * 2**20
"""Bytes of the file. Ten thousand target modules under their full names need about half of it."""

DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "init_lora_weights": True}
"""What PEFT takes where the file is silent (``peft.LoraConfig``) and silence is not zero."""

OTHER_TOOLS = {"fine_tune_type": "mlx-lm", "lora_parameters": "mlx-lm", "model_class": "AdapterHub"}
"""Fields of other tools that call their configuration ``adapter_config.json`` as well."""

UNJUDGED = (
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Fields that change which tensors there are, or import code that they name, and are not followed here."""

MAX_NUMBER = 2**31


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


def _whole(value: Any) -> bool:
    return _number(value) and isinstance(value, int)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _truth(value: Any) -> bool:
    return isinstance(value, bool) or value in (0, 1)


def _all(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(kind(item) for item in value)


def _texts(value: Any) -> bool:
    return _all(value, _text)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _text_or_texts(value: Any) -> bool:
    return _text(value) or _texts(value)


def _wholes(value: Any) -> bool:
    return _whole(value) or _all(value, _whole)


def _ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(_whole(number) and number > 0 for number in value.values())


def _alphas(value: Any) -> bool:
    return isinstance(value, dict) and all(_number(number) for number in value.values())


def _rows(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_all(rows, _whole) for rows in value.values())
    return _all(value, _whole)


KINDS: dict[str, tuple[Any, str]] = {
    "r": (lambda value: _whole(value) and value > 0, "a whole number above 0"),
    "lora_alpha": (_number, "a number"),
    "target_modules": (_text_or_texts, "names or a pattern"),
    "exclude_modules": (_text_or_texts, "names or a pattern"),
    "target_parameters": (_texts, "a list of names"),
    "lora_dropout": (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "use_rslora": (_truth, "true or false"),
    "use_dora": (_truth, "true or false"),
    "lora_bias": (_truth, "true or false"),
    "fan_in_fan_out": (_truth, "true or false"),
    "modules_to_save": (_texts, "a list of names"),
    "init_lora_weights": (lambda value: _truth(value) or _text(value), "true, false or a name"),
    "layers_to_transform": (_wholes, "whole numbers"),
    "layers_pattern": (_text_or_texts, "names"),
    "rank_pattern": (_ranks, "an object of whole numbers above 0"),
    "alpha_pattern": (_alphas, "an object of numbers"),
    "task_type": (_text, "a name"),
    "trainable_token_indices": (_rows, "rows, or an object of rows"),
    "ensure_weight_tying": (_truth, "true or false"),
}
"""The fields that are judged: what each may hold, besides null, and how to say so."""

NEVER_NULL = ("r", "lora_alpha", "lora_dropout", "bias", "rank_pattern", "alpha_pattern")
"""Fields that PEFT computes with: it raises where the file says null, and takes a default where they are missing."""

OBJECTS = ("eva_config", "corda_config", "lora_ga_config")
"""Fields of initialisations, which PEFT makes its own classes of."""


def config_file(raw: dict[str, Any], pattern_problem: str | None) -> ConfigFile:
    """Read the fields; ``pattern_problem`` says why its patterns must not be tried, if so."""
    method = str(raw.get("peft_type") or "")[:40].upper()
    tool = next((tool for name, tool in OTHER_TOOLS.items() if name in raw and not method), None)
    is_lora = method in ("", "LORA") and tool is None
    problem = (_problem(raw) or pattern_problem) if is_lora else None
    mapping = raw.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    return ConfigFile(
        fields=tuple(
            name
            for name, value in raw.items()
            if (value is not None or name in NEVER_NULL) and len(name) < 200
        ),
        peft_type=method,
        base=_name(raw.get("base_model_name_or_path")),
        base_class=_name(mapping.get("base_model_class")),
        library=_name(mapping.get("parent_library")),
        settings=_settings(raw) if is_lora and problem is None else None,
        problem=problem,
        tool=tool,
        unjudged=tuple(name for name in UNJUDGED if raw.get(name)) if is_lora else (),
        code=tuple(
            name for name in ("auto_map", "megatron_core") if raw.get(name) and _names_code(raw, name)
        ),
    )


def lora_config(raw: dict[str, Any]) -> LoraConfig:
    """A LoraConfig with the fields that decide which tensors there are, for a dry run.

    An initialisation that computes with weights is left out: it only sets values, and some kinds ask for libraries.

    Raises:
        Exception: Whatever PEFT raises at fields that contradict each other.
    """
    from peft import LoraConfig

    from pytest_lora.inspection.rehearsal import READ_WEIGHTS

    fields = {name: raw[name] for name in KINDS if raw.get(name) is not None}
    if str(raw.get("init_lora_weights")).lower().startswith(READ_WEIGHTS):
        del fields["init_lora_weights"]
    known = set(LoraConfig.__dataclass_fields__)
    return LoraConfig(**{name: value for name, value in fields.items() if name in known})


def _names_code(raw: dict[str, Any], field: str) -> bool:
    return field != "megatron_core" or bool(raw.get("megatron_config"))


def _problem(raw: dict[str, Any]) -> str | None:
    method = raw.get("peft_type")
    if method not in (None, "LORA"):
        return f"peft_type is {_short(method)}, not 'LORA', as PEFT spells it"
    for field, (fits, wanted) in {**KINDS, **dict.fromkeys(OBJECTS, (_object, "an object"))}.items():
        value = raw.get(field)
        if value is None and field in raw and field in NEVER_NULL:
            return f"{field} is null, on which PEFT raises, not {wanted}"
        if value is not None and not fits(value):
            return (
                f"{field} is {shown(str(value)) if isinstance(value, str) else _short(value)}, not {wanted}"
            )
    return None


def _settings(raw: dict[str, Any]) -> Settings:
    given = {name: raw[name] for name in KINDS if raw.get(name) is not None}
    return Settings.of(SimpleNamespace(**{**DEFAULTS, **given}))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _name(value: Any) -> str | None:
    return value.strip()[:300] or None if isinstance(value, str) else None
