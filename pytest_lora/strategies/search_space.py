"""What configurations are drawn from: the targets of a base, ranks and variants, as far as they suit each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pytest_lora.strategies.bases import BaseTargets, Target, targets_of

RANKS = range(1, 257)
"""Ranks that are drawn: LoRA (arXiv:2106.09685) uses 1 to 64, QLoRA (arXiv:2305.14314) 8 to 256."""

INITS = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4")
VARIANTS = ("rslora", "dora", *INITS)
"""What a configuration may add to plain LoRA: two flags, and initialisations that need no data."""

_READS_WEIGHTS = ("olora", "pissa", "pissa_niter_4")


class SearchSpace(NamedTuple):
    """What is drawn from: the targets of a base that take at least one of the ranks."""

    base_targets: BaseTargets
    targets: tuple[Target, ...]
    all_linear: Target | None
    ranks: tuple[int, ...]
    variants: tuple[str, ...]

    def ranks_for(self, size: int, *, even: bool = False) -> list[int]:
        """Ranks up to a size."""
        return [rank for rank in self.ranks if rank <= size and not (even and rank % 2)]


def suits(init: str, targets: Sequence[Target]) -> bool:
    """Whether an initialisation works on all of these targets without changing quantized weights."""
    if init in _READS_WEIGHTS:
        return all(target.plain for target in targets)
    return init != "orthogonal" or all(target.linear and not target.quantized for target in targets)


def narrowed(
    base_targets: BaseTargets, ranks: tuple[int, ...], targets: Any, variants: tuple[str, ...]
) -> SearchSpace:
    """The targets that are wanted and take one of the ranks.

    Raises:
        TypeError: ``targets`` are no names.
        ValueError: A name is none of this base, or every rank is too large for every target.
    """
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    named = (
        base_targets.targets
        if targets is None
        else ()
        if everything
        else base_targets.named(_require_names(targets))
    )
    whole = base_targets.all_linear if targets is None or everything else None
    if everything and whole is None:
        raise ValueError('targets: "all-linear" does not suit this base; name its modules')
    named = tuple(target for target in named if target.size >= ranks[0])
    whole = whole if whole is not None and whole.size >= ranks[0] else None
    if not named and whole is None:
        raise ValueError(f"ranks: the smallest, {ranks[0]}, is too large for every target of this base")
    return SearchSpace(base_targets, named, whole, ranks, variants)


def require_ranks(ranks: Any) -> tuple[int, ...]:
    """Whole numbers of at least 1, each once and in order; anything else is a ``TypeError`` or ``ValueError``."""
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
        raise TypeError(f"ranks must be whole numbers such as [4, 8, 16], not {ranks!r}")
    wanted = list(dict.fromkeys(ranks))
    if not wanted:
        raise ValueError("ranks must not be empty")
    for rank in wanted:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"ranks must be whole numbers, but one is {rank!r}")
        if rank < 1:
            raise ValueError(f"ranks must be at least 1, but one is {rank}")
    return tuple(sorted(wanted))


def _require_names(targets: Any) -> tuple[str, ...]:
    if isinstance(targets, str):
        raise TypeError(f'targets must be a list of names, or "all-linear", not {targets!r}')
    if not isinstance(targets, Iterable):
        raise TypeError(f"targets must be module names, not {targets!r}")
    names = tuple(targets)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"targets must be module names, but one is {wrong[0]!r}")
    if not names:
        raise ValueError("targets must not be empty; leave it out for all that can be adapted")
    return names


def require_variants(variants: Any) -> tuple[str, ...]:
    """Names of ``VARIANTS``, each once; anything else is a ``TypeError`` or ``ValueError``."""
    if isinstance(variants, str) or not isinstance(variants, Iterable):
        raise TypeError(f'variants must be a list such as ["rslora", "dora"], not {variants!r}')
    wanted = tuple(dict.fromkeys(variants))
    if unknown := [variant for variant in wanted if variant not in VARIANTS]:
        raise ValueError(f"variants: {unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return wanted


def space_of(base: Any) -> SearchSpace:
    """Everything that a base allows under the defaults."""
    return narrowed(targets_of(base), tuple(RANKS), None, VARIANTS)
