"""The fields of a LoraConfig as plain values, and what its names and patterns mean to PEFT."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

from pytest_lora.patterns import deciding_key, matches

N = TypeVar("N")


def alpha_divisor(rank: int, *, rslora: bool) -> float:
    """What ``lora_alpha`` is divided by: the rank (LoRA, arXiv:2106.09685) or its root (rsLoRA, arXiv:2312.03732)."""
    return float(rank**0.5 if rslora else rank)


def block_of(module: str) -> int | None:
    """The first number in the name of a module, which is that of its block; None where there is none."""
    return next((int(part) for part in module.split(".") if part.isdecimal() and len(part) < 12), None)


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
    layer_replication: tuple[tuple[int, int], ...]

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
        return _decided(self.rank_pattern, module, self.r)

    def alpha_key(self, module: str) -> str | None:
        """The key of ``alpha_pattern`` that decides for this module: the first that matches, as in PEFT."""
        return deciding_key((key for key, _ in self.alpha_pattern), module)

    def alpha_of(self, module: str) -> float:
        """The alpha that this configuration gives a module."""
        return _decided(self.alpha_pattern, module, self.lora_alpha)

    def scaling_of(self, module: str) -> float | None:
        """The scaling that this configuration gives a module; None where the rank is no rank."""
        rank = self.rank_of(module)
        if rank < 1:
            return None
        return self.alpha_of(module) / alpha_divisor(rank, rslora=self.use_rslora)

    @property
    def replicated_blocks(self) -> tuple[int, ...]:
        """The block of the base that each block of the adapted model is made of; empty without layer_replication."""
        return tuple(block for first, end in self.layer_replication for block in range(first, end))

    def without_patterns(self) -> Settings:
        """The settings without what would be matched with names of modules."""
        return replace(
            self,
            target_modules=None,
            exclude_modules=None,
            target_parameters=(),
            modules_to_save=(),
            rank_pattern=(),
            alpha_pattern=(),
            trainable_token_indices=(),
        )

    def targets(self, module: str) -> bool:
        """Whether ``target_modules`` names a module; "all-linear" and None are not for names to decide."""
        return _means(self.target_modules, module)

    def excludes(self, module: str) -> bool:
        """Whether ``exclude_modules`` or ``modules_to_save`` keeps the adapter off a module."""
        return _means(self.exclude_modules, module) or self.saves(module)

    def saves(self, module: str) -> bool:
        """Whether ``modules_to_save`` names a module or one around it."""
        return any(_means(self.modules_to_save, part) for part in _ancestors(module))

    def skips_layer_of(self, module: str) -> bool:
        """Whether ``layers_to_transform`` leaves out the block that a module is in."""
        number = block_of(module)
        return bool(self.layers_to_transform) and number not in self.layers_to_transform


def rewrites_base(init: object) -> bool:
    """Whether this ``init_lora_weights`` takes the adapter out of the base weights, which keep the rest.

    Source: PEFT's ``LoraLayer``, whose ``pissa_init``, ``olora_init``, ``corda_init``, ``loftq_init`` and
    ``lora_ga_init`` write to the weight of the base layer.
    """
    return str(init).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def rewriter(config: object) -> str | None:
    """The field of a ``LoraConfig`` under which PEFT writes to the base weights, as it is set; None where none does.

    Source: besides ``rewrites_base``, PEFT's ``KasaLinearVariant``, which truncates the weight by its rank.
    """
    init = getattr(config, "init_lora_weights", None)
    if rewrites_base(init):
        return f"init_lora_weights={init!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) else None


def _decided(pattern: tuple[tuple[str, N], ...], module: str, otherwise: N) -> N:
    """What the first key that matches decides."""
    if not pattern:
        return otherwise
    key = deciding_key((key for key, _ in pattern), module)
    return otherwise if key is None else dict(pattern)[key]


def is_named(module: str, name: str) -> bool:
    """Whether a name in a LoraConfig list means this module (the rule of PEFT's ``target_modules``)."""
    return module == name or module.endswith(f".{name}")


class Names(tuple[str, ...]):
    """Names in a LoraConfig list; thousands of them are asked about thousands of modules."""

    @cached_property
    def _distinct(self) -> frozenset[str]:
        return frozenset(self)

    def mean(self, module: str) -> bool:
        """Whether one of them means this module, as ``is_named`` says."""
        end: str | None = module
        while end is not None:
            if end in self._distinct:
                return True
            _, dot, rest = end.partition(".")
            end = rest if dot else None
        return False


def _means(names: tuple[str, ...] | str | None, module: str) -> bool:
    if isinstance(names, str):
        return matches(names, module)
    if not names:
        return False
    return (names if isinstance(names, Names) else Names(names)).mean(module)


def _ancestors(module: str) -> Iterator[str]:
    """The module and every module around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _names(value: Any) -> Names:
    return Names((value,) if isinstance(value, str) else sorted(map(str, value or ())))


def _names_or_pattern(value: Any) -> tuple[str, ...] | str | None:
    return value if value is None or isinstance(value, str) else _names(value)


def _saved_names(value: Any) -> Names:
    # PEFT iterates over a bare string, letter by letter.
    return Names(value) if isinstance(value, str) else _names(value)


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
    "layer_replication": lambda value: tuple((int(first), int(end)) for first, end in value or ()),
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
