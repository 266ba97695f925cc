"""Where to start: a rank from what the adapter has to hold, and a rate. Advice for a sweep, never a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_lora.arguments import require_number, require_whole
from pytest_lora.sweep import claims
from pytest_lora.sweep.capacity import Capacity, capacity_of, parameters_of
from pytest_lora.sweep.claims import Claim

if TYPE_CHECKING:
    from pytest_lora.sweep.capacity import Base

Purpose = Literal["sft", "rl", "classification", "continued pretraining"]

DEFAULT, REINFORCED, PRETRAINED = 8, (1, 8, 32), 256
"""The rank where the data ask for less; what is swept for reinforcement learning; the least for new knowledge. The
claims of ``pytest_lora.sweep.claims`` have the sources."""

SHORT_RUN = 100
"""Optimizer steps up to which a rate is fifteen instead of ten times that of full fine-tuning."""
SMALL_BASE = 5 * 10**9
"""Parameters below which the swept models were best at 1e-3."""
LARGE_BATCH = 32


@dataclass(frozen=True, slots=True)
class RankAdvice:
    """A starting point.

    Attributes:
        rank: The rank to start with, a power of two unless a narrow layer forbids it.
        ranks: What to sweep around it.
        purpose: What for.
        tokens: Completion tokens that there are to learn; None where they do not matter.
        wanted: The rank at which the adapter has as many parameters as there are tokens; None without tokens.
        capacity: Parameters of the targets for each unit of rank.
        reason: Why this rank, in one line.
        claims: What it rests on, each with its source and how sure it is.
    """

    rank: int
    ranks: tuple[int, ...]
    purpose: Purpose
    tokens: int | None
    wanted: float | None
    capacity: Capacity
    reason: str
    claims: tuple[Claim, ...]

    def __str__(self) -> str:
        tried = ", ".join(map(str, self.ranks))
        head = f"start with r={self.rank} ({self.reason}); measure it: rank_sweep over {tried}"
        return "\n".join((head, *(f"  - {claim}" for claim in self.claims)))


@dataclass(frozen=True, slots=True)
class RateAdvice:
    """A learning rate to start with.

    Attributes:
        rate: The peak learning rate.
        rates: What to sweep around it.
        reason: Why this rate, in one line.
        claims: What it rests on, each with its source and how sure it is.
    """

    rate: float
    rates: tuple[float, ...]
    reason: str
    claims: tuple[Claim, ...]

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:g}" for rate in self.rates)
        head = f"start at {self.rate:g} ({self.reason}); measure it: a sweep over {tried}"
        return "\n".join((head, *(f"  - {claim}" for claim in self.claims)))


def advise(capacity: Capacity, purpose: Purpose, tokens: int | None) -> RankAdvice:
    """The advice for targets of a capacity and so many completion tokens."""
    wanted = None if tokens is None else tokens / capacity.per_rank
    rank, reason, said = _by_purpose(purpose, wanted)
    held = f"{capacity.per_rank:,} parameters for each unit of rank"
    if wanted is not None:
        reason = f"{tokens:,} tokens against {held} ask for {_digits(wanted)}; {reason}"
    most = max(1, capacity.narrowest // 2)
    ranks = REINFORCED if purpose == "rl" else (rank // 2, rank, 2 * rank)
    if rank > most:
        rank = most
        reason += f"; no more than {most}, half of the narrowest target: above, consider full fine-tuning"
    around = sorted({min(max(1, one), most) for one in (*ranks, rank)})
    return RankAdvice(
        rank=rank,
        ranks=tuple(around),
        purpose=purpose,
        tokens=tokens,
        wanted=wanted,
        capacity=capacity,
        reason=reason,
        claims=(*said, claims.ALL_LINEAR, claims.ALPHA),
    )


def _by_purpose(purpose: Purpose, wanted: float | None) -> tuple[int, str, tuple[Claim, ...]]:
    """The rank before it is bounded, the reason, and its claims."""
    if purpose == "rl":
        return REINFORCED[1], "reinforcement learning needs little", (claims.LITTLE_TO_LEARN,)
    if purpose == "classification" or wanted is None:
        return DEFAULT, "labels need little", (claims.LABELS, claims.DEFAULT_RANK)
    rank = _power_of_two(wanted)
    if purpose == "continued pretraining":
        reason = f"new knowledge wants at least {PRETRAINED}" if rank < PRETRAINED else "rounded up"
        return max(rank, PRETRAINED), reason, (claims.CAPACITY, claims.NEW_KNOWLEDGE)
    if rank < DEFAULT:
        reason = f"less than {DEFAULT} saves next to nothing"
        return DEFAULT, reason, (claims.CAPACITY, claims.SMALL_DATA, claims.DEFAULT_RANK)
    return rank, "rounded up", (claims.CAPACITY,)


def _power_of_two(least: float) -> int:
    rank = 1
    while rank < least:
        rank *= 2
    return rank


def _digits(wanted: float) -> str:
    return f"r={wanted:.2g}" if wanted < 10 else f"r={wanted:.0f}"


def suggest_rank(
    base: Base,
    *,
    tokens: int | None = None,
    examples: int | None = None,
    tokens_per_example: int | None = None,
    targets: str | Iterable[str] = "all-linear",
    purpose: Purpose = "sft",
) -> RankAdvice:
    """A rank to start with, from how much the adapter has to hold. ``rank_sweep`` measures which one suffices.

    Args:
        base: A live model, a ``PretrainedConfig``, the path of a model folder or ``config.json``, or a public name.
        tokens: Completion tokens of the data, those that a loss is computed on; each once, whatever the epochs.
        examples: Examples, in place of ``tokens``, with
        tokens_per_example: the completion tokens that each has on average.
        targets: Names of target modules, or ``"all-linear"``.
        purpose: ``"sft"``; ``"rl"`` and ``"classification"``, which need little and no count of tokens; or
            ``"continued pretraining"``.

    Returns:
        The rank, what to sweep around it, and each claim it rests on with source and certainty.

    Raises:
        TypeError: An argument has the wrong type, or tokens are missing.
        ValueError: One is out of its range, ``targets`` match nothing, or the base cannot be built.
    """
    require_purpose(purpose)
    counted = _tokens(tokens, examples, tokens_per_example)
    if counted is None and purpose in ("sft", "continued pretraining"):
        raise TypeError(
            f"suggest_rank needs tokens= for {purpose}: the completion tokens of the data; or examples= and "
            "tokens_per_example="
        )
    return advise(
        capacity_of(base, targets), purpose, None if purpose in ("rl", "classification") else counted
    )


def _tokens(tokens: int | None, examples: int | None, length: int | None) -> int | None:
    for name, value in (("tokens", tokens), ("examples", examples), ("tokens_per_example", length)):
        if value is not None:
            require_whole(name, value, least=1)
    if tokens is not None and (examples is not None or length is not None):
        raise TypeError(
            "tokens: leave examples and tokens_per_example out, which are for where tokens are not known"
        )
    if examples is not None and length is not None:
        return examples * length
    if examples is not None:
        raise TypeError(
            "examples: say tokens_per_example too; examples alone do not tell how much there is to learn"
        )
    if length is not None:
        raise TypeError("tokens_per_example: say examples too")
    return tokens


def require_purpose(purpose: Any) -> None:
    """Refuse what is no purpose.

    Raises:
        ValueError: The message has those that are known.
    """
    if purpose not in get_args(Purpose):
        raise ValueError(f"purpose must be one of {', '.join(map(repr, get_args(Purpose)))}, not {purpose!r}")


def suggest_learning_rate(
    base: Base,
    *,
    purpose: Purpose = "sft",
    full_rate: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
) -> RateAdvice:
    """A learning rate to start with; at twice the scaling (alpha / rank), half the rate makes the same step.

    Args:
        base: As for ``suggest_rank``; its size decides.
        purpose: As for ``suggest_rank``.
        full_rate: The rate of full fine-tuning on the same data, where you know one: LoRA's is a multiple of it.
        steps: Optimizer steps of the run: in very short ones the multiple is larger.
        batch_size: Sequences to one optimizer step, of which LoRA bears fewer.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: One is out of its range, or the base cannot be built.
    """
    require_purpose(purpose)
    if full_rate is not None:
        require_number("full_rate", full_rate, above=0.0)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value is not None:
            require_whole(name, value, least=1)
    if full_rate is not None:
        short = steps is not None and steps <= SHORT_RUN
        times = 15 if short else 10
        rate, reason = times * full_rate, f"{times} times {full_rate:g}, that of full fine-tuning"
        said: tuple[Claim, ...] = (claims.TEN_TIMES,)
        if short:
            said = (*said, claims.FIFTEEN_TIMES)
    else:
        rate, reason, said = _usual_rate(purpose, parameters_of(base))
    more = (claims.LARGE_BATCH,) if batch_size is not None and batch_size > LARGE_BATCH else ()
    rates = tuple(float(f"{one:.2g}") for one in (rate / 3, rate, 3 * rate))
    return RateAdvice(rates[1], rates, reason, (*said, *more, claims.SWEEP, claims.ALPHA))


def _usual_rate(purpose: Purpose, parameters: int) -> tuple[float, str, tuple[Claim, ...]]:
    if purpose == "rl":
        return 1e-5, "as GRPO was run", (claims.RL_RATES, claims.TEN_TIMES)
    if purpose == "continued pretraining":
        return 1e-4, "the middle of what was swept", (claims.PRETRAINING_RATES,)
    small = parameters < SMALL_BASE
    size = f"{parameters / 1e9:.2g} billion parameters"
    return (1e-3 if small else 3e-4), f"for {size}", (claims.SWEPT_RATES, claims.QLORA_RATES)
