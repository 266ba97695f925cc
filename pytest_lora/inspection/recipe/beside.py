"""Files that a recipe names, read beside it: never outside its tree, never executed, bounded in size."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pytest_lora.facts.recipe import SavedAdapter, Value
from pytest_lora.files import start_of
from pytest_lora.inspection.recipe.keys import Keys
from pytest_lora.inspection.recipe.yaml_file import MAX_BYTES, BrokenError, read_yaml

_CONFIG = "adapter_config.json"


MOST_MODULES = 100_000
"""Layers times experts of a model that lies beside a recipe; the largest that are public have some 50,000."""

_COUNT = re.compile(r"^(?!.*(size|dim|width|token|_id)).*(layer|expert|block|depth|stage)")


class Tree:
    """The folder of a recipe, out of which nothing is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.real = folder.resolve()

    def find(self, name: object) -> Path | None:
        """A file or folder of the tree by the path that a recipe gives; None where there is none in it."""
        if (
            not isinstance(name, str)
            or not name
            or len(name) > 1000
            or "\0" in name
            or Path(name).is_absolute()
        ):
            return None
        try:
            place = (self.real / name).resolve()
            return place if place.is_relative_to(self.real) and place.exists() else None
        except (OSError, RuntimeError):
            return None

    def read(self, name: object) -> bytes | None:
        """The start of a file of the tree; None where it cannot be read."""
        place = self.find(name)
        if place is None:
            return None
        try:
            return start_of(place, MAX_BYTES)[:MAX_BYTES]
        except OSError:
            return None

    def mapping(self, name: object) -> dict[str, Any]:
        """A JSON or YAML file of the tree as a mapping; empty where it is none."""
        data = self.read(name)
        if data is None:
            return {}
        try:
            found = json.loads(data) if str(name).endswith(".json") else read_yaml(data).root.unwrapped()
        except (ValueError, RecursionError, BrokenError):
            return {}
        return found if isinstance(found, dict) else {}

    def adapter(self, name: object) -> SavedAdapter | None:
        """The adapter folder of this name; None where it is none."""
        place = self.find(name)
        if place is None or not place.is_dir():
            return None
        if not (place / _CONFIG).is_file() or (place / "config.json").is_file():
            return None
        config = self.mapping(f"{name}/{_CONFIG}")
        return SavedAdapter(
            path=str(name),
            r=_of_kind(config, "r", int),
            base=_of_kind(config, "base_model_name_or_path", str),
            kind=_of_kind(config, "peft_type", str),
            alpha=_of_kind(config, "lora_alpha", int, float),
            targets=_named(config.get("target_modules")),
            saved=_named(config.get("modules_to_save")) or (),
            use_rslora=_of_kind(config, "use_rslora", bool),
            use_dora=_of_kind(config, "use_dora", bool),
        )

    def base(self, name: object) -> Path | None:
        """The model folder of this name; None where it is none, or one whose structure would take long to build."""
        place = self.find(name)
        if place is None or not (place / "config.json").is_file():
            return None
        config = self.mapping(f"{name}/config.json")
        counts = sorted(_counts(config), reverse=True)
        return place if config and prod(counts[:2]) <= MOST_MODULES else None

    def holds_conversations(self, name: object) -> bool:
        """Whether the first rows of a data file are conversations with turns of a user."""
        data = self.read(name)
        if data is None:
            return False
        for line in data.splitlines()[:2]:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            turns = row.get("messages") if isinstance(row, dict) else None
            if isinstance(turns, list) and any(
                isinstance(t, dict) and t.get("role") == "user" for t in turns
            ):
                return True
        return False


def _of_kind(config: dict[str, Any], field: str, *kinds: type) -> Any:
    """A field where it has one of these types; None elsewhere."""
    value = config.get(field)
    return value if type(value) in kinds else None


def _named(value: object) -> tuple[str, ...] | str | None:
    """Names of modules in a fixed order, or an expression."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(sorted(value))
    return value if isinstance(value, str) else None


def _counts(config: dict[str, Any]) -> Iterator[int]:
    """The numbers of parts that a model's configuration asks for, also within its parts; 1 for the whole."""
    yield 1
    waiting: list[Any] = [config]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting.extend(one.values())
            for key, value in one.items():
                if _COUNT.search(str(key)) and type(value) is int:
                    yield value
                elif _COUNT.search(str(key)) and isinstance(value, list):
                    yield len(value)
        elif isinstance(one, list):
            waiting.extend(part for part in one if isinstance(part, dict))


def zero_stage(config: dict[str, Any]) -> int | None:
    """The ZeRO stage of a DeepSpeed configuration."""
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    return stage if isinstance(stage, int) and not isinstance(stage, bool) else None


def deepspeed_strategy(deepspeed: Value, tree: Tree) -> Value:
    """The strategy that a recipe's DeepSpeed configuration sets: its ZeRO stage, else what its name says."""
    config = tree.mapping(deepspeed.value)
    stage = zero_stage(config)
    if stage is None:
        return replace(deepspeed, value=strategy_by_name(deepspeed.value))
    zero = config["zero_optimization"]
    moved = stage == 3 and on_host(zero, "offload_param")
    return replace(deepspeed, value=f"zero{stage}{OFFLOADED if moved else ''}")


OFFLOADED = "_offload"
"""Behind a strategy whose weights lie in the host's memory."""


def on_host(zero: Mapping[str, Any], part: str) -> bool:
    """Whether ``offload_param`` or ``offload_optimizer`` of a DeepSpeed configuration moves it to the host."""
    given = zero.get(part)
    return isinstance(given, Mapping) and str(given.get("device", "none")).lower() in ("cpu", "nvme")


FSDP_OF_ACCELERATE = 1
"""``fsdp_version`` where nothing says it (``accelerate.FullyShardedDataParallelPlugin``); Axolotl has the same
(``AxolotlInputConfig``: FSDP2 is what ``fsdp_version: 2`` asks for)."""


def fsdp_strategy(
    keys: Keys, *names: str, tree: Tree | None = None, version: int | None = None
) -> Value | None:
    """FSDP, as the first of these keys of a recipe says; None where it has none of them.

    Args:
        keys: The recipe.
        names: Keys that say it.
        tree: Where the file lies that ``fsdp_config`` may name.
        version: Version that the tool takes where the recipe says none; None for that of ``TrainingArguments``.
    """
    name = next((name for name in names if keys.has(name)), None)
    if name is None:
        return None
    plain = {key: keys.pairs[key].unwrapped() for key in _FSDP_KEYS if keys.has(key)}
    if tree is not None and isinstance(plain.get("fsdp_config"), str):
        plain["fsdp_config"] = tree.mapping(plain["fsdp_config"]) or plain["fsdp_config"]
    moved = any(_offloads(key, value) for key, value in plain.items())
    kind = fsdp_version(plain) or version or fsdp_version_of_arguments()
    return keys.decided(name, f"fsdp{kind}{OFFLOADED if moved else ''}")


def strategy_of_arguments(keys: Keys, tree: Tree) -> Value:
    """How the GPUs share the run where the keys are those of ``TrainingArguments``."""
    deepspeed = keys.word("deepspeed")
    if deepspeed.value:
        return deepspeed_strategy(deepspeed, tree)
    sharded = fsdp_strategy(keys, "fsdp", "fsdp_config", tree=tree)
    return keys.default("ddp", "deepspeed") if sharded is None else sharded


_FSDP_KEYS = ("fsdp", "fsdp_config", "fsdp_version", "fsdp_offload_params", "fsdp_cpu_offload")


def fsdp_version(said: Mapping[str, Any]) -> int | None:
    """1 or 2, as FSDP arguments say it, by themselves or in their ``fsdp_config``; None where they do not."""
    inner = said.get("fsdp_config")
    for part in (said, inner if isinstance(inner, Mapping) else {}):
        for name in ("fsdp_version", "version"):
            if str(part.get(name, "")) in ("1", "2"):
                return int(part[name])
    # ms-swift knows a configuration by the name fsdp2 (swift/config/fsdp2.json).
    return 2 if "fsdp2" in str(said.get("fsdp", "")).lower() else None


_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""What ``TrainingArguments`` sets in the environment meanwhile."""


@lru_cache(maxsize=1)
def fsdp_version_of_arguments() -> int:
    """The version that ``TrainingArguments`` of the installed transformers takes where nothing says it."""
    from transformers import TrainingArguments

    ask: Any = getattr(TrainingArguments, "_process_fsdp_args", None)
    unset = type("Unset", (SimpleNamespace,), {"__getattr__": lambda self, name: False})
    before = os.environ.get(_LOADING)
    try:
        said = ask(unset(fsdp=True, fsdp_config={}))
    except (
        Exception
    ):  # no public function: it may want anything; where it is not there, nothing says a version
        return FSDP_OF_ACCELERATE
    finally:
        os.environ.pop(_LOADING, None)
        if before is not None:
            os.environ[_LOADING] = before
    return int(said.get("fsdp_version", FSDP_OF_ACCELERATE))


def _offloads(name: str, value: Any) -> bool:
    """Whether FSDP arguments move weights to the host: a true key with that word, or the word among options."""
    if isinstance(value, Mapping):
        return any(_offloads(str(key), part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return any(_offloads(name, part) for part in value)
    text = str(value).lower()
    return "offload" in text or ("offload" in name and text in ("true", "1", "yes"))


def strategy_of_accelerate(config: dict[str, Any]) -> str | None:
    """How an accelerate configuration divides a model among GPUs."""
    kind = str(config.get("distributed_type", "")).upper()
    if kind == "FSDP":
        part = config.get("fsdp_config")
        said = part if isinstance(part, dict) else {}
        version = fsdp_version(said) or FSDP_OF_ACCELERATE
        return f"fsdp{version}{OFFLOADED if said.get('fsdp_offload_params') else ''}"
    if kind == "DEEPSPEED":
        part = config.get("deepspeed_config")
        said = part if isinstance(part, dict) else {}
        stage = said.get("zero_stage")
        moved = stage == 3 and said.get("offload_param_device") in ("cpu", "nvme")
        return f"zero{stage}{OFFLOADED if moved else ''}" if stage in (0, 1, 2, 3) else None
    return "ddp" if kind == "MULTI_GPU" else None


def strategy_by_name(name: object) -> str | None:
    """The strategy that a name such as ``zero3``, ``zero2_offload`` or ``fsdp2`` says."""
    text = str(name).lower().replace("_", "").replace("-", "")
    moved = OFFLOADED if "offload" in text else ""
    for stage in "3210":
        if f"zero{stage}" in text or f"z{stage}" in text:
            return f"zero{stage}{moved if stage == '3' else ''}"
    version = 2 if "fsdp2" in text or "fsdpv2" in text else FSDP_OF_ACCELERATE
    return f"fsdp{version}{moved}" if "fsdp" in text else None
