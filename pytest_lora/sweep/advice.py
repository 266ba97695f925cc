"""Where to start: a rank from what practitioners do, with the reason. Advice for a sweep, never a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from torch import nn
    from transformers import PretrainedConfig

DEFAULT = 8
"""Default of PEFT, and the rank at which LoRA (arXiv:2106.09685, section 7.2) stops gaining on GPT-3."""
FEW_EXAMPLES = 1_000
MANY_EXAMPLES = 100_000
WIDE = 8192
"""Hidden size of the 70B models."""


@dataclass(frozen=True, slots=True)
class RankAdvice:
    """A starting point.

    Attributes:
        rank: The rank to start with.
        ranks: What to sweep around it.
        reasons: Why, one a step.
    """

    rank: int
    ranks: tuple[int, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        tried = ", ".join(map(str, self.ranks))
        return f"start with r={self.rank} ({'; '.join(self.reasons)}); measure it: rank_sweep over {tried}"


def advise(width: int, smallest_side: int, n_examples: int, domain_shift: bool = False) -> RankAdvice:
    """The advice for a base of a hidden size, whose narrowest target is ``smallest_side`` wide.

    Few examples 4, default 8, many examples or a domain shift 16, both 32; twice as much on a wide base; never more
    than half the narrowest target, above which a LoRA saves nothing.
    """
    if n_examples < FEW_EXAMPLES and not domain_shift:
        rank, reasons = 4, [f"{n_examples:,} examples are few: a larger rank would learn them by heart"]
    elif n_examples >= MANY_EXAMPLES and domain_shift:
        rank, reasons = 32, [f"{n_examples:,} examples of another domain need and fill a larger rank"]
    elif n_examples >= MANY_EXAMPLES:
        rank, reasons = 16, [f"{n_examples:,} examples fill a larger rank; 32 if they are of another domain"]
    elif domain_shift:
        rank, reasons = 16, ["another domain needs a larger change of the weights"]
    else:
        rank, reasons = DEFAULT, [f"the default for {n_examples:,} examples"]
    if width >= WIDE:
        rank *= 2
        reasons.append(f"doubled, as the base is {width:,} wide")
    if rank > (most := max(1, smallest_side // 2)):
        rank = most
        reasons.append(f"no more than half of the narrowest target, which is {smallest_side} wide")
    around = (max(1, rank // 2), rank, min(2 * rank, smallest_side))
    return RankAdvice(rank, tuple(dict.fromkeys(around)), tuple(reasons))


def suggest_rank(
    base: nn.Module | PretrainedConfig | str | os.PathLike[str],
    n_examples: int,
    targets: str | Iterable[str] = "all-linear",
    *,
    domain_shift: bool = False,
) -> RankAdvice:
    """A rank to start with, and why: what practitioners do, not what was measured. ``rank_sweep`` measures.

    Args:
        base: A live model, a ``PretrainedConfig``, or the path of a model folder or ``config.json``.
        n_examples: Training examples, at least 1.
        targets: Names of target modules, or ``"all-linear"``.
        domain_shift: Whether the data are unlike what the base was trained on.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``n_examples`` is below 1, ``targets`` match nothing, or the base cannot be built.
    """
    if isinstance(n_examples, bool) or not isinstance(n_examples, int):
        raise TypeError(f"n_examples must be a whole number, not {n_examples!r}")
    if n_examples < 1:
        raise ValueError(f"n_examples must be at least 1, not {n_examples}")
    if not isinstance(domain_shift, bool):
        raise TypeError(f"domain_shift must be True or False, not {domain_shift!r}")
    from pytest_lora.inspection.base import base_facts, base_parameters
    from pytest_lora.inspection.skeleton import resolve_base
    from pytest_lora.inspection.survey import survey

    found = survey(resolve_base(base))
    facts = base_facts(found, base_parameters(found))
    modules = [m for m in facts.modules if m.is_linear and m.name != facts.output_embeddings]
    wanted = None if targets == "all-linear" else _names(targets)
    if wanted is not None:
        modules = [m for m in facts.modules if _matches(m.name, wanted)]
    if not modules:
        raise ValueError(f"targets: {targets!r} match no module of {facts.architecture}")
    width = getattr(getattr(found.root, "config", None), "hidden_size", None)
    smallest = min(min(m.in_features, m.out_features) for m in modules)
    return advise(width or max(m.in_features for m in modules), smallest, n_examples, domain_shift)


def _names(targets: Any) -> tuple[str, ...]:
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"targets must be names of modules or 'all-linear', not {targets!r}")
    return names


def _matches(name: str, wanted: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in wanted)
