"""A saved adapter as facts. Folders come from anywhere: nothing is unpickled unless asked for, nothing in them is
imported or executed, no link out of them is followed, nothing is fetched, and time and memory are bounded."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.arguments import hub_hint
from pytest_lora.facts.checkpoint import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    CheckpointFacts,
    ConfigFile,
    Entry,
    FileFault,
)
from pytest_lora.facts.saved_tensors import OTHER_WEIGHTS, PREFIX, AdaptedModule, Key, TensorFacts, target_of
from pytest_lora.inspection.checkpoint.config_file import MAX_CONFIG, config_file
from pytest_lora.inspection.checkpoint.folder import Folder, UnreadableError, read_object
from pytest_lora.inspection.checkpoint.header import read_header
from pytest_lora.inspection.checkpoint.values import read_values
from pytest_lora.inspection.limited.patterns import unmatchable
from pytest_lora.values import require_path, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_lora.inspection.checkpoint.fit import Base

TOKENIZER = ("added_tokens.json", "tokenizer_config.json")
REFERENCES = ("ref", "reference")
"""Names of the frozen copy of a policy's start, which PEFT saves in the folder of the policy: TRL's trainers for DPO,
KTO, GRPO and RLOO add ``ref`` to a ``PeftModel``; TRL's guide to DPO with two adapters says ``reference``."""

_WHOLE = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors")
_ID = re.compile(r"[0-9]{1,11}")


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder that a user means by a path: a folder, or a file in it.

    Raises:
        TypeError: ``path`` is no path.
        ValueError: There is nothing of this name.
    """
    place = require_path("path", path)
    if place.is_dir():
        return place
    if os.path.lexists(place):
        return place.parent
    raise ValueError(
        f"path: {shown(str(place))} does not exist{hub_hint(str(path)) or '; adapters are never downloaded'}"
    )


def checkpoint_facts(path: Path, base: Base | None = None, *, read_pickle: bool = False) -> CheckpointFacts:
    """Look at an adapter folder; what cannot be read becomes a fault in the facts.

    Args:
        path: The folder.
        base: The base to compare it with.
        read_pickle: Whether ``adapter_model.bin`` is read, of which nothing is built but names and shapes.
    """
    if base is None:  # nothing is built, and torch is not imported
        return _facts(path, None, read_pickle)
    from pytest_lora.inspection.state import leaves_no_trace

    return leaves_no_trace(_facts)(path, base, read_pickle)


def _facts(path: Path, base: Base | None, read_pickle: bool) -> CheckpointFacts:
    reading = _Reading(Folder(path))
    entries = reading.listing()
    raw = reading.config()
    weights = _weights_file(reading.folder, entries, has_config=raw is not None)
    pickled = weights is None and read_pickle and reading.folder.exists(PICKLED)
    if pickled:
        weights = PICKLED
        reading.unpickle()
    elif weights is not None:
        reading.safetensors(weights)
    own_module = _has_own_module(reading.tensors, raw, base)
    keys = {tensor.name: Key.of(tensor.name, own_module) for tensor in reading.tensors}
    if base is not None and raw is not None:
        base = base.meant_by(raw, reading.tensors, keys)
    config = reading.judge_patterns(raw, keys, base)
    facts = CheckpointFacts(
        name=path.name or str(path),
        entries=entries,
        config=config,
        weights=weights,
        pickled=pickled,
        tensors=reading.tensors,
        faults=tuple(reading.faults),
        adapted=tuple(_adapted(reading.tensors, keys, config)),
        tokens=reading.tokens(),
        within=() if raw else tuple(_adapters_within(reading.folder, entries)),
        unread=reading.unread,
        keys=keys,
        names_itself=config is not None and _is_folder(config.base, reading.folder),
        pickle_differs=_pickle_differs(reading.folder, weights),
        is_reference=_is_reference(reading.folder.real),
        unmerged=reading.unmerged(entries) if raw is None and weights is None else None,
    )
    if base is None or raw is None or config is None or config.settings is None or not facts.is_judged:
        return facts
    return replace(facts, fit=base.fit(raw, facts.tensors, keys))


def public_base(path: Path) -> Base | None:
    """The base that a folder names itself, where that is a public model whose shape is known and can be built."""
    from pytest_lora.inspection.public_bases import find_shape, is_name

    reading = _Reading(Folder(path))
    raw = reading.config() or {}
    name = raw.get("base_model_name_or_path")
    if not isinstance(name, str) or find_shape(name) is None:
        return None
    from pytest_lora.inspection.checkpoint.fit import Base

    try:
        return Base(name, may_be_extended=True) if is_name(name) else None
    except ValueError:  # also of a name that the system cannot look at
        return None


@dataclass
class _Reading:
    """One pass over a folder, which goes on after a fault."""

    folder: Folder
    faults: list[FileFault] = field(default_factory=list)
    tensors: tuple[TensorFacts, ...] = ()
    unread: int = 0

    def listing(self) -> tuple[Entry, ...]:
        try:
            return self.folder.entries()
        except UnreadableError as error:
            self.faults.append(error.fault)
            return ()

    def config(self) -> dict[str, Any] | None:
        if not self.folder.exists(CONFIG):
            return None
        return self._object(CONFIG)

    def safetensors(self, name: str) -> None:
        try:
            with self.folder.opened(name) as (file, size):
                stored = read_header(file, size, name)
                values, self.unread = read_values(file, stored, name)
        except UnreadableError as error:
            self.faults.append(error.fault)
            return
        self.tensors = tuple(TensorFacts(t.name, t.dtype, t.shape, values.get(t.name)) for t in stored)

    def unmerged(self, entries: tuple[Entry, ...]) -> str | None:
        """The file of a whole model, or the first of its shards, where there are LoRA layers among its tensors."""
        name = next((e.name for e in entries if e.kind == "file" and _WHOLE.fullmatch(e.name)), None)
        if name is None:
            return None
        try:
            with self.folder.opened(name) as (file, size):
                stored = read_header(file, size, name)
        except UnreadableError:  # it is no part of an adapter
            return None
        parts = {Key.of(tensor.name, False).part for tensor in stored}
        return name if {"lora_A", "lora_B"} <= parts else None

    def unpickle(self) -> None:
        from pytest_lora.inspection.checkpoint.pickled import read_pickled

        try:
            self.tensors, self.unread = read_pickled(self.folder, PICKLED)
        except UnreadableError as error:
            self.faults.append(error.fault)

    def judge_patterns(
        self, raw: dict[str, Any] | None, keys: dict[str, Key], base: Base | None
    ) -> ConfigFile | None:
        if raw is None:
            return None
        names = {key.module for key in keys.values()}
        if base is not None:
            names.update(base.facts.module_names)
        why = unmatchable(raw, names)
        if why is not None:
            self.faults.append(FileFault(CONFIG, "pattern", why))
        return config_file(raw, why)

    def tokens(self) -> int | None:
        """The highest id among the tokens that were added to the tokenizer in the folder."""
        highest = None
        for name in TOKENIZER:
            if not self.folder.exists(name):
                continue
            found = self._object(name) or {}
            ids: Iterable[Any] = found.values()
            if name == "tokenizer_config.json":
                decoder = found.get("added_tokens_decoder")
                ids = map(_id, decoder) if isinstance(decoder, dict) else ()
            for number in ids:
                if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31:
                    highest = max(number, highest or 0)
        return highest

    def _object(self, name: str) -> dict[str, Any] | None:
        try:
            return read_object(self.folder, name, MAX_CONFIG)
        except UnreadableError as error:
            self.faults.append(error.fault)
            return None


def _pickle_differs(folder: Folder, weights: str | None) -> bool | None:
    if weights != WEIGHTS or not folder.exists(PICKLED):
        return None
    from pytest_lora.inspection.checkpoint.pickled import holds_other_numbers

    return holds_other_numbers(folder, WEIGHTS, PICKLED)


def _is_folder(name: str | None, folder: Folder) -> bool:
    """Whether a name is the absolute path of a folder, by its text: what it leads to is not looked at."""
    if name is None or not os.path.isabs(name):
        return False
    return Path(os.path.normpath(name)) in (folder.real, Path(os.path.abspath(folder.path)))


def _is_reference(folder: Path) -> bool:
    """Whether a folder is called like a reference and lies in that of an adapter, of which nothing is read."""
    return folder.name in REFERENCES and os.path.lexists(folder.parent / CONFIG)


def _id(text: str) -> int | None:
    return int(text) if _ID.fullmatch(text) else None


def _has_own_module(tensors: tuple[TensorFacts, ...], raw: dict[str, Any] | None, base: Base | None) -> bool:
    """Whether the base has a part called ``module``, which is no wrapper's: it says so, or a part of the keys does."""
    if base is not None:
        return "module" in base.facts.module_names
    inside = [t.name.startswith(f"{PREFIX}module.") for t in tensors if t.name.startswith(PREFIX)]
    targets = (raw or {}).get("target_modules")
    named = [name for name in targets if isinstance(name, str)] if isinstance(targets, list) else []
    return (any(inside) and not all(inside)) or any(name.startswith("module.") for name in named)


def _adapters_within(folder: Folder, entries: tuple[Entry, ...], limit: int = 3) -> Iterable[str]:
    """The first folders in a folder that hold an adapter: PEFT saves one with a name of its own in its own folder."""
    inside = (entry.name for entry in entries if entry.kind == "folder")
    return islice((name for name in inside if folder.exists(f"{name}/{CONFIG}")), limit)


def _weights_file(folder: Folder, entries: tuple[Entry, ...], *, has_config: bool) -> str | None:
    """The safetensors file to read: PEFT's, or that of another tool where there is no configuration of PEFT."""
    if folder.exists(WEIGHTS):
        return WEIGHTS
    if has_config:
        return None
    known = next((name for name in OTHER_WEIGHTS if folder.exists(name)), None)
    if known is not None:
        return known
    # kohya-ss leaves the name to its user, and writes nothing beside the file.
    alone = [entry.name for entry in entries if entry.kind == "file" and entry.name.endswith(".safetensors")]
    return alone[0] if len(alone) == 1 and not alone[0].startswith(("model", "adapter_model")) else None


def _adapted(
    tensors: tuple[TensorFacts, ...], keys: dict[str, Key], config: ConfigFile | None
) -> Iterable[AdaptedModule]:
    parts: dict[str, dict[str, TensorFacts]] = {}
    for tensor in tensors:
        key = keys[tensor.name]
        # The bias of a factor is none of them.
        if key.part and not key.peft_name.endswith(".bias"):
            parts.setdefault(key.module, {})[key.part.removeprefix("lora_").removeprefix("embedding_")] = (
                tensor
            )
    settings = config.settings if config else None
    for module, held in parts.items():
        rank = settings.rank_of(target_of(module)) if settings else None
        yield AdaptedModule(module, held.get("A"), held.get("B"), held.get("magnitude_vector"), rank)
