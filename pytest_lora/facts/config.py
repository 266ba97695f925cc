"""Facts about a LoraConfig and what PEFT makes of it, and of the file of a saved adapter, on one base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pytest_lora.facts.base import BaseFacts
from pytest_lora.facts.settings import Settings as Settings
from pytest_lora.facts.settings import alpha_divisor


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
        """The scaling that rank and alpha give."""
        return self.alpha / alpha_divisor(self.rank, rslora=self.use_rslora)


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

    @property
    def is_pattern(self) -> bool:
        """Whether it looks like a regular expression, or like a list written as text."""
        return _NO_NAME.search(self.name) is not None


_NO_NAME = re.compile(r"[*|()\[\]^$,+?\\]")
"""What stands in a regular expression, or in a list written as text, and in no name of a module."""


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
        own: Adapted modules that it matches, though an earlier key takes them.
        is_expression: Whether it is a regular expression at all.
        by_its_end: Whether it would match an adapted module without ``^`` at its start.
    """

    field: str
    key: str
    value: float
    decides: tuple[str, ...]
    shadowed_by: str | None
    elsewhere: tuple[str, ...]
    own: tuple[str, ...] = ()
    is_expression: bool = True
    by_its_end: bool = False


@dataclass(frozen=True, slots=True)
class Repairs:
    """What patterns of a configuration would have to be, as far as it was found out within a bound.

    Attributes:
        broken: Field and text of the first pattern that is no regular expression; None where there is none.
        mended: That text with ``*``, as in names of files, written as ``.*``; None where that is none either.
        fitting: Patterns for targets that match nothing, and the form of each that matches linear modules alone.
    """

    broken: tuple[str, str] | None = None
    mended: str | None = None
    fitting: tuple[tuple[str, str], ...] = ()


NOT_TRIED = "TimeoutError"
"""What stands for an exception where PEFT would match for longer than anybody waits."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """PEFT's own error where it stops at the configuration.

    Attributes:
        error: Class of the exception; ``NOT_TRIED`` where PEFT was not asked.
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
        repairs: What its patterns would have to be.
        applied: The fields as PEFT rewrites them for this base (names of experts, tied modules); None where it was not
            asked, or refused.
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
    repairs: Repairs = Repairs()
    applied: Settings | None = None

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
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks that ``layers_to_transform`` counts: the base's, or those of ``layer_replication``."""
        return tuple(range(len(self.settings.replicated_blocks))) or self.base.layer_indices

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


@dataclass(frozen=True, slots=True)
class Misfit:
    """A tensor whose shape is not the one that the base asks for."""

    name: str
    found: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """What PEFT makes of the file on one base.

    Attributes:
        base: The base.
        base_name: The name that the base goes by, or None.
        config: The configuration on the base; None where there is none that could be asked about.
        misfits: Tensors of another shape than this base and configuration ask for.
        missing: Keys that PEFT looks for and that the file lacks, whatever they are called there.
        unused: Keys of the file, in PEFT's spelling, that nothing looks for.
        wanted: The keys that PEFT would write for this base and configuration.
        compared: Whether PEFT could be asked at all.
        loads: Whether PEFT finds a place for every tensor and a tensor for every place.
        wrapper: Part of the base's live names (``"_orig_mod"``) by which alone the keys of the file differ; else empty.
        read_by_load_adapter: Whether the adapter is for the same model with or without its head, whose
            ``load_adapter`` (transformers) then finds the places that PEFT does not.
        drops_named: Whether PEFT finds every tensor once the adapter's name is out of the keys, and not before.
        may_be_extended: Whether the base is known by nothing but the adapter's own name for it, so that its vocabulary
            may have been extended since.
    """

    base: BaseFacts
    base_name: str | None
    config: ConfigFacts | None
    misfits: tuple[Misfit, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    wanted: frozenset[str] = frozenset()
    compared: bool = False
    loads: bool = False
    wrapper: str = ""
    read_by_load_adapter: bool = False
    may_be_extended: bool = False
    drops_named: bool = False
