"""Facts about a saved adapter: its folder, its configuration, its tensors, and how they fit a base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pytest_lora.facts.config import Fit
from pytest_lora.facts.saved_tensors import (
    OTHER_WEIGHTS,
    AdaptedModule,
    Key,
    TensorFacts,
    tool_of_files,
    tool_of_keys,
)
from pytest_lora.facts.settings import Settings, is_named

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

_PLAIN_FACTORS = ("", "LORA", "ADALORA", "XLORA")
"""Methods whose tensors PEFT calls ``lora_A`` and ``lora_B`` (``peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING``)."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(?:safetensors|bin)$")
_MERGED = re.compile(r"(?:model|pytorch_model)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)(?:\.index\.json)?")

EntryKind = Literal["file", "folder", "link", "other"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that lies in the folder.

    Attributes:
        name: Its name there.
        kind: What it is; a link that stays in the folder (or in its hub cache) is what it points to.
        bytes: Size, 0 for anything but files.
    """

    name: str
    kind: EntryKind
    bytes: int


@dataclass(frozen=True, slots=True)
class FileFault:
    """Why a file could not be read, or not be trusted.

    Attributes:
        file: Name in the folder.
        kind: ``"link"``, ``"kind"``, ``"denied"``, ``"changed"``, ``"size"``, ``"format"``, ``"pattern"``,
            ``"pointer"`` (of Git LFS) or ``"pickle"`` (under another name).
        observed: What was seen, in words.
    """

    file: str
    kind: Literal["link", "kind", "denied", "changed", "size", "format", "pattern", "pointer", "pickle"]
    observed: str


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """``adapter_config.json``.

    Attributes:
        fields: The names that it sets.
        peft_type: The method, in capitals; ``""`` where it is not said.
        base: ``base_model_name_or_path``, or None where it is null, empty or no text.
        base_class: Class of the base model that ``auto_mapping`` names, or None.
        library: The library of that class, or None.
        settings: The LoRA fields; None where one of them is nothing that LoRA can use, or for other methods.
        problem: Why ``settings`` is None though the method is LoRA, else None.
        unjudged: Fields that are set and change the structure in ways that are not followed here.
        code: Fields that name code to import (``auto_map``).
        tool: The tool other than PEFT that writes such a configuration, or None.
    """

    fields: tuple[str, ...]
    peft_type: str
    base: str | None
    base_class: str | None
    library: str | None
    settings: Settings | None
    problem: str | None
    unjudged: tuple[str, ...]
    code: tuple[str, ...]
    tool: str | None = None


@dataclass(frozen=True)
class CheckpointFacts:
    """A saved adapter.

    Attributes:
        name: Name of the folder.
        entries: What lies in it, at most a few thousand entries.
        config: ``adapter_config.json``; None where it is missing or unreadable.
        weights: Name of the file that the tensors are from, or None.
        pickled: Whether that file is a pickle.
        tensors: What that file holds.
        faults: Files that could not be read.
        adapted: The LoRA tensors by base module.
        tokens: The highest token id that a tokenizer in the folder was given beyond its vocabulary, or None.
        within: Folders in it that hold an adapter of their own, a few of them.
        unread: Bytes of tensors whose values were not read.
        fit: How it fits a base; None where no base is given.
        names_itself: Whether the configuration names the folder itself as the base.
        pickle_differs: Whether ``adapter_model.bin`` beside safetensors holds other numbers; None where there is none
            or it cannot be told.
        is_reference: Whether it lies in the folder of another adapter, and is called as a frozen copy of its start is.
        unmerged: File of a whole model that holds LoRA layers, where nothing else of an adapter is there; or None.
    """

    name: str
    entries: tuple[Entry, ...]
    config: ConfigFile | None
    weights: str | None
    pickled: bool
    tensors: tuple[TensorFacts, ...]
    faults: tuple[FileFault, ...]
    adapted: tuple[AdaptedModule, ...]
    tokens: int | None = None
    within: tuple[str, ...] = ()
    unread: int = 0
    fit: Fit | None = None
    keys: dict[str, Key] = field(default_factory=dict)
    names_itself: bool = False
    pickle_differs: bool | None = None
    is_reference: bool = False
    unmerged: str | None = None

    @property
    def settings(self) -> Settings | None:
        """The LoRA fields of the configuration, or None."""
        return self.config.settings if self.config else None

    @property
    def is_readable(self) -> bool:
        """Whether there are tensors to judge, also none at all in a sound file."""
        return self.weights is not None and not any(f.file == self.weights for f in self.faults)

    @cached_property
    def origin(self) -> str | None:
        """The tool other than PEFT whose format the folder has, or None."""
        if self.config is not None and (self.config.tool or self.config.peft_type):
            return self.config.tool
        files = self.files if self.weights in (None, *OTHER_WEIGHTS) else ()
        return tool_of_keys(t.name for t in self.tensors) or tool_of_files(entry.name for entry in files)

    @property
    def variants(self) -> tuple[str, ...]:
        """Fields of a LoRA of PEFT that change its tensors in ways that are not followed here."""
        return () if self.origin or self.config is None else self.config.unjudged

    @cached_property
    def other_method(self) -> str | None:
        """What made the adapter where it is not PEFT's LoRA, in words; else None."""
        if self.origin:
            return f"an adapter of {self.origin}"
        if self.config is not None and self.config.peft_type not in ("", "LORA"):
            return f"peft_type {self.config.peft_type}"
        if self.variants:
            return f"LoRA with {', '.join(self.variants)}"
        return None

    @property
    def contradicts_method(self) -> bool:
        """Whether the configuration names another method, yet every tensor is a LoRA factor of PEFT."""
        if self.config is None or self.config.peft_type in _PLAIN_FACTORS:
            return False
        parts = {self.key(t).part for t in self.tensors}
        return self.is_readable and parts == {"lora_A", "lora_B"}

    @property
    def is_judged(self) -> bool:
        """Whether keys and shapes can be judged: tensors were read, and PEFT's LoRA made them."""
        return self.is_readable and self.other_method is None

    @cached_property
    def misnamed(self) -> tuple[TensorFacts, ...]:
        """Tensors whose keys PEFT does not recognise for what stands before or in them."""
        if not self.is_judged or (self.fit is not None and self.fit.loads):
            return ()
        keys = self.keys
        dropped = self.fit is not None and self.fit.drops_named
        own = (
            {t.name for t in self.lora} if dropped else set()
        )  # beside its own name a named key is one too many
        return tuple(
            t
            for t in self.lora
            if _is_misnamed(
                keys[t.name], ("",) if dropped and keys[t.name].peft_name not in own else ("", "default")
            )
        )

    @cached_property
    def is_foreign(self) -> bool:
        """Whether not one adapted module exists in the base."""
        if self.fit is None or not self.adapted or self.fit.loads:
            return False
        known = set(self.fit.base.module_names)
        held = [m.name.removesuffix(".base_layer") for m in self.adapted]
        return not any(name in known or f"{name}." in known for name in held)

    @property
    def fits(self) -> Fit | None:
        """The comparison with the base, where there is one worth speaking of in detail."""
        fit = self.fit
        return fit if fit is not None and fit.compared and not fit.loads and not self.is_foreign else None

    def key(self, tensor: TensorFacts) -> Key:
        """The key of a tensor taken apart."""
        return self.keys[tensor.name]

    @cached_property
    def lora_numbers(self) -> int:
        """How many numbers the LoRA factors hold."""
        return sum(tensor.numbers for tensor in self.lora)

    @cached_property
    def plain(self) -> tuple[TensorFacts, ...]:
        """Tensors that are no LoRA factors: heads, tokens, biases, or weights of the base."""
        keys = self.keys
        return tuple([t for t in self.tensors if not keys[t.name].part and ".lora_" not in t.name])

    @cached_property
    def lora(self) -> tuple[TensorFacts, ...]:
        """The LoRA factors and what belongs to them."""
        if not self.plain:
            return self.tensors
        plain = set(map(id, self.plain))
        return tuple(t for t in self.tensors if id(t) not in plain)

    def has(self, name: str) -> bool:
        """Whether something of this name lies in the folder."""
        return any(entry.name == name for entry in self.entries)

    @property
    def files(self) -> Iterator[Entry]:
        """The files of the folder."""
        return (entry for entry in self.entries if entry.kind == "file")

    @property
    def shards(self) -> tuple[str, ...]:
        """Files that hold a part of the adapter each."""
        return tuple(
            e.name for e in self.files if e.name.startswith("adapter_model") and _SHARD.search(e.name)
        )

    @property
    def merged(self) -> tuple[str, ...]:
        """Files that hold a whole model."""
        return tuple(e.name for e in self.files if _MERGED.fullmatch(e.name))

    @property
    def pickles(self) -> tuple[str, ...]:
        """Files that are pickles by their names, the file that was read aside."""
        read = self.weights if self.pickled else None
        return tuple(e.name for e in self.files if e.name.endswith(PICKLE_ENDINGS) and e.name != read)

    @property
    def other_pickle(self) -> Entry | None:
        """``adapter_model.bin`` beside safetensors of which its size says that it holds other tensors, or None."""
        sizes = {entry.name: entry for entry in self.files}
        ours, theirs = sizes.get(WEIGHTS), sizes.get(PICKLED)
        if self.weights != WEIGHTS or not self.is_readable or ours is None or theirs is None:
            return None
        # What each tensor costs besides its numbers: a line of JSON here, an aligned zip entry with a name there.
        spare = 4096 + 1024 * len(self.tensors)
        return theirs if abs(ours.bytes - theirs.bytes) > spare else None

    def holds(self, module: str) -> bool:
        """Whether a plain tensor belongs to a module of this name (its last parts are enough)."""
        return any(_owns(module, self.key(tensor)) for tensor in self.plain)


def _is_misnamed(key: Key, adapters: tuple[str, ...]) -> bool:
    strange = key.wrappers or key.tool_name or key.is_cut or key.adapter not in adapters
    return key.prefixes != 1 or bool(strange)


def _owns(module: str, key: Key) -> bool:
    name = key.module
    while name:
        if is_named(name, module):
            return True
        name = name.rpartition(".")[0]
    return False
