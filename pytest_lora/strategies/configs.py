"""Configurations that are valid for their base by construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from hypothesis import strategies as st
from peft import LoraConfig

from pytest_lora.expect import Expect
from pytest_lora.facts.settings import alpha_divisor
from pytest_lora.inspection.quiet import unexplained
from pytest_lora.strategies.bases import BaseTargets, Target, targets_of
from pytest_lora.strategies.search_space import (
    INITS,
    RANKS,
    VARIANTS,
    SearchSpace,
    narrowed,
    require_ranks,
    require_variants,
    suits,
)

if TYPE_CHECKING:
    import os

    from torch import nn
    from transformers import PretrainedConfig

Draw = Callable[[st.SearchStrategy[Any]], Any]


_DROPOUTS = (0.0, 0.05, 0.1)
_BOOLEANS = st.booleans()
_INDEX = st.integers(0, 2**16 - 1)
"""Of a list whose length differs from example to example: one choice, also where there is but one value."""
_LIMITS = Expect()
DEFAULT_ALPHA = 8
"""``LoraConfig().lora_alpha``, which is left out where it is meant."""


class Choice(NamedTuple):
    """What ``target_modules`` says and which targets that are."""

    written: list[str] | str
    targets: tuple[Target, ...]

    @property
    def size(self) -> int:
        """The largest rank for all of them together."""
        return min(target.size for target in self.targets)


def lora_configs(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str] | None = None,
    *,
    ranks: Iterable[int] = RANKS,
    targets: str | Iterable[str] | None = None,
    variants: Iterable[str] = VARIANTS,
) -> st.SearchStrategy[LoraConfig]:
    """Draw a ``LoraConfig`` that is valid for a base: ``check_config`` has neither error nor warning for it.

    It varies rank, alpha, target modules (names, a regular expression, "all-linear"), rank and alpha patterns,
    blocks, dropout, bias, rsLoRA, DoRA, initialisations that suit the weights, and modules to save. A failing
    example shrinks to the fewest targets, the smallest rank, one block, and defaults for the rest; Hypothesis
    prints it as the call of ``LoraConfig`` that makes it.

    Args:
        base: A live model without adapter, a ``PretrainedConfig``, or the path of a model folder or
            ``config.json``. Without one, names are those of Llama's linear layers, or ``targets``, and nothing
            is drawn that depends on blocks, biases, values or sizes.
        ranks: The ranks to draw from. A rank at which an adapter would hold more numbers than the
            matrix that it adapts is not drawn for it.
        targets: Names to draw from (the last part of a module's name), or "all-linear". Default: all that PEFT
            can adapt in this base.
        variants: What may be added to plain LoRA, of "rslora", "dora" and the initialisations "gaussian",
            "orthogonal", "olora", "pissa", "pissa_niter_4"; nothing for plain LoRA alone. An initialisation
            that does not suit the weights of the drawn targets is left out.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base cannot be built or carries an adapter, a name is none of this base, a variant is
            unknown, or every rank is too large for every target.
    """
    wanted = require_variants(variants)
    return drawn_configs(narrowed(targets_of(base), require_ranks(ranks), targets, wanted))


class Kind(NamedTuple):
    """What is added to plain LoRA."""

    rslora: bool
    dora: bool
    init: str | None

    @property
    def even(self) -> bool:
        """Whether ranks must be even: the orthogonal initialisation splits them in halves."""
        return self.init == "orthogonal"


@st.composite
def drawn_configs(draw: Draw, space: SearchSpace) -> LoraConfig:
    """One configuration out of what a base has space for."""
    with unexplained():
        return made(draw, drawn_fields(draw, space))


def made(draw: Draw, fields: dict[str, Any]) -> LoraConfig:
    """The configuration with these fields, in a way that Hypothesis prints as the call that makes it."""
    config: LoraConfig = draw(
        st.builds(LoraConfig, **{name: st.just(value) for name, value in fields.items()})
    )
    return config


def drawn_fields(draw: Draw, space: SearchSpace) -> dict[str, Any]:
    """Fields that are not at their defaults, in the order in which people write them.

    What is drawn does not depend on the targets: taking one away must leave the rest of an example as it is,
    or it would not shrink. What does not suit the targets falls back to what does.
    """
    choice = drawn_choice(draw, space)
    layers = _layers(draw, space, choice)
    kind = _kind(draw, space, choice)
    rank = draw(_sampled(space.ranks_for(choice.size, even=kind.even)))
    alpha = _sound_alpha(draw(_sampled(_ALPHAS)), rank, kind.rslora)
    fields: dict[str, Any] = {"r": rank}
    if alpha != DEFAULT_ALPHA:
        fields["lora_alpha"] = alpha
    fields["target_modules"] = choice.written
    if layers is not None:
        fields["layers_to_transform"] = layers
    fields |= _kind_fields(kind)
    fields |= _patterns(draw, space, choice, kind, rank, alpha)
    if dropout := draw(_sampled(_DROPOUTS)):
        fields["lora_dropout"] = dropout
    if space.base_targets.biases and draw(_BOOLEANS):
        fields["bias"] = "lora_only"
    fields |= dict(space.base_targets.needs)
    fields |= _saved(draw, space.base_targets, choice, fields)
    if any("Conv1D" in target.kinds for target in choice.targets):
        fields["fan_in_fan_out"] = True
    return fields


@cache
def _sampled_from(values: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def _sampled(values: Iterable[Any]) -> st.SearchStrategy[Any]:
    """``sampled_from``, made once for the same values: making a strategy costs more than drawing from it."""
    return _sampled_from(tuple(values))


@cache
def several(values: tuple[Any, ...]) -> st.SearchStrategy[list[Any]]:
    """A few different ones of some values, the fewest and first ones the simplest.

    As many choices whatever is drawn, one for each value: an example whose parts keep their places shrinks, and is
    varied, in half as many tries as lists would take.
    """
    last_ones_first = st.tuples(*(_BOOLEANS for _ in values))

    def chosen(drawn: tuple[bool, ...]) -> list[Any]:
        taken = [value for value, is_taken in zip(values, reversed(drawn), strict=True) if is_taken]
        return taken or [values[0]]

    return last_ones_first.map(chosen)


def drawn_choice(draw: Draw, space: SearchSpace) -> Choice:
    """Names in a list, a regular expression for the same, or "all-linear".

    The names are drawn in any case: a way with fewer choices would be the simpler one to Hypothesis.
    """
    ways = [*(["names", "regex"] if space.targets else []), *(["all-linear"] if space.all_linear else [])]
    way = draw(_sampled(ways))
    targets = draw(several(space.targets)) if space.targets else []
    if way == "all-linear":
        assert space.all_linear is not None
        return Choice(way, (space.all_linear,))
    names = [target.name for target in targets]
    return Choice(names if way == "names" else rf"(.*\.)?({'|'.join(names)})", tuple(targets))


def _kind(draw: Draw, space: SearchSpace, choice: Choice) -> Kind:
    rslora = "rslora" in space.variants and draw(_BOOLEANS)
    dora = "dora" in space.variants and draw(_BOOLEANS)
    init = draw(_sampled((None, *(name for name in INITS if name in space.variants))))
    if init is not None and not suits(init, choice.targets):
        init = None
    if init == "orthogonal" and not space.ranks_for(choice.size, even=True):
        init = None
    return Kind(rslora, dora, init)


def _layers(draw: Draw, space: SearchSpace, choice: Choice) -> list[int] | None:
    """Numbers for ``layers_to_transform``, which PEFT takes beside a list of names alone."""
    known = space.base_targets.blocks
    if not known:
        return None
    way, some = draw(_sampled(("one", "some", "all"))), [draw(_sampled(known)) for _ in range(3)]
    if way == "all" or isinstance(choice.written, str):
        return None
    drawn = {*some} if way == "some" else {some[-1]}
    shared = frozenset.intersection(*(target.layers for target in choice.targets))
    return sorted(shared & drawn) or None


def _sound(value: float, rslora: bool) -> bool:
    """Whether a scaling is one that no rule mentions."""
    return _LIMITS.low_scaling <= value <= (_LIMITS.max_scaling_rslora if rslora else _LIMITS.max_scaling)


_ALPHAS: tuple[int | str, ...] = (DEFAULT_ALPHA, "r", "2r", 16, 32, 64)
"""PEFT's default, the rank and twice the rank, and fixed ones."""


def _sound_alpha(written: int | str, rank: int, rslora: bool) -> int:
    """The alpha that is meant, or the first of a sound scaling."""
    return next(
        a for a in _alphas(rank, written, *_ALPHAS) if _sound(a / alpha_divisor(rank, rslora=rslora), rslora)
    )


def _alphas(rank: int, *written: int | str) -> Iterator[int]:
    for alpha in written:
        yield alpha if isinstance(alpha, int) else 2 * rank if alpha == "2r" else rank


def _kind_fields(kind: Kind) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if kind.rslora:
        fields["use_rslora"] = True
    if kind.dora:
        fields["use_dora"] = True
    if kind.init is not None:
        fields["init_lora_weights"] = kind.init
    return fields


def _patterns(
    draw: Draw, space: SearchSpace, choice: Choice, kind: Kind, rank: int, alpha: int
) -> dict[str, Any]:
    """A rank or an alpha of its own for one target, its scaling near that of the others."""
    way = draw(_sampled((None, "rank_pattern", "alpha_pattern")))
    target, index = choice.targets[draw(_INDEX) % len(choice.targets)], draw(_INDEX)
    divisor = alpha_divisor(rank, rslora=kind.rslora)
    values: list[int] = []

    def near(value: float) -> bool:
        usual = alpha / divisor
        spread = max(value, usual) / min(value, usual)
        return _sound(value, kind.rslora) and spread <= _LIMITS.max_scaling_spread

    if choice.written == "all-linear":
        way = None
    if way == "rank_pattern":
        ranks = space.ranks_for(target.size, even=kind.even)
        values = [r for r in ranks if r != rank and near(alpha / alpha_divisor(r, rslora=kind.rslora))]
    elif way == "alpha_pattern":
        alphas = dict.fromkeys(_alphas(rank, *_ALPHAS))
        values = [a for a in alphas if a != alpha and near(a / divisor)]
    return {way: {target.name: values[index % len(values)]}} if way is not None and values else {}


def _saved(draw: Draw, base_targets: BaseTargets, choice: Choice, fields: dict[str, Any]) -> dict[str, Any]:
    if not base_targets.saveable:
        return {}
    wanted, drawn = draw(_BOOLEANS), draw(several(base_targets.saveable))
    targeted = {target.name for target in choice.targets}
    chosen = [name for name in drawn if wanted and name not in targeted]
    return {"modules_to_save": [*fields.get("modules_to_save", ()), *chosen]} if chosen else {}
