"""Public base models by name: their shapes as data, never their weights, never a download."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.values import in_short, require_path, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TUNED = frozenset(
    ("instruct", "chat", "it", "pt", "base", "hf", "thinking", "reasoning", "preview", "deduped")
)
"""Words of a name that say how a model was trained on, or that it is in the format of transformers."""

_STORED = frozenset(
    [
        "bnb",
        "4bit",
        "8bit",
        "unsloth",
        "dynamic",
        "awq",
        "gptq",
        "int4",
        "int8",
        "fp8",
        "fp16",
        "bf16",
        "nf4",
        "quantized",
        "gguf",
        "128k",
        "4k",
        "8k",
        "16k",
        "32k",
        "1m",
    ]
)
"""Words that say how weights are stored, or for how long a context."""

_DATED = re.compile(r"\d{4}|\d{6}|v\d+(\.\d+)?")
"""A date as in ``2507``, or a version as in ``v0.1``."""

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What a repository on the Hugging Face hub may be called: an owner and a name, or a name alone."""

declared: dict[str, Path] = {}
"""Bases that the user has named, as in ini ``lora_bases``: a name to a model folder or ``config.json``."""


@dataclass(frozen=True)
class Shape:
    """The shape of a public model.

    Attributes:
        name: Its name on the Hugging Face hub.
        config: Fields of its ``config.json`` that say its shape, ``model_type`` and ``dtype`` among them.
        parameters: Logical parameters that it was published with.
    """

    name: str
    config: Mapping[str, Any]
    parameters: int

    def text(self, field: str) -> Any:
        """A field of the language model, which in models of several modalities has a part of its own."""
        text = self.config.get("text_config")
        return self.config.get(field) if text is None else text.get(field, self.config.get(field))


@cache
def shapes() -> dict[str, Shape]:
    """Every shape by its public name."""
    text = (files("pytest_lora.bases") / "shapes.json").read_text(encoding="utf-8")
    return {name: Shape(name, one["config"], one["parameters"]) for name, one in json.loads(text).items()}


@cache
def _index() -> dict[str, str]:
    """The public name of each spelling; the first model that a spelling fits has it."""
    text = (files("pytest_lora.bases") / "shapes.json").read_text(encoding="utf-8")
    spelled: dict[str, str] = {}
    names = [(name, [name, *one.get("also", ())]) for name, one in json.loads(text).items()]
    for name, known in names:
        for one in known:
            spelled.setdefault(_plain(one), name)
    for name, known in names:
        for one in known:
            for spelling in list(_spellings(one))[:-1]:  # of another date it may be another architecture
                spelled.setdefault(spelling, name)
    return spelled


def _plain(name: str) -> str:
    return name.rpartition("/")[2].lower().replace("_", "-")


def _spellings(name: str) -> Iterator[str]:
    """A name without its owner, then without what says nothing about the shape, then without its date."""
    words = _plain(name).removeprefix("meta-").split("-")
    yield "-".join(words)
    words = [word for word in words if word not in _STORED]
    yield "-".join(words)
    bare = [word for word in words if word not in _TUNED]
    yield "-".join(bare)
    undated = [word for word in bare[:2] if word] + [word for word in bare[2:] if not _DATED.fullmatch(word)]
    yield "-".join(undated)


def find_shape(name: str) -> Shape | None:
    """The shape of a public model, by its name or that of a copy of it; None where it is not known.

    The owner does not matter, nor does what says nothing of the shape: ``-Instruct``, ``-Chat``, ``-bnb-4bit``, a date.
    """
    index = _index()
    found = index.get(_plain(name)) or next((index[one] for one in _spellings(name) if one in index), None)
    return None if found is None else shapes()[found]


def is_name(base: object) -> bool:
    """Whether a base is given as a name: a text in the form of one, at which there is no file or folder."""
    return (
        isinstance(base, str)
        and _NAME.fullmatch(base) is not None
        and not require_path("base", base).exists()
    )


def config_by_name(name: str) -> PretrainedConfig:
    """The configuration of a base that is given by its name; nothing is fetched.

    Looked for among the bases that the user has named, the shapes that come with the package, and the models in the
    local cache of the Hugging Face hub.

    Raises:
        ValueError: It is in none of these, or the installed transformers does not know its architecture.
    """
    from transformers import AutoConfig

    if (path := declared.get(name)) is not None:
        return read_config(path)
    shape = find_shape(name)
    if shape is None:
        cached = _cached(name)
        if cached is None:
            raise ValueError(_unknown(name))
        return read_config(cached)
    fields = dict(shape.config)
    try:
        config: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (ValueError, KeyError, ImportError) as error:
        raise ValueError(f"base: the installed transformers cannot describe {shape.name}: {error}") from error
    return config


def _cached(name: str) -> Path | None:
    """The ``config.json`` of a model in the local cache of the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(_plain(name[:80]), _index(), n=1, cutoff=0.8)
    meant = f" (did you mean {_index()[near[0]]}?)" if near else ""
    return (
        f"base: {shown(name)} does not exist here and is no public model that is known{meant}; give a model folder, "
        f"a config.json or a live model, or say where it is in ini: lora_bases = {in_short(name)} = PATH"
    )


def with_other_classes(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a configuration once for each class of a task that transformers loads it into, as its architecture."""
    import transformers

    autos = (getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModelFor"))
    known = (auto._model_mapping.get(type(config), None) for auto in autos)
    kinds = (one for kinds in known if kinds for one in (kinds if isinstance(kinds, tuple) else (kinds,)))
    for made in dict.fromkeys(kinds):
        other = copy.deepcopy(config)
        other.architectures = [made.__name__]
        yield other


def read_config(path: Path) -> PretrainedConfig:
    """Read a ``config.json`` (or the one in a folder) from disk; nothing is fetched or executed."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"base: {in_short(file)} does not exist; give a model folder, a config.json, a live model, or the name "
            "of a public model"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(file),
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # classes of configurations raise many kinds at values that are none
        if _brings_code(file):
            raise ValueError(
                f"base: {file} is of a model with code of its own (auto_map), which is never run here; build the model "
                "yourself, with trust_remote_code where you trust it, and give it as a live model (the meta device is "
                "enough: with torch.device('meta'))"
            ) from error
        raise ValueError(
            f"base: {in_short(file)} is not a configuration that transformers can read: {in_short(error)}"
        ) from error
    return config


def _brings_code(file: Path) -> bool:
    """Whether a ``config.json`` says that its classes lie beside it."""
    try:
        return "auto_map" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
