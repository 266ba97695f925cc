"""What the configuration of a saved adapter means: for the modules in its file, where no base is given, and beside the
configuration under which training is to go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pytest_lora.facts.base import BaseFacts, BaseModule
from pytest_lora.facts.checkpoint import CheckpointFacts
from pytest_lora.facts.config import ConfigFacts, LayerFacts
from pytest_lora.facts.saved_tensors import AdaptedModule
from pytest_lora.facts.settings import Settings


def config_of_the_file(facts: CheckpointFacts) -> ConfigFacts | None:
    """The configuration on the modules that the file adapts; None where these are not to be judged."""
    settings = facts.settings
    if settings is None or not facts.is_judged:
        return None
    layers = tuple(_layers(facts, settings))
    if not layers:
        return None
    named = facts.config.base if facts.config else None
    modules = tuple(BaseModule(m.module, m.kind, m.in_features, m.out_features, None) for m in layers)
    base = BaseFacts(
        architecture=named or "its base",
        task_type=None,
        modules=modules,
        module_names=tuple(module.name for module in modules),
        parameters=0,
        layer_indices=(),
        heads=(),
        tied=(),
        input_embeddings=None,
        output_embeddings=None,
        vocab_size=None,
        has_biases=False,
        float_dtypes=(),
        device_types=(),
        quantization=None,
        carries_adapter=False,
        fused=(),
    )
    return ConfigFacts(
        adapter="default",
        settings=settings,
        base=base,
        layers=layers,
        names=(),
        patterns=(),
        saved_modules=(),
        token_modules=(),
        refusal=None,
        live=True,
    )


def _layers(facts: CheckpointFacts, settings: Settings) -> Iterator[LayerFacts]:
    for module in facts.adapted:
        scaling = settings.scaling_of(module.target)
        if scaling is None or module.a is None or module.b is None or not module.rank or not module.b_rank:
            continue
        fused = bool(settings.target_parameters) and not settings.targets(module.target)
        yield LayerFacts(
            module=module.name,
            kind="Parameter" if fused else "Linear",
            adapter="default",
            in_features=module.a.shape[1],
            out_features=module.b.shape[0],
            kernel=1,
            experts=1,
            rank=settings.rank_of(module.target),
            alpha=settings.alpha_of(module.target),
            scaling=scaling,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            dropout=settings.lora_dropout,
            parameters=_numbers(module),
        )


def _numbers(module: AdaptedModule) -> int:
    return sum(part.numbers for part in (module.a, module.b, module.magnitude) if part is not None)


@dataclass(frozen=True, slots=True)
class RankChange:
    """Modules of another rank.

    Attributes:
        now: The rank that the configuration gives them.
        before: The rank that they have in the checkpoint.
        modules: Their names.
    """

    now: int
    before: int
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A field with another value, as both are written in Python."""

    field: str
    now: str
    before: str


@dataclass(frozen=True, slots=True)
class ResumptionFacts:
    """What differs between a checkpoint and a configuration.

    Attributes:
        name: Name of the checkpoint.
        weights: Its file of weights.
        unusable: Why it holds no LoRA adapter that can be read; None where it does, and the rest is known.
        ranks: Modules of another rank.
        gone: Modules (or parameters) of the checkpoint that the configuration does not adapt.
        new: Modules (or parameters) that it adapts and the checkpoint does not hold.
        alpha: The first module of another alpha: its name, the alpha now and before.
        base: The base of the configuration and that of the checkpoint, where they differ.
        fields: Fields that decide which tensors there are or how they are scaled, where they differ.
        saved: The configuration of the checkpoint; None where it is not usable.
    """

    name: str
    weights: str | None
    unusable: str | None = None
    ranks: tuple[RankChange, ...] = ()
    gone: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    alpha: tuple[str, float, float] | None = None
    base: tuple[str, str] | None = None
    fields: tuple[FieldChange, ...] = ()
    saved: Settings | None = None

    @property
    def where(self) -> str:
        """The file that is compared."""
        return f"{self.weights} in {self.name}"
