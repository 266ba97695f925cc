"""Facts about a LoraConfig and what PEFT makes of it on one base."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from pytest_lora.facts.base import BaseFacts


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One base module (or fused parameter) with one adapter on it.

    Attributes:
        module: Full name of the adapted module in the base.
        kind: Class name of the adapted module; ``"Parameter"`` for a fused parameter.
        adapter: Name of the adapter.
        in_features: Logical input size of the base weight.
        out_features: Logical output size.
        kernel: Positions that a convolution kernel covers, else 1.
        experts: Weights stacked in a fused parameter, else 1.
        rank: The rank in effect here, patterns applied.
        alpha: The alpha in effect here, patterns applied.
        scaling: What the low-rank product is multiplied with: ``alpha / rank``, or
            ``alpha / sqrt(rank)`` under rsLoRA, unless somebody changed it since.
        use_rslora: Whether the scaling divides by the square root of the rank.
        use_dora: Whether there is a magnitude vector.
        dropout: Probability of the LoRA dropout.
        parameters: Numbers in the adapter here.
    """

    module: str
    kind: str
    adapter: str
    in_features: int
    out_features: int
    kernel: int
    experts: int
    rank: int
    alpha: float
    scaling: float
    use_rslora: bool
    use_dora: bool
    dropout: float
    parameters: int

    @property
    def leaf(self) -> str:
        """Last part of the module's name."""
        return self.module.rpartition(".")[2]

    @property
    def configured_scaling(self) -> float:
        """The scaling that rank and alpha give (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732)."""
        return self.alpha / self.rank**0.5 if self.use_rslora else self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Settings:
    """The fields of a LoraConfig as plain values, under PEFT's own names; of nested ones, whether they are set."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    target_parameters: tuple[str, ...]
    lora_dropout: float
    bias: str
    use_rslora: bool
    use_dora: bool
    modules_to_save: tuple[str, ...]
    init_lora_weights: bool | str
    layers_to_transform: tuple[int, ...]
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    task_type: str | None
    inference_mode: bool
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...]
    ensure_weight_tying: bool
    alora_invocation_tokens: tuple[int, ...] | None
    eva_config: bool
    corda_config: bool
    lora_ga_config: bool
    loftq_config: bool
    use_qalora: bool
    lora_bias: bool
    kasa_config: bool

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Read a LoraConfig; fields that an older PEFT does not have get their neutral value.

        Raises:
            ValueError: A field holds something that PEFT could not use either; the message names it.
        """
        return cls(**{f.name: _read(config, f.name) for f in fields(cls)})

    def rank_key(self, module: str) -> str | None:
        """The key of ``rank_pattern`` that decides for this module: the first that matches, as in PEFT."""
        return deciding_key((key for key, _ in self.rank_pattern), module)

    def rank_of(self, module: str) -> int:
        """The rank that this configuration gives a module."""
        key = self.rank_key(module)
        return self.r if key is None else dict(self.rank_pattern)[key]

    def alpha_key(self, module: str) -> str | None:
        """The key of ``alpha_pattern`` that decides for this module: the first that matches, as in PEFT."""
        return deciding_key((key for key, _ in self.alpha_pattern), module)

    def alpha_of(self, module: str) -> float:
        """The alpha that this configuration gives a module."""
        key = self.alpha_key(module)
        return self.lora_alpha if key is None else dict(self.alpha_pattern)[key]

    def scaling_of(self, module: str) -> float | None:
        """The scaling that this configuration gives a module; None where the rank is no rank."""
        rank = self.rank_of(module)
        if rank < 1:
            return None
        return self.alpha_of(module) / (rank**0.5 if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether ``target_modules`` names a module; "all-linear" and None are not for names to decide."""
        return _means(self.target_modules, module)

    def excludes(self, module: str) -> bool:
        """Whether ``exclude_modules`` or ``modules_to_save`` keeps the adapter off a module."""
        return _means(self.exclude_modules, module) or self.saves(module)

    def saves(self, module: str) -> bool:
        """Whether ``modules_to_save`` names a module or one around it."""
        return any(is_named(part, name) for name in self.modules_to_save for part in _ancestors(module))

    def skips_layer_of(self, module: str) -> bool:
        """Whether ``layers_to_transform`` leaves out the block that a module is in."""
        number = next((int(part) for part in module.split(".") if part.isdigit()), None)
        return bool(self.layers_to_transform) and number not in self.layers_to_transform


def rewrites_base(init: object) -> bool:
    """Whether this ``init_lora_weights`` takes the adapter out of the base weights, which keep the rest.

    Source: PEFT's ``LoraLayer``, whose ``pissa_init``, ``olora_init``, ``corda_init``, ``loftq_init`` and
    ``lora_ga_init`` write to the weight of the base layer.
    """
    return str(init).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def deciding_key(keys: Iterable[str], module: str) -> str | None:
    """The first key of a rank or alpha pattern that matches a module (``peft.utils.get_pattern_key``)."""
    for key in keys:
        pattern = compiled(rf"(.*\.)?({key})$")
        if pattern is not None and pattern.match(module):
            return key
    return None


@cache
def compiled(pattern: str) -> re.Pattern[str] | None:
    """A regular expression of a configuration; None where it is none, and so can match nothing."""
    try:
        return re.compile(pattern)
    except re.error:
        return None


def is_named(module: str, name: str) -> bool:
    """Whether a name in a LoraConfig list means this module (the rule of PEFT's ``target_modules``)."""
    return module == name or module.endswith(f".{name}")


def _means(names: tuple[str, ...] | str | None, module: str) -> bool:
    if isinstance(names, str):
        pattern = compiled(names)
        return pattern is not None and pattern.fullmatch(module) is not None
    return any(is_named(module, name) for name in names or ())


def _ancestors(module: str) -> Iterator[str]:
    """The module and every module around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(sorted(map(str, value or ())))


def _names_or_pattern(value: Any) -> tuple[str, ...] | str | None:
    return value if value is None or isinstance(value, str) else _names(value)


def _saved_names(value: Any) -> tuple[str, ...]:
    # PEFT iterates over a bare string, letter by letter.
    return tuple(value) if isinstance(value, str) else _names(value)


def _indices(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value or ())


def _pattern_of(number: Callable[[Any], Any]) -> Callable[[Any], tuple[tuple[str, Any], ...]]:
    return lambda value: tuple((str(key), number(found)) for key, found in (value or {}).items())


def _word(value: Any) -> str | None:
    return str(value.value) if isinstance(value, enum.Enum) else None if value is None else str(value)


def _tokens(value: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    by_module = value if isinstance(value, dict) else {"": value} if value else {}
    return tuple((module, tuple(indices)) for module, indices in by_module.items())


def _initialisation(value: Any) -> bool | str:
    return value if isinstance(value, (bool, str)) else True


_READ: dict[str, Callable[[Any], Any]] = {
    "r": int,
    "lora_alpha": float,
    "target_modules": _names_or_pattern,
    "exclude_modules": _names_or_pattern,
    "target_parameters": _names,
    "lora_dropout": lambda value: float(value or 0.0),
    "bias": lambda value: str(value or "none"),
    "use_rslora": bool,
    "use_dora": bool,
    "modules_to_save": _saved_names,
    "init_lora_weights": _initialisation,
    "layers_to_transform": _indices,
    "rank_pattern": _pattern_of(int),
    "alpha_pattern": _pattern_of(float),
    "task_type": _word,
    "inference_mode": bool,
    "trainable_token_indices": _tokens,
    "ensure_weight_tying": bool,
    "alora_invocation_tokens": lambda value: None if value is None else tuple(value),
    "eva_config": bool,
    "corda_config": bool,
    "lora_ga_config": bool,
    "loftq_config": bool,
    "use_qalora": bool,
    "lora_bias": bool,
    "kasa_config": bool,
}


def _read(config: Any, field: str) -> Any:
    value = getattr(config, field, None)
    if hasattr(config, "init_r"):
        # AdaLoRA begins with init_r on every module; its rank_pattern notes what it has pruned since.
        value = {"r": config.init_r, "rank_pattern": None}.get(field, value)
    try:
        return _READ[field](value)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"config: {field}={value!r} is nothing that LoRA can use: {error}") from error


@dataclass(frozen=True, slots=True)
class NameMatch:
    """What one name of a LoraConfig list matches in the base.

    Attributes:
        field: Field of the LoraConfig (``"target_modules"``, ``"modules_to_save"``, ...).
        name: The name as written.
        modules: Modules of the base that it names.
        similar: Names in the base that were perhaps meant.
    """

    field: str
    name: str
    modules: tuple[str, ...]
    similar: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PatternKey:
    """What one key of ``rank_pattern`` or ``alpha_pattern`` decides.

    Attributes:
        field: ``"rank_pattern"`` or ``"alpha_pattern"``.
        key: The key as written.
        value: Its rank or alpha.
        decides: Adapted modules that take their value from this key.
        shadowed_by: An earlier key that takes all modules which this one would match, or None.
        elsewhere: Modules of the base that it matches but that are not adapted.
    """

    field: str
    key: str
    value: float
    decides: tuple[str, ...]
    shadowed_by: str | None
    elsewhere: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """PEFT's own error where it stops at the configuration.

    Attributes:
        error: Class of the exception.
        message: Its words.
        modules: Modules of the base that they are about, where that can be told.
        exclusion: What to set ``exclude_modules`` to, under which PEFT takes the rest; None where there is no such.
    """

    error: str
    message: str
    modules: tuple[str, ...] = ()
    exclusion: tuple[str, ...] | str | None = None


@dataclass(frozen=True, slots=True)
class ConfigFacts:
    """A LoraConfig on a base.

    Attributes:
        adapter: Name of the adapter.
        settings: The fields as written; on a live model, as PEFT left them.
        base: The base model.
        layers: Modules that get an adapter, in order; empty where PEFT refuses before it has made them.
        names: What each name in the lists of the configuration matches.
        patterns: What each key of the two patterns decides.
        saved_modules: Modules that are trained in full and saved beside the adapter.
        token_modules: Modules with single trainable rows.
        refusal: PEFT's error while it makes or initialises the adapter, or None.
        live: Whether this was read from a model that already carries the adapter.
        merge_refusal: What PEFT raises when these adapters are merged, or None.
        stored: Embeddings whose whole weights a saved adapter holds, whatever its configuration says.
    """

    adapter: str
    settings: Settings
    base: BaseFacts
    layers: tuple[LayerFacts, ...]
    names: tuple[NameMatch, ...]
    patterns: tuple[PatternKey, ...]
    saved_modules: tuple[str, ...]
    token_modules: tuple[str, ...]
    refusal: Refusal | None
    live: bool
    merge_refusal: Refusal | None = None
    stored: tuple[str, ...] = ()

    def unmatched(self, field: str) -> Iterator[NameMatch]:
        """Names of one field that match nothing."""
        return (match for match in self.names if match.field == field and not match.modules)

    def names_of(self, field: str) -> tuple[str, ...]:
        """The names in one list of the configuration that PEFT did not rewrite."""
        return tuple(match.name for match in self.names if match.field == field)

    def modules_of(self, name: str) -> tuple[str, ...]:
        """Modules of the base that a target name means."""
        return next((m.modules for m in self.names if (m.field, m.name) == ("target_modules", name)), ())

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the adapted modules."""
        return frozenset(layer.module for layer in self.layers)

    def keeps(self, module: str) -> bool:
        """Whether a module is trained in full and saved, itself or as a part of another."""
        return any(module == saved or module.startswith(f"{saved}.") for saved in self.saved_modules)

    @property
    def trainable_parameters(self) -> int:
        """Logical numbers that it trains: the adapters, and the modules saved in full."""
        saved = sum(m.in_features * m.out_features for m in self.base.modules if self.keeps(m.name))
        return saved + sum(layer.parameters for layer in self.layers)

    def trained_rows(self, embedding: str) -> frozenset[int] | None:
        """Rows of an embedding that are trained one by one; None where there are none."""
        if embedding not in self.token_modules:
            return None
        leaf = embedding.rpartition(".")[2]
        rows = [r for module, r in self.settings.trainable_token_indices if module in ("", leaf, embedding)]
        every = rows or [r for _, r in self.settings.trainable_token_indices]
        return frozenset(row for group in every for row in group)

    def would_adapt(self, meant: Settings) -> frozenset[str] | None:
        """Modules that another configuration would adapt on this base; None where PEFT chooses them."""
        if meant.target_modules is None:
            return None
        everything = str(meant.target_modules).lower() == "all-linear"
        heads = {self.base.output_embeddings, *(head.name for head in self.base.heads)}
        return frozenset(
            m.name
            for m in self.base.modules
            if (m.is_linear and m.name not in heads if everything else meant.targets(m.name))
            and not meant.excludes(m.name)
            and not meant.skips_layer_of(m.name)
        )
