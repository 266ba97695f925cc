"""An adapter as a server meets it, made from the facts about a saved adapter or about a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pytest_lora.facts.checkpoint import PICKLED, CheckpointFacts
from pytest_lora.facts.config import ConfigFacts
from pytest_lora.facts.saved_tensors import AdaptedModule
from pytest_lora.facts.servers import Feature
from pytest_lora.facts.settings import Settings, rewrites_base

Kind = Literal["linear", "embedding", "convolution", "experts"]

HEADS = ("classifier", "score")
"""Names of the heads that vLLM takes along (``vllm/lora/utils.py``)."""

_LAYER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")
_VISION = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|image_encoder)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)$")
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class ServedModule:
    """An adapted module, with the rank and alpha that PEFT uses there."""

    name: str
    kind: Kind
    rank: int
    alpha: float

    @property
    def leaf(self) -> str:
        """Last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """Number of the transformer block that it is in, or None."""
        found = _LAYER.search(f".{self.name}.")
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """What servers treat differently.

    Attributes:
        name: Name of the folder, or ``"LoraConfig"``.
        settings: The LoRA fields; None where the adapter is of another tool.
        modules: The adapted modules.
        features: What it has that not every server knows, and where: names of modules, keys or fields.
        tool: The tool other than PEFT whose format it is in, or None.
        lacking: What a folder of mlx-lm lacks of what that loads.
        saved: Whether this is a file, not a configuration yet to be trained.
    """

    name: str
    settings: Settings | None
    modules: tuple[ServedModule, ...] = ()
    features: dict[Feature, tuple[str, ...]] = field(default_factory=dict)
    tool: str | None = None
    lacking: tuple[str, ...] = ()
    saved: bool = True

    @property
    def highest_rank(self) -> int:
        """The rank that a server has to make space for; 0 where it is not known."""
        ranks = [module.rank for module in self.modules]
        configured = [self.settings.r, *dict(self.settings.rank_pattern).values()] if self.settings else []
        return max(ranks or configured, default=0)


def served_checkpoint(facts: CheckpointFacts) -> ServedAdapter | None:
    """A saved adapter; None where there is nothing of LoRA to judge."""
    if facts.origin == "mlx-lm":
        return ServedAdapter(facts.name, None, tool="mlx-lm", lacking=tuple(_lacking(facts)))
    settings = facts.settings
    has_weights = facts.weights is not None or facts.has(PICKLED)
    if settings is None or facts.config is None or facts.origin or not has_weights:
        return None
    modules = tuple(_saved_modules(facts, settings))
    plain = tuple((facts.key(tensor).module, tensor.name) for tensor in facts.plain)
    tied = facts.fit.base.tied if facts.fit else ()
    found = dict(_features(settings, modules, tied))
    found |= _of_files(facts, settings, plain)
    if facts.config.unjudged:
        found["structure"] = facts.config.unjudged
    return ServedAdapter(facts.name, settings, modules, found)


def served_config(facts: ConfigFacts) -> ServedAdapter:
    """A configuration on a base, before anything is trained."""
    settings = facts.settings
    modules = tuple(
        ServedModule(layer.module, _kind(layer.kind, layer.kernel), layer.rank, layer.alpha)
        for layer in facts.layers
    )
    found = dict(_features(settings, modules, facts.base.tied))
    layers = len(facts.base.layer_indices)
    if layers and (partial := _in_part(modules, layers)):
        found["layers_in_part"] = partial
    return ServedAdapter("LoraConfig", settings, modules, found, saved=False)


def padded(rank: int) -> int:
    """The rank that Punica's kernels are given (``lorax_server/utils/punica.py``: 8, or a multiple of 16)."""
    return 8 if rank <= 8 else -(-rank // _BLOCK) * _BLOCK


def _features(
    settings: Settings, modules: tuple[ServedModule, ...], tied: Iterable[tuple[str, ...]]
) -> Iterator[tuple[Feature, tuple[str, ...]]]:
    """What the configuration says, and what the adapted modules are."""
    heads = tuple(name for name in settings.modules_to_save if name in HEADS)
    others = tuple(name for name in settings.modules_to_save if name not in HEADS)
    whole = tuple(name for name in others if _EMBEDDING.search(name))
    kinds = {kind: tuple(m.name for m in modules if m.kind == kind) for kind in ("embedding", "convolution")}
    experts = tuple(m.name for m in modules if m.kind == "experts") or settings.target_parameters
    shared = {name for group in tied for name in group}
    seen: dict[Feature, tuple[str, ...]] = {
        "dora": ("use_dora",) if settings.use_dora else (),
        "bias": (f"bias={settings.bias!r}",) if settings.bias != "none" else (),
        "lora_bias": ("lora_bias",) if settings.lora_bias else (),
        "task_head": heads,
        "saved_modules": tuple(name for name in others if name not in whole),
        "whole_embeddings": whole,
        "token_rows": ("trainable_token_indices",) if settings.trainable_token_indices else (),
        "rslora": ("use_rslora",) if settings.use_rslora else (),
        "rank_pattern": tuple(m.name for m in modules if m.rank != settings.r),
        "alpha_pattern": tuple(m.name for m in modules if m.alpha != settings.lora_alpha),
        "ranks_by_layer": _ranks_by_layer(modules),
        "padded_rank": _padded_ranks(modules),
        "target_pattern": _pattern(settings),
        "embedding": kinds["embedding"],
        "head": tuple(m.name for m in modules if m.leaf == "lm_head"),
        "tied_head": tuple(m.name for m in modules if m.leaf == "lm_head" and m.name in shared),
        "experts": experts,
        "convolution": kinds["convolution"],
        "vision": tuple(m.name for m in modules if _VISION.search(m.name)),
        "attention_in_part": _attention_in_part(modules),
        "unconverted_init": (str(settings.init_lora_weights),)
        if rewrites_base(settings.init_lora_weights)
        else (),
        "alora": ("alora_invocation_tokens",) if settings.alora_invocation_tokens else (),
    }
    return ((feature, where) for feature, where in seen.items() if where)


def _of_files(
    facts: CheckpointFacts, settings: Settings, plain: tuple[tuple[str, str], ...]
) -> dict[Feature, tuple[str, ...]]:
    """What only the file shows."""
    keys = [facts.key(tensor) for tensor in facts.lora]
    whole = tuple(module for module, name in plain if name.endswith(".weight") and _EMBEDDING.search(module))
    found: dict[Feature, tuple[str, ...]] = {
        "dora": tuple(key.module for key in keys if key.part == "lora_magnitude_vector"),
        "lora_bias": tuple(key.module for key in keys if key.peft_name.endswith(".bias")),
        "whole_embeddings": tuple(name for name in whole if name not in settings.modules_to_save),
        "no_prefix": tuple(t.name for t, key in zip(facts.lora, keys, strict=True) if not key.prefixes),
        "adapter_in_keys": tuple(t.name for t, key in zip(facts.lora, keys, strict=True) if key.adapter),
        "layers_in_part": _in_part_of_the_file(facts, settings),
        "pickle": (PICKLED,) if facts.pickled or (facts.weights is None and facts.has(PICKLED)) else (),
    }
    return {feature: where for feature, where in found.items() if where}


def _in_part_of_the_file(facts: CheckpointFacts, settings: Settings) -> tuple[str, ...]:
    modules = tuple(_saved_modules(facts, settings))
    if settings.layers_to_transform and facts.fit is None:
        return tuple(dict.fromkeys(module.leaf for module in modules))
    known = len(facts.fit.base.layer_indices) if facts.fit else 0
    return _in_part(modules, known or len({m.layer for m in modules} - {None}))


def _in_part(modules: tuple[ServedModule, ...], layers: int) -> tuple[str, ...]:
    """Targets that fewer layers have than there are."""
    by_leaf: dict[str, set[int]] = {}
    for module in modules:
        if module.layer is not None:
            by_leaf.setdefault(module.leaf, set()).add(module.layer)
    return tuple(leaf for leaf, found in by_leaf.items() if len(found) < layers)


def _attention_in_part(modules: tuple[ServedModule, ...]) -> tuple[str, ...]:
    """Layers that adapt one of q, k and v, but not both q and v."""
    by_parent: dict[str, set[str]] = {}
    for module in modules:
        if module.leaf in ("q_proj", "k_proj", "v_proj"):
            by_parent.setdefault(module.name.rpartition(".")[0], set()).add(module.leaf)
    return tuple(parent for parent, found in by_parent.items() if not {"q_proj", "v_proj"} <= found)


def _ranks_by_layer(modules: tuple[ServedModule, ...]) -> tuple[str, ...]:
    """Targets whose layers have more than one rank, also after padding."""
    by_leaf: dict[str, set[int]] = {}
    for module in modules:
        by_leaf.setdefault(module.leaf, set()).add(padded(module.rank))
    return tuple(leaf for leaf, found in by_leaf.items() if len(found) > 1)


def _padded_ranks(modules: tuple[ServedModule, ...]) -> tuple[str, ...]:
    """Targets whose rank is padded, where there is another target that comes after."""
    leaves = {module.leaf for module in modules}
    odd = tuple(dict.fromkeys(m.leaf for m in modules if padded(m.rank) != m.rank))
    return odd if len(leaves) > 1 else ()


def _pattern(settings: Settings) -> tuple[str, ...]:
    targets = settings.target_modules
    return (targets,) if isinstance(targets, str) and targets.lower() not in ("all-linear", "all") else ()


def _saved_modules(facts: CheckpointFacts, settings: Settings) -> Iterator[ServedModule]:
    for module in facts.adapted:
        if module.rank:
            kind = _saved_kind(module, settings)
            rank = module.configured_rank or settings.r if kind == "experts" else module.rank
            yield ServedModule(module.target, kind, rank, settings.alpha_of(module.target))


def _saved_kind(module: AdaptedModule, settings: Settings) -> Kind:
    if module.a is not None and "lora_embedding_A" in module.a.name:
        return "embedding"
    if module.a is not None and len(module.a.shape) > 2:
        return "convolution"
    fused = module.target.endswith(".experts") or bool(
        settings.target_parameters and any(module.target in name for name in settings.target_parameters)
    )
    return "experts" if fused else "linear"


def _kind(kind: str, kernel: int) -> Kind:
    if kind == "Parameter":
        return "experts"
    if "Embedding" in kind:
        return "embedding"
    return "convolution" if kernel > 1 or "Conv2d" in kind or "Conv3d" in kind else "linear"


def _lacking(facts: CheckpointFacts) -> Iterator[str]:
    """What mlx-lm asks of its own folder (``load_adapters`` of ``mlx_lm/tuner/utils.py``)."""
    if not facts.has("adapters.safetensors"):
        yield "adapters.safetensors"
    if facts.config is None:
        yield "adapter_config.json"
    else:
        yield from (name for name in ("num_layers", "lora_parameters") if name not in facts.config.fields)
